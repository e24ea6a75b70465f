"""Write gates: Captum takes them, their gradient is the true one, and integrated gradients are complete."""

import pytest
import torch
from captum.attr import FeatureAblation, IntegratedGradients

from interp.captum_targets import LogitTarget
from interp.write_gates import (
    WriteGateModel,
    gate_gradient,
    gate_integrated_gradients,
    span_features,
    span_gates,
)

LENGTH = 11


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


def untouched(model):
    return all(p.grad is None and p.requires_grad for p in model.parameters()) and not any(
        m._forward_hooks or m._forward_pre_hooks or m._backward_hooks
        for m in model.modules()
        if m is not model
        and not any("output_capturing" in getattr(h, "__module__", "") for h in m._forward_hooks.values())
    )


TARGET = LogitTarget(9, 5, [6, 7])


def test_feature_ablation_over_gates_is_a_forward_pass_without_the_write(model, ids):
    gated = WriteGateModel(model, ids, TARGET)
    gates = torch.ones(1, LENGTH, dtype=torch.float64)
    found = FeatureAblation(gated).attribute(gates, perturbations_per_eval=3)
    with torch.no_grad():
        full = TARGET.read(model(ids).logits[:, 9])
        for s in range(LENGTH):
            less = TARGET.read(model(ids, ttt_lr_mult=span_gates(LENGTH, [(s, s + 1)])).logits[:, 9])
            torch.testing.assert_close(found[:, s], full - less, rtol=0, atol=1e-10)
    assert found[0, 10].abs() < 1e-14 and found[0, :9].abs().min() > 1e-8
    assert untouched(model)


def test_spans_are_features(model, ids):
    gated = WriteGateModel(model, ids, TARGET)
    spans = [(0, 2), (4, 5)]
    ones = torch.ones(1, LENGTH, dtype=torch.float64)
    found = FeatureAblation(gated).attribute(ones, feature_mask=span_features(LENGTH, spans))
    for first, end in spans:
        expected = gated(ones) - gated(span_gates(LENGTH, [(first, end)], dtype=torch.float64))
        torch.testing.assert_close(found[0, first:end], expected.detach().expand(end - first), rtol=0, atol=1e-10)


def test_the_gate_gradient_is_the_central_difference(model, ids):
    found = gate_gradient(model, ids, TARGET)
    assert found.shape == (1, 2, 2, LENGTH)
    gated, step = WriteGateModel(model, ids, TARGET), 1e-5
    moves = torch.eye(found.numel(), dtype=torch.float64).view(-1, *found.shape[1:]) * step
    with torch.no_grad():
        difference = (gated(1 + moves) - gated(1 - moves)) / (2 * step)
    torch.testing.assert_close(found.flatten(), difference, rtol=1e-6, atol=1e-6)
    assert found.abs().max() > 1e-4 and untouched(model)


def test_gates_integrate_to_the_difference_between_learning_and_not(model, ids):
    found, delta = gate_integrated_gradients(model, ids, TARGET, n_steps=128, rows=32)
    gated = WriteGateModel(model, ids, TARGET)
    difference = (gated(torch.ones(1, LENGTH)) - gated(torch.zeros(1, LENGTH))).detach()
    torch.testing.assert_close(found.sum((1, 2, 3)), difference + delta)
    assert difference.abs() > 1e-4 and delta.abs() < 1e-6 and delta.abs() < 1e-4 * difference.abs()


def test_integrated_gradients_are_those_of_captum(model, ids):
    gated = WriteGateModel(model, ids, TARGET)
    theirs = IntegratedGradients(gated).attribute(gated.open_gates(), n_steps=16)
    ours, _ = gate_integrated_gradients(model, ids, TARGET, n_steps=16, rows=5)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-8)  # Captum rounds the nodes to float32


@pytest.mark.parametrize("method", ["ShapleyValueSampling", "Occlusion", "GradientShap"])
def test_any_perturbation_or_gradient_method_takes_the_gates(tiny_config, method):
    import captum.attr

    from modeling_ttt import TTTForCausalLM

    model, ids = TTTForCausalLM(tiny_config).eval(), torch.randint(0, 64, (1, 6))
    gated, gates = WriteGateModel(model, ids, LogitTarget(5, 5, 6)), torch.ones(1, 6)
    options = {
        "Occlusion": {"sliding_window_shapes": (2,)},
        "GradientShap": {"baselines": torch.zeros(1, 6)},
        "ShapleyValueSampling": {"n_samples": 2},
    }
    found = getattr(captum.attr, method)(gated).attribute(gates, **options[method])
    assert found.shape == gates.shape and found.isfinite().all() and untouched(model)


def test_documents_of_a_padded_batch_do_as_alone(model):
    ids = torch.randint(0, 64, (2, LENGTH))
    mask = torch.ones_like(ids)
    mask[1, :4] = 0
    target = LogitTarget([9, 10], [5, 8], 6)
    both, delta = gate_integrated_gradients(model, ids, target, n_steps=4, attention_mask=mask)
    first, _ = gate_integrated_gradients(model, ids[0], LogitTarget(9, 5, 6), n_steps=4)
    second, _ = gate_integrated_gradients(model, ids[1, 4:], LogitTarget(6, 8, 6), n_steps=4)
    torch.testing.assert_close(both[:1], first)
    torch.testing.assert_close(both[1:, ..., 4:], second)
    assert both[1, ..., :4].abs().max() == 0 and delta.shape == (2,)


def test_a_base_multiplier_holds_besides(model, ids):
    base = torch.ones(1, 2, 1, 1)
    base[:, 1] = 0
    found = gate_gradient(model, ids, TARGET, base=base)
    assert found[:, 1].abs().max() == 0 < found[:, 0].abs().max()


def test_what_does_not_fit_is_refused_and_nothing_stays(model, ids):
    gated = WriteGateModel(model, ids, TARGET)
    with pytest.raises(ValueError, match=r"gates must be \[rows, 11\]"):
        gated(torch.ones(1, 10))
    with pytest.raises(ValueError, match="position must be one column"):
        WriteGateModel(model, ids, LogitTarget(11, 5))
    with pytest.raises(ValueError, match="target and contrast must be token ids"):
        gate_gradient(model, ids, LogitTarget(3, 64))
    mask = torch.ones_like(ids)
    mask[:, 9:] = 0
    with pytest.raises(ValueError, match="position 9 is a padded column in row 0"):
        gate_gradient(model, ids, TARGET, attention_mask=mask)
    with pytest.raises(ValueError, match="base must be broadcastable"):
        gate_gradient(model, ids, TARGET, base=torch.ones(12))
    with pytest.raises(ValueError, match=r"a span is .* got \(4, 4\)"):
        span_gates(LENGTH, [(4, 4)])
    with pytest.raises(ValueError, match="must not overlap"):
        span_features(LENGTH, [(0, 3), (2, 4)])
    assert untouched(model)


def test_gates_work_in_bfloat16(tiny_model, ids):
    found = gate_gradient(tiny_model.bfloat16(), ids, TARGET)
    assert found.dtype == torch.float32 and found.isfinite().all()


def test_a_second_derivative_is_refused_but_by_the_reference_backend(model, ids):
    def hessian_row():
        gates = torch.ones(1, LENGTH, dtype=torch.float64, requires_grad=True)
        value = WriteGateModel(model, ids, TARGET)(gates).sum()
        gradient = torch.autograd.grad(value, gates, create_graph=True)[0]
        return torch.autograd.grad(gradient[0, 0], gates)[0]

    model.config.ttt_backend = "chunked"
    with pytest.raises(Exception, match="second derivative"):
        hessian_row()
    model.config.ttt_backend = "reference"
    assert hessian_row().isfinite().all()
