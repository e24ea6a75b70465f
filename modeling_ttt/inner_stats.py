"""Diagnostics of the inner loop per token, collected only when `output_ttt_stats=True`.

All are [B, H, T]. Losses are the inner loss 1/2 ||LN(f(k)) - (v - k)||^2.
`loss_init` at W_0, `loss_before` at the weights of the mini-batch start (where the gradient is taken), `loss_after` at
the weights token t itself reads. `step_norm` is ||theta_t - theta_{t-1}|| between consecutive reads; it also rescales
the earlier writes of the mini-batch by tau_t / tau_{t-1} and is therefore not the norm of the token's write.
`state_drift` is ||W - W_0|| of the committed weights the token's gradient was taken at.
"""

import torch
from torch import Tensor

__all__ = ["state_drift", "step_norm", "target_dispersion"]


def target_dispersion(target: Tensor, real: Tensor | None) -> Tensor:
    """Mean over f of the squared distance of the target (v - k before rotation), [B, H, T, f], to the call's mean."""
    if real is None:
        return (target - target.mean(2, keepdim=True)).square().mean(-1)
    mask = real[:, None, :, None].to(target.dtype)
    mean = (target * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True).clamp(min=1)
    return (target - mean).square().mean(-1) * mask[..., 0]


def state_drift(weights: list[Tensor], initial: list[Tensor]) -> Tensor:
    """Frobenius norm of W - W_0 over all maps and biases, given as [W; b] [N, in + 1, out]; [N, 1]."""
    differences = [(new - first).flatten(1) for new, first in zip(weights, initial, strict=True)]
    return torch.linalg.vector_norm(torch.cat(differences, 1), dim=1, keepdim=True)


def step_norm(writes: list[tuple[Tensor, Tensor]], tau: Tensor) -> Tensor:
    """||theta_t - theta_{t-1}|| of every slot of a mini-batch from the Gram matrix of its writes, [N, K].

    `writes` holds per map the inputs with their 1 [N, K, in + 1] and lr * g [N, K, out].
    theta_t - theta_{t-1} = -(tau_t - tau_{t-1}) * (writes before t) - tau_t * (write t); the first read of a
    mini-batch follows the commit, where nothing is pending.
    """
    gram = sum((x @ x.transpose(1, 2)) * (g @ g.transpose(1, 2)) for x, g in writes)  # [N, K, K]
    change = torch.diff(tau, prepend=tau.new_zeros(1))
    factor = change[:, None].expand_as(gram[0]).tril(-1) + torch.diag(tau)  # [reader, writer]
    squared = ((factor @ gram) * factor).sum(-1)
    moved = squared > 0  # rounding can leave a square just below zero
    return torch.where(moved, squared, 0).sqrt()
