"""Is a contrast of buckets more than chance would give? Labels exchanged, everything else left as it is."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from interp._columns import check_arrays, layer_columns
from interp.bucketing import BUCKET_NAMES
from interp.resampling import divide, log_positive
from interp.statistics import check_pairs, position_strata

__all__ = ["adjust_p_values", "permutation_test"]

SCHEMES = ("shift", "shuffle")


def permutation_test(
    plasticity: Any,
    buckets: Any,
    documents: Any,
    positions: Any,
    *,
    mini_batch_size: int,
    pairs: Sequence[tuple[int, int]] | None = None,
    scheme: str = "shift",
    permutations: int = 999,
    layers: Sequence[int] | None = None,
    seed: int = 0,
) -> pd.DataFrame:
    """Compare each adjusted ratio (`interp.statistics.adjusted_contrast`) with those of exchanged labels.

    `scheme`: "shift" turns the labels of every document round by a random number of tokens, so that runs of equal
    labels (the tokens of a word) stay together; "shuffle" exchanges labels of single tokens within a document and a
    stratum of positions, which takes them for independent.

    Columns: layer, bucket_a, bucket_b, ratio, null_low and null_high (2.5% and 97.5% of the exchanged ratios), p
    (two-sided, of the logarithm; at least 1 / (permutations + 1)), p_adjusted (`adjust_p_values` over all rows),
    permutations, scheme, count (tokens), documents. ValueError for another scheme or fewer than 19 permutations.
    """
    if scheme not in SCHEMES:
        raise ValueError(f"scheme must be one of {list(SCHEMES)}, got {scheme!r}")
    if permutations < 19:
        raise ValueError(f"permutations must be at least 19, got {permutations}")
    plasticity, layers, buckets, documents, positions = check_arrays(
        plasticity, layers, buckets=buckets, documents=documents, positions=positions
    )
    chosen = check_pairs(pairs)
    strata = np.unique(position_strata(positions, mini_batch_size), return_inverse=True)[1]
    columns = list(layer_columns(plasticity, layers))
    logs = [log_positive(values) for _, values in columns]
    rng = np.random.default_rng(seed)
    observed = _log_ratios(logs, buckets, strata, chosen)
    null = np.stack(
        [
            _log_ratios(logs, _exchange(buckets, documents, strata, scheme, rng), strata, chosen)
            for _ in range(permutations)
        ]
    )
    rows = []
    for place, (layer, values) in enumerate(columns):
        for index, (a, b) in enumerate(chosen):
            ratio, exchanged = observed[place, index], null[:, place, index]
            low = high = p = np.nan
            if np.isfinite(ratio) and np.isfinite(exchanged).any():
                centre = np.nanmedian(exchanged)
                beyond = int((np.abs(exchanged - centre) >= abs(ratio - centre)).sum())
                low, high = np.exp(np.nanquantile(exchanged, [0.025, 0.975]))
                p = (beyond + 1) / (permutations + 1)
            row = {"layer": layer, "bucket_a": BUCKET_NAMES[a], "bucket_b": BUCKET_NAMES[b]}
            row |= {"ratio": float(np.exp(ratio)), "null_low": float(low), "null_high": float(high), "p": float(p)}
            rows.append(row | {"count": int((np.isfinite(values) & np.isin(buckets, (a, b))).sum())})
    table = pd.DataFrame(rows)
    table["p_adjusted"] = adjust_p_values(table["p"])
    documents_read = len(np.unique(documents))
    return table.assign(permutations=permutations, scheme=scheme, documents=documents_read)


def adjust_p_values(p_values: Any, method: str = "by") -> np.ndarray:
    """Control the false discovery rate over p values [n] (NaN is left out and stays).

    `method` as in `scipy.stats.false_discovery_control`: "by" (Benjamini and Yekutieli) holds for any dependence
    between the tests, "bh" (Benjamini and Hochberg) for independent ones.
    """
    p_values = np.asarray(p_values, dtype=np.float64)
    adjusted = np.full(p_values.shape, np.nan)
    finite = np.isfinite(p_values)
    if finite.any():
        adjusted[finite] = stats.false_discovery_control(p_values[finite], method=method)
    return adjusted


def _exchange(
    buckets: np.ndarray, documents: np.ndarray, strata: np.ndarray, scheme: str, rng: np.random.Generator
) -> np.ndarray:
    if scheme == "shuffle":
        key = np.lexsort((rng.random(len(buckets)), strata, documents))
        place = np.lexsort((strata, documents))
        result = np.empty_like(buckets)
        result[place] = buckets[key]
        return result
    borders = np.flatnonzero(np.diff(documents, prepend=documents[:1] - 1, append=documents[-1:] + 1))
    parts = (buckets[a:b] for a, b in zip(borders[:-1], borders[1:], strict=True))
    return np.concatenate([np.roll(part, int(rng.integers(len(part)))) for part in parts])


def _log_ratios(
    logs: Sequence[np.ndarray], buckets: np.ndarray, strata: np.ndarray, pairs: Sequence[tuple[int, int]]
) -> np.ndarray:
    """Adjusted log ratio of every layer and pair, [layers, pairs]."""
    size = int(strata.max(initial=-1)) + 1
    number = len(BUCKET_NAMES)
    cell = strata * number + buckets
    result = np.full((len(logs), len(pairs)), np.nan)
    for place, values in enumerate(logs):
        finite = np.isfinite(values)
        where = cell if finite.all() else cell[finite]
        kept = values if finite.all() else values[finite]
        sums = np.bincount(where, weights=kept, minlength=size * number).reshape(size, number)
        counts = np.bincount(where, minlength=size * number).reshape(size, number).astype(float)
        for index, (a, b) in enumerate(pairs):
            n_a, n_b = counts[:, a], counts[:, b]
            both = np.maximum(n_a + n_b, 1)
            gap = ((n_b * sums[:, a] - n_a * sums[:, b]) / both).sum()
            result[place, index] = divide(gap, (n_a * n_b / both).sum())
    return result
