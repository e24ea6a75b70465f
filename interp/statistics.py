"""Tables about per-token plasticity by bucket: levels, contrasts, contrasts adjusted for position.

Arrays in, one `pandas.DataFrame` out. N tokens in reading order, L layers. Values that are not finite are left
out; geometric means and logarithms also leave out values not above 0 (frozen layers). What has no tokens is NaN
with count 0; an interval from fewer than two blocks is NaN. Column `layer` is the layer's index, or `POOLED` for
the root of the sum of squares over all layers given.

Intervals come from a block bootstrap (`interp.resampling`). Four columns say how: `unit` is what was resampled,
`blocks` how many of these hold tokens of the row, `documents` how many documents they come from, `confidence` the
coverage aimed at. Only where `unit` is "documents" do intervals speak about other documents.
"""

from collections.abc import Sequence
from itertools import combinations
from typing import Any

import numpy as np
import pandas as pd

from interp._columns import POOLED, check_arrays, layer_columns, provenance, with_intervals
from interp.bucketing import BUCKET_NAMES, Bucket
from interp.resampling import (
    DEFAULT_BOOTSTRAP,
    Blocks,
    Bootstrap,
    Estimate,
    Resampler,
    block_bootstrap_ci,
    cell_sums,
    divide,
    interval,
    log_positive,
    make_blocks,
)
from interp.time_course import freezing_effects, perplexity_by_index, surprisal_correlation, temporal_decay

__all__ = [
    "DEFAULT_BOOTSTRAP",
    "POOLED",
    "Bootstrap",
    "Estimate",
    "adjusted_contrast",
    "block_bootstrap_ci",
    "bucket_contrast",
    "bucket_stats",
    "check_pairs",
    "freezing_effects",
    "perplexity_by_index",
    "position_strata",
    "surprisal_correlation",
    "temporal_decay",
]

_BUCKETS = len(BUCKET_NAMES)

Pairs = Sequence[tuple[int, int]]


def bucket_stats(
    plasticity: Any,
    buckets: Any,
    documents: Any,
    *,
    layers: Sequence[int] | None = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Give the level of plasticity in every layer and bucket.

    plasticity [N, L]; buckets [N], values of `Bucket`; documents [N]. Columns: layer, bucket (name), count,
    mean, median and ratio (geometric mean over that of `reference`), each with _low and _high; reference
    (SYNTAX, or the largest bucket where no token is SYNTAX), unit, blocks, documents, confidence.
    """
    plasticity, layers, buckets, documents = check_arrays(plasticity, layers, buckets=buckets, documents=documents)
    blocks = make_blocks(documents, boot)
    draw = Resampler(blocks, boot)
    sizes = np.bincount(buckets, minlength=_BUCKETS)
    reference = int(Bucket.SYNTAX) if sizes[Bucket.SYNTAX] else int(sizes.argmax())
    tables = []
    for layer, values in layer_columns(plasticity, layers):
        sums, counts = cell_sums(values, buckets, _BUCKETS, blocks)
        logs, positive = cell_sums(log_positive(values), buckets, _BUCKETS, blocks)
        used, used_log = (counts > 0).sum(0), (positive > 0).sum(0)
        log_mean, log_draws = divide(logs.sum(0), positive.sum(0)), draw.means(logs, positive)
        medians = [_median(values[buckets == bucket]) for bucket in Bucket]
        columns = {
            "mean": (divide(sums.sum(0), counts.sum(0)), draw.means(sums, counts), used),
            "median": (medians, draw.medians(values, buckets, _BUCKETS), used),
            "ratio": (
                np.exp(log_mean - log_mean[reference]),
                np.exp(log_draws - log_draws[:, [reference]]),
                np.minimum(used_log, used_log[reference]),
            ),
        }
        table = {"layer": layer, "bucket": list(BUCKET_NAMES), "count": counts.sum(0).astype(np.int64)}
        table |= with_intervals(columns, boot) | {"reference": BUCKET_NAMES[reference]}
        tables.append(pd.DataFrame(table | provenance(blocks, used, boot)))
    return pd.concat(tables, ignore_index=True)


def bucket_contrast(
    plasticity: Any,
    buckets: Any,
    documents: Any,
    *,
    pairs: Pairs | None = None,
    layers: Sequence[int] | None = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Compare buckets in every layer, for all six pairs or the given ones.

    plasticity [N, L]; buckets [N]; documents [N]; pairs of `Bucket` values (a, b). Columns: layer, bucket_a,
    bucket_b, count_a, count_b, ratio (geometric mean of a over that of b) and difference (of means, a - b),
    each with _low and _high, hedges_g and cliffs_delta (both positive if a is larger); unit, blocks, documents
    and confidence.
    """
    plasticity, layers, buckets, documents = check_arrays(plasticity, layers, buckets=buckets, documents=documents)
    pairs = check_pairs(pairs)
    a, b = (np.array([pair[side] for pair in pairs], dtype=np.int64) for side in (0, 1))
    blocks = make_blocks(documents, boot)
    draw = Resampler(blocks, boot)
    tables = []
    for layer, values in layer_columns(plasticity, layers):
        columns = {}
        for name, view in (("ratio", log_positive(values)), ("difference", values)):
            sums, counts = cell_sums(view, buckets, _BUCKETS, blocks)
            mean, draws = divide(sums.sum(0), counts.sum(0)), draw.means(sums, counts)
            used = np.minimum(*((counts > 0).sum(0)[side] for side in (a, b)))
            columns[name] = (mean[a] - mean[b], draws[:, a] - draws[:, b], used)
        value, draws, used_log = columns["ratio"]
        columns["ratio"] = (np.exp(value), np.exp(draws), used_log)
        groups = [np.sort(values[(buckets == bucket) & np.isfinite(values)]) for bucket in Bucket]
        table = {
            "layer": layer,
            "bucket_a": [BUCKET_NAMES[x] for x in a],
            "bucket_b": [BUCKET_NAMES[x] for x in b],
            "count_a": [len(groups[x]) for x in a],
            "count_b": [len(groups[x]) for x in b],
            **with_intervals(columns, boot),
            "hedges_g": [_hedges_g(groups[x], groups[y]) for x, y in pairs],
            "cliffs_delta": [_cliffs_delta(groups[x], groups[y]) for x, y in pairs],
            **provenance(blocks, used, boot),
        }
        tables.append(pd.DataFrame(table))
    return pd.concat(tables, ignore_index=True)


def adjusted_contrast(
    plasticity: Any,
    buckets: Any,
    documents: Any,
    positions: Any,
    *,
    mini_batch_size: int,
    pairs: Pairs | None = None,
    layers: Sequence[int] | None = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Compare buckets at like positions, as novelty and plasticity both fall over a document.

    Logarithms are compared within strata (`position_strata`) and averaged with weights n_a n_b / (n_a + n_b):
    least squares with one intercept per stratum. positions [N]: 0-based, in the document.

    Columns: layer, bucket_a, bucket_b, count_a and count_b (tokens in strata that hold both), strata (how
    many do), raw_ratio (all tokens), ratio (adjusted) with _low and _high; unit, blocks, documents, confidence.
    """
    plasticity, layers, buckets, documents, positions = check_arrays(
        plasticity, layers, buckets=buckets, documents=documents, positions=positions
    )
    pairs = check_pairs(pairs)
    strata = np.unique(position_strata(positions, mini_batch_size), return_inverse=True)[1]
    shape = (int(strata.max(initial=-1)) + 1, _BUCKETS)
    blocks = make_blocks(documents, boot)
    draw = Resampler(blocks, boot)
    rows = []
    for layer, values in layer_columns(plasticity, layers):
        cells = cell_sums(log_positive(values), strata * _BUCKETS + buckets, shape[0] * _BUCKETS, blocks)
        logs, counts = (x.reshape(blocks.count, *shape) for x in cells)
        draws = draw.sums(logs), draw.sums(counts)
        for pair in pairs:
            rows.append({"layer": layer} | _adjusted_pair(logs, counts, draws, pair, boot, blocks))
    return pd.DataFrame(rows)


def position_strata(positions: Any, mini_batch_size: int) -> np.ndarray:
    """Give the stratum of every token, int64 [N]: half an octave of the mini-batch's index x place within it."""
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    positions = np.asarray(positions).astype(np.int64)
    octave = np.floor(2 * np.log2(1 + positions // mini_batch_size)).astype(np.int64)
    return octave * mini_batch_size + positions % mini_batch_size


def check_pairs(pairs: Pairs | None) -> list[tuple[int, int]]:
    """Give pairs of different buckets as integers, all six for None; ValueError for anything else."""
    if pairs is None:
        return [(int(b), int(a)) for a, b in combinations(Bucket, 2)]
    allowed = set(map(int, Bucket))
    for pair in pairs:
        if len(pair) != 2 or not set(pair) <= allowed or pair[0] == pair[1]:
            raise ValueError(f"pairs must hold two different buckets (0 to {_BUCKETS - 1}) each, got {pair!r}")
    return [(int(a), int(b)) for a, b in pairs]


def _adjusted_pair(
    logs: np.ndarray,
    counts: np.ndarray,
    draws: tuple[np.ndarray, np.ndarray],
    pair: tuple[int, int],
    boot: Bootstrap,
    blocks: Blocks,
) -> dict[str, Any]:
    a, b = pair
    total, number = logs.sum(0), counts.sum(0)
    shared = (number[:, a] > 0) & (number[:, b] > 0)
    used = min(int((counts[:, shared, side].sum(1) > 0).sum()) for side in pair)
    raw = divide(total.sum(0), number.sum(0))
    low, high = interval(_within_strata(*draws, a, b), used, boot.confidence)
    return {
        "bucket_a": BUCKET_NAMES[a],
        "bucket_b": BUCKET_NAMES[b],
        "count_a": int(number[shared, a].sum()),
        "count_b": int(number[shared, b].sum()),
        "strata": int(shared.sum()),
        "raw_ratio": float(np.exp(raw[a] - raw[b])),
        "ratio": float(np.exp(_within_strata(total, number, a, b))),
        "ratio_low": float(np.exp(low)),
        "ratio_high": float(np.exp(high)),
        **provenance(blocks, used, boot),
    }


def _within_strata(logs: np.ndarray, counts: np.ndarray, a: int, b: int) -> np.ndarray:
    """Weighted mean over strata of mean a minus mean b; from [..., strata, buckets] to [...]."""
    n_a, n_b = counts[..., a], counts[..., b]
    both = np.maximum(n_a + n_b, 1)
    # n_a n_b / (n_a + n_b) times the difference of the means; 0 where one of the two is missing.
    gap = ((n_b * logs[..., a] - n_a * logs[..., b]) / both).sum(axis=-1)
    return divide(gap, (n_a * n_b / both).sum(axis=-1))


def _median(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(np.median(values)) if len(values) else np.nan


def _hedges_g(a: np.ndarray, b: np.ndarray) -> float:
    """Difference of means over the pooled standard deviation, with the correction for small samples."""
    freedom = len(a) + len(b) - 2
    if min(len(a), len(b)) == 0 or freedom < 1:
        return np.nan
    squares = ((a - a.mean()) ** 2).sum() + ((b - b.mean()) ** 2).sum()
    correction = 1 - 3 / (4 * freedom - 1)
    return float(divide(correction * (a.mean() - b.mean()), np.sqrt(squares / freedom)))


def _cliffs_delta(a: np.ndarray, b: np.ndarray) -> float:
    """P(a > b) - P(a < b) over all pairs of two sorted samples."""
    if min(len(a), len(b)) == 0:
        return np.nan
    smaller, not_larger = (np.searchsorted(b, a, side=side) for side in ("left", "right"))
    return float((smaller.mean() - (len(b) - not_larger).mean()) / len(b))
