"""One self-contained HTML page that shows the text of a run coloured by plasticity."""

import base64
import hashlib
import html
import json
import os
import re
import unicodedata
from pathlib import Path
from typing import Any

import numpy as np

from interp.bucketing import BUCKET_NAMES
from interp.files import write_text
from interp.run_folder import Run
from interp.tables import pooled_plasticity
from interp.wording import count_of

MAX_TOKENS = 8192
MAX_DOCUMENTS = 8
NUM_COLOURS = 9
_TEMPLATE = Path(__file__).with_suffix(".html")
_JOINERS = "\u00ad\u200c\u200d"
_FIELD = re.compile(r"\{\{(\w+)\}\}")


def write_text_view(
    run: Run,
    path: str | os.PathLike,
    *,
    max_tokens: int = MAX_TOKENS,
    max_documents: int = MAX_DOCUMENTS,
) -> Path:
    """Write the page of `render_text_view` as UTF-8 to `path`, replacing an older file in one step; return it."""
    write_text(path, render_text_view(run, max_tokens=max_tokens, max_documents=max_documents))
    return Path(path)


def render_text_view(run: Run, *, max_tokens: int = MAX_TOKENS, max_documents: int = MAX_DOCUMENTS) -> str:
    """Make an HTML page with the first `max_tokens` tokens of each of the first `max_documents` documents.

    Layer (or all layers pooled), bucket, document and colour scale are chosen in the page; it needs no other
    file and no network, and what it leaves out it says. Every text of the run is escaped. ValueError when a
    limit is below 1.
    """
    for name, value in (("max_tokens", max_tokens), ("max_documents", max_documents)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} must be a positive integer, got {value!r}")
    template = _TEMPLATE.read_text(encoding="utf-8")
    fields = {
        "policy": _content_policy(template),
        "title": html.escape(f"Plasticity over the text: {run.model_name}"),
        "about": _about(run, max_documents),
        "definitions": _definitions(run.meta["definitions"]),
        "data": _script_json(_payload(run, max_tokens, max_documents)),
    }
    return _FIELD.sub(lambda match: fields[match[1]], template)


def visible_token(text: str) -> str:
    """Replace control and direction characters by visible stand-ins; tab and newline stay.

    C0 controls become their Unicode pictures; others (C1, direction overrides, zero-width spaces) ⟨U+XXXX⟩.
    """
    return "".join(_visible_character(character) for character in text)


def _visible_character(character: str) -> str:
    code = ord(character)
    if character in "\n\t":
        return character
    if code < 0x20:
        return chr(0x2400 + code)
    if code == 0x7F:
        return "\u2421"
    if character not in _JOINERS and unicodedata.category(character) in ("Cc", "Cf", "Cs", "Zl", "Zp"):
        return f"\u27e8U+{code:04X}\u27e9"
    return character


def _payload(run: Run, max_tokens: int, max_documents: int) -> dict[str, Any]:
    series = np.column_stack([pooled_plasticity(run.plasticity), run.plasticity]).astype(np.float64)
    kept = (run.tokens["position"] < max_tokens) & (run.tokens["document"].rank(method="dense") <= max_documents)
    names = ["all layers pooled", *(f"layer {layer}" for layer in run.ttt_layers)]
    shown = series[kept.to_numpy()]
    titles = {entry["document"]: entry["name"] for entry in run.meta["documents"]}
    documents = []
    for index, rows in run.tokens[kept].groupby("document", sort=True):
        total = int((run.tokens["document"] == index).sum())
        documents.append(
            {
                "name": visible_token(f"{index}: {titles[index] or 'unnamed'}"),
                "note": _cut_note(len(rows), total),
                "tokens": [visible_token(token) for token in rows["token"]],
                "bucket": rows["bucket"].tolist(),
                "loss": _rounded(rows["loss"].to_numpy()),
                "answer": np.flatnonzero(rows["is_answer"]).tolist(),
                "plasticity": [_rounded(column) for column in series[rows.index.to_numpy()].T],
            }
        )
    return {
        "buckets": list(BUCKET_NAMES),
        "series": [
            {"name": name, "edges": _colour_edges(values)} for name, values in zip(names, shown.T, strict=True)
        ],
        "documents": documents,
    }


def _colour_edges(values: np.ndarray) -> dict[str, list[float] | None]:
    """Inner borders of the colours by quantile and by logarithm (0.5% cut off at both ends); None if all are 0."""
    positive = values[np.isfinite(values) & (values > 0)]
    if positive.size == 0:
        return {"rank": None, "log": None}
    low, high = np.quantile(positive, [0.005, 0.995])
    rank = np.quantile(positive, np.arange(1, NUM_COLOURS) / NUM_COLOURS)
    return {"rank": _rounded(rank), "log": _rounded(np.geomspace(low, high, NUM_COLOURS + 1)[1:-1])}


def _cut_note(shown: int, total: int) -> str:
    if shown == total:
        return f"The whole document: {total:,} tokens."
    return f"The first {shown:,} of the {total:,} tokens of this document; the rest is left out of this page."


def _about(run: Run, max_documents: int) -> str:
    meta = run.meta
    total = len(meta["documents"])
    documents = count_of(total, "document")
    if total > max_documents:
        documents = f"the first {max_documents} of {total} documents (the rest is left out of this page)"
    lines = [
        f"Model {run.model_name}, corpus {meta['corpus'].get('dataset_type', 'unnamed')}, {documents}.",
        "Colour shows how much each token writes into the inner weights of the chosen layer; underlined tokens are "
        "answers. Point at a token, or focus the text and press the left and right arrow keys, for its numbers.",
    ]
    return "\n".join(f'<p class="soft">{html.escape(visible_token(line))}</p>' for line in lines)


def _definitions(definitions: dict[str, Any]) -> str:
    pooled = {"all layers pooled": "root of the sum over layers of the squared plasticity (norm of the whole write)"}
    items = "".join(
        f"<dt>{html.escape(str(name))}</dt><dd>{html.escape(visible_token(str(text)))}</dd>"
        for name, text in {**definitions, **pooled}.items()
    )
    return f'<h2>Definitions</h2><dl class="soft">{items}</dl>'


def _rounded(values: np.ndarray) -> list[float | None]:
    return [float(f"{value:.4g}") if np.isfinite(value) else None for value in values.tolist()]


def _script_json(payload: dict[str, Any]) -> str:
    """JSON in ASCII without `<`, `>`, `&` and `/`: no text can end the script element or form an address."""
    text = json.dumps(payload, ensure_ascii=True, allow_nan=False, separators=(",", ":"))
    for character, escape in (("<", "\\u003c"), (">", "\\u003e"), ("&", "\\u0026"), ("/", "\\/")):
        text = text.replace(character, escape)
    return text


def _content_policy(template: str) -> str:
    """Policy under which the browser runs and styles with what the template holds and loads nothing."""
    script = re.search(r"<script>(.*?)</script>", template, re.DOTALL)
    style = re.search(r"<style>(.*?)</style>", template, re.DOTALL)
    if script is None or style is None:
        raise ValueError(f"{str(_TEMPLATE)!r} must hold one <script> and one <style> element")
    hashes = (base64.b64encode(hashlib.sha256(match[1].encode()).digest()).decode() for match in (script, style))
    return "default-src 'none'; script-src 'sha256-{}'; style-src 'sha256-{}'".format(*hashes)
