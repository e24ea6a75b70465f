"""`ttt_lr_mult` and the frozen_* options: 1 changes nothing, 0 writes nothing, and nothing earlier moves."""

import pytest
import torch

from modeling_ttt import TTTConfig, TTTForCausalLM

from .helpers import BACKBONES, distance, tiny, tokens


@pytest.fixture(params=["linear", "mlp"])
def model(request):
    return tiny(ttt_layer_type=request.param, **BACKBONES["mamba"])


@torch.no_grad()
def test_multiplier_one_is_bit_equal_to_none(model):
    ids = tokens(2, 21)
    plain, ones = model(ids), model(ids, ttt_lr_mult=torch.ones(2, 2, 2, 21))
    assert torch.equal(plain.logits, ones.logits)
    assert all(torch.equal(a, b) for a, b in zip(plain.plasticity, ones.plasticity, strict=True))
    for a, b in zip(plain.past_key_values.layers, ones.past_key_values.layers, strict=True):
        assert all(torch.equal(a.tensors[n], b.tensors[n]) for n in a.tensors)


@torch.no_grad()
def test_multiplier_zero_keeps_w_0_bit_equal(model):
    out = model(tokens(2, 21), ttt_lr_mult=torch.zeros(1))
    for layer, block in zip(out.past_key_values.layers, model.model.layers, strict=True):
        for name in [n for pair in model.config.inner_net.parameter_names for n in pair]:
            initial = getattr(block.seq_modeling_block, name)
            assert torch.equal(layer.tensors[name], initial.expand_as(layer.tensors[name]))
    assert all(float(p.abs().max()) == 0 for p in out.plasticity)


@torch.no_grad()
def test_tokens_before_a_knocked_out_write_are_bit_equal(model):
    ids = tokens(1, 30)
    plain = model(ids)
    for t in (0, 6, 7, 29):
        mult = torch.ones(1, 1, 1, 30)
        mult[..., t] = 0
        out = model(ids, ttt_lr_mult=mult)
        assert torch.equal(out.logits[:, :t], plain.logits[:, :t])
        assert not torch.equal(out.logits[:, t:], plain.logits[:, t:])


@torch.no_grad()
def test_config_freezing_equals_the_multiplier(model):
    ids = tokens(2, 21)
    mult = torch.ones(1, 2, 2, 21)
    mult[:, 0] = 0
    mult[:, 1, 1] = 0
    mult[..., 13:] = 0
    expected = model(ids, ttt_lr_mult=mult)
    model.config.frozen_layers, model.config.frozen_heads, model.config.frozen_from = [0], {1: [1]}, 13
    assert torch.equal(model(ids).logits, expected.logits)
    # and what the caller passes multiplies it
    again = model(ids, ttt_lr_mult=torch.full((1,), 0.5))
    assert torch.equal(again.logits, model(ids, ttt_lr_mult=torch.full((2, 2, 2, 21), 0.5)).logits)
    assert float(again.plasticity[0].abs().max()) == 0


@torch.no_grad()
def test_one_layer_alone_can_be_frozen_from_a_token_on(model):
    ids = tokens(2, 21)
    mult = torch.ones(1, 2, 1, 21)
    mult[:, 1, :, 13:] = 0
    model.config.frozen_from = {1: 13}
    assert torch.equal(model(ids).logits, model(ids, ttt_lr_mult=torch.ones(1)).logits)
    frozen = model(ids).logits
    model.config.frozen_from = None
    assert torch.equal(frozen, model(ids, ttt_lr_mult=mult).logits)


@torch.no_grad()
def test_frozen_from_counts_real_tokens_over_calls_and_padding(model):
    ids = tokens(1, 20)
    model.config.frozen_from = 9
    whole = model(ids).logits
    first = model(ids[:, :6], use_cache=True)
    rest = model(ids[:, 6:], past_key_values=first.past_key_values).logits
    assert distance(torch.cat([first.logits, rest], 1), whole) < 1e-10
    left = torch.cat([torch.zeros(1, 4, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 4), torch.ones(1, 20)], 1)
    assert distance(model(left, attention_mask=mask).logits[:, 4:], whole) < 1e-10


def test_multiplier_gradient_equals_central_differences(model):
    ids = tokens(1, 11)
    mult = torch.rand(1, 2, 2, 11, dtype=torch.float64).requires_grad_()
    model(ids, ttt_lr_mult=mult).logits[0, -1, 5].backward()
    step = 1e-5
    for index in ((0, 0, 1, 2), (0, 1, 0, 7), (0, 1, 1, 10)):
        with torch.no_grad():
            values = []
            for sign in (1, -1):
                moved = mult.clone()
                moved[index] += sign * step
                values.append(float(model(ids, ttt_lr_mult=moved).logits[0, -1, 5]))
        assert abs((values[0] - values[1]) / (2 * step) - float(mult.grad[index])) < 1e-7


@torch.no_grad()
def test_generate_takes_a_multiplier_without_token_axis(model):
    ids = tokens(2, 9)
    frozen = torch.zeros(1, 2, 1, 1)
    frozen[:, 1] = 1
    got = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=2, ttt_lr_mult=frozen, eos_token_id=None)
    model.config.frozen_layers = [0]
    expected = model.generate(ids, max_new_tokens=6, do_sample=False, num_beams=2, eos_token_id=None)
    assert torch.equal(got, expected)
    with pytest.raises(ValueError, match="last dimension must be 1"):
        model.generate(ids, max_new_tokens=2, ttt_lr_mult=torch.ones(1, 1, 1, 9))


def test_frozen_options_survive_saving_and_saving_them_warns(tmp_path, caplog):
    model = tiny(frozen_layers=[1], frozen_heads={0: [1]}, frozen_from=7)
    model.save_pretrained(tmp_path)
    assert "the saved configuration freezes inner weights: {'frozen_layers': [1]" in caplog.text
    loaded = TTTForCausalLM.from_pretrained(tmp_path).config
    assert (loaded.frozen_layers, loaded.frozen_heads, loaded.frozen_from) == ([1], {0: [1]}, 7)
    caplog.clear()
    tiny(frozen_from={0: 7}).save_pretrained(tmp_path)
    assert TTTForCausalLM.from_pretrained(tmp_path).config.frozen_from == {0: 7}
    caplog.clear()
    tiny().save_pretrained(tmp_path)
    assert "freezes" not in caplog.text


@pytest.mark.parametrize(
    "bad",
    [
        {"frozen_layers": [-1]},
        {"frozen_layers": [7]},
        {"frozen_heads": {"0": [0]}},
        {"frozen_heads": {5: [0]}},
        {"frozen_from": -5},
        {"frozen_from": {7: 3}},
        {"frozen_from": {0: -3}},
    ],
    ids=str,
)
def test_bad_freezing_set_on_a_live_model_is_refused(bad):
    model = tiny()
    for name, value in bad.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=next(iter(bad))):
        model(tokens(1, 3))


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"frozen_layers": [2]}, r"frozen_layers must lie in 0\.\.1, got \[2\]"),
        ({"frozen_heads": {0: [5]}}, r"heads of frozen_heads must lie in 0\.\.1, got \[5\]"),
        ({"frozen_heads": {7: [0]}}, "layers of frozen_heads"),
        ({"frozen_from": -1}, "frozen_from must not be negative"),
    ],
    ids=str,
)
def test_bad_freezing_names_what_is_allowed(bad, message):
    with pytest.raises(Exception, match=message):
        TTTConfig(num_hidden_layers=2, num_attention_heads=2, hidden_size=32, **bad)
