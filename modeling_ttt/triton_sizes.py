"""Tile sizes, groups and warps of the Triton kernels, from fixed tables; needs no Triton, so shapes can be traced.

The tables are what the compiler's register and spill counts on sm_80 and sm_90 asked for: tuning at run time would let
results depend on timing.
"""

import torch

__all__ = ["MLP_TILE", "PRECISIONS", "group_size", "group_tokens", "stages", "tile", "warps"]

PRECISIONS = {"ieee": 0, "tf32": 1, "bf16": 2}
MLP_TILE = 64
"""Columns of the inner width that the kernels of TTT-MLP take at a time."""


def tile(size: int) -> int:
    """The side of the tile that holds `size` rows: a power of two that the matrix units take."""
    return max(16, 1 << (size - 1).bit_length())


def group_size(mini_batch_size: int, mini_batches: int, resets: bool, head_dim: int, precision: str, device) -> int:
    """Mini-batches per group, which one program of the parallel kernels holds; never across a restart from W_0."""
    if resets or mini_batches == 1:
        return 1
    # The interpreter on the CPU counts as Hopper.
    sm = torch.cuda.get_device_capability(device)[0] * 10 if device.type == "cuda" else 90
    return max(1, group_tokens(head_dim, precision, sm) // mini_batch_size)


def group_tokens(head_dim: int, precision: str, sm: int) -> int:
    """Tokens of a group on a GPU of compute capability `sm` (80, 90).

    Exact float32 products have no matrix units, and GPUs other than Hopper and Blackwell for data
    centres have less shared memory or take operands from registers: both hold less.
    """
    if precision == "ieee":
        return 32 if head_dim <= 64 else 16
    return 64 if 90 <= sm < 120 else 32


def warps(kernel: str, head_dim: int, mini_batch_size: int, precision: str) -> int:
    """Warps per program of a kernel: "chain", "read", "backward", "norm" or "mlp_chain", "mlp_read"."""
    wide = tile(head_dim) > 64
    if kernel == "chain":
        return 8 if wide or tile(mini_batch_size) > 16 or precision == "ieee" else 4
    return 4 if kernel in ("read", "norm") and not wide and precision != "ieee" else 8


def stages(kernel: str) -> int:
    """Software stages: the serial chain of TTT-Linear loads the next mini-batch while it works on this one."""
    return 2 if kernel == "chain" else 1
