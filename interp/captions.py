"""Titles and captions of the figures, computed from the tables, which they follow in either direction."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
import pandas as pd

from interp.tables import (
    ALL_TOKENS,
    POOLED,
    UNFROZEN,
    WORD_STARTS,
    BucketTables,
    PerplexityTables,
    SurprisalTables,
    TimeTables,
)
from interp.wording import (
    count_of,
    excludes,
    format_interval,
    format_number,
    format_share,
    freezing_label,
    scope_of,
    token_label,
)

__all__ = [
    "Caption",
    "bucket_caption",
    "find_contrast",
    "heatmap_caption",
    "perplexity_caption",
    "surprisal_caption",
]

_CONTENT = ["NOVELTY", "RETRIEVAL", "SYNTAX"]


@dataclass(frozen=True)
class Caption:
    """Title (one line, drawn in the figure) and text (a few sentences, kept beside it)."""

    title: str
    text: str


def heatmap_caption(data: TimeTables) -> Caption:
    """Say which layers write most and least, and how the start of the documents compares with the rest."""
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
        title += f"; in {_first_against(drop.iloc[0])}"
    text = [
        f"Mean plasticity per layer in columns of {width} tokens, averaged over "
        f"{count_of(table['documents'].max(), 'document')}.",
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
    """Give the correlation of surprisal and plasticity at the lag drawn, and at other lags and with controls."""
    pooled = data.correlation[data.correlation["layer"] == POOLED].set_index("lag")
    row = pooled.loc[data.lag]
    pearson = f"r = {row['pearson_log']:.2f} {format_interval(row, 'pearson_log', digits=2)}"
    title = (
        f"Surprisal of token {token_label(data.lag)} against plasticity of token t: {pearson} on logs (lag {data.lag})"
    )
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
    others = [
        f"token {token_label(lag)} r = {other['pearson_log']:.2f}"
        for lag, other in pooled.iterrows()
        if lag != data.lag
    ]
    if others:
        text.append(f"With the surprisal of {', '.join(others)}.")
    layers = data.correlation[(data.correlation["layer"] != POOLED) & (data.correlation["lag"] == data.lag)]
    if len(layers) > 1:
        single = (f"layer {int(entry['layer'])} r = {entry['pearson_log']:.2f}" for _, entry in layers.iterrows())
        text.append(f"Layer by layer: {', '.join(single)}.")
    text.append(_intervals(row))
    return Caption(title, " ".join(text))


def bucket_caption(data: BucketTables) -> Caption:
    """Say which bucket writes most at like positions, all layers pooled; speak only of pairs told apart."""
    pooled = data.means[(data.means["layer"] == POOLED) & (data.means["tokens"] == ALL_TOKENS)].set_index("bucket")
    contrasts = data.contrasts[data.contrasts["tokens"] == ALL_TOKENS]
    pairs = contrasts[contrasts["layer"] == POOLED]
    order = list(_rank_buckets(pairs, pooled.index[pooled["count"] > 0]))
    if len(order) < 2:
        title = "Fewer than two buckets hold tokens with plasticity: nothing to compare"
        return Caption(title, f"{title}.")
    top = order[0]
    title = _bucket_title(pairs, order)
    text = [
        f"{title}.",
        f"At like positions, from largest geometric mean: {', '.join(order)}.",
        *_pair_sentences(pairs),
    ]
    text += _word_start_sentences(data)
    empty = list(pooled.index[pooled["count"] == 0])
    if empty:
        text.append(f"Without tokens: {', '.join(empty)}.")
    if pooled["reference"].iloc[0] != "SYNTAX":
        text.append(f"Drawn relative to {pooled['reference'].iloc[0]}, as no token is SYNTAX.")
    layers = contrasts[contrasts["layer"] != POOLED]
    if layers["layer"].nunique() > 1:
        tops = [next(_rank_buckets(rows, order), None) for _, rows in layers.groupby("layer")]
        text.append(f"{top} is the largest in {tops.count(top)} of {len(tops)} single layers, at like positions.")
    confidence = format_share(pooled["confidence"].iloc[0])
    text.append(
        "Hollow markers compare tokens at like positions in document and mini-batch. Two buckets count as told apart "
        f"when their ratio there excludes 1 at {confidence} for all six pairs together."
    )
    text.append(_intervals(pooled.iloc[0], each=True))
    return Caption(title, " ".join(text))


def perplexity_caption(data: PerplexityTables) -> Caption:
    """Say what freezing costs on the same tokens, per configuration, and on the answers if there are some."""
    base = data.effects[data.effects["configuration"] == UNFROZEN].iloc[0]
    frozen = data.effects[data.effects["configuration"] != UNFROZEN]
    answers = None if data.answers is None else data.answers.set_index("configuration")
    title = f"Perplexity {format_number(base['perplexity'])} with nothing frozen"
    if frozen.empty:
        title += "; no freezing configuration was run"
    else:
        certain = frozen[frozen.apply(excludes, axis=1, args=("delta", 0.0))]
        shown = frozen if certain.empty else certain
        largest = shown.loc[shown["delta"].abs().idxmax()]
        title += f"; {_cost(largest)}"
        if answers is not None:
            # What a retrieval document asks for comes first: its filler may be impossible to predict.
            effects = answers.drop(index=UNFROZEN)
            name = effects["delta"].abs().idxmax()
            whole = frozen.set_index("configuration").loc[name]
            title = f"On the answers freezing {freezing_label(name)} {_change_of_loss(effects.loc[name])}"
            title += f"; over the whole text it {_change_of_loss(whole)}"
    text = [f"{title}.", *(f"{_upper(_cost(row))}{_cost_verdict(row)}." for _, row in frozen.iterrows())]
    text.append(f"Every configuration reads the same {int(base['count']):,} tokens.")
    if data.curve["documents"].min() < data.curve["documents"].max():
        text.append("Documents differ in length, so later windows rest on fewer of them.")
    if answers is not None:
        number, loss = int(answers["count"].iloc[0]), answers["mean_loss"].loc[UNFROZEN]
        text.append(f"On the {number:,} answer tokens the loss is {loss:.2f} nats with nothing frozen.")
        for name, row in answers.drop(index=UNFROZEN).iterrows():
            text.append(f"There freezing {freezing_label(name)} {_change_of_loss(row)}{_cost_verdict(row)}.")
    text.append(f"Differences are paired. {_intervals(base)}")
    return Caption(title, " ".join(text))


def find_contrast(pairs: pd.DataFrame, a: str, b: str) -> pd.Series:
    """Find bucket a against b among the contrasts of one layer, turned round if there is only b against a."""
    found = pairs[(pairs["bucket_a"] == a) & (pairs["bucket_b"] == b)]
    if len(found):
        return found.iloc[0]
    row = pairs[(pairs["bucket_a"] == b) & (pairs["bucket_b"] == a)].iloc[0].copy()
    for name in ("ratio", "adjusted"):
        low, high = 1 / row[f"{name}_low"], 1 / row[f"{name}_high"]
        row[name], row[f"{name}_low"], row[f"{name}_high"] = 1 / row[name], high, low
    row["bucket_a"], row["bucket_b"] = a, b
    return row


def _intervals(row: pd.Series, *, each: bool = False) -> str:
    """What the intervals are, and what they hold for."""
    text = f"Intervals: {format_share(row['confidence'])}{' each' if each else ''}, {row['unit']} resampled."
    return f"{text} {scope_of(row)}".strip()


def _decay_sentences(decay: pd.DataFrame) -> Iterator[str]:
    for _, row in decay[decay["layer"] == POOLED].iterrows():
        if not math.isfinite(row["ratio"]):
            yield "The documents are too short, or nothing is written, to compare their first tokens with later ones."
            return
        yield f"In {_first_against(row)} of a document; {_change(row)}."
    yield _intervals(decay.iloc[0])


def _first_against(row: pd.Series) -> str:
    n = int(row["tokens_first"] // max(1, row["documents"]))
    other = f"the last {n}" if row["comparison"] == "first/last" else "the second half"
    ratio = f"{format_number(row['ratio'])} {format_interval(row, 'ratio')}"
    return f"the first {n} tokens plasticity of all layers pooled is {ratio} times that in {other}"


def _change(row: pd.Series) -> str:
    if not excludes(row, "ratio", 1.0):
        return "the interval does not exclude no change"
    return "it falls" if row["ratio"] > 1 else "it rises"


def _bucket_title(pairs: pd.DataFrame, order: list[str]) -> str:
    """What the ratios at like positions say about buckets ordered from the largest."""
    top, second, last = order[0], order[1], order[-1]
    lead, span = find_contrast(pairs, top, second), find_contrast(pairs, top, last)
    told, raw = int(pairs["adjusted_apart"].sum()), int(pairs["apart"].sum())
    if told == 0 and raw == 0:
        title = "No two buckets can be told apart"
    elif told == 0:
        title = (
            f"Differences between buckets vanish at like positions: {raw} of {len(pairs)} pairs can be told apart "
            "over all positions, none at like ones"
        )
    elif lead["adjusted_apart"]:
        title = f"{top} writes most: {_times(lead, 'adjusted')} {second}, the next, at like positions"
    elif span["adjusted_apart"]:
        gap = _times(span, "adjusted")
        title = f"{top} and {second} cannot be told apart; {top} writes {gap} {last} at like positions"
    else:
        title = (
            f"{told} of {len(pairs)} pairs of buckets can be told apart at like positions, but not {top} from "
            f"{second} or {last}"
        )
    return f"{title} (all layers pooled)"


def _rank_buckets(pairs: pd.DataFrame, names: Iterable[str]) -> Iterator[str]:
    """Buckets by geometric mean at like positions, largest first; those without a defined ratio are left out.

    Where no two buckets share positions, all positions count.
    """
    level = {}
    names = list(names)
    value = "adjusted" if np.isfinite(pairs["adjusted"]).any() else "ratio"
    for name in names:
        ratios = [find_contrast(pairs, name, other)[value] for other in names if other != name]
        finite = [math.log(ratio) for ratio in ratios if math.isfinite(ratio) and ratio > 0]
        if finite:
            level[name] = sum(finite) / len(finite)
    return iter(sorted(level, key=level.get, reverse=True))


def _pair_sentences(pairs: pd.DataFrame) -> Iterator[str]:
    for _, row in pairs.iterrows():
        if not math.isfinite(row["ratio"]):
            continue
        larger = row if row["ratio"] >= 1 else find_contrast(pairs, row["bucket_b"], row["bucket_a"])
        yield f"{larger['bucket_a']} {_times(larger)} {larger['bucket_b']} over all positions{_adjusted(larger)}."


def _adjusted(row: pd.Series) -> str:
    """The ratio among tokens at like positions, and whether it tells the two apart."""
    if not math.isfinite(row["adjusted"]):
        return ", at no like positions (not told apart)"
    remark = "" if row["adjusted_apart"] else " (not told apart)"
    if row["adjusted_apart"] and (row["adjusted"] > 1) != (row["ratio"] > 1):
        remark = " (the other way round)"
    return f", {row['adjusted']:.2f} {format_interval(row, 'adjusted', digits=2)} at like positions{remark}"


def _word_start_sentences(data: BucketTables) -> Iterator[str]:
    """The contrasts of NOVELTY on the first tokens of words, as new words are cut into more tokens."""
    counts = data.means[data.means["layer"] == POOLED].pivot(index="tokens", columns="bucket", values="count")
    pairs = data.contrasts[(data.contrasts["layer"] == POOLED) & (data.contrasts["tokens"] == WORD_STARTS)]
    compared = []
    for other in ("RETRIEVAL", "SYNTAX"):
        row = find_contrast(pairs, "NOVELTY", other)
        if math.isfinite(row["adjusted"]):
            told = "" if row["adjusted_apart"] else ", not told apart"
            compared.append(f"NOVELTY {_times(row, 'adjusted')} {other}{told}")
    if compared:
        length = (counts.loc[ALL_TOKENS] / counts.loc[WORD_STARTS].where(counts.loc[WORD_STARTS] > 0)).dropna()
        words = ", ".join(f"{name} {length[name]:.2f}" for name in length.index.intersection(_CONTENT))
        yield f"On first tokens of words (tokens per word: {words}), at like positions: {'; '.join(compared)}."


def _times(row: pd.Series, name: str = "ratio") -> str:
    return f"{row[name]:.2f} {format_interval(row, name, digits=2)} times"


def _cost(row: pd.Series) -> str:
    return f"freezing {freezing_label(row['configuration'])} {_change_of_loss(row)}"


def _change_of_loss(row: pd.Series) -> str:
    if not excludes(row, "delta", 0.0):
        change = f"{row['delta']:+.3f} nats {format_interval(row, 'delta', digits=3)}"
        return f"changes the mean loss by {change}, which does not exclude no effect"
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
    """The end of the sentence on a change whose interval excludes 0."""
    if not excludes(row, "delta", 0.0):
        return ""
    return ": worse without these writes" if row["delta"] > 0 else ": better without these writes"


def _direction(row: pd.Series, name: str) -> str:
    if not excludes(row, name, 0.0):
        return "the interval does not exclude no relation"
    return f"more surprising tokens write {'more' if row[name] > 0 else 'less'}"


def _layers(layers: list[int]) -> str:
    return f"layer {layers[0]}" if len(layers) == 1 else f"layers {', '.join(str(layer) for layer in layers)}"


def _upper(text: str) -> str:
    return text[:1].upper() + text[1:]
