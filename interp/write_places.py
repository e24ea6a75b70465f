"""Where the writes of a text stand among the mini-batches of their rows, and with which rate each read sees them.

The same count as the model's: only real tokens count, and a document border starts a new mini-batch from W_0.
"""

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import cached_property

import torch
from torch import Tensor

__all__ = ["WritePlaces", "document_starts", "place_writes"]


@dataclass(frozen=True)
class WritePlaces:
    """Places of the tokens of B rows, [B, T] each: letters as in the package, K tokens per mini-batch.

    `real` bool; `slot` (position in the mini-batch), `mini_batch` (counted along the row) and `document`, int64. Of
    masked tokens the numbers mean nothing.
    """

    mini_batch_size: int
    real: Tensor
    slot: Tensor
    mini_batch: Tensor
    document: Tensor

    @property
    def count(self) -> int:
        """Mini-batches of the longest row."""
        return int(self.mini_batch.max()) + 1

    @cached_property
    def uniform(self) -> bool:
        """Every token is real and there is no border: token t is slot t mod K of mini-batch t div K."""
        return bool(self.real.all()) and not bool(self.document.any())

    @cached_property
    def starts(self) -> Tensor:
        """[B, M] bool, the mini-batch is the first of a document other than the row's first: W_0 again."""
        first = self.real & (self.document > 0) & (self.slot == 0)
        first[:, 1:] &= self._document_before[:, 1:] != self.document[:, 1:]
        found = torch.zeros(len(first), self.count + 1, dtype=torch.bool, device=first.device)
        found.scatter_(1, torch.where(first, self.mini_batch, self.count), True)
        return found[:, : self.count]

    @property
    def _document_before(self) -> Tensor:
        """The document of the last real token before each token, [B, T]; -1 when there is none."""
        last = torch.where(self.real, self.document, -1).cummax(1).values
        return torch.cat([torch.full_like(last[:, :1], -1), last[:, :-1]], 1)

    def rates(self, lr: Tensor, token_rate: Tensor, rows: Tensor) -> Tensor:
        """The rate eps with which a read at column `rows` [B, R] sees each write, [B, H, R, T].

        lr [B, H, T] times tau of the reading slot within the mini-batch, times tau of the last slot for mini-batches
        before it in the same document, 0 for everything else. A masked column reads nothing.
        """
        at = {name: getattr(self, name).gather(1, rows)[..., None] for name in ("mini_batch", "document", "slot")}
        steps = torch.arange(self.real.shape[1], device=rows.device)
        own = (self.mini_batch[:, None] == at["mini_batch"]) & (steps <= rows[..., None])
        before = (self.mini_batch[:, None] < at["mini_batch"]) & (self.document[:, None] == at["document"])
        factor = torch.where(own, token_rate[at["slot"]], token_rate[-1] * before)  # [B, R, T]
        reads = self.real[:, None] & self.real.gather(1, rows)[..., None]
        return (factor * reads)[:, None] * lr[:, :, None]

    def committed(self, lr: Tensor, token_rate: Tensor, rows: Tensor) -> Tensor:
        """The rate with which the weights at the mini-batch start of columns `rows` hold each write, [B, H, R, T]."""
        at = {name: getattr(self, name).gather(1, rows)[..., None] for name in ("mini_batch", "document")}
        before = (self.mini_batch[:, None] < at["mini_batch"]) & (self.document[:, None] == at["document"])
        reads = before & self.real[:, None] & self.real.gather(1, rows)[..., None]
        return (token_rate[-1] * reads)[:, None] * lr[:, :, None]

    def align(self, x: Tensor) -> Tensor:
        """x [B, H, T, ...] in columns m * K + slot, [B, H, M * K, ...], 0 where no token is; as it is when uniform."""
        if self.uniform:
            return x
        tail = [1] * (x.dim() - 3)
        index = self._source.view(len(x), 1, -1, *tail).expand(-1, x.shape[1], -1, *x.shape[3:])
        return x.gather(2, index.clamp(min=0)).masked_fill(index < 0, 0)

    def unalign(self, x: Tensor) -> Tensor:
        """The inverse of `align`, [B, H, M * K, ...] -> [B, H, T, ...], 0 at masked tokens."""
        if self.uniform:
            return x
        tail = [1] * (x.dim() - 3)
        column = torch.where(self.real, self.mini_batch * self.mini_batch_size + self.slot, 0)
        index = column.view(len(x), 1, -1, *tail).expand(-1, x.shape[1], -1, *x.shape[3:])
        return x.gather(2, index).masked_fill(~self.real.view(len(x), 1, -1, *tail), 0)

    def to(self, device: torch.device | str) -> "WritePlaces":
        """The same on another device."""
        names = ("real", "slot", "mini_batch", "document")
        return replace(self, **{name: getattr(self, name).to(device) for name in names})

    @cached_property
    def _source(self) -> Tensor:
        """[B, M * K] int64, the token in every aligned column, -1 where there is none."""
        columns = self.count * self.mini_batch_size
        batch, length = self.real.shape
        place = torch.where(self.real, self.mini_batch * self.mini_batch_size + self.slot, columns)
        source = torch.full((batch, columns + 1), -1, dtype=torch.long, device=self.real.device)
        source.scatter_(1, place, torch.arange(length, device=self.real.device).expand(batch, -1))
        return source[:, :columns]


def place_writes(
    shape: tuple[int, int], mini_batch_size: int, real: Tensor | None = None, border: Tensor | None = None
) -> WritePlaces:
    """Places of the tokens of rows [B, T] read from an empty state.

    `real` [B, T] bool is False for masked tokens, `border` [B, T] bool True for the first token of a new document.
    """
    real = torch.ones(shape, dtype=torch.bool) if real is None else real
    rank = real.long().cumsum(1) - 1
    first, document = torch.zeros_like(rank), torch.zeros_like(rank)
    if border is not None:
        border = border & real & (rank > 0)  # at the first token the state is new anyway
        first = torch.where(border, rank, first).cummax(1).values
        document = border.long().cumsum(1)
    slot = (rank - first) % mini_batch_size
    mini_batch = (real & (slot == 0)).long().cumsum(1) - 1
    return WritePlaces(mini_batch_size, real, slot.clamp(min=0), mini_batch.clamp(min=0), document)


def document_starts(reset_at: Tensor | int | Iterable[int] | None, input_ids: Tensor) -> Tensor | None:
    """`reset_at` of the model (token ids, or a bool mask [B, T]) as a bool mask [B, T], None for none.

    Raises:
        ValueError: a mask of another shape.
    """
    if reset_at is None:
        return None
    if isinstance(reset_at, Tensor) and reset_at.dtype == torch.bool:
        if reset_at.shape != input_ids.shape:
            raise ValueError(f"reset_at as a mask must be {list(input_ids.shape)}, got {list(reset_at.shape)}")
        return reset_at.to(input_ids.device)
    ids = torch.as_tensor([reset_at] if isinstance(reset_at, int) else reset_at, device=input_ids.device)
    return torch.isin(input_ids, ids)
