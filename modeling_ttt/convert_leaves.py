"""A tensor of a checkpoint that is read only when asked for: what the readers give and the writers take."""

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

__all__ = ["FLOAT_DTYPES", "Leaf", "blocks", "check_finite", "listed"]

FLOAT_DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
"""The dtypes that parameters may have, by the name they bear in JAX streams and in configurations."""

BLOCK_BYTES = 16 * 2**20


@dataclass(frozen=True)
class Leaf:
    """One tensor of a checkpoint: its name there, what it is, and a function that reads it."""

    name: str
    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[], Tensor]

    @property
    def nbytes(self) -> int:
        """Bytes of its numbers."""
        return torch.Size(self.shape).numel() * self.dtype.itemsize

    def turned(self, turn: Callable[[Tensor], Tensor]) -> "Leaf":
        """The leaf seen through a view such as a transposition."""
        shape = tuple(turn(torch.empty(self.shape, device="meta")).shape)
        return replace(self, shape=shape, read=lambda: turn(self.read()))


def blocks(tensor: Tensor, dtype: torch.dtype) -> Iterator[Tensor]:
    """The tensor in order as contiguous pieces of about 16 MiB in `dtype`, so that turning it needs no second copy."""
    rows = tensor.reshape(1) if tensor.dim() == 0 else tensor
    row_bytes = max(1, rows[:1].numel() * max(dtype.itemsize, tensor.dtype.itemsize))
    step = max(1, BLOCK_BYTES // row_bytes)
    for start in range(0, rows.shape[0], step):
        yield rows[start : start + step].to(dtype).contiguous()


def check_finite(name: str, parts: Iterable[Tensor], where: str) -> None:
    """ValueError, naming the leaf, when one of the pieces holds an infinity or NaN."""
    bad = sum(int((~torch.isfinite(part)).sum()) for part in parts)
    if bad:
        raise ValueError(f"{where}: leaf {name!r} holds {bad} values that are infinite or not a number")


def listed(names: Iterable[str] | Mapping[str, object]) -> str:
    """Names in a message, all of them."""
    return ", ".join(repr(name) for name in sorted(names))
