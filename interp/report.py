"""The report of a run: figures, the tables they were drawn from, captions, and the text coloured by plasticity."""

import os
from dataclasses import dataclass
from pathlib import Path

from interp import captions, plots
from interp.captions import Caption
from interp.files import to_json, write_text
from interp.run_folder import Run
from interp.statistics import DEFAULT_BOOTSTRAP, Bootstrap
from interp.tables import RunTables, run_tables, save_tables
from interp.text_view import MAX_DOCUMENTS, MAX_TOKENS, write_text_view
from interp.wording import count_of, format_share, scope_of

__all__ = ["Report", "write_report"]

_TABLES = {
    "plasticity_heatmap": ["plasticity_by_time", "plasticity_decay"],
    "surprisal": ["surprisal_histogram", "surprisal_trend", "surprisal_correlation"],
    "buckets": ["bucket_means", "bucket_contrasts"],
    "perplexity": ["perplexity_by_index", "freezing_effects", "answer_effects"],
}


@dataclass(frozen=True)
class Report:
    """Caption of every figure by its name, a short summary for people, and the files written."""

    captions: dict[str, Caption]
    summary: str
    files: list[Path]


def write_report(
    run: Run,
    folder: str | os.PathLike,
    *,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
    max_tokens: int = MAX_TOKENS,
    max_documents: int = MAX_DOCUMENTS,
) -> Report:
    """Write four PNGs, one CSV per table, captions.json and text.html into `folder`, which is made if need be.

    Files of those names are replaced, others stay. ValueError when the run lacks what a table needs.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    tables = run_tables(run, boot=boot)
    frames = tables.frames()
    files = save_tables(frames, folder)
    said = {}
    for name, (figure, caption) in _figures(tables).items():
        plots.save_figure(figure, folder / f"{name}.png")
        files.append(folder / f"{name}.png")
        said[name] = caption
    shown = {
        name: {"title": said[name].title, "text": said[name].text, "tables": [f"{t}.csv" for t in used if t in frames]}
        for name, used in _TABLES.items()
    }
    write_text(folder / "captions.json", to_json(shown))
    files += [folder / "captions.json"]
    files += [write_text_view(run, folder / "text.html", max_tokens=max_tokens, max_documents=max_documents)]
    return Report(said, _summary(run, said, tables), files)


def _figures(tables: RunTables) -> dict[str, tuple[plots.Figure, Caption]]:
    return {
        "plasticity_heatmap": (
            plots.plot_plasticity_heatmap(tables.time)[0],
            captions.heatmap_caption(tables.time),
        ),
        "surprisal": (plots.plot_surprisal(tables.surprisal)[0], captions.surprisal_caption(tables.surprisal)),
        "buckets": (plots.plot_buckets(tables.buckets)[0], captions.bucket_caption(tables.buckets)),
        "perplexity": (
            plots.plot_perplexity(tables.perplexity)[0],
            captions.perplexity_caption(tables.perplexity),
        ),
    }


def _summary(run: Run, said: dict[str, Caption], tables: RunTables) -> str:
    """A head line, the title of every figure, and what the brackets in them mean."""
    documents = count_of(run.tokens["document"].nunique(), "document")
    head = f"{run.model_name} read {len(run.tokens):,} tokens of {documents}"
    for key, unit in (("mean_loss", "nats per token"), ("nats_per_byte", "nats per byte")):
        value = run.meta["totals"][key]
        if value is not None:
            head += f", {value:.3f} {unit}"
    row = tables.buckets.means.iloc[0]
    brackets = f"Brackets are {format_share(row['confidence'])} confidence intervals; captions.json says more."
    lines = [head, *(f"{name}.png: {caption.title}" for name, caption in said.items()), brackets, scope_of(row)]
    return "\n".join(line for line in lines if line)
