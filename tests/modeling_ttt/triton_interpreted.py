"""Claims about the Triton kernels, run in Triton's interpreter.

`test_scan_triton` starts this file in a process of its own, because Triton decides when a kernel is defined whether to
interpret it. By hand: `TRITON_INTERPRET=1 python -m pytest tests/modeling_ttt/triton_interpreted.py`.
"""

from dataclasses import replace

import pytest
import torch

from modeling_ttt import scan_triton
from modeling_ttt.scan import scan
from modeling_ttt.scan_triton import unsupported
from modeling_ttt.trial import trial

from .helpers import tiny, tokens
from .scan_cases import Case, build, errors, gradient_errors, leaves, moved, outputs

OUTPUT, GRADIENT = 5e-6, 1.5e-5
CASES = {
    "ragged_tail": Case(length=21),
    "goes_on_mid_mini_batch": Case(length=14, first=11, head_dim=24, strided=True),
    "stays_inside_a_mini_batch": Case(length=3, first=2),
    "one_token": Case(length=1, first=5),
    "several_groups_of_mini_batches": Case(length=85, batch=1, mini_batch=16),
    "mini_batch_32_head_dim_64": Case(length=40, batch=1, heads=1, head_dim=64, mini_batch=32, first=5),
    "masks_and_phases": Case(length=20, batch=3, masked=True, first=9),
    "borders": Case(length=20, masked=True, first=9, borders=(12, 15, 20)),
    "frozen_tokens_and_heads": Case(length=17, frozen=True),
    "odd_sizes": Case(length=25, batch=1, mini_batch=12, head_dim=20),
    "large_mean": Case(length=17, batch=1, offset=3.0),
    "small_mini_batch": Case(length=9, mini_batch=4, first=2),
}


@pytest.fixture(params=["ieee", "tf32"])
def precision(request, monkeypatch):
    """Exact products, and the shorter reductions that go with rounded ones (the interpreter itself rounds nothing)."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = request.param
    yield request.param
    torch.backends.cuda.matmul.fp32_precision = before


def worst(found):
    return max((error, name) for name, error in found.items())


@pytest.mark.parametrize("name", CASES)
def test_ttt_linear_equals_float64_forward_and_backward(name, precision):
    if precision == "tf32" and name not in ("goes_on_mid_mini_batch", "masks_and_phases", "mini_batch_32_head_dim_64"):
        pytest.skip("the precisions differ only inside the chain")
    found, gradients = gradient_errors(CASES[name])
    assert worst(found) < (OUTPUT,)
    assert worst(gradients) < (GRADIENT,)


@pytest.mark.parametrize("name", CASES)
def test_ttt_mlp_equals_float64_forward_and_backward(name):
    found, gradients = gradient_errors(replace(CASES[name], net="mlp"))
    assert worst(found) < (OUTPUT,)
    assert worst(gradients) < (GRADIENT,)


@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_half_precision_factors_stay_close(net):
    found = errors(Case(net=net, length=21, mini_batch=16), operand_dtype=torch.bfloat16)
    assert 1e-4 < worst(found)[0] < 1e-2


def test_what_a_frozen_head_keeps_is_bit_equal():
    inputs = moved(build(Case(length=17, frozen=True)), torch.float32, "cpu", False)
    weight, bias = scan(inputs, "triton").state.weights[0]
    assert torch.equal(weight[:, 0], inputs.initial_weights[0][0][0].expand_as(weight[:, 0]))
    assert torch.equal(bias[:, 0], inputs.initial_weights[0][1][0].expand_as(bias[:, 0]))


@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_a_second_derivative_is_refused(net):
    inputs = moved(build(Case(net=net, length=9, batch=1, heads=1)), torch.float32, "cpu", False)
    z = scan(inputs, "triton").z
    (gradient,) = torch.autograd.grad(z.sum(), inputs.k, create_graph=True)
    with pytest.raises(RuntimeError, match="'triton' has no second derivative"):
        gradient.sum().backward()


@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_the_self_check_passes_and_finds_a_wrong_kernel(net, monkeypatch):
    configuration = scan_triton.scan_triton, torch.device("cpu"), net, 16, 32, "ieee", False
    assert trial(*configuration) is None
    right = scan_triton.unalign
    monkeypatch.setattr(scan_triton, "unalign", lambda *args: 1.001 * right(*args))
    assert trial(*configuration).startswith("its self-check failed: z is off by 1.0e-03")
    monkeypatch.setattr(scan_triton, "unalign", lambda *args: 1 / 0)
    assert "could not run: ZeroDivisionError" in trial(*configuration)


def test_the_self_check_of_a_training_step_passes_with_rounded_factors():
    with torch.device("meta"):  # whatever default device the caller has set
        assert trial(scan_triton.scan_triton, torch.device("cpu"), "linear", 32, 16, "bf16", True) is None


def test_a_call_that_cannot_be_served_says_why():
    inputs = moved(build(Case(length=9)), torch.float32, "cpu", False)
    assert unsupported(inputs) is None
    reasons = {
        "float32": moved(inputs, torch.float64, "cpu", False),
        "output_ttt_stats": replace(inputs, want_stats=True),
        "tap_inner_grad": replace(inputs, want_gradients=True),
        "up to 64 tokens": replace(inputs, tau=torch.ones(65)),
        "head dims up to 128": replace(inputs, q=torch.zeros(2, 2, 9, 130)),
    }
    for reason, refused in reasons.items():
        assert reason in unsupported(refused)
        with pytest.raises(ValueError, match="'triton' cannot serve this call"):
            scan(refused, "triton")


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_model_gives_the_same_with_either_backend(kind):
    model = tiny(torch.float32, ttt_layer_type=kind, hidden_size=32, mini_batch_size=8)
    ids = tokens(2, 21)
    mask = torch.ones_like(ids)
    mask[0, :6] = 0
    results = []
    for backend in ("triton", "chunked"):
        model.config.ttt_backend = backend
        with torch.no_grad():
            first = model(ids[:, :13], attention_mask=mask[:, :13], use_cache=True)
            second = model(ids[:, 13:], attention_mask=mask, past_key_values=first.past_key_values)
        results.append((first.logits[1], second.logits, second.plasticity[0], second.plasticity[1]))
    for got, want in zip(*results, strict=True):
        assert torch.allclose(got, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))


@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_a_full_graph_compiles_and_gives_equal_gradients(net):
    inputs = moved(build(Case(net=net, length=16, batch=1, heads=1, first=3)), torch.float32, "cpu", False)
    named = {name: t for name, t in leaves(inputs).items() if name in ("q", "k", "v", "lr", "tau", "W1")}
    plain, compiled = outputs, torch.compile(outputs, fullgraph=True, backend="aot_eager")
    found = [
        torch.autograd.grad(sum(t.square().sum() for t in run(inputs, "triton").values()), list(named.values()))
        for run in (plain, compiled)
    ]
    for one, other in zip(*found, strict=True):
        assert torch.equal(one, other)


@pytest.mark.slow
@pytest.mark.parametrize("first", [0, 3])
@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_the_operators_pass_opcheck(net, first, monkeypatch):
    name = f"{net}_forward"
    operator, calls = getattr(scan_triton, name), []
    monkeypatch.setattr(scan_triton, name, lambda **kwargs: calls.append(kwargs) or operator(**kwargs))
    inputs = moved(build(Case(net=net, length=12, batch=1, heads=1, first=first)), torch.float32, "cpu", False)
    scan(inputs, "triton")

    def leaf(value):
        if not isinstance(value, torch.Tensor):
            return value
        return value.detach().requires_grad_(value.requires_grad)

    (arguments,) = calls
    torch.library.opcheck(operator, (), {name: leaf(value) for name, value in arguments.items()}, atol=1e-4, rtol=1e-4)
