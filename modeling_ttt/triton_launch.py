"""Starting the kernels of TTT-Linear: sizes, buffers and grids. Plain functions on tensors, without autograd."""

import torch
from torch import Tensor

from .objective import INNER_LN_EPS
from .triton_linear import linear_chain_kernel, linear_read_kernel
from .triton_linear_backward import (
    MOMENTS,
    linear_back_chain_kernel,
    linear_back_read_kernel,
    linear_back_tokens_kernel,
)
from .triton_math import on_device
from .triton_norm_backward import norm_back_kernel
from .triton_sizes import PRECISIONS, group_size, stages, tile, warps

__all__ = ["Sizes", "launch_linear", "launch_linear_backward"]


class Sizes:
    """Sizes of one call and the keyword arguments that most kernels take."""

    def __init__(self, q: Tensor, tau: Tensor, reset: Tensor | None, precision: str):
        self.batch, self.heads, self.columns, self.head_dim = q.shape
        self.size = tau.shape[0]
        self.count = self.columns // self.size
        self.per_group = group_size(self.size, self.count, reset is not None, self.head_dim, precision, q.device)
        self.groups = -(-self.count // self.per_group)
        self.programs = self.batch * self.heads
        self.precision = precision
        self.device = q.device
        self.numbers = (self.heads, self.count, self.groups)
        feature = {"F": self.head_dim, "BLOCK_F": tile(self.head_dim), "K": self.size, "PER_GROUP": self.per_group}
        self.serial = feature | {"BLOCK_K": tile(self.size)}
        self.parallel = feature | {"BLOCK_T": tile(self.per_group * self.size)}

    def empty(self, *shape: int) -> Tensor:
        """A float32 buffer [B, H, *shape]."""
        return torch.empty(self.batch, self.heads, *shape, dtype=torch.float32, device=self.device)

    def tokens(self) -> Tensor:
        return self.empty(self.columns, self.head_dim)

    def options(self, kernel: str) -> dict:
        """Compiler options of a kernel."""
        return {
            "num_warps": warps(kernel, self.head_dim, self.size, self.precision),
            "num_stages": stages(kernel),
        }


def launch_linear(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, start, initial, reset, carried, precision: str
) -> tuple[Tensor, ...]:
    """Forward of TTT-Linear on aligned tokens; see `triton_ops` for the arguments.

    Returns z, norm, end weight and bias, and for the backward the gradients and the weights and biases at the start of
    every group.
    """
    shape = Sizes(q, tau, reset, precision)
    f = shape.head_dim
    z, gradient = shape.tokens(), shape.tokens()
    norm = shape.empty(shape.columns)
    group_weight, group_bias = shape.empty(shape.groups, f, f), shape.empty(shape.groups, f)
    end_weight, end_bias = shape.empty(f, f), shape.empty(1, f)
    carried_gradient, carried_slots = carried or (z, tau)
    with on_device(q):
        linear_chain_kernel[(shape.programs,)](
            k, v, commit, ln_weight, ln_bias, *start, *initial, tau if reset is None else reset,
            carried_gradient, carried_slots, gradient, group_weight, group_bias, end_weight, end_bias,
            *shape.numbers, *k.stride()[:3], *v.stride()[:3], **shape.serial,
            EPS=INNER_LN_EPS, RESETS=reset is not None, CARRIED=carried is not None,
            ONE_SUM=precision != "ieee", PRECISION=PRECISIONS[precision], **shape.options("chain"),
        )  # fmt: skip
        linear_read_kernel[(shape.programs * shape.groups,)](
            q, k, lr, commit, tau, gradient, group_weight, group_bias, z, norm,
            *shape.numbers, *q.stride()[:3], *k.stride()[:3], **shape.parallel,
            PRECISION=PRECISIONS[precision], **shape.options("read"),
        )  # fmt: skip
    return z, norm, end_weight, end_bias, gradient, group_weight, group_bias


def launch_linear_backward(
    q, k, v, lr, commit, tau, ln_weight, ln_bias, reset, carried_slots, last, saved, adjoints, precision: str
) -> tuple[Tensor, ...]:
    """Backward of `launch_linear`.

    `saved` holds the gradients and the weights and biases of the groups; `adjoints` those of z, norm, end weight,
    end bias and the kept rows, None where there is none (`last` names the mini-batch of the rows). Returns the
    adjoints of q, k, v, lr, commit, tau, LayerNorm weight and bias, start weight and bias, W_0 and b_0 (empty without
    `reset`) and of the carried gradients (empty without `carried_slots`).
    """
    shape = Sizes(q, tau, reset, precision)
    f, columns = shape.head_dim, shape.columns
    gradient, group_weight, group_bias = saved
    d_read, d_norm, d_end_weight, d_end_bias, d_rows = adjoints
    d_read = torch.zeros_like(gradient) if d_read is None else d_read.contiguous()
    d_end_weight = shape.empty(f, f).zero_() if d_end_weight is None else d_end_weight.contiguous()
    d_end_bias = shape.empty(1, f).zero_() if d_end_bias is None else d_end_bias.contiguous()
    with_norm, with_rows = d_norm is not None, d_rows is not None and last is not None
    d_norm = d_norm.contiguous() if with_norm else d_read
    d_rows = d_rows.contiguous() if with_rows else d_read
    d_gradient, normed, moments = shape.tokens(), shape.tokens(), shape.empty(MOMENTS.value, columns)
    d_group_weight, d_group_bias = shape.empty(shape.groups, f, f), shape.empty(shape.groups, f)
    d_lr, d_commit, d_tau, d_step = (shape.empty(columns) for _ in range(4))
    d_p, d_z_write, after_group = shape.tokens(), shape.tokens(), shape.empty(shape.groups, f, f)
    d_start = shape.empty(f, f), shape.empty(1, f)
    d_q, d_k, d_v = (torch.empty_like(gradient, dtype=x.dtype) for x in (q, k, v))
    d_ln_weight, d_ln_bias = (shape.empty(shape.groups, f) for _ in range(2))
    d_initial = d_read.new_zeros(0), d_read.new_zeros(0)
    if reset is not None:
        d_initial = shape.empty(f, f).zero_(), shape.empty(1, f).zero_()
    d_carried = d_read.new_empty(0) if carried_slots is None else shape.empty(shape.size, f)
    strides = [x.stride()[:3] for x in (q, k, v)]
    parallel, mode = (shape.programs * shape.groups,), PRECISIONS[precision]
    none = tau  # stands for a tensor the kernel was told not to read
    with on_device(q):
        linear_back_read_kernel[parallel](
            q, k, v, lr, commit, tau, ln_weight, ln_bias, gradient, group_weight, group_bias,
            d_read, d_norm, d_rows, last if with_rows else none,
            d_gradient, normed, moments, d_group_weight, d_group_bias, d_lr, d_commit, d_tau,
            *shape.numbers, *strides[0], *strides[1], *strides[2], **shape.parallel,
            EPS=INNER_LN_EPS, NORM=with_norm, ROWS=with_rows, PRECISION=mode, **shape.options("backward"),
        )  # fmt: skip
        linear_back_chain_kernel[(shape.programs,)](
            k, commit, ln_weight, none if reset is None else reset,
            none if carried_slots is None else carried_slots, gradient, normed, moments, d_gradient,
            d_group_weight, d_group_bias, d_end_weight, d_end_bias, d_p, d_z_write, d_step, after_group,
            d_carried, *d_start, *d_initial, *shape.numbers, *strides[1], **shape.serial,
            RESETS=reset is not None, CARRIED=carried_slots is not None, PRECISION=mode,
            **shape.options("chain"),
        )  # fmt: skip
        linear_back_tokens_kernel[parallel](
            q, k, lr, commit, tau, ln_weight, gradient, group_weight, after_group, d_read, d_norm, d_p, d_z_write,
            d_q, d_k, *shape.numbers, *strides[0], *strides[1], **shape.parallel,
            NORM=with_norm, PRECISION=mode, **shape.options("backward"),
        )  # fmt: skip
        norm_back_kernel[parallel](
            k, v, ln_weight, ln_bias, normed, d_p, d_v, d_ln_weight, d_ln_bias,
            *shape.numbers, *strides[1], *strides[2], **shape.parallel, **shape.options("norm"),
        )  # fmt: skip
    d_tau = d_tau.view(-1, shape.size).sum(0)
    d_norms = d_ln_weight.sum((0, 2)), d_ln_bias.sum((0, 2))
    if reset is not None:
        d_initial = tuple(d.sum(0) for d in d_initial)
    return d_q, d_k, d_v, d_lr, d_commit + d_step, d_tau, *d_norms, *d_start, *d_initial, d_carried
