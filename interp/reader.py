"""Read documents with a model, a segment at a time: surprisal and plasticity of every token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DEFAULT_SEGMENT_LENGTH = 512


@dataclass(frozen=True)
class Reading:
    """One document as the model read it.

    `loss` float32 [T]: surprisal in nats of each token given the ones before, NaN for the first. `plasticity`
    float32 [T, L]: norm of what each token commits per TTT layer, heads combined; None unless asked for.
    """

    loss: np.ndarray
    plasticity: np.ndarray | None


@torch.no_grad()
def read_batch(
    model: Any,
    rows: Sequence[np.ndarray],
    *,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    lr_mult: torch.Tensor | None = None,
    plasticity: bool = True,
) -> list[Reading]:
    """Read several documents (token ids int64 [T_i]) as the rows of one batch, padded on the right.

    The inner state goes from segment to segment in the model's cache, so that logits exist for
    `segment_length` tokens at a time; the result does not depend on it. `lr_mult` (broadcastable to [B, L, H,
    T], T axis 1) multiplies the inner learning rate. ValueError for ids outside the vocabulary or a model
    without plasticity.
    """
    if segment_length < 1:
        raise ValueError(f"segment_length must be at least 1, got {segment_length}")
    _check_ids(rows, model.config.vocab_size)
    ids, mask = (tensor.to(model.device) for tensor in _pad(rows))
    padded = not bool(mask.all())
    length = ids.shape[1]
    # Made once: results kept from every segment would lie between the freed logits and fragment the heap.
    loss = torch.full((len(rows), length), float("nan"))
    norms: torch.Tensor | None = None
    options = {} if lr_mult is None else {"ttt_lr_mult": lr_mult.to(model.device)}
    cache = None
    for start in range(0, length, segment_length):
        stop = min(start + segment_length, length)
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop] if padded else None,
            past_key_values=cache,
            use_cache=True,
            output_plasticity=plasticity,
            **options,
        )
        cache = output.past_key_values
        loss[:, start + 1 : stop + 1] = _surprisal(output.logits, ids[:, start + 1 : stop + 1])
        if plasticity:
            combined = _combined_heads(output)
            if norms is None:
                norms = torch.zeros(len(rows), length, combined.shape[-1])
            norms[:, start:stop] = combined
    return [
        Reading(
            loss[b, : len(row)].numpy().copy(),
            None if norms is None else norms[b, : len(row)].numpy().copy(),
        )
        for b, row in enumerate(rows)
    ]


@contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Set every module to evaluation for the block and give each its own mode back afterwards."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


def _surprisal(logits: torch.Tensor, following: torch.Tensor) -> torch.Tensor:
    """Surprisal float32 [B, t] of the tokens that follow; at the end of the text `following` is one short."""
    losses = []
    for row, target in zip(logits[:, : following.shape[1]], following, strict=True):
        row = row if row.dtype == torch.float64 else row.float()
        losses.append(torch.nn.functional.cross_entropy(row, target, reduction="none").float())
    return torch.stack(losses)


def _combined_heads(output: Any) -> torch.Tensor:
    """Plasticity of all layers, float32 [B, t, L]."""
    plasticity = getattr(output, "plasticity", None)
    if not plasticity:
        raise ValueError(f"the model gives no plasticity: its output has {sorted(output.keys())}")
    # Layers of a model spread over devices answer from their own.
    combined = [layer.square().sum(1).sqrt().float().to(plasticity[0].device) for layer in plasticity]
    return torch.stack(combined, dim=-1)


def _pad(rows: Sequence[np.ndarray]) -> tuple[torch.Tensor, torch.Tensor]:
    longest = max(map(len, rows))
    ids = torch.zeros(len(rows), longest, dtype=torch.int64)
    mask = torch.zeros(len(rows), longest, dtype=torch.int64)
    for b, row in enumerate(rows):
        ids[b, : len(row)] = torch.as_tensor(row)
        mask[b, : len(row)] = 1
    return ids, mask


def _check_ids(rows: Sequence[np.ndarray], vocab_size: int) -> None:
    low, high = min(int(row.min()) for row in rows), max(int(row.max()) for row in rows)
    if low < 0 or high >= vocab_size:
        wrong = low if low < 0 else high
        raise ValueError(f"token id {wrong} is outside the model's vocabulary of {vocab_size}: another tokenizer?")
