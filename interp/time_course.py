"""Tables about reading a document: decay of plasticity, its tie to surprisal, perplexity by tokens read.

Conventions as in `interp.statistics`: N tokens in reading order, block bootstrap with `unit`, `blocks`,
`documents` and `confidence` in every row, NaN with count 0 where there is nothing.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
from scipy import stats

from interp._columns import check_arrays, check_vector, layer_columns, provenance, with_intervals
from interp.resampling import (
    DEFAULT_BOOTSTRAP,
    Bootstrap,
    Resampler,
    aligned_blocks,
    cell_sums,
    divide,
    log_positive,
    make_blocks,
)

__all__ = ["freezing_effects", "perplexity_by_index", "surprisal_correlation", "temporal_decay"]


def temporal_decay(
    plasticity: Any,
    documents: Any,
    positions: Any,
    *,
    n: int = 100,
    layers: Sequence[int] | None = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Compare plasticity in the first n tokens of a document with its last n and its second half ("steady").

    plasticity [N, L]; documents, positions [N]. Documents shorter than 2 n tokens are left out. Columns:
    layer, comparison ("first/last" or "first/steady"), tokens_first, tokens_reference, mean_first,
    mean_reference, ratio (of these means) with _low and _high (NaN for a single document, see
    `interp.resampling.aligned_blocks`); unit, blocks, documents, confidence.
    """
    plasticity, layers, documents, positions = check_arrays(
        plasticity, layers, documents=documents, positions=positions
    )
    if n < 1:
        raise ValueError(f"n must be at least 1 token, got {n}")
    length = _lengths(documents, positions)
    references = {"first/last": positions >= length - n, "first/steady": positions >= length // 2}
    rows = []
    for comparison, reference in references.items():
        chosen = (length >= 2 * n) & ((positions < n) | reference)
        window = reference[chosen].astype(np.int64)
        blocks = aligned_blocks(documents[chosen], window, boot)
        draw = Resampler(blocks, boot)
        for layer, values in layer_columns(plasticity[chosen], layers):
            sums, counts = cell_sums(values, window, 2, blocks)
            tokens, (first, later) = counts.sum(0), divide(sums.sum(0), counts.sum(0))
            draws = draw.means(sums, counts)
            used = int((counts > 0).sum(0).min())
            row = {
                "layer": layer,
                "comparison": comparison,
                "tokens_first": int(tokens[0]),
                "tokens_reference": int(tokens[1]),
                "mean_first": first,
                "mean_reference": later,
                # Stretches at one place of several documents vary as much as the documents do.
                **with_intervals(
                    {"ratio": (divide(first, later), divide(draws[:, 0], draws[:, 1]), blocks.documents)}, boot
                ),
                **provenance(blocks, used, boot),
            }
            rows.append(row)
    return pd.DataFrame(rows)


def surprisal_correlation(
    plasticity: Any,
    surprisal: Any,
    documents: Any,
    positions: Any,
    *,
    lags: Sequence[int] = (-1, 0, 1),
    strata: Any = None,
    select: Any = None,
    layers: Sequence[int] | None = None,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Correlate a token's plasticity with the surprisal of the token `lag` places before it.

    surprisal [N]: -log p of the token itself given those before it, in nats. Lag 0 is the token's own
    surprisal, lag -1 that of the next token. strata [N]: integers; their means are removed for the partial
    correlation (see `interp.statistics.position_strata`), which is NaN without. select: bool [N], tokens
    whose plasticity is used.

    Columns: layer, lag, count, pearson_log (both as logarithms), spearman and partial (Pearson on logarithms
    within strata), each with _low and _high; unit, blocks, documents, confidence. Ranks are taken once, over
    the whole sample.
    """
    plasticity, layers, documents, positions = check_arrays(
        plasticity, layers, documents=documents, positions=positions
    )
    tokens = len(documents)
    surprisal = check_vector("surprisal", surprisal, tokens, integers=False)
    group = None if strata is None else np.unique(check_vector("strata", strata, tokens), return_inverse=True)[1]
    chosen = True if select is None else check_vector("select", select, tokens).astype(bool)
    blocks = make_blocks(documents, boot)
    draw = Resampler(blocks, boot)
    lagged = {lag: _shift(surprisal, documents, positions, lag) for lag in lags}
    rows = []
    for layer, values in layer_columns(plasticity, layers):
        for lag, y in lagged.items():
            both = chosen & np.isfinite(values) & np.isfinite(y)
            x, y = np.where(both, values, np.nan), np.where(both, y, np.nan)
            log_x, log_y = _both_finite(log_positive(x), log_positive(y))
            moments = {
                "pearson_log": _moments(log_x, log_y, blocks),
                "spearman": _moments(*(stats.rankdata(v, nan_policy="omit") for v in (x, y)), blocks),
                "partial": _moments(_centre(log_x, group), _centre(log_y, group), blocks),
            }
            columns = {
                name: (_correlate(m.sum(0)), _correlate(draw.sums(m)), int((m[:, 0] > 0).sum()))
                for name, m in moments.items()
            }
            row = {"layer": layer, "lag": lag, "count": int(both.sum())} | with_intervals(columns, boot)
            rows.append(row | provenance(blocks, columns["spearman"][2], boot))
    return pd.DataFrame(rows)


def perplexity_by_index(
    losses: Mapping[str, Any],
    documents: Any,
    positions: Any,
    *,
    window: int = 256,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> pd.DataFrame:
    """Give perplexity against the number of tokens read, for each configuration.

    losses: {configuration: surprisal of each token [N] in nats}; documents, positions [N]; window in tokens.
    One row per configuration and window of every document together. Columns: configuration, position (tokens
    read at the window's end), count (tokens in the window), cumulative (perplexity of everything up to
    there) and windowed (of the window alone), each with _low and _high; unit, blocks, documents, confidence.
    Configurations share their resamples.
    """
    documents, positions = np.asarray(documents), np.asarray(positions)
    tokens = len(documents)
    documents, positions = (
        check_vector(name, v, tokens) for name, v in (("documents", documents), ("positions", positions))
    )
    if window < 1:
        raise ValueError(f"window must be at least 1 token, got {window}")
    index = positions // window
    windows = int(index.max(initial=-1)) + 1
    blocks = make_blocks(documents, boot, windows=index)
    draw = Resampler(blocks, boot)
    ends = np.minimum(np.arange(1, windows + 1) * window, positions.max(initial=-1) + 1)
    tables = []
    for name, loss in losses.items():
        sums, counts = cell_sums(check_vector("loss", loss, tokens, integers=False), index, windows, blocks)
        used = (counts > 0).sum(0)
        used_so_far = (np.cumsum(counts, axis=1) > 0).sum(0)
        if blocks.stratum is not None:
            # A window with a single stretch has nothing to draw from: what holds it has no interval either.
            used_so_far = np.where(np.logical_or.accumulate(used == 1), 1, used_so_far)
        total, number = draw.sums(sums), draw.sums(counts)
        columns = {
            "cumulative": (
                np.exp(divide(np.cumsum(sums.sum(0)), np.cumsum(counts.sum(0)))),
                np.exp(divide(np.cumsum(total, axis=1), np.cumsum(number, axis=1))),
                used_so_far,
            ),
            "windowed": (np.exp(divide(sums.sum(0), counts.sum(0))), np.exp(divide(total, number)), used),
        }
        head = {"configuration": name, "position": ends, "count": counts.sum(0).astype(np.int64)}
        tables.append(pd.DataFrame(head | with_intervals(columns, boot) | provenance(blocks, used, boot)))
    return pd.concat(tables, ignore_index=True)


def freezing_effects(
    losses: Mapping[str, Any], documents: Any, *, baseline: str, boot: Bootstrap = DEFAULT_BOOTSTRAP
) -> pd.DataFrame:
    """Give the mean loss of each configuration, and how much it lies above the baseline's on the same tokens.

    losses: {configuration: surprisal of each token [N] in nats}, the baseline among them; documents [N].
    Columns: configuration, count (tokens with both losses), mean_loss, perplexity, delta (nats per token)
    with _low and _high; unit, blocks, documents, confidence.
    """
    if baseline not in losses:
        raise ValueError(f"baseline must be one of {list(losses)}, got {baseline!r}")
    documents = np.asarray(documents)
    documents = check_vector("documents", documents, len(documents))
    blocks = make_blocks(documents, boot)
    draw = Resampler(blocks, boot)
    reference = check_vector("loss", losses[baseline], len(documents), integers=False)
    rows = []
    for name, loss in losses.items():
        loss = check_vector("loss", loss, len(documents), integers=False)
        loss, paired = _both_finite(loss, reference)
        sums, counts = cell_sums(loss - paired, np.zeros(len(loss), dtype=np.int64), 1, blocks)
        tokens, used = int(counts.sum()), int((counts > 0).sum())
        mean = float(divide(np.nansum(loss), tokens))
        delta = (float(divide(sums.sum(), tokens)), draw.means(sums, counts)[:, 0], used)
        row = {"configuration": name, "count": tokens, "mean_loss": mean, "perplexity": float(np.exp(mean))}
        rows.append(row | with_intervals({"delta": delta}, boot) | provenance(blocks, used, boot))
    return pd.DataFrame(rows)


def _lengths(documents: np.ndarray, positions: np.ndarray) -> np.ndarray:
    """Length of each token's document, int64 [N]."""
    _, document = np.unique(documents, return_inverse=True)
    length = np.zeros(int(document.max(initial=-1)) + 1, dtype=np.int64)
    np.maximum.at(length, document, positions + 1)
    return length[document]


def _shift(values: np.ndarray, documents: np.ndarray, positions: np.ndarray, lag: int) -> np.ndarray:
    """The value `lag` positions before each token, NaN where the document has no such token."""
    source = np.arange(len(values)) - lag
    source = np.where((source >= 0) & (source < len(values)), source, 0)
    same = (documents[source] == documents) & (positions - positions[source] == lag)
    return np.where(same, values[source], np.nan)


def _both_finite(x: np.ndarray, y: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    both = np.isfinite(x) & np.isfinite(y)
    return np.where(both, x, np.nan), np.where(both, y, np.nan)


def _centre(values: np.ndarray, group: np.ndarray | None) -> np.ndarray:
    """Subtract the mean of the finite values of each group; all NaN without groups."""
    if group is None:
        return np.full_like(values, np.nan)
    finite = np.isfinite(values)
    size = int(group.max(initial=-1)) + 1
    total = np.bincount(group[finite], weights=values[finite], minlength=size)
    return _deviation(values, divide(total, np.bincount(group[finite], minlength=size))[group])


def _deviation(values: np.ndarray, centre: Any) -> np.ndarray:
    """Difference from the centre, 0 where it is rounding noise, so that what is constant stays constant."""
    gap = values - centre
    return np.where(np.abs(gap) <= 1e-12 * np.abs(values), 0.0, gap)


def _moments(x: np.ndarray, y: np.ndarray, blocks: Any) -> np.ndarray:
    """Sums of 1, x, y, xx, yy, xy over every block, float64 [blocks, 6], of the centred finite pairs."""
    finite = np.isfinite(x)
    x, y, block = x[finite], y[finite], blocks.index[finite]
    if len(x):
        x, y = _deviation(x, x.mean()), _deviation(y, y.mean())
    terms = (np.ones_like(x), x, y, x * x, y * y, x * y)
    return np.stack([np.bincount(block, weights=term, minlength=blocks.count) for term in terms], axis=1)


def _correlate(moments: np.ndarray) -> np.ndarray:
    """Pearson's correlation from sums [..., 6]; NaN if one side does not vary."""
    n, x, y, xx, yy, xy = np.moveaxis(moments, -1, 0)
    square = divide(n * xx - x * x, n * n) * divide(n * yy - y * y, n * n)
    return divide(divide(n * xy - x * y, n * n), np.sqrt(np.maximum(square, 0)))
