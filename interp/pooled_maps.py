"""Which group of writes serves which reads, without any T x T: the inner state is kept apart by group.

W_t - W_0 is a sum over groups of what each has written so far. A read meets every group's part by itself, so the map
costs T * G * f^2 operations for G groups and as much memory as G states.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
from torch import Tensor

from interp.inner_reads import MiniBatch, check_convention, gelu, mini_batches, slope
from interp.records import LayerWrites, WriteRecords
from interp.write_maps import expanded_direction, relative_direction

__all__ = ["MAP_MODES", "PooledWriteMap", "block_groups", "pooled_write_map", "span_groups"]

MAP_MODES = ("relative", "signed", "norm")


@dataclass(frozen=True)
class PooledWriteMap:
    """What G groups of writes give to reads.

    `values` is [B, H, T, G], or [B, H, R, G] when the reads were pooled as well (`reads` [B, H, R] is then how many
    each pool holds). `names` are those of the G groups, `read_names` of the R pools, `heads` which heads of the layer
    the H are (None: all).
    """

    layer: int
    mode: str
    values: Tensor
    names: tuple[str, ...]
    read_names: tuple[str, ...] | None = None
    reads: Tensor | None = None
    heads: tuple[int, ...] | None = None

    @property
    def mean(self) -> Tensor:
        """Per read of a pool, [B, H, R, G]; NaN for pools without a read; the values themselves when not pooled."""
        return self.values if self.reads is None else self.values / self.reads[..., None]

    def to_pandas(self, row: int = 0) -> pd.DataFrame:
        """A row per head, read (or pool) and group of one document: `head`, `read`, `write`, `value`."""
        head, read, write = (i.ravel() for i in np.indices(self.values.shape[1:]))
        reads = read if self.read_names is None else np.asarray(self.read_names, dtype=object)[read]
        heads = head if self.heads is None else np.asarray(self.heads)[head]
        table = {"head": heads, "read": reads, "write": np.asarray(self.names, dtype=object)[write]}
        return pd.DataFrame(table | {"value": self.values[row].flatten().double().numpy()})


def span_groups(length: int, spans: Sequence[tuple[int, int]]) -> Tensor:
    """Groups [T] of spans (first, one past the last): span i is group i, tokens outside are in none (-1).

    Raises:
        ValueError: spans overlap or lie outside the text.
    """
    groups = torch.full((length,), -1, dtype=torch.long)
    for i, (first, end) in enumerate(spans):
        if not 0 <= first < end <= length or (groups[first:end] >= 0).any():
            raise ValueError(f"spans must not overlap and lie within 0 to {length}, got ({first}, {end})")
        groups[first:end] = i
    return groups


def block_groups(length: int, count: int) -> Tensor:
    """Groups [T] of about `count` stretches of equal length."""
    if count < 1:
        raise ValueError(f"count must be at least 1, got {count}")
    return torch.arange(length) * min(count, length) // length


@torch.no_grad()
def pooled_write_map(
    records: WriteRecords,
    layer: int,
    groups: Tensor,
    *,
    mode: str = "relative",
    direction: Tensor | None = None,
    read_groups: Tensor | None = None,
    names: Sequence[str] | None = None,
    read_names: Sequence[str] | None = None,
    gelu_rule: str = "rescale",
    interaction: str = "shapley",
) -> PooledWriteMap:
    """What each group of writes gives to each read of a layer (absolute index), exactly.

    `groups` int64 [T] or [B, T] puts every token in a group 0 to G - 1 (bucket, word, span, document, stretch); -1 is
    none. `mode` as in `write_read_matrix`: "relative" (shares of what was learnt; they sum to 1 over all groups),
    "signed" (projected on `direction`, broadcastable to [B, H, T, f]) or "norm" (the length of a group's share).
    `read_groups` pools the reads likewise, by sum; a sum of lengths would mean nothing, so not with "norm".

    Raises:
        ValueError: an argument does not fit.
    """
    check_convention(gelu_rule, interaction)
    if mode not in MAP_MODES:
        raise ValueError(f"mode must be one of {MAP_MODES}, got {mode!r}")
    if (mode == "signed") != (direction is not None):
        raise ValueError(
            f"direction belongs to mode 'signed', got mode {mode!r} with direction {direction is not None}"
        )
    if mode == "norm" and read_groups is not None:
        raise ValueError("read_groups sums over reads, which mode 'norm' does not allow")
    record = records[layer]
    member, names = _membership("groups", groups, records, names, record)
    values = _split_states(record, member, mode, direction, gelu_rule, interaction)
    if read_groups is None:
        return PooledWriteMap(layer, mode, values, names, heads=record.heads)
    pool, pool_names = _membership("read_groups", read_groups, records, read_names, record)
    counts = (pool * record.places.real[..., None]).sum(1)[:, None].expand(-1, values.shape[1], -1)
    return PooledWriteMap(layer, mode, pool.mT[:, None] @ values, names, pool_names, counts, record.heads)


def _membership(
    name: str, groups: Tensor, records: WriteRecords, names: Sequence[str] | None, record: LayerWrites
) -> tuple[Tensor, tuple[str, ...]]:
    """One-hot groups [B, T, G] in the dtype of the record, and their names."""
    groups = torch.as_tensor(groups)
    groups = groups[None] if groups.dim() == 1 else groups
    shape = records.input_ids.shape
    if groups.is_floating_point() or groups.shape not in (shape, (1, shape[1])) or int(groups.min()) < -1:
        raise ValueError(
            f"{name} must be integers from -1 on, [{shape[1]}] or {list(shape)}, got {list(groups.shape)}"
        )
    count = int(groups.max()) + 1 if names is None else len(names)
    if not count or int(groups.max()) >= count:
        raise ValueError(f"{name} must have a group, and a name for each, got {count} for groups up to {groups.max()}")
    member = groups.to(record.k.device)[..., None] == torch.arange(count, device=record.k.device)
    names = tuple(map(str, range(count) if names is None else names))
    return member.expand(shape[0], -1, -1).to(record.k), names


def _split_states(
    record: LayerWrites, member: Tensor, mode: str, direction: Tensor | None, gelu_rule: str, interaction: str
) -> Tensor:
    """[B, H, T, G]: the map, mini-batch by mini-batch, with one state per group."""
    places = record.places
    heads, count = record.k.shape[1], member.shape[-1]
    member = places.align(member[:, None])  # [B, 1, M * K, G]
    q = places.align(record.q)
    if direction is not None:
        direction = places.align(expanded_direction(direction, record.q))
    states = [
        (w.new_zeros(len(q), heads, count, *w.shape[1:]), b.new_zeros(len(q), heads, count, w.shape[2]))
        for w, b in record.initial
    ]
    found = []
    for batch in mini_batches(record):
        at = batch.columns
        if batch.starts is not None:
            keep = ~batch.starts
            states = [tuple(p * keep.view(-1, *[1] * (p.dim() - 1)) for p in pair) for pair in states]
        reads = _BatchReads(record, batch, q[:, :, at], gelu_rule, interaction)
        along = None if direction is None else direction[:, :, at]
        found.append(reads.by_group(states, member[:, :, at], mode, along))
        scaled = batch.lr * record.token_rate[-1]
        states = [
            _committed(pair, x, g, scaled, member[:, :, at])
            for pair, x, g in zip(states, batch.xs, batch.gs, strict=True)
        ]
    return places.unalign(torch.cat(found, 2))


def _committed(pair: tuple[Tensor, Tensor], x: Tensor, g: Tensor, rate: Tensor, member: Tensor):
    """A map's states by group after a mini-batch's writes."""
    weight, bias = pair
    spread = x[:, :, :, None] * member[..., None]  # [B, H, n, G, in]
    g = g * rate[..., None]
    written = spread.flatten(3).mT @ g  # [B, H, G * in, out]
    return weight - written.view_as(weight), bias - member.mT @ g


class _BatchReads:
    """The reads of one mini-batch, n of them, in the terms of `inner_reads.RowReads`."""

    def __init__(self, record: Any, batch: MiniBatch, q: Tensor, gelu_rule: str, interaction: str):
        self.batch = batch
        tau = record.token_rate[: q.shape[2], None]
        self.rates = (tau * batch.lr[:, :, None]).expand(-1, -1, q.shape[2], -1).tril()  # [B, H, n, n]
        (weight, bias), *behind = record.initial
        start, end = q @ weight + bias, self._read(0, q)
        self.inputs, self.slope = [q], None
        self.base, self.read = start, end
        if not behind:
            return
        ((self.initial, bias),) = behind
        x0, x1 = gelu(start), gelu(end)
        self.slope = slope(start, end, x0, x1, gelu_rule)
        self.share = {"shapley": 0.5, "first": 1.0, "second": 0.0}[interaction]
        self.inputs.append(self.share * x1 + (1 - self.share) * x0)
        self.base, self.read = x0 @ self.initial + bias, self._read(1, x1)

    def _read(self, i: int, a: Tensor) -> Tensor:
        weight, bias = self.batch.weights[i]
        return a @ weight + bias - (self.rates * (a @ self.batch.xs[i].mT + 1)) @ self.batch.gs[i]

    def by_group(self, states: list, member: Tensor, mode: str, along: Tensor | None) -> Tensor:
        """What each group gives to each read, [B, H, n, G]."""
        vectors = self._vectors(states, member)  # [B, H, n, G, f]
        if mode == "norm":
            return vectors.norm(dim=-1)
        along = relative_direction(self.base, self.read) if mode == "relative" else along
        return (vectors @ along[..., None])[..., 0]

    def _vectors(self, states: list, member: Tensor) -> Tensor:
        last = self._of_map(len(states) - 1, states[-1], member)
        if self.slope is None:
            return last
        bent = self.slope[:, :, :, None] * self._of_map(0, states[0], member)  # [B, H, n, G, m]
        weight, x, g = self.batch.weights[1][0], self.batch.xs[1], self.batch.gs[1]
        flat = bent.flatten(2, 3)
        now = flat @ weight - ((flat @ x.mT).view(*bent.shape[:4], -1) * self.rates[:, :, :, None]).flatten(2, 3) @ g
        mixed = self.share * (flat @ self.initial) + (1 - self.share) * now
        return last + mixed.view(*bent.shape[:4], -1)

    def _of_map(self, i: int, pair: tuple[Tensor, Tensor], member: Tensor) -> Tensor:
        """What each group's writes add at the output of a map, [B, H, n, G, out]."""
        (weight, bias), a = pair, self.inputs[i]
        committed = torch.einsum("bhni,bhgio->bhngo", a, weight) + bias[:, :, None]
        pending = self.rates * (a @ self.batch.xs[i].mT + 1)  # [B, H, n, n]
        g = self.batch.gs[i]
        spread = (pending[:, :, :, None] * member.mT[:, :, None]) @ g[:, :, None]  # [B, H, n, G, out]
        return committed - spread
