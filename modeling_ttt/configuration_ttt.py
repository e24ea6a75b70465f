"""Configuration of a TTT language model (arXiv 2407.04620)."""

import math
import sys
from collections.abc import Callable
from typing import Any

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.activations import ACT2FN

from .inner_net import INNER_NETS, InnerNet

__all__ = ["BACKEND_NAMES", "PRESETS", "TTTConfig"]

BACKEND_NAMES = ("auto", "triton", "chunked", "native", "reference")
"""Ways to compute the inner loop."""

PRESETS = {
    "125m": {
        "hidden_size": 768,
        "intermediate_size": 2048,
        "num_hidden_layers": 12,
        "num_attention_heads": 12,
    },
    "350m": {
        "hidden_size": 1024,
        "intermediate_size": 2736,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "760m": {
        "hidden_size": 1536,
        "intermediate_size": 4096,
        "num_hidden_layers": 24,
        "num_attention_heads": 16,
    },
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 5504,
        "num_hidden_layers": 24,
        "num_attention_heads": 32,
    },
}
"""The official sizes; "1b" is the model the paper calls 1.3B."""

DEFAULT_BASE_LR = {"linear": 1.0, "mlp": 0.1}

# Keys of the official configuration that mean nothing here: dropped when read.
_RETIRED_KEYS = ("scan_checkpoint_group_size",)


@strict
class TTTConfig(PreTrainedConfig):
    r"""
    Configuration of [`TTTModel`] and [`TTTForCausalLM`]. The keys of the official PyTorch code are accepted.

    Args:
        vocab_size: Size of the vocabulary.
        hidden_size: Model width C; a multiple of `num_attention_heads`, and the head dim C / H must be even.
        intermediate_size: Width of the SwiGLU feed-forward layer.
        num_hidden_layers: Number of blocks.
        num_attention_heads: Number of TTT heads H per block, each with inner weights of its own.
        hidden_act: Activation of the feed-forward layer.
        max_position_embeddings: Length in tokens the model was trained for; not a limit, positions inside the model
            repeat every mini-batch.
        initializer_range: Standard deviation of the initial weights.
        rms_norm_eps: Epsilon of the RMSNorms.
        use_cache: Whether a forward pass returns the inner state as `past_key_values`.
        pad_token_id, bos_token_id, eos_token_id: Special tokens.
        pretraining_tp: Kept for the official configuration; no effect.
        tie_word_embeddings: Whether the output embedding is the input embedding.
        rope_parameters: Rotary embedding, `{"rope_type": "default", "rope_theta": 10000.0}`; `rope_theta` is accepted.
        use_gate: Whether a GELU gate multiplies the output of the TTT layer (Mamba backbone).
        share_qk: Whether queries and keys share a projection and differ by a short convolution each (Mamba backbone).
        pre_conv: Whether a short convolution stands before every TTT layer.
        conv_kernel: Width of the short convolutions in tokens.
        ttt_layer_type: The inner net, "linear" or "mlp".
        ttt_base_lr: Base inner learning rate; None means 1.0 for "linear" and 0.1 for "mlp" as in the paper.
        mini_batch_size: Tokens K per inner mini-batch.
        ttt_backend: How the inner loop is computed: "triton" (kernels on a CUDA device), "chunked" (dual form in
            PyTorch), "native" (dual form in C++ on a CPU, compiled on first use), "reference" (token by token) or
            "auto": "triton" where it serves a call, else "chunked".
        output_plasticity: Whether a forward pass returns the plasticity of every token.
        output_ttt_stats: Whether a forward pass returns the diagnostics of the inner loop.
        frozen_layers: Indices of layers that read W_0 and never write.
        frozen_heads: Heads that never write, `{layer: [heads]}`.
        frozen_from: Index of the real token of a row from which on no layer writes, or `{layer: index}` for some
            layers; None means never.
    """

    model_type = "ttt"
    keys_to_ignore_at_inference = ["past_key_values", "plasticity", "ttt_stats"]
    # The TTT layer itself is replicated: its norm after the inner loop runs over all heads.
    base_model_tp_plan = {
        "embed_tokens": "embedding_rowwise",
        "layers.*.mlp.gate_proj": "colwise",
        "layers.*.mlp.up_proj": "colwise",
        "layers.*.mlp.down_proj": "rowwise",
    }

    vocab_size: int = 32000
    hidden_size: int = 2048
    intermediate_size: int = 5504
    num_hidden_layers: int = 24
    num_attention_heads: int = 32
    hidden_act: str = "silu"
    max_position_embeddings: int = 2048
    initializer_range: float = 0.02
    rms_norm_eps: float = 1e-6
    use_cache: bool = True
    pad_token_id: int | None = None
    bos_token_id: int | None = 1
    eos_token_id: int | list[int] | None = 2
    pretraining_tp: int | None = 1
    tie_word_embeddings: bool = True
    rope_parameters: dict | None = None
    use_gate: bool = False
    share_qk: bool = False
    pre_conv: bool = False
    conv_kernel: int = 4
    ttt_layer_type: str = "linear"
    ttt_base_lr: float | int | None = None
    mini_batch_size: int = 16
    ttt_backend: str = "auto"
    output_plasticity: bool = True
    output_ttt_stats: bool = False
    frozen_layers: list[int] | None = None
    frozen_heads: dict | None = None
    frozen_from: int | dict | None = None

    def __post_init__(self, **kwargs):
        for key in _RETIRED_KEYS:
            kwargs.pop(key, None)
        unknown = sorted(key for key in kwargs if key.startswith(("ttt_", "frozen_")))
        if unknown:
            known = sorted(f for f in self.__dataclass_fields__ if f.startswith(("ttt_", "frozen_")))
            raise ValueError(f"unknown configuration keys {unknown}; the inner loop knows {known}")
        if self.frozen_heads is not None:
            self.frozen_heads = _integer_keys("frozen_heads", self.frozen_heads, list, "{layer: [heads]}")
        if isinstance(self.frozen_from, dict):
            self.frozen_from = _integer_keys("frozen_from", self.frozen_from, lambda index: index, "{layer: index}")
        super().__post_init__(**kwargs)

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], **kwargs: Any) -> Any:
        """As the base class does; a config.json of the official PyTorch code means what it means there.

        That code ran with Transformers 4, this one does not. It has one `ttt_base_lr`, 1.0, for both inner nets, and
        saves none that is the default; its `use_cache` is off only for want of a cache that works.
        """
        if str(config_dict.get("transformers_version")).startswith("4."):
            kept = {name: value for name, value in config_dict.items() if name != "use_cache" and value is not None}
            config_dict = {"ttt_base_lr": 1.0, **kept}
        return super().from_dict(config_dict, **kwargs)

    @classmethod
    def preset(cls, size: str, **overrides: Any) -> "TTTConfig":
        """A configuration of one of the official sizes, "125m", "350m", "760m" or "1b", with fields replaced."""
        if size not in PRESETS:
            raise ValueError(f"size must be one of {sorted(PRESETS)}, got {size!r}")
        return cls(**{**PRESETS[size], **overrides})

    @property
    def head_dim(self) -> int:
        """Width f of a head."""
        return self.hidden_size // self.num_attention_heads

    @property
    def layer_types(self) -> list[str]:
        """What the cache of each layer holds."""
        return ["ttt"] * self.num_hidden_layers

    @property
    def inner_net(self) -> InnerNet:
        """The inner net of every layer."""
        return INNER_NETS[self.ttt_layer_type]

    @property
    def base_lr(self) -> float:
        """Base inner learning rate, the default of the inner net if `ttt_base_lr` is None."""
        return DEFAULT_BASE_LR[self.ttt_layer_type] if self.ttt_base_lr is None else self.ttt_base_lr

    def validate_layer_type(self):
        """The base class knows no third-party layer types; ours follow from `num_hidden_layers`."""

    def validate_architecture(self):
        """Check sizes and options against each other."""
        positive = (
            "vocab_size",
            "hidden_size",
            "intermediate_size",
            "num_hidden_layers",
            "num_attention_heads",
        )
        for name in (*positive, "mini_batch_size", "conv_kernel", "max_position_embeddings"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not 0 < self.rms_norm_eps < math.inf:
            raise ValueError(f"rms_norm_eps must be positive and finite, got {self.rms_norm_eps}")
        if self.hidden_act not in ACT2FN:
            raise ValueError(f"hidden_act must be one of {sorted(ACT2FN)}, got {self.hidden_act!r}")
        if self.hidden_size % self.num_attention_heads != 0:
            raise ValueError(
                f"hidden_size must be a multiple of num_attention_heads, got {self.hidden_size} and "
                f"{self.num_attention_heads}"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"the head dim hidden_size / num_attention_heads must be even, got {self.head_dim}")
        if self.ttt_layer_type not in INNER_NETS:
            raise ValueError(f"ttt_layer_type must be one of {sorted(INNER_NETS)}, got {self.ttt_layer_type!r}")
        if self.ttt_backend not in BACKEND_NAMES:
            raise ValueError(f"ttt_backend must be one of {BACKEND_NAMES}, got {self.ttt_backend!r}")
        if self.ttt_base_lr is not None and not 0 <= self.ttt_base_lr < math.inf:
            raise ValueError(f"ttt_base_lr must be finite and not negative, got {self.ttt_base_lr}")
        if self.initializer_range < 0:
            raise ValueError(f"initializer_range must not be negative, got {self.initializer_range}")
        if self.pad_token_id is not None and not 0 <= self.pad_token_id < self.vocab_size:
            raise ValueError(f"pad_token_id must lie in 0..{self.vocab_size - 1}, got {self.pad_token_id}")
        theta = (self.rope_parameters or {}).get("rope_theta", 10000.0)
        if isinstance(theta, bool) or not isinstance(theta, int | float) or not 0 < theta < sys.float_info.max:
            raise ValueError(f"rope_theta must be positive and finite, got {theta!r}")
        rope_type = (self.rope_parameters or {}).get("rope_type", "default")
        if rope_type != "default":
            raise ValueError(f"rope_parameters['rope_type'] must be 'default', got {rope_type!r}")
        self.validate_freezing()

    def validate_freezing(self) -> None:
        """Check `frozen_layers`, `frozen_heads` and `frozen_from`; called on every forward pass.

        Raises:
            ValueError: one of them names a layer or head the model has not, or is of another form.
        """
        layers, heads = self.num_hidden_layers, self.num_attention_heads
        chosen = self.frozen_layers or []
        bad = [layer for layer in chosen if not _is_index(layer, layers)]
        if bad:
            raise ValueError(f"frozen_layers must lie in 0..{layers - 1}, got {bad}")
        for layer, frozen in (self.frozen_heads or {}).items():
            if not _is_index(layer, layers):
                raise ValueError(f"the layers of frozen_heads must be integers in 0..{layers - 1}, got {layer!r}")
            bad = [head for head in frozen if not _is_index(head, heads)]
            if bad:
                raise ValueError(f"the heads of frozen_heads must lie in 0..{heads - 1}, got {bad}")
        begins = self.frozen_from if isinstance(self.frozen_from, dict) else {0: self.frozen_from or 0}
        for layer, index in begins.items():
            if not _is_index(layer, layers):
                raise ValueError(f"the layers of frozen_from must be integers in 0..{layers - 1}, got {layer!r}")
            if not isinstance(index, int) or isinstance(index, bool) or index < 0:
                raise ValueError(f"frozen_from must not be negative, got {self.frozen_from!r}")


def _is_index(value: Any, size: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < size


def _integer_keys(name: str, entries: dict, value: Callable[[Any], Any], form: str) -> dict[int, Any]:
    """JSON has no integer keys."""
    try:
        return {int(layer): value(entry) for layer, entry in entries.items()}
    except (AttributeError, TypeError, ValueError) as error:
        raise ValueError(f"{name} must be {form}, got {entries!r}") from error
