"""Knock-outs are forward passes without the writes, and unlearning is never having learnt."""

import pytest
import torch

from interp.ablation import erase_curve, freeze_effects, learn_without, write_knockout
from interp.captum_targets import LogitTarget
from interp.taps import mixers
from interp.write_gates import span_gates
from interp.write_subtraction import _read_without

LENGTH = 15
TARGET = LogitTarget(12, 5, [6, 7])


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(1)
    for name, parameter in tiny_model.named_parameters():
        if parameter.dim() > 1 and "embed" not in name:
            torch.nn.init.normal_(parameter, std=0.2)
    return tiny_model.double()


@pytest.fixture
def ids():
    return torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(2))


def surprisal(logits, ids):
    return -logits.log_softmax(-1)[:, :-1].gather(2, ids[:, 1:, None])[..., 0]


def has_hooks(model):
    return any(
        getattr(layer, tap)._forward_hooks
        for layer in mixers(model)
        for tap in vars(layer)["_modules"]
        if tap.startswith("tap_")
    )


SPANS = [(9, 11), (0, 1), (5, 7), (14, 15)]


@pytest.mark.parametrize("rows", [1, 3, 8])
def test_a_knockout_is_a_forward_pass_without_the_writes(model, ids, rows):
    found = write_knockout(model, ids, SPANS, rows=rows)
    with torch.no_grad():
        for i, span in enumerate(SPANS):
            gates = span_gates(LENGTH, [span])
            expected = surprisal(model(ids, ttt_lr_mult=gates).logits, ids)[0]
            torch.testing.assert_close(found.knocked[i, 1:], expected, rtol=0, atol=1e-10)
    assert found.knocked[:, 0].isnan().all() and found.total.shape == (4,)
    assert found.to_pandas()["first"].tolist() == [9, 0, 5, 14]


@pytest.mark.parametrize("mode", ["recompute", "subtract"])
def test_everything_before_a_knocked_out_write_is_bit_equal(model, ids, mode):
    found = write_knockout(model, ids, SPANS, mode=mode)
    for i, (first, _) in enumerate(SPANS):
        assert torch.equal(found.knocked[i, 1 : first + 1], found.baseline[1 : first + 1])
    with torch.no_grad():  # and in the model itself
        full = model(ids, ttt_lr_mult=torch.ones(1, LENGTH)).logits
        less = model(ids, ttt_lr_mult=span_gates(LENGTH, [(6, 7)])).logits
    assert torch.equal(full[:, :6], less[:, :6]) and not torch.equal(full[:, 6], less[:, 6])


@pytest.mark.parametrize("layer", [0, 1])
def test_recompute_and_subtract_agree_within_the_mini_batch(model, ids, layer):
    both = [write_knockout(model, ids, [(4, 6)], layers=[layer], mode=mode) for mode in ("recompute", "subtract")]
    # Tokens 4 to 7 are one mini-batch; the read at 7 predicts token 8.
    torch.testing.assert_close(both[0].effect[:, 1:9], both[1].effect[:, 1:9], rtol=0, atol=1e-12)
    assert both[0].effect[:, 5:9].abs().max() > 1e-5
    assert (both[0].effect - both[1].effect)[:, 9:].abs().max() > 1e-9
    assert not has_hooks(model)


def test_subtraction_is_the_sum_over_the_writes_that_stay(model, ids):
    """Against the dense formula of TTT-Linear: read - rate (q . k + 1) g summed over the kept writes."""
    if model.config.ttt_layer_type != "linear":
        pytest.skip("the dense formula is that of one inner map")
    layer, record = mixers(model)[1], {}
    taps = ("tap_q", "tap_k", "tap_lr", "tap_inner_grad")
    handles = [
        getattr(layer, tap).register_forward_hook(lambda m, a, out, tap=tap: record.update({tap: out.detach()}))
        for tap in taps
    ]
    with torch.no_grad():
        model(ids)
        for handle in handles:
            handle.remove()
        keep = (torch.rand(3, 2, LENGTH) > 0.4).double()
        found = _read_without(layer, record, keep)
        q, k, lr, g = (record[tap] for tap in taps)
        tau, place = layer.token_rate(q.dtype), torch.arange(LENGTH)
        same = place[:, None] // 4 == place // 4
        rate = torch.where(same, tau[place % 4][:, None], tau[3]).tril() * (lr[..., 0] * keep)[:, :, None]
        z = q @ layer.W1 + layer.b1 - (rate * (q @ k.mT + 1)) @ g
        normed = torch.nn.functional.layer_norm(z, z.shape[-1:], eps=1e-6)
        expected = q + layer.ttt_norm_bias[:, None] + layer.ttt_norm_weight[:, None] * normed
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_subtracting_nothing_changes_nothing(model, ids):
    model.config.frozen_layers = [0]
    found = write_knockout(model, ids, SPANS, layers=[0], mode="subtract")
    torch.testing.assert_close(found.effect[:, 1:], torch.zeros(4, LENGTH - 1).double(), rtol=0, atol=1e-12)


def test_a_logit_target_is_the_ablation_over_gates(model, ids):
    from captum.attr import FeatureAblation

    from interp.write_gates import WriteGateModel

    spans = [(s, s + 1) for s in range(LENGTH)]
    for layers, heads in ((None, None), ([1], [0])):
        found = write_knockout(model, ids, spans, layers=layers, heads=heads, target=TARGET)
        gated = WriteGateModel(model, ids, TARGET)
        ones = gated.open_gates()
        features = torch.arange(1, LENGTH + 1).expand(ones.shape).clone()
        if layers:
            features[:, 0], features[:, :, 1] = 0, 0
        theirs = FeatureAblation(gated).attribute(ones, feature_mask=features)
        torch.testing.assert_close(found.total, theirs[0, 1, 0], rtol=0, atol=1e-10)
    assert (found.effect[13:] == 0).all()


def test_the_effect_of_freezing_a_layer_is_that_of_two_forward_passes(model, ids):
    layers, effects = freeze_effects(model, ids)
    assert layers == [0, 1] and effects.shape == (2, LENGTH) and effects[:, 0].isnan().all()
    with torch.no_grad():
        full = surprisal(model(ids).logits, ids)[0]
        for layer in layers:
            model.config.frozen_layers = [layer]
            frozen = surprisal(model(ids).logits, ids)[0]
            torch.testing.assert_close(effects[layer, 1:], frozen - full, rtol=0, atol=1e-10)
    assert effects[:, 1:].abs().max() > 1e-6


def test_padding_is_set_aside(model, ids):
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.ones_like(padded)
    mask[:, :3] = 0
    alone = write_knockout(model, ids, SPANS)
    moved = [(a + 3, b + 3) for a, b in SPANS]
    found = write_knockout(model, padded, [*moved, (0, 2)], attention_mask=mask)
    torch.testing.assert_close(found.knocked[:4, 4:], alone.knocked[:, 1:])
    assert found.knocked[:, :4].isnan().all() and found.total[4] == 0


def test_what_does_not_fit_is_refused(model, ids):
    with pytest.raises(ValueError, match="mode must be one of"):
        write_knockout(model, ids, SPANS, mode="mean")
    with pytest.raises(ValueError, match="layers must be some of the TTT layers"):
        write_knockout(model, ids, SPANS, layers=[2])
    with pytest.raises(ValueError, match="heads must be some of 0 to 1"):
        write_knockout(model, ids, SPANS, heads=[-1])
    mask = torch.ones_like(ids)
    mask[:, 12:] = 0
    with pytest.raises(ValueError, match="position 12 is a padded column"):
        write_knockout(model, ids, [(0, 2)], target=TARGET, attention_mask=mask)
    with pytest.raises(ValueError, match="one document, got 2"):
        write_knockout(model, ids.repeat(2, 1), SPANS)


def test_no_hook_stays_after_an_exception(model, ids):
    def fail(*args):
        raise RuntimeError("stop")

    for tap in ("tap_inner_grad", "tap_readout"):  # while recording, and while reading
        handle = getattr(mixers(model)[1], tap).register_forward_hook(fail)
        with pytest.raises(RuntimeError, match="stop"):
            write_knockout(model, ids, SPANS, mode="subtract", rows=1)
        handle.remove()
        assert not has_hooks(model)


def states(cache):
    return [t for layer in cache.layers for t in layer.tensors.values()]


def test_an_erased_span_was_never_learnt(model, ids):
    with torch.no_grad():
        masked = model(ids, ttt_lr_mult=span_gates(LENGTH, [(2, 4), (8, 9)]), use_cache=True).past_key_values
        full = model(ids, use_cache=True).past_key_values
        start = model(ids[:, :4], ttt_lr_mult=span_gates(4, [(2, 4)]), use_cache=True).past_key_values
    kept = [t.clone() for t in states(start)]
    erased = learn_without(model, ids, [(2, 4), (8, 9)])
    for a, b in zip(states(erased), states(masked), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(states(erased)[0], states(full)[0])
    later = learn_without(model, ids[:, 4:], [(4, 5)], past_key_values=start)
    for a, b in zip(states(later), states(masked), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12)
    assert all(torch.equal(a, b) for a, b in zip(states(start), kept, strict=True))


@pytest.mark.parametrize("shape", [(LENGTH,), (2, 2, LENGTH)])
def test_erase_curves_join_all_and_nothing(model, ids, shape):
    scores = torch.randn(shape)
    deletion = erase_curve(model, ids, scores, TARGET, steps=6, random_orders=3)
    insertion = erase_curve(model, ids, scores, TARGET, kind="insertion", steps=6, random_orders=3)
    with torch.no_grad():
        full = TARGET.read(model(ids).logits[:, 12]).item()
        none = TARGET.read(model(ids, ttt_lr_mult=torch.zeros(1)).logits[:, 12]).item()
    assert deletion.values[[0, -1]] == pytest.approx([full, none], abs=1e-10)
    assert insertion.values[[0, -1]] == pytest.approx([none, full], abs=1e-10)
    assert deletion.random_values.shape == (3, 7) and deletion.random_auc.shape == (3,)
    table = deletion.to_pandas()
    assert (
        list(table) == ["fraction", "value", "random_low", "random_high"]
        and (table.random_low <= table.random_high).all()
    )
    again = erase_curve(model, ids, scores, TARGET, steps=6, random_orders=3, rows=2)
    assert again.values == pytest.approx(deletion.values, abs=1e-10)


def test_the_area_of_a_known_curve(model, ids):
    scores = torch.zeros(LENGTH)
    scores[3] = 1
    curve = erase_curve(model, ids, scores, TARGET, steps=13, random_orders=0)
    effect = write_knockout(model, ids, [(3, 4)], target=TARGET).total.item()
    assert curve.values[0] - curve.values[1] == pytest.approx(effect, abs=1e-10)
    assert curve.auc == pytest.approx(((curve.values[1:] + curve.values[:-1]) / 2).mean())


def test_an_offloaded_model_gives_the_same(model, ids):
    from accelerate import cpu_offload

    def results():
        found = [write_knockout(model, ids, SPANS, mode=mode).knocked for mode in ("recompute", "subtract")]
        curve = erase_curve(model, ids, torch.arange(LENGTH).float(), TARGET, steps=4)
        return [*found, torch.from_numpy(curve.values), *states(learn_without(model, ids, [(2, 4)]))]

    here = results()
    cpu_offload(model, execution_device=torch.device("cpu"))
    for a, b in zip(here, results(), strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-12, equal_nan=True)
