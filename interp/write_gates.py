"""Every write of a document as an input to be attributed to: its learning rate is multiplied by a gate.

1 is the model as it is, 0 a write that never happened. `WriteGateModel` is a function of the gates alone, which any
Captum perturbation or gradient method takes; `gate_gradient` and `gate_integrated_gradients` are the two estimators
that need no loop over tokens.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.captum_targets import (
    LogitTarget,
    as_rows,
    check_multiplier,
    choose_writes,
    repeat_multiplier,
    repeat_rows,
)

__all__ = ["WriteGateModel", "gate_gradient", "gate_integrated_gradients", "span_features", "span_gates"]

Spans = Sequence[tuple[int, int]]


class WriteGateModel(nn.Module):
    """One number per row (`target`, a `LogitTarget`) as a function of write gates.

    Gates are [N, T], [N, L, T] (no head axis) or [N, L, H, T], any of L, H being 1; the result is [N]. Several
    documents [B, T] make rows in turn: row n belongs to document n % B, as Captum repeats its inputs. `base` is a
    multiplier that holds besides, broadcastable to [B, L, H, T]. Columns behind the last position are not run: their
    writes cannot count. The model is not a submodule and none of its parameters gets a gradient.

    Raises:
        ValueError: ids, mask, position, target or gates do not fit.
    """

    def __init__(
        self,
        model: nn.Module,
        input_ids: Tensor,
        target: LogitTarget,
        *,
        attention_mask: Tensor | None = None,
        base: Tensor | None = None,
    ):
        super().__init__()
        ids, mask = as_rows(input_ids, attention_mask)
        self._model, self.target, self.base = (model,), target, base
        choose_writes(model.config)  # refuses a model without TTT layers
        self.documents, self.length = ids.shape
        self.position = target.of(ids, mask)
        check_multiplier("base", base, self.length)
        used = int(self.position.max()) + 1
        self.input_ids, self.attention_mask = ids[:, :used], None if mask is None else mask[:, :used]

    @property
    def model(self) -> Any:
        """The model that is explained."""
        return self._model[0]

    def open_gates(self, dtype: torch.dtype | None = None) -> Tensor:
        """Gates of the model as it is, ones [B, L, H, T]; float64 for a float64 model, else float32."""
        layers, heads = choose_writes(self.model.config)
        dtype = dtype or (torch.float64 if self.model.dtype == torch.float64 else torch.float32)
        return torch.ones(self.documents, len(layers), len(heads), self.length, dtype=dtype)

    def forward(self, gates: Tensor) -> Tensor:
        """The number of every row."""
        if gates.dim() not in (2, 3, 4) or gates.shape[-1] != self.length or gates.shape[0] % self.documents:
            raise ValueError(
                f"gates must be [rows, {self.length}] or [rows, layers, heads, {self.length}] with rows a multiple of "
                f"{self.documents}, got {list(gates.shape)}"
            )
        rows, used = gates.shape[0], self.input_ids.shape[1]
        shape = {2: (1, 1), 3: (gates.shape[1], 1), 4: gates.shape[1:3]}[gates.dim()]
        mult = gates.reshape(rows, *shape, self.length)[..., :used]
        if self.base is not None:
            base = repeat_multiplier(self.base, rows)
            mult = mult * (base if base.shape[-1:] in ((), (1,)) else base[..., :used]).to(mult)
        outputs = self.model(
            input_ids=repeat_rows("input_ids", self.input_ids, rows),
            attention_mask=repeat_rows("attention_mask", self.attention_mask, rows),
            ttt_lr_mult=mult,
            logits_to_keep=repeat_rows("position", self.position[:, None], rows).to(self.input_ids.device),
            use_cache=False,
            output_plasticity=False,
        )
        return self.target.read(outputs.logits[:, 0])


def gate_gradient(
    model: nn.Module,
    input_ids: Tensor,
    target: LogitTarget,
    *,
    attention_mask: Tensor | None = None,
    base: Tensor | None = None,
) -> Tensor:
    """Derivative of the target by every write's gate, [B, L, H, T]: what a little less of the write would do.

    All paths count, those through later writes too; one backward pass for all writes. Arguments as for
    `WriteGateModel`.
    """
    gated = WriteGateModel(model, input_ids, target, attention_mask=attention_mask, base=base)
    return _gradient(gated, gated.open_gates())[0]


def gate_integrated_gradients(
    model: nn.Module,
    input_ids: Tensor,
    target: LogitTarget,
    *,
    n_steps: int = 64,
    baseline: float = 0.0,
    rows: int = 8,
    attention_mask: Tensor | None = None,
    base: Tensor | None = None,
    progress: bool = False,
) -> tuple[Tensor, Tensor]:
    """Integrated gradients over the gates from `baseline` to 1: attributions [B, L, H, T] and their error [B].

    The attributions of a document sum to target(all gates 1) - target(all at `baseline`), up to the returned delta
    (sum minus difference). Gauss-Legendre nodes, in float64: the target jumps for gates near 0, where equal steps do
    badly. `rows` nodes of all documents run in one call. Other arguments as for `WriteGateModel`.
    """
    if n_steps < 1 or rows < 1:
        raise ValueError(f"n_steps and rows must be at least 1, got {n_steps} and {rows}")
    gated = WriteGateModel(model, input_ids, target, attention_mask=attention_mask, base=base)
    nodes, weights = (torch.from_numpy(x) / 2 for x in np.polynomial.legendre.leggauss(n_steps))
    ones = gated.open_gates()
    change = 1 - baseline
    total = torch.zeros_like(ones, dtype=torch.float64)
    batches = list(zip((nodes + 0.5).split(rows), weights.split(rows), strict=True))
    for node, weight in tqdm(batches, unit="batch", disable=not progress):
        gates = torch.cat([ones * (baseline + change * x) for x in node.tolist()])
        gradient = _gradient(gated, gates)[0].double().view(len(node), *ones.shape)
        total += (gradient * weight.view(-1, 1, 1, 1, 1)).sum(0)
    total = total * change
    with torch.no_grad():
        ends = [gated(ones * x).double().cpu() for x in (baseline, 1.0)]
    delta = total.sum((1, 2, 3)) - (ends[1] - ends[0])
    return total.to(ones), delta


def span_gates(length: int, spans: Spans, value: float = 0.0, dtype: torch.dtype = torch.float32) -> Tensor:
    """Gates [1, T] with `value` at the tokens of some spans (first, one past the last) and 1 elsewhere."""
    gates = torch.ones(1, length, dtype=dtype)
    for first, end in checked_spans(spans, length):
        gates[:, first:end] = value
    return gates


def span_features(length: int, spans: Spans) -> Tensor:
    """The `feature_mask` of Captum's perturbation methods, int64 [1, T]: span i is feature i + 1, all others 0.

    Raises:
        ValueError: spans overlap, so that a token would belong to two features.
    """
    features = torch.zeros(1, length, dtype=torch.long)
    for i, (first, end) in enumerate(checked_spans(spans, length), start=1):
        if features[:, first:end].any():
            raise ValueError(f"spans must not overlap to be features, ({first}, {end}) does")
        features[:, first:end] = i
    return features


def checked_spans(spans: Spans, length: int) -> list[tuple[int, int]]:
    """Spans as pairs of numbers; ValueError for an empty one or one outside the text."""
    spans = [(int(first), int(end)) for first, end in spans]
    for first, end in spans:
        if not 0 <= first < end <= length:
            raise ValueError(f"a span is (first token, one past the last) within 0 to {length}, got ({first}, {end})")
    return spans


def _gradient(gated: WriteGateModel, gates: Tensor) -> tuple[Tensor, Tensor]:
    """Gradient of every row's own number by its gates, and the numbers; nothing else gets a gradient."""
    with torch.enable_grad():
        gates = gates.detach().requires_grad_()
        values = gated(gates)
        gradient = torch.autograd.grad(values.sum(), gates)[0]
    return gradient.detach().cpu(), values.detach()
