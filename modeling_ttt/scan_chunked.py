"""The inner loop in the dual form of the paper (section 2.5), with a hand-derived backward pass.

A call that stays inside one mini-batch, such as a decoding step, is one small product per map over the rows of that
mini-batch (`_within_mini_batch`). Every other call is laid out in whole mini-batches (`aligned`) and goes through
`chunked_forward`; when gradients are wanted, through an autograd function whose backward is `chunked_backward`.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from .aligned import AlignedTokens, align, unalign
from .chunked_backward import backward
from .chunked_forward import ForwardResult, Layout, Operands, forward
from .inner_net import Weights, forward_chain, output_gradients
from .objective import reconstruction_gradient, scaled_residual
from .ttt_state import ScanInputs, ScanOutput, TTTState

__all__ = ["scan_chunked", "unsupported"]

# In the order in which `_Loop._step_stats` gives them.
STATS = ("loss_init", "loss_before", "loss_after", "state_drift", "step_norm")


def unsupported(inputs: ScanInputs) -> str | None:
    """Why this backend cannot serve a call, or None; it serves all."""
    return None


def scan_chunked(inputs: ScanInputs) -> ScanOutput:
    """Run the inner loop over the tokens of a call, one dual-form step per mini-batch (paper, eq. 7 and 8).

    Gradients reach every input; those of `gradients` and `stats` do not exist. A second derivative is refused.
    """
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(inputs))
    if not differentiable and _stays_inside(inputs):
        return _within_mini_batch(inputs)
    tokens = align(inputs)
    operands = _operands(inputs, tokens)
    layout = _layout(inputs, tokens, operands, differentiable)
    if not differentiable:
        return _output(inputs, tokens, forward(layout, operands))
    flat = ChunkedScan.apply(layout, bool(operands.initial), *operands.flat())
    return _output(inputs, tokens, _from_flat(layout, flat))


class ChunkedScan(torch.autograd.Function):
    """Forward and backward of the scan on flat tensors: (layout, whether W_0 is among them, *Operands.flat())."""

    @staticmethod
    def forward(layout: Layout, has_initial: bool, *flat: Tensor):
        """The tensors of a `ForwardResult`, see `_to_flat`."""
        depth = len(layout.widths)
        with torch.no_grad():  # torch.export traces this with gradients on, where results cannot be written in place
            return _to_flat(forward(layout, Operands.from_flat(flat, depth, has_initial)))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the inputs and the stored states."""
        layout, has_initial, *flat = inputs
        result = _from_flat(layout, output)
        constant = [*result.states, *result.stats.values()]
        constant += [] if result.gradients is None else [result.gradients]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        ctx.layout, ctx.has_initial, ctx.count = layout, has_initial, len(flat)
        ctx.save_for_backward(*flat, *result.states)

    @staticmethod
    def backward(ctx, *grads: Tensor | None):
        """Gradients of all operands; differentiating them again is refused."""
        saved = ctx.saved_tensors
        flat, states = saved[: ctx.count], saved[ctx.count :]
        depth = len(ctx.layout.widths)
        operands = Operands.from_flat(flat, depth, ctx.has_initial)
        # A caller's autocast would round the products to half precision.
        with torch.no_grad(), maybe_autocast(operands.q.device.type, enabled=False):
            found = backward(ctx.layout, operands, list(states), _from_flat(ctx.layout, grads))
        if torch.is_grad_enabled():
            # Through the operands or through what came in from above: either way it would be a second derivative.
            sources = [*flat, *(g for g in grads if g is not None)]
            found = [g if g is None else _Once.apply(g, *sources) for g in found]
        return None, None, *found


class _Once(torch.autograd.Function):
    """Identity on a gradient that must not be differentiated again."""

    @staticmethod
    def forward(gradient: Tensor, *sources: Tensor) -> Tensor:
        return gradient.clone()

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        pass

    @staticmethod
    def backward(ctx, *_):
        raise RuntimeError(
            "the chunked backend has no second derivative: set config.ttt_backend = 'reference' to differentiate twice"
        )


# -------------------------------------------------------------------- between the seam and the passes


def _tensors(inputs: ScanInputs) -> list[Tensor]:
    state = [] if inputs.state is None else list(inputs.state.to_tensors().values())
    initial = [t for pair in inputs.initial_weights for t in pair]
    fixed = [inputs.q, inputs.k, inputs.v, inputs.lr, inputs.tau, inputs.ln_weight, inputs.ln_bias]
    return [*fixed, *initial, *state]


def _operands(inputs: ScanInputs, tokens: AlignedTokens) -> Operands:
    batch = inputs.q.shape[0]
    initial = [torch.cat(pair, -2).repeat(batch, 1, 1) for pair in inputs.initial_weights]  # [N, in + 1, out]
    start = initial
    if inputs.state is not None:
        start = [torch.cat(pair, -2).flatten(0, 1) for pair in inputs.state.weights]
    carried = [tuple(t.flatten(0, 1) for t in pair) for pair in tokens.carried or []]
    needs_initial = tokens.borders.reset is not None or inputs.want_stats
    return Operands(
        tokens.q,
        tokens.k,
        tokens.v,
        tokens.lr,
        inputs.tau,
        inputs.ln_weight,
        inputs.ln_bias,
        start,
        initial if needs_initial else [],
        carried,
    )


def _layout(inputs: ScanInputs, tokens: AlignedTokens, operands: Operands, differentiable: bool) -> Layout:
    size = inputs.tau.shape[0]
    widths = [(weight.shape[1] - 1, weight.shape[2]) for weight in operands.start]
    return Layout(
        batch=inputs.q.shape[0],
        heads=inputs.q.shape[1],
        size=size,
        widths=widths,
        borders=tokens.borders,
        want_norm=inputs.want_plasticity or inputs.want_stats,
        want_stats=inputs.want_stats,
        want_gradients=inputs.want_gradients,
        keep_states=differentiable,
    )


def _output(inputs: ScanInputs, tokens: AlignedTokens, result: ForwardResult) -> ScanOutput:
    grid, shape = inputs.grid, inputs.q.shape[:2]
    size = inputs.tau.shape[0]
    # Contiguous, as a decoding step returns them: compiled code is made anew for other strides.
    parts = [(w[:, :-1].contiguous(), w[:, -1:].contiguous()) for w in result.weights]
    weights = [tuple(t.unflatten(0, shape) for t in pair) for pair in parts]
    if result.rows:
        rows = [tuple(t.unflatten(0, shape) for t in pair) for pair in result.rows]
    else:
        rows = [tuple(w.new_zeros(*shape, size, n) for n in w.shape[-2:]) for w, _ in weights]
    norm = None if result.norm is None else unalign(result.norm, grid)
    stats = {name: unalign(value, grid) for name, value in result.stats.items()}
    if inputs.want_stats:
        stats["inner_grad_norm"] = norm.detach()
    gradients = None if result.gradients is None else unalign(result.gradients, grid)
    return ScanOutput(unalign(result.z, grid), TTTState(weights, rows), _plasticity(inputs, norm), gradients, stats)


def _plasticity(inputs: ScanInputs, norm: Tensor | None) -> Tensor | None:
    """Norm of what each token commits, [B, H, T]; 0 at masked tokens."""
    if not inputs.want_plasticity:
        return None
    plasticity = inputs.tau[-1] * inputs.lr.abs() * norm
    return plasticity if inputs.grid.real is None else plasticity.masked_fill(~inputs.grid.real[:, None], 0)


def _to_flat(result: ForwardResult) -> tuple[Tensor, ...]:
    some = [t for t in (result.norm, result.gradients) if t is not None]
    rows = [t for pair in result.rows for t in pair]
    return (result.z, *some, *result.weights, *rows, *result.stats.values(), *result.states)


def _from_flat(layout: Layout, flat) -> ForwardResult:
    """The inverse of `_to_flat`; also for the gradients of its tensors, any of which may be None."""
    rest = iter(flat)
    depth = len(layout.widths)

    def take(count: int) -> list:
        return [next(rest) for _ in range(count)]

    z = next(rest)
    norm = next(rest) if layout.want_norm else None
    gradients = next(rest) if layout.want_gradients else None
    weights = take(depth)
    rows = [tuple(take(2)) for _ in range(depth)] if layout.borders.held is not None else []
    stats = dict(zip(STATS, take(len(STATS)), strict=True)) if layout.want_stats else {}
    return ForwardResult(z, norm, weights, rows, gradients, stats, take(depth) if layout.keep_states else [])


# -------------------------------------------------------------------- inside one mini-batch


def _stays_inside(inputs: ScanInputs) -> bool:
    """The call's tokens lie in one mini-batch, at the same slots in every row, and nothing else is to be collected."""
    grid = inputs.grid
    collects = inputs.want_stats or inputs.want_gradients
    return grid.uniform and grid.phase + grid.width <= inputs.tau.shape[0] and not collects


def _within_mini_batch(inputs: ScanInputs) -> ScanOutput:
    """Run n tokens that continue one mini-batch at slot s: reads over its rows 0..s+n-1, a commit if that fills it.

    Such a call is all overhead when n is 1: every operation saved here shows in decoding.
    """
    grid, state = inputs.grid, inputs.start()
    batch, heads, n, _ = inputs.q.shape
    first, stop, size = grid.phase, grid.phase + n, inputs.tau.shape[0]
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
    if stop == size:
        weights = [_folded(pair, row, inputs.tau[-1]) for pair, row in zip(weights, rows, strict=True)]
        rows = [(torch.zeros_like(x), torch.zeros_like(g)) for x, g in rows]
    plasticity = None
    if inputs.want_plasticity:
        plasticity = _plasticity(inputs, gradient_norm(xs, gs).view(batch, heads, n))

    def unflat(pairs: Weights) -> Weights:
        return [(a.view(batch, heads, *a.shape[1:]), b.view(batch, heads, *b.shape[1:])) for a, b in pairs]

    return ScanOutput(z.view(inputs.q.shape), TTTState(unflat(weights), unflat(rows)), plasticity)


def _read_rows(weights: Weights, rows: Weights, x: Tensor, tau: Tensor, stop: int) -> Tensor:
    """The net at the last n slots before `stop`, x [N, n, f], each with W - tau_t * (its own and earlier writes)."""
    for i, ((weight, bias), (writer, g)) in enumerate(zip(weights, rows, strict=True)):
        x = F.gelu(x, approximate="tanh") if i else x
        scores = torch.bmm(x, writer[:, :stop].mT).add_(1).mul_(tau)  # the 1 carries the bias
        if x.shape[1] > 1:
            scores = scores.tril_(stop - x.shape[1])
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
