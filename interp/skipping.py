"""How much of the writing could be left out: writes with a small gradient dropped, at what loss."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pandas as pd
import torch

from interp._columns import provenance, with_intervals
from interp.freezing import ttt_layers
from interp.reader import DEFAULT_SEGMENT_LENGTH, evaluation_mode, read_batch
from interp.resampling import DEFAULT_BOOTSTRAP, Bootstrap, Resampler, cell_sums, divide, make_blocks
from interp.state import initial_state

__all__ = ["read_skipping", "skip_small_updates", "skipping_table", "write_cost"]

RULES = ("small gradient", "at random")


def skip_small_updates(
    model: Any, rows: Sequence[np.ndarray], *, boot: Bootstrap = DEFAULT_BOOTSTRAP, **options: Any
) -> pd.DataFrame:
    """Read documents while writes whose inner gradient is small are skipped, and say what that costs.

    `options` as for `read_skipping`, the result as of `skipping_table`.
    """
    return skipping_table(read_skipping(model, rows, **options), write_cost(model), boot=boot)


def read_skipping(
    model: Any,
    rows: Sequence[np.ndarray],
    *,
    shares: Sequence[float] = (0.1, 0.25, 0.5, 0.75, 0.9),
    rounds: int = 3,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    seed: int = 0,
) -> pd.DataFrame:
    """Read documents (token ids [T_i]) with a share of the writes left out, by two rules.

    Per layer the threshold is the quantile `share` of the gradient norms in a reading that skips nothing. Skipping
    changes later gradients, so the gate of every reading is made from the gradients of the one before, `rounds`
    times: what a gate that decides token by token would do, up to `unsettled`, the share of decisions that one more
    round would change. The control skips as large a share of tokens at random.

    A row per share, rule ("small gradient" or "at random") and token: share, rule, document, position, base (loss
    with nothing skipped, nats), loss, skipped (share of the token's writes, over layers), unsettled (of the reading).
    ValueError for shares outside (0, 1) and fewer than one round.
    """
    if not all(0 < share < 1 for share in shares):
        raise ValueError(f"shares must lie between 0 and 1, got {list(shares)}")
    if rounds < 1:
        raise ValueError(f"rounds must be at least 1, got {rounds}")
    length = max(map(len, rows))
    place = {
        "document": np.concatenate([np.full(len(row), i) for i, row in enumerate(rows)]),
        "position": np.concatenate([np.arange(len(row)) for row in rows]),
    }
    tables = []
    with evaluation_mode(model):
        whole = _read(model, rows, None, segment_length)
        base = _losses(whole)
        for share in shares:
            limit = np.quantile(np.concatenate([r.stats["inner_grad_norm"] for r in whole]), share, axis=0)
            for rule in RULES:
                if rule == "small gradient":
                    found, gate, unsettled = _settle(model, rows, whole, limit, rounds, segment_length, length)
                else:
                    gate = _random_gate(rows, len(limit), share, length, seed)
                    found, unsettled = _read(model, rows, gate, segment_length, stats=False), 0.0
                skipped = np.concatenate([1 - gate[b, :, 0, : len(row)].mean(0).numpy() for b, row in enumerate(rows)])
                head = {"share": share, "rule": rule, **place, "base": base, "loss": _losses(found)}
                tables.append(pd.DataFrame({**head, "skipped": skipped, "unsettled": unsettled}))
    return pd.concat(tables, ignore_index=True)


def skipping_table(
    readings: pd.DataFrame, cost: Mapping[str, float], *, boot: Bootstrap = DEFAULT_BOOTSTRAP
) -> pd.DataFrame:
    """Sum up `read_skipping`: what every share of skipped writes costs and saves.

    `cost` is `write_cost` of the model. Columns: share (asked for), rule, skipped (share of writes left out),
    unsettled, count (tokens), mean_loss, delta (nats per token above skipping nothing) with _low and _high;
    saved_writes and saved_inner (share of all operations of the model saved by skipping the writes alone, and by
    skipping their gradients as well, which a gate would have to guess); unit, blocks, documents, confidence.
    """
    rows = []
    for (share, rule), part in readings.groupby(["share", "rule"], sort=False):
        blocks = make_blocks(part["document"], boot)
        change = (part["loss"] - part["base"]).to_numpy()
        sums, counts = cell_sums(change, np.zeros(len(part), int), 1, blocks)
        used = int((counts > 0).sum())
        delta = (float(divide(sums.sum(), counts.sum())), Resampler(blocks, boot).means(sums, counts)[:, 0], used)
        skipped = float(part["skipped"].mean())
        row = {"share": share, "rule": rule, "skipped": skipped, "unsettled": float(part["unsettled"].mean())}
        row |= {"count": int(counts.sum()), "mean_loss": float(np.nanmean(part["loss"]))}
        row |= with_intervals({"delta": delta}, boot)
        row |= {f"saved_{name}": skipped * value for name, value in cost.items()}
        rows.append(row | provenance(blocks, used, boot))
    return pd.DataFrame(rows)


def write_cost(model: Any) -> dict[str, float]:
    """Give the share of a token's multiplications that the writes are, and writes and inner gradients together.

    Counted in the primal form: a product with a matrix of n entries is n multiplications. A token's write is one
    outer product per inner map; its gradient needs the maps once forwards, and backwards all but the first; its
    output needs them once more. Parameters outside the inner nets, the output head among them, count once each.
    """
    layers = ttt_layers(model.config)
    maps = [weight[0].shape for weight, _ in initial_state(model, model.device)[0]]  # [H, in, out] each
    sizes = [int(np.prod(shape)) for shape in maps]
    writes = len(layers) * sum(sizes)
    gradient = len(layers) * (sum(sizes) + sum(sizes[1:]))
    head = model.get_output_embeddings().weight
    outer = sum(p.numel() for p in model.parameters()) - writes
    tied = head is model.get_input_embeddings().weight
    outer -= 0 if tied else model.get_input_embeddings().weight.numel()  # a row is looked up, not multiplied
    total = outer + 2 * writes + gradient
    return {"writes": writes / total, "inner": (writes + gradient) / total}


def _read(model: Any, rows: Sequence[np.ndarray], gate: torch.Tensor | None, segment_length: int, stats: bool = True):
    return read_batch(model, rows, segment_length=segment_length, lr_mult=gate, plasticity=False, stats=stats)


def _settle(model, rows, whole, limit, rounds, segment_length, length):
    """The reading, its gate [B, L, 1, T], and the share of decisions that one more round would change."""
    gate, found = _gate(whole, limit, length), whole
    for _ in range(rounds):
        found = _read(model, rows, gate, segment_length)
        following = _gate(found, limit, length)
        if torch.equal(following, gate):
            return found, gate, 0.0
        used, gate = gate, following
    changed = (used != gate).float()
    tokens = sum(map(len, rows))
    return found, used, float(changed.sum() / (tokens * len(limit)))


def _gate(readings: Sequence[Any], limit: np.ndarray, length: int) -> torch.Tensor:
    gate = torch.ones(len(readings), len(limit), 1, length)
    for b, reading in enumerate(readings):
        norms = reading.stats["inner_grad_norm"]
        gate[b, :, 0, : len(norms)] = torch.from_numpy((norms >= limit).astype(np.float32).T)
    return gate


def _random_gate(rows: Sequence[np.ndarray], layers: int, share: float, length: int, seed: int) -> torch.Tensor:
    rng = np.random.default_rng(seed)
    return torch.from_numpy((rng.random((len(rows), layers, 1, length)) >= share).astype(np.float32))


def _losses(readings: Sequence[Any]) -> np.ndarray:
    return np.concatenate([reading.loss for reading in readings]).astype(np.float64)
