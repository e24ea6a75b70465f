"""Which inputs raised a number: Captum's input methods on a TTT model through one function.

The number is a logit (`LogitsFromEmbeddings`), the loss of the text (`LossFromEmbeddings`) or how hard the model
learnt from a token (`PlasticityTarget`).
"""

from dataclasses import dataclass
from typing import Any

import torch
from captum.attr import (
    FeatureAblation,
    InputXGradient,
    IntegratedGradients,
    LayerIntegratedGradients,
    Saliency,
)
from torch import Tensor, nn

from interp.captum_targets import LogitsFromEmbeddings, LossFromEmbeddings, PlasticityTarget, as_rows

__all__ = ["METHODS", "InputAttribution", "baseline_embedding", "input_attribution"]

METHODS = {
    "Saliency": Saliency,
    "InputXGradient": InputXGradient,
    "IntegratedGradients": IntegratedGradients,
    "LayerIntegratedGradients": LayerIntegratedGradients,
    "FeatureAblation": FeatureAblation,
}
_WITH_BASELINE = ("IntegratedGradients", "LayerIntegratedGradients", "FeatureAblation")


@dataclass(frozen=True)
class InputAttribution:
    """What Captum gave, and a number per token.

    `values` [B, T, C] is Captum's own tensor. `tokens` [B, T] is its sum over C where the method is additive, the L2
    norm of the gradient for Saliency, and the effect of replacing the whole embedding for FeatureAblation. `delta` [B]
    is Captum's convergence delta (sum of attributions minus the difference to explain), None where there is none.
    `baseline` says what inputs were compared with, None for methods that compare with nothing.
    """

    method: str
    baseline: str | None
    values: Tensor
    tokens: Tensor
    delta: Tensor | None = None

    def top(self, count: int = 10) -> tuple[Tensor, Tensor]:
        """The strongest tokens of every row by size, strongest first: columns [B, n] and their attributions."""
        columns = self.tokens.abs().argsort(dim=1, descending=True, stable=True)[:, :count]
        return columns, self.tokens.gather(1, columns)


def input_attribution(
    target: LogitsFromEmbeddings | LossFromEmbeddings | PlasticityTarget,
    input_ids: Tensor,
    method: str = "IntegratedGradients",
    *,
    baseline: str | int | Tensor | None = None,
    layer: nn.Module | None = None,
    **options: Any,
) -> InputAttribution:
    """Attribute a number to the input tokens [T] or [B, T] with one of `METHODS`.

    `baseline` is what an absent input is, for the methods that need one: "mean" (the mean embedding of the
    vocabulary), the id of a neutral token, or embeddings that broadcast to [B, T, C]. Zeros are a poor one: the first
    norm has no value there. Default: "mean", for LayerIntegratedGradients, which knows ids alone, token 0.
    `layer` is that method's layer (default: the embedding). `options` go to Captum's `attribute` (`n_steps`, `method`,
    `internal_batch_size`, `perturbations_per_eval`, ...). Nothing is left on the model: no gradient, hook or flag.

    Raises:
        ValueError: an argument does not fit the method.
    """
    if method not in METHODS:
        raise ValueError(f"method must be one of {sorted(METHODS)}, got {method!r}")
    if baseline is not None and method not in _WITH_BASELINE:
        raise ValueError(f"{method} compares with no baseline, got {baseline!r}")
    if layer is not None and method != "LayerIntegratedGradients":
        raise ValueError(f"layer is for LayerIntegratedGradients, got one with {method}")
    refused = sorted({"additional_forward_args", "return_convergence_delta"} & set(options))
    if refused:
        raise ValueError(f"{refused} are set here: the number to explain is the module passed as target")
    ids, _ = as_rows(input_ids)
    if method == "LayerIntegratedGradients":
        return _of_layer(target, ids, 0 if baseline is None else baseline, layer, options)
    with torch.no_grad():
        embeddings = target.model.get_input_embeddings()(ids).detach()
    if method in ("Saliency", "InputXGradient"):
        options = options | ({"abs": False} if method == "Saliency" else {})
        with torch.enable_grad():
            values = METHODS[method](target).attribute(embeddings.requires_grad_(), **options).detach()
        tokens = values.norm(dim=-1) if method == "Saliency" else values.sum(-1)
        return InputAttribution(method, None, values, tokens)
    named, baselines = baseline_embedding(target.model, "mean" if baseline is None else baseline)
    baselines = baselines.to(embeddings).expand_as(embeddings)
    if method == "FeatureAblation":
        options.setdefault("feature_mask", torch.arange(ids.shape[1], device=ids.device)[None, :, None])
        values = FeatureAblation(target).attribute(embeddings, baselines=baselines, **options).detach()
        return InputAttribution(method, named, values, values[..., 0])
    with torch.enable_grad():
        values, delta = IntegratedGradients(target).attribute(
            embeddings, baselines=baselines, return_convergence_delta=True, **options
        )
    return InputAttribution(method, named, values.detach(), values.detach().sum(-1), delta.detach())


def baseline_embedding(model: Any, baseline: str | int | Tensor) -> tuple[str, Tensor]:
    """A baseline's name and its embedding [1, 1, C] (or the tensor as it is): "mean", a token id, or embeddings."""
    if isinstance(baseline, Tensor):
        return f"embeddings {list(baseline.shape)}", baseline
    vocabulary, embed = model.config.vocab_size, model.get_input_embeddings()
    device = model.device if model.device.type != "meta" else "cpu"
    if isinstance(baseline, int) and not isinstance(baseline, bool):
        _check_token(baseline, vocabulary)
        with torch.no_grad():
            return f"token {baseline}", embed(torch.tensor([[baseline]], device=device))
    if baseline != "mean":
        raise ValueError(f"baseline must be 'mean', a token id or embeddings, got {baseline!r}")
    with torch.no_grad():  # called, not read: an offloaded weight is elsewhere
        total = sum(embed(ids).to(torch.float64).sum(0) for ids in torch.arange(vocabulary, device=device).split(8192))
    return "mean embedding", (total / vocabulary)[None, None]


def _check_token(token: int, vocabulary: int) -> None:
    if not 0 <= token < vocabulary:
        raise ValueError(f"a baseline token must be in [0, {vocabulary}), got {token}")


def _of_layer(target, ids: Tensor, baseline, layer: nn.Module | None, options: dict) -> InputAttribution:
    if isinstance(baseline, bool) or not isinstance(baseline, int):
        raise ValueError(f"LayerIntegratedGradients takes a token id as baseline, got {baseline!r}")
    _check_token(baseline, target.model.config.vocab_size)
    embed = target.model.get_input_embeddings()
    method = LayerIntegratedGradients(lambda tokens: target(embed(tokens)), embed if layer is None else layer)
    with torch.enable_grad():
        values, delta = method.attribute(
            ids, baselines=torch.full_like(ids, baseline), return_convergence_delta=True, **options
        )
    if not isinstance(values, Tensor):
        raise ValueError(f"the output of layer {type(layer).__name__} must be one tensor, got {len(values)}")
    values = values.detach()
    return InputAttribution("LayerIntegratedGradients", f"token {baseline}", values, values.sum(-1), delta.detach())
