"""Tiny float64 models whose inner loop matters: large weights, a large inner learning rate."""

import torch

from modeling_ttt import TTTConfig, TTTForCausalLM
from tests.conftest import TINY

VARIANTS = {
    "transformer": {},
    "pre_conv": {"pre_conv": True},
    "gate": {"use_gate": True, "tie_word_embeddings": False},
    "mamba": {"pre_conv": True, "share_qk": True, "use_gate": True},
}


def strong_model(layer_type: str, seed: int = 1, std: float = 0.3, **options) -> TTTForCausalLM:
    """A model with random parameters (norms and biases too), in eval mode, float64."""
    rate = {"linear": 4.0, "mlp": 1.0}[layer_type]
    model = TTTForCausalLM(TTTConfig(**TINY, ttt_layer_type=layer_type, **{"ttt_base_lr": rate} | options)).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, parameter in model.named_parameters():
        noise = torch.randn(parameter.shape, generator=generator) * std
        norm = "norm" in name and name.endswith("weight")
        parameter.data = 1 + noise if norm else noise
    return model.double()


def random_ids(rows: int, length: int, seed: int = 2) -> torch.Tensor:
    """Token ids [rows, length]."""
    return torch.randint(0, 64, (rows, length), generator=torch.Generator().manual_seed(seed))


def hooked_taps(model) -> list[str]:
    """Names of the modules that still have a hook, those of the library's recorder aside."""
    return [
        name
        for name, module in model.named_modules()
        if module._forward_pre_hooks
        or module._backward_hooks
        or any("output_capturing" not in getattr(h, "__module__", "") for h in module._forward_hooks.values())
    ]
