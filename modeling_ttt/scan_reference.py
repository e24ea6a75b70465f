"""The inner loop as the paper writes it (primal form): one token after another, every weight explicit.

Slow and plain on purpose: gradients come from autograd on the inner loss, each reader's weights are built, and
tokens are placed by their slot without any packing. The other backends are tested against this one.
"""

import torch
from torch import Tensor

from .inner_net import Weights, forward_chain
from .objective import reconstruction_loss
from .ttt_state import ScanInputs, ScanOutput, TTTState

__all__ = ["scan_reference", "unsupported"]


def unsupported(inputs: ScanInputs) -> str | None:
    """Why this backend cannot serve a call, or None."""
    return (
        "it takes gradients by autograd, which inference_mode forbids" if torch.is_inference_mode_enabled() else None
    )


def scan_reference(inputs: ScanInputs) -> ScanOutput:
    """Run the inner loop over the tokens of a call, one gradient step per token (paper, eq. 4 to 6)."""
    grid, state = inputs.grid, inputs.start()
    batch, length = inputs.q.shape[0], inputs.q.shape[2]
    device = inputs.q.device
    first = TTTState.initial(inputs.initial_weights, batch, inputs.tau.shape[0], inputs.q.dtype)
    weights, rows = list(state.weights), list(state.rows)
    slots = grid.slot.expand(batch, -1)
    always = torch.ones(batch, dtype=torch.bool, device=device)
    tokens: list[dict[str, Tensor]] = []
    for t in range(length):
        real = always if grid.real is None else grid.real[:, t]
        if grid.border is not None:
            weights = _choose(grid.border[:, t], first.weights, weights)
            rows = _choose(grid.border[:, t], first.rows, rows)
        token, rows = _one_token(inputs, weights, first.weights, rows, slots[:, t], real, t)
        tokens.append(token)
        full = real & (slots[:, t] == inputs.tau.shape[0] - 1)
        weights = _choose(full, _moved(weights, rows, inputs.tau[-1].expand(batch)), weights)
        rows = _choose(full, first.rows, rows)
    joined = {name: torch.stack([token[name] for token in tokens], 2) for name in tokens[0]}
    if grid.real is not None:
        joined = {
            name: value.masked_fill(~grid.real.view(batch, 1, length, *[1] * (value.dim() - 3)), 0)
            for name, value in joined.items()
        }
    return ScanOutput(
        joined.pop("z"), TTTState(weights, rows), joined.pop("plasticity"), joined.pop("gradients"), joined
    )


def _one_token(inputs: ScanInputs, weights: Weights, initial: Weights, rows: Weights, slot, real, t: int):
    """Write and read token t of every row: what is collected per token, [B, H, ...], and the rows after its write."""
    q, k, v = (x[:, :, t] for x in (inputs.q, inputs.k, inputs.v))  # [B, H, f]
    lr = inputs.lr[:, :, t] * real[:, None]  # [B, H]
    tau = inputs.tau[slot]  # [B]
    target = v - k
    grads = _token_gradients(weights, k, target, inputs)
    inner_inputs = [x[..., 0, :] for x in forward_chain(weights, k[..., None, :])[0]]
    earlier = torch.where(slot > 0, inputs.tau[slot - 1], 0.0)
    before = _moved(weights, rows, earlier)
    here = torch.nn.functional.one_hot(slot, inputs.tau.shape[0]).bool() & real[:, None]  # [B, K]
    rows = [
        tuple(torch.where(here[:, None, :, None], new[..., None, :], old) for new, old in zip(write, row, strict=True))
        for write, row in zip(
            [(x, lr[..., None] * grad[1][..., 0, :]) for x, grad in zip(inner_inputs, grads, strict=True)],
            rows,
            strict=True,
        )
    ]
    after = _moved(weights, rows, tau)
    norm = _norm(grads)

    def loss(at: Weights) -> Tensor:
        return reconstruction_loss(_apply(at, k), target, inputs.ln_weight, inputs.ln_bias)

    token = {
        "z": _apply(after, q),
        "plasticity": inputs.tau[-1] * inputs.lr[:, :, t].abs() * norm,
        "gradients": torch.cat([grad[1][..., 0, :] for grad in grads], -1),
        "inner_grad_norm": norm,
    }
    if inputs.want_stats:
        token |= {
            "loss_init": loss(initial),
            "loss_before": loss(weights),
            "loss_after": loss(after),
            "step_norm": _norm(_difference(after, before)),
            "state_drift": _norm(_difference(weights, initial)),
        }
    return token, rows


def _token_gradients(weights: Weights, k: Tensor, target: Tensor, inputs: ScanInputs) -> Weights:
    """Gradients of the inner loss by autograd, per map (dW [B, H, in, out], db [B, H, 1, out]).

    Rows and heads have weights of their own, so the gradient of the summed loss is each one's own gradient.
    """
    differentiable = torch.is_grad_enabled()
    with torch.enable_grad():
        leaves = [
            t if differentiable and t.requires_grad else t.detach().requires_grad_() for pair in weights for t in pair
        ]
        pairs = list(zip(leaves[::2], leaves[1::2], strict=True))
        loss = reconstruction_loss(_apply(pairs, k), target, inputs.ln_weight, inputs.ln_bias)
        grads = torch.autograd.grad(loss.sum(), leaves, create_graph=differentiable)
    return list(zip(grads[::2], grads[1::2], strict=True))


def _apply(weights: Weights, x: Tensor) -> Tensor:
    """The net of every row and head at its own x, [B, H, f]."""
    return forward_chain(weights, x[..., None, :])[1][-1][..., 0, :]


def _moved(weights: Weights, rows: Weights, tau: Tensor) -> Weights:
    """The weights after the pending writes, taken with a factor tau [B]."""
    tau = tau[:, None, None, None]
    return [
        (weight - tau * (x.transpose(-1, -2) @ g), bias - tau * g.sum(-2, keepdim=True))
        for (weight, bias), (x, g) in zip(weights, rows, strict=True)
    ]


def _choose(rows: Tensor, new: Weights, old: Weights) -> Weights:
    """Per batch row [B] the new tensors where marked, else the old."""
    mark = rows[:, None, None, None]
    return [tuple(torch.where(mark, n, o) for n, o in zip(a, b, strict=True)) for a, b in zip(new, old, strict=True)]


def _difference(a: Weights, b: Weights) -> Weights:
    return [tuple(x - y for x, y in zip(p, q, strict=True)) for p, q in zip(a, b, strict=True)]


def _norm(weights: Weights) -> Tensor:
    """Frobenius norm over all maps and biases, [B, H]."""
    return torch.linalg.vector_norm(torch.cat([t.flatten(2) for pair in weights for t in pair], -1), dim=-1)
