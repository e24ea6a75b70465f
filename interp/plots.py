"""Figures of a run: every function takes a table of `interp.tables` and returns `(figure, axes)`.

Nothing goes through pyplot and no global setting of matplotlib is read or changed beyond its defaults. Titles
are computed from the table (`interp.captions`).
"""

import os
import re
import textwrap
from collections.abc import Sequence

import numpy as np
import pandas as pd
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.colors import LogNorm
from matplotlib.figure import Figure, SubFigure
from matplotlib.lines import Line2D
from matplotlib.patches import Patch
from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullLocator
from PIL import Image

from interp import captions
from interp.files import write_beside
from interp.tables import (
    ALL_TOKENS,
    BUCKET_NAMES,
    POOLED,
    UNFROZEN,
    BucketTables,
    PerplexityTables,
    SurprisalTables,
    TimeTables,
)
from interp.wording import format_number, format_share, freezing_label, token_label

BAD_COLOUR = "#9a9aa5"
BUCKET_STYLES = {
    "SYNTAX": ("#4c566a", "o"),
    "RETRIEVAL": ("#0072b2", "s"),
    "NOVELTY": ("#d55e00", "^"),
    "OTHER": ("#8a8a8a", "D"),
}
CONFIGURATION_COLOURS = ("#1b1b1f", "#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#7f3c8d")
MAX_LABELS = 24

FigureAxes = tuple[Figure | SubFigure, Axes]


def plot_plasticity_heatmap(data: TimeTables, *, ax: Axes | None = None) -> FigureAxes:
    """Draw a heat map of layer by token index, colour = mean plasticity on a log scale.

    Colours span the middle 98% of the cells, so that a burst at the start does not hide the rest; stretches
    without a positive value (a frozen layer) get a grey of their own.
    """
    table = data.plasticity
    matrix = table.pivot(index="layer", columns="start", values="plasticity")
    figure, ax = axes_of(ax, width=9.0, height=1.8 + 0.28 * min(max(len(matrix), 4), MAX_LABELS))
    values = np.ma.masked_invalid(matrix.where(matrix > 0).to_numpy(dtype=float))
    edges = np.append(matrix.columns.to_numpy(), table["stop"].max())
    rows = np.arange(len(matrix) + 1) - 0.5
    colours = colormaps["viridis"].with_extremes(bad=BAD_COLOUR)
    norm = _log_norm(values, share=0.98)
    mesh = ax.pcolormesh(edges, rows, values, norm=norm, cmap=colours, rasterized=True)
    label_some(ax, [str(layer) for layer in matrix.index], axis="y")
    ax.set(xlabel="token index in the document", ylabel="layer")
    width = int((table["stop"] - table["start"]).max())
    outside = {(True, True): "both", (True, False): "min", (False, True): "max", (False, False): "neither"}
    extend = outside[bool((values < norm.vmin).any()), bool((values > norm.vmax).any())]
    bar = figure.colorbar(mesh, ax=ax, label=f"plasticity\n(mean of {width} tokens)", pad=0.01, extend=extend)
    plain_log_labels(bar.ax.yaxis)
    if np.ma.getmaskarray(values).any():
        ax.legend(handles=[Patch(color=BAD_COLOUR, label="writes nothing")], loc="upper right", fontsize="small")
    set_title(ax, captions.heatmap_caption(data).title)
    return figure, ax


def plot_surprisal(data: SurprisalTables, *, ax: Axes | None = None) -> FigureAxes:
    """Draw tokens over surprisal and plasticity, both on log scales, with the trend of the geometric mean."""
    figure, ax = axes_of(ax, width=7.5, height=5.5)
    ax.set_xscale("log")
    ax.set_yscale("log")
    if len(data.histogram):
        x, y, counts = _cells(data)
        # A lower end below one token keeps cells with a single token apart from empty ones.
        norm = LogNorm(0.3, max(counts.max(), 1.0))
        mesh = ax.pcolormesh(x, y, counts, norm=norm, cmap="Blues", rasterized=True)
        bar = figure.colorbar(mesh, ax=ax, label="tokens per cell", pad=0.01)
        bar.ax.set_ylim(1 if counts.max() > 1 else 0.3, None)
        plain_log_labels(bar.ax.yaxis)
    trend = data.trend
    share = format_share(data.correlation["confidence"].iloc[0])
    ax.errorbar(
        trend["surprisal"],
        trend["plasticity"],
        yerr=_error_bars(trend, "plasticity"),
        color="#d55e00",
        marker="o",
        markersize=4,
        linewidth=1.5,
        capsize=2,
        label=f"geometric mean per tenth of the tokens, {share} interval",
    )
    for axis in (ax.xaxis, ax.yaxis):
        plain_log_labels(axis)
    ax.set(
        xlabel=f"surprisal of token {token_label(data.lag)} (nats)", ylabel="plasticity of token t (all layers pooled)"
    )
    ax.legend(loc="upper left", bbox_to_anchor=(0.0, -0.13), borderaxespad=0.0, fontsize="small")
    set_title(ax, captions.surprisal_caption(data).title)
    return figure, ax


def plot_buckets(data: BucketTables, *, ax: Axes | None = None, value: str = "ratio") -> FigureAxes:
    """Draw a point with its interval per bucket, for all layers pooled and for each layer.

    `value` names the column group of `data.means`: "ratio" (geometric mean over that of the reference bucket,
    SYNTAX where it has tokens; comparable between layers), "mean" or "median". ValueError for another. With
    "ratio" a hollow marker beside each point gives the ratio among tokens at like positions.
    """
    means = data.means[data.means["tokens"] == ALL_TOKENS]
    reference = means["reference"].iloc[0]
    labels = {"ratio": f"plasticity relative to {reference}", "mean": "mean plasticity", "median": "median plasticity"}
    if value not in labels:
        raise ValueError(f"value must be one of {sorted(labels)}, got {value!r}")
    layers = sorted(set(means["layer"]))
    figure, ax = axes_of(ax, width=min(16.0, 5.0 + 0.8 * len(layers)), height=4.6)
    adjusted = _adjusted_ratios(data, reference)
    for shift, bucket in zip(np.linspace(-0.3, 0.24, len(BUCKET_NAMES)), BUCKET_NAMES, strict=True):
        rows = means[means["bucket"] == bucket].set_index("layer").loc[layers]
        colour, marker = BUCKET_STYLES[bucket]
        style = {"fmt": marker, "color": colour, "markersize": 5, "capsize": 3}
        x = np.arange(len(layers)) + shift
        label = f"{bucket} ({int(rows['count'].max()):,})"
        ax.errorbar(x, rows[value].to_numpy(), yerr=_error_bars(rows, value), label=label, **style)
        if value == "ratio" and bucket != reference:
            rows = adjusted[adjusted["bucket"] == bucket].set_index("layer").loc[layers]
            bars = _error_bars(rows, "adjusted")
            ax.errorbar(x + 0.07, rows["adjusted"].to_numpy(), yerr=bars, mfc="none", alpha=0.8, **style)
    handles = ax.get_legend_handles_labels()[0]
    if value == "ratio":
        ax.axhline(1.0, color=BUCKET_STYLES[reference][0], linewidth=1, linestyle=":")
        hollow = {"color": "#5c5c66", "marker": "o", "markersize": 5, "linestyle": "none"}
        handles += [
            Line2D([], [], label="filled: all positions", **hollow),
            Line2D([], [], mfc="none", label="hollow: like positions", **hollow),
        ]
    ax.set_yscale("log")
    plain_log_labels(ax.yaxis)
    label_some(ax, ["all layers" if layer == POOLED else f"layer {layer}" for layer in layers], axis="x")
    if POOLED in layers and len(layers) > 1:
        ax.axvline(0.5, color="#c9c9d2", linewidth=0.8)
    ax.set_ylabel(labels[value])
    share = format_share(means["confidence"].iloc[0])
    title = f"bucket (tokens),\n{share} intervals"
    ax.legend(handles=handles, title=title, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    set_title(ax, captions.bucket_caption(data).title)
    return figure, ax


def plot_perplexity(data: PerplexityTables, *, ax: Axes | None = None) -> FigureAxes:
    """Draw perplexity by token index, a colour per freezing configuration; thick cumulative, thin per window.

    The band is the interval of the cumulative line with nothing frozen. Thin lines leave out windows with
    less than a quarter of the tokens of the fullest one.
    """
    figure, ax = axes_of(ax, width=9.5, height=4.8)
    handles = []
    for index, name in enumerate(dict.fromkeys(data.curve["configuration"])):
        rows = data.curve[data.curve["configuration"] == name]
        colour = CONFIGURATION_COLOURS[index % len(CONFIGURATION_COLOURS)]
        style = ("-", "--", "-.", ":")[index // len(CONFIGURATION_COLOURS) % 4]
        full = rows[rows["count"] >= 0.25 * rows["count"].max()]
        ax.plot(full["position"], full["windowed"], color=colour, linewidth=0.9, alpha=0.5, linestyle=style)
        ax.plot(rows["position"], rows["cumulative"], color=colour, linewidth=2.2, linestyle=style)
        if name == UNFROZEN:
            low, high = rows["cumulative_low"], rows["cumulative_high"]
            ax.fill_between(rows["position"], low, high, color=colour, alpha=0.12, linewidth=0)
        label = name if name == UNFROZEN else f"{freezing_label(name)} frozen"
        handles.append(Line2D([], [], color=colour, linewidth=2.2, linestyle=style, label=label))
    share = format_share(data.curve["confidence"].iloc[0])
    window = int(np.diff(np.unique(data.curve["position"]), prepend=0).max())
    handles += [
        Line2D([], [], color="#5c5c66", linewidth=2.2, label="thick: cumulative"),
        Line2D([], [], color="#5c5c66", linewidth=0.9, alpha=0.7, label=f"thin: windows of {window} tokens"),
        Patch(color=CONFIGURATION_COLOURS[0], alpha=0.12, label=f"{share} interval ({UNFROZEN})"),
    ]
    ax.set_yscale("log")
    plain_log_labels(ax.yaxis)
    ax.set_xlim(0, data.curve["position"].max())
    ax.set(xlabel="token index in the document (end of the window)", ylabel="perplexity")
    legend = ax.legend(handles=handles, fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
    for text in legend.get_texts():
        text.set_parse_math(False)
    set_title(ax, captions.perplexity_caption(data).title)
    return figure, ax


def save_figure(figure: Figure, path: str | os.PathLike, *, dpi: int = 150, colours: int | None = None) -> None:
    """Write the figure as PNG with its own background, replacing an older file in one step.

    `colours` (up to 256) limits them, which makes the file a third as large.
    """
    with write_beside(path) as beside:
        figure.savefig(beside, dpi=dpi, format="png", facecolor=figure.get_facecolor())
        if colours is not None:
            with Image.open(beside) as image:
                image.convert("RGB").quantize(colours, dither=Image.Dither.NONE).save(beside, "png", optimize=True)


def axes_of(ax: Axes | None, *, width: float, height: float) -> FigureAxes:
    """Give axes and their figure, made in inches unless there are axes."""
    if ax is not None:
        return ax.figure, ax
    figure = Figure(figsize=(width, height), layout="constrained")
    return figure, figure.subplots()


def set_title(ax: Axes, text: str) -> None:
    """The title over the axes, wrapped to their width; `$` and `_` stay what they are."""
    share = ax.get_position(original=True).width
    inches = ax.figure.bbox.width / ax.figure.dpi * (0.88 if share > 0.5 else share)
    # No-break spaces keep "r = 0.3" and "[0.2, 0.4]" on one line.
    whole = re.sub(r"\[[^\]]*\]| = ", lambda match: match[0].replace(" ", "\u00a0"), text)
    lines = textwrap.wrap(whole, max(24, int(inches * 11.5)), break_on_hyphens=False)
    ax.set_title("\n".join(lines), loc="left", fontsize="medium", parse_math=False)


def _log_norm(values: np.ma.MaskedArray, *, share: float = 1.0) -> LogNorm:
    """Log scale over the middle `share` of the unmasked values."""
    if values.count() == 0:
        return LogNorm(0.1, 1.0)
    low, high = np.quantile(values.compressed(), [(1 - share) / 2, (1 + share) / 2])
    return LogNorm(low, high) if low < high else LogNorm(low / 1.1, low * 1.1)


def _cells(data: SurprisalTables) -> tuple[np.ndarray, np.ndarray, np.ma.MaskedArray]:
    """Borders of the histogram along both axes, and tokens per cell [y, x] with empty cells masked."""
    table = data.histogram
    x, y = (np.union1d(table[f"{name}_low"], table[f"{name}_high"]) for name in ("surprisal", "plasticity"))
    counts = np.zeros((len(y) - 1, len(x) - 1))
    counts[np.searchsorted(y, table["plasticity_low"]), np.searchsorted(x, table["surprisal_low"])] = table["tokens"]
    return x, y, np.ma.masked_equal(counts, 0)


def _adjusted_ratios(data: BucketTables, reference: str) -> pd.DataFrame:
    """Ratio of every other bucket to `reference` at like positions, a row per layer and bucket."""
    contrasts = data.contrasts[data.contrasts["tokens"] == ALL_TOKENS]
    rows = [
        captions.find_contrast(pairs, bucket, reference).rename({"bucket_a": "bucket"})
        for _, pairs in contrasts.groupby("layer")
        for bucket in BUCKET_NAMES
        if bucket != reference
    ]
    names = ["adjusted", "adjusted_low", "adjusted_high"]
    return pd.DataFrame(rows)[["layer", "bucket", *names]].astype(dict.fromkeys(names, float))


def _error_bars(table: pd.DataFrame, name: str) -> np.ndarray:
    """Distances down and up to the interval, [2, rows]; NaN where there is none."""
    return np.stack([table[name] - table[f"{name}_low"], table[f"{name}_high"] - table[name]]).clip(min=0)


def label_some(ax: Axes, labels: Sequence[str], *, axis: str) -> None:
    """At most `MAX_LABELS` evenly spaced tick labels, as plain text."""
    step = -(-len(labels) // MAX_LABELS)
    shown = labels[::step]
    ticks = np.arange(0, len(labels), step)
    if axis == "y":
        ax.set_yticks(ticks, shown, parse_math=False)
    else:
        ax.set_xticks(ticks, shown, parse_math=False, rotation=45 if len(shown) > 8 else 0)


def plain_log_labels(axis: Axis) -> None:
    """Decimal labels on a log axis, about as many whether it spans a few percent or many decades."""
    low, high = axis.get_view_interval()
    decades = np.log10(high / low)
    if decades < 1:
        axis.set_major_locator(MaxNLocator(nbins=6, steps=[1, 2, 2.5, 5, 10]))
    else:
        axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0) if decades < 3 else (1.0,)))
    axis.set_major_formatter(FuncFormatter(lambda value, _: format_number(value)))
    axis.set_minor_locator(NullLocator())
