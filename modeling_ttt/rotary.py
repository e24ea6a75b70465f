"""Rotary position embedding inside the mini-batch: the angle depends on the slot, position mod K, alone."""

import torch
from torch import Tensor

__all__ = ["rotary_table", "rotate"]


def rotary_table(mini_batch_size: int, head_dim: int, theta: float, dtype: torch.dtype, device) -> Tensor:
    """(cos, sin) of every slot and pair of features, [K, f/2, 2].

    Computed afresh in float64 for the call (K * f / 2 numbers), so a model moved to float64 keeps exact angles.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(mini_batch_size, dtype=torch.float64), theta ** (-pairs / head_dim))
    return torch.stack([angles.cos(), angles.sin()], -1).to(device, dtype)


def rotate(x: Tensor, turn: Tensor) -> Tensor:
    """Rotate the feature pairs (2i, 2i + 1) of x [B, T, H, f] by its tokens' angles, `turn` [B or 1, T, 1, f/2, 2]."""
    pairs = x.contiguous().view(*x.shape[:-1], x.shape[-1] // 2, 2)
    if torch.compiler.is_compiling():  # which has no fused kernels for complex numbers
        (a, b), (cos, sin) = pairs.unbind(-1), turn.unbind(-1)
        return torch.stack([a * cos - b * sin, a * sin + b * cos], -1).flatten(-2)
    return torch.view_as_real(torch.view_as_complex(pairs) * torch.view_as_complex(turn)).flatten(-2)
