"""What other libraries take: shapes, and identities behind them."""

from typing import Any, Protocol, runtime_checkable

import pytest
import torch

from interp.attribution import direct_logit_attribution
from interp.captum_targets import LogitTarget
from interp.interop import TTTMixer, circuitsvis_heads, circuitsvis_tokens
from interp.records import record_writes
from tests.interp.strong_models import random_ids, strong_model

LENGTH = 11


@pytest.fixture
def model(layer_type):
    return strong_model(layer_type)


@pytest.fixture
def records(model):
    return record_writes(model, random_ids(2, LENGTH))


def test_heads_and_tokens_have_the_layout_of_circuitsvis(model, records):
    tokens = [f"t{i}" for i in range(LENGTH)]
    found = circuitsvis_heads(records, 1, tokens, columns=slice(4, None))
    assert found["attention"].shape == (2, 7, 7) and found["tokens"] == tokens[4:]
    assert found["attention_head_names"] == ["L1H0", "L1H1"] and found["min_value"] == -found["max_value"]
    assert found["attention"].triu(1).abs().max() == 0
    attribution = direct_logit_attribution(model, random_ids(2, LENGTH), LogitTarget(-1, 5, 6))
    found = circuitsvis_tokens(attribution, tokens, row=1)
    assert found["values"].shape == (LENGTH, 3) and found["labels"] == ["all layers", "layer 0", "layer 1"]
    torch.testing.assert_close(found["values"][:, 0], found["values"][:, 1:].sum(1))
    with pytest.raises(ValueError, match="tokens must hold the 11 texts"):
        circuitsvis_heads(records, 1, tokens[:3])


def test_effective_attention_rebuilds_the_read(records):
    record = records[0]
    attention = TTTMixer().compute_effective_attention(records, 0)
    weight, bias = record.initial[0]
    state = TTTMixer().compute_ssm_state(records, 0)
    by_attention = record.q @ weight + bias + attention @ -record.gradients[0]
    query = torch.cat([record.q, torch.ones_like(record.q[..., :1])], -1)
    by_state = (query[..., None, :] @ state)[..., 0, :]
    torch.testing.assert_close(by_attention, by_state, rtol=0, atol=1e-12)
    if len(record.initial) == 1:
        torch.testing.assert_close(by_attention, record.reads(), rtol=0, atol=1e-12)


def test_the_state_is_the_one_in_the_cache(model, records):
    """After whole mini-batches the weights read with are those committed."""
    with torch.no_grad():
        cache = model(random_ids(2, LENGTH)[:, :8], use_cache=True).past_key_values.layers[1].tensors
    for i in range(1, len(records[1].initial) + 1):
        found = TTTMixer().compute_ssm_state(records, 1, time_step=7, inner_map=i)
        torch.testing.assert_close(found[..., :-1, :], cache[f"W{i}"], rtol=0, atol=1e-12)
        torch.testing.assert_close(found[..., -1:, :], cache[f"b{i}"], rtol=0, atol=1e-12)
    with pytest.raises(ValueError, match="time_step must be in"):
        TTTMixer().compute_ssm_state(records, 1, time_step=LENGTH)


def test_the_mixer_has_the_methods_of_the_protocol():
    @runtime_checkable
    class SSMMixerProtocol(Protocol):
        def compute_effective_attention(self, cache: Any, layer_idx: int) -> torch.Tensor: ...

    assert isinstance(TTTMixer(), SSMMixerProtocol) and hasattr(TTTMixer(), "compute_ssm_state")
