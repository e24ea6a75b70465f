"""How long a reading takes to settle: exponential decay of plasticity over the tokens of a document."""

from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import pandas as pd

from interp._columns import check_arrays, layer_columns
from interp.resampling import (
    DEFAULT_BOOTSTRAP,
    Blocks,
    Bootstrap,
    Resampler,
    aligned_blocks,
    cell_sums,
    divide,
    interval,
)

__all__ = ["BurnIn", "burn_in_table", "fit_burn_in"]

# How many time constants the shortest document must hold, so that decay and level can be told apart.
LEAST_LENGTHS = 4
_BINS = 48
_GRID = 240


@dataclass(frozen=True)
class BurnIn:
    """Fit of y = level + amplitude * exp(-position / tau) to the mean over documents.

    tau and half_life (tau ln 2) in tokens, amplitude and level in the unit of y, each with its interval; relative is
    (level + amplitude) / level, how many times its level y is at the start. refusal: why tau is not given (None when
    it is); amplitude, level and tau are NaN then. length: tokens that every document has; count: tokens used; unit,
    blocks, documents, confidence as in `interp.statistics`.
    """

    tau: float
    tau_low: float
    tau_high: float
    half_life: float
    amplitude: float
    amplitude_low: float
    amplitude_high: float
    level: float
    relative: float
    refusal: str | None
    length: int
    count: int
    unit: str
    blocks: int
    documents: int
    confidence: float


def fit_burn_in(
    values: Any,
    documents: Any,
    positions: Any,
    *,
    mini_batch_size: int = 1,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> BurnIn:
    """Fit an exponential decay to the mean of `values` over positions, by variable projection.

    values, documents, positions [N]: 0-based positions in the document. Positions beyond the shortest document are
    left out, so that every bin rests on the same documents. Bins are log-spaced and hold whole mini-batches, as
    values may differ by the place in them. For every tau the two other parameters follow by weighted least squares
    (weights: tokens per bin).

    No tau is given when the documents are shorter than `LEAST_LENGTHS` (4) times the tau that fits, or than that many
    times the upper end of its interval (the level is then not seen), when the decay cannot be told from none, and
    with less than 8 bins.
    """
    values = np.asarray(values, dtype=np.float64)
    _, _, documents, positions = check_arrays(values[:, None], None, documents=documents, positions=positions)
    if mini_batch_size < 1:
        raise ValueError(f"mini_batch_size must be at least 1, got {mini_batch_size}")
    length = int(pd.Series(positions).groupby(documents).max().min()) + 1 if len(positions) else 0
    length -= length % mini_batch_size
    edges = _edges(length, mini_batch_size)
    kept = positions < length
    values, documents, positions = values[kept], documents[kept], positions[kept]
    cell = np.searchsorted(edges, positions, side="right") - 1
    bins = len(edges) - 1
    # Whole documents are drawn; with few of them, stretches at the same place in the document.
    blocks = aligned_blocks(documents, cell, boot) if bins >= 8 else Blocks(documents * 0, 1, "nothing", 0)
    if bins < 8:
        return _refused(f"the documents hold {length} tokens, too few for a fit", blocks, values, length, boot)
    sums, counts = cell_sums(values, cell, bins, blocks)
    place = divide(np.bincount(cell, positions, bins), np.bincount(cell, minlength=bins))
    draw = Resampler(blocks, boot)
    mean, weight = divide(sums.sum(0), counts.sum(0)), counts.sum(0)
    if not np.isfinite(mean).all() or not (mean != mean[0]).any():
        return _refused("the values do not change with the position", blocks, values, length, boot)
    drawn = draw.means(sums, counts)
    tau, amplitude, level = _fit(mean[None], weight, place, length)
    draws = _fit(np.where(np.isfinite(drawn), drawn, mean), weight, place, length)
    used = blocks.documents
    (tau_low, tau_high), (low, high) = (interval(d, used, boot.confidence) for d in draws[:2])
    refusal = _refusal(length, float(tau[0]), float(tau_high), float(amplitude[0]), float(low), float(high), used)
    if refusal:
        return _refused(refusal, blocks, values, length, boot)
    return BurnIn(
        tau=float(tau[0]),
        tau_low=float(tau_low),
        tau_high=float(tau_high),
        half_life=float(tau[0] * np.log(2)),
        amplitude=float(amplitude[0]),
        amplitude_low=float(low),
        amplitude_high=float(high),
        level=float(level[0]),
        relative=float(divide(level[0] + amplitude[0], level[0])),
        refusal=None,
        **_provenance(blocks, values, length, boot),
    )


def burn_in_table(
    plasticity: Any,
    documents: Any,
    positions: Any,
    *,
    mini_batch_size: int = 1,
    layers: Any = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Fit every layer of plasticity [N, L] and all pooled: a row of `BurnIn` per layer, with column `layer`."""
    plasticity, layers, documents, positions = check_arrays(
        plasticity, layers, documents=documents, positions=positions
    )
    rows = []
    for layer, values in layer_columns(plasticity, layers):
        fitted = fit_burn_in(values, documents, positions, mini_batch_size=mini_batch_size, boot=boot)
        rows.append({"layer": layer} | asdict(fitted))
    return pd.DataFrame(rows)


def _edges(length: int, size: int) -> np.ndarray:
    """Borders of log-spaced bins of whole mini-batches over 0..length."""
    batches = length // size
    if batches < 1:
        return np.array([0])
    inner = np.unique(np.rint(np.geomspace(1, batches + 1, _BINS + 1) - 1).astype(np.int64))
    return inner * size


def _fit(
    means: np.ndarray, weight: np.ndarray, place: np.ndarray, length: int
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tau, amplitude and level of every row of means [D, bins]."""
    taus = np.geomspace(max(place[place > 0].min(), 1.0), 4.0 * length, _GRID)
    share = weight / weight.sum()
    centre = means - (means * share).sum(1, keepdims=True)
    shapes = np.exp(-place / taus[:, None])  # [grid, bins]
    flat = shapes - (shapes * share).sum(1, keepdims=True)
    cross = (centre * share) @ flat.T  # [D, grid]
    gain = cross**2 / (flat**2 * share).sum(1)  # what each tau takes off the squared error
    best = np.clip(gain.argmax(1), 1, _GRID - 2)
    rows = np.arange(len(means))
    left, middle, right = (gain[rows, best + step] for step in (-1, 0, 1))
    bend = left - 2 * middle + right
    shift = np.where(bend < 0, np.clip(0.5 * divide(left - right, bend), -1, 1), 0.0)
    tau = np.exp(np.log(taus[best]) + shift * np.log(taus[1] / taus[0]))
    shape = np.exp(-place / tau[:, None])
    flat = shape - (shape * share).sum(1, keepdims=True)
    amplitude = (centre * flat * share).sum(1) / (flat**2 * share).sum(1)
    level = (means * share).sum(1) - amplitude * (shape * share).sum(1)
    return tau, amplitude, level


def _refusal(
    length: int, tau: float, tau_high: float, amplitude: float, low: float, high: float, documents: int
) -> str | None:
    if length < LEAST_LENGTHS * tau:
        return f"{length} tokens are fewer than {LEAST_LENGTHS} times the {tau:.0f} that fit best"
    if documents < 2:
        return "one document has no interval"
    if low <= 0 <= high:
        return "the decay cannot be told from none"
    if amplitude < 0:
        return "plasticity rises over the document"
    if length < LEAST_LENGTHS * tau_high:
        return f"{length} tokens are fewer than {LEAST_LENGTHS} times the upper end of the interval ({tau_high:.0f})"
    return None


def _refused(reason: str, blocks: Blocks, values: np.ndarray, length: int, boot: Bootstrap) -> BurnIn:
    names = ("tau", "half_life", "amplitude", "level", "relative")
    bounds = ("tau_low", "tau_high", "amplitude_low", "amplitude_high")
    return BurnIn(
        **dict.fromkeys((*names, *bounds), np.nan), refusal=reason, **_provenance(blocks, values, length, boot)
    )


def _provenance(blocks: Blocks, values: np.ndarray, length: int, boot: Bootstrap) -> dict[str, Any]:
    return {
        "length": length,
        "count": int(np.isfinite(values).sum()),
        "unit": blocks.unit,
        "blocks": blocks.count,
        "documents": blocks.documents,
        "confidence": boot.confidence,
    }
