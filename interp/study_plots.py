"""Figures of a study: every function takes tables of `interp.study_tables` and returns `(figure, axes)`.

As in `interp.plots`, nothing goes through pyplot and titles are computed (`interp.study_captions`).
"""

from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib.axes import Axes
from matplotlib.colors import TwoSlopeNorm
from matplotlib.figure import Figure, SubFigure

from interp import study_captions as captions
from interp.plots import BUCKET_STYLES, CONFIGURATION_COLOURS, axes_of, plain_log_labels, set_title
from interp.tables import POOLED, UNFROZEN
from interp.wording import format_interval

__all__ = [
    "plot_burn_in",
    "plot_context",
    "plot_drift",
    "plot_freezing",
    "plot_inner_losses",
    "plot_lags",
    "plot_skipping",
    "plot_traces",
]

FigureAxes = tuple[Figure | SubFigure, Axes]
CORPUS_LABELS = {
    "long": "text",
    "long-shuffled": "shuffled tokens",
    "long-iid": "i.i.d. tokens",
    "long-middle": "from the middle",
    "long-carried": "state carried in",
}
_MARKERS = ("o", "s", "^", "D", "v", "P", "X", "*")


def plot_context(table: pd.DataFrame, *, ax: Axes | None = None) -> FigureAxes:
    """Draw perplexity per window against the tokens read, a colour per model; dashed: everything frozen.

    table: "context" of the models to be drawn.
    """
    figure, ax = axes_of(ax, width=9.0, height=4.8)
    for index, (model, own) in enumerate(table.groupby("model", sort=False)):
        colour = CONFIGURATION_COLOURS[(index + 1) % len(CONFIGURATION_COLOURS)]
        for (corpus, configuration), rows in own.groupby(["corpus", "configuration"], sort=False):
            frozen = configuration != UNFROZEN
            told = f"{model}{', everything frozen' if frozen else ''} ({int(rows['position'].max()):,} tokens)"
            style = {"linestyle": "--" if frozen else "-", "linewidth": 2.2 if corpus == "long" else 1.0}
            ax.plot(rows["position"], rows["windowed"], color=colour, label=told, **style)
            if corpus == "long" and not frozen:
                low, high = rows["windowed_low"], rows["windowed_high"]
                ax.fill_between(rows["position"], low, high, color=colour, alpha=0.12, linewidth=0)
    for scale, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        getattr(ax, f"set_{scale}scale")("log")
        plain_log_labels(axis)
    ax.set(xlabel="token index in the document (end of the window)", ylabel="perplexity of the window")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    set_title(ax, captions.context_caption(table).title)
    return figure, ax


def plot_burn_in(table: pd.DataFrame, *, ax: Axes | None = None) -> FigureAxes:
    """Draw plasticity over its level in the second half, for the text and its controls.

    table: "burn_in_traces" of one model (and of its untrained copy, if wanted).
    """
    figure, ax = axes_of(ax, width=8.5, height=4.8)
    for index, ((model, corpus), rows) in enumerate(table.groupby(["model", "corpus"], sort=False)):
        colour = CONFIGURATION_COLOURS[index % len(CONFIGURATION_COLOURS)]
        place = np.sqrt((rows["start"] + 1) * rows["stop"])
        untrained = model != table["model"].iloc[0]
        label = f"{CORPUS_LABELS.get(corpus, corpus)}{', untrained model' if untrained else ''}"
        style = {"color": colour, "marker": _MARKERS[index % len(_MARKERS)], "markersize": 4}
        ax.plot(place, rows["relative"], label=label, linestyle="--" if untrained else "-", **style)
        ax.fill_between(place, rows["relative_low"], rows["relative_high"], color=colour, alpha=0.12, linewidth=0)
    ax.axhline(1.0, color="#5c5c66", linewidth=1, linestyle=":")
    for scale, axis in (("x", ax.xaxis), ("y", ax.yaxis)):
        getattr(ax, f"set_{scale}scale")("log")
        plain_log_labels(axis)
    ax.set(xlabel="token index in the document", ylabel="plasticity / that of the second half")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    set_title(ax, captions.burn_in_caption(table).title)
    return figure, ax


def plot_freezing(table: pd.DataFrame, *, ax: Axes | None = None, families: Sequence[str] | None = None) -> FigureAxes:
    """Draw the cost of every freezing as a bar with its interval; grey: the band of random subsets of the same size.

    table: "freezing" or "answers" of one model; families: those to be drawn (default: all but the random subsets).
    """
    shown = table[(table["label"] != "nothing frozen") & (table["family"] != "random")]
    if families is not None:
        shown = shown[shown["family"].isin(families)]
    figure, ax = axes_of(ax, width=9.5, height=1.6 + 0.23 * len(shown))
    place = np.arange(len(shown))
    colours = dict(zip(dict.fromkeys(shown["family"]), CONFIGURATION_COLOURS, strict=False))
    width = shown["null_high"] - shown["null_low"]
    ax.barh(place, width, left=shown["null_low"], height=0.9, color="#c9c9d2", alpha=0.6, label="random subsets")
    bars = np.stack([shown["delta"] - shown["delta_low"], shown["delta_high"] - shown["delta"]]).clip(min=0)
    ax.barh(place, shown["delta"], height=0.55, color=[colours[name] for name in shown["family"]], alpha=0.85)
    ax.errorbar(shown["delta"], place, xerr=bars, fmt="none", ecolor="#1b1b1f", capsize=2, linewidth=1)
    ax.axvline(0.0, color="#1b1b1f", linewidth=0.8)
    labels = [_freezing_label(row) for _, row in shown.iterrows()]
    ax.set_yticks(place, labels, parse_math=False, fontsize="small")
    ax.invert_yaxis()
    answers = "exact" in table and (table["corpus"] == "needle").all()
    ax.set_xlabel(f"change of loss, nats per {'answer token' if answers else 'token'}")
    ax.legend(fontsize="small", loc="lower right")
    set_title(ax, captions.freezing_caption(table).title)
    return figure, ax


def plot_traces(table: pd.DataFrame, *, ax: Axes | None = None) -> FigureAxes:
    """Draw mean plasticity per bucket over the document, with intervals. table: "plasticity_traces" of one model."""
    figure, ax = axes_of(ax, width=8.5, height=4.4)
    for bucket, rows in table.groupby("bucket", sort=False):
        colour, marker = BUCKET_STYLES[bucket]
        place = (rows["start"] + rows["stop"]) / 2
        ax.plot(place, rows["plasticity"], color=colour, marker=marker, markersize=4, label=bucket)
        ax.fill_between(place, rows["plasticity_low"], rows["plasticity_high"], color=colour, alpha=0.12, linewidth=0)
    ax.set_yscale("log")
    plain_log_labels(ax.yaxis)
    ax.set(xlabel="token index in the document", ylabel="mean plasticity, all layers pooled")
    ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    set_title(ax, captions.traces_caption(table).title)
    return figure, ax


def plot_lags(table: pd.DataFrame, *, ax: Axes | None = None, value: str = "pearson_log") -> FigureAxes:
    """Draw the table of correlations, layers by lags, each with its interval; colours are centred at 0.

    table: "surprisal_correlation" of one model and corpus.
    """
    matrix = table.pivot(index="layer", columns="lag", values=value)
    order = [*sorted(layer for layer in matrix.index if layer != POOLED), POOLED]
    matrix = matrix.loc[order]
    figure, ax = axes_of(ax, width=1.9 * len(matrix.columns) + 2.6, height=1.9 + 0.5 * len(matrix))
    largest = max(float(np.nanmax(np.abs(matrix.to_numpy()), initial=0.0)), 0.1)
    norm = TwoSlopeNorm(0.0, -largest, largest)
    image = ax.imshow(matrix.to_numpy(float), cmap="RdBu_r", norm=norm, aspect="auto")
    rows = table.set_index(["layer", "lag"])
    for y, layer in enumerate(order):
        for x, lag in enumerate(matrix.columns):
            row = rows.loc[(layer, lag)]
            star = "*" if row[f"{value}_apart"] else ""
            told = f"{row[value]:+.2f}{star}\n{format_interval(row, value, digits=2)}"
            dark = abs(row[value]) > 0.6 * largest
            ax.text(x, y, told, ha="center", va="center", fontsize="small", color="white" if dark else "#1b1b1f")
    names = {-1: "the next token", 0: "the token itself", 1: "the token before"}
    ax.set_xticks(range(len(matrix.columns)), [names.get(lag, f"lag {lag}") for lag in matrix.columns])
    ax.set_yticks(range(len(order)), ["all layers" if layer == POOLED else f"layer {layer}" for layer in order])
    ax.set_xlabel("surprisal of")
    figure.colorbar(image, ax=ax, label="r, logarithms" if value == "pearson_log" else value)
    set_title(ax, captions.lags_caption(table).title)
    return figure, ax


def plot_inner_losses(table: pd.DataFrame, *, ax: Axes | None = None) -> FigureAxes:
    """Draw the inner loss of every layer over the document: dotted at W_0, dashed before and solid after the write.

    table: "inner_losses" of one model and corpus.
    """
    figure, ax = axes_of(ax, width=9.0, height=4.8)
    styles = {"inner_loss_init": ":", "inner_loss_before": "--", "inner_loss_after": "-"}
    for index, (layer, rows) in enumerate(table.groupby("layer")):
        colour = CONFIGURATION_COLOURS[(index + 1) % len(CONFIGURATION_COLOURS)]
        place = (rows["start"] + rows["stop"]) / 2
        for name, style in styles.items():
            label = f"layer {layer}" if style == "-" else None
            ax.plot(place, rows[name], color=colour, linestyle=style, label=label)
    for style, label in zip(styles.values(), ("at W_0", "before the write", "after the write"), strict=True):
        ax.plot([], [], color="#5c5c66", linestyle=style, label=label)
    ax.set_yscale("log")
    plain_log_labels(ax.yaxis)
    ax.set(xlabel="token index in the document", ylabel="inner loss, sum over heads")
    legend = ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    set_title(ax, captions.inner_losses_caption(table).title)
    return figure, ax


def plot_drift(table: pd.DataFrame, *, ax: Axes | None = None) -> FigureAxes:
    """Draw how far the weights of every layer move from W_0: solid on the text, dashed on repeated text.

    table: "inner_losses" of one model, all corpora.
    """
    figure, ax = axes_of(ax, width=8.5, height=4.4)
    layers = sorted(set(table["layer"]))
    for (corpus, layer), rows in table.groupby(["corpus", "layer"], sort=False):
        colour = CONFIGURATION_COLOURS[(layers.index(layer) + 1) % len(CONFIGURATION_COLOURS)]
        label = f"layer {layer}, {'repeated text' if corpus == 'repeated' else corpus}"
        style = "--" if corpus == "repeated" else "-"
        ax.plot((rows["start"] + rows["stop"]) / 2, rows["state_drift"], color=colour, linestyle=style, label=label)
    ax.set(xlabel="token index in the document", ylabel="distance of the weights from W_0")
    ax.set_ylim(bottom=0)
    legend = ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    set_title(ax, captions.drift_caption(table).title)
    return figure, ax


def plot_skipping(table: pd.DataFrame, *, ax: Axes | None = None) -> FigureAxes:
    """Draw the change of loss against the share of writes skipped, by rule. table: "skipping" of one model."""
    figure, ax = axes_of(ax, width=7.0, height=4.2)
    for index, (rule, rows) in enumerate(table.groupby("rule", sort=False)):
        bars = np.stack([rows["delta"] - rows["delta_low"], rows["delta_high"] - rows["delta"]]).clip(min=0)
        colour = CONFIGURATION_COLOURS[(1, 2)[index]]
        told = f"skipped: {rule}"
        ax.errorbar(rows["skipped"], rows["delta"], yerr=bars, color=colour, marker="o", capsize=3, label=told)
    ax.axhline(0.0, color="#5c5c66", linewidth=1, linestyle=":")
    ax.set(xlabel="share of writes skipped", ylabel="change of loss, nats per token", xlim=(0, 1))
    ax.legend(fontsize="small", loc="upper left")
    set_title(ax, captions.skipping_caption(table).title)
    return figure, ax


def _freezing_label(row: pd.Series) -> str:
    if row["family"] == "heads" or row["label"] == "everything frozen":
        return row["label"]
    layers = f" ({row['layers']})" if row["layers"] and not row["label"].startswith("layer ") else ""
    return f"{row['label']}{layers}"
