"""A long call runs in segments without anyone noticing: same numbers, hooks once per call, nothing kept on failure."""

import pytest
import torch

from modeling_ttt import segments
from modeling_ttt.token_grid import TokenGrid

from .helpers import BACKBONES, cache_distance, distance, tiny, tokens

OPTIONS = {
    "plain": {},
    "mask": {
        "attention_mask": (torch.arange(61) % 7 > 1).expand(2, -1) & (torch.tensor([[5], [0]]) <= torch.arange(61))
    },
    "borders": {"reset_at": torch.zeros(2, 61, dtype=torch.bool).index_fill(1, torch.tensor([11, 16, 40]), True)},
    "multiplier": {"ttt_lr_mult": torch.rand(2, 2, 2, 61, generator=torch.Generator().manual_seed(0))},
}


@pytest.fixture
def short_segments(monkeypatch):
    """Segments of two mini-batches for two rows; counts how many ran."""
    monkeypatch.setattr(segments, "SEGMENT_TOKENS", 16)
    ran = []
    original = TokenGrid.segments
    monkeypatch.setattr(TokenGrid, "segments", lambda grid, n: ran.append(parts := original(grid, n)) or parts)
    return ran


@torch.no_grad()
def both_ways(model, ran, ids, **kwargs):
    """Outputs in one piece (a hook forces it) and in segments, each going on from a state of 6 tokens."""
    results = []
    for hooked in (True, False):
        handle = model.model.layers[0].mlp.register_forward_hook(lambda *_: None) if hooked else None
        cache = model(ids[:, :6], use_cache=True).past_key_values
        results.append(model(ids, past_key_values=cache, **kwargs))
        if hooked:
            handle.remove()
            assert len(ran[-1]) == 1
    assert len(ran[-1]) > 5
    return results


@pytest.mark.parametrize("option", OPTIONS)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_segments_change_nothing(short_segments, kind, option):
    model = tiny(ttt_layer_type=kind, **BACKBONES["mamba"])
    whole, cut = both_ways(model, short_segments, tokens(2, 61), **OPTIONS[option])
    assert distance(whole.logits, cut.logits) < 1e-10
    assert distance(whole.plasticity, cut.plasticity) < 1e-12
    assert cache_distance(whole.past_key_values, cut.past_key_values) < 1e-12


def test_frozen_from_counts_over_the_whole_call(short_segments):
    model = tiny()
    model.config.frozen_from = 30
    whole, cut = both_ways(model, short_segments, tokens(2, 61))
    assert distance(whole.logits, cut.logits) < 1e-10
    assert cut.plasticity[0][:, :, 24:].abs().max() == 0 < cut.plasticity[0][:, :, 23].abs().min()


def test_taps_fire_once_and_records_are_whole(short_segments):
    model, ids, seen = tiny(), tokens(2, 61), []
    handle = model.model.layers[1].seq_modeling_block.tap_k.register_forward_hook(lambda m, i, o: seen.append(o.shape))
    with torch.no_grad():
        model(ids)
        handle.remove()
        assert seen == [(2, 2, 61, 16)]
        hidden = model(ids, output_hidden_states=True).hidden_states
        assert [h.shape[1] for h in hidden] == [61] * 3 and len(short_segments[-1]) == 1
        stats = model(ids, output_ttt_stats=True).ttt_stats
        assert stats[0].loss_init.shape == (2, 2, 61) and len(short_segments[-1]) == 1
        model(ids)  # the library's recording hooks stay behind, idle
        assert len(short_segments[-1]) > 5


def test_calls_with_gradients_are_not_cut(short_segments):
    model = tiny()
    model(tokens(2, 61)).logits.sum().backward()
    assert len(short_segments[-1]) == 1


def test_failure_in_a_late_segment_leaves_the_cache_as_it_was(short_segments, monkeypatch):
    model, ids = tiny(), tokens(2, 61)
    with torch.no_grad():
        cache = model(ids[:, :6], use_cache=True).past_key_values
        before = {n: t.clone() for n, t in cache.layers[0].tensors.items()}
        calls, run = [], model.model._run_segment

        def fail_late(*args):
            calls.append(1)
            if len(calls) == 4:
                raise RuntimeError("out of memory")
            return run(*args)

        monkeypatch.setattr(model.model, "_run_segment", fail_late)
        with pytest.raises(RuntimeError, match="out of memory"):
            model(ids, past_key_values=cache)
    assert cache.get_seq_length() == 6
    assert all(torch.equal(cache.layers[0].tensors[n], t) for n, t in before.items())


def test_feed_forward_in_place_is_taken_and_never_seen():
    """The in-place path gives the numbers of the other; whoever may see a tensor of it keeps it from being taken."""
    model, x = tiny(intermediate_size=32), torch.randn(1, 80, 32, dtype=torch.float64)
    mlp = model.model.layers[0].mlp
    want = mlp(x)
    with torch.no_grad():
        gate, up = mlp.gate_proj(x), mlp.up_proj(x)
        assert mlp._works_in_place(gate, up)
        assert torch.equal(mlp(x), want)
        seen = []
        handle = mlp.gate_proj.register_forward_hook(lambda m, i, o: seen.append(o))
        assert torch.equal(mlp(x), want) and torch.equal(seen[0], gate)
        handle.remove()
        forward = mlp.gate_proj.forward
        mlp.gate_proj.forward = lambda h: seen.append(forward(h)) or seen[-1]
        assert torch.equal(mlp(x), want) and torch.equal(seen[1], gate)
        del mlp.gate_proj.forward
        mlp.gate_proj = torch.nn.Identity()
        assert torch.equal(mlp(x), mlp.down_proj(torch.nn.functional.silu(x) * up))


def test_segments_keep_the_dtype_of_the_model(short_segments):
    model = tiny(torch.bfloat16)
    model.model.norm.float()
    with torch.no_grad():
        states = [model.model(tokens(2, n)).last_hidden_state for n in (4, 61)]
    assert states[0].dtype == states[1].dtype == torch.float32 and len(short_segments[-1]) > 5


def test_a_batch_of_no_rows_passes():
    with torch.no_grad():
        assert tiny()(torch.zeros(0, 5, dtype=torch.long)).logits.shape == (0, 5, 64)
