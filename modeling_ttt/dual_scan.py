"""The seam between a scan and the two passes of its dual form: a forward, and a backward derived by hand.

`chunked` writes the passes in PyTorch, `native` in C++; both work on whole mini-batches (`aligned`) and flat tensors.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from transformers.utils.generic import maybe_autocast

from .aligned import AlignedTokens, align, unalign
from .chunked_forward import ForwardResult, Layout, Operands
from .ttt_state import ScanInputs, ScanOutput, TTTState

__all__ = ["DualScan", "Passes", "is_differentiable", "plasticity_of", "scan_dual"]

# In the order in which `_Loop._step_stats` gives them.
STATS = ("loss_init", "loss_before", "loss_after", "state_drift", "step_norm")


@dataclass(frozen=True)
class Passes:
    """How the dual form is computed.

    `forward(layout, operands)` gives a `ForwardResult`; `backward(layout, operands, states, adjoint)`, with the
    adjoints of a `ForwardResult` (each may be None), the gradients in the order of `Operands.flat`.
    """

    forward: Callable[[Layout, Operands], ForwardResult]
    backward: Callable[[Layout, Operands, list[Tensor], ForwardResult], list[Tensor | None]]


def scan_dual(inputs: ScanInputs, passes: Passes) -> ScanOutput:
    """Run the inner loop over the tokens of a call, one dual-form step per mini-batch (paper, eq. 7 and 8).

    Gradients reach every input; those of `gradients` and `stats` do not exist. A second derivative is refused.
    """
    differentiable = is_differentiable(inputs)
    tokens = align(inputs)
    operands = _operands(inputs, tokens)
    layout = _layout(inputs, tokens, operands, differentiable)
    if not differentiable:
        return _output(inputs, tokens, passes.forward(layout, operands))
    flat = DualScan.apply(passes, layout, bool(operands.initial), *operands.flat())
    return _output(inputs, tokens, _from_flat(layout, flat))


def is_differentiable(inputs: ScanInputs) -> bool:
    """Some gradient is wanted of this call."""
    return torch.is_grad_enabled() and any(t.requires_grad for t in _tensors(inputs))


class DualScan(torch.autograd.Function):
    """Forward and backward on flat tensors: (passes, layout, whether W_0 is among them, *Operands.flat())."""

    @staticmethod
    def forward(passes: Passes, layout: Layout, has_initial: bool, *flat: Tensor):
        """The tensors of a `ForwardResult`, see `_to_flat`."""
        depth = len(layout.widths)
        with torch.no_grad():  # torch.export traces this with gradients on, where results cannot be written in place
            return _to_flat(passes.forward(layout, Operands.from_flat(flat, depth, has_initial)))

    @staticmethod
    def setup_context(ctx, inputs, output) -> None:
        """Keep the inputs and the stored states."""
        passes, layout, has_initial, *flat = inputs
        result = _from_flat(layout, output)
        constant = [*result.states, *result.stats.values()]
        constant += [] if result.gradients is None else [result.gradients]
        ctx.mark_non_differentiable(*constant)
        ctx.set_materialize_grads(False)
        ctx.passes, ctx.layout, ctx.has_initial, ctx.count = passes, layout, has_initial, len(flat)
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
            found = ctx.passes.backward(ctx.layout, operands, list(states), _from_flat(ctx.layout, grads))
        if torch.is_grad_enabled():
            # Through the operands or through what came in from above: either way it would be a second derivative.
            sources = [*flat, *(g for g in grads if g is not None)]
            found = [g if g is None else _Once.apply(g, *sources) for g in found]
        return None, None, None, *found


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
            "this backend has no second derivative: set config.ttt_backend = 'reference' to differentiate twice"
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
    return ScanOutput(unalign(result.z, grid), TTTState(weights, rows), plasticity_of(inputs, norm), gradients, stats)


def plasticity_of(inputs: ScanInputs, norm: Tensor | None) -> Tensor | None:
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
