"""The tables behind every figure of a run.

Column `layer` holds absolute layer indices, and `POOLED` (-1, "pooled" in CSV files) for all TTT layers
together: the root of the sum over layers of the squared plasticity. Losses and surprisals are in nats,
positions and windows in tokens. Intervals (columns `_low` and `_high`) are those of `interp.statistics`.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pandas as pd

from interp._columns import pooled_plasticity
from interp.bucketing import BUCKET_NAMES
from interp.files import write_text
from interp.run_folder import Run
from interp.statistics import (
    DEFAULT_BOOTSTRAP,
    POOLED,
    Bootstrap,
    adjusted_contrast,
    block_bootstrap_ci,
    bucket_contrast,
    bucket_stats,
    freezing_effects,
    perplexity_by_index,
    position_strata,
    surprisal_correlation,
    temporal_decay,
)

__all__ = [
    "ALL_TOKENS",
    "BUCKET_NAMES",
    "MAX_COLUMNS",
    "POOLED",
    "UNFROZEN",
    "WORD_STARTS",
    "BucketTables",
    "PerplexityTables",
    "RunTables",
    "SurprisalTables",
    "TimeTables",
    "bucket_tables",
    "loss_columns",
    "perplexity_tables",
    "pooled_plasticity",
    "run_tables",
    "save_tables",
    "surprisal_tables",
    "time_tables",
]

MAX_COLUMNS = 1000
MAX_WINDOWS = 40
UNFROZEN = "nothing frozen"
ALL_TOKENS = "all"
WORD_STARTS = "word starts"
_MAX_CELLS = 60
_TREND_BINS = 10


@dataclass(frozen=True)
class TimeTables:
    """`plasticity`: a row per layer and stretch of token indices, with layer, start, stop, tokens, documents,
    plasticity (mean). `decay`: `interp.statistics.temporal_decay`.
    """

    plasticity: pd.DataFrame
    decay: pd.DataFrame


@dataclass(frozen=True)
class SurprisalTables:
    """Surprisal of token t - `lag` against the plasticity of token t, all layers pooled.

    `histogram`: tokens per cell with surprisal_low, surprisal_high, plasticity_low, plasticity_high; the
    outer cells also hold what lies beyond their borders. `trend`: geometric mean of plasticity per tenth of
    the tokens by surprisal. `correlation`: `interp.statistics.surprisal_correlation`, per layer and pooled,
    for several lags.
    """

    lag: int
    histogram: pd.DataFrame
    trend: pd.DataFrame
    correlation: pd.DataFrame


@dataclass(frozen=True)
class BucketTables:
    """Levels per layer and bucket, and every pair of buckets compared.

    `means`: `interp.statistics.bucket_stats`. `contrasts`: `bucket_contrast`, with adjusted, adjusted_low and
    adjusted_high (the ratio among tokens at like positions, `adjusted_contrast`), apart and adjusted_apart:
    whether the interval of the ratio, and of the adjusted one, excludes 1 even when its confidence is shared
    out among the six pairs of a layer (Bonferroni).

    Column `tokens` of both: `ALL_TOKENS`, or `WORD_STARTS` for the first token of every word and the tokens
    outside words. New words have more tokens than known ones, and a word's later tokens differ from its first.
    """

    means: pd.DataFrame
    contrasts: pd.DataFrame


@dataclass(frozen=True)
class PerplexityTables:
    """Loss per freezing configuration, `UNFROZEN` first.

    `curve`: `perplexity_by_index`, where `documents` counts those that reach the window. `effects`:
    `freezing_effects`. `answers`: the same on answer tokens only, None when the run has none.
    """

    curve: pd.DataFrame
    effects: pd.DataFrame
    answers: pd.DataFrame | None


@dataclass(frozen=True)
class RunTables:
    """The tables of all four figures."""

    time: TimeTables
    surprisal: SurprisalTables
    buckets: BucketTables
    perplexity: PerplexityTables

    def frames(self) -> dict[str, pd.DataFrame]:
        """Give every table under the name of its file."""
        frames = {
            "plasticity_by_time": self.time.plasticity,
            "plasticity_decay": self.time.decay,
            "surprisal_histogram": self.surprisal.histogram,
            "surprisal_trend": self.surprisal.trend,
            "surprisal_correlation": self.surprisal.correlation,
            "bucket_means": self.buckets.means,
            "bucket_contrasts": self.buckets.contrasts,
            "perplexity_by_index": self.perplexity.curve,
            "freezing_effects": self.perplexity.effects,
        }
        if self.perplexity.answers is not None:
            frames["answer_effects"] = self.perplexity.answers
        return frames


def run_tables(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> RunTables:
    """Compute all tables of a run."""
    return RunTables(
        time_tables(run, boot=boot),
        surprisal_tables(run, boot=boot),
        bucket_tables(run, boot=boot),
        perplexity_tables(run, boot=boot),
    )


def save_tables(frames: Mapping[str, pd.DataFrame], folder: str | os.PathLike) -> list[Path]:
    """Write each table as `<name>.csv` into an existing folder, with POOLED spelt out; return the paths."""
    paths = []
    for name, frame in frames.items():
        if "layer" in frame:
            frame = frame.assign(layer=frame["layer"].astype(object).replace({POOLED: "pooled"}))
        path = Path(folder) / f"{name}.csv"
        write_text(path, frame.to_csv(index=False, lineterminator="\n"))
        paths.append(path)
    return paths


def time_tables(run: Run, *, max_columns: int = MAX_COLUMNS, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> TimeTables:
    """Average plasticity by layer and token index, in at most `max_columns` stretches of whole mini-batches."""
    position, width = _columns_of(run, max_columns)
    stretch = position // width
    count = int(stretch.max()) + 1
    finite = np.isfinite(run.plasticity)
    tokens = np.bincount(stretch, minlength=count)
    documents = pd.Series(run.tokens["document"].to_numpy()).groupby(stretch).nunique().to_numpy()
    frames = []
    for column, layer in enumerate(run.ttt_layers):
        kept = finite[:, column]
        sums = np.bincount(stretch[kept], weights=run.plasticity[kept, column], minlength=count)
        number = np.bincount(stretch[kept], minlength=count)
        mean = np.divide(sums, number, out=np.full(count, np.nan), where=number > 0)
        start = np.arange(count) * width
        rows = {"start": start, "stop": np.minimum(start + width, position.max() + 1), "tokens": tokens}
        frames.append(pd.DataFrame({"layer": layer, **rows, "documents": documents, "plasticity": mean}))
    decay = temporal_decay(
        run.plasticity, run.tokens["document"], run.tokens["position"], layers=run.ttt_layers, boot=boot
    )
    return TimeTables(pd.concat(frames, ignore_index=True), decay)


def surprisal_tables(run: Run, *, lag: int = 0, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> SurprisalTables:
    """Set surprisal of the token `lag` places before against plasticity; correlate at lags -1, 0, 1 and `lag`."""
    document, position = run.tokens["document"].to_numpy(), run.tokens["position"].to_numpy()
    surprisal = run.tokens.groupby("document", sort=False)["loss"].shift(lag).to_numpy(dtype=np.float64)
    plasticity = pooled_plasticity(run.plasticity)
    correlation = surprisal_correlation(
        run.plasticity,
        run.tokens["loss"],
        document,
        position,
        lags=sorted({-1, 0, 1, lag}),
        strata=position_strata(position, run.meta["model"]["mini_batch_size"]),
        layers=run.ttt_layers,
        boot=boot,
    )
    usable = np.isfinite(surprisal) & (plasticity > 0) & np.isfinite(plasticity)
    histogram = _histogram(surprisal[usable], plasticity[usable])
    trend = _trend(np.where(usable, surprisal, np.nan), plasticity, document, boot)
    return SurprisalTables(lag, histogram, trend, correlation)


def bucket_tables(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> BucketTables:
    """Compare plasticity per layer and bucket, and every pair of buckets with and without adjusting for position."""
    starts = (run.tokens["is_word_start"] | (run.tokens["word_id"] < 0)).to_numpy()
    views = {ALL_TOKENS: run.plasticity, WORD_STARTS: np.where(starts[:, None], run.plasticity, np.nan)}
    means, contrasts = [], []
    for tokens, plasticity in views.items():
        table = bucket_stats(
            plasticity, run.tokens["bucket"], run.tokens["document"], layers=run.ttt_layers, boot=boot
        )
        means.append(table.assign(tokens=tokens))
        contrasts.append(_contrasts(run, plasticity, boot).assign(tokens=tokens))
    return BucketTables(pd.concat(means, ignore_index=True), pd.concat(contrasts, ignore_index=True))


def perplexity_tables(
    run: Run, *, max_windows: int = MAX_WINDOWS, boot: Bootstrap = DEFAULT_BOOTSTRAP
) -> PerplexityTables:
    """Compute perplexity by token index and the cost of freezing, on all tokens and on the answers."""
    losses = loss_columns(run)
    documents = run.tokens["document"]
    position, window = _columns_of(run, max_windows)
    curve = perplexity_by_index(losses, documents, position, window=window, boot=boot)
    reached = documents.groupby(position // window).nunique().to_numpy()
    curve["documents"] = np.tile(reached, len(losses))
    effects = freezing_effects(losses, documents, baseline=UNFROZEN, boot=boot)
    answer = run.tokens["is_answer"].to_numpy()
    answers = None
    if answer.any():
        masked = {name: np.where(answer, loss, np.nan) for name, loss in losses.items()}
        answers = freezing_effects(masked, documents, baseline=UNFROZEN, boot=boot)
    return PerplexityTables(curve, effects, answers)


def loss_columns(run: Run) -> dict[str, np.ndarray]:
    """Give surprisal of every token, float64 [N] in nats, per configuration; NaN in all where one is missing."""
    stacked = np.column_stack([run.tokens["loss"].to_numpy(), run.loss_frozen]).astype(np.float64)
    stacked[~np.isfinite(stacked).all(axis=1)] = np.nan
    if np.isnan(stacked).all():
        raise ValueError(f"run {str(run.path)!r}: no token has a finite loss in every configuration")
    names = [UNFROZEN, *(entry["name"] for entry in run.freezing)]
    if UNFROZEN in names[1:]:
        raise ValueError(f"run {str(run.path)!r}: no freezing configuration may be called {UNFROZEN!r}")
    return dict(zip(names, stacked.T, strict=True))


def _contrasts(run: Run, plasticity: np.ndarray, boot: Bootstrap) -> pd.DataFrame:
    """Every pair of buckets, as in `BucketTables.contrasts`."""
    where = {"buckets": run.tokens["bucket"], "documents": run.tokens["document"], "layers": run.ttt_layers}
    like = {**where, "positions": run.tokens["position"], "mini_batch_size": run.meta["model"]["mini_batch_size"]}
    shared = boot.shared(math.comb(len(BUCKET_NAMES), 2))
    contrasts = bucket_contrast(plasticity, **where, boot=boot)
    contrasts["apart"] = _excludes_one(bucket_contrast(plasticity, **where, boot=shared))
    adjusted = adjusted_contrast(plasticity, **like, boot=boot)
    adjusted["adjusted_apart"] = _excludes_one(adjusted_contrast(plasticity, **like, boot=shared))
    keys = ["layer", "bucket_a", "bucket_b"]
    names = {"ratio": "adjusted", "ratio_low": "adjusted_low", "ratio_high": "adjusted_high"}
    adjusted = adjusted[[*keys, *names, "adjusted_apart"]].rename(columns=names)
    return contrasts.merge(adjusted, on=keys, how="left", validate="one_to_one")


def _excludes_one(table: pd.DataFrame) -> pd.Series:
    return (table["ratio_low"] > 1) | (table["ratio_high"] < 1)


def _columns_of(run: Run, most: int) -> tuple[np.ndarray, int]:
    """Positions, and the width of at most `most` columns of whole mini-batches, so that none mixes phases."""
    if most < 1:
        raise ValueError(f"the number of columns or windows must be at least 1, got {most}")
    if len(run.tokens) == 0:
        raise ValueError(f"run {str(run.path)!r} has no tokens")
    position = run.tokens["position"].to_numpy()
    size = run.meta["model"]["mini_batch_size"]
    batches = -(-(int(position.max()) + 1) // size)
    return position, size * -(-batches // most)


def _histogram(surprisal: np.ndarray, plasticity: np.ndarray) -> pd.DataFrame:
    columns = ("surprisal", "plasticity")
    if len(surprisal) == 0:
        names = [f"{name}_{side}" for name in columns for side in ("low", "high")]
        return pd.DataFrame({name: np.zeros(0) for name in names} | {"tokens": np.zeros(0, np.int64)})
    borders = [_log_borders(values) for values in (surprisal, plasticity)]
    cells = [
        np.clip(np.searchsorted(edges, values, side="right") - 1, 0, len(edges) - 2)
        for edges, values in zip(borders, (surprisal, plasticity), strict=True)
    ]
    (x, y), tokens = np.unique(np.stack(cells), axis=1, return_counts=True)
    frame = {}
    for name, edges, cell in zip(columns, borders, (x, y), strict=True):
        frame |= {f"{name}_low": edges[cell], f"{name}_high": edges[cell + 1]}
    return pd.DataFrame(frame | {"tokens": tokens})


def _log_borders(values: np.ndarray) -> np.ndarray:
    """Borders of cells of equal ratio over all but the outermost 0.2% at each end."""
    positive = values[values > 0]
    low, high = np.quantile(positive, [0.002, 0.998]) if len(positive) else (0.5, 2.0)
    cells = int(np.clip(np.sqrt(len(positive)) / 2, 12, _MAX_CELLS))
    return np.geomspace(low, high, cells + 1) if low < high else np.array([low / 1.1, low * 1.1])


def _trend(surprisal: np.ndarray, plasticity: np.ndarray, documents: np.ndarray, boot: Bootstrap) -> pd.DataFrame:
    finite = np.isfinite(surprisal)
    names = ("surprisal", "plasticity", "plasticity_low", "plasticity_high", "tokens", "unit", "confidence")
    if not finite.any():
        return pd.DataFrame({name: np.zeros(0) for name in names})
    edges = np.unique(np.quantile(surprisal[finite], np.arange(1, _TREND_BINS) / _TREND_BINS))
    part = np.searchsorted(edges, surprisal, side="right")
    rows = []
    for index in np.unique(part[finite]):
        inside = finite & (part == index)
        mean = block_bootstrap_ci(
            np.where(inside, plasticity, np.nan), documents, statistic="geometric_mean", boot=boot
        )
        rows.append(
            (np.median(surprisal[inside]), mean.value, mean.low, mean.high, mean.count, mean.unit, boot.confidence)
        )
    return pd.DataFrame(rows, columns=names)
