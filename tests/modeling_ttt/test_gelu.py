"""The GELU by the logistic function is the tanh-GELU, with its first two derivatives."""

import torch
import torch.nn.functional as F

from modeling_ttt.gelu import gelu_backward, gelu_derivatives, gelu_with_gate

X = torch.cat([torch.linspace(-8, 8, 1601, dtype=torch.float64), torch.tensor([-1e4, 1e4], dtype=torch.float64)])


def test_value_and_derivatives_equal_autograd_of_the_tanh_form():
    x = X.clone().requires_grad_()
    value = F.gelu(x, approximate="tanh")
    (first,) = torch.autograd.grad(value.sum(), x, create_graph=True)
    (second,) = torch.autograd.grad(first.sum(), x)
    got, gate = gelu_with_gate(X)
    assert torch.allclose(got, value.detach(), rtol=0, atol=1e-12)
    assert torch.allclose(gelu_backward(torch.full_like(X, 3.0), X, gate), 3 * first.detach(), rtol=0, atol=1e-12)
    assert all(
        torch.allclose(a, b.detach(), rtol=0, atol=1e-12)
        for a, b in zip(gelu_derivatives(X), (first, second), strict=True)
    )


def test_result_goes_where_it_is_wanted():
    room = torch.ones(X.numel(), 2, dtype=torch.float64)
    gelu_with_gate(X, out=room[:, 0])
    assert torch.equal(room[:, 0], gelu_with_gate(X)[0]) and torch.equal(room[:, 1], torch.ones_like(X))
