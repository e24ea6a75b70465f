"""The tanh-GELU of the inner nets and its derivatives, by the logistic function.

(1 + tanh u) / 2 = logistic(2 u), so gelu(x) = x logistic(v) with v = x (a + c x^2). On a CPU the logistic function is
vectorised far better than tanh, which is most of what an inner MLP costs besides its products; elsewhere one fused
kernel is best.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["gelu_backward", "gelu_derivatives", "gelu_with_gate"]

_A = 2 * math.sqrt(2 / math.pi)
_C = 0.044715 * _A
_FAR = 1e4


def gelu_with_gate(x: Tensor, out: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """(gelu(x), logistic(v)); the first is written to `out` if that is given. Not differentiable by autograd."""
    if x.device.type != "cpu":
        result = F.gelu(x, approximate="tanh")
        return result if out is None else out.copy_(result), result
    gate = _slope(x, _C).mul_(x).sigmoid_()
    if out is not None and torch.compiler.is_compiling():  # which takes no strided out
        return out.copy_(x * gate), gate
    return torch.mul(x, gate, out=out), gate


def gelu_backward(upstream: Tensor, x: Tensor, gate: Tensor) -> Tensor:
    """`upstream` times the derivative of the GELU at x, with the gate that `gelu_with_gate` gave there."""
    if x.device.type != "cpu":
        return torch.ops.aten.gelu_backward(upstream, x, approximate="tanh")
    return _slope(x, 3 * _C).mul_(x).mul_(_bump(gate)).add_(gate).mul_(upstream)


def gelu_derivatives(x: Tensor) -> tuple[Tensor, Tensor]:
    """First and second derivative of the GELU.

    With h = logistic(v) and d = dv/dx = a + 3 c x^2 they are h + x h (1 - h) d and
    h (1 - h) (2 d + x d' + x (1 - 2 h) d^2), where x d' = 2 (d - a).
    """
    x = x.clamp(-_FAR, _FAR)  # beyond, both are constant and the powers of x overflow
    gate = _slope(x, _C).mul_(x).sigmoid_()
    bump, d = _bump(gate), _slope(x, 3 * _C)
    first = torch.mul(d, x).mul_(bump).add_(gate)
    odd = gate.mul_(-2).add_(1).mul_(x).mul_(d)  # x (1 - 2 h) d
    return first, odd.add_(4).mul_(d).sub_(2 * _A).mul_(bump)


def _slope(x: Tensor, c: float) -> Tensor:
    """a + c x^2."""
    return torch.addcmul(x.new_full((), _A), x, x, value=c)


def _bump(gate: Tensor) -> Tensor:
    """h (1 - h), the derivative of the logistic function."""
    return torch.addcmul(gate, gate, gate, value=-1)
