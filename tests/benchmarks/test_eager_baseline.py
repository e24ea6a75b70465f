"""The eager baseline computes the function of the library's model: same logits, same gradients, same decoding."""

import pytest
import torch

from benchmarks.eager_baseline import EagerTTT
from modeling_ttt import TTTConfig
from tests.conftest import TINY
from tests.modeling_ttt.helpers import distance, tiny, tokens

EXACT = 1e-10


@pytest.fixture(params=[True, False], ids=["tied", "untied"])
def pair(request, layer_type):
    """The library's model on its reference backend and the baseline on the same weights, in float64."""
    model = tiny(ttt_layer_type=layer_type, ttt_backend="reference", tie_word_embeddings=request.param)
    return model, EagerTTT.from_model(model)


def test_parameters_are_those_of_the_model_and_share_its_storage(pair):
    model, eager = pair
    ours, its = dict(model.named_parameters()), dict(eager.named_parameters())
    assert ours.keys() == its.keys()
    assert all(its[name].data_ptr() == p.data_ptr() and its[name] is not p for name, p in ours.items())


def test_prefill_gives_the_logits_of_the_model(pair):
    model, eager = pair
    ids = tokens(2, 24)
    with torch.no_grad():
        assert distance(model(ids).logits, eager(ids).logits) < EXACT
        assert distance(model(ids, logits_to_keep=1).logits, eager(ids, logits_to_keep=1).logits) < EXACT


def test_decoding_token_by_token_gives_the_logits_of_the_model(pair):
    model, eager = pair
    ids = tokens(2, 19)  # a prompt of two mini-batches of 4, then two commits and an open mini-batch
    with torch.no_grad():
        expected = model(ids).logits
        out = eager(ids[:, :8], use_cache=True)
        logits = [out.logits]
        for t in range(8, 19):
            out = eager(ids[:, t : t + 1], past_key_values=out.past_key_values, use_cache=True)
            logits.append(out.logits)
        assert distance(torch.cat(logits, 1), expected) < EXACT


def test_decoding_from_nothing_gives_the_logits_of_the_model(pair):
    model, eager = pair
    ids = tokens(1, 6)
    with torch.no_grad():
        cache, logits = None, []
        for t in range(6):
            out = eager(ids[:, t : t + 1], past_key_values=cache, use_cache=True)
            cache = out.past_key_values
            logits.append(out.logits)
        assert distance(torch.cat(logits, 1), model(ids).logits) < EXACT
        after = eager.model.layers[0].seq_modeling_block.W1
        assert distance(after, model.model.layers[0].seq_modeling_block.W1) == 0


def test_a_training_step_gives_the_gradients_of_the_model(pair):
    model, eager = pair
    ids = tokens(2, 16)
    losses = [m(ids, labels=ids).loss for m in (model, eager)]
    for loss in losses:
        loss.backward()
    assert distance(*losses) < EXACT
    for (name, ours), its in zip(model.named_parameters(), eager.parameters(), strict=True):
        assert distance(ours.grad, its.grad) < EXACT, name


def test_what_it_does_not_compute_is_refused():
    config = TTTConfig(**TINY)
    eager = EagerTTT(config)
    with pytest.raises(ValueError, match="whole mini-batches of 4, got 6 tokens at slot 0"):
        eager(tokens(1, 6))
    with pytest.raises(ValueError, match="share_qk, pre_conv and use_gate"):
        EagerTTT(TTTConfig(**TINY, use_gate=True))
