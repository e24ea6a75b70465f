"""Write to read, write to write, and what a write does for the inner loss: exact matrices of one layer, row by row.

Rows are reading (or later) tokens, columns writing ones. A full matrix is T x T per head: ask for the rows that
matter, or take `iterate_rows`; `interp.pooled_maps` needs no matrix at all.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from interp.inner_reads import RowReads, check_convention, write_inputs
from interp.records import LayerWrites, WriteRecords

__all__ = [
    "MODES",
    "ReadContributions",
    "inner_tracin",
    "iterate_rows",
    "read_contributions",
    "write_read_matrix",
    "write_write_matrix",
]

MODES = ("coefficient", "signed", "relative", "norm")
BLOCK_ROWS = 64


def write_read_matrix(
    records: WriteRecords,
    layer: int,
    *,
    mode: str = "coefficient",
    rows: Sequence[int] | None = None,
    direction: Tensor | None = None,
    inner_map: int = 1,
    gelu_rule: str = "rescale",
    interaction: str = "shapley",
) -> Tensor:
    """How much each write gives to each read of a layer (absolute index), [B, H, R, T] for R `rows` (None: all T).

    `mode`: "coefficient" is the number A that the inner gradient of the write is multiplied by in the read at
    `inner_map` (1 or, for TTT-MLP, 2). "signed" is the write's share of the read projected on `direction`, [f] or
    broadcastable to [B, H, R, f]; "relative" the same for the direction from the read at W_0 to the read, in units of
    that distance: rows sum to 1. These may be summed. "norm" is the length of the write's share, which may not:
    shares cancel. In TTT-MLP the shares follow a convention, see `interp.inner_reads`.

    Raises:
        ValueError: an argument does not fit.
    """
    blocks = iterate_rows(
        records,
        layer,
        mode=mode,
        rows=rows,
        direction=direction,
        inner_map=inner_map,
        gelu_rule=gelu_rule,
        interaction=interaction,
    )
    return torch.cat([block for _, block in blocks], 2)


@torch.no_grad()
def iterate_rows(
    records: WriteRecords,
    layer: int,
    *,
    mode: str = "coefficient",
    rows: Sequence[int] | None = None,
    direction: Tensor | None = None,
    inner_map: int = 1,
    gelu_rule: str = "rescale",
    interaction: str = "shapley",
    block_rows: int = BLOCK_ROWS,
) -> Iterator[tuple[list[int], Tensor]]:
    """The rows of `write_read_matrix` in blocks that need not be kept: columns of the reads, and [B, H, r, T]."""
    record = records[layer]
    rows = _checked_rows(records, rows)
    _check_mode(mode, direction)
    if not 1 <= inner_map <= len(record.initial):
        raise ValueError(f"inner_map must be in [1, {len(record.initial)}], got {inner_map}")
    if block_rows < 1:
        raise ValueError(f"block_rows must be at least 1, got {block_rows}")
    if direction is not None:
        direction = expanded_direction(direction, record.q[:, :, rows])
    xs = write_inputs(record)
    for start in range(0, len(rows), block_rows):
        block = rows[start : start + block_rows]
        reads = RowReads(record, xs, record.q[:, :, block], _columns(record, block), gelu_rule, interaction)
        if mode == "coefficient":
            found = reads.coefficients[inner_map - 1]
        elif mode == "relative":
            found = reads.along(relative_direction(reads.base, reads.read))
        elif mode == "signed":
            found = reads.along(direction[:, :, start : start + block_rows])
        else:  # a row at a time: vectors are f times as large
            found = torch.cat([_norms(record, xs, [row], gelu_rule, interaction) for row in block], 2)
        yield block, found


@dataclass(frozen=True)
class ReadContributions:
    """One read of a layer at column `position` as a sum of vectors; B rows, H heads, f head dim.

    Attributes:
        vectors: the share of every write, [B, H, T, f].
        parts: the same for the writes to each inner map by themselves.
        base: the read at W_0, [B, H, f].
        curvature: what `gelu_rule="gradient"` leaves out, else 0, [B, H, f].
        read: base, curvature and all vectors together: the read before the inner norm, [B, H, f].
    """

    position: int
    vectors: Tensor
    parts: tuple[Tensor, ...]
    base: Tensor
    curvature: Tensor
    read: Tensor


@torch.no_grad()
def read_contributions(
    records: WriteRecords, layer: int, position: int, *, gelu_rule: str = "rescale", interaction: str = "shapley"
) -> ReadContributions:
    """Split the read of a layer (absolute index) at one column into the shares of all writes, as vectors.

    Raises:
        ValueError: an argument does not fit.
    """
    check_convention(gelu_rule, interaction)
    record = records[layer]
    row = _checked_rows(records, [position])
    reads = RowReads(record, write_inputs(record), record.q[:, :, row], _columns(record, row), gelu_rule, interaction)
    parts = tuple(part[:, :, 0] for part in reads.vectors())
    base, curvature, read = (x[:, :, 0] for x in (reads.base, reads.curvature, reads.read))
    return ReadContributions(row[0], sum(parts), parts, base, curvature, read)


@torch.no_grad()
def write_write_matrix(
    records: WriteRecords, layer: int, *, rows: Sequence[int] | None = None, inner_map: int = 1
) -> Tensor:
    """How much each write changes what the inner net makes of each later key, [B, H, R, T] for R `rows` (None: all).

    The number that the inner gradient of the column's token is multiplied by in the output of `inner_map` (1 or, for
    TTT-MLP, 2) for the row's key, at the weights where the row's own gradient is taken: those of its mini-batch's
    start. Zero within a mini-batch and behind. With the output at W_0 (at the input as it is) the rows sum, weighted
    with the gradients, to the output.

    Raises:
        ValueError: an argument does not fit.
    """
    record = records[layer]
    rows = _checked_rows(records, rows)
    if not 1 <= inner_map <= len(record.initial):
        raise ValueError(f"inner_map must be in [1, {len(record.initial)}], got {inner_map}")
    x = write_inputs(record)[inner_map - 1]
    committed = record.places.committed(record.lr, record.token_rate, _columns(record, rows))
    return -committed * (x[:, :, rows] @ x.mT + 1)


@torch.no_grad()
def inner_tracin(records: WriteRecords, layer: int, *, rows: Sequence[int] | None = None) -> Tensor:
    """What each write takes off the inner loss of each later token, to first order, [B, H, R, T] for R `rows`.

    TracIn (arXiv 2002.08484) of the inner loop: examples are tokens, checkpoints mini-batches. The product of the
    gradients of both tokens with respect to all inner weights, times the rate with which the row's token reads the
    write (its own included). Positive: the write helped to reconstruct the row's value. In units of the inner loss.
    """
    record = records[layer]
    rows = _checked_rows(records, rows)
    rates = record.places.rates(record.lr, record.token_rate, _columns(record, rows))
    products = (
        (x[:, :, rows] @ x.mT + 1) * (g[:, :, rows] @ g.mT)
        for x, g in zip(write_inputs(record), record.gradients, strict=True)
    )
    return rates * sum(products)


def relative_direction(base: Tensor, read: Tensor) -> Tensor:
    """The direction on which shares of what was learnt sum to 1; 0 where nothing was."""
    learnt = read - base
    squared = learnt.square().sum(-1, keepdim=True)
    return learnt / squared.where(squared > 0, torch.ones_like(squared))


def expanded_direction(direction: Tensor, q: Tensor) -> Tensor:
    """A direction for each read at queries q [B, H, R, f]; ValueError when it does not broadcast to them."""
    try:
        return direction.to(q).expand_as(q)
    except RuntimeError:
        raise ValueError(f"direction must be broadcastable to {list(q.shape)}, got {list(direction.shape)}") from None


def _check_mode(mode: str, direction: Tensor | None) -> None:
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if (mode == "signed") != (direction is not None):
        raise ValueError(
            f"direction belongs to mode 'signed', got mode {mode!r} with direction {direction is not None}"
        )


def _checked_rows(records: WriteRecords, rows: Sequence[int] | None) -> list[int]:
    """Columns of the reads, not negative; ValueError for one outside the text."""
    length = records.input_ids.shape[1]
    rows = list(range(length)) if rows is None else [int(row) for row in rows]
    if not rows or any(not -length <= row < length for row in rows):
        raise ValueError(f"rows must be one or more columns in [-{length}, {length}), got {rows}")
    return [row % length for row in rows]


def _columns(record: LayerWrites, rows: list[int]) -> Tensor:
    return torch.tensor(rows, device=record.k.device).expand(len(record.k), -1)


def _norms(record: LayerWrites, xs: list[Tensor], row: list[int], gelu_rule: str, interaction: str) -> Tensor:
    reads = RowReads(record, xs, record.q[:, :, row], _columns(record, row), gelu_rule, interaction)
    return sum(reads.vectors()).norm(dim=-1)
