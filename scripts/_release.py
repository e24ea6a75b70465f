"""What a finished training leaves: the model laid out for the Hub, and its curve as table and picture."""

import csv
import os
import tempfile
from pathlib import Path

import torch
from _publishing import OUR_WEIGHTS
from _training import read_metrics
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from torch import nn
from transformers import PreTrainedTokenizerBase

CURVES = {"loss": "training windows", "answer_loss": "needle answers", "validation_loss": "validation text"}


def export(model: nn.Module, tokenizer: PreTrainedTokenizerBase, folder: str | Path, dtype: str) -> None:
    """Cast the model to `dtype` and save weights, config and tokenizer, so that `from_pretrained(folder)` works.

    Written beside and moved into the folder; other files there stay, but for weights under other names.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    model.to(getattr(torch, dtype))
    model.config.dtype = dtype
    # How the tokenizer was found here says nothing to whoever loads it there.
    for name in ("is_local", "local_files_only"):
        tokenizer.init_kwargs.pop(name, None)
    with tempfile.TemporaryDirectory(prefix=".part-", dir=folder) as beside:
        model.save_pretrained(beside)
        tokenizer.save_pretrained(beside)
        files = sorted(Path(beside).iterdir())
        for file in files:
            os.replace(file, folder / file.name)
    written = {file.name for file in files}
    for file in folder.iterdir():
        if OUR_WEIGHTS.fullmatch(file.name) and file.name not in written:
            file.unlink()


def write_curve(metrics: Path, folder: Path) -> None:
    """Draw `metrics.jsonl` into `curve.png` (nats per token over million tokens), with its table `curve.csv`."""
    rows = read_metrics(metrics)
    columns = list(dict.fromkeys(name for row in rows for name in row))
    table, picture = folder / ".curve.csv.part", folder / ".curve.png.part"
    with table.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows({name: _rounded(value) for name, value in row.items()} for row in rows)
    os.replace(table, folder / "curve.csv")
    figure = Figure(figsize=(7, 4.5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots()
    for name, label in CURVES.items():
        points = [(row["tokens"] / 1e6, row[name]) for row in rows if row.get(name) is not None]
        if points:
            axes.plot(*zip(*points, strict=True), label=label, marker="o" if name == "validation_loss" else None)
    axes.set(xlabel="million tokens read", ylabel="nats per token")
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend()
    figure.savefig(picture, dpi=130, format="png")
    os.replace(picture, folder / "curve.png")


def _rounded(value: object) -> object:
    return float(f"{value:.6g}") if isinstance(value, float) else value
