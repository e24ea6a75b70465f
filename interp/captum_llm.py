"""Captum's attribution of generated text, made right for models that learn while they read.

With its own defaults Captum feeds the whole prompt again on top of the cache (it slices by `cache_position`, current
Transformers by `next_sequence_length`), so that a TTT model would learn the prompt twice. No error says so.
"""

from collections.abc import Mapping
from typing import Any

from captum.attr import (
    InterpretableInput,
    LLMAttribution,
    LLMAttributionResult,
    LLMGradientAttribution,
)
from torch import Tensor

from interp.freezing import ttt_layers

__all__ = ["GradientTextAttribution", "PerturbationTextAttribution", "TextAttributionResult", "text_attribution"]


class TextAttributionResult(LLMAttributionResult):
    """Captum's result; `seq_attr_dict` keeps repeated tokens apart: its keys are "place token"."""

    @property
    def seq_attr_dict(self) -> dict[str, float]:
        """Attribution of every input by "place token", in order."""
        values = self.seq_attr.cpu().tolist()
        return {f"{i} {token}": v for i, (token, v) in enumerate(zip(self.input_tokens, values, strict=True))}


class PerturbationTextAttribution(LLMAttribution):
    """`LLMAttribution` without the cached path: prompt and target run in one forward pass each time.

    For a TTT model one pass is what token by token would give. Attributions are float32, as Captum keeps them.
    """

    def attribute(
        self,
        inp: InterpretableInput,
        target: str | Tensor | None = None,
        *,
        use_cached_outputs: bool = False,
        forward_in_tokens: bool = False,
        **options: Any,
    ) -> TextAttributionResult:
        """As `LLMAttribution.attribute`; ValueError for `use_cached_outputs=True` and for more than one row a call."""
        if use_cached_outputs:
            raise ValueError(
                "use_cached_outputs=True is refused: Captum feeds the whole prompt again on top of the cache, and the "
                "model would learn it twice"
            )
        if options.get("perturbations_per_eval", 1) != 1:
            raise ValueError(
                "perturbations_per_eval must be 1: Captum reads the first row of a batch of texts only, got "
                f"{options['perturbations_per_eval']}"
            )
        _check_target(target)
        found = super().attribute(
            inp, target, use_cached_outputs=False, forward_in_tokens=forward_in_tokens, **options
        )
        return _apart(found)


class GradientTextAttribution(LLMGradientAttribution):
    """`LLMGradientAttribution` whose result keeps repeated tokens apart; it has no cached path."""

    def attribute(
        self, inp: InterpretableInput, target: str | Tensor | None = None, **options: Any
    ) -> TextAttributionResult:
        """As `LLMGradientAttribution.attribute`."""
        _check_target(target)
        return _apart(super().attribute(inp, target, **options))


def text_attribution(
    method: Any, tokenizer: Any, attr_target: str = "log_prob"
) -> PerturbationTextAttribution | GradientTextAttribution:
    """Wrap a Captum method made with a TTT model, such as `FeatureAblation(model)`.

    Takes the methods of `LLMAttribution` and of `LLMGradientAttribution`; the latter explain the log probability only.

    Raises:
        ValueError: Captum has no text attribution for the method, it is no TTT model, or `attr_target` is unknown.
    """
    if attr_target not in ("log_prob", "prob"):
        raise ValueError(f"attr_target must be 'log_prob' or 'prob', got {attr_target!r}")
    model = getattr(method, "forward_func", None)
    if not hasattr(model, "config"):
        raise ValueError(f"method must be made with the model itself, such as FeatureAblation(model), got {method!r}")
    ttt_layers(model.config)
    if isinstance(method, LLMAttribution.SUPPORTED_METHODS):
        return PerturbationTextAttribution(method, tokenizer, attr_target)
    if not isinstance(method, LLMGradientAttribution.SUPPORTED_METHODS):
        known = [c.__name__ for c in (*LLMAttribution.SUPPORTED_METHODS, *LLMGradientAttribution.SUPPORTED_METHODS)]
        raise ValueError(f"method must be one of {known}, got a {type(method).__name__}")
    if attr_target != "log_prob":
        raise ValueError("gradient methods explain attr_target='log_prob' only, got 'prob'")
    return GradientTextAttribution(method, tokenizer)


def _check_target(target: str | Tensor | None) -> None:
    if isinstance(target, Mapping) or (isinstance(target, Tensor) and (target.dim() != 1 or not len(target))):
        raise ValueError("target must be a text or token ids [n] with n >= 1: Captum explains one text at a time")
    if isinstance(target, str) and not target:
        raise ValueError("target must not be empty")


def _apart(found: LLMAttributionResult) -> TextAttributionResult:
    return TextAttributionResult(
        input_tokens=found.input_tokens,
        output_tokens=found.output_tokens,
        seq_attr=found.seq_attr,
        token_attr=found.token_attr,
        output_probs=found.output_probs,
        inp=found.inp,
    )
