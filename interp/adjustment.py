"""Contrasts of buckets with the learning rate held fixed as well as the position."""

from collections.abc import Sequence
from typing import Any

import numpy as np
import pandas as pd

from interp._columns import POOLED, check_arrays, layer_columns, pooled_plasticity, provenance
from interp.bucketing import BUCKET_NAMES
from interp.resampling import (
    DEFAULT_BOOTSTRAP,
    Blocks,
    Bootstrap,
    Resampler,
    divide,
    interval,
    log_positive,
    make_blocks,
)
from interp.statistics import check_pairs, position_strata

__all__ = ["covariate_contrast"]

_NAMES = ("n", "y", "d", "x", "yy", "dd", "xx", "yd", "yx", "dx")


def covariate_contrast(
    plasticity: Any,
    learning_rate: Any,
    buckets: Any,
    documents: Any,
    positions: Any,
    *,
    mini_batch_size: int,
    pairs: Sequence[tuple[int, int]] | None = None,
    layers: Sequence[int] | None = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Compare buckets at like positions and like inner learning rates.

    A token's plasticity is the norm of its gradient times its learning rate, which the model chooses per token. Least
    squares of log plasticity on bucket, log learning rate and one intercept per stratum (`position_strata`) says what
    is left when both are held fixed: the part of a contrast that is not the model's own gate.

    plasticity, learning_rate [N, L]; the pooled row takes the root of the sum of squares of both. Columns: layer,
    bucket_a, bucket_b, count (tokens used), ratio with _low and _high, slope (exponent of the learning rate: 1 if
    nothing else follows it), at_like_positions (the ratio without the learning rate, on the same tokens); unit,
    blocks, documents, confidence.
    """
    plasticity, layers, buckets, documents, positions = check_arrays(
        plasticity, layers, buckets=buckets, documents=documents, positions=positions
    )
    rates = np.asarray(learning_rate, dtype=np.float64)
    if rates.shape != plasticity.shape:
        raise ValueError(f"learning_rate must have the shape of plasticity {plasticity.shape}, got {rates.shape}")
    strata = position_strata(positions, mini_batch_size)
    blocks = make_blocks(documents, boot)
    draw = Resampler(blocks, boot)
    pooled_rate = pooled_plasticity(rates)
    rows = []
    for place, (layer, values) in enumerate(layer_columns(plasticity, layers)):
        rate = pooled_rate if layer == POOLED else rates[:, place]
        y, x = log_positive(values), log_positive(rate)
        for pair in check_pairs(pairs):
            moments = _moments(y, x, buckets, strata, blocks, pair)
            value, slope, plain = _solve(moments.sum(0))
            draws = _solve(draw.sums(moments))[0]
            used = int((moments[:, :, 0] > 0).any(axis=1).sum())
            low, high = interval(draws, used, boot.confidence)
            row = {"layer": layer, "bucket_a": BUCKET_NAMES[pair[0]], "bucket_b": BUCKET_NAMES[pair[1]]}
            row |= {"count": int(moments[:, :, 0].sum()), "ratio": float(np.exp(value))}
            row |= {"ratio_low": float(np.exp(low)), "ratio_high": float(np.exp(high)), "slope": float(slope)}
            row |= {"at_like_positions": float(np.exp(plain))}
            rows.append(row | provenance(blocks, used, boot))
    return pd.DataFrame(rows)


def _moments(
    y: np.ndarray, x: np.ndarray, buckets: np.ndarray, strata: np.ndarray, blocks: Blocks, pair: tuple[int, int]
) -> np.ndarray:
    """Sums of products over every block and stratum that both buckets reach, [blocks, strata, moments]."""
    chosen = np.isfinite(y) & np.isfinite(x) & np.isin(buckets, pair)
    names, stratum = np.unique(strata[chosen], return_inverse=True)
    y, x, d = y[chosen], x[chosen], (buckets[chosen] == pair[0]).astype(np.float64)
    if len(y):
        y, x = y - y.mean(), x - x.mean()
    terms = {"n": np.ones_like(y), "y": y, "d": d, "x": x, "yy": y * y, "dd": d * d, "xx": x * x}
    terms |= {"yd": y * d, "yx": y * x, "dx": d * x}
    size = len(names)
    key = blocks.index[chosen] * size + stratum
    sums = [np.bincount(key, weights=terms[name], minlength=blocks.count * size) for name in _NAMES]
    return np.stack(sums, axis=-1).reshape(blocks.count, size, len(_NAMES))


def _solve(moments: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Effect of the bucket, slope of the learning rate, effect without it; from [..., strata, moments] to [...]."""
    n, y, d, x, _, dd, xx, yd, yx, dx = np.moveaxis(moments, -1, 0)
    size = np.maximum(n, 1)

    def within(ab: np.ndarray, a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (ab - a * b / size).sum(-1)

    s_dd, s_xx, s_dx = within(dd, d, d), within(xx, x, x), within(dx, d, x)
    s_dy, s_xy = within(yd, y, d), within(yx, y, x)
    scale = s_dd * s_xx
    determinant = np.where(scale - s_dx**2 > 1e-12 * scale, scale - s_dx**2, 0.0)
    effect = divide(s_xx * s_dy - s_dx * s_xy, determinant)
    slope = divide(s_dd * s_xy - s_dx * s_dy, determinant)
    return effect, slope, divide(s_dy, s_dd)
