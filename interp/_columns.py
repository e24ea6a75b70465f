"""Shared by the tables of `interp.statistics` and `interp.time_course`: input checks, layers, intervals."""

from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np

from interp.bucketing import BUCKET_NAMES
from interp.resampling import Blocks, Bootstrap, interval

POOLED = -1


def check_arrays(plasticity: Any, layers: Sequence[int] | None, **vectors: Any) -> list[Any]:
    """Give plasticity as float64 [N, L], the layer indices, and the integer vectors [N] as they come.

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
    """Give a vector with one entry per token, int64 or float64."""
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
    """Give each layer's index and values [N], then `POOLED` and `pooled_plasticity`."""
    for column, layer in enumerate(layers):
        yield layer, plasticity[:, column]
    yield POOLED, pooled_plasticity(plasticity)


def pooled_plasticity(plasticity: np.ndarray) -> np.ndarray:
    """Pool the layers of [N, L]: the root of the sum of squares over its columns, float64 [N]."""
    return np.sqrt(np.square(plasticity, dtype=np.float64).sum(axis=1))


def with_intervals(columns: dict[str, tuple[Any, np.ndarray, Any]], boot: Bootstrap) -> dict[str, Any]:
    """Turn {name: (value, draws [n_boot, ...], blocks used)} into columns name, name_low, name_high."""
    table = {}
    for name, (value, draws, used) in columns.items():
        bounds = interval(draws, used, boot.confidence)
        for suffix, entry in zip(("", "_low", "_high"), (value, *bounds), strict=True):
            table[name + suffix] = entry if np.ndim(entry) else float(entry)
    return table


def provenance(blocks: Blocks, used: Any, boot: Bootstrap) -> dict[str, Any]:
    """Give the columns that say where the intervals of a row come from: unit, blocks, documents, confidence."""
    return {"unit": blocks.unit, "blocks": used, "documents": blocks.documents, "confidence": boot.confidence}
