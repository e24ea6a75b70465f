"""Read documents with a model, a segment at a time: surprisal and plasticity of every token."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

DEFAULT_SEGMENT_LENGTH = 512
# Diagnostics of the inner loop by the name of their column: the field of `outputs.ttt_stats`, and how heads combine.
STATS = {
    "inner_lr": ("lr", "mean"),
    "inner_grad_norm": ("inner_grad_norm", "root of squares"),
    "inner_loss_init": ("loss_init", "sum"),
    "inner_loss_before": ("loss_before", "sum"),
    "inner_loss_after": ("loss_after", "sum"),
    "state_drift": ("state_drift", "root of squares"),
}


@dataclass(frozen=True)
class Reading:
    """One document as the model read it.

    `loss` float32 [T]: surprisal in nats of each token given the ones before, NaN for the first. `plasticity`
    float32 [T, L]: norm of what each token commits per TTT layer, heads combined; None unless asked for. `greedy`
    bool [T]: whether the token is the one that the model finds most likely, False for the first. `stats`: the
    diagnostics in `STATS`, float32 [T, L] each, empty unless asked for.
    """

    loss: np.ndarray
    plasticity: np.ndarray | None
    greedy: np.ndarray
    stats: dict[str, np.ndarray]


@torch.no_grad()
def read_batch(
    model: Any,
    rows: Sequence[np.ndarray],
    *,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    lr_mult: torch.Tensor | None = None,
    plasticity: bool = True,
    stats: bool = False,
) -> list[Reading]:
    """Read several documents (token ids int64 [T_i]) as the rows of one batch, padded on the right.

    The inner state goes from segment to segment in the model's cache, so that logits exist for
    `segment_length` tokens at a time; the result does not depend on it. `lr_mult` (broadcastable to [B, L, H,
    T], T axis 1 or that of the padded batch) multiplies the inner learning rate. Models without TTT layers are read
    with `plasticity=False`. ValueError for ids outside the vocabulary or a model without plasticity.
    """
    if segment_length < 1:
        raise ValueError(f"segment_length must be at least 1, got {segment_length}")
    _check_ids(rows, model.config.vocab_size)
    ids, mask = (tensor.to(model.device) for tensor in _pad(rows))
    padded = not bool(mask.all())
    length = ids.shape[1]
    # Made once: results kept from every segment would lie between the freed logits and fragment the heap.
    loss = torch.full((len(rows), length), float("nan"))
    greedy = torch.zeros(len(rows), length, dtype=torch.bool)
    norms: dict[str, torch.Tensor] = {}
    options = {"output_plasticity": plasticity, "output_ttt_stats": stats} if _has_inner_loop(model) else {}
    if lr_mult is not None:
        lr_mult = lr_mult.to(model.device)
    cache = None
    for start in range(0, length, segment_length):
        stop = min(start + segment_length, length)
        if lr_mult is not None:
            options["ttt_lr_mult"] = lr_mult if lr_mult.shape[-1] == 1 else lr_mult[..., start:stop]
        output = model(
            input_ids=ids[:, start:stop],
            attention_mask=mask[:, :stop] if padded else None,
            past_key_values=cache,
            use_cache=True,
            **options,
        )
        cache = output.past_key_values
        following = ids[:, start + 1 : stop + 1]
        loss[:, start + 1 : stop + 1] = _surprisal(output.logits, following)
        greedy[:, start + 1 : stop + 1] = output.logits[:, : following.shape[1]].argmax(-1).eq(following)
        for name, values in _per_layer(output, plasticity, stats).items():
            if name not in norms:
                norms[name] = torch.zeros(len(rows), length, values.shape[-1])
            norms[name][:, start:stop] = values
    readings = []
    for b, row in enumerate(rows):
        own = {name: values[b, : len(row)].numpy().copy() for name, values in norms.items()}
        written = own.pop("plasticity", None)
        readings.append(
            Reading(loss[b, : len(row)].numpy().copy(), written, greedy[b, : len(row)].numpy().copy(), own)
        )
    return readings


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


def _has_inner_loop(model: Any) -> bool:
    return "ttt" in (getattr(model.config, "layer_types", None) or ())


def _per_layer(output: Any, plasticity: bool, stats: bool) -> dict[str, torch.Tensor]:
    """Plasticity and diagnostics of all layers, float32 [B, t, L] each, heads combined."""
    found = {}
    if plasticity:
        if not getattr(output, "plasticity", None):
            raise ValueError(f"the model gives no plasticity: its output has {sorted(output.keys())}")
        found["plasticity"] = _stack(output.plasticity, "root of squares")
    if stats:
        for name, (field, heads) in STATS.items():
            found[name] = _stack([layer[field] for layer in output.ttt_stats], heads)
    return found


def _stack(layers: Sequence[torch.Tensor], heads: str) -> torch.Tensor:
    """[B, H, t] per layer to [B, t, L]."""
    combine = {"mean": torch.mean, "sum": torch.sum, "root of squares": torch.linalg.vector_norm}[heads]
    # Layers of a model spread over devices answer from their own.
    return torch.stack([combine(layer, dim=1).float().to(layers[0].device) for layer in layers], dim=-1)


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
