"""The hand-derived backward of the dual form equals autograd of the reference, for every input, in float64."""

import pytest
import torch

from modeling_ttt import chunked_forward
from modeling_ttt.inner_net import INNER_NETS, InnerNet
from modeling_ttt.scan import scan

from .helpers import NATIVE, tiny, tokens
from .scan_cases import Case, build, leaves, moved, outputs

CASES = {
    "whole mini-batches": Case(length=24),
    "ragged tail": Case(length=21),
    "inside one mini-batch": Case(length=3, first=2),
    "fills the open mini-batch": Case(length=5, first=3),
    "continued in mid mini-batch": Case(length=30, first=13),
    "several groups of states": Case(batch=1, length=300),
    "several groups, continued": Case(batch=1, length=290, first=5),
    "masks, rows at different phases": Case(length=40, first=11, masked=True),
    "document borders": Case(length=40, borders=(5, 16, 17)),
    "borders, masks, continued": Case(length=40, first=9, masked=True, borders=(20, 31, 12)),
    "learning rate zero": Case(length=21, frozen=True),
    "strided": Case(length=19, strided=True),
    "mini-batch of one token": Case(length=5, mini_batch=1),
}


def gradients(inputs, backend, seed=3):
    """Gradients of a random sum of z, plasticity and every tensor of the new state, by name."""
    rng = torch.Generator().manual_seed(seed)
    found, named = outputs(inputs, backend), leaves(inputs)
    total = sum((t * torch.randn(t.shape, generator=rng, dtype=t.dtype)).sum() for t in found.values())
    grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
    return found, {
        # In a slot that holds no write, x is not part of the state.
        n: torch.zeros_like(t) if g is None else g * (t != 0).any(-1, keepdim=True) if n[0] in "xg" else g
        for (n, t), g in zip(named.items(), grads, strict=True)
    }


def worst(got, want):
    """Largest difference over all tensors, each relative to its largest entry (at least 1)."""
    return max(float(((got[n] - want[n]).abs().max() / want[n].abs().max().clamp(min=1)).detach()) for n in want)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
@pytest.mark.parametrize("net", ["linear", "mlp"])
@pytest.mark.parametrize("backend", ["chunked", NATIVE])
def test_gradients_of_every_input_equal_autograd_of_the_reference(backend, net, case):
    inputs = moved(build(Case(**{**vars(case), "net": net})), torch.float64, "cpu", case.strided)
    got, want = gradients(inputs, backend), gradients(inputs, "reference")
    assert worst(got[0], want[0]) < 1e-11
    assert worst(got[1], want[1]) < 1e-10


@pytest.mark.parametrize("backend", ["chunked", NATIVE])
def test_gradients_of_a_deeper_net_equal_the_reference(backend, monkeypatch):
    monkeypatch.setitem(INNER_NETS, "deep", InnerNet("deep", (1, 2, 3, 1)))
    inputs = moved(build(Case(net="deep", length=75, first=3)), torch.float64, "cpu", False)
    assert worst(gradients(inputs, backend)[1], gradients(inputs, "reference")[1]) < 1e-10


@pytest.mark.parametrize("stride", [1, 3])
def test_gradients_do_not_depend_on_which_states_are_kept(monkeypatch, stride):
    inputs = moved(build(Case(net="mlp", length=75)), torch.float64, "cpu", False)
    want = gradients(inputs, "chunked")[1]
    monkeypatch.setattr(chunked_forward, "STATE_TOKENS", 8 * stride)
    assert worst(gradients(inputs, "chunked")[1], want) < 1e-13


def test_gradient_and_no_gradient_give_the_same_numbers():
    inputs = moved(build(Case(net="mlp", length=43, first=3)), torch.float64, "cpu", False)
    with_gradient = outputs(inputs, "chunked")
    with torch.no_grad():
        without = outputs(inputs, "chunked")
    assert all(torch.equal(with_gradient[n], without[n]) for n in without)


def test_autocast_around_the_backward_rounds_nothing():
    inputs = moved(build(Case(net="mlp", length=43)), torch.float32, "cpu", False)
    total = scan(inputs, "chunked").z.square().sum()
    plain = torch.autograd.grad(total, inputs.k, retain_graph=True)[0]
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(torch.autograd.grad(total, inputs.k)[0], plain)


def test_only_what_wants_a_gradient_gets_one():
    inputs = moved(build(Case(length=21)), torch.float64, "cpu", False)
    for name, leaf in leaves(inputs).items():
        leaf.requires_grad_(name == "lr")
    out = scan(inputs, "chunked")
    (gradient,) = torch.autograd.grad(out.z.sum(), inputs.lr)
    assert gradient.abs().sum() > 0


def test_token_without_write_or_gradient_has_a_finite_plasticity_gradient():
    """Where the inner gradient is exactly 0 the norm has no slope; the gradient must not be NaN."""
    inputs = moved(build(Case(length=16)), torch.float64, "cpu", False)
    with torch.no_grad():
        inputs.ln_weight.zero_()  # the inner loss does not depend on the weights any more
    out = scan(inputs, "chunked")
    assert out.plasticity.detach().abs().max() == 0
    grads = torch.autograd.grad(out.plasticity.sum() + out.z.sum(), [inputs.q, inputs.k, inputs.lr])
    assert all(torch.isfinite(g).all() for g in grads)


@pytest.mark.parametrize("backend", ["chunked", NATIVE])
def test_second_derivative_is_refused_and_the_reference_named(backend):
    model = tiny(ttt_backend=backend)
    embeds = model.model.embed_tokens(tokens(1, 9)).detach().requires_grad_()
    (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.square().sum(), embeds, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative: set config.ttt_backend = 'reference'"):
        gradient.sum().backward()
    model.config.ttt_backend = "reference"
    (exact,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.square().sum(), embeds, create_graph=True)
    assert torch.allclose(exact, gradient, atol=1e-9)
    exact.sum().backward()
    assert embeds.grad.abs().sum() > 0


@pytest.mark.parametrize("how", ["double-backward trick", "weights after the layer"])
def test_second_derivative_is_refused_also_when_it_comes_in_from_above(how):
    """The gradient depends on what came in from above, too: dropping that would be a silent error."""
    model = tiny(ttt_backend="chunked", use_cache=False)
    embeds = model.model.embed_tokens(tokens(1, 9)).detach()
    if how == "weights after the layer":
        model.requires_grad_(False)
        weight = model.model.layers[1].mlp.down_proj.weight.requires_grad_()
        embeds.requires_grad_()
        (gradient,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.square().sum(), embeds, create_graph=True)
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.grad(gradient.square().sum(), weight)
    else:
        with pytest.raises(RuntimeError, match="no second derivative"):
            torch.autograd.functional.jvp(lambda x: model(inputs_embeds=x).logits, embeds, torch.ones_like(embeds))


@pytest.mark.parametrize("backend", ["chunked", NATIVE])
@pytest.mark.parametrize("case", ["masks, rows at different phases", "borders, masks, continued"])
def test_nothing_uninitialised_is_read(case, backend):
    """Under deterministic algorithms PyTorch fills new memory with NaN."""
    inputs = moved(build(Case(**{**vars(CASES[case]), "net": "mlp"})), torch.float64, "cpu", False)
    want = gradients(inputs, backend)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        got = gradients(inputs, backend)
    finally:
        torch.use_deterministic_algorithms(False)
    assert worst(got[0], want[0]) == worst(got[1], want[1]) == 0


@pytest.mark.parametrize("backend", ["chunked", NATIVE])
@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_carried_rows_count_as_they_are(net, backend):
    """Rows that do not follow from the weights (edited, or of another model) are read, committed, given gradients."""
    inputs = build(Case(net=net, length=30, first=13))
    for x, g in inputs.state.rows:
        x.mul_(1.5)
        g.mul_(-0.5)
    inputs = moved(inputs, torch.float64, "cpu", False)
    got, want = gradients(inputs, backend), gradients(inputs, "reference")
    assert worst(got[0], want[0]) < 1e-11
    assert worst(got[1], want[1]) < 1e-10


def test_torch_func_sees_the_same_gradient():
    model = tiny(ttt_layer_type="mlp")
    embeds = model.model.embed_tokens(tokens(1, 21)).detach()

    def loss(x):
        return model(inputs_embeds=x).logits.square().sum()

    leaf = embeds.clone().requires_grad_()
    (want,) = torch.autograd.grad(loss(leaf), leaf)
    assert torch.allclose(torch.func.grad(loss)(embeds), want, atol=1e-10)
