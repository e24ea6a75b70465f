"""The tables of a study: one function per question, every table with a column `model`, most with `corpus`."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import pandas as pd

from interp._columns import pooled_plasticity, provenance, with_intervals
from interp.adjustment import covariate_contrast
from interp.bucketing import BUCKET_NAMES, Bucket, single_token_buckets
from interp.burn_in import burn_in_table
from interp.freezing_sweep import answer_table, depth_table, location_table, sweep_table
from interp.permutation import permutation_test
from interp.resampling import DEFAULT_BOOTSTRAP, Bootstrap, Resampler, cell_sums, divide, make_blocks, share_interval
from interp.run_folder import STAT_COLUMNS, Run
from interp.skipping import skipping_table
from interp.statistics import adjusted_contrast, bucket_contrast, position_strata
from interp.study_data import Part, StudyData
from interp.tables import UNFROZEN, bucket_tables, loss_columns
from interp.time_course import perplexity_by_index, surprisal_correlation, temporal_decay

__all__ = ["DEFINITIONS", "FIRST_TOKENS", "study_tables"]

# The earlier study's burn-in: its first 2,000 tokens; a quarter of the document where that is shorter.
FIRST_TOKENS = 2000
PAIRS = [(Bucket.NOVELTY, Bucket.SYNTAX), (Bucket.RETRIEVAL, Bucket.SYNTAX), (Bucket.NOVELTY, Bucket.RETRIEVAL)]
LAGS = (-1, 0, 1)
PERMUTATIONS = 199
_WINDOWS = 32

DEFINITIONS = {
    "bucket_means": "Plasticity per layer and bucket (interp.statistics.bucket_stats), all tokens and first tokens of "
    "words.",
    "contrasts": "Ratios of geometric means of plasticity between buckets: over all positions, at like positions, and "
    "with the inner learning rate held fixed too; p of label permutation; told apart: the interval shared"
    " out among six pairs.",
    "single_token_contrasts": "The same ratios with buckets made in the manner of the earlier study (single tokens).",
    "surprisal_correlation": "Correlation of a token's plasticity with the surprisal of the token `lag` places "
    "before it; "
    "`apart`: the interval excludes 0 when shared out among all layers and lags of a model and corpus.",
    "decay": "Mean plasticity of the first n tokens of a document over that of its last n and of its second half.",
    "burn_in": "Exponential decay of plasticity over a document (interp.burn_in), or why there is no fit.",
    "plasticity_traces": "Mean plasticity (all layers pooled) per bucket and stretch of the document.",
    "burn_in_traces": "Mean plasticity (all layers pooled) per stretch of long documents, over that of the second "
    "half.",
    "inner_losses": "Inner loss per layer and stretch of the document at W_0, before and after the token's write; "
    "drift of the weights.",
    "freezing": "Cost of every freezing on the text (interp.freezing_sweep.sweep_table), nats per token.",
    "answers": "Cost of every freezing on the answers of needle documents, and answers that are right.",
    "location": "Each third of the layers against other subsets of as many layers: on the text, and on the answers.",
    "answers_by_depth": "The same by the place of the needle: 0 is the start of the filler, 1 its end.",
    "context": "Perplexity by tokens read (interp.statistics.perplexity_by_index).",
    "skipping": "Writes left out: those with a small gradient, and as many at random (interp.skipping).",
    "timings": "Seconds and tokens per second of every reading; depends on the machine and its load.",
}


def study_tables(
    data: StudyData,
    tokenizers: Mapping[str, Any],
    *,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
    progress: Callable[[str], object] = lambda name: None,
) -> dict[str, pd.DataFrame]:
    """Compute every table of `DEFINITIONS`; `progress` is called with the name of each part that is begun.

    tokenizers: of every model, by its name.
    """
    found: dict[str, list[pd.DataFrame]] = {name: [] for name in DEFINITIONS}

    def add(table: str, part: Part, frame: pd.DataFrame) -> None:
        if frame.empty:  # thirds of fewer than three layers
            return
        head = {"model": part.model.name, "corpus": part.name}
        found[table].append(pd.concat([pd.DataFrame(head, index=frame.index), frame], axis=1))

    for (model, name), part in data.parts.items():
        progress(f"{model}/{name}")
        if part.run is None:
            _add_plain(add, part, boot)
            continue
        run = part.run
        add("timings", part, _timings(run))
        if name == "text":
            _add_buckets(add, part, tokenizers[model], boot)
            add("surprisal_correlation", part, _correlation(run, boot))
            add("plasticity_traces", part, _traces(run, boot))
        if name in ("text", "repeated"):
            add("inner_losses", part, _inner_losses(run))
        if name.startswith("long"):
            add("decay", part, _decay(part, boot))
            add("burn_in", part, _burn_in(part, boot))
            add("burn_in_traces", part, _relative_trace(run, boot))
        if name in ("long", "context"):
            add("context", part, _by_index(run, part.length, boot))
        if name == "sweep":
            add("freezing", part, sweep_table(run, part.labels, boot=boot))
            add("location", part, location_table(run, part.labels, boot=boot))
        if name == "needle":
            add("answers", part, answer_table(run, part.labels, boot=boot))
            add(
                "location",
                part,
                location_table(run, part.labels, select=run.tokens["is_answer"].to_numpy(), boot=boot),
            )
            add("answers_by_depth", part, depth_table(run))
            add("surprisal_correlation", part, _correlation(run, boot))
            _add_buckets(add, part, tokenizers[model], boot)
    return {name: pd.concat(frames, ignore_index=True) for name, frames in found.items() if frames}


def _add_buckets(add: Callable[..., None], part: Part, tokenizer: Any, boot: Bootstrap) -> None:
    run = part.run
    tables = bucket_tables(run, boot=boot)
    add("bucket_means", part, tables.means)
    where = _where(run)
    contrasts = tables.contrasts
    if "inner_lr" in run.extras:
        lr = covariate_contrast(run.plasticity, run.extras["inner_lr"], **where, pairs=PAIRS, boot=boot)
        names = {"ratio": "lr_fixed", "ratio_low": "lr_fixed_low", "ratio_high": "lr_fixed_high", "slope": "lr_slope"}
        contrasts = _join(contrasts, lr, names)
    tested = permutation_test(run.plasticity, **where, pairs=PAIRS, permutations=PERMUTATIONS)
    contrasts = _join(contrasts, tested, {name: name for name in ("p", "p_adjusted", "null_low", "null_high")})
    add("contrasts", part, contrasts)
    labels = single_token_buckets(run.tokens["token_id"], tokenizer, doc_ids=run.tokens["document"]).labels
    where = {**where, "buckets": labels}
    adjusted = adjusted_contrast(run.plasticity, **where, pairs=PAIRS, boot=boot)
    without = {name: value for name, value in where.items() if name not in ("positions", "mini_batch_size")}
    raw = bucket_contrast(run.plasticity, **without, pairs=PAIRS, boot=boot)
    names = {"ratio": "adjusted", "ratio_low": "adjusted_low", "ratio_high": "adjusted_high"}
    keys = ["layer", "bucket_a", "bucket_b"]
    add("single_token_contrasts", part, raw.merge(adjusted[[*keys, *names]].rename(columns=names), on=keys))


def _join(contrasts: pd.DataFrame, other: pd.DataFrame, names: Mapping[str, str]) -> pd.DataFrame:
    """Columns of a table of contrasts on all tokens beside the others; word starts have none of them."""
    keys = ["layer", "bucket_a", "bucket_b"]
    other = other[[*keys, *names]].rename(columns=dict(names)).assign(tokens="all")
    return contrasts.merge(other, on=[*keys, "tokens"], how="left", validate="one_to_one")


def _where(run: Run) -> dict[str, Any]:
    return {
        "buckets": run.tokens["bucket"],
        "documents": run.tokens["document"],
        "positions": run.tokens["position"],
        "mini_batch_size": run.meta["model"]["mini_batch_size"],
        "layers": run.ttt_layers,
    }


def _correlation(run: Run, boot: Bootstrap) -> pd.DataFrame:
    where = (run.plasticity, run.tokens["loss"], run.tokens["document"], run.tokens["position"])
    size = run.meta["model"]["mini_batch_size"]
    options = {"lags": LAGS, "strata": position_strata(run.tokens["position"], size), "layers": run.ttt_layers}
    table = surprisal_correlation(*where, **options, boot=boot)
    shared = surprisal_correlation(*where, **options, boot=boot.shared(len(table)))
    for name in ("pearson_log", "spearman", "partial"):
        table[f"{name}_apart"] = (shared[f"{name}_low"] > 0) | (shared[f"{name}_high"] < 0)
    return table


def _decay(part: Part, boot: Bootstrap) -> pd.DataFrame:
    run = part.run
    where = (run.plasticity, run.tokens["document"], run.tokens["position"])
    numbers = dict.fromkeys((min(100, part.length // 4), min(FIRST_TOKENS, part.length // 4)))
    tables = [temporal_decay(*where, n=n, layers=run.ttt_layers, boot=boot).assign(n=n) for n in numbers]
    return pd.concat(tables, ignore_index=True)


def _burn_in(part: Part, boot: Bootstrap) -> pd.DataFrame:
    run = part.run
    where = (run.plasticity, run.tokens["document"], run.tokens["position"])
    size = run.meta["model"]["mini_batch_size"]
    return burn_in_table(*where, mini_batch_size=size, layers=run.ttt_layers, boot=boot)


def _traces(run: Run, boot: Bootstrap) -> pd.DataFrame:
    values = pooled_plasticity(run.plasticity)
    window, edges = _windows(run)
    buckets = run.tokens["bucket"].to_numpy()
    number = len(BUCKET_NAMES)
    blocks = make_blocks(run.tokens["document"], boot)
    sums, counts = cell_sums(values, window * number + buckets, (len(edges) - 1) * number, blocks)
    draws = Resampler(blocks, boot).means(sums, counts)
    used = (counts > 0).sum(0)
    columns = with_intervals({"plasticity": (divide(sums.sum(0), counts.sum(0)), draws, used)}, boot)
    head = {
        "bucket": np.tile(BUCKET_NAMES, len(edges) - 1),
        "start": np.repeat(edges[:-1], number),
        "stop": np.repeat(edges[1:], number),
        "count": counts.sum(0).astype(np.int64),
    }
    return pd.DataFrame(head | columns | provenance(blocks, used, boot))


def _relative_trace(run: Run, boot: Bootstrap) -> pd.DataFrame:
    """Stretches as long as the place they begin at is far, so that the start is seen, over the second half."""
    values = pooled_plasticity(run.plasticity)
    position = run.tokens["position"].to_numpy()
    size, end = run.meta["model"]["mini_batch_size"], int(position.max()) + 1
    octaves = size * 2.0 ** np.arange(0, np.log2(max(end / size, 2)) + 0.5, 0.5)
    edges = np.unique(np.append([0], np.minimum(np.rint(octaves / size) * size, end)).astype(np.int64))
    window = np.searchsorted(edges, position, side="right") - 1
    blocks = make_blocks(run.tokens["document"], boot)
    draw = Resampler(blocks, boot)
    sums, counts = cell_sums(values, np.minimum(window, len(edges) - 2), len(edges) - 1, blocks)
    late = np.where(position >= end // 2, values, np.nan)
    steady, number = cell_sums(late, np.zeros(len(late), dtype=np.int64), 1, blocks)
    level, level_draws = divide(steady.sum(), number.sum()), draw.means(steady, number)
    used = (counts > 0).sum(0)
    relative = (divide(sums.sum(0), counts.sum(0)) / level, draw.means(sums, counts) / level_draws, used)
    head = {"start": edges[:-1], "stop": edges[1:], "count": counts.sum(0).astype(np.int64)}
    return pd.DataFrame(head | with_intervals({"relative": relative}, boot) | provenance(blocks, used, boot))


def _inner_losses(run: Run) -> pd.DataFrame:
    """Means over documents per layer and stretch; the columns of a run's diagnostics, and plasticity."""
    window, edges = _windows(run)
    rows = []
    for column, layer in enumerate(run.ttt_layers):
        table = pd.DataFrame({name: run.extras[name][:, column] for name in STAT_COLUMNS if name in run.extras})
        table["plasticity"] = run.plasticity[:, column]
        means = table.astype(float).groupby(window).mean()
        counts = np.bincount(window, minlength=len(edges) - 1)
        head = {"layer": layer, "start": edges[:-1], "stop": edges[1:], "count": counts}
        rows.append(pd.concat([pd.DataFrame(head), means.reset_index(drop=True)], axis=1))
    table = pd.concat(rows, ignore_index=True)
    return table.assign(documents=run.tokens["document"].nunique())


def _windows(run: Run) -> tuple[np.ndarray, np.ndarray]:
    """Stretch of every token and the borders of the stretches: whole mini-batches, `_WINDOWS` of them at most."""
    position = run.tokens["position"].to_numpy()
    size = run.meta["model"]["mini_batch_size"]
    batches = -(-(int(position.max()) + 1) // size)
    width = size * -(-batches // _WINDOWS)
    edges = np.arange(0, position.max() + width + 1, width)
    edges = edges[: int(position.max()) // width + 2]
    return position // width, edges


def _by_index(run: Run, length: int, boot: Bootstrap) -> pd.DataFrame:
    losses = {UNFROZEN: loss_columns(run)[UNFROZEN]}
    losses |= {name: loss for name, loss in loss_columns(run).items() if name == "all"}
    return perplexity_by_index(
        losses, run.tokens["document"], run.tokens["position"], window=max(16, length // _WINDOWS), boot=boot
    )


def _timings(run: Run) -> pd.DataFrame:
    names = [UNFROZEN, *(entry["name"] for entry in run.freezing)]
    tokens = run.meta["totals"]["tokens"]
    seconds = np.array(run.meta["totals"]["pass_seconds"])
    return pd.DataFrame(
        {"configuration": names, "tokens": tokens, "seconds": seconds, "tokens_per_second": tokens / seconds}
    )


def _add_plain(add: Callable[..., None], part: Part, boot: Bootstrap) -> None:
    """Tables of parts without plasticity: skipped writes, and models without an inner loop."""
    table = part.table
    if part.name == "skip":
        add("skipping", part, skipping_table(table, part.known["cost"], boot=boot))
        return
    if part.name == "long":
        options = {"window": max(16, part.length // _WINDOWS), "boot": boot}
        place = (table["document"], table["position"])
        add("context", part, perplexity_by_index({UNFROZEN: table["loss"]}, *place, **options))
    if part.name == "needle":
        add("answers", part, _plain_answers(table, boot))


def _plain_answers(table: pd.DataFrame, boot: Bootstrap) -> pd.DataFrame:
    """Loss on the answers and answers that are right, of a model that nothing can be frozen in."""
    answers = table[table["is_answer"]]
    by_document = answers.groupby("document").agg(
        loss=("loss", "mean"), exact=("greedy", "all"), digits=("greedy", "mean"), count=("loss", "size")
    )
    blocks = make_blocks(np.arange(len(by_document)), boot)
    draw = Resampler(blocks, boot)
    columns = {}
    for name in ("exact", "digits"):
        values = by_document[name].to_numpy(float)
        sums, counts = cell_sums(values, np.zeros(len(values), int), 1, blocks)
        columns[name] = (values.mean(), draw.means(sums, counts)[:, 0], blocks.count)
    row = {"family": "baseline", "label": "nothing frozen", "configuration": UNFROZEN}
    row |= {"count": int(by_document["count"].sum()), "mean_loss": float(by_document["loss"].mean())}
    row |= {"answers": len(by_document), **with_intervals(columns, boot)}
    hits = int(by_document["exact"].sum())
    row["exact_low"], row["exact_high"] = map(float, share_interval(hits, len(by_document), boot.confidence))
    return pd.DataFrame([row | provenance(blocks, blocks.count, boot)])
