"""Starting the kernels of TTT-MLP. Plain functions on tensors, without autograd."""

import torch
from torch import Tensor

from .objective import INNER_LN_EPS
from .triton_launch import Sizes
from .triton_math import on_device
from .triton_mlp import mlp_chain_kernel, mlp_read_kernel
from .triton_mlp_back_chain import mlp_back_chain_kernel
from .triton_mlp_backward import mlp_back_read_kernel, mlp_expand_kernel
from .triton_norm_backward import norm_back_kernel
from .triton_sizes import MLP_TILE, PRECISIONS

__all__ = ["launch_mlp", "launch_mlp_backward"]


def launch_mlp(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, start, initial, reset, carried, precision: str
) -> tuple[Tensor, ...]:
    """Forward of TTT-MLP on aligned tokens; see `triton_mlp_ops` for the arguments.

    Returns z, norm, the weights and biases of both maps at the end; for the backward the inputs of the second map, the
    gradients at the outputs of both, and the weights and biases at the start of every group.
    """
    shape = Sizes(q, tau, reset, precision)
    f, m = shape.head_dim, start[0].shape[-1]
    end = [t.clone() for t in start]
    inner, gradient1, gradient2 = shape.empty(shape.columns, m), shape.empty(shape.columns, m), shape.tokens()
    groups = [shape.empty(shape.groups, *sizes) for sizes in ((f, m), (m,), (m, f), (f,))]
    z, norm = shape.tokens(), shape.empty(shape.columns)
    with on_device(q):
        mlp_chain_kernel[(shape.programs,)](
            k, v, commit, ln_weight, ln_bias, *initial, tau if reset is None else reset,
            *(carried or (inner, gradient1, gradient2, tau)), *end, inner, gradient1, gradient2, *groups,
            *shape.numbers, *k.stride()[:3], *v.stride()[:3], **shape.serial, M=m, BLOCK_M=MLP_TILE,
            EPS=INNER_LN_EPS, RESETS=reset is not None, CARRIED=carried is not None,
            PRECISION=PRECISIONS[precision], **shape.options("mlp_chain"),
        )  # fmt: skip
        mlp_read_kernel[(shape.programs * shape.groups,)](
            q, k, lr, commit, tau, inner, gradient1, gradient2, *groups, z, norm,
            *shape.numbers, *q.stride()[:3], *k.stride()[:3], **shape.parallel, M=m, BLOCK_M=MLP_TILE,
            PRECISION=PRECISIONS[precision], **shape.options("mlp_read"),
        )  # fmt: skip
    return z, norm, *end, inner, gradient1, gradient2, *groups


def launch_mlp_backward(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, reset, carried_slots, last, saved, adjoints, precision: str
) -> tuple[Tensor, ...]:
    """Backward of `launch_mlp`.

    `saved` holds what that returns for the backward; `adjoints` those of z, norm, W1, b1, W2, b2 and the kept rows x2,
    g1, g2, None where there is none. Returns the adjoints of q, k, v, lr, commit, tau, LayerNorm weight and bias, the
    start weights and biases, W_0 and b_0 of both maps (empty without `reset`) and the carried rows (empty without).
    The weights and what is saved per mini-batch take memory only while this runs.
    """
    shape = Sizes(q, tau, reset, precision)
    f, columns, size, count = shape.head_dim, shape.columns, shape.size, shape.count
    inner, gradient1, gradient2, *groups = saved
    m = inner.shape[-1]
    d_z, d_norm, *d_end = adjoints[:6]
    matrices = (f, m), (1, m), (m, f), (1, f)
    with_norm, with_rows = d_norm is not None, last is not None and any(t is not None for t in adjoints[6:])
    carried = carried_slots is not None
    d_read = torch.zeros_like(gradient2) if d_z is None else d_z.contiguous()
    d_norm = d_norm.contiguous() if with_norm else d_read
    rows = [d_read] * 3
    if with_rows:
        rows = [
            shape.empty(size, n).zero_() if d is None else d.contiguous()
            for d, n in zip(adjoints[6:], (m, m, f), strict=True)
        ]
    d_start = [
        shape.empty(*sizes).zero_() if d is None else d.clone(memory_format=torch.contiguous_format)
        for d, sizes in zip(d_end, matrices, strict=True)
    ]
    d_initial = [d_read.new_empty(0) for _ in matrices]
    if reset is not None:
        d_initial = [shape.empty(*sizes).zero_() for sizes in matrices]
    d_carried = [shape.empty(size, n).zero_() if carried else d_read.new_empty(0) for n in (m, m, f)]
    weights = [shape.empty(count, *sizes) for sizes in ((f, m), (m,), (m, f), (f,))]
    read_inner, d_hidden, slope, curve, d_inner, d_gradient1, d_e = (shape.empty(columns, m) for _ in range(7))
    normed, d_gradient2, d_keys, d_p = (shape.tokens() for _ in range(4))
    moments = shape.empty(3, columns)
    d_q, d_k, d_v = (torch.empty_like(gradient2, dtype=x.dtype) for x in (q, k, v))
    d_lr, d_commit, d_tau = (shape.empty(columns) for _ in range(3))
    d_ln_weight, d_ln_bias = (shape.empty(shape.groups, f) for _ in range(2))
    strides = [x.stride()[:3] for x in (q, k, v)]
    none, options, mode = tau, shape.options("mlp_back"), {"PRECISION": PRECISIONS[precision]}
    slots = carried_slots if carried else none
    serial = {name: value for name, value in shape.serial.items() if name != "PER_GROUP"} | {
        "M": m, "BLOCK_M": MLP_TILE,
    }  # fmt: skip
    with on_device(q):
        mlp_expand_kernel[(shape.programs * shape.groups,)](
            k, commit, inner, gradient1, gradient2, *groups, *weights, *shape.numbers, *strides[1],
            **serial, PER_GROUP=shape.per_group, **mode, **options,
        )  # fmt: skip
        mlp_back_read_kernel[(shape.programs * count,)](
            q, k, v, lr, tau, ln_weight, ln_bias, slots, inner, gradient1, gradient2, *weights, d_read, d_norm, *rows,
            last if with_rows else none, read_inner, d_hidden, slope, curve, normed, moments, d_inner, d_gradient1,
            d_gradient2, d_q, d_keys, d_lr, d_tau, *shape.numbers[:2], *strides[0], *strides[1], *strides[2],
            **serial, EPS=INNER_LN_EPS, NORM=with_norm, ROWS=with_rows, CARRIED=carried, **mode, **options,
        )  # fmt: skip
        mlp_back_chain_kernel[(shape.programs,)](
            q, k, commit, ln_weight, none if reset is None else reset, slots, inner, gradient1, gradient2,
            weights[0], weights[2], read_inner, d_read, d_hidden, slope, curve, normed, moments, d_inner, d_gradient1,
            d_gradient2, d_e, d_keys, *d_start, *d_initial, *d_carried, d_p, d_commit, d_k, *shape.numbers[:2],
            *strides[0], *strides[1], **serial, RESETS=reset is not None, CARRIED=carried, **mode, **options,
        )  # fmt: skip
        norm_back_kernel[(shape.programs * shape.groups,)](
            k, v, ln_weight, ln_bias, normed, d_p, d_v, d_ln_weight, d_ln_bias,
            *shape.numbers, *strides[1], *strides[2], **shape.parallel, **shape.options("norm"),
        )  # fmt: skip
    if reset is not None:
        d_initial = [d.sum(0) for d in d_initial]
    d_norms = d_ln_weight.sum((0, 2)), d_ln_bias.sum((0, 2))
    return d_q, d_k, d_v, d_lr, d_commit, d_tau.view(-1, size).sum(0), *d_norms, *d_start, *d_initial, *d_carried
