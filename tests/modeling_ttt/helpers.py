"""Small models and comparisons the model tests share."""

import pytest
import torch

from modeling_ttt import TTTConfig, TTTForCausalLM
from modeling_ttt.native_library import load_library
from tests.conftest import TINY

_LIBRARY, _WHY_NOT = load_library()
NEEDS_NATIVE = pytest.mark.skipif(_LIBRARY is None, reason=f"no native backend here: {_WHY_NOT}")
NATIVE = pytest.param("native", marks=NEEDS_NATIVE)

BACKBONES = {
    "plain": {},
    "mamba": {"share_qk": True, "pre_conv": True, "use_gate": True},
    "conv": {"pre_conv": True},
    "shared": {"share_qk": True, "conv_kernel": 3},
}


def tiny(dtype=torch.float64, noise=0.2, seed=0, **overrides):
    """A model whose parameters are all away from their initial values, so that no term hides behind a 0 or a 1."""
    torch.manual_seed(seed)
    model = TTTForCausalLM(TTTConfig(**{**TINY, **overrides})).to(dtype).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(noise * torch.randn_like(parameter))
        for i, block in enumerate(model.model.layers):
            # Rates stay positive at the commit; one slot of the first layer is clamped to 0.
            block.seq_modeling_block.learnable_token_idx.mul_(0.1)
            if i == 0 and model.config.mini_batch_size > 2:
                block.seq_modeling_block.learnable_token_idx[1] = -2
    return model


def tokens(batch=2, length=100, seed=1, vocab=TINY["vocab_size"]):
    return torch.randint(3, vocab, (batch, length), generator=torch.Generator().manual_seed(seed))


def distance(a, b):
    """Largest absolute difference of two tensors or of two sequences of tensors."""
    if isinstance(a, torch.Tensor):
        assert a.shape == b.shape
        return float((a - b).detach().abs().max()) if a.numel() else 0.0
    return max(distance(x, y) for x, y in zip(a, b, strict=True))


def cache_distance(a, b):
    """Largest difference of two cached states, their counters included."""
    worst = 0.0
    for one, other in zip(a.layers, b.layers, strict=True):
        assert one.tensors.keys() == other.tensors.keys()
        worst = max(worst, *(distance(one.tensors[n].double(), other.tensors[n].double()) for n in one.tensors))
    return worst


@torch.no_grad()
def read_in_pieces(model, ids, cuts, attention_mask=None, cache=None, **kwargs):
    """Feed ids in the pieces that end at `cuts`; logits, plasticity per layer and the cache as of one call."""
    logits, plasticity, start = [], [], 0
    for end in [*cuts, ids.shape[1]]:
        mask = None if attention_mask is None else attention_mask[:, :end]
        out = model(ids[:, start:end], attention_mask=mask, past_key_values=cache, use_cache=True, **kwargs)
        logits.append(out.logits)
        plasticity.append(out.plasticity)
        cache, start = out.past_key_values, end
    return torch.cat(logits, 1), [torch.cat(parts, 2) for parts in zip(*plasticity, strict=True)], cache
