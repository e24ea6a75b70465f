"""Diagnostics of the inner loop per token, collected only when `output_ttt_stats=True`.

All are [B, H, T]. Losses are the inner loss 1/2 ||LN(f(k)) - (v - k)||^2.
`loss_init` at W_0, `loss_before` at the weights of the mini-batch start (where the gradient is taken), `loss_after` at
the weights token t itself reads. `step_norm` is ||theta_t - theta_{t-1}|| between consecutive reads; it also rescales
the earlier writes of the mini-batch by tau_t / tau_{t-1} and is therefore not the norm of the token's write.
`state_drift` is ||W - W_0|| of the committed weights the token's gradient was taken at.
"""

import torch
from torch import Tensor

from .inner_net import Weights, forward_chain
from .objective import reconstruction_loss

__all__ = ["step_stats", "target_dispersion"]


def step_stats(step, weights: Weights, rows: Weights, before: Tensor, after: Tensor, slot: int, index: int):
    """Statistics of one mini-batch of `scan_chunked`, by name, each [N, n]."""
    k, target = step.k[index], step.target[index]
    norm = (step.ln_weight, step.ln_bias)
    at_start = forward_chain(step.initial, k)[1][-1]
    return {
        "loss_init": reconstruction_loss(at_start, target, *norm),
        "loss_before": reconstruction_loss(before, target, *norm),
        "loss_after": reconstruction_loss(after, target, *norm),
        "state_drift": _drift(weights, step.initial).expand(-1, k.shape[1]),
        "step_norm": _step_norm(rows, step.inputs.tau, slot, k.shape[1]),
    }


def target_dispersion(target: Tensor, real: Tensor | None) -> Tensor:
    """Mean over f of the squared distance of the target (v - k before rotation), [B, H, T, f], to the call's mean."""
    if real is None:
        return (target - target.mean(2, keepdim=True)).square().mean(-1)
    mask = real[:, None, :, None].to(target.dtype)
    mean = (target * mask).sum(2, keepdim=True) / mask.sum(2, keepdim=True).clamp(min=1)
    return (target - mean).square().mean(-1) * mask[..., 0]


def _drift(weights: Weights, initial: Weights) -> Tensor:
    """[N, 1] Frobenius norm of W - W_0 over all maps and biases."""
    differences = [
        (new - first).flatten(1)
        for pair, start in zip(weights, initial, strict=True)
        for new, first in zip(pair, start, strict=True)
    ]
    return torch.linalg.vector_norm(torch.cat(differences, 1), dim=1, keepdim=True)


def _step_norm(rows: Weights, tau: Tensor, slot: int, columns: int) -> Tensor:
    """||theta_t - theta_{t-1}|| of the last `columns` slots, from the Gram matrix of the writes, [N, n].

    theta_t - theta_{t-1} = -(tau_t - tau_{t-1}) * (writes before t) - tau_t * (write t); the first read of a
    mini-batch follows the commit, where nothing is pending.
    """
    gram = sum((x @ x.transpose(1, 2) + 1) * (g @ g.transpose(1, 2)) for x, g in rows)  # [N, slots, slots]
    slots = gram.shape[-1]
    change = torch.diff(tau[:slots], prepend=tau.new_zeros(1))
    factor = change[:, None].expand(slots, slots).tril(-1) + torch.diag(tau[:slots])  # [reader, writer]
    squared = ((factor @ gram) * factor).sum(-1)[:, slot : slot + columns]
    moved = squared > 0  # rounding can leave a square just below zero; the root has no slope at zero
    return torch.where(moved, squared, 1).sqrt() * moved
