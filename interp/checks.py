"""Checks of a run folder: what must hold in every healthy run, and findings that hold or not.

`run_checks` never raises on a damaged folder: that is a failed check. A finding (`required` is False) is
reported with its numbers but does not make a run bad, unless the caller requires it.
"""

import math
import os
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from interp.bucketing import BUCKET_NAMES, Bucket
from interp.run_folder import Run, read_run
from interp.statistics import DEFAULT_BOOTSTRAP, POOLED, Bootstrap, adjusted_contrast, temporal_decay
from interp.wording import count_of, excludes, format_interval, format_number, format_share

__all__ = [
    "CheckResult",
    "check_active_layers",
    "check_buckets_differ",
    "check_buckets_present",
    "check_decay",
    "check_finite",
    "check_freezing",
    "check_partition",
    "check_shapes",
    "check_totals",
    "run_checks",
]

_CONTENT = (Bucket.SYNTAX, Bucket.RETRIEVAL, Bucket.NOVELTY)
_WINDOW = 100
_LOSS_TOLERANCE = 1e-4


@dataclass(frozen=True)
class CheckResult:
    """Outcome of one check: `message` holds the numbers; a check that is not `required` cannot fail a run."""

    name: str
    passed: bool
    message: str
    required: bool = True

    @property
    def failed(self) -> bool:
        """Whether this makes the run a bad one."""
        return self.required and not self.passed


def run_checks(
    folder: str | os.PathLike,
    *,
    require_buckets: bool = True,
    require_decay: bool = False,
    boot: Bootstrap = DEFAULT_BOOTSTRAP,
) -> list[CheckResult]:
    """Run all checks of a run folder, in order.

    Always required: the folder can be read, shapes, finite values, buckets that partition the tokens and are
    consistent within words, no empty bucket, totals that agree with the tokens, layers that write, freezing
    that changes the loss. Required with `require_buckets`: some pair of buckets can be told apart at like
    positions in some layer. Required with `require_decay`: plasticity of all layers pooled falls from the first
    100 tokens to the last 100. A damaged folder, wrong shapes or values and a failed partition end the checks.
    """
    try:
        run = read_run(folder)
    except (ValueError, OSError) as error:
        return [CheckResult("folder", False, str(error))]
    results = [CheckResult("folder", True, f"{run.meta['num_shards']} shard(s) and run.json agree")]
    results += [check_shapes(run), check_finite(run)]
    if any(result.failed for result in results):
        return results
    results.append(check_partition(run))
    if results[-1].failed:
        return results
    results += [check_buckets_present(run), check_totals(run)]
    results += [check_active_layers(run), check_freezing(run)]
    results.append(replace(check_buckets_differ(run, boot=boot), required=require_buckets))
    results += [
        replace(result, required=require_decay and result.name == "decay first/last")
        for result in check_decay(run, boot=boot)
    ]
    return results


def check_shapes(run: Run) -> CheckResult:
    """Check that plasticity is [N, L] and losses under freezing are [N, F], and documents have two tokens or more."""
    tokens, layers, configurations = len(run.tokens), len(run.ttt_layers), len(run.freezing)
    wrong = []
    if run.plasticity.shape != (tokens, layers):
        wrong.append(f"plasticity is {list(run.plasticity.shape)} instead of [{tokens}, {layers}]")
    if run.loss_frozen.shape != (tokens, configurations):
        wrong.append(f"loss_frozen is {list(run.loss_frozen.shape)} instead of [{tokens}, {configurations}]")
    sizes = run.tokens.groupby("document").size()
    if sizes.empty:
        wrong.append("there is no document")
    elif sizes.min() < 2:
        wrong.append(f"documents {list(sizes.index[sizes < 2])[:8]} have fewer than 2 tokens")
    right = f"{tokens:,} tokens of {count_of(len(sizes), 'document')}, {count_of(layers, 'TTT layer')}, "
    right += count_of(configurations, "freezing configuration")
    return CheckResult("shapes", not wrong, "; ".join(wrong) or right)


def check_finite(run: Run) -> CheckResult:
    """Check that plasticity and losses are finite and not negative, except NaN at the first token of a document."""
    wrong = []
    for column, layer in enumerate(run.ttt_layers):
        wrong += _bad_values(run, f"plasticity of layer {layer}", run.plasticity[:, column])
    first = run.tokens["position"].to_numpy() == 0
    named = [("loss", run.tokens["loss"].to_numpy())]
    named += [
        (f"loss frozen {entry['name']!r}", run.loss_frozen[:, index]) for index, entry in enumerate(run.freezing)
    ]
    for name, loss in named:
        wrong += _bad_values(run, name, np.where(first, 0, loss))
        if not np.isnan(loss[first]).all():
            wrong.append(f"{name} is a number at the first token of a document, where it is not defined")
    right = "plasticity and losses are finite and not negative"
    return CheckResult("finite values", not wrong, "; ".join(wrong) or right)


def check_partition(run: Run) -> CheckResult:
    """Check that every token has one bucket, tokens outside words are OTHER, all tokens of a word share its
    bucket, and the first content word of a document is not one that was seen before.
    """
    tokens = run.tokens
    wrong = []
    unknown = ~tokens["bucket"].isin([int(bucket) for bucket in Bucket])
    if unknown.any():
        wrong.append(f"{unknown.sum():,} tokens have no bucket, first value {tokens['bucket'][unknown].iloc[0]}")
    outside = (tokens["word_id"] < 0) & (tokens["bucket"] != Bucket.OTHER)
    if outside.any():
        wrong.append(f"{outside.sum():,} tokens outside words are not OTHER")
    words = tokens[tokens["word_id"] >= 0].groupby(["document", "word_id"])["bucket"]
    split = int((words.nunique() > 1).sum())
    if split:
        wrong.append(f"{split:,} words have tokens of different buckets")
    content = tokens[tokens["bucket"].isin([Bucket.RETRIEVAL, Bucket.NOVELTY])]
    early = content.groupby("document")["bucket"].first() == Bucket.RETRIEVAL
    if early.any():
        wrong.append(f"documents {list(early.index[early])[:8]} begin with a RETRIEVAL word, seen before anything")
    counts = ", ".join(f"{name} {count:,}" for name, count in _bucket_counts(run).items())
    return CheckResult("bucket partition", not wrong, "; ".join(wrong) or counts)


def check_buckets_present(run: Run) -> CheckResult:
    """Check that SYNTAX, RETRIEVAL and NOVELTY all have tokens; a text may do without OTHER."""
    counts = _bucket_counts(run)
    empty = [bucket.name for bucket in _CONTENT if counts[bucket.name] == 0]
    message = f"no token is {' or '.join(empty)}" if empty else "SYNTAX, RETRIEVAL and NOVELTY all have tokens"
    return CheckResult("buckets present", not empty, message)


def check_totals(run: Run) -> CheckResult:
    """Check that the totals in run.json are those of the tokens, losses to a relative 1e-4."""
    totals = run.meta["totals"]
    wrong = []
    for key, found in (("documents", run.tokens["document"].nunique()), ("tokens", len(run.tokens))):
        if totals[key] != found:
            wrong.append(f"{key}: run.json has {totals[key]!r}, the tokens give {found}")
    loss = run.tokens["loss"].to_numpy(dtype=np.float64)
    mean = float(np.nanmean(loss))
    wrong += _differing("mean_loss", totals["mean_loss"], mean)
    for entry, announced, losses in zip(run.freezing, totals["mean_loss_frozen"], run.loss_frozen.T, strict=True):
        found = float(np.nanmean(losses, dtype=np.float64))
        wrong += _differing(f"mean_loss_frozen of {entry['name']!r}", announced, found)
    size = sum(entry["bytes"] for entry in run.meta["documents"])
    if size:
        wrong += _differing("nats_per_byte", totals["nats_per_byte"], float(np.nansum(loss)) / size)
    elif totals["nats_per_byte"] is not None:
        wrong.append(f"nats_per_byte: run.json has {totals['nats_per_byte']!r}, but its documents have no bytes")
    return CheckResult("totals", not wrong, "; ".join(wrong) or f"mean loss {mean:.4f} nats per token, as in run.json")


def check_active_layers(run: Run) -> CheckResult:
    """Check that every layer writes somewhere, and that what the model has frozen never writes.

    Frozen is what run.json says in model.frozen_layers, frozen_heads and frozen_from.
    """
    frozen, begins = _frozen_layers(run), _frozen_from(run)
    position = run.tokens["position"].to_numpy()
    wrong, numbers = [], []
    for column, layer in enumerate(run.ttt_layers):
        values = run.plasticity[:, column]
        begin = begins.get(layer)
        late = np.zeros(len(position), bool) if begin is None else position >= begin
        writes = bool((values > 0).any())
        if layer in frozen and writes:
            wrong.append(f"layer {layer} is frozen but has plasticity up to {format_number(float(values.max()))}")
        elif layer not in frozen and not writes:
            wrong.append(f"layer {layer} has plasticity 0 at all {len(values):,} tokens and is not frozen")
        elif (values[late] > 0).any():
            largest = format_number(float(values[late].max()))
            wrong.append(f"layer {layer} is frozen from token {begin} but has plasticity up to {largest} later")
        numbers.append(f"layer {layer}: {format_number(float(values.mean(dtype=np.float64)))}")
    return CheckResult("layers write", not wrong, "; ".join(wrong) or "mean plasticity " + ", ".join(numbers))


def check_freezing(run: Run) -> CheckResult:
    """Check that freezing configurations name TTT layers and change the loss of some token.

    One that freezes nothing, or only layers that the model has frozen already, changes none.
    """
    loss = run.tokens["loss"].to_numpy()
    already = _frozen_layers(run)
    wrong, numbers = [], []
    for index, entry in enumerate(run.freezing):
        name, layers = entry["name"], entry["layers"]
        unknown = sorted(set(layers) - set(run.ttt_layers))
        if unknown:
            wrong.append(f"{name!r} freezes layers {unknown}, which are no TTT layers")
            continue
        change = np.abs(run.loss_frozen[:, index] - loss)
        largest = float(np.nanmax(change))
        heads = {int(layer): chosen for layer, chosen in entry.get("heads", {}).items() if int(layer) not in already}
        new = sorted({*layers, *(layer for layer, chosen in heads.items() if chosen)} - already)
        if new and largest == 0:
            wrong.append(f"{name!r} changes no loss at all: the layers {new} were not frozen")
        if not new and largest > _LOSS_TOLERANCE:
            what = "only layers that are frozen already" if layers else "nothing"
            wrong.append(f"{name!r} freezes {what} but changes a loss by {format_number(largest)} nats")
        difference = float(np.nanmean(run.loss_frozen[:, index] - loss, dtype=np.float64))
        numbers.append(f"{name!r} {difference:+.4f}")
    right = f"mean change in nats: {', '.join(numbers)}" if numbers else "no freezing configuration was run"
    return CheckResult("freezing", not wrong, "; ".join(wrong) or right)


def check_buckets_differ(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> CheckResult:
    """Check whether any two buckets can be told apart at like positions, in any layer or in all pooled.

    Ratios are those of `interp.statistics.adjusted_contrast`: novelty and plasticity both fall over a document,
    so over all positions buckets differ even where plasticity knows nothing of them. The intervals share
    `boot.confidence` out among all comparisons (Bonferroni), so that chance alone seldom passes this.
    """
    comparisons = (len(run.ttt_layers) + 1) * math.comb(len(BUCKET_NAMES), 2)
    table = adjusted_contrast(
        run.plasticity,
        run.tokens["bucket"],
        run.tokens["document"],
        run.tokens["position"],
        mini_batch_size=run.meta["model"]["mini_batch_size"],
        layers=run.ttt_layers,
        boot=boot.shared(comparisons),
    )
    lines = []
    apart = 0
    for layer, rows in table.groupby("layer"):
        told = [row for _, row in rows.iterrows() if excludes(row, "ratio", 1.0)]
        apart += len(told)
        pairs = ", ".join(
            f"{row['bucket_a']}/{row['bucket_b']} {format_number(row['ratio'])} {format_interval(row, 'ratio')}, "
            f"over all positions {format_number(row['raw_ratio'])}"
            + ("" if excludes(row, "ratio", 1.0) else ", not told apart")
            for _, row in rows.iterrows()
        )
        where = "all layers" if layer == POOLED else f"layer {layer}"
        lines.append(f"{where}: {len(told)} of {len(rows)} pairs told apart ({pairs})")
    share = format_share(boot.confidence)
    head = f"{apart} of {len(table)} pairs told apart at like positions, at {share} over all comparisons together"
    return CheckResult("buckets differ", apart > 0, "\n  ".join([head, *lines]))


def check_decay(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> Iterator[CheckResult]:
    """Check whether plasticity of all layers pooled falls: first 100 tokens of a document against the last 100, and
    against its second half. It does when the whole interval of the ratio is above 1.
    """
    table = temporal_decay(
        run.plasticity,
        run.tokens["document"],
        run.tokens["position"],
        n=_WINDOW,
        layers=run.ttt_layers,
        boot=boot,
    )
    for comparison, rows in table.groupby("comparison"):
        name = f"decay {comparison}"
        pooled = rows[rows["layer"] == POOLED].iloc[0]
        if not math.isfinite(pooled["ratio"]):
            message = f"no document has {2 * _WINDOW} tokens, or nothing is written"
            yield CheckResult(name, False, message, required=False)
            continue
        falls = bool(pooled["ratio_low"] > 1)
        verdict = "falls" if falls else ("rises" if pooled["ratio_high"] < 1 else "no change is not excluded")
        layers = ", ".join(
            f"layer {int(row['layer'])} {format_number(row['ratio'])} {format_interval(row, 'ratio')}"
            for _, row in rows[rows["layer"] != POOLED].iterrows()
        )
        ratio = f"{format_number(pooled['ratio'])} {format_interval(pooled, 'ratio')}"
        yield CheckResult(name, falls, f"ratio {ratio}: {verdict}; {layers}", required=False)


def _frozen_layers(run: Run) -> set[int]:
    """Layers that never write according to run.json: frozen as a whole, in all heads, or from the first token."""
    model = run.meta["model"]
    whole = {int(layer) for layer, heads in model["frozen_heads"].items() if len(heads) == model["num_heads"]}
    at_once = {layer for layer, begin in _frozen_from(run).items() if begin == 0}
    return whole | at_once | set(model["frozen_layers"])


def _frozen_from(run: Run) -> dict[int, int]:
    """Index of the token from which on a layer is frozen, of the layers that have one."""
    begin = run.meta["model"]["frozen_from"]
    if isinstance(begin, dict):
        return {int(layer): index for layer, index in begin.items()}
    return {} if begin is None else dict.fromkeys(run.ttt_layers, begin)


def _bucket_counts(run: Run) -> dict[str, int]:
    counts = np.bincount(run.tokens["bucket"].clip(lower=0), minlength=len(BUCKET_NAMES))
    return {name: int(counts[bucket]) for bucket, name in enumerate(BUCKET_NAMES)}


def _bad_values(run: Run, name: str, values: np.ndarray) -> list[str]:
    bad = np.flatnonzero(~np.isfinite(values) | (values < 0))
    if bad.size == 0:
        return []
    at = run.tokens.iloc[bad[0]]
    where = f"first {values[bad[0]]} at document {at['document']}, position {at['position']}"
    return [f"{name} has {bad.size:,} values that are negative or not finite ({where})"]


def _differing(name: str, announced: object, found: float) -> list[str]:
    if announced is not None and math.isclose(announced, found, rel_tol=_LOSS_TOLERANCE, abs_tol=1e-6):
        return []
    return [f"{name}: run.json has {announced!r}, the tokens give {found:.6g}"]
