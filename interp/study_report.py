"""The report of a study: tables, figures, captions, and one self-contained page with every claim and its verdict."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from matplotlib.figure import Figure
from tqdm.auto import tqdm

from interp import captions, plots, study_captions, study_plots
from interp.captions import Caption
from interp.claims import VERDICTS
from interp.collect import DEFINITIONS as TOKENS
from interp.files import to_json, write_parquet, write_text
from interp.resampling import DEFAULT_BOOTSTRAP, Bootstrap
from interp.study_claims import claim_table
from interp.study_data import StudyData
from interp.study_page import claims_markdown, render_study
from interp.study_tables import DEFINITIONS, study_tables
from interp.tables import (
    bucket_tables,
    perplexity_tables,
    save_tables,
    surprisal_tables,
    time_tables,
)

__all__ = ["study_figures", "write_study"]

SHARED = "all models"
_DOTS = 100
_COLOURS = 256


def write_study(
    data: StudyData,
    folder: str | os.PathLike,
    tokenizers: Mapping[str, Any],
    *,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
    progress: bool = False,
) -> str:
    """Write `tables/` (csv and parquet), `figures/` (png, captions.json), claims.md and report.html; give a summary.

    tokenizers: of every model, by its name. Files of these names are replaced, others stay.
    """
    folder = Path(folder)
    for name in ("tables", "figures"):
        (folder / name).mkdir(parents=True, exist_ok=True)
    with tqdm(total=len(data.parts) + 1, unit="part", disable=not progress) as bar:

        def begin(name: str) -> None:
            bar.set_postfix_str(name)
            bar.update()

        tables = study_tables(data, tokenizers, boot=boot, progress=begin)
        tables = {"claims": claim_table(data, tables), **tables}
        save_tables(tables, folder / "tables")
        write_text(folder / "tables" / "definitions.json", to_json({"tables": DEFINITIONS, "tokens": TOKENS}))
        for name, table in tables.items():
            write_parquet(folder / "tables" / f"{name}.parquet", [pa.Table.from_pandas(table, preserve_index=False)])
        bar.set_postfix_str("figures")
        shown: dict[str, dict[str, Caption]] = {}
        for owner, name, figure, caption in study_figures(data, tables, boot=boot):
            plots.save_figure(
                figure, folder / "figures" / f"{file_name(owner, name)}.png", dpi=_DOTS, colours=_COLOURS
            )
            shown.setdefault(owner, {})[name] = caption
        bar.update()
    told = {
        file_name(owner, name): {"title": caption.title, "text": caption.text}
        for owner, named in shown.items()
        for name, caption in named.items()
    }
    write_text(folder / "figures" / "captions.json", to_json(told))
    plan = json.loads((folder / "plan.json").read_text(encoding="utf-8")) if (folder / "plan.json").exists() else {}
    write_text(folder / "report.html", render_study(data, tables, shown, folder / "figures", plan))
    write_text(folder / "claims.md", claims_markdown(tables["claims"]))
    return _summary(tables["claims"])


def study_figures(
    data: StudyData, tables: Mapping[str, pd.DataFrame], *, boot: Bootstrap = DEFAULT_BOOTSTRAP
) -> Iterator[tuple[str, str, Figure, Caption]]:
    """Draw every figure that the study has data for: owner (a model, or `SHARED`), name, figure and caption."""
    if "context" in tables:
        table = tables["context"]
        # Random weights predict so badly that everything else would be squeezed together.
        trained = [name for name in data.models if next(iter(data.of_model(name).values())).model.untrained is None]
        table = table[table["model"].isin(trained)]
        yield SHARED, "context", study_plots.plot_context(table)[0], study_captions.context_caption(table)
    for model in data.models:
        parts = data.of_model(model)
        trained = next(iter(parts.values())).model.untrained is None
        if trained and "text" in parts and parts["text"].run is not None:
            yield from _planned(model, parts["text"].run, boot)
            yield from _others(model, data, tables)


def file_name(owner: str, name: str) -> str:
    """Name the file of a figure, without its ending."""
    return name if owner == SHARED else f"{owner}-{name}"


def _planned(model: str, run: Any, boot: Bootstrap) -> Iterator[tuple[str, str, Figure, Caption]]:
    """The four figures of a run, of the text."""
    made = {
        "heatmap": (time_tables(run, boot=boot), plots.plot_plasticity_heatmap, captions.heatmap_caption),
        "surprisal": (surprisal_tables(run, boot=boot), plots.plot_surprisal, captions.surprisal_caption),
        "buckets": (bucket_tables(run, boot=boot), plots.plot_buckets, captions.bucket_caption),
        "perplexity": (perplexity_tables(run, boot=boot), plots.plot_perplexity, captions.perplexity_caption),
    }
    for name, (table, plot, caption) in made.items():
        yield model, name, plot(table)[0], caption(table)


def _others(
    model: str, data: StudyData, tables: Mapping[str, pd.DataFrame]
) -> Iterator[tuple[str, str, Figure, Caption]]:
    def of(table: str, **where: str) -> pd.DataFrame | None:
        if table not in tables:
            return None
        frame = tables[table][tables[table]["model"] == model]
        for name, value in where.items():
            frame = frame[frame[name] == value]
        return frame if len(frame) else None

    burn_in = of("burn_in_traces")
    if burn_in is not None:
        path = next(iter(data.of_model(model).values())).model.path
        copies = [
            name
            for name in data.models
            for owner in [next(iter(data.of_model(name).values())).model]
            if owner.untrained is not None and owner.path == path
        ]
        everything = tables["burn_in_traces"]
        burn_in = pd.concat([burn_in, *(everything[everything["model"] == name] for name in copies)])
    inner = of("inner_losses")
    made = (
        ("burn_in", burn_in, study_plots.plot_burn_in, study_captions.burn_in_caption),
        ("traces", of("plasticity_traces"), study_plots.plot_traces, study_captions.traces_caption),
        ("lags", of("surprisal_correlation", corpus="text"), study_plots.plot_lags, study_captions.lags_caption),
        ("freezing", of("freezing"), study_plots.plot_freezing, study_captions.freezing_caption),
        ("answers", of("answers"), study_plots.plot_freezing, study_captions.freezing_caption),
        ("skipping", of("skipping"), study_plots.plot_skipping, study_captions.skipping_caption),
        (
            "inner_losses",
            of("inner_losses", corpus="text"),
            study_plots.plot_inner_losses,
            study_captions.inner_losses_caption,
        ),
        ("drift", inner, study_plots.plot_drift, study_captions.drift_caption),
    )
    for name, table, plot, caption in made:
        if table is not None:
            yield model, name, plot(table)[0], caption(table)


def _summary(claims: pd.DataFrame) -> str:
    lines = []
    for model, rows in claims.groupby("model", sort=False):
        counts = rows["verdict"].value_counts()
        told = ", ".join(f"{counts[verdict]} {verdict}" for verdict in VERDICTS if verdict in counts)
        lines.append(f"{model}: {told}")
        lines += [f"  {row['verdict']}: {row['claim']}" for _, row in rows.iterrows()]
    return "\n".join(lines)
