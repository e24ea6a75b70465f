"""The study goes on after a kill, does not depend on the number of processes, and leaves a page that stands alone."""

import os
import re
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import pandas as pd
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from interp.claims import VERDICTS
from interp.study_plan import Setting
from tests.interp.tiny_corpus import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
TINY = Setting(
    samples=1,
    text=(48, 10),
    sweep=(24, 10),
    needle=(80, 10),
    long=(160, 10),
    repeated=(48, 2),
    context=(200, 1),
    random_subsets=2,
    heads=(),
    first_controls=("carried",),
    skip_shares=(0.5,),
)
# Depends on the machine.
TIMED = "timings.csv"


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_model(tokenizer, num_hidden_layers=3).save_pretrained(folder / "ttt")
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=1,
        num_attention_heads=2,
        max_position_embeddings=128,
    )
    LlamaForCausalLM(config).save_pretrained(folder / "attention")
    for name in ("ttt", "attention"):
        tokenizer.save_pretrained(folder / name)
    words = ["the river and the house", "and a boat went by the old mill", "Ann's dog saw the 3rd bird"]
    text = " ".join(f"{words[i % 3]} {i * i}." for i in range(900))
    (folder / "text.txt").write_text(text)
    return folder


@pytest.fixture
def study(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import study

    monkeypatch.setitem(study.SETTINGS, "smoke", TINY)
    return study


def options(models, folder, name="study"):
    named = [value for model in ("ttt", "attention") for value in ("--model", str(models / model))]
    where = ["--exp_dir", str(folder), "--exp_name", name, "--setting", "smoke", "--n_boot", "80"]
    return [*named, "--text", str(models / "text.txt"), *where]


def tables_of(folder):
    return {file.name: file.read_text() for file in (folder / "tables").glob("*.csv") if file.name != TIMED}


class Page(HTMLParser):
    """What of a page a browser would fetch or run, and what a screen reader needs."""

    def __init__(self, text):
        super().__init__()
        self.fetched, self.scripts, self.images, self.headings, self.ids, self.targets = [], 0, [], [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.fetched += [
            value for key, value in attrs if key in ("src", "href") and not value.startswith(("data:", "#"))
        ]
        self.scripts += tag == "script"
        self.ids += [given["id"]] if "id" in given else []
        self.targets += [given["href"][1:]] if given.get("href", "").startswith("#") else []
        if tag == "img":
            self.images.append(given)
        if re.fullmatch("h[1-6]", tag):
            self.headings.append(int(tag[1]))


def test_a_study_leaves_tables_verdicts_and_a_page_that_stands_alone(study, models, tmp_path):
    study.main(options(models, tmp_path, "whole"))
    tables = tables_of(tmp_path / "whole")
    assert {"claims.csv", "contrasts.csv", "freezing.csv", "answers.csv", "context.csv", "skipping.csv"} <= set(tables)
    check_page((tmp_path / "whole" / "report.html").read_text(), tmp_path / "whole")
    for file in ("report.html", "tables/claims.csv", "figures/captions.json"):
        # Where a model lies is nobody's business.
        assert str(models) not in (tmp_path / "whole" / file).read_text()


@pytest.mark.slow
def test_a_killed_study_goes_on_and_gives_the_same_tables(study, models, tmp_path, monkeypatch):
    from interp import collect as collecting

    study.main(options(models, tmp_path, "whole"))
    whole = tables_of(tmp_path / "whole")
    read, calls = collecting.read_batch, []

    def dying(*args, **kwargs):
        calls.append(1)
        if len(calls) == 12:
            raise KeyboardInterrupt
        return read(*args, **kwargs)

    # Killed in the middle of a cell, between two freezings.
    monkeypatch.setattr(collecting, "read_batch", dying)
    with pytest.raises(KeyboardInterrupt):
        study.main(options(models, tmp_path, "killed"))
    assert not (tmp_path / "killed" / "report.html").exists()
    study.main(options(models, tmp_path, "killed"))
    assert tables_of(tmp_path / "killed") == whole
    # What was read already is not read again.
    monkeypatch.setattr(collecting, "read_batch", lambda *args, **kwargs: pytest.fail("read again"))
    study.main(options(models, tmp_path, "killed"))
    assert tables_of(tmp_path / "killed") == whole


@pytest.mark.slow
def test_models_of_two_layers_have_no_thirds_but_a_study(study, models, tmp_path):
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    make_model(tokenizer, num_hidden_layers=2).save_pretrained(tmp_path / "two")
    tokenizer.save_pretrained(tmp_path / "two")
    study.main(["--model", str(tmp_path / "two"), *options(models, tmp_path)[4:]])
    claims = pd.read_csv(tmp_path / "study" / "tables" / "claims.csv")
    assert len(claims) == 8 and set(claims["theme"]) == {"trigger", "efficiency"}


def check_page(page, folder):
    found = Page(page)
    assert found.scripts == 0 and found.fetched == []
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert policy.startswith("default-src 'none'; img-src data:; style-src 'sha256-")
    assert all(image["alt"].strip() for image in found.images)
    assert len(found.images) == len(list((folder / "figures").glob("*.png"))) >= 12
    assert found.headings[0] == 1 and all(
        b <= a + 1 for a, b in zip(found.headings[:-1], found.headings[1:], strict=True)
    )
    assert len(set(found.ids)) == len(found.ids) and set(found.targets) <= set(found.ids)
    claims = pd.read_csv(folder / "tables" / "claims.csv")
    assert set(claims["model"]) == {"ttt"} and set(claims["verdict"]) <= set(VERDICTS) and len(claims) == 10
    assert all(claim.split("(")[0].strip() in page for claim in claims["claim"])
    assert "nan" not in re.sub(r"base64,[^\"]*", "", page).split() and "{{" not in page


def test_another_study_is_not_mixed_in(study, models, tmp_path, monkeypatch):
    folder = tmp_path / "study"
    folder.mkdir()
    (folder / "plan.json").write_text("{}")
    with pytest.raises(ValueError, match="holds another study"):
        study.main(options(models, tmp_path))
    (folder / "plan.json").unlink()
    (folder / "mine.txt").write_text("precious")
    with pytest.raises(ValueError, match="holds no study: it is not written into"):
        study.main(options(models, tmp_path))
    with pytest.raises(ValueError, match="holds no study: it is not overwritten"):
        study.main([*options(models, tmp_path), "--overwrite"])
    assert (folder / "mine.txt").exists()
    with pytest.raises(ValueError, match="processes must be 2 as asked, the launch made 1"):
        study.main([*options(models, tmp_path), "--processes", "2"])
    with pytest.raises(ValueError, match="the study needs a model with TTT layers"):
        study.main(["--model", str(models / "attention"), "--exp_dir", str(tmp_path)])


@pytest.mark.slow
def test_two_processes_give_the_tables_of_one(models, tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    config = ROOT / "scripts" / "configs" / "two_cpu.yaml"
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(config)]
    for name, command in (("one", [sys.executable]), ("two", launch)):
        number = ["--processes", "2"] if name == "two" else []
        script = [str(ROOT / "scripts" / "study.py"), *options(models, tmp_path, name), *number]
        done = subprocess.run([*command, *script], env=environment, capture_output=True, text=True, timeout=1200)
        assert done.returncode == 0, done.stderr[-2000:]
    assert tables_of(tmp_path / "one") == tables_of(tmp_path / "two")
