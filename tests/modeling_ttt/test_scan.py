"""Choosing a backend: named ones serve or say why not, only "auto" falls back; and the pieces of the inner loop."""

import pytest
import torch
import torch.nn.functional as F

from modeling_ttt.configuration_ttt import BACKEND_NAMES
from modeling_ttt.inner_net import INNER_NETS, InnerNet, forward_chain, output_gradients
from modeling_ttt.objective import reconstruction_gradient, reconstruction_loss, scaled_residual
from modeling_ttt.rotary import rotary_table, rotate
from modeling_ttt.scan import BACKENDS
from modeling_ttt.short_conv import ShortConv
from modeling_ttt.token_grid import TokenGrid

from .helpers import tiny, tokens


def test_a_named_backend_that_cannot_serve_says_why():
    model = tiny(ttt_backend="reference")
    with (
        torch.inference_mode(),
        pytest.raises(ValueError, match="'reference' cannot serve this call: .*inference_mode"),
    ):
        model(tokens(1, 3))
    model.config.ttt_backend = "auto"
    with torch.inference_mode():
        assert model(tokens(1, 3)).logits.shape == (1, 3, 64)
    model.config.ttt_backend = "cuda"
    with pytest.raises(ValueError, match="ttt_backend must be 'auto' or one of"):
        model(tokens(1, 3))


def test_the_configuration_knows_every_backend():
    assert set(BACKEND_NAMES) == {"auto", *BACKENDS}


@pytest.mark.parametrize("widths", [(1, 1), (1, 4, 1), (1, 2, 3, 1)], ids=str)
def test_gradient_factors_equal_autograd_at_any_depth(widths):
    net, f, n = InnerNet("test", widths), 6, 5
    weights = [
        (torch.randn(2, a, b, dtype=torch.float64) * 0.4, torch.randn(2, 1, b, dtype=torch.float64))
        for a, b in net.shapes(f)
    ]
    k, target = torch.randn(2, n, f, dtype=torch.float64), torch.randn(2, n, f, dtype=torch.float64)
    gamma, beta = torch.rand(2, 1, f, dtype=torch.float64) + 0.5, torch.randn(2, 1, f, dtype=torch.float64)
    inputs, outputs = forward_chain(weights, k)
    gradient = reconstruction_gradient(outputs[-1], scaled_residual(target, gamma, beta), gamma.square())
    grads = output_gradients(weights, outputs, gradient)
    leaves = [t.clone().requires_grad_() for pair in weights for t in pair]
    pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
    z = forward_chain(pairs, k)[1][-1]
    expected = torch.autograd.grad(reconstruction_loss(z, target, gamma, beta).sum(), leaves)
    for i, (x, g) in enumerate(zip(inputs, grads, strict=True)):
        assert torch.allclose(x.transpose(1, 2) @ g, expected[2 * i], atol=1e-11)
        assert torch.allclose(g.sum(1, keepdim=True), expected[2 * i + 1], atol=1e-11)


def test_inner_gradient_is_differentiable_once_more():
    f = 5
    z, residual = torch.randn(3, f, dtype=torch.float64), torch.randn(3, f, dtype=torch.float64)
    gamma = torch.rand(f, dtype=torch.float64) + 0.5
    inputs = tuple(t.requires_grad_() for t in (z, residual, gamma))
    assert torch.autograd.gradcheck(reconstruction_gradient, inputs)


def test_both_inner_nets_have_the_official_shapes():
    assert INNER_NETS["linear"].shapes(8) == [(8, 8)]
    assert INNER_NETS["mlp"].shapes(8) == [(8, 32), (32, 8)]
    assert INNER_NETS["mlp"].parameter_names == (("W1", "b1"), ("W2", "b2"))


def test_rotation_turns_neighbouring_pairs_by_the_slot():
    x = torch.randn(1, 4, 1, 6, dtype=torch.float64)  # [B, T, H, f]
    turned = rotate(x, rotary_table(4, 6, 100.0, torch.float64, "cpu")[None, :, None])
    for slot in range(4):
        for pair in range(3):
            angle = slot * 100.0 ** (-2 * pair / 6)
            as_complex = torch.complex(*x[0, slot, 0, 2 * pair : 2 * pair + 2])
            expected = as_complex * torch.exp(torch.tensor(1j * angle, dtype=torch.complex128))
            got = torch.complex(*turned[0, slot, 0, 2 * pair : 2 * pair + 2])
            assert abs(complex(got - expected)) < 1e-12


def test_short_convolution_is_conv1d_with_left_zeros():
    conv = ShortConv(6, 4).double()
    x = torch.randn(2, 9, 6, dtype=torch.float64)
    grid = TokenGrid((2, 9), 4, torch.device("cpu"))
    padded = F.pad(x.transpose(1, 2), (3, 0))
    expected = F.conv1d(padded, conv.weight, conv.bias, groups=6).transpose(1, 2)
    padded = conv.padded(x, None)
    assert torch.allclose(conv(padded, grid), expected, atol=1e-12)
    assert torch.equal(conv.next_tail(padded, grid), x[:, -3:])
