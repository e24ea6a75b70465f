"""The tables behind every figure of a run.

Column `layer` holds absolute layer indices, and `POOLED` (-1, "pooled" in CSV files) for all TTT layers
together: the root of the sum over layers of the squared plasticity. Losses and surprisals are in nats,
positions and windows in tokens. Intervals (columns `_low` and `_high`) are those of `interp.statistics`.
"""

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import pandas as pd

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
    "BUCKET_NAMES",
    "MAX_COLUMNS",
    "POOLED",
    "UNFROZEN",
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
    """`means`: `interp.statistics.bucket_stats`. `contrasts`: every pair of buckets of `bucket_contrast`, with

    `apart`: whether the ratio's interval excludes 1 even when its confidence is shared out among the six pairs of a
    layer (Bonferroni); adjusted, adjusted_low, adjusted_high: the ratio among tokens at like positions
    (`adjusted_contrast`).
    """

    means: pd.DataFrame
    contrasts: pd.DataFrame


@dataclass(frozen=True)
class PerplexityTables:
    """Per freezing configuration, `UNFROZEN` first: `curve` (`perplexity_by_index`, and documents per
    window), `effects` (`freezing_effects`) and `answers`, the same on answer tokens only; None when the run
    has none.
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
        """Every table under the name of its file."""
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
    """All tables of a run."""
    return RunTables(
        time_tables(run, boot=boot),
        surprisal_tables(run, boot=boot),
        bucket_tables(run, boot=boot),
        perplexity_tables(run, boot=boot),
    )


def save_tables(frames: Mapping[str, pd.DataFrame], folder: str | os.PathLike) -> list[Path]:
    """Writes each table as `<name>.csv` into an existing folder, with POOLED spelt out; returns the paths."""
    paths = []
    for name, frame in frames.items():
        if "layer" in frame:
            frame = frame.assign(layer=frame["layer"].astype(object).replace({POOLED: "pooled"}))
        path = Path(folder) / f"{name}.csv"
        write_text(path, frame.to_csv(index=False, lineterminator="\n"))
        paths.append(path)
    return paths


def time_tables(run: Run, *, max_columns: int = MAX_COLUMNS, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> TimeTables:
    """Plasticity by layer and token index, in at most `max_columns` stretches of whole mini-batches."""
    position, width = _stretches(run, max_columns)
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
    """Surprisal of the token `lag` places before against plasticity; correlations for lags -1, 0, 1 and
    `lag`.
    """
    document, position = run.tokens["document"].to_numpy(), run.tokens["position"].to_numpy()
    surprisal = run.tokens.groupby("document", sort=False)["loss"].shift(lag).to_numpy(dtype=np.float64)
    plasticity = pooled_plasticity(run.plasticity)
    correlation = surprisal_correlation(
        run.plasticity,
        run.tokens["loss"],
        document,
        position,
        lags=sorted({-1, 0, 1, lag}),
        strata=position_strata(position, _mini_batch_size(run)),
        layers=run.ttt_layers,
        boot=boot,
    )
    usable = np.isfinite(surprisal) & (plasticity > 0) & np.isfinite(plasticity)
    histogram = _histogram(surprisal[usable], plasticity[usable])
    trend = _trend(np.where(usable, surprisal, np.nan), plasticity, document, boot)
    return SurprisalTables(lag, histogram, trend, correlation)


def bucket_tables(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> BucketTables:
    """Plasticity per layer and bucket, and every pair of buckets with and without adjusting for position."""
    bucket, document = run.tokens["bucket"], run.tokens["document"]
    options = {"layers": run.ttt_layers, "boot": boot}
    means = bucket_stats(run.plasticity, bucket, document, **options)
    contrasts = bucket_contrast(run.plasticity, bucket, document, **options)
    shared = replace(boot, confidence=1 - (1 - boot.confidence) / math.comb(len(BUCKET_NAMES), 2))
    wide = bucket_contrast(run.plasticity, bucket, document, layers=run.ttt_layers, boot=shared)
    contrasts["apart"] = (wide["ratio_low"] > 1) | (wide["ratio_high"] < 1)
    adjusted = adjusted_contrast(
        run.plasticity,
        bucket,
        document,
        run.tokens["position"],
        mini_batch_size=_mini_batch_size(run),
        **options,
    )
    keys = ["layer", "bucket_a", "bucket_b"]
    names = {"ratio": "adjusted", "ratio_low": "adjusted_low", "ratio_high": "adjusted_high"}
    adjusted = adjusted[[*keys, *names]].rename(columns=names)
    return BucketTables(means, contrasts.merge(adjusted, on=keys, how="left", validate="one_to_one"))


def perplexity_tables(
    run: Run, *, max_windows: int = MAX_WINDOWS, boot: Bootstrap = DEFAULT_BOOTSTRAP
) -> PerplexityTables:
    """Perplexity by token index, cost of freezing, and cost of freezing on the answers."""
    losses = loss_columns(run)
    documents = run.tokens["document"]
    position, window = _stretches(run, max_windows)
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
    """Surprisal of every token, float64 [N] in nats, per configuration; tokens that lack one of them are NaN
    in all.
    """
    stacked = np.column_stack([run.tokens["loss"].to_numpy(), run.loss_frozen]).astype(np.float64)
    stacked[~np.isfinite(stacked).all(axis=1)] = np.nan
    names = [UNFROZEN]
    for entry in run.freezing:
        if "name" not in entry:
            raise ValueError(f"run {str(run.path)!r}: freezing configurations need a name, got {entry}")
        name = str(entry["name"])
        names.append(name if name not in names else f"{name} (configuration {len(names)})")
    return dict(zip(names, stacked.T, strict=True))


def pooled_plasticity(plasticity: np.ndarray) -> np.ndarray:
    """Plasticity of all layers together, float64 [N]: the root of the sum of squares over the columns of [N,
    L].
    """
    return np.sqrt(np.square(plasticity, dtype=np.float64).sum(axis=1))


def _mini_batch_size(run: Run) -> int:
    size = run.meta["model"].get("mini_batch_size")
    if isinstance(size, bool) or not isinstance(size, int) or size < 1:
        raise ValueError(f"run {str(run.path)!r}: model.mini_batch_size must be a positive integer, got {size!r}")
    return size


def _stretches(run: Run, most: int) -> tuple[np.ndarray, int]:
    """Positions, and the width of at most `most` stretches that begin at mini-batches, so that none mixes
    phases unequally.
    """
    if most < 1:
        raise ValueError(f"the number of columns or windows must be at least 1, got {most}")
    if len(run.tokens) == 0:
        raise ValueError(f"run {str(run.path)!r} has no tokens")
    position = run.tokens["position"].to_numpy()
    size = _mini_batch_size(run)
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
    names = ("surprisal", "plasticity", "plasticity_low", "plasticity_high", "tokens")
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
        rows.append((np.median(surprisal[inside]), mean.value, mean.low, mean.high, mean.count))
    return pd.DataFrame(rows, columns=names)
