"""Rotary position embedding inside the mini-batch: the angle depends on the slot, position mod K, alone."""

import torch
from torch import Tensor

__all__ = ["rotary_table", "rotate"]


def rotary_table(
    mini_batch_size: int, head_dim: int, theta: float, dtype: torch.dtype, device
) -> tuple[Tensor, Tensor]:
    """cos and sin of every slot and pair of features, each [K, f/2].

    Computed afresh in float64 for the call (K * f / 2 numbers), so a model moved to float64 keeps exact angles.
    """
    pairs = torch.arange(0, head_dim, 2, dtype=torch.float64)
    angles = torch.outer(torch.arange(mini_batch_size, dtype=torch.float64), theta ** (-pairs / head_dim))
    return angles.cos().to(device, dtype), angles.sin().to(device, dtype)


def rotate(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate the feature pairs (2i, 2i + 1) of x [B, H, T, f] by its tokens' angles, cos and sin [B or 1, T, f/2]."""
    even, odd = x.unflatten(-1, (-1, 2)).unbind(-1)
    cos, sin = cos[:, None], sin[:, None]  # over heads
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), -1).flatten(-2)
