"""The inner loop in the dual form of the paper (section 2.5), with a hand-derived backward pass, in PyTorch.

A call that stays inside one mini-batch, such as a decoding step, is one small product per map over the rows of that
mini-batch (`within_mini_batch`). Every other call is laid out in whole mini-batches (`aligned`) and goes through
`chunked_forward`; when gradients are wanted, through an autograd function whose backward is `chunked_backward`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .chunked_backward import backward
from .chunked_forward import forward
from .dual_scan import Passes, is_differentiable, plasticity_of, scan_dual
from .inner_net import Weights, forward_chain, multiply, output_gradients
from .objective import reconstruction_gradient, scaled_residual
from .ttt_state import ScanInputs, ScanOutput, TTTState

__all__ = ["scan_chunked", "stays_inside", "unsupported", "within_mini_batch"]

PASSES = Passes(forward, backward)


def unsupported(inputs: ScanInputs) -> str | None:
    """Why this backend cannot serve a call, or None; it serves all."""
    return None


def scan_chunked(inputs: ScanInputs) -> ScanOutput:
    """Run the inner loop over the tokens of a call, see `scan_dual`."""
    if stays_inside(inputs) and not is_differentiable(inputs):
        return within_mini_batch(inputs)
    return scan_dual(inputs, PASSES)


def stays_inside(inputs: ScanInputs) -> bool:
    """The call's tokens lie in one mini-batch, at the same slots in every row, and nothing else is to be collected."""
    grid = inputs.grid
    collects = inputs.want_stats or inputs.want_gradients
    return grid.uniform and grid.phase + grid.width <= inputs.tau.shape[0] and not collects


def within_mini_batch(inputs: ScanInputs) -> ScanOutput:
    """Run n tokens that continue one mini-batch at slot s: reads over its rows 0..s+n-1, a commit if that fills it.

    Such a call is all overhead when n is 1: every operation saved here shows in decoding.
    """
    grid, state = inputs.grid, inputs.start()
    batch, heads, n, _ = inputs.q.shape
    first, stop, size = grid.phase, grid.phase + n, inputs.tau.shape[0]

    def unflat(pairs: Weights) -> Weights:
        return [(a.view(batch, heads, *a.shape[1:]), b.view(batch, heads, *b.shape[1:])) for a, b in pairs]

    weights = [(w.flatten(0, 1), b.flatten(0, 1)) for w, b in state.weights]
    q, k, v = (t.flatten(0, 1) for t in (inputs.q, inputs.k, inputs.v))  # [N, n, f]
    ln_weight, ln_bias = inputs.ln_weight[:, None], inputs.ln_bias[:, None]  # [H, 1, f]
    if batch > 1:
        ln_weight, ln_bias = ln_weight.repeat(batch, 1, 1), ln_bias.repeat(batch, 1, 1)
    lr = inputs.lr.reshape(batch * heads, n, 1)
    xs, zs = forward_chain(weights, k)
    residual = scaled_residual(v - k, ln_weight, ln_bias)
    gs = output_gradients(weights, zs, reconstruction_gradient(zs[-1], residual, ln_weight * ln_weight))
    rows = [
        tuple(
            torch.slice_scatter(old.flatten(0, 1), new, 1, first, stop)
            for old, new in zip(pair, (new_x, lr * new_g), strict=True)
        )
        for pair, new_x, new_g in zip(state.rows, xs, gs, strict=True)
    ]
    z = _read_rows(weights, rows, q, inputs.tau[first:stop, None], stop)
    # Unless they move, the weights of the new state are those of the old one and no view of them.
    new_weights = state.weights
    if stop == size:
        new_weights = unflat([_folded(pair, row, inputs.tau[-1]) for pair, row in zip(weights, rows, strict=True)])
        rows = [(torch.zeros_like(x), torch.zeros_like(g)) for x, g in rows]
    plasticity = None
    if inputs.want_plasticity:
        plasticity = plasticity_of(inputs, gradient_norm(xs, gs).view(batch, heads, n))
    return ScanOutput(z.view(inputs.q.shape), TTTState(new_weights, unflat(rows)), plasticity)


def _read_rows(weights: Weights, rows: Weights, x: Tensor, tau: Tensor, stop: int) -> Tensor:
    """The net at the last n slots before `stop`, x [N, n, f], each with W - tau_t * (its own and earlier writes)."""
    for i, ((weight, bias), (writer, g)) in enumerate(zip(weights, rows, strict=True)):
        x = F.gelu(x, approximate="tanh") if i else x
        scores = multiply(x, writer[:, :stop].mT).add_(1).mul_(tau)  # the 1 carries the bias
        if x.shape[1] > 1:
            scores = scores.tril_(stop - x.shape[1])
        if torch.compiler.is_compiling():
            x = multiply(x, weight) + bias - multiply(scores, g[:, :stop])
        else:
            x = torch.baddbmm(bias, x, weight).baddbmm_(scores, g[:, :stop], alpha=-1)
    return x


def _folded(pair: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], tau: Tensor) -> tuple[Tensor, Tensor]:
    """(W, b) after the commit of `rows`."""
    (weight, bias), (x, g) = pair, rows
    step = tau * g
    return torch.baddbmm(weight, x.mT, step, alpha=-1), bias - step.sum(1, keepdim=True)


def gradient_norm(inner_inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Frobenius norm of a token's inner gradient over all maps and biases, [..., n].

    Each map contributes ||x (x) g||^2 + ||g||^2 = (||x||^2 + 1) ||g||^2.
    """
    parts = [
        (x.square().sum(-1) + 1).sqrt_() * torch.linalg.vector_norm(g, dim=-1)
        for x, g in zip(inner_inputs, grads, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)
