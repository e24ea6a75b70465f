"""The kernels as operators of PyTorch, with shapes for tracing and derivatives; needs Triton only when one runs.

Tokens are aligned (see `aligned`): C = M * K columns of M whole mini-batches. q, k and v are float32 or bfloat16,
`reset`, `carried_slots` and `last` int32, all else is float32. The names are tied to this module's own, because a
checkpoint from the Hub may bring a second copy of it.
"""

import re

import torch
from torch import Tensor

from .triton_sizes import group_size

__all__ = ["flat", "linear_backward", "linear_forward", "no_second_derivative", "unit_stride"]

_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


@torch.library.custom_op(f"{_NAMESPACE}::linear_forward", mutates_args=())
def linear_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    commit: Tensor,
    tau: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    start_weight: Tensor,
    start_bias: Tensor,
    initial_weight: Tensor,
    initial_bias: Tensor,
    reset: Tensor | None,
    carried_gradient: Tensor | None,
    carried_slots: Tensor | None,
    last: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """TTT-Linear over aligned tokens.

    Args:
        q, k, v: [B, H, C, f], contiguous in f.  lr: [B, H, C], 1 at carried slots, 0 where nothing is written.
        commit: [B, H, C], what each gradient is committed with: tau_{K-1} * lr, 0 in mini-batches that are not full.
        tau: [K].  ln_weight, ln_bias: [H, f].
        start_weight, start_bias: [B, H, f, f], [B, H, 1, f].  initial_weight, initial_bias: [H, f, f], [H, 1, f].
        reset: [B, M], not 0 where a mini-batch starts from the initial weights.
        carried_gradient, carried_slots: [B, H, K, f] and [B, K], gradients of mini-batch 0 that are given.
        last: [B], the mini-batch whose gradients to return as rows.
        precision: "ieee", "tf32" or "bf16", of the factors of products.

    Returns:
        z [B, H, C, f], norm [B, H, C] of each token's gradient, weight and bias at the end, the rows' gradients
        [B, H, K, f] (empty without `last`); then for the backward only: gradients [B, H, C, f], the weights and the
        biases at the start of every group of mini-batches.
    """
    from .triton_launch import launch_linear

    carried = None if carried_gradient is None else (flat(carried_gradient), flat(carried_slots))
    z, norm, weight, bias, gradient, group_weight, group_bias = launch_linear(
        *unit_stride(q, k, v),
        *map(flat, (lr, commit, tau, ln_weight, ln_bias)),
        (flat(start_weight), flat(start_bias)),
        (flat(initial_weight), flat(initial_bias)),
        None if reset is None else flat(reset),
        carried,
        precision,
    )
    rows = z.new_empty(0)
    if last is not None:
        tiles = gradient.unflatten(2, (-1, tau.shape[0]))  # [B, H, M, K, f]
        rows = tiles[torch.arange(q.shape[0], device=q.device), :, last.long()]
    return z, norm, weight, bias, rows, gradient, group_weight, group_bias


@linear_forward.register_fake
def _(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, start_weight, start_bias, initial_weight, initial_bias,
    reset, carried_gradient, carried_slots, last, precision,
):  # fmt: skip
    batch, heads, columns, f = q.shape
    size = tau.shape[0]
    tokens = lr.new_empty(batch, heads, columns, f)
    count = columns // size
    group = group_size(size, count, reset is not None, f, precision, q.device)
    return (
        tokens,
        lr.new_empty(lr.shape),
        start_weight.new_empty(start_weight.shape),
        start_bias.new_empty(start_bias.shape),
        lr.new_empty(0) if last is None else lr.new_empty(batch, heads, size, f),
        torch.empty_like(tokens),
        lr.new_empty(batch, heads, -(-count // group), f, f),
        lr.new_empty(batch, heads, -(-count // group), f),
    )


@torch.library.custom_op(f"{_NAMESPACE}::linear_backward", mutates_args=())
def linear_backward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    commit: Tensor,
    tau: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    reset: Tensor | None,
    carried_slots: Tensor | None,
    last: Tensor | None,
    gradient: Tensor,
    group_weight: Tensor,
    group_bias: Tensor,
    d_z: Tensor | None,
    d_norm: Tensor | None,
    d_weight: Tensor | None,
    d_bias: Tensor | None,
    d_rows: Tensor | None,
    precision: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Adjoints of the float arguments of `linear_forward`, in its order; empty for W_0 without `reset`, and for the
    carried gradients without any."""
    from .triton_launch import launch_linear_backward

    return launch_linear_backward(
        *unit_stride(q, k, v),
        *map(flat, (lr, commit, tau, ln_weight, ln_bias)),
        None if reset is None else flat(reset),
        None if carried_slots is None else flat(carried_slots),
        None if last is None else flat(last),
        (gradient, group_weight, group_bias),
        (d_z, d_norm, d_weight, d_bias, d_rows),
        precision,
    )


@linear_backward.register_fake
def _(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, reset, carried_slots, last, gradient, group_weight, group_bias,
    d_z, d_norm, d_weight, d_bias, d_rows, precision,
):  # fmt: skip
    batch, heads, columns, f = q.shape
    size = tau.shape[0]
    new = lr.new_empty
    per_head = (heads, f, f), (heads, 1, f)
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        *(new(batch, heads, columns) for _ in range(2)),
        new(size),
        *(new(heads, f) for _ in range(2)),
        *(new(batch, *shape) for shape in per_head),
        *(new(0) if reset is None else new(shape) for shape in per_head),
        new(0) if carried_slots is None else new(batch, heads, size, f),
    )


def _keep(ctx, inputs, output) -> None:
    (q, k, v, lr, commit, tau, ln_weight, ln_bias, *_, reset, _, carried_slots, last, precision) = inputs
    *_, gradient, group_weight, group_bias = output
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(gradient, group_weight, group_bias)
    ctx.precision = precision
    ctx.save_for_backward(
        q, k, v, lr, commit, tau, ln_weight, ln_bias, reset, carried_slots, last, gradient, group_weight, group_bias
    )


def _backward(ctx, d_z, d_norm, d_weight, d_bias, d_rows, *_):
    if ctx.saved_tensors[10] is None:  # without `last` the rows are empty
        d_rows = None
    found = linear_backward(*ctx.saved_tensors, d_z, d_norm, d_weight, d_bias, d_rows, ctx.precision)
    found = [d if d.numel() else None for d in found]
    return *found[:12], None, found[12], None, None, None


def no_second_derivative(ctx, *_):
    """The derivative of a backward: none."""
    raise RuntimeError(
        "ttt_backend 'triton' has no second derivative; use ttt_backend 'reference' to differentiate a gradient"
    )


linear_forward.register_autograd(_backward, setup_context=_keep)
linear_backward.register_autograd(no_second_derivative)


def flat(x: Tensor) -> Tensor:
    """x, contiguous."""
    return x.contiguous()


def unit_stride(*tensors: Tensor) -> list[Tensor]:
    """Tensors whose last dimension is contiguous."""
    return [x if x.stride(-1) == 1 else x.contiguous() for x in tensors]
