"""One self-contained HTML page, without scripts: the text coloured by what each token's write adds to a target."""

import base64
import hashlib
import html
import os
from pathlib import Path

import numpy as np
import pandas as pd

from interp.attribution_data import AttributedText
from interp.files import write_text
from interp.text_view import visible_token
from interp.wording import format_number

__all__ = ["render_attribution", "write_attribution_page"]

SHADES = 9
_RAISES, _LOWERS = (0, 114, 178), (213, 94, 0)


def write_attribution_page(data: AttributedText, path: str | os.PathLike, summary: pd.DataFrame | None = None) -> Path:
    """Write the page of `render_attribution` as UTF-8 to `path`, replacing an older file in one step; return it."""
    write_text(path, render_attribution(data, summary))
    return Path(path)


def render_attribution(data: AttributedText, summary: pd.DataFrame | None = None) -> str:
    """Make the page: the text, the writes that count most, and `summary` (`part`, `contribution`) where it is given.

    Blue raises the target, orange lowers it, shades go by the root of the size; every token tells its numbers on
    hovering. All texts are escaped, the page may load and run nothing.
    """
    style = _style()
    digest = base64.b64encode(hashlib.sha256(style.encode()).digest()).decode()
    question = html.escape(visible_token(data.question))
    parts = [
        "<!DOCTYPE html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f"<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'sha256-{digest}'\">",
        f"<title>Writes behind {question}</title><style>{style}</style></head><body>",
        f"<h1>{question} = {format_number(data.value)}</h1>",
        f"<p>asked at token {data.position} of {len(data.tokens):,}. Colour is what the write of a token adds: "
        '<span class="r7">raises</span> <span class="l7">lowers</span>; underlined tokens told the answer. A write is '
        "not its token alone: short convolutions put what one token says into the write of the next.</p>",
        f'<p class="text">{_text(data)}</p>',
        "<h2>Largest writes</h2>",
        _table(_visible(data.top(20).drop(columns="marked"))),
    ]
    if summary is not None:
        parts += ["<h2>All parts of the target</h2>", _table(summary)]
    return "\n".join([*parts, "</body></html>"]) + "\n"


def _text(data: AttributedText) -> str:
    values = data.contributions
    largest = np.abs(values).max(initial=0.0) or 1.0
    shades = np.ceil(SHADES * np.sqrt(np.abs(values) / largest) - 0.5).astype(int)
    pieces = []
    for column, (token, value, shade) in enumerate(zip(data.tokens, values, shades, strict=True)):
        names = [f"{'r' if value > 0 else 'l'}{shade}"] if shade else []
        names += ["m"] if column in data.marked else []
        names += ["q"] if column == data.position else []
        label = f' class="{" ".join(names)}"' if names else ""
        title = f"{column}: {value:+.3g}"
        pieces.append(f'<span{label} title="{title}">{html.escape(visible_token(token))}</span>')
    return "".join(pieces)


def _visible(table: pd.DataFrame) -> pd.DataFrame:
    return table.assign(token=[visible_token(token) for token in table["token"]])


def _table(table: pd.DataFrame) -> str:
    head = "".join(f"<th>{html.escape(str(name))}</th>" for name in table)
    rows = []
    for _, row in table.iterrows():
        cells = (f"{value:+.4g}" if isinstance(value, float) else html.escape(str(value)) for value in row)
        rows.append("<tr>" + "".join(f"<td>{cell}</td>" for cell in cells) + "</tr>")
    return f"<table><tr>{head}</tr>{''.join(rows)}</table>"


def _style() -> str:
    rules = [
        "body{font:15px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em;background:#fff;color:#1b1b1f}",
        ".text{white-space:pre-wrap;overflow-wrap:anywhere;font-family:monospace;border:1px solid #ddd;padding:1em}",
        "table{border-collapse:collapse}td,th{border-bottom:1px solid #ddd;padding:.15em .8em;text-align:right;"
        "white-space:pre}",
        ".m{text-decoration:underline;text-decoration-thickness:2px}.q{outline:2px solid #1b1b1f}",
    ]
    for letter, colour in (("r", _RAISES), ("l", _LOWERS)):
        for shade in range(1, SHADES + 1):
            alpha = shade / SHADES
            red, green, blue = (round(255 + (c - 255) * alpha) for c in colour)
            text = ";color:#fff" if alpha > 0.6 else ""
            rules.append(f".{letter}{shade}{{background:rgb({red},{green},{blue}){text}}}")
    return "".join(rules)
