"""Records say what the layers did: read-outs, plasticity and gradients come out of them again."""

import pytest
import torch
import torch.nn.functional as F

from interp.inner_reads import write_inputs
from interp.records import record_writes
from interp.taps import mixers
from tests.interp.strong_models import VARIANTS, hooked_taps, random_ids, strong_model

RAGGED = (1, 3, 4, 5, 23)  # around K = 4, and 5 K + 3


@pytest.fixture
def model(layer_type):
    return strong_model(layer_type)


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_read_outs_come_out_of_the_writes(layer_type, variant):
    model = strong_model(layer_type, **VARIANTS[variant])
    for length in RAGGED:
        records = record_writes(model, random_ids(2, length))
        assert records.readout_error < 1e-12
    reads = records[1].reads()
    learnt = reads - read_at_start(records[1])
    assert learnt.norm() > 0.05 * reads.norm(), "the inner loop must matter here"


def read_at_start(record):
    x = record.q
    for i, (weight, bias) in enumerate(record.initial):
        x = (F.gelu(x, approximate="tanh") if i else x) @ weight + bias
    return x


def padded_case():
    ids, mask = random_ids(3, 23), torch.ones(3, 23, dtype=torch.long)
    mask[0, :5], mask[1, 17:], mask[2, 8:10] = 0, 0, 0
    border = torch.zeros(3, 23, dtype=torch.bool)
    border[0, 12] = border[2, 7] = border[2, 16] = border[0, 2] = True
    return ids, {"attention_mask": mask, "reset_at": border}


def test_padding_and_document_borders_are_those_of_the_model(model):
    ids, options = padded_case()
    for given in (options, {"attention_mask": options["attention_mask"]}, {"reset_at": [7, 30]}):
        records = record_writes(model, ids, **given)
        assert records.readout_error < 1e-12
        with torch.no_grad():
            plasticity = model(ids, **given).plasticity
        for record, expected in zip(records.layers, plasticity, strict=True):
            torch.testing.assert_close(record.commits(), expected, rtol=1e-12, atol=1e-14)


def test_rows_of_a_padded_batch_are_as_alone(model):
    ids, options = padded_case()
    together = record_writes(model, ids, attention_mask=options["attention_mask"])
    for row, real in enumerate(options["attention_mask"].bool()):
        alone = record_writes(model, ids[row, real])
        for one, other in zip(together.layers, alone.layers, strict=True):
            for name in ("q", "k", "lr", "readout", "read_rstd"):
                torch.testing.assert_close(
                    getattr(one, name)[row][:, real], getattr(other, name)[0], rtol=0, atol=1e-12
                )


@pytest.mark.parametrize("piece_tokens", [1, 15, 24])
def test_pieces_give_the_same_records(model, piece_tokens):
    ids, options = padded_case()
    whole, pieces = (record_writes(model, ids, piece_tokens=n, **options) for n in (10**6, piece_tokens))
    for one, other in zip(whole.layers, pieces.layers, strict=True):
        for name in ("q", "k", "lr", "readout", "read_mean", "read_rstd", "post_mean", "post_rstd"):
            real = one.places.real[:, None].expand(one.lr.shape) if "post" not in name else one.places.real
            torch.testing.assert_close(getattr(one, name)[real], getattr(other, name)[real], rtol=0, atol=1e-12)
        for a, b in zip(one.gradients, other.gradients, strict=True):
            torch.testing.assert_close(a, b, rtol=0, atol=1e-12)


def test_gradients_are_those_of_the_inner_loss(model):
    """Autograd on the loss at the weights of the cache, v being read at its projection."""
    ids, layer, seen = random_ids(1, 11), mixers(model)[1], {}
    records = record_writes(model, ids)
    handle = layer.v_proj.register_forward_hook(lambda module, args, out: seen.update(v=out.detach()))
    with torch.no_grad():
        model(ids)
        handle.remove()
        start = model(ids[:, :8], use_cache=True).past_key_values.layers[1].tensors
    weights = [start[f"{x}{i}"].clone().requires_grad_() for i in range(1, len(records[1].initial) + 1) for x in "Wb"]
    inputs = write_inputs(records[1])
    for t in (8, 10):  # tokens of the mini-batch that starts at 8
        v = seen["v"].view(1, 11, 2, 16).transpose(1, 2)[:, :, t : t + 1]
        k = records[1].k[:, :, t : t + 1]
        x = k
        for i in range(0, len(weights), 2):
            x = (F.gelu(x, approximate="tanh") if i else x) @ weights[i] + weights[i + 1]
        fitted = layer.ttt_norm_weight[:, None] * F.layer_norm(x, (16,), eps=1e-6) + layer.ttt_norm_bias[:, None]
        loss = 0.5 * (fitted - (v - k)).square().sum()
        found = torch.autograd.grad(loss, weights)
        for i, (x, g) in enumerate(zip(inputs, records[1].gradients, strict=True)):
            outer = x[:, :, t, :, None] * g[:, :, t, None]
            torch.testing.assert_close(found[2 * i], outer, rtol=0, atol=1e-12)
            torch.testing.assert_close(found[2 * i + 1][:, :, 0], g[:, :, t], rtol=0, atol=1e-12)


def test_multipliers_freezing_and_a_clamped_rate_are_in_the_records(model):
    ids = random_ids(2, 14)
    model.config.frozen_heads = {1: [0]}
    mixers(model)[0].learnable_token_idx.data[1] = -5.0  # tau of slot 1 is clamped to 0
    mult = torch.linspace(-0.5, 1.5, 14, dtype=torch.float64)
    records = record_writes(model, ids, ttt_lr_mult=mult)
    assert records.readout_error < 1e-12
    assert records[0].token_rate[1] == 0 and (records[1].lr[:, 0] == 0).all()
    plain = record_writes(model, ids)
    torch.testing.assert_close(records[0].lr, plain[0].lr * mult, rtol=1e-12, atol=0)


def test_norm_statistics_are_those_of_the_norms(model):
    records, layer, seen = record_writes(model, random_ids(2, 10)), mixers(model)[0], {}
    handle = layer.post_norm.register_forward_pre_hook(lambda module, args: seen.update(x=args[0].detach()))
    with torch.no_grad():
        model(random_ids(2, 10))
    handle.remove()
    torch.testing.assert_close(records[0].post_mean, seen["x"].mean(-1))
    torch.testing.assert_close(records[0].post_rstd, (seen["x"].var(-1, correction=0) + 1e-6).rsqrt())
    reads = records[0].reads()
    torch.testing.assert_close(records[0].read_rstd, (reads.var(-1, correction=0) + 1e-6).rsqrt())


def test_chosen_layers_and_heads_are_parts_of_the_whole(model):
    ids = random_ids(1, 9)
    whole, part = record_writes(model, ids), record_writes(model, ids, layers=[1], heads=[1])
    assert [r.layer for r in part.layers] == [1] and part[1].heads == (1,)
    for name in ("q", "k", "lr", "readout"):
        assert torch.equal(getattr(part[1], name), getattr(whole[1], name)[:, 1:])
    assert torch.equal(part[1].post_rstd, whole[1].post_rstd)
    with pytest.raises(ValueError, match=r"layer must be one of the recorded \[1\], got 0"):
        part[0]


def test_no_hook_stays_even_after_an_exception(model):
    before = [p.requires_grad for p in model.parameters()]
    record_writes(model, random_ids(1, 6))
    handle = mixers(model)[1].tap_readout.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        record_writes(model, random_ids(1, 6))
    handle.remove()
    assert not hooked_taps(model) and [p.requires_grad for p in model.parameters()] == before


def test_half_precision_is_recorded_in_float32(layer_type):
    model = strong_model(layer_type, **VARIANTS["mamba"]).bfloat16()
    records = record_writes(model, random_ids(1, 13))
    assert records[0].k.dtype == torch.float32 and records.readout_error < 1e-5


def test_what_does_not_fit_is_refused(model):
    with pytest.raises(ValueError, match="input_ids must be token ids"):
        record_writes(model, torch.zeros(1, 2, 3, dtype=torch.long))
    with pytest.raises(ValueError, match="layers must be some of the TTT layers"):
        record_writes(model, random_ids(1, 4), layers=[5])
    with pytest.raises(ValueError, match="piece_tokens must be at least 1"):
        record_writes(model, random_ids(1, 4), piece_tokens=0)
    with pytest.raises(ValueError, match="reset_at as a mask must be"):
        record_writes(model, random_ids(1, 4), reset_at=torch.ones(1, 3, dtype=torch.bool))
    with pytest.raises(ValueError, match=r"ttt_lr_mult must be broadcastable to .* got \[5\]"):
        record_writes(model, random_ids(1, 4), ttt_lr_mult=torch.ones(5))
    with pytest.raises(ValueError, match="no module with a tap_readout"):
        mixers(torch.nn.Linear(2, 2))


def test_read_outs_that_are_no_numbers_are_no_agreement(model):
    model.model.layers[0].seq_norm.weight.data[0] = torch.nan
    with pytest.raises(ValueError, match="relative difference nan"):
        record_writes(model, random_ids(1, 6))
