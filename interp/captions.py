"""Titles and captions of the figures, computed from the tables: they say what the numbers say, in either
direction.
"""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from interp.tables import POOLED, UNFROZEN, BucketTables, PerplexityTables, SurprisalTables, TimeTables

__all__ = [
    "Caption",
    "bucket_caption",
    "excludes",
    "format_interval",
    "format_number",
    "freezing_label",
    "heatmap_caption",
    "perplexity_caption",
    "surprisal_caption",
]


@dataclass(frozen=True)
class Caption:
    """Title (one line, drawn in the figure) and text (a few sentences, kept beside it)."""

    title: str
    text: str


def heatmap_caption(data: TimeTables) -> Caption:
    """Which layers write most and least, and how the start of the documents compares with the rest."""
    table = data.plasticity
    weighted = (table["plasticity"] * table["tokens"]).groupby(table["layer"]).sum()
    means = weighted / table.groupby("layer")["tokens"].sum()
    active, silent = means[means > 0], list(means.index[means == 0])
    if active.empty:
        title = "No layer writes: plasticity is 0 everywhere"
    elif len(active) == 1:
        title = f"Plasticity of layer {active.index[0]}: mean {format_number(active.iloc[0])}"
    else:
        title = (
            f"Plasticity is largest in layer {active.idxmax()} (mean {format_number(active.max())}) and smallest in "
            f"layer {active.idxmin()} ({format_number(active.min())})"
        )
    width = int((table["stop"] - table["start"]).max())
    drop = data.decay[(data.decay["layer"] == POOLED) & (data.decay["comparison"] == "first/last")]
    if len(drop) and math.isfinite(drop["ratio"].iloc[0]):
        title += f"; {_first_against(drop.iloc[0])}"
    text = [
        f"Mean plasticity per layer in columns of {width} tokens, averaged over "
        f"{_count(table['documents'].max(), 'document')}.",
        f"{title}.",
    ]
    if len(active):
        peak = table.iloc[np.nanargmax(table["plasticity"])]
        text.append(
            f"The largest column is {format_number(peak['plasticity'])} (layer {int(peak['layer'])}, tokens "
            f"{int(peak['start'])} to {int(peak['stop']) - 1}); colours may saturate there."
        )
    if silent:
        text.append(f"Nothing is written in {_layers(silent)}.")
    if table["documents"].min() < table["documents"].max():
        text.append("Documents differ in length, so later columns rest on fewer of them.")
    text += _decay_sentences(data.decay)
    return Caption(title, " ".join(text))


def surprisal_caption(data: SurprisalTables) -> Caption:
    """Correlation of surprisal and plasticity at the lag drawn, with its interval, and what other lags and
    controls give.
    """
    pooled = data.correlation[data.correlation["layer"] == POOLED].set_index("lag")
    row = pooled.loc[data.lag]
    pearson = f"r = {row['pearson_log']:.2f} {format_interval(row, 'pearson_log', digits=2)}"
    title = f"Surprisal of token {_token(data.lag)} against plasticity of token t: {pearson} on logs (lag {data.lag})"
    if not math.isfinite(row["pearson_log"]):
        title = f"Surprisal against plasticity (lag {data.lag}): correlation not defined"
    text = [
        f"{title}, {int(row['count']):,} tokens, all layers pooled: {_direction(row, 'pearson_log')}.",
        f"Spearman {row['spearman']:.2f} {format_interval(row, 'spearman', digits=2)}.",
    ]
    if math.isfinite(row["partial"]):
        controlled = f"{row['partial']:.2f} {format_interval(row, 'partial', digits=2)}"
        text.append(
            f"Among tokens at like positions in document and mini-batch: r = {controlled} "
            f"({_direction(row, 'partial')})."
        )
    others = [f"lag {lag}: {other['pearson_log']:.2f}" for lag, other in pooled.iterrows() if lag != data.lag]
    if others:
        text.append(f"With the surprisal of another token: r = {', '.join(others)}.")
    layers = data.correlation[(data.correlation["layer"] != POOLED) & (data.correlation["lag"] == data.lag)]
    if len(layers) > 1:
        text.append(
            "Layer by layer: "
            + ", ".join(f"{int(entry['layer'])}: {entry['pearson_log']:.2f}" for _, entry in layers.iterrows())
            + "."
        )
    text.append(f"Intervals: 95%, {row['unit']} resampled.")
    return Caption(title, " ".join(text))


def bucket_caption(data: BucketTables) -> Caption:
    """Which bucket writes most over all layers pooled, and whether the intervals exclude no difference."""
    pooled = data.means[data.means["layer"] == POOLED].set_index("bucket")
    pairs = data.contrasts[data.contrasts["layer"] == POOLED]
    order = list(_rank_buckets(pairs, pooled.index[pooled["count"] > 0]))
    if len(order) < 2:
        title = "Fewer than two buckets hold tokens with plasticity: nothing to compare"
        return Caption(title, f"{title}.")
    top, second, last = order[0], order[1], order[-1]
    lead, span = _contrast(pairs, top, second), _contrast(pairs, top, last)
    number = int(pairs["apart"].sum())
    if number == 0:
        title = "No two buckets can be told apart (all layers pooled)"
    elif lead["apart"]:
        title = f"{top} writes most: {_times(lead)} {second}, the next{_adjusted(lead)} (all layers pooled)"
    elif span["apart"]:
        title = f"{top} and {second} cannot be told apart; {top} writes {_times(span)} {last} (all layers pooled)"
    else:
        title = (
            f"{number} of {len(pairs)} pairs of buckets can be told apart, but not {top} from {second} or {last} "
            "(all layers pooled)"
        )
    text = [f"{title}.", f"Geometric means, from largest: {', '.join(order)}.", *_pair_sentences(pairs)]
    empty = list(pooled.index[pooled["count"] == 0])
    if empty:
        text.append(f"Without tokens: {', '.join(empty)}.")
    layers = data.contrasts[data.contrasts["layer"] != POOLED]
    if layers["layer"].nunique() > 1:
        tops = [next(_rank_buckets(rows, order), None) for _, rows in layers.groupby("layer")]
        text.append(f"{top} is the largest in {tops.count(top)} of {len(tops)} single layers.")
    unit = data.means["unit"].iloc[0]
    text.append(
        f"Intervals: 95% each, {unit} resampled; two buckets count as told apart when that holds at 95% for all six "
        "pairs together."
    )
    return Caption(title, " ".join(text))


def perplexity_caption(data: PerplexityTables) -> Caption:
    """What freezing costs on the same tokens, per configuration, and on the answers if there are some."""
    base = data.effects[data.effects["configuration"] == UNFROZEN].iloc[0]
    frozen = data.effects[data.effects["configuration"] != UNFROZEN]
    answers = None if data.answers is None else data.answers.set_index("configuration")
    title = f"Perplexity {format_number(base['perplexity'])} with nothing frozen"
    if frozen.empty:
        title += "; no freezing configuration was run"
    else:
        largest = frozen.loc[frozen["delta"].abs().idxmax()]
        title += f"; {_cost(largest)}"
        if answers is not None:
            title += f", on the answers it {_change_of_loss(answers.loc[largest['configuration']])}"
    text = [f"{title}.", *(f"{_upper(_cost(row))}: {_cost_verdict(row)}." for _, row in frozen.iterrows())]
    text.append(f"Every configuration reads the same {int(base['count']):,} tokens.")
    if data.curve["documents"].min() < data.curve["documents"].max():
        text.append("Documents differ in length, so later windows rest on fewer of them.")
    if answers is not None:
        number, loss = int(answers["count"].iloc[0]), answers["mean_loss"].loc[UNFROZEN]
        text.append(f"On the {number:,} answer tokens the loss is {loss:.2f} nats with nothing frozen.")
        for name, row in answers.drop(index=UNFROZEN).iterrows():
            text.append(f"There freezing {freezing_label(name)} {_change_of_loss(row)}: {_cost_verdict(row)}.")
    text.append(f"Intervals: 95%, {base['unit']} resampled, differences paired.")
    return Caption(title, " ".join(text))


def format_number(value: float) -> str:
    """Three significant digits."""
    return f"{value:,.0f}" if 1000 <= abs(value) < 1e6 else f"{value:.3g}"


def format_interval(row: pd.Series, name: str, *, digits: int | None = None) -> str:
    """`[low, high]` of the columns `name_low` and `name_high`, or a remark that there is none."""
    low, high = row[f"{name}_low"], row[f"{name}_high"]
    if not (math.isfinite(low) and math.isfinite(high)):
        return "[no interval: too little data]"
    if digits is None:
        return f"[{format_number(low)}, {format_number(high)}]"
    return f"[{low:.{digits}f}, {high:.{digits}f}]"


def freezing_label(name: str) -> str:
    """A freezing configuration in words: `all` and lists of layers are spelt out, other names stay."""
    if name == "all":
        return "all layers"
    return f"layers {name}" if name.replace(",", "").replace("-", "").isdigit() else name


def excludes(row: pd.Series, name: str, value: float) -> bool:
    """Whether the interval of `name` lies wholly on one side of `value`; False when there is no interval."""
    return bool(row[f"{name}_low"] > value or row[f"{name}_high"] < value)


def _decay_sentences(decay: pd.DataFrame) -> Iterator[str]:
    for _, row in decay[decay["layer"] == POOLED].iterrows():
        if not math.isfinite(row["ratio"]):
            yield "The documents are too short, or nothing is written, to compare their first tokens with later ones."
            return
        yield f"Plasticity of all layers pooled: {_first_against(row)} of a document; {_change(row)}."
    yield f"Intervals: 95%, {decay['unit'].iloc[0]} resampled."


def _first_against(row: pd.Series) -> str:
    n = int(row["tokens_first"] // max(1, row["documents"]))
    other = f"the last {n}" if row["comparison"] == "first/last" else "the second half"
    ratio = f"{format_number(row['ratio'])} {format_interval(row, 'ratio')}"
    return f"in the first {n} tokens it is {ratio} times that in {other}"


def _change(row: pd.Series) -> str:
    if not excludes(row, "ratio", 1.0):
        return "the interval does not exclude no change"
    return "it falls" if row["ratio"] > 1 else "it rises"


def _rank_buckets(pairs: pd.DataFrame, names: Iterable[str]) -> Iterator[str]:
    """Buckets by their geometric mean, largest first; those without a defined ratio are left out."""
    level = {}
    names = list(names)
    for name in names:
        ratios = [_contrast(pairs, name, other)["ratio"] for other in names if other != name]
        finite = [math.log(ratio) for ratio in ratios if math.isfinite(ratio) and ratio > 0]
        if finite:
            level[name] = sum(finite)
    return iter(sorted(level, key=level.get, reverse=True))


def _contrast(pairs: pd.DataFrame, a: str, b: str) -> pd.Series:
    """The row of a against b, turned round if the table has b against a."""
    found = pairs[(pairs["bucket_a"] == a) & (pairs["bucket_b"] == b)]
    if len(found):
        return found.iloc[0]
    row = pairs[(pairs["bucket_a"] == b) & (pairs["bucket_b"] == a)].iloc[0].copy()
    for name in ("ratio", "adjusted"):
        low, high = 1 / row[f"{name}_low"], 1 / row[f"{name}_high"]
        row[name], row[f"{name}_low"], row[f"{name}_high"] = 1 / row[name], high, low
    row["bucket_a"], row["bucket_b"] = a, b
    return row


def _pair_sentences(pairs: pd.DataFrame) -> Iterator[str]:
    for _, row in pairs.iterrows():
        if not math.isfinite(row["ratio"]):
            continue
        larger = row if row["ratio"] >= 1 else _contrast(pairs, row["bucket_b"], row["bucket_a"])
        verdict = "" if larger["apart"] else " (not told apart)"
        yield f"{larger['bucket_a']} {_times(larger)} {larger['bucket_b']}{verdict}{_adjusted(larger)}."


def _adjusted(row: pd.Series) -> str:
    """The ratio among tokens at like positions, and what it changes about the verdict."""
    if not math.isfinite(row["adjusted"]):
        return ""
    told = row["apart"]
    remark = ""
    if told and not excludes(row, "adjusted", 1.0):
        remark = ", where no difference is not excluded"
    elif told and (row["adjusted"] > 1) != (row["ratio"] > 1):
        remark = ", where it is the other way round"
    return f"; {row['adjusted']:.2f} {format_interval(row, 'adjusted', digits=2)} at like positions{remark}"


def _times(row: pd.Series) -> str:
    return f"{row['ratio']:.2f} {format_interval(row, 'ratio', digits=2)} times"


def _cost(row: pd.Series) -> str:
    return f"freezing {freezing_label(row['configuration'])} {_change_of_loss(row)}"


def _change_of_loss(row: pd.Series) -> str:
    direction = "raises" if row["delta"] >= 0 else "lowers"
    return f"{direction} the mean loss by {abs(row['delta']):.3f} nats {_absolute_interval(row)}"


def _absolute_interval(row: pd.Series) -> str:
    """The interval of the size of the change, in its direction."""
    if row["delta"] >= 0:
        return format_interval(row, "delta", digits=3)
    return format_interval(
        pd.Series({"delta_low": -row["delta_high"], "delta_high": -row["delta_low"]}), "delta", digits=3
    )


def _cost_verdict(row: pd.Series) -> str:
    if not excludes(row, "delta", 0.0):
        return "the interval does not exclude no effect"
    return "worse without these writes" if row["delta"] > 0 else "better without these writes"


def _direction(row: pd.Series, name: str) -> str:
    if not excludes(row, name, 0.0):
        return "the interval does not exclude no relation"
    return f"more surprising tokens write {'more' if row[name] > 0 else 'less'}"


def _token(lag: int) -> str:
    return "t" if lag == 0 else f"t{-lag:+d}"


def _count(number: float, noun: str) -> str:
    return f"{int(number):,} {noun}{'' if int(number) == 1 else 's'}"


def _layers(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(str(layer) for layer in layers)}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
