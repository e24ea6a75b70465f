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
from interp.captions import excludes, format_interval, format_number
from interp.run_folder import Run, read_run
from interp.statistics import DEFAULT_BOOTSTRAP, POOLED, Bootstrap, bucket_contrast, temporal_decay

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
    """All checks of a run folder, in order.

    Always required: the folder can be read, shapes, finite values, buckets that partition the tokens and are
    consistent within words, no empty bucket, totals that agree with the tokens, layers that write, freezing
    that changes the loss. Required with `require_buckets`: some pair of buckets can be told apart in some
    layer. Required with `require_decay`: plasticity of all layers pooled falls from the first 100 tokens to
    the last 100. After a damaged folder there is nothing more to check.
    """
    try:
        run = read_run(folder)
    except (ValueError, OSError) as error:
        return [CheckResult("folder", False, str(error))]
    results = [CheckResult("folder", True, f"{run.meta['num_shards']} shard(s) and run.json agree")]
    results += [check_shapes(run), check_finite(run)]
    if any(result.failed for result in results):
        return results
    results += [check_partition(run), check_buckets_present(run), check_totals(run)]
    results += [check_active_layers(run), check_freezing(run)]
    results.append(replace(check_buckets_differ(run, boot=boot), required=require_buckets))
    results += [
        replace(result, required=require_decay and result.name == "decay first/last")
        for result in check_decay(run, boot=boot)
    ]
    return results


def check_shapes(run: Run) -> CheckResult:
    """Plasticity is [N, L] and the losses under freezing [N, F], as run.json says, and every document has two
    tokens or more.
    """
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
    nameless = [entry for entry in run.freezing if not {"name", "layers"} <= set(entry)]
    if nameless:
        wrong.append(f"freezing configurations need a name and layers: {nameless}")
    documents = f"{len(sizes)} document{'s' if len(sizes) != 1 else ''}"
    right = f"{tokens:,} tokens of {documents}, {layers} TTT layers, {configurations} freezing configurations"
    return CheckResult("shapes", not wrong, "; ".join(wrong) or right)


def check_finite(run: Run) -> CheckResult:
    """Plasticity is finite and not negative; losses likewise, NaN at the first token of a document and
    nowhere else.
    """
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
    """Every token has one of the four buckets, tokens outside words are OTHER, all tokens of a word share its
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
    """SYNTAX, RETRIEVAL and NOVELTY all have tokens; a text may do without OTHER."""
    counts = _bucket_counts(run)
    empty = [bucket.name for bucket in _CONTENT if counts[bucket.name] == 0]
    message = f"no token is {' or '.join(empty)}" if empty else "SYNTAX, RETRIEVAL and NOVELTY all have tokens"
    return CheckResult("buckets present", not empty, message)


def check_totals(run: Run) -> CheckResult:
    """Documents, tokens and mean losses in run.json are those of the tokens, to a relative 1e-4."""
    totals = run.meta["totals"]
    wrong = []
    for key, found in (("documents", run.tokens["document"].nunique()), ("tokens", len(run.tokens))):
        if totals.get(key) != found:
            wrong.append(f"{key}: run.json has {totals.get(key)!r}, the tokens give {found}")
    mean = float(np.nanmean(run.tokens["loss"].to_numpy(dtype=np.float64)))
    wrong += _differing("mean_loss", totals.get("mean_loss"), mean)
    frozen = totals.get("mean_loss_frozen") or []
    for entry, announced, losses in zip(run.freezing, frozen, run.loss_frozen.T, strict=False):
        found = float(np.nanmean(losses, dtype=np.float64))
        wrong += _differing(f"mean_loss_frozen of {entry['name']!r}", announced, found)
    return CheckResult("totals", not wrong, "; ".join(wrong) or f"mean loss {mean:.4f} nats per token, as in run.json")


def check_active_layers(run: Run) -> CheckResult:
    """Every layer writes somewhere, apart from layers that run.json (model.frozen_layers) names as frozen,
    which never do.
    """
    frozen = set(run.meta["model"].get("frozen_layers") or [])
    wrong, numbers = [], []
    for column, layer in enumerate(run.ttt_layers):
        values = run.plasticity[:, column]
        writes = bool((values > 0).any())
        if layer in frozen and writes:
            wrong.append(f"layer {layer} is frozen but has plasticity up to {format_number(float(values.max()))}")
        elif layer not in frozen and not writes:
            wrong.append(f"layer {layer} has plasticity 0 at all {len(values):,} tokens and is not frozen")
        numbers.append(f"layer {layer}: {format_number(float(values.mean(dtype=np.float64)))}")
    return CheckResult("layers write", not wrong, "; ".join(wrong) or "mean plasticity " + ", ".join(numbers))


def check_freezing(run: Run) -> CheckResult:
    """Freezing configurations name TTT layers and change the loss of some token; an empty one changes none."""
    loss = run.tokens["loss"].to_numpy()
    wrong, numbers = [], []
    for index, entry in enumerate(run.freezing):
        name, layers = entry["name"], list(entry["layers"])
        unknown = sorted(set(layers) - set(run.ttt_layers))
        if unknown:
            wrong.append(f"{name!r} freezes layers {unknown}, which are no TTT layers")
            continue
        change = np.abs(run.loss_frozen[:, index] - loss)
        largest = float(np.nanmax(change))
        if layers and largest == 0:
            wrong.append(f"{name!r} changes no loss at all: the layers {layers} were not frozen")
        if not layers and largest > _LOSS_TOLERANCE:
            wrong.append(f"{name!r} freezes nothing but changes a loss by {format_number(largest)} nats")
        difference = float(np.nanmean(run.loss_frozen[:, index] - loss, dtype=np.float64))
        numbers.append(f"{name!r} {difference:+.4f}")
    right = f"mean change in nats: {', '.join(numbers)}" if numbers else "no freezing configuration was run"
    return CheckResult("freezing", not wrong, "; ".join(wrong) or right)


def check_buckets_differ(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> CheckResult:
    """Whether some pair of buckets can be told apart in some layer, over all layers, all of them pooled, and
    all pairs.

    The intervals share `boot.confidence` out among all comparisons (Bonferroni), so that chance alone seldom
    passes this.
    """
    comparisons = (len(run.ttt_layers) + 1) * math.comb(len(BUCKET_NAMES), 2)
    confidence = 1 - (1 - boot.confidence) / comparisons
    shared = replace(boot, confidence=confidence, n_boot=max(boot.n_boot, 5000))
    table = bucket_contrast(
        run.plasticity, run.tokens["bucket"], run.tokens["document"], layers=run.ttt_layers, boot=shared
    )
    lines = []
    apart = 0
    for layer, rows in table.groupby("layer"):
        told = [row for _, row in rows.iterrows() if excludes(row, "ratio", 1.0)]
        apart += len(told)
        pairs = ", ".join(
            f"{row['bucket_a']}/{row['bucket_b']} {format_number(row['ratio'])} {format_interval(row, 'ratio')}"
            + ("" if excludes(row, "ratio", 1.0) else " not told apart")
            for _, row in rows.iterrows()
        )
        where = "all layers" if layer == POOLED else f"layer {layer}"
        lines.append(f"{where}: {len(told)} of {len(rows)} pairs told apart ({pairs})")
    head = f"{apart} of {len(table)} pairs told apart at {boot.confidence:.0%} over all comparisons together"
    return CheckResult("buckets differ", apart > 0, "\n  ".join([head, *lines]))


def check_decay(run: Run, *, boot: Bootstrap = DEFAULT_BOOTSTRAP) -> Iterator[CheckResult]:
    """Whether plasticity of all layers pooled falls: first 100 tokens of a document against the last 100, and
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
    number = isinstance(announced, int | float) and not isinstance(announced, bool)
    if number and math.isclose(announced, found, rel_tol=_LOSS_TOLERANCE, abs_tol=1e-6):
        return []
    return [f"{name}: run.json has {announced!r}, the tokens give {found:.6g}"]
