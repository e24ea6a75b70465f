"""Intervals by block bootstrap: documents or stretches of tokens are resampled, not single tokens."""

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy import stats

__all__ = [
    "DEFAULT_BOOTSTRAP",
    "Blocks",
    "Bootstrap",
    "Estimate",
    "Resampler",
    "aligned_blocks",
    "block_bootstrap_ci",
    "cell_sums",
    "divide",
    "interval",
    "log_positive",
    "make_blocks",
    "share_interval",
]

_TAIL_DRAWS = 2


def _draws_for(confidence: float) -> int:
    """Resamples with which `_TAIL_DRAWS` of them lie beyond each end of an interval."""
    return math.ceil(2 * _TAIL_DRAWS / (1 - confidence) - 1e-6)


@dataclass(frozen=True)
class Bootstrap:
    """Options of every interval.

    n_boot: number of resamples, enough for 2 to lie beyond each end of an interval (80 at 95%).
    confidence: coverage aimed at. seed: of the resamples.
    min_documents: with fewer documents, stretches of tokens are resampled instead.
    block_length: tokens of such a stretch (at most 128 where this leaves fewer than 20 stretches).
    """

    n_boot: int = 2000
    confidence: float = 0.95
    seed: int = 0
    min_documents: int = 10
    block_length: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.confidence < 1:
            raise ValueError(f"confidence must lie between 0 and 1, got {self.confidence}")
        least = _draws_for(self.confidence)
        if self.n_boot < least:
            share = f"{100 * self.confidence:.6g}%"
            raise ValueError(f"n_boot must be at least {least} for intervals of {share}, got {self.n_boot}")
        if self.min_documents < 2:
            raise ValueError(f"min_documents must be at least 2, got {self.min_documents}")
        if self.block_length < 1:
            raise ValueError(f"block_length must be at least 1 token, got {self.block_length}")

    def shared(self, comparisons: int) -> "Bootstrap":
        """Give options for intervals that all hold together with `confidence` (Bonferroni), of 2000 draws or more."""
        confidence = 1 - (1 - self.confidence) / comparisons
        return replace(self, confidence=confidence, n_boot=max(self.n_boot, 2000, _draws_for(confidence)))


DEFAULT_BOOTSTRAP = Bootstrap()


@dataclass(frozen=True)
class Blocks:
    """What is resampled: block of every token (int64 [N], 0 to count - 1), number of blocks, unit in words.

    documents: number of documents the tokens come from.
    stratum: int64 [count]; blocks are drawn within their stratum. None is one stratum.
    """

    index: np.ndarray
    count: int
    unit: str
    documents: int
    stratum: np.ndarray | None = None


@dataclass(frozen=True)
class Estimate:
    """A statistic and its interval, from `count` tokens in `blocks` blocks (`unit`); NaN where undefined."""

    value: float
    low: float
    high: float
    count: int
    blocks: int
    unit: str


def make_blocks(documents: Any, boot: Bootstrap = DEFAULT_BOOTSTRAP, *, windows: Any = None) -> Blocks:
    """Choose what to resample: documents if there are enough, else stretches of tokens within documents.

    documents: integers [N], the tokens in reading order.
    windows: integers [N]; stretches then stay within a window and are drawn within it. They are an eighth of
        what the window holds of their document, 16 tokens at least, so that a narrow window holds several.
    """
    documents = np.asarray(documents)
    _, document = np.unique(documents, return_inverse=True)
    count = int(document.max(initial=-1)) + 1
    if count >= boot.min_documents:
        return Blocks(document, count, "documents", count)
    if windows is None:
        length = boot.block_length
        if len(document) < 20 * length:
            length = min(length, 128)
        index = _stretches(document, length)
        return Blocks(index, int(index.max(initial=-1)) + 1, _unit(index), count)
    _, window = np.unique(np.asarray(windows), return_inverse=True)
    part = np.unique(document * (window.max(initial=0) + 1) + window, return_inverse=True)[1]
    length = np.clip(np.bincount(part) // 8, 16, boot.block_length)
    index = _stretches(part, length)
    stratum = np.zeros(int(index.max(initial=-1)) + 1, dtype=np.int64)
    stratum[index] = window
    return Blocks(index, len(stratum), _unit(index), count, stratum)


def aligned_blocks(documents: Any, windows: Any, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> Blocks:
    """Choose what to resample where windows of the documents are compared: documents if there are enough.

    documents, windows: integers [N], the tokens in reading order. With few documents every window is cut into
    up to eight stretches of 16 tokens or more, as many in every document, and stretches are exchanged between
    documents at the same place only: a trend within a window is no noise. One document has nothing to exchange.
    """
    _, document = np.unique(np.asarray(documents), return_inverse=True)
    _, window = np.unique(np.asarray(windows), return_inverse=True)
    count = int(document.max(initial=-1)) + 1
    if count >= boot.min_documents or not len(document):
        return Blocks(document, count, "documents", count)
    number = int(window.max()) + 1
    part = document * number + window
    sizes = np.bincount(part, minlength=count * number)
    shortest = np.where(sizes > 0, sizes, len(part)).reshape(count, number).min(axis=0)
    pieces = np.clip(shortest // 16, 1, 8)[window]
    place = _rank(part) * pieces // sizes[part]
    _, index = np.unique(part * 8 + place, return_inverse=True)
    stratum = np.zeros(int(index.max()) + 1, dtype=np.int64)
    stratum[index] = window * 8 + place
    return Blocks(index, len(stratum), f"{_unit(index)} at the same place in their document", count, stratum)


def block_bootstrap_ci(
    values: Any, documents: Any, *, statistic: str = "mean", boot: Bootstrap = DEFAULT_BOOTSTRAP
) -> Estimate:
    """Estimate a mean, median or geometric mean with an interval that allows for dependence between tokens.

    values [N], documents [N]. Values that are not finite are left out, and so are those not above 0 in a
    geometric mean. Raises ValueError for another statistic or shapes that differ.
    """
    values = np.asarray(values, dtype=np.float64)
    documents = np.asarray(documents)
    if values.ndim != 1 or documents.shape != values.shape:
        raise ValueError(
            f"values and documents must have the same shape [N], got {values.shape} and {documents.shape}"
        )
    inverse: dict[str, Callable[[Any], Any]] = {
        "mean": np.asarray,
        "geometric_mean": np.exp,
        "median": np.asarray,
    }
    if statistic not in inverse:
        raise ValueError(f"statistic must be one of {sorted(inverse)}, got {statistic!r}")
    if statistic == "geometric_mean":
        values = log_positive(values)
    blocks = make_blocks(documents, boot)
    draw = Resampler(blocks, boot)
    group = np.zeros(len(values), dtype=np.int64)
    sums, counts = cell_sums(values, group, 1, blocks)
    n = int(counts.sum())
    used = (counts > 0).sum(axis=0)
    if statistic == "median":
        kept = values[np.isfinite(values)]
        value = float(np.median(kept)) if n else np.nan
        replicates = draw.medians(values, group, 1)
    else:
        value = float(sums.sum() / n) if n else np.nan
        replicates = draw.means(sums, counts)
    low, high = interval(replicates, used, boot.confidence)
    value, low, high = (float(inverse[statistic](x)) for x in (value, low[0], high[0]))
    return Estimate(value, low, high, n, int(used[0]), blocks.unit)


class Resampler:
    """Draws of blocks with replacement; a statistic of every draw follows from sums over each block.

    The same draws serve every column, so differences between columns are paired.
    """

    def __init__(self, blocks: Blocks, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> None:
        self.blocks = blocks
        self.n_boot = boot.n_boot
        generator = np.random.default_rng(boot.seed)
        stratum = np.zeros(blocks.count, dtype=np.int64) if blocks.stratum is None else blocks.stratum
        self._draws: list[tuple[np.ndarray, np.ndarray]] = []
        for s in np.unique(stratum):
            members = np.flatnonzero(stratum == s)
            share = np.full(len(members), 1 / len(members))
            times = generator.multinomial(len(members), share, size=boot.n_boot)
            self._draws.append((members, times.astype(np.uint16)))

    def sums(self, block_sums: np.ndarray) -> np.ndarray:
        """Add sums [blocks, ...] up to their total in every draw [n_boot, ...]."""
        flat = block_sums.reshape(len(block_sums), int(np.prod(block_sums.shape[1:])))
        total = np.zeros((self.n_boot, flat.shape[1]))
        for members, times in self._draws:
            part = flat[members]
            filled = np.flatnonzero(part.any(axis=0))
            total[:, filled] += times.astype(np.float64) @ part[:, filled]
        return total.reshape(self.n_boot, *block_sums.shape[1:])

    def means(self, sums: np.ndarray, counts: np.ndarray) -> np.ndarray:
        """Give means in every draw [n_boot, ...] from sums and counts [blocks, ...]; NaN without tokens."""
        return divide(self.sums(sums), self.sums(counts))

    def medians(self, values: np.ndarray, group: np.ndarray, groups: int) -> np.ndarray:
        """Give medians of each group in every draw [n_boot, groups], from histograms with fine central cells."""
        result = np.full((self.n_boot, groups), np.nan)
        levels = np.concatenate([[0, 0.1, 0.2], np.linspace(0.3, 0.7, 129), [0.8, 0.9, 1]])
        for g in range(groups):
            chosen = np.flatnonzero((group == g) & np.isfinite(values))
            if len(chosen):
                edges = np.unique(np.quantile(values[chosen], levels))
                cell = np.clip(np.searchsorted(edges, values[chosen], side="left"), 0, len(edges) - 1)
                key = self.blocks.index[chosen] * len(edges) + cell
                counts = np.bincount(key, minlength=self.blocks.count * len(edges))
                below = np.cumsum(self.sums(counts.reshape(self.blocks.count, -1)), axis=1)
                result[:, g] = _cross_half(below, edges)
        return result


def cell_sums(values: np.ndarray, group: np.ndarray, groups: int, blocks: Blocks) -> tuple[np.ndarray, np.ndarray]:
    """Sum and count the finite values in every block and group, both float64 [blocks, groups]."""
    finite = np.isfinite(values)
    key = (blocks.index * groups + group)[finite]
    size = blocks.count * groups
    sums = np.bincount(key, weights=values[finite], minlength=size)
    counts = np.bincount(key, minlength=size).astype(np.float64)
    return sums.reshape(blocks.count, groups), counts.reshape(blocks.count, groups)


def divide(numerator: Any, denominator: Any) -> np.ndarray:
    """Divide, with NaN where the denominator is 0."""
    numerator, denominator = np.broadcast_arrays(np.asarray(numerator, float), np.asarray(denominator, float))
    return np.divide(numerator, denominator, out=np.full(numerator.shape, np.nan), where=denominator != 0)


def log_positive(values: np.ndarray) -> np.ndarray:
    """Take the natural logarithm, NaN for values not above 0."""
    return np.log(values, where=values > 0, out=np.full(values.shape, np.nan))


def interval(replicates: np.ndarray, used: Any, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Give the percentile interval of every column of replicates [n_boot, ...], widened for few blocks.

    used [...]: number of blocks with tokens of the column; below 2 there is no interval (NaN). The
    percentiles lie further out than the nominal ones, by Student's t and by the factor sqrt(n / (n - 1)):
    without that an interval from few blocks is too narrow.
    """
    used = np.broadcast_to(np.asarray(used), replicates.shape[1:])
    ordered = np.sort(replicates, axis=0)
    finite = np.isfinite(ordered).sum(axis=0)
    defined = (used >= 2) & (finite >= 2)
    n = np.where(defined, used, 2)
    reach = stats.t.ppf(0.5 + confidence / 2, n - 1) * np.sqrt(n / (n - 1))
    tail = stats.norm.sf(reach)
    bounds = []
    for level in (tail, 1 - tail):
        place = level * (np.maximum(finite, 1) - 1)
        below = np.floor(place).astype(np.int64)
        above = np.minimum(below + 1, np.maximum(finite, 1) - 1)
        a, b = (np.take_along_axis(ordered, k[None], axis=0)[0] for k in (below, above))
        bounds.append(np.where(defined, a + (place - below) * (b - a), np.nan))
    return bounds[0], bounds[1]


def share_interval(hits: Any, number: int, confidence: float) -> tuple[np.ndarray, np.ndarray]:
    """Give Wilson's interval of a share, `hits` (any shape) of `number` independent trials; NaN without trials.

    Unlike resamples it does not shrink to a point where all trials end alike.
    """
    hits = np.asarray(hits)
    bounds = np.full((hits.size, 2), np.nan)
    if number:
        tests = [stats.binomtest(int(k), number) for k in hits.ravel()]
        bounds[:] = [test.proportion_ci(confidence, method="wilson") for test in tests]
    return bounds[:, 0].reshape(hits.shape), bounds[:, 1].reshape(hits.shape)


def _stretches(part: np.ndarray, length: Any) -> np.ndarray:
    """Cut every part (document, or its share of a window) into near-equal stretches of about `length` tokens."""
    sizes = np.bincount(part)
    pieces = np.maximum(1, np.rint(sizes / length)).astype(np.int64)
    first = np.concatenate([[0], np.cumsum(pieces)])
    return first[part] + _rank(part) * pieces[part] // np.maximum(sizes[part], 1)


def _rank(part: np.ndarray) -> np.ndarray:
    """Number of earlier tokens of the same part, int64 [N]."""
    order = np.argsort(part, kind="stable")
    offset = np.concatenate([[0], np.cumsum(np.bincount(part))])
    rank = np.empty(len(part), dtype=np.int64)
    rank[order] = np.arange(len(part)) - offset[part[order]]
    return rank


def _unit(index: np.ndarray) -> str:
    sizes = np.bincount(index)
    if not len(sizes):
        return "blocks of tokens"
    low, high = int(sizes.min()), int(sizes.max())
    return f"blocks of {low} tokens" if low == high else f"blocks of {low} to {high} tokens"


def _cross_half(below: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Where cumulative counts [n_boot, edges] reach half their total, linear between; NaN without tokens."""
    half = below[:, -1:] / 2
    cell = np.argmax(below >= half, axis=1)
    rows = np.arange(len(below))
    before = np.where(cell > 0, below[rows, cell - 1], 0.0)
    inside = divide(half[:, 0] - before, below[rows, cell] - before)
    left = edges[np.maximum(cell - 1, 0)]
    return np.where(below[:, -1] > 0, left + inside * (edges[cell] - left), np.nan)
