"""One forward and backward pass of the outer loop: what a model is told beside its tokens, and what it costs."""

from contextlib import nullcontext
from dataclasses import dataclass
from inspect import signature

import torch
from accelerate import Accelerator
from torch import nn
from torch.nn import functional as F


@dataclass(frozen=True)
class StepOptions:
    """How a model reads its windows.

    `micro_rows`: rows that pass through the model at a time (None: all of them). `document_start`: the token that
    starts a document, where the state is reset and which nothing has to predict (None: documents run into each
    other). `inner_warmup_steps`: steps in which the inner learning rate rises from a tenth to its full value.
    """

    micro_rows: int | None = None
    document_start: int | None = None
    inner_warmup_steps: int = 0

    def __post_init__(self) -> None:
        if self.micro_rows is not None and self.micro_rows < 1:
            raise ValueError(f"micro_rows must be at least 1, got {self.micro_rows}")
        if self.inner_warmup_steps < 0:
            raise ValueError(f"inner_warmup_steps must be at least 0, got {self.inner_warmup_steps}")


class Reader:
    """Passes windows through a model, forwards and backwards, as `options` say."""

    def __init__(self, model: nn.Module, options: StepOptions, accelerator: Accelerator):
        self.model, self.options, self.accelerator = model, options, accelerator
        inner = accelerator.unwrap_model(model)
        self.is_ttt = "ttt_lr_mult" in signature(type(inner).forward).parameters
        if options.inner_warmup_steps and not self.is_ttt:
            raise ValueError(f"inner_warmup_steps needs a TTT model, got a {type(inner).__name__}")

    def gradients(
        self, ids: torch.Tensor, weights: torch.Tensor, total: torch.Tensor, step: int, *, measured: bool
    ) -> tuple[torch.Tensor, float | None]:
        """Add the gradients of sum(weights * losses) / total, and return the losses of tokens 1.. and the plasticity.

        ids int64 and weights float32 [B, T] are the rows of this process, `total` the weight of all processes. The
        losses are float32 [B, T-1]; the plasticity, the mean over layers and tokens, is None unless `measured`.
        """
        processes = self.accelerator.num_processes
        size = min(self.options.micro_rows or len(ids), len(ids))
        losses, plasticity = [], 0.0
        for start in range(0, len(ids), size):
            part = ids[start : start + size]
            last = start + size >= len(ids)
            with nullcontext() if last else self.accelerator.no_sync(self.model):
                outputs = self.model(input_ids=part, use_cache=False, **self._extra(part, step, measured))
                found = token_losses(outputs.logits, part)
                loss = (found * weights[start : start + size, 1:]).sum() / total * processes
                self.accelerator.backward(loss)
            losses.append(found.detach())
            if measured and self.is_ttt:
                plasticity += mean_plasticity(outputs.plasticity) * len(part) / len(ids)
        return torch.cat(losses), plasticity if measured and self.is_ttt else None

    def _extra(self, ids: torch.Tensor, step: int, measured: bool) -> dict:
        extra = {}
        start, warmup = self.options.document_start, self.options.inner_warmup_steps
        if start is not None:
            extra |= {"reset_at": start} if self.is_ttt else {"position_ids": positions_in_document(ids, start)}
        if self.is_ttt:
            extra["output_plasticity"] = measured
        if step < warmup:
            extra["ttt_lr_mult"] = torch.tensor(inner_lr_mult(step, warmup), device=ids.device)
        return extra


def token_losses(logits: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
    """Surprisal in nats of tokens 1.. given the ones before: logits [B, T, V], ids [B, T] -> float32 [B, T-1]."""
    # All positions, the last one with a target nobody reads: a slice of the logits would have to be copied.
    targets = ids.roll(-1, dims=1)
    losses = F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), reduction="none")
    return losses.view_as(ids)[:, :-1]


def positions_in_document(ids: torch.Tensor, start: int) -> torch.Tensor:
    """Position of each token of ids [B, T] behind the last token `start`, or behind the start of its row."""
    columns = torch.arange(ids.shape[1], device=ids.device).expand_as(ids)
    return columns - torch.where(ids == start, columns, 0).cummax(1).values


def inner_lr_mult(step: int, warmup_steps: int) -> float:
    """Factor of the inner learning rate at step `step` (0-based): from 0.1 to 1 in a line, as the official code."""
    return 0.1 + 0.9 * min(1.0, step / warmup_steps) if warmup_steps else 1.0


def mean_plasticity(plasticity: tuple[torch.Tensor, ...]) -> float:
    """Mean over layers and tokens of the write's norm, heads combined as the root of the sum of squares."""
    return float(torch.stack([layer.detach().square().sum(1).sqrt().mean() for layer in plasticity]).mean())
