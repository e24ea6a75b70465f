"""Long calls without gradients run segment by segment, so that what they need beside their outputs does not grow.

A segment is a call that goes on from the one before it, and any split of a text into calls gives the same results.
Whoever watches a submodule expects it to run once per call, so a call with hooks is not cut.
"""

import torch
from torch import Tensor, nn

from .token_grid import TokenGrid

__all__ = ["columns_of", "cut_into_segments", "is_hooked"]

RECORDER = "transformers.utils.output_capturing"

SEGMENT_TOKENS = 1024
"""Tokens of all rows in one segment on a CPU, where a segment's tensors then stay in its caches."""
SEGMENT_TOKENS_ELSEWHERE = 16384
"""The same on other devices, which want larger products."""


def cut_into_segments(model: nn.Module, grid: TokenGrid, capturing: bool) -> list[tuple[slice, TokenGrid]]:
    """Columns and grid of every segment of a call; a single one when gradients, hooks or a compiler need the whole.

    `capturing` says that the library records outputs of submodules or that statistics over the whole call are wanted.
    """
    size = grid.mini_batch_size
    whole = grid.length <= size or capturing or torch.is_grad_enabled() or torch.compiler.is_compiling()
    if whole:  # before anything that walks all modules, which would show in decoding
        return grid.segments(grid.length)
    # Every segment of an offloaded model fetches its weights anew.
    offloaded = any(hasattr(module, "_hf_hook") for module in model.modules())
    tokens = SEGMENT_TOKENS if grid.device.type == "cpu" and not offloaded else SEGMENT_TOKENS_ELSEWHERE
    length = max(1, tokens // (max(1, grid.batch) * size)) * size
    return grid.segments(grid.length if is_hooked(*list(model.modules())[1:]) else length)


def columns_of(lr_mult: Tensor | None, columns: slice) -> Tensor | None:
    """The part of a multiplier, broadcastable to [B, H, T], that belongs to some columns of the call."""
    return lr_mult if lr_mult is None or lr_mult.shape[-1] == 1 else lr_mult[..., columns]


def is_hooked(*modules: nn.Module) -> bool:
    """Some hook runs when one of the modules does; those Transformers leaves behind to record outputs do not count."""
    if nn.modules.module._has_any_global_hook():
        return True
    return any(
        module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or any(getattr(hook, "__module__", "") != RECORDER for hook in module._forward_hooks.values())
        for module in modules
    )
