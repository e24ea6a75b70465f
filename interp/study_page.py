"""report.html: every claim with the earlier figure, ours, interval, control and verdict; figures; tables."""

import base64
import hashlib
import html
import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pandas as pd

from interp._columns import POOLED
from interp.captions import Caption
from interp.claims import CANNOT_TELL, NOT_REPRODUCED, REPRODUCED, REVERSED, RULES, VERDICTS
from interp.collect import DEFINITIONS as TOKEN_DEFINITIONS
from interp.controls import CONTROLS
from interp.study_data import StudyData
from interp.study_tables import DEFINITIONS
from interp.wording import count_of

__all__ = ["claims_markdown", "render_study"]

MAX_ROWS = 80
_TEMPLATE = Path(__file__).with_name("study_report.html")
_FIELD = re.compile(r"\{\{(\w+)\}\}")
_STYLES = {REPRODUCED: "reproduced", NOT_REPRODUCED: "not", REVERSED: "reversed", CANNOT_TELL: "cannot"}
_SIGNS = {REPRODUCED: "✓", NOT_REPRODUCED: "✗", REVERSED: "⇄", CANNOT_TELL: "?"}
_THEMES = {"trigger": "What triggers plasticity", "location": "Where it matters", "efficiency": "What it costs"}
_TITLES = {
    "heatmap": "Plasticity by layer and token",
    "surprisal": "Surprisal against plasticity",
    "buckets": "Buckets",
    "perplexity": "Perplexity under freezing",
    "burn_in": "Burn-in and its controls",
    "traces": "Buckets over the document",
    "lags": "Surprisal at three lags",
    "freezing": "Freezing, on the text",
    "answers": "Freezing, on the answers of needle documents",
    "skipping": "Skipping small updates",
    "inner_losses": "Inner losses before and after the write",
    "drift": "Drift of the inner weights",
    "context": "Use of a long context",
}


def render_study(
    data: StudyData,
    tables: Mapping[str, pd.DataFrame],
    shown: Mapping[str, Mapping[str, Caption]],
    figures: Path,
    plan: Mapping[str, Any],
) -> str:
    """Make the page, which needs no other file, no script and no network.

    shown: {owner: {name: caption}} of the figures, whose files lie in `figures` under `<owner>-<name>.png` (those of
    all models under `<name>.png`). plan: what the study was asked for.
    """
    template = _TEMPLATE.read_text(encoding="utf-8")
    style = re.search(r"<style>(.*?)</style>", template, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(style[1].encode()).digest()).decode()
    owners = list(shown)
    fields = {
        "policy": f"default-src 'none'; img-src data:; style-src 'sha256-{digest}'",
        "title": "Plasticity study: trigger, location, efficiency",
        "about": _about(data, tables, plan),
        "contents": _contents(owners),
        "verdicts": _verdicts(tables["claims"]),
        "claims": _claims(tables["claims"]),
        "rules": "<dl>" + "".join(f"<dt>{_e(k)}</dt><dd>{_e(v)}</dd>" for k, v in RULES.items()) + "</dl>",
        "figures": "".join(_figures(owner, named, figures) for owner, named in shown.items()),
        "tables": _tables(tables),
        "definitions": _definitions(),
        "footer": "Made by scripts/study.py. Everything on this page is in this file; the tables lie beside it.",
    }
    return _FIELD.sub(lambda match: fields[match[1]], template)


def claims_markdown(claims: pd.DataFrame) -> str:
    """Give the claims as Markdown tables, one per model: claim, earlier figure, ours, control, verdict."""
    parts = []
    for model, own in claims.groupby("model", sort=False):
        lines = [f"### {model}", "", "| claim | earlier | here | control | verdict |", "|---|---|---|---|---|"]
        for _, row in own.iterrows():
            here, control = _measured(row)
            told = f"{here}: {row['quantity']}"
            lines.append(f"| {row['claim']} | {row['earlier']} | {told} | {control} | **{row['verdict']}** |")
        parts.append("\n".join(lines))
    return "\n\n".join(parts) + "\n"


def _e(text: Any) -> str:
    return html.escape(str(text))


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")


def _about(data: StudyData, tables: Mapping[str, pd.DataFrame], plan: Mapping[str, Any]) -> str:
    read = []
    for model in data.models:
        parts = data.of_model(model).values()
        first = next(iter(parts)).model
        kind = " (random weights, a control)" if first.untrained is not None else ""
        runs = [part.run for part in parts if part.run is not None]
        if runs:
            meta = runs[0].meta["model"]
            layers = count_of(len(meta["ttt_layers"]), "TTT layer")
            size = f"{meta['num_parameters'] / 1e6:.2f} M parameters"
            kind += f": {layers}, {size}, mini-batches of {meta['mini_batch_size']} tokens"
        else:
            kind += ": no TTT layer, read for comparison"
        read.append(f"<li><strong>{_e(model)}</strong>{_e(kind)}</li>")
    texts = [name for name, _ in plan.get("texts", [])]
    source = f"the texts {', '.join(texts)}" if texts else "the language reference that comes with Python"
    setting = plan.get("setting", {})
    samples = count_of(setting.get("samples", 1), "sample")
    read_parts = [name for name in ("text", "long", "sweep", "needle", "context") if name in setting]
    sizes = ", ".join(f"{name} {setting[name][1]} x {setting[name][0]:,}" for name in read_parts)
    return (
        "<p>An earlier study of TTT language models made claims about what triggers plasticity (how much a token "
        "changes the inner weights), in which layers it matters and what it costs. This page sets each claim against "
        "a measurement with its interval and its control. Verdicts are computed by rule, captions from the tables.</p>"
        f"<ul>{''.join(read)}</ul>"
        f"<p>The text is {_e(source)}, {samples} of documents that do not overlap (per sample, documents x tokens: "
        f"{_e(sizes)}). Models this small say nothing about large ones: what holds here is that the instrument works, "
        "and what these models do.</p>"
    )


def _contents(owners: list[str]) -> str:
    entries = [("claims", "Claims and verdicts"), ("rules", "How a verdict is made")]
    entries += [(_slug(owner), f"Figures: {owner}") for owner in owners]
    entries += [("tables", "Tables"), ("definitions", "Definitions")]
    return "".join(f'<li><a href="#{name}">{_e(title)}</a></li>' for name, title in entries)


def _verdicts(claims: pd.DataFrame) -> str:
    rows = []
    for model, own in claims.groupby("model", sort=False):
        counts = own["verdict"].value_counts()
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
        rows.append(f"<li><strong>{_e(model)}</strong>: {_e(told)}</li>")
    return f"<ul>{''.join(rows)}</ul>"


def _claims(claims: pd.DataFrame) -> str:
    head = ("Claim", "Earlier figure", "Here [95% interval]", "Control", "Verdict", "Why, and what else was measured")
    pages = []
    for model, own in claims.groupby("model", sort=False):
        rows = "".join(_claim_row(row) for _, row in own.iterrows())
        columns = "".join(f'<th scope="col">{name}</th>' for name in head)
        caption = f"Claims on {_e(model)}"
        region = f'<div class="wide" tabindex="0" role="region" aria-label="{caption}">'
        pages.append(
            f'<h3>{_e(model)}</h3>{region}<table class="claims">'
            f"<caption>{caption}</caption><thead><tr>{columns}</tr></thead><tbody>{rows}</tbody></table></div>"
        )
    return "".join(pages)


def _measured(row: pd.Series) -> tuple[str, str]:
    """Our figure and that of the control, with their intervals."""
    here = f"{_number(row['value'])} {_interval(row['low'], row['high'])}"
    if row["rule"] == "counted":
        here = f"{row['value']:.1%} [{row['low']:.1%}, {row['high']:.1%}]"
    if not row["control_name"]:
        return here, "none"
    control = f"{_number(row['control'])} {_interval(row['control_low'], row['control_high'])}"
    return here, f"{control} ({row['control_name']})"


def _claim_row(row: pd.Series) -> str:
    here, control = map(_e, _measured(row))
    here += f'<br><span class="soft">{_e(row["quantity"])}</span>'
    verdict = row["verdict"]
    sign = f'<span aria-hidden="true">{_SIGNS[verdict]}</span>'
    scope = count_of(row["documents"], "document")
    scope += "" if row["unit"] == "documents" else f", {row['unit']} resampled"
    return (
        f'<tr><th scope="row">{_e(row["claim"])}<br><span class="soft">{_e(_THEMES[row["theme"]])}</span></th>'
        f'<td>{_e(row["earlier"])}</td><td class="figure">{here}</td><td>{control}</td>'
        f'<td class="verdict {_STYLES[verdict]}">{sign} {_e(verdict)}</td>'
        f'<td class="why">{_e(row["why"][:1].upper() + row["why"][1:])}. {_e(row["note"])} '
        f'<span class="soft">({_e(scope)})</span></td></tr>'
    )


def _figures(owner: str, named: Mapping[str, Caption], figures: Path) -> str:
    parts = [f'<section aria-labelledby="{_slug(owner)}"><h2 id="{_slug(owner)}">Figures: {_e(owner)}</h2>']
    for name, caption in named.items():
        file = figures / f"{owner}-{name}.png"
        if not file.exists():
            file = figures / f"{name}.png"
        data = base64.b64encode(file.read_bytes()).decode()
        parts.append(
            f'<h3>{_e(_TITLES[name])}</h3><figure><img src="data:image/png;base64,{data}" loading="lazy" '
            f'alt="{_e(_TITLES[name])}: {_e(caption.title)}"><figcaption>{_e(caption.text)}</figcaption></figure>'
        )
    return "".join([*parts, "</section>"])


def _tables(tables: Mapping[str, pd.DataFrame]) -> str:
    parts = []
    for name, table in tables.items():
        if name == "claims":
            continue
        note = "" if len(table) <= MAX_ROWS else f", the first {MAX_ROWS} shown"
        rows = table.head(MAX_ROWS)
        head = "".join(f'<th scope="col">{_e(column)}</th>' for column in rows)
        body = "".join("<tr>" + "".join(map(_cell, row.items())) + "</tr>" for _, row in rows.iterrows())
        region = f'<div class="wide" tabindex="0" role="region" aria-label="table {_e(name)}">'
        parts.append(
            f"<details><summary>{_e(name)}: {len(table):,} rows{note}</summary><p>{_e(DEFINITIONS[name])}</p>"
            f"{region}<table><caption>tables/{_e(name)}.csv</caption><thead><tr>{head}</tr></thead>"
            f"<tbody>{body}</tbody></table></div></details>"
        )
    return "".join(parts)


def _cell(entry: tuple[Any, Any]) -> str:
    column, value = entry
    if column == "layer" and value == POOLED:
        return "<td>pooled</td>"
    if isinstance(value, bool) or not isinstance(value, int | float) and not hasattr(value, "dtype"):
        return f"<td>{_e('' if value is None else value)}</td>"
    return f'<td class="number">{_number(float(value)) if value == value else ""}</td>'


def _definitions() -> str:
    entries = {**TOKEN_DEFINITIONS, **{f"control: {name}": text for name, (text, _) in CONTROLS.items()}}
    entries = {name: text for name, text in entries.items() if name not in ("bytes", "weights_fingerprint")}
    items = "".join(f"<dt>{_e(name)}</dt><dd>{_e(text)}</dd>" for name, text in entries.items())
    return f"<dl>{items}</dl>"


def _number(value: float) -> str:
    """Three significant digits, zeros at the end included, so that 1.00 does not look exact."""
    if not math.isfinite(value):
        return "not given"
    if value == int(value) and abs(value) < 1e6:
        return f"{int(value):,}"
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:#.3g}".removesuffix(".")


def _interval(low: float, high: float) -> str:
    if not (math.isfinite(low) and math.isfinite(high)):
        return "[no interval]"
    return f"[{_number(low)}, {_number(high)}]"
