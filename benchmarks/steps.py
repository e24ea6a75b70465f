"""What is measured on a model: reading a prompt, decoding, a training step. Each becomes a `Contender`."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from benchmarks._harness import Contender
from benchmarks.models import GemmOnly, parameter_count
from modeling_ttt import TTTForCausalLM

__all__ = ["OPTIONS", "PROMPT_TOKENS", "Step", "contender"]

PROMPT_TOKENS = 64
"""Tokens read before decoding, whole mini-batches."""

SEGMENT_TOKENS = 1024

OPTIONS = {
    # The baseline and the peers return neither, so ours does not either unless it is what is measured.
    "": {"output_plasticity": False, "output_ttt_stats": False},
    "plasticity": {"output_plasticity": True, "output_ttt_stats": False},
    "stats": {"output_plasticity": True, "output_ttt_stats": True},
    "compiled": {"output_plasticity": False, "output_ttt_stats": False},
}
"""What is asked of our model, by the part of a contender's name after "+"."""


@dataclass(frozen=True)
class Step:
    """`kind` is prefill (logits of all positions, or the last `logits_to_keep`), decode (of T tokens) or train."""

    kind: str
    batch: int
    tokens: int
    logits_to_keep: int = 0


def contender(name: str, model: nn.Module, step: Step) -> Contender:
    """Measure `step` on `model`; `name` is the model's, with "+plasticity" or "+stats" to ask ours for those.

    "+compiled" decodes through `torch.compile`; the prompt is read as it is.

    Raises:
        ValueError: there is no step of that kind, or no option of that name.
    """
    option = name.partition("+")[2]
    if option not in OPTIONS:
        raise ValueError(f"what follows '+' must be one of {sorted(OPTIONS)}, got {option!r}")
    if step.kind not in _KINDS:
        raise ValueError(f"kind must be one of {sorted(_KINDS)}, got {step.kind!r}")
    options = OPTIONS[option] if isinstance(model, TTTForCausalLM) else {}
    if option == "compiled":
        if step.kind != "decode":
            raise ValueError(f"only decode is measured '+compiled', got a step of kind {step.kind!r}")
        options = options | {"compiled": True}
    build = _matrix_products if isinstance(model, GemmOnly) else _KINDS[step.kind]
    prepare, run = build(model, step, options)
    return Contender(name, run, prepare, step.batch * step.tokens, parameter_count(model))


Calls = tuple[Callable[[], object], Callable[[object], object]]


def _matrix_products(model: GemmOnly, step: Step, options: dict) -> Calls:
    """The products of the same step: one call, one call per token, or a call with its gradients."""
    if step.kind == "train":
        return _matrix_products_with_gradients(model, step)
    # Like our model, long prompts by segments whose tensors stay in the caches: the products alone are no slower so.
    tokens = 1 if step.kind == "decode" else min(step.tokens, SEGMENT_TOKENS)
    inputs = model.random_inputs(step.batch, tokens)

    @torch.no_grad()
    def run(_):
        for _ in range(step.tokens // tokens):
            model(inputs)

    return lambda: None, run


def _matrix_products_with_gradients(model: GemmOnly, step: Step) -> Calls:
    """Products of the forward, and of the gradients of inputs and weights; their sums over layers are left out."""
    inputs = model.random_inputs(step.batch, step.tokens)
    with torch.no_grad():
        upstream = {out.shape[-1]: torch.randn_like(out) for out in model(inputs)}

    @torch.no_grad()
    def run(_):
        for linear in model.linears:
            x, weight, gradient = inputs[linear.in_features], linear.weight, upstream[linear.out_features]
            linear(x)
            gradient @ weight
            gradient.t() @ x

    return lambda: None, run


def _prefill(model: nn.Module, step: Step, options: dict) -> Calls:
    ids = _random_ids(model, step.batch, step.tokens)
    # A Qwen3-Next without softmax attention cannot make a cache (see models.py); all others return their state.
    layer_types = getattr(model.config, "layer_types", ())
    use_cache = model.config.model_type != "qwen3_next" or "full_attention" in layer_types

    @torch.no_grad()
    def run(_):
        return model(ids, use_cache=use_cache, logits_to_keep=step.logits_to_keep, **options)

    return lambda: None, run


def _decode(model: nn.Module, step: Step, options: dict) -> Calls:
    """After a fresh prompt every time, so that the length of the context stays what it is."""
    prompt, ids = _random_ids(model, step.batch, PROMPT_TOKENS), _random_ids(model, step.batch, step.tokens)

    step_model = torch.compile(model, fullgraph=True) if options.pop("compiled", False) else model

    @torch.no_grad()
    def prepare() -> dict:
        out = model(prompt, use_cache=True, logits_to_keep=1, **options)
        name = "past_key_values" if hasattr(out, "past_key_values") else "cache_params"
        return {name: getattr(out, name)}

    @torch.no_grad()
    def run(cache: dict) -> None:
        # Every cache is advanced in place.
        for token in ids.split(1, 1):
            step_model(token, use_cache=True, **cache, **options)

    return prepare, run


def _train(model: nn.Module, step: Step, options: dict) -> Calls:
    """Forward and backward of the language-model loss, without an optimizer."""
    ids = _random_ids(model, step.batch, step.tokens)
    model.train()

    def run(_) -> None:
        model(ids, labels=ids, use_cache=False, **options).loss.backward()

    return lambda: model.zero_grad(set_to_none=True), run


_KINDS = {"prefill": _prefill, "decode": _decode, "train": _train}


def _random_ids(model: nn.Module, batch: int, tokens: int) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.config.vocab_size, (batch, tokens), generator=generator)
    return ids.to(next(model.parameters()).device)
