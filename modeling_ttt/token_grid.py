"""The mini-batch grid: where every token of a call falls among the mini-batches of its row.

Only real tokens count. A row's mini-batches are filled by its real tokens in order, a document border starts a new
mini-batch, and a row that continues from a cache goes on in the middle of its open mini-batch. The grid is worked out
once per call of the model and shared by all layers. In the common case (no mask, no border, all rows at the same
place) packing is the identity.

Columns of the packed layout: column c of every row is slot `(phase + c) mod K` of mini-batch `(phase + c) div K`,
counted from the open mini-batch of the row; a row has no token in some columns when others are at another phase.
"""

import copy

import torch
from torch import Tensor

__all__ = ["TokenGrid", "common_value"]


class TokenGrid:
    """Places the tokens of one call, [B, T], in the mini-batches of their rows.

    Args:
        shape: (B, T) of the call.
        mini_batch_size: K, tokens per mini-batch.
        device: where index tensors are built.
        real: [B, T] bool, False for masked tokens; None means that all are real.
        border: [B, T] bool, True for the first token of a new document; None means no border.
        position: [B] int64 on the CPU, real tokens of the current document that were seen before this call.
        seen: [B] int64 on the CPU, all real tokens seen before this call.
        start: the value of `position` where it is one for all rows and the caller knows it, which saves reading it.

    Attributes:
        slot: [B, T] (or [1, T]) int64, position of each token in its mini-batch; of a masked token that of the next.
        uniform: packing is the identity.
        phase: slot of packed column 0.  width: number of packed columns.
        has_open_rows: some row continues in the middle of a mini-batch.
        complete, reset: [B, M] bool per packed mini-batch: it is full (commits); it starts a document (from W_0).
        last: [B] int64, the mini-batch that holds the row's last real token (0 if it has none in this call).
        commits, resets: per packed mini-batch, whether any row commits or starts a document.  ends: values of `last`.
    """

    def __init__(self, shape, mini_batch_size, device, real=None, border=None, position=None, seen=None, start=None):
        self.batch, self.length = shape
        self.mini_batch_size = mini_batch_size
        self.device = device
        zeros = torch.zeros(self.batch, dtype=torch.long)
        self.position = zeros if position is None else position
        self.seen = zeros if seen is None else seen
        self.real = None if real is None or bool(real.all()) else real
        if border is not None and self.real is not None:
            border = border & self.real
        self.border = None if border is None or not bool(border.any()) else border
        self._elsewhere: dict[torch.device, TokenGrid] = {}
        self._windows: dict[int, tuple[Tensor, Tensor]] = {}
        self.start = 0 if position is None else common_value(position) if start is None else start
        self.uniform = self.real is None and self.border is None and self.start is not None
        if self.uniform:
            self._place_uniform(self.start)
        else:
            self._place_ragged()

    def to(self, device: torch.device) -> "TokenGrid":
        """This grid with its index tensors on another device."""
        if device == self.device:
            return self
        if device not in self._elsewhere:
            twin = copy.copy(self)
            on_cpu = ("position", "seen", "_advanced")
            for name, value in vars(self).items():
                if isinstance(value, Tensor) and name not in on_cpu:
                    setattr(twin, name, value.to(device))
            twin.device, twin._windows = device, {}
            self._elsewhere[device] = twin
        return self._elsewhere[device]

    def segments(self, length: int) -> list[tuple[slice, "TokenGrid"]]:
        """The call cut into calls of at most `length` columns that follow each other: columns and grid of each.

        Cuts fall between mini-batches when all rows are at the same place.
        """
        if self.length <= length:
            return [(slice(0, self.length), self)]
        parts, place, first = [], (self.position, self.seen, self.start), 0
        while first < self.length:
            stop = min(first + length, self.length)
            if self.uniform and first == 0:
                stop = max(self.mini_batch_size - self.phase, stop - self.phase)
            span = slice(first, stop)
            real, border = (None if x is None else x[:, span] for x in (self.real, self.border))
            part = TokenGrid((self.batch, stop - first), self.mini_batch_size, self.device, real, border, *place)
            parts.append((span, part))
            place, first = part.advanced(), stop
        return parts

    # ---------------------------------------------------------------- packed layout

    def pack(self, x: Tensor, dim: int) -> Tensor:
        """Move the token dimension `dim` of x (batch first) to packed columns; columns without a token hold zeros."""
        if self.uniform:
            return x
        shape = [1] * x.dim()
        shape[0], shape[dim] = self.batch, self.width
        index = self._source.view(shape).expand(*x.shape[:dim], self.width, *x.shape[dim + 1 :])
        return x.gather(dim, index).masked_fill(~self.valid.view(shape), 0)

    def unpack(self, x: Tensor, dim: int) -> Tensor:
        """The inverse of `pack`: back to the caller's layout, zeros at masked tokens."""
        if self.uniform:
            return x
        shape = [1] * x.dim()
        shape[0], shape[dim] = self.batch, self.length
        index = self._column.view(shape).expand(*x.shape[:dim], self.length, *x.shape[dim + 1 :])
        x = x.gather(dim, index)
        return x if self.real is None else x.masked_fill(~self.real.view(shape), 0)

    # ---------------------------------------------------------------- counts and windows

    @property
    def token_index(self) -> Tensor:
        """[B, T] int64, index of each real token among all real tokens of its row since the state was new."""
        rank = self._rank if not self.uniform else torch.arange(self.length, device=self.device)[None]
        return rank + self.seen.to(self.device)[:, None]

    def advanced(self) -> tuple[Tensor, Tensor, int | None]:
        """(position, seen) after this call, [B] int64 on the CPU, and `start`, None where rows differ."""
        if self.uniform:
            return self.position + self.length, self.seen + self.length, self.start + self.length
        return *self._advanced, common_value(self._advanced[0])

    def windows(self, kernel: int) -> tuple[Tensor, Tensor]:
        """Sources of a causal window of `kernel` tokens that skips masked tokens and stops at document borders.

        Indices address the concatenation [tail (kernel - 1), tokens (T), one zero row]. Returns the window of every
        token, [B, T, kernel] (oldest first, itself last), and the tail to keep, [B, kernel - 1].
        """
        if kernel not in self._windows:
            self._windows[kernel] = self._build_windows(kernel)
        return self._windows[kernel]

    # ---------------------------------------------------------------- construction

    def _place_uniform(self, start: int) -> None:
        self.has_open_rows = start % self.mini_batch_size != 0
        self.phase, self.width = start % self.mini_batch_size, self.length
        steps = torch.arange(self.length, device=self.device)
        self.slot = ((start + steps) % self.mini_batch_size)[None]  # [1, T]
        self.complete = self.reset = self.last = self.valid = None
        self.resets, self.ends = [], set()

    def _place_ragged(self) -> None:
        batch, length, size = self.batch, self.length, self.mini_batch_size
        real = self.real
        if real is None:
            real = torch.ones(batch, length, dtype=torch.bool, device=self.device)
        start = self.position.to(self.device)[:, None]  # [B, 1]
        rank = real.long().cumsum(1) - 1  # [B, T] of the last real token up to here
        upcoming = torch.where(real, rank, rank + 1)  # masked tokens take the place of the next real one
        first = torch.full_like(rank, -1)
        if self.border is not None:
            first = (
                torch.where(self.border, rank, first).cummax(1).values
            )  # rank of the current document's first token
        position = torch.where(first >= 0, upcoming - first, start + upcoming)
        self.slot = position % size
        open_at_start = (start % size != 0).long()
        opens = real & (self.slot == 0)
        mini_batch = opens.long().cumsum(1) - 1 + open_at_start  # [B, T]
        column = torch.where(real, mini_batch * size + self.slot, 0)

        self._rank, self._first, self._count = upcoming, first, real.sum(1)
        last_position = torch.where(real, position, -1).gather(1, self._last_real(real))[:, 0]
        self._position_after = torch.where(self._count > 0, last_position + 1, start[:, 0])
        self.last = torch.where(self._count > 0, mini_batch.gather(1, self._last_real(real))[:, 0], 0)
        self.has_open_rows = bool(open_at_start.any())
        # A row without a token in this call keeps its open writes: the packed columns must cover their slots.
        kept_slots = torch.where(self._count > 0, 0, start[:, 0] % size)
        self._build_pack(real, column, int(kept_slots.max()))
        self._build_flags(real, mini_batch, start[:, 0] % size)
        self._advanced = (self._position_after.cpu(), self.seen + self._count.cpu())

    def _last_real(self, real: Tensor) -> Tensor:
        """[B, 1] index of the last real token (0 if there is none)."""
        steps = torch.arange(self.length, device=self.device)
        return torch.where(real, steps, 0).amax(1, keepdim=True)

    def _build_pack(self, real: Tensor, column: Tensor, kept_slots: int) -> None:
        far = torch.iinfo(torch.long).max
        self.phase = min(int(torch.where(real, column, far).min()), self.mini_batch_size - 1)
        if not bool(real.any()):
            self.phase = 0
        self.width = max(int(column.max()) + 1, kept_slots) - self.phase
        self._column = (column - self.phase).clamp(min=0)
        spare = torch.where(real, self._column, self.width)  # masked tokens go to a column that is cut off
        steps = torch.arange(self.length, device=self.device).expand(self.batch, -1)
        source = torch.full((self.batch, self.width + 1), -1, dtype=torch.long, device=self.device)
        source = source.scatter(1, spare, steps)[:, : self.width]
        self.valid = source >= 0  # [B, width]
        self._source = source.clamp(min=0)

    def _build_flags(self, real: Tensor, mini_batch: Tensor, open_count: Tensor) -> None:
        size = self.mini_batch_size
        count = (self.phase + self.width + size - 1) // size
        index = torch.where(real, mini_batch, count)  # masked tokens count into a spare mini-batch
        tokens = torch.zeros(self.batch, count + 1, dtype=torch.long, device=self.device)
        tokens.scatter_add_(1, index, real.long())
        tokens[:, 0] += open_count
        self.complete = (tokens == size)[:, :count]
        self.reset = torch.zeros(self.batch, count + 1, dtype=torch.bool, device=self.device)
        if self.border is not None:
            self.reset.scatter_(1, torch.where(self.border, mini_batch, count), True)
        self.reset = self.reset[:, :count]
        # Answers the scan needs on the host, fetched once per call and not once per layer and mini-batch.
        self.commits = self.complete.any(0).tolist()
        self.resets = self.reset.any(0).tolist()
        self.ends = set(self.last.tolist())

    def _build_windows(self, kernel: int) -> tuple[Tensor, Tensor]:
        tail, zero_row = kernel - 1, kernel - 1 + self.length
        steps = torch.arange(self.length, device=self.device)
        if self.uniform:
            window = (steps[:, None] + torch.arange(kernel, device=self.device)).expand(self.batch, -1, -1)
            keep = (torch.arange(tail, device=self.device) + self.length).expand(self.batch, -1)
            return window, keep
        real = torch.ones_like(self._rank, dtype=torch.bool) if self.real is None else self.real
        # Place of the token with a given rank; the last entry answers for ranks that do not exist.
        place = torch.full((self.batch, self.length + 1), 0, dtype=torch.long, device=self.device)
        place.scatter_(1, torch.where(real, self._rank, self.length), steps.expand(self.batch, -1))

        def sources(rank: Tensor, first: Tensor) -> Tensor:
            inside = (rank >= 0) & (rank >= first)
            from_tail = (rank < 0) & (first < 0) & (rank >= -tail)
            index = place.gather(1, rank.clamp(0, self.length).flatten(1)).view_as(rank) + tail
            return torch.where(inside, index, torch.where(from_tail, rank + tail, zero_row))

        back = torch.arange(kernel - 1, -1, -1, device=self.device)
        window = sources(self._rank[..., None] - back, self._first[..., None])
        window = torch.where(real[..., None], window, zero_row)
        newest = (self._count - 1)[:, None] - torch.arange(tail - 1, -1, -1, device=self.device)
        keep = sources(newest, self._first[:, -1:].expand_as(newest))
        return window, keep


def common_value(x: Tensor) -> int | None:
    """The number that all elements of a tensor on the CPU are, None where they differ."""
    values = set(x.tolist())
    return values.pop() if len(values) == 1 else None
