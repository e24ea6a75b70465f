"""The page shows every token, escapes everything and needs nothing from elsewhere."""

import base64
import hashlib
import json
import re
from html.parser import HTMLParser

import pytest

from interp.text_view import NUM_COLOURS, render_text_view, visible_token, write_text_view
from tests.interp.planted_run import planted_run

NASTY = [
    "</script><script>alert(1)</script>",
    '"quo\'te"',
    "a\nb\tc",
    "\x00\x1b\x7f",
    "<!--",
    "{{data}}",
    "https://x.y/z",
    "&lt;",
]


class Elements(HTMLParser):
    """Collect start tags with attributes, and the text of script and style elements."""

    def __init__(self, page):
        super().__init__()
        self.tags, self.texts = [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.texts.append((self.tags[-1], data))


@pytest.fixture
def run(tmp_path):
    run = planted_run(tmp_path / "run", documents=2, tokens=40, answers=2, silent_layers=[1])
    run.tokens.loc[: len(NASTY) - 1, "token"] = NASTY
    run.meta["model"]["id"] = "<b>model</b>"
    run.meta["documents"][0]["name"] = "</script><i>"
    return run


def payload(page):
    return json.loads(re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)[1])


def test_tokens_come_back_from_the_page(run):
    data = payload(render_text_view(run))
    tokens = data["documents"][0]["tokens"]
    assert tokens[: len(NASTY)] == [visible_token(token) for token in NASTY]
    assert data["documents"][0]["name"] == "0: </script><i>"
    assert [len(document["tokens"]) for document in data["documents"]] == [40, 40]
    assert data["documents"][0]["answer"] == [38, 39] and data["documents"][0]["loss"][0] is None


def test_nothing_of_the_text_becomes_markup(run):
    elements = Elements(render_text_view(run))
    names = [tag for tag, _ in elements.tags]
    assert names.count("script") == 2 and "b" not in names and "i" not in names
    assert not any(attribute.startswith("on") for _, attributes in elements.tags for attribute in attributes)


def test_the_page_refers_to_nothing_outside(run):
    page = render_text_view(run)
    elements = Elements(page)
    assert not re.search(r"https?://", page)
    assert not any({"src", "href", "action"} & set(attributes) for _, attributes in elements.tags)
    assert not re.search(r"@import|url\(|fetch\(|XMLHttpRequest|innerHTML", page)


def test_the_policy_allows_only_the_pages_own_script_and_style(run):
    elements = Elements(render_text_view(run))
    policy = next(a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy")
    assert policy.startswith("default-src 'none'; ")
    for (tag, attributes), text in elements.texts:
        if attributes.get("type") != "application/json":
            digest = base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()
            assert f"{tag}-src 'sha256-{digest}'" in policy


def test_layers_and_buckets_can_be_chosen(run):
    page = render_text_view(run)
    data = payload(page)
    assert [series["name"] for series in data["series"]] == ["all layers pooled", "layer 0", "layer 1"]
    assert data["buckets"] == ["SYNTAX", "RETRIEVAL", "NOVELTY", "OTHER"]
    assert data["documents"][0]["bucket"] == run.tokens["bucket"][:40].tolist()
    for control in ("document", "series", "scale"):
        assert re.search(rf"<label>[A-Z]\w+ <select id=\"{control}\">", page)


def test_colours_rise_with_plasticity_and_silent_layers_have_none(run):
    data = payload(render_text_view(run))
    for scale in ("rank", "log"):
        edges = data["series"][1]["edges"][scale]
        assert len(edges) == NUM_COLOURS - 1 and edges == sorted(edges)
        assert data["series"][2]["edges"][scale] is None
    values = data["documents"][0]["plasticity"][1] + data["documents"][1]["plasticity"][1]
    lowest = sum(value < data["series"][1]["edges"]["rank"][0] for value in values)
    assert lowest == pytest.approx(len(values) / NUM_COLOURS, abs=1)


def test_what_is_left_out_is_said(run):
    page = render_text_view(run, max_tokens=30, max_documents=1)
    (document,) = payload(page)["documents"]
    assert len(document["tokens"]) == 30 and "first 30 of the 40 tokens" in document["note"]
    assert "the first 1 of 2 documents" in page
    assert "The whole document: 40 tokens." in payload(render_text_view(run))["documents"][0]["note"]


def test_the_page_names_the_model_without_its_local_path(run):
    run.meta["model"]["id"] = "/home/someone/models/mine"
    page = render_text_view(run)
    assert "Plasticity over the text: mine" in page and "someone" not in page
    run.meta["model"]["id"] = "owner/name"
    assert "Plasticity over the text: owner/name" in render_text_view(run)


@pytest.mark.parametrize("name", ["max_tokens", "max_documents"])
def test_limits_must_be_positive(run, name):
    with pytest.raises(ValueError, match=f"{name} must be a positive integer, got 0"):
        render_text_view(run, **{name: 0})


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("a\n\tb", "a\n\tb"),
        ("\x00\x1b\r", "\u2400\u241b\u240d"),
        ("\x7f", "\u2421"),
        ("\u202eabc", "\u27e8U+202E\u27e9abc"),
        ("\x85", "\u27e8U+0085\u27e9"),
        ("e\u0301 \U0001f468\u200d\U0001f469 \ufffd", "e\u0301 \U0001f468\u200d\U0001f469 \ufffd"),
    ],
)
def test_characters_that_would_not_be_seen_are_made_visible(text, shown):
    assert visible_token(text) == shown


def test_the_file_is_the_page(run, tmp_path):
    path = write_text_view(run, tmp_path / "text.html")
    assert path.read_text(encoding="utf-8") == render_text_view(run)
