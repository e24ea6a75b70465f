"""What an attribution explains, as modules that give one number per row: a logit, a loss, how hard the model learns.

They read input embeddings [N, T, C], so that any Captum method that perturbs or differentiates an input takes them.
Rows beyond the B documents are further versions of them, as Captum makes them: row n belongs to document n % B.
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from operator import index
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp.freezing import ttt_layers

__all__ = ["LogitTarget", "LogitsFromEmbeddings", "LossFromEmbeddings", "PlasticityTarget", "as_rows"]


def plain_numbers(name: str, value: Any) -> int | tuple[int, ...]:
    """An integer, or a tuple of them, also from NumPy and PyTorch; TypeError for anything else."""
    found = value.tolist() if hasattr(value, "tolist") else value
    try:
        return tuple(map(index, found)) if isinstance(found, Iterable) else index(found)
    except TypeError:
        raise TypeError(f"{name} must be an integer or a sequence of them, got {value!r}") from None


def as_rows(input_ids: Tensor, attention_mask: Tensor | None = None) -> tuple[Tensor, Tensor | None]:
    """Token ids [T] or [B, T] as [B, T], and the mask in the same shape; ValueError for anything else."""
    ids = torch.as_tensor(input_ids)
    ids = ids[None] if ids.dim() == 1 else ids
    if ids.dim() != 2 or ids.shape[1] == 0 or ids.is_floating_point():
        raise ValueError(f"input_ids must be token ids [tokens] or [batch, tokens], got {list(ids.shape)} {ids.dtype}")
    if attention_mask is None:
        return ids, None
    mask = attention_mask[None] if attention_mask.dim() == 1 else attention_mask
    if mask.shape != ids.shape:
        raise ValueError(f"attention_mask must be {list(ids.shape)} like input_ids, got {list(mask.shape)}")
    return ids, mask


@dataclass(frozen=True)
class LogitTarget:
    """One number out of the logits at one position: a logit, a difference of two, or a logit minus a mean.

    `position` is the column whose next-token logits are read (negative: from the end), one for all documents or one
    each; `target` a token id or one each; `contrast` None, a token id, or ids whose mean logit is taken off. Numbers
    of NumPy and PyTorch do; they are kept as integers and tuples.
    """

    position: int | Sequence[int]
    target: int | Sequence[int]
    contrast: int | Sequence[int] | None = None

    def __post_init__(self):
        for name in ("position", "target", "contrast"):
            value = getattr(self, name)
            object.__setattr__(self, name, None if value is None else plain_numbers(name, value))

    def of(self, input_ids: Tensor, attention_mask: Tensor | None) -> Tensor:
        """The position of every document [B, T] as columns, int64 [B].

        Raises:
            ValueError: it lies outside the text or on padding, or there is not a token id for each document.
        """
        columns = self.columns(*input_ids.shape)
        check_real(self.position, columns, attention_mask)
        if not isinstance(self.target, int) and len(self.target) not in (1, len(input_ids)):
            raise ValueError(f"target must be one token id or {len(input_ids)} of them, got {self.target}")
        return columns

    def columns(self, batch: int, length: int) -> Tensor:
        """The position of every document as columns, int64 [B]."""
        return per_document("position", self.position, batch, length)

    def read(self, logits: Tensor) -> Tensor:
        """Logits [N, V] at the position of each row -> [N]; row n belongs to document n % B."""
        rows, vocabulary = logits.shape
        chosen = torch.tensor([self.target] if isinstance(self.target, int) else list(self.target))
        contrast = [self.contrast] if isinstance(self.contrast, int) else list(self.contrast or [])
        ids = [*chosen.tolist(), *contrast]
        if self.contrast is not None and not contrast:
            raise ValueError("contrast must hold a token id or be None, got ()")
        if any(not 0 <= i < vocabulary for i in ids):
            raise ValueError(f"target and contrast must be token ids in [0, {vocabulary}), got {ids}")
        if rows % len(chosen):
            raise ValueError(f"target must hold one token id or one per document, got {len(chosen)} for {rows} rows")
        chosen = chosen.repeat(rows // len(chosen)).to(logits.device)
        value = logits.gather(1, chosen[:, None])[:, 0]
        if contrast:
            value = value - logits[:, torch.tensor(contrast, device=logits.device)].mean(1)
        return value


def per_document(name: str, value: int | Sequence[int], batch: int, length: int) -> Tensor:
    """One column per document, int64 [B], from a number for all or one each; negative ones count from the end."""
    columns = torch.tensor([value] * batch if isinstance(value, int) else list(value))
    if columns.shape != (batch,) or ((columns < -length) | (columns >= length)).any():
        raise ValueError(f"{name} must be one column in [-{length}, {length}) or {batch} of them, got {value}")
    return columns % length


def check_real(position: Any, columns: Tensor, attention_mask: Tensor | None) -> None:
    """ValueError when one of the columns [N], a row each, is masked; `position` is what the caller gave."""
    if attention_mask is None:
        return
    masked = (attention_mask.cpu() == 0).gather(1, columns.cpu()[:, None])[:, 0]
    if bool(masked.any()):
        raise ValueError(f"position {position} is a padded column in row {int(masked.long().argmax())}")


def check_multiplier(name: str, value: Tensor | None, length: int) -> None:
    """ValueError for a multiplier whose last axis is neither 1 nor the T tokens of the text."""
    if value is not None and value.dim() and value.shape[-1] not in (1, length):
        raise ValueError(f"{name} must be broadcastable to [batch, layers, heads, {length}], got {list(value.shape)}")


class _FromEmbeddings(nn.Module):
    """Runs a model on embeddings [N, T, C] of B documents, with their mask and multiplier repeated."""

    def __init__(self, model: nn.Module, attention_mask: Tensor | None, ttt_lr_mult: Tensor | None):
        super().__init__()
        # Not a submodule: whoever walks, moves or trains this module leaves the model alone.
        self._model = (model,)
        self.attention_mask, self.ttt_lr_mult = attention_mask, ttt_lr_mult

    @property
    def model(self) -> Any:
        """The model that is explained."""
        return self._model[0]

    def run(self, embeddings: Tensor, **options: Any) -> Any:
        """The outputs of the model."""
        if embeddings.dim() != 3:
            raise ValueError(f"input embeddings must be [rows, tokens, width], got {list(embeddings.shape)}")
        rows = embeddings.shape[0]
        return self.model(
            inputs_embeds=embeddings,
            attention_mask=repeat_rows("attention_mask", self.attention_mask, rows),
            ttt_lr_mult=repeat_multiplier(self.ttt_lr_mult, rows),
            use_cache=False,
            **options,
        )


def repeat_rows(name: str, value: Tensor | None, rows: int) -> Tensor | None:
    """A tensor [B, ...] of B documents repeated to N rows, document by document."""
    if value is None:
        return None
    if rows % value.shape[0]:
        raise ValueError(f"{name} has {value.shape[0]} rows, which does not divide the {rows} rows of the call")
    return value.repeat(rows // value.shape[0], *[1] * (value.dim() - 1))


def repeat_multiplier(value: Tensor | None, rows: int) -> Tensor | None:
    """A multiplier for B documents, broadcastable to [B, L, H, T], for N rows."""
    if value is None or value.dim() < 4 or value.shape[0] == 1:
        return value
    return repeat_rows("ttt_lr_mult", value, rows)


class LogitsFromEmbeddings(_FromEmbeddings):
    """A logit (`target`, a `LogitTarget`) as a function of the input embeddings, [N, T, C] -> [N]."""

    def __init__(
        self,
        model: nn.Module,
        target: LogitTarget,
        *,
        attention_mask: Tensor | None = None,
        ttt_lr_mult: Tensor | None = None,
    ):
        super().__init__(model, attention_mask, ttt_lr_mult)
        self.target = target

    def forward(self, embeddings: Tensor) -> Tensor:
        """The number of every row."""
        rows, length = embeddings.shape[:2]
        documents = rows if isinstance(self.target.position, int) else len(self.target.position)
        columns = self.target.columns(documents, length)
        columns = repeat_rows("position", columns[:, None], rows).to(embeddings.device)
        check_real(self.target.position, columns[:, 0], repeat_rows("attention_mask", self.attention_mask, rows))
        outputs = self.run(embeddings, logits_to_keep=columns, output_plasticity=False)
        return self.target.read(outputs.logits[:, 0])


class LossFromEmbeddings(_FromEmbeddings):
    """The mean surprisal of a text's tokens (nats per token) as a function of its embeddings, [N, T, C] -> [N].

    `labels` [T] or [B, T] are the tokens that were read, -100 for those that shall not count; each is predicted from
    the ones before it, so the first never counts. Masked tokens do not count either.

    Raises:
        ValueError: a text has no token that counts.
    """

    def __init__(
        self,
        model: nn.Module,
        labels: Tensor,
        *,
        attention_mask: Tensor | None = None,
        ttt_lr_mult: Tensor | None = None,
    ):
        labels, attention_mask = as_rows(labels, attention_mask)
        super().__init__(model, attention_mask, ttt_lr_mult)
        told = labels[:, 1:]
        if attention_mask is not None:
            # A token counts when it and some token before it are real.
            seen = attention_mask.cumsum(1)[:, :-1] > 0
            told = told.masked_fill(~(seen & (attention_mask[:, 1:] != 0)), -100)
        if not bool((told != -100).any(1).all()):
            raise ValueError("labels must hold a token that counts behind the first in every row")
        self.told = told

    def forward(self, embeddings: Tensor) -> Tensor:
        """The mean surprisal of every row."""
        logits = self.run(embeddings, output_plasticity=False).logits[:, :-1]
        logits = logits if logits.dtype == torch.float64 else logits.float()
        told = repeat_rows("labels", self.told, len(logits)).to(logits.device)
        losses = F.cross_entropy(logits.transpose(1, 2), told, reduction="none", ignore_index=-100)
        return losses.sum(1) / (told != -100).sum(1)


class PlasticityTarget(_FromEmbeddings):
    """How hard the model learns from the token in column `position`, as a function of embeddings, [N, T, C] -> [N].

    The plasticity of chosen layers (absolute indices) and heads, None for all, put together as the root of the sum of
    squares. Tokens behind the position have no part in it. It takes no second backward pass: the inner gradient stands
    in the graph as it is.
    """

    def __init__(
        self,
        model: nn.Module,
        position: int | Sequence[int],
        layers: Sequence[int] | None = None,
        heads: Sequence[int] | None = None,
        *,
        attention_mask: Tensor | None = None,
        ttt_lr_mult: Tensor | None = None,
    ):
        super().__init__(model, attention_mask, ttt_lr_mult)
        self.position = plain_numbers("position", position)
        self.layers, self.heads = choose_writes(model.config, layers, heads)

    def forward(self, embeddings: Tensor) -> Tensor:
        """The plasticity of every row."""
        rows, length = embeddings.shape[:2]
        documents = rows if isinstance(self.position, int) else len(self.position)
        columns = per_document("position", self.position, documents, length)
        columns = repeat_rows("position", columns[:, None], rows)[:, 0].to(embeddings.device)
        check_real(self.position, columns, repeat_rows("attention_mask", self.attention_mask, rows))
        plasticity = self.run(embeddings, output_plasticity=True).plasticity
        row = torch.arange(rows, device=columns.device)
        found = [plasticity[i].to(columns.device)[row, :, columns][:, self.heads] for i in self.layers]
        return torch.cat(found, 1).square().sum(1).sqrt()


def choose_writes(
    config: Any, layers: Sequence[int] | None = None, heads: Sequence[int] | None = None
) -> tuple[list[int], list[int]]:
    """Chosen layers as places among the TTT layers, and heads; None takes all; ValueError for what is not there."""
    present, count = ttt_layers(config), config.num_attention_heads
    layers = present if layers is None else list(layers)
    heads = list(range(count)) if heads is None else list(heads)
    if not layers or set(layers) - set(present):
        raise ValueError(f"layers must be some of the TTT layers {present}, got {layers}")
    if not heads or set(heads) - set(range(count)):
        raise ValueError(f"heads must be some of 0 to {count - 1}, got {heads}")
    return [present.index(i) for i in layers], heads
