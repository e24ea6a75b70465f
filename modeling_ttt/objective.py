"""The inner objective of the paper: reconstruct the value from the key through a per-head LayerNorm.

Loss of one token: 1/2 || LN(z) - target ||^2 with z = f(k), target = v - k, summed over the head dim (no mean, no
other factor). The read adds the query back: out = q + LN(f(q)).
"""

import torch
from torch import Tensor

__all__ = [
    "INNER_LN_EPS",
    "layer_norm_backward",
    "reconstruction_gradient",
    "reconstruction_loss",
    "scaled_residual",
    "unit_layer_norm",
]

INNER_LN_EPS = 1e-6


def unit_layer_norm(z: Tensor) -> Tensor:
    """LayerNorm over the last dimension without an affine map."""
    return torch.nn.functional.layer_norm(z, z.shape[-1:], eps=INNER_LN_EPS)


def reconstruction_loss(z: Tensor, target: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
    """Inner loss per token, [..., f] -> [...]."""
    return 0.5 * (ln_weight * unit_layer_norm(z) + ln_bias - target).square().sum(-1)


def scaled_residual(target: Tensor, ln_weight: Tensor, ln_bias: Tensor) -> Tensor:
    """The part of the gradient that does not depend on the inner weights: gamma * (beta - target), [..., f]."""
    return ln_weight * (ln_bias - target)


def reconstruction_gradient(z: Tensor, residual: Tensor, ln_weight_squared: Tensor) -> Tensor:
    """Gradient of the inner loss at z, [..., f].

    With the normalised z^ this is the LayerNorm backward of gamma^2 z^ + gamma (beta - target); `residual` is
    `scaled_residual`. Three fused ATen calls; differentiable once more by autograd.
    """
    shape = [z.shape[-1]]
    normed, mean, rstd = torch.native_layer_norm(z, shape, None, None, INNER_LN_EPS)
    upstream = torch.addcmul(residual, ln_weight_squared, normed)
    return layer_norm_backward(upstream, z, mean, rstd)


def layer_norm_backward(upstream: Tensor, z: Tensor, mean: Tensor, rstd: Tensor) -> Tensor:
    """Gradient at z of a LayerNorm without affine map; mean and reciprocal deviation are those of the forward."""
    backward = torch.ops.aten.native_layer_norm_backward.default
    return backward(upstream, z, z.shape[-1:], mean, rstd, None, None, [True, False, False])[0]
