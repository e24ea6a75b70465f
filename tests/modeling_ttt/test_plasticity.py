"""Plasticity is the norm of the explicitly built weight update, and the writes add up to what is committed."""

import pytest
import torch
import torch.nn.functional as F

from .helpers import BACKBONES, distance, tiny, tokens


@torch.no_grad()
def inner_loop_inputs(model, ids, layer, **kwargs):
    """k, v, lr and tau of one layer, read through its taps and its value projection."""
    mixer, seen = model.model.layers[layer].seq_modeling_block, {}
    hooks = [
        mixer.tap_k.register_forward_hook(lambda m, a, out: seen.update(k=out)),
        mixer.tap_lr.register_forward_hook(lambda m, a, out: seen.update(lr=out[..., 0])),
        mixer.v_proj.register_forward_hook(
            lambda m, a, out: seen.update(v=out.unflatten(-1, (2, -1)).transpose(1, 2))
        ),
    ]
    try:
        out = model(ids, **kwargs)
    finally:
        for hook in hooks:
            hook.remove()
    return seen["k"], seen["v"], seen["lr"], mixer.token_rate(torch.float64), out


def explicit_write(params, k, v, mixer, head):
    """Gradient of the inner loss of one token with respect to every inner weight, by torch.func."""

    def loss(params):
        x = k
        for i in range(0, len(params), 2):
            x = F.gelu(x, approximate="tanh") if i else x
            x = x @ params[i] + params[i + 1]
        normed = F.layer_norm(x, x.shape[-1:], mixer.ttt_norm_weight[head], mixer.ttt_norm_bias[head], 1e-6)
        return 0.5 * (normed - (v - k)).square().sum()

    return torch.func.grad(loss)(params)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_plasticity_is_the_norm_of_the_built_update_and_writes_sum_to_the_commit(kind):
    model = tiny(ttt_layer_type=kind, **BACKBONES["mamba"])
    size, ids = model.config.mini_batch_size, tokens(2, 12)
    names = [name for pair in model.config.inner_net.parameter_names for name in pair]
    for layer in range(2):
        k, v, lr, tau, out = inner_loop_inputs(model, ids, layer)
        mixer = model.model.layers[layer].seq_modeling_block
        final = out.past_key_values.layers[layer].tensors
        for row in range(2):
            for head in range(2):
                params = tuple(
                    getattr(mixer, name)[head].detach().squeeze(0)
                    if name[0] == "b"
                    else getattr(mixer, name)[head].detach()
                    for name in names
                )
                for start in range(0, 12, size):
                    writes = []
                    for t in range(start, start + size):
                        grads = explicit_write(params, k[row, head, t], v[row, head, t], mixer, head)
                        writes.append(tuple(tau[-1] * lr[row, head, t] * g for g in grads))
                        norm = torch.sqrt(sum(w.square().sum() for w in writes[-1]))
                        assert distance(norm, out.plasticity[layer][row, head, t]) < 1e-12
                        assert float(norm.detach()) > 1e-6
                    params = tuple(p - sum(w[i] for w in writes) for i, p in enumerate(params))
                for name, param in zip(names, params, strict=True):
                    assert distance(final[name][row, head].reshape(param.shape), param) < 1e-12


def test_plasticity_has_a_gradient_to_the_multiplier_and_none_at_a_frozen_token():
    model = tiny()
    mult = torch.ones(1, 1, 1, 10, dtype=torch.float64)
    mult[..., 3] = 0
    mult.requires_grad_()
    out = model(tokens(1, 10), ttt_lr_mult=mult)
    assert float(out.plasticity[0][..., 3].detach().abs().sum()) == 0
    out.plasticity[1][..., 7].sum().backward()
    assert torch.isfinite(mult.grad).all()
    assert float(mult.grad[..., 8:].abs().sum()) == 0
    assert float(mult.grad[..., 7]) > 0


def test_plasticity_is_float32_in_a_bfloat16_model_and_off_on_request():
    model = tiny(dtype=torch.bfloat16)
    with torch.no_grad():
        out = model(tokens(2, 9))
        assert [p.dtype for p in out.plasticity] == [torch.float32] * 2
        assert out.plasticity[0].shape == (2, 2, 9)
        assert {t.dtype for t in out.past_key_values.layers[0].tensors.values()} == {torch.float32, torch.int64}
        assert model(tokens(2, 9), output_plasticity=False).plasticity is None
        model.config.output_plasticity = False
        assert model(tokens(2, 9)).plasticity is None


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_stats_of_both_backends_agree_with_padding_and_splits(kind):
    model = tiny(ttt_layer_type=kind, **BACKBONES["mamba"])
    ids = tokens(2, 18)
    mask = torch.ones_like(ids)
    mask[1, :5] = 0
    kwargs = {"attention_mask": mask, "output_ttt_stats": True}
    with torch.no_grad():
        chunked = model(ids, **kwargs)
        model.config.ttt_backend = "reference"
        reference = model(ids, **kwargs)
    for one, other in zip(chunked.ttt_stats, reference.ttt_stats, strict=True):
        for name in one:
            # rounding of a root near zero: step_norm and state_drift are square roots of sums of squares
            assert distance(one[name], other[name]) < 1e-7, name
            assert float(one[name][1, :, :5].abs().sum()) == 0, name
    model.config.ttt_backend = "auto"
    with torch.no_grad():
        first = model(ids[:1, :7], output_ttt_stats=True, use_cache=True)
        second = model(ids[:1, 7:], output_ttt_stats=True, past_key_values=first.past_key_values)
    for layer in range(2):
        for name in ("inner_grad_norm", "lr", "step_norm", "loss_init", "loss_before", "loss_after", "state_drift"):
            joined = torch.cat([first.ttt_stats[layer][name], second.ttt_stats[layer][name]], 2)
            assert distance(joined, chunked.ttt_stats[layer][name][:1]) < 1e-7, name


def test_taps_fire_once_per_call_and_the_gradient_tap_is_for_reading():
    model = tiny(ttt_layer_type="mlp")
    mixer, shapes = model.model.layers[0].seq_modeling_block, {}
    taps = ("tap_q", "tap_k", "tap_lr", "tap_inner_grad", "tap_readout")
    for tap in taps:
        getattr(mixer, tap).register_forward_hook(
            lambda module, args, out, tap=tap: shapes.setdefault(tap, []).append(tuple(out.shape))
        )
    with torch.no_grad():
        model(tokens(2, 9))
    f = model.config.head_dim
    assert shapes == {
        "tap_q": [(2, 2, 9, f)],
        "tap_k": [(2, 2, 9, f)],
        "tap_lr": [(2, 2, 9, 1)],
        "tap_inner_grad": [(2, 2, 9, 5 * f)],
        "tap_readout": [(2, 2, 9, f)],
    }
    mixer.tap_inner_grad.register_forward_hook(lambda module, args, out: out * 2)
    with torch.no_grad(), pytest.raises(ValueError, match="tap_inner_grad is for reading"):
        model(tokens(2, 9))
