"""TTT-MLP as operators of PyTorch; conventions as in `triton_ops`."""

import re

import torch
from torch import Tensor

from .triton_ops import flat, no_second_derivative, unit_stride
from .triton_sizes import group_size

__all__ = ["mlp_backward", "mlp_forward"]

_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)


@torch.library.custom_op(f"{_NAMESPACE}::mlp_forward", mutates_args=())
def mlp_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    commit: Tensor,
    tau: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    start_weight1: Tensor,
    start_bias1: Tensor,
    start_weight2: Tensor,
    start_bias2: Tensor,
    initial_weight1: Tensor,
    initial_bias1: Tensor,
    initial_weight2: Tensor,
    initial_bias2: Tensor,
    carried_inner: Tensor | None,
    carried_gradient1: Tensor | None,
    carried_gradient2: Tensor | None,
    reset: Tensor | None,
    carried_slots: Tensor | None,
    last: Tensor | None,
    precision: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor,
]:  # fmt: skip
    """TTT-MLP over aligned tokens.

    The arguments are those of `linear_forward` for both maps; `carried_inner` holds the carried inputs of the second
    map. Returns z, norm, W1, b1, W2, b2 at the end, the rows x2, g1, g2 of the mini-batches that `last` names (empty
    without it); then for the backward only: x2, g1, g2 of all tokens and W1, b1, W2, b2 at the start of every group.
    """
    from .triton_launch_mlp import launch_mlp

    carried = None
    if carried_slots is not None:
        carried = [flat(t) for t in (carried_inner, carried_gradient1, carried_gradient2, carried_slots)]
    found = launch_mlp(
        *unit_stride(q, k, v),
        *map(flat, (lr, commit, tau, ln_weight, ln_bias)),
        list(map(flat, (start_weight1, start_bias1, start_weight2, start_bias2))),
        list(map(flat, (initial_weight1, initial_bias1, initial_weight2, initial_bias2))),
        None if reset is None else flat(reset),
        carried,
        precision,
    )
    rows = [lr.new_empty(0) for _ in range(3)]
    if last is not None:
        every = torch.arange(q.shape[0], device=q.device)
        rows = [x.unflatten(2, (-1, tau.shape[0]))[every, :, last.long()] for x in found[6:9]]
    return *found[:6], *rows, *found[6:]


@mlp_forward.register_fake
def _(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, start_weight1, start_bias1, start_weight2, start_bias2,
    initial_weight1, initial_bias1, initial_weight2, initial_bias2,
    carried_inner, carried_gradient1, carried_gradient2, reset, carried_slots, last, precision,
):  # fmt: skip
    batch, heads, columns, f = q.shape
    size, m, new = tau.shape[0], start_weight1.shape[-1], lr.new_empty
    count = columns // size
    groups = -(-count // group_size(size, count, reset is not None, f, precision, q.device))
    start = (start_weight1, start_bias1, start_weight2, start_bias2)
    return (
        new(batch, heads, columns, f),
        new(batch, heads, columns),
        *(new(t.shape) for t in start),
        *(new(0) if last is None else new(batch, heads, size, n) for n in (m, m, f)),
        *(new(batch, heads, columns, n) for n in (m, m, f)),
        *(new(batch, heads, groups, *sizes) for sizes in ((f, m), (m,), (m, f), (f,))),
    )


@torch.library.custom_op(f"{_NAMESPACE}::mlp_backward", mutates_args=())
def mlp_backward(
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
    saved: list[Tensor],
    d_z: Tensor | None,
    d_norm: Tensor | None,
    d_weight1: Tensor | None,
    d_bias1: Tensor | None,
    d_weight2: Tensor | None,
    d_bias2: Tensor | None,
    d_rows_inner: Tensor | None,
    d_rows1: Tensor | None,
    d_rows2: Tensor | None,
    precision: str,
) -> tuple[
    Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor,
    Tensor, Tensor, Tensor, Tensor, Tensor,
]:  # fmt: skip
    """Adjoints of the float arguments of `mlp_forward`, in its order; empty for W_0 and b_0 without `reset`, and for
    the carried rows without any."""
    from .triton_launch_mlp import launch_mlp_backward

    return launch_mlp_backward(
        *unit_stride(q, k, v),
        *map(flat, (lr, commit, tau, ln_weight, ln_bias)),
        None if reset is None else flat(reset),
        None if carried_slots is None else flat(carried_slots),
        None if last is None else flat(last),
        saved,
        (d_z, d_norm, d_weight1, d_bias1, d_weight2, d_bias2, d_rows_inner, d_rows1, d_rows2),
        precision,
    )


@mlp_backward.register_fake
def _(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, reset, carried_slots, last, saved, d_z, d_norm, d_weight1, d_bias1,
    d_weight2, d_bias2, d_rows_inner, d_rows1, d_rows2, precision,
):  # fmt: skip
    batch, heads, columns, f = q.shape
    size, m, new = tau.shape[0], saved[0].shape[-1], lr.new_empty
    per_head = (heads, f, m), (heads, 1, m), (heads, m, f), (heads, 1, f)
    return (
        *(x.new_empty(x.shape) for x in (q, k, v)),
        *(new(batch, heads, columns) for _ in range(2)),
        new(size),
        *(new(heads, f) for _ in range(2)),
        *(new(batch, *shape) for shape in per_head),
        *(new(0) if reset is None else new(shape) for shape in per_head),
        *(new(0) if carried_slots is None else new(batch, heads, size, n) for n in (m, m, f)),
    )


def _keep(ctx, inputs, output) -> None:
    q, k, v, lr, commit, tau, ln_weight, ln_bias, *_, reset, carried_slots, last, precision = inputs
    saved = output[9:]
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*saved)
    ctx.precision = precision
    ctx.save_for_backward(q, k, v, lr, commit, tau, ln_weight, ln_bias, reset, carried_slots, last, *saved)


def _backward(ctx, *adjoints):
    call, saved = ctx.saved_tensors[:11], ctx.saved_tensors[11:]
    adjoints = list(adjoints[:9])
    if call[10] is None:  # without `last` the rows are empty
        adjoints[6:] = [None] * 3
    found = mlp_backward(*call, list(saved), *adjoints, ctx.precision)
    return *(d if d.numel() else None for d in found), None, None, None, None


mlp_forward.register_autograd(_backward, setup_context=_keep)
mlp_backward.register_autograd(no_second_derivative)
