"""The models that are compared: TTT, its eager baseline, the limit set by its matrix products, and peers of its size.

A model is named `<kind>` or `<kind>-<inner net>`: ttt-linear, ttt-mlp, native-linear, reference-linear, eager-linear,
gemm-linear, ..., llama, mamba2, gdn, gdn-hybrid. Weights are random: they do not change what is computed.
"""

import functools

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from benchmarks.eager_baseline import EagerTTT
from modeling_ttt import TTTConfig, TTTForCausalLM
from modeling_ttt.configuration_ttt import PRESETS

__all__ = ["SIZES", "GemmOnly", "build_model", "parameter_count"]

SMALL = {
    "vocab_size": 4096,
    "hidden_size": 256,
    "intermediate_size": 688,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
}

SIZES = {
    "small": SMALL,
    # Where the logits would hide what the layers do.
    "small-v512": {**SMALL, "vocab_size": 512},
    "125m-layers": {**PRESETS["125m"], "num_hidden_layers": 2, "vocab_size": 512},
    # For the comparison of backends: the reference goes token by token.
    "two-layers": {**SMALL, "vocab_size": 1024, "num_hidden_layers": 2},
    "tiny": {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4,
        "num_attention_heads": 2,
    },
}

# A head of the peers is as wide as one of ours; Mamba2 has twice the blocks, since they have no feed-forward layer.
MAMBA2_STATE = 64


class GemmOnly(nn.Module):
    """The matrix products of the linear layers of a TTT model on random inputs and nothing else: a limit of speed.

    Per layer q, k, v, o, the learning rate and the feed-forward layer; at the end the head. Weights are not shared
    between layers, so they come from where they come from in the model.
    """

    def __init__(self, config: TTTConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        shapes = [(width, width)] * 4 + [(width, config.num_attention_heads)] + [(width, inner)] * 2 + [(inner, width)]
        shapes = shapes * config.num_hidden_layers + [(width, config.vocab_size)]
        self.linears = nn.ModuleList([nn.Linear(a, b, bias=False) for a, b in shapes])

    def random_inputs(self, batch: int, tokens: int) -> dict[int, Tensor]:
        """One input per width, [B * T, width]."""
        parameter = self.linears[0].weight
        return {
            width: torch.randn(batch * tokens, width, device=parameter.device, dtype=parameter.dtype)
            for width in {linear.in_features for linear in self.linears}
        }

    def forward(self, inputs: dict[int, Tensor]) -> list[Tensor]:
        return [linear(inputs[linear.in_features]) for linear in self.linears]


def build_model(name: str, size: str, backend: str = "chunked", device: str = "cpu") -> nn.Module:
    """A model of one of the `SIZES` in eval mode, float32.

    Raises:
        ValueError: there is no model or size of that name.
    """
    if size not in SIZES:
        raise ValueError(f"size must be one of {sorted(SIZES)}, got {size!r}")
    kind, _, inner_net = name.partition("-")
    torch.manual_seed(0)
    if kind in ("ttt", "native", "reference", "eager", "gemm") and inner_net in ("linear", "mlp"):
        backend = kind if kind in ("native", "reference") else backend
        config = TTTConfig(**SIZES[size], ttt_layer_type=inner_net, ttt_backend=backend)
        if kind == "gemm":
            model = GemmOnly(config)
        else:
            model = TTTForCausalLM(config)
            model = EagerTTT.from_model(model) if kind == "eager" else model
    elif name in _PEERS:
        model = _PEERS[name](SIZES[size])
    else:
        raise ValueError(
            f"model must be <ttt|native|reference|eager|gemm>-<linear|mlp> or {sorted(_PEERS)}, got {name!r}"
        )
    return model.eval().to(device)


def parameter_count(model: nn.Module) -> int:
    """Number of parameters, shared ones once."""
    return sum(parameter.numel() for parameter in model.parameters())


def _llama(size: dict) -> PreTrainedModel:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(**size, tie_word_embeddings=True, max_position_embeddings=1 << 17)
    return LlamaForCausalLM._from_config(config, attn_implementation="sdpa")


def _mamba2(size: dict) -> PreTrainedModel:
    from transformers import Mamba2Config, Mamba2ForCausalLM

    head_dim = size["hidden_size"] // size["num_attention_heads"]
    config = Mamba2Config(
        vocab_size=size["vocab_size"],
        hidden_size=size["hidden_size"],
        num_hidden_layers=2 * size["num_hidden_layers"],
        num_heads=2 * size["num_attention_heads"],
        head_dim=head_dim,
        state_size=MAMBA2_STATE,
        n_groups=1,
        tie_word_embeddings=True,
        pad_token_id=None,
    )
    return Mamba2ForCausalLM(config)


def _gated_delta_net(size: dict, full_layers: int) -> PreTrainedModel:
    """Qwen3-Next without experts; the last `full_layers` layers have softmax attention."""
    from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

    heads, layers = size["num_attention_heads"], size["num_hidden_layers"]
    head_dim = size["hidden_size"] // heads
    config = Qwen3NextConfig(
        **size,
        num_key_value_heads=heads,
        head_dim=head_dim,
        linear_num_key_heads=heads,
        linear_num_value_heads=heads,
        linear_key_head_dim=head_dim,
        linear_value_head_dim=head_dim,
        num_experts=0,
        layer_types=["linear_attention"] * (layers - full_layers) + ["full_attention"] * full_layers,
        tie_word_embeddings=True,
        max_position_embeddings=1 << 17,
    )
    return Qwen3NextForCausalLM._from_config(config, attn_implementation="sdpa")


_PEERS = {
    "llama": _llama,
    "mamba2": _mamba2,
    "gdn": functools.partial(_gated_delta_net, full_layers=0),
    # Transformers 5.23 cannot decode a Qwen3-Next without a layer of softmax attention.
    "gdn-hybrid": functools.partial(_gated_delta_net, full_layers=1),
}
