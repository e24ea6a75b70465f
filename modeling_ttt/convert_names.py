"""Which parameter of the official JAX code is which of ours, and what turns one into the other."""

import re
from collections.abc import Callable

import torch
from torch import Tensor

from .configuration_ttt import TTTConfig
from .modeling_ttt import TTTForCausalLM

__all__ = ["expected_shapes", "from_jax", "to_jax"]

Key = tuple[str, ...]
Turn = Callable[[Tensor], Tensor]


def same(x: Tensor) -> Tensor:
    """Both store it alike."""
    return x


def transposed(x: Tensor) -> Tensor:
    """JAX multiplies from the left: [in, out] there, [out, in] here."""
    return x.transpose(-1, -2) if x.dim() > 1 else x


def convolution(x: Tensor) -> Tensor:
    """[window, 1, C] there, [C, 1, window] here."""
    return x.transpose(0, -1)


# Each turn undoes itself.
_TOP: dict[Key, tuple[str, Turn]] = {
    ("model", "wte", "embedding"): ("model.embed_tokens.weight", same),
    ("model", "ln_f", "kernel"): ("model.norm.weight", same),
    ("lm_head", "kernel"): ("lm_head.weight", transposed),
}
_LAYER: dict[Key, tuple[str, Turn]] = {
    ("seq_norm", "kernel"): ("seq_norm.weight", same),
    ("ffn_norm", "kernel"): ("ffn_norm.weight", same),
    ("conv", "conv_norm", "kernel"): ("conv.norm.weight", same),
    ("conv", "conv1", "kernel"): ("conv.conv.weight", convolution),
    ("conv", "conv1", "bias"): ("conv.conv.bias", same),
    ("feed_forward", "w1", "kernel"): ("mlp.gate_proj.weight", transposed),
    ("feed_forward", "w3", "kernel"): ("mlp.up_proj.weight", transposed),
    ("feed_forward", "w2", "kernel"): ("mlp.down_proj.weight", transposed),
}
_MIXER: dict[Key, tuple[str, Turn]] = {
    **{(f"w{x}", "kernel"): (f"{x}_proj.weight", transposed) for x in "qkvog"},
    **{(f"conv_{x}", "kernel"): (f"conv_{x}.weight", convolution) for x in "qk"},
    **{(f"conv_{x}", "bias"): (f"conv_{x}.bias", same) for x in "qk"},
    ("learnable_token_idx",): ("learnable_token_idx", same),
    ("learnable_ttt_lr/kernel",): ("learnable_ttt_lr_weight", transposed),
    ("learnable_ttt_lr/bias",): ("learnable_ttt_lr_bias", same),
    ("ttt_norm/scale",): ("ttt_norm_weight", same),
    ("ttt_norm/bias",): ("ttt_norm_bias", same),
    ("post_norm", "scale"): ("post_norm.weight", same),
    ("post_norm", "bias"): ("post_norm.bias", same),
    **{(f"ttt_dense_{i}",): (f"W{i + 1}", same) for i in range(2)},
    **{(f"ttt_bias_{i}",): (f"b{i + 1}", same) for i in range(2)},
}
_LAYER |= {("seq_modeling_block", *key): (f"seq_modeling_block.{name}", turn) for key, (name, turn) in _MIXER.items()}
_TOP_BACK = {name: (key, turn) for key, (name, turn) in _TOP.items()}
_LAYER_BACK = {name: (key, turn) for key, (name, turn) in _LAYER.items()}


def from_jax(key: Key) -> tuple[str, Turn] | None:
    """Our name of a JAX parameter and what turns it into ours; None when there is no such parameter."""
    if key[:2] == ("model", "h") and len(key) > 3 and re.fullmatch("0|[1-9][0-9]{0,5}", key[2]):
        found = _LAYER.get(key[3:])
        return found and (f"model.layers.{key[2]}.{found[0]}", found[1])
    return _TOP.get(key)


def to_jax(name: str) -> tuple[Key, Turn] | None:
    """The JAX key of one of our parameters and what turns it into theirs; None when there is none."""
    match = re.fullmatch(r"model\.layers\.(0|[1-9][0-9]{0,5})\.(.+)", name)
    if match:
        found = _LAYER_BACK.get(match[2])
        return found and (("model", "h", match[1], *found[0]), found[1])
    return _TOP_BACK.get(name)


def expected_shapes(config: TTTConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor that a saved model of this configuration has; a tied head is not among them."""
    with torch.device("meta"):
        state = TTTForCausalLM(config).state_dict()
    if config.tie_word_embeddings:
        state.pop("lm_head.weight", None)
    return {name: tuple(value.shape) for name, value in state.items()}
