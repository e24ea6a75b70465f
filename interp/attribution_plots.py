"""Figures of attribution: every function takes what the library returns and gives `(figure, axes)`.

Signed numbers are drawn in colours symmetric about 0; long texts are binned; texts of tokens are drawn as they are,
with stand-ins for control characters and for what the font lacks. Nothing goes through pyplot.
"""

from collections.abc import Sequence

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.colors import Normalize
from matplotlib.font_manager import FontProperties, findfont, get_font
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from interp.ablation import EraseCurve
from interp.attribution_data import AttributedText, LagHistogram
from interp.plots import (
    BAD_COLOUR,
    CONFIGURATION_COLOURS,
    FigureAxes,
    axes_of,
    label_some,
    plain_log_labels,
    set_title,
)
from interp.pooled_maps import PooledWriteMap
from interp.state import StateTrace
from interp.text_view import visible_token
from interp.wording import format_number

__all__ = [
    "plot_drift",
    "plot_erase_curve",
    "plot_lags",
    "plot_ranks",
    "plot_spectra",
    "plot_top_writes",
    "plot_write_map",
    "token_label",
]

RAISES, LOWERS = "#0072b2", "#d55e00"
MAX_CELLS = 1000
NAMED_WRITES = 8
CHARACTER_POINTS, LINE_POINTS = 4.6, 11.0  # about what a character and a line of a label take
MODE_LABELS = {
    "relative": "share of what the read learnt",
    "signed": "contribution along the direction",
    "norm": "length of the contribution",
    "coefficient": "coefficient A",
}


def plot_write_map(
    data: PooledWriteMap, *, ax: Axes | None = None, row: int = 0, head: int | None = None
) -> FigureAxes:
    """Draw groups of writes (columns) by reads (rows), of one head (its index in the layer) or the mean over heads.

    Reads that are not pooled are binned to at most 1,000 rows by their mean. Pools show the mean per read.
    """
    values = data.mean[row].double().numpy()
    heads = data.heads or tuple(range(len(values)))
    if head is not None and head not in heads:
        raise ValueError(f"head must be one of {list(heads)}, got {head}")
    values = values.mean(0) if head is None else values[heads.index(head)]  # [R, G]
    reads = len(values)
    if data.read_names is None:
        values = _binned(values, MAX_CELLS)
    figure, ax = axes_of(ax, width=6.5, height=5.0)
    limit = np.nanmax(np.abs(values), initial=0.0) or 1.0
    signed = data.mode != "norm"
    colours = colormaps["RdBu" if signed else "viridis"].with_extremes(bad=BAD_COLOUR)
    edges = np.linspace(0, reads, len(values) + 1) - 0.5 if data.read_names is None else np.arange(reads + 1) - 0.5
    mesh = ax.pcolormesh(
        np.arange(len(data.names) + 1) - 0.5,
        edges,
        np.ma.masked_invalid(values),
        norm=Normalize(-limit if signed else 0.0, limit),
        cmap=colours,
        rasterized=True,
    )
    ax.invert_yaxis()
    label_some(ax, [token_label(name) for name in data.names], axis="x")
    if data.read_names is None:
        ax.set_ylabel("reading token")
    else:
        label_some(ax, [token_label(name) for name in data.read_names], axis="y")
        ax.set_ylabel("reads")
    ax.set_xlabel("writes")
    figure.colorbar(mesh, ax=ax, label=MODE_LABELS[data.mode], pad=0.01)
    who = "mean of the heads" if head is None else f"head {head}"
    set_title(ax, f"Write -> read, layer {data.layer}, {who}")
    return figure, ax


def plot_top_writes(data: AttributedText, *, ax: Axes | None = None) -> FigureAxes:
    """Draw what each write adds along the text, the largest named; marked columns have a line behind them.

    Beyond 1,000 tokens a column of the figure shows the largest positive and the largest negative write of a stretch.
    """
    figure, ax = axes_of(ax, width=10.0, height=3.6)
    values = data.contributions
    edges = np.linspace(0, len(values), min(len(values), MAX_CELLS) + 1).astype(int)
    stretches = [values[first:end] for first, end in zip(edges[:-1], edges[1:], strict=True)]
    for colour, name, tops in (
        (RAISES, "raises", [max(0.0, part.max()) for part in stretches]),
        (LOWERS, "lowers", [min(0.0, part.min()) for part in stretches]),
    ):
        ax.stairs(tops, edges, fill=True, color=colour, label=name, linewidth=0)
    for column in data.marked:
        ax.axvline(column + 0.5, color="#c9c9d2", linewidth=1.0, zorder=0)
    reach = np.abs(values).max(initial=0.0) or 1.0
    ax.axhline(0.0, color="#5c5c66", linewidth=0.8)
    ax.set_xlim(0, len(values))
    ax.set_ylim(-1.45 * max(-values.min(initial=0.0), 0.25 * reach), 1.45 * max(values.max(initial=0.0), 0.12 * reach))
    ax.set(xlabel="token that was written", ylabel="contribution (logits)")
    _name_writes(ax, data)
    ax.legend(fontsize="small", loc="upper left", bbox_to_anchor=(1.0, 1.0))
    set_title(ax, f"{token_label(data.question, 90)} = {format_number(data.value)} at token {data.position}")
    return figure, ax


def plot_erase_curve(data: EraseCurve, *, ax: Axes | None = None) -> FigureAxes:
    """Draw the target while writes go or come in an order, with the middle 95% of random orders as a band."""
    figure, ax = axes_of(ax, width=5.5, height=4.0)
    table = data.to_pandas()
    ax.plot(100 * table["fraction"], table["value"], color=RAISES, marker="o", markersize=3, label="in order")
    label = f"in order, area {format_number(data.auc)}"
    if "random_low" in table:
        ax.fill_between(
            100 * table["fraction"], table["random_low"], table["random_high"], color="#8a8a8a", alpha=0.3, linewidth=0
        )
        ax.lines[0].set_label(label)
        handles = [ax.lines[0], ax.collections[0]]
        names = [
            label,
            f"95% of {len(data.random_values)} random orders, area {format_number(data.random_auc.mean())}",
        ]
        ax.legend(handles, names, fontsize="small")
    verb = "knocked out" if data.kind == "deletion" else "let in"
    ax.set(xlabel=f"writes {verb} (%)", ylabel="target")
    set_title(ax, f"Erase curve, {data.kind}")
    return figure, ax


def plot_spectra(
    data: StateTrace, *, ax: Axes | None = None, layer: int | None = None, row: int = 0, inner_map: int = 1
) -> FigureAxes:
    """Draw the singular values of what a layer (None: the first) learnt at every checkpoint, mean over heads."""
    index, spectra = _layer_index(data, layer), _of_map(data.singular_values, inner_map)
    figure, ax = axes_of(ax, width=6.0, height=4.2)
    values = spectra[row, index].mean(0).double().numpy()  # [C, min(in, out)]
    colours = colormaps["viridis"](np.linspace(0, 0.92, len(values)))
    for tokens, colour, spectrum in zip(data.checkpoints, colours, values, strict=True):
        shown = np.where(spectrum > 0, spectrum, np.nan)
        ax.plot(np.arange(1, len(spectrum) + 1), shown, color=colour, label=f"{tokens:,}")
    ax.set_yscale("log")
    if values.max() > 0:  # values below this are rounding
        ax.set_ylim(bottom=max(values[values > 0].min(), 1e-5 * values.max()) / 1.5)
        plain_log_labels(ax.yaxis)
    ax.set(xlabel="rank", ylabel="singular value of W - W_0")
    handles, labels = ax.get_legend_handles_labels()
    step = -(-len(handles) // 10)
    ax.legend(handles[::step], labels[::step], title="tokens", fontsize="small", bbox_to_anchor=(1.0, 1.0))
    set_title(ax, f"Spectrum of layer {data.layers[index]}, map {inner_map}")
    return figure, ax


def plot_ranks(data: StateTrace, *, ax: Axes | None = None, row: int = 0, inner_map: int = 1) -> FigureAxes:
    """Draw effective (solid) and stable rank (dashed) of what each layer learnt over the text, mean over heads."""
    figure, ax = axes_of(ax, width=6.5, height=4.0)
    for ranks, style, name in ((data.effective_rank, "-", "effective"), (data.stable_rank, "--", "stable")):
        for i, layer in enumerate(data.layers):
            values = _of_map(ranks, inner_map)[row, i].mean(0).numpy()
            colour = CONFIGURATION_COLOURS[i % len(CONFIGURATION_COLOURS)]
            ax.plot(data.checkpoints, values, style, color=colour, label=f"layer {layer}, {name}")
    _layer_legend(ax, "rank of W - W_0")
    set_title(ax, f"Ranks of the state, map {inner_map}")
    return figure, ax


def plot_drift(data: StateTrace, *, ax: Axes | None = None, row: int = 0) -> FigureAxes:
    """Draw the distance of each layer's state from W_0 over the text, heads as the root of the sum of squares."""
    figure, ax = axes_of(ax, width=6.5, height=4.0)
    for i, layer in enumerate(data.layers):
        values = data.drift[row, i].square().sum(0).sqrt().numpy()
        colour = CONFIGURATION_COLOURS[i % len(CONFIGURATION_COLOURS)]
        ax.plot(data.checkpoints, values, color=colour, marker=".", label=f"layer {layer}")
    ax.set_ylim(bottom=0)
    _layer_legend(ax, "||W - W_0||")
    set_title(ax, "Drift of the state")
    return figure, ax


def plot_lags(data: LagHistogram, *, ax: Axes | None = None) -> FigureAxes:
    """Draw how far back the reads of a layer reach: the share of all sizes in bins of lags that double."""
    figure, ax = axes_of(ax, width=6.5, height=3.8)
    table = data.to_pandas()
    ax.bar(np.arange(len(table)), 100 * table["share"].fillna(0.0), color=RAISES)
    names = [f"{low:,}" if low == high else f"{low:,}-{high:,}" for low, high in zip(data.low, data.high, strict=True)]
    label_some(ax, names, axis="x")
    ax.set(xlabel="lag (tokens)", ylabel="share of all sizes (%)")
    set_title(ax, f"How far back layer {data.layer} reads ({MODE_LABELS[data.mode]}, {data.reads:,} reads)")
    return figure, ax


def _name_writes(ax: Axes, data: AttributedText) -> None:
    """Label the largest writes, away from the axis; a label that would meet one before it moves further out."""
    taken: list[tuple[float, float, float]] = []  # left, right and middle of the labels so far, in points
    for _, entry in data.top(NAMED_WRITES).iterrows():
        column, value = int(entry["column"]), float(entry["contribution"])
        if not value:
            continue
        label, up = f"{token_label(entry['token'])} ({column})", 1 if value > 0 else -1
        right, width = column < 0.8 * len(data.tokens), CHARACTER_POINTS * len(label)
        x, y = ax.transData.transform((column + 0.5, value)) * 72 / ax.figure.dpi
        left, shift = (x + 6 if right else x - 6 - width), 8
        while any(
            left < end and start < left + width and abs(y + up * (shift + LINE_POINTS / 2) - middle) < LINE_POINTS
            for start, end, middle in taken
        ):
            shift += 2
        taken.append((left, left + width, y + up * (shift + LINE_POINTS / 2)))
        ax.annotate(
            label,
            (column + 0.5, value),
            xytext=(6 if right else -6, up * shift),
            textcoords="offset points",
            ha="left" if right else "right",
            va="bottom" if up > 0 else "top",
            fontsize="x-small",
            parse_math=False,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "#8a8a8a"},
        )


def token_label(text: str, longest: int = 18) -> str:
    """A token's text on one line, at most `longest` characters; what the font lacks is named by its code point."""
    shown = visible_token(text).replace("\n", "\u23ce").replace("\t", "\u21e5")
    shown = "".join(c if _has_glyph(c) else f"\u27e8U+{ord(c):04X}\u27e9" for c in shown)
    return shown if len(shown) <= longest else shown[: longest - 1] + "\u2026"


def _has_glyph(character: str) -> bool:
    return get_font(findfont(FontProperties())).get_char_index(ord(character)) != 0


def _binned(values: np.ndarray, most: int) -> np.ndarray:
    """At most `most` rows, each the mean of a stretch."""
    if len(values) <= most:
        return values
    edges = np.linspace(0, len(values), most + 1).astype(int)
    return np.stack([values[first:end].mean(0) for first, end in zip(edges[:-1], edges[1:], strict=True)])


def _layer_index(data: StateTrace, layer: int | None) -> int:
    if layer is None:
        return 0
    if layer not in data.layers:
        raise ValueError(f"layer must be one of {list(data.layers)}, got {layer}")
    return data.layers.index(layer)


def _of_map(values: Sequence[Tensor], inner_map: int) -> Tensor:
    if not 1 <= inner_map <= len(values):
        raise ValueError(f"inner_map must be in [1, {len(values)}], got {inner_map}")
    return values[inner_map - 1]


def _layer_legend(ax: Axes, label: str) -> None:
    ax.set(xlabel="tokens read", ylabel=label)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    handles: Sequence = ax.get_legend_handles_labels()[0]
    if len(handles) <= 24:
        ax.legend(fontsize="small", loc="center left", bbox_to_anchor=(1.0, 0.5))
