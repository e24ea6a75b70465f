"""Reads what passes through the taps of TTT layers while a text is read piece by piece; leaves no hook behind."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["hooks", "kept_cache", "mixers", "read_in_pieces"]

PIECE_TOKENS = 2048


def mixers(model: nn.Module) -> list[Any]:
    """The TTT layers of a model in order, known by their taps; ValueError when it has none."""
    found = [module for module in model.modules() if hasattr(module, "tap_readout")]
    if not found:
        raise ValueError(f"{type(model).__name__} has no module with a tap_readout: not a TTT model")
    return found


@contextmanager
def hooks(wanted: Sequence[tuple[nn.Module, Callable[[Tensor], None]]]) -> Iterator[None]:
    """While it lasts each function is shown the output of its module (the first tensor of a tuple).

    All hooks are removed in the end, also after an exception.
    """
    handles = []
    try:
        for module, function in wanted:
            handles.append(module.register_forward_hook(_shown(function)))
        yield
    finally:
        for handle in handles:
            handle.remove()


def _shown(function: Callable[[Tensor], None]):
    def hook(module, args, output):
        function((output[0] if isinstance(output, tuple) else output).detach())

    return hook


@torch.no_grad()
def read_in_pieces(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor | None,
    ttt_lr_mult: Tensor | None,
    border: Tensor | None,
    piece_tokens: int,
    options: Callable[[slice], dict[str, Any]] = lambda piece: {"logits_to_keep": 1},
) -> Iterator[tuple[slice, Any]]:
    """Run a model on rows [B, T] in calls of about `piece_tokens` tokens that follow each other: columns and outputs.

    `border` [B, T] bool marks first tokens of documents; `options` gives further arguments of a call.
    """
    if piece_tokens < 1:
        raise ValueError(f"piece_tokens must be at least 1, got {piece_tokens}")
    rows, length = input_ids.shape
    size, cache = max(1, piece_tokens // rows), None
    for start in range(0, length, size):
        piece = slice(start, min(start + size, length))
        mult = ttt_lr_mult
        if mult is not None and mult.dim() and mult.shape[-1] != 1:
            mult = mult[..., piece]
        outputs = model(
            input_ids=input_ids[:, piece],
            attention_mask=None if attention_mask is None else attention_mask[:, piece],
            reset_at=None if border is None else border[:, piece],
            ttt_lr_mult=mult,
            past_key_values=cache,
            use_cache=True,
            output_plasticity=False,
            **options(piece),
        )
        if piece.stop < length:
            cache = kept_cache(outputs)
        yield piece, outputs


def kept_cache(outputs: Any) -> Any:
    """The cache of a call with `use_cache=True`.

    Raises:
        ValueError: there is none: a model that trains with gradient checkpointing drops it, and the next call would
            read from an empty state.
    """
    if outputs.past_key_values is None:
        raise ValueError("the model gave no cache to go on from: call model.eval() first")
    return outputs.past_key_values
