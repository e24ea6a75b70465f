"""Shared by the tables of `interp.statistics` and `interp.time_course`: input checks, layers, intervals."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from interp.bucketing import BUCKET_NAMES
from interp.resampling import Bootstrap, interval

POOLED = -1


def check_arrays(plasticity: Any, layers: Sequence[int] | None, **vectors: Any) -> list[Any]:
    """Plasticity as float64 [N, L], the layer indices, and the integer vectors [N] as they come.

    Raises ValueError or TypeError that names the array.
    """
    plasticity = np.asarray(plasticity, dtype=np.float64)
    if plasticity.ndim != 2:
        raise ValueError(f"plasticity must have the shape [tokens, layers], got {plasticity.shape}")
    names = list(range(plasticity.shape[1])) if layers is None else list(layers)
    if len(names) != plasticity.shape[1]:
        raise ValueError(f"layers must name the {plasticity.shape[1]} columns of plasticity, got {names}")
    return [plasticity, names, *(check_vector(k, v, len(plasticity)) for k, v in vectors.items())]


def check_vector(name: str, values: Any, tokens: int, *, integers: bool = True) -> np.ndarray:
    """A vector with one entry per token, int64 or float64."""
    values = np.asarray(values)
    if values.shape != (tokens,):
        raise ValueError(f"{name} must have one entry per token ({tokens}), got shape {values.shape}")
    if not integers:
        return values.astype(np.float64)
    if tokens and not (np.issubdtype(values.dtype, np.integer) or values.dtype == bool):
        raise TypeError(f"{name} must hold integers, got dtype {values.dtype}")
    values = values.astype(np.int64)
    if name == "buckets" and tokens and not (values.min() >= 0 and values.max() < len(BUCKET_NAMES)):
        raise ValueError(f"buckets must be 0 to {len(BUCKET_NAMES) - 1}, got {np.unique(values).tolist()}")
    return values


def layer_columns(plasticity: np.ndarray, layers: Sequence[int]) -> Iterator[tuple[int, np.ndarray]]:
    """Each layer's index and values [N], then `POOLED` and the root of the sum of squares over the layers."""
    for column, layer in enumerate(layers):
        yield layer, plasticity[:, column]
    yield POOLED, np.sqrt(np.square(plasticity).sum(axis=1))


def log_positive(values: np.ndarray) -> np.ndarray:
    """Natural logarithm, NaN for values not above 0."""
    return np.log(values, where=values > 0, out=np.full(values.shape, np.nan))


def with_intervals(columns: dict[str, tuple[Any, np.ndarray, Any]], boot: Bootstrap) -> dict[str, Any]:
    """{name: (value, draws [n_boot, ...], blocks used)} as columns name, name_low, name_high."""
    table = {}
    for name, (value, draws, used) in columns.items():
        bounds = interval(draws, used, boot.confidence)
        for suffix, entry in zip(("", "_low", "_high"), (value, *bounds), strict=True):
            table[name + suffix] = entry if np.ndim(entry) else float(entry)
    return table
