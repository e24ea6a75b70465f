"""The tokens of a call laid out in whole mini-batches, for backends that run one mini-batch at a time.

Every mini-batch is K columns that begin at slot 0, so column c of a row is slot `c mod K` of mini-batch `c div K`,
counted from the row's open mini-batch. Columns without a token hold zeros and learning rate 0. In the open mini-batch
the columns of tokens written by an earlier call hold their rows of the state ("carried"): there k is the carried input
of the first map and the learning rate is 1, because a carried gradient already has its learning rate in it.
All rearranging is done by differentiable operations.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from .inner_net import Weights
from .token_grid import TokenGrid
from .ttt_state import ScanInputs

__all__ = ["AlignedTokens", "Borders", "align", "unalign"]


@dataclass
class Borders:
    """What happens at the borders between the M mini-batches of a call.

    Attributes:
        count: M.
        carried_slots: [B, K] bool, the slots of mini-batch 0 that are carried; None when no row continues in the
            middle of a mini-batch.
        complete: [B, M] bool, the mini-batch is full and commits; None when all are.
        commits: per mini-batch on the host, whether any row commits.
        reset: [B, M] bool, the mini-batch starts from W_0; None when there is no document border.
        resets: per mini-batch on the host, whether any row starts from W_0; empty when none does.
        last: [B] int64, the mini-batch of the row's last token; None when it is M - 1 for all.
        ends: values of `last` on the host.
        held: [B, K] bool, slots of the row's last mini-batch that the new state holds rows of; None when none does.
    """

    count: int
    carried_slots: Tensor | None
    complete: Tensor | None
    commits: list[bool]
    reset: Tensor | None
    resets: list[bool]
    last: Tensor | None
    ends: set[int]
    held: Tensor | None


@dataclass
class AlignedTokens:
    """Aligned token tensors: q, k, v [B, H, M * K, f], lr [B, H, M * K].

    `carried` holds per inner map the rows of the state, (x [B, H, K, in], g [B, H, K, out]), zeros in g where no token
    was; None with `borders.carried_slots`. They belong to mini-batch 0.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    carried: Weights | None
    borders: Borders


def align(inputs: ScanInputs) -> AlignedTokens:
    """Lay out q, k, v and lr of a call in whole mini-batches."""
    grid, size = inputs.grid, inputs.tau.shape[0]
    count = -(-(grid.phase + grid.width) // size)
    q, k, v, lr = (_pad(grid.pack(t, 2), grid, size * count) for t in (inputs.q, inputs.k, inputs.v, inputs.lr))
    borders, carried = _borders(grid, size, count), None
    if grid.has_open_rows and inputs.state is not None:
        carried = inputs.state.rows
        slots = _first_slots(grid.phase if grid.uniform else grid.position % size, size, grid)
        borders.carried_slots = slots
        k = _carry_in(k, carried[0][0], slots[:, None, :, None])
        lr = _carry_in(lr, torch.ones_like(lr[:, :, :size]), slots[:, None])
    return AlignedTokens(q, k, v, lr, carried, borders)


def unalign(x: Tensor, grid: TokenGrid) -> Tensor:
    """Aligned columns back to the caller's layout, [B, H, M * K, ...] -> [B, H, T, ...]; zeros at masked tokens."""
    return grid.unpack(x.narrow(2, grid.phase, grid.width), 2)


def _first_slots(count: int | Tensor, size: int, grid: TokenGrid) -> Tensor:
    """[B, K] bool, the first `count` slots; one number for all rows or [B] on the CPU."""
    if isinstance(count, int):
        return (torch.arange(size, device=grid.device) < count).expand(grid.batch, -1)
    return (torch.arange(size, device=count.device) < count[:, None]).to(grid.device)


def _borders(grid: TokenGrid, size: int, count: int) -> Borders:
    if grid.uniform:
        open_count = (grid.phase + grid.width) % size
        complete = held = None
        if open_count:
            complete = (torch.arange(count, device=grid.device) < count - 1).expand(grid.batch, -1)
            held = _first_slots(open_count, size, grid)
        commits = [True] * (count - 1) + [not open_count]
        return Borders(count, None, complete, commits, None, [], None, {count - 1}, held)
    open_counts = grid.advanced()[0] % size
    return Borders(
        count,
        carried_slots=None,
        complete=None if bool(grid.complete.all()) else grid.complete,
        commits=grid.commits,
        reset=grid.reset if any(grid.resets) else None,
        resets=grid.resets if any(grid.resets) else [],
        last=grid.last,
        ends=grid.ends,
        held=_first_slots(open_counts, size, grid) if bool(open_counts.any()) else None,
    )


def _pad(x: Tensor, grid: TokenGrid, columns: int) -> Tensor:
    """Zero columns before and after the packed ones."""
    back = columns - grid.phase - grid.width
    if grid.phase == back == 0:
        return x
    return F.pad(x, (0, 0) * (x.dim() - 3) + (grid.phase, back))


def _carry_in(x: Tensor, rows: Tensor, slots: Tensor) -> Tensor:
    """Put rows of the state in the carried slots of the first mini-batch."""
    size = rows.shape[2]
    return torch.cat([torch.where(slots, rows, x[:, :, :size]), x[:, :, size:]], 2)
