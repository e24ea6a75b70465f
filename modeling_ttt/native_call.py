"""The two passes of the dual form in C++: fills in a `Call` for `inner_loop.cpp` and runs it.

They are operators of PyTorch, so that compilers take them as they are. The names are tied to this module's own,
because a checkpoint from the Hub may bring a second copy of it.
"""

import ctypes
import re

import torch
from torch import Tensor

from .native_library import load_library

__all__ = ["MAX_DEPTH", "backward_pass", "call_layout_fits", "forward_pass"]

MAX_DEPTH = 6
_NAMESPACE = re.sub(r"\W", "_", __name__, flags=re.ASCII)
_Pointers = ctypes.c_void_p * MAX_DEPTH


class _Tokens(ctypes.Structure):
    """[B, H, C, f]: address and strides of rows, heads and columns in elements."""

    _fields_ = [("data", ctypes.c_void_p), *((name, ctypes.c_int64) for name in ("row", "head", "column"))]


class _Call(ctypes.Structure):
    """As in `inner_loop_task.h`."""

    _fields_ = [
        *((name, ctypes.c_int64) for name in ("batch", "heads", "count", "size", "depth", "stride", "threads")),
        ("widths", ctypes.c_int64 * (MAX_DEPTH + 1)),
        *((name, _Tokens) for name in "qkvz"),
        *((name, ctypes.c_void_p) for name in ("lr", "tau", "ln_weight", "ln_bias")),
        *((name, _Pointers) for name in ("start", "initial", "carried_x", "carried_g")),
        *((name, ctypes.c_void_p) for name in ("carried_slots", "complete", "reset", "held", "last")),
        *((name, ctypes.c_void_p) for name in ("norm", "gradients")),
        *((name, _Pointers) for name in ("weights", "states", "rows_x", "rows_g")),
        *((name, _Tokens) for name in ("dq", "dk", "dv")),
        *((name, ctypes.c_void_p) for name in ("dlr", "dtau", "dln_weight", "dln_bias")),
        *((name, _Pointers) for name in ("dstart", "dinitial", "dcarried_x", "dcarried_g")),
    ]


def call_layout_fits() -> bool:
    """The compiler lays a `Call` out as ctypes does."""
    library, _ = load_library()
    return library is not None and library.call_bytes == ctypes.sizeof(_Call)


@torch.library.custom_op(f"{_NAMESPACE}::forward_pass", mutates_args=(), device_types="cpu")
def forward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    tau: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    start: list[Tensor],
    initial: list[Tensor],
    carried: list[Tensor],
    flags: list[Tensor | None],
    stride: int,
    want_norm: bool,
    want_gradients: bool,
) -> tuple[Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """The dual form over whole mini-batches; shapes are those of `Operands` and `Borders`.

    Args:
        carried: x and g of every map in turn, or nothing.
        flags: carried_slots, complete, reset, held and last of `Borders`.
        stride: mini-batches from one kept state to the next, 0 to keep none.

    Returns:
        z; norm and gradients, empty where they are not wanted; the weights at the end; x and g of every map, nothing
        without `held`; the states kept.
    """
    z, norm, gradients, weights, rows, states = _outputs(
        q, lr, start, flags, stride, want_norm, want_gradients, tau.shape[0]
    )
    call, alive = _call(q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried, flags, stride)
    call.z = _tokens(z)
    call.norm = norm.data_ptr() if want_norm else None
    call.gradients = gradients.data_ptr() if want_gradients else None
    call.weights, call.states = _pointers(weights), _pointers(states)
    call.rows_x, call.rows_g = _pointers(rows[::2]), _pointers(rows[1::2])
    _run("ttt_forward", call, q.dtype)
    del alive
    return z, norm, gradients, weights, rows, states


@forward_pass.register_fake
def _(q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried, flags, stride, want_norm, want_gradients):
    return _outputs(q, lr, start, flags, stride, want_norm, want_gradients, tau.shape[0])


def _outputs(q, lr, start, flags, stride, want_norm, want_gradients, size):
    batch, heads, columns, f = q.shape
    widths = [(w.shape[1] - 1, w.shape[2]) for w in start]
    z = _token_major(q, widths[-1][1])
    norm = lr.new_empty(lr.shape if want_norm else 0)
    gradients = q.new_empty((batch, heads, columns, sum(b for _, b in widths)) if want_gradients else 0)
    weights = [_like(w) for w in start]
    rows = []
    if flags[3] is not None:
        rows = [q.new_empty(batch * heads, size, n) for pair in widths for n in pair]
    stored = -(-(columns // size) // stride) if stride else 0
    states = [w.new_empty(stored, *w.shape) for w in start] if stride else []
    return z, norm, gradients, weights, rows, states


@torch.library.custom_op(f"{_NAMESPACE}::backward_pass", mutates_args=(), device_types="cpu")
def backward_pass(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    lr: Tensor,
    tau: Tensor,
    ln_weight: Tensor,
    ln_bias: Tensor,
    start: list[Tensor],
    initial: list[Tensor],
    carried: list[Tensor],
    flags: list[Tensor | None],
    stride: int,
    states: list[Tensor],
    dz: Tensor | None,
    dnorm: Tensor | None,
    dweights: list[Tensor],
    drows: list[Tensor | None],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, list[Tensor], list[Tensor], list[Tensor]]:
    """Adjoints of the float arguments of `forward_pass`, in its order; `dweights` and `drows` may be empty lists."""
    adjoints = _adjoints(q, lr, tau, ln_weight, start, initial, carried)
    dq, dk, dv, dlr, dtau, dln_weight, dln_bias, dstart, dinitial, dcarried = adjoints
    call, alive = _call(q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried, flags, stride)
    _check_like("dz", [dz], [q])
    _check_like("dnorm", [dnorm], [lr])
    _check_like("dweights", dweights, start if dweights else [])
    states = [t.contiguous() for t in states]  # hooks on saved tensors may store them in another order
    given = [t if t is None else t.contiguous() for t in (dnorm, *dweights, *drows)]
    dnorm, dweights, drows = given[0], given[1 : 1 + len(dweights)], given[1 + len(dweights) :]
    dz = dz if dz is None or dz.stride(-1) == 1 else dz.contiguous()
    call.z = _Tokens() if dz is None else _tokens(dz)
    call.norm = None if dnorm is None else dnorm.data_ptr()
    call.weights, call.states = _pointers(dweights), _pointers(states)
    call.rows_x, call.rows_g = _pointers(drows[::2]), _pointers(drows[1::2])
    call.dq, call.dk, call.dv = map(_tokens, (dq, dk, dv))
    call.dlr, call.dtau, call.dln_weight, call.dln_bias = (t.data_ptr() for t in (dlr, dtau, dln_weight, dln_bias))
    call.dstart, call.dinitial = _pointers(dstart), _pointers(dinitial)
    call.dcarried_x, call.dcarried_g = _pointers(dcarried[::2]), _pointers(dcarried[1::2])
    _run("ttt_backward", call, q.dtype)
    del alive
    batch, heads = q.shape[:2]
    per_head = (t.unflatten(0, (batch, heads)).sum(0) for t in (dln_weight, dln_bias))
    return dq, dk, dv, dlr, dtau.sum(0), *per_head, dstart, dinitial, dcarried


@backward_pass.register_fake
def _(
    q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried, flags, stride, states, dz, dnorm, dweights, drows
):  # fmt: skip
    found = _adjoints(q, lr, tau, ln_weight, start, initial, carried)
    return *found[:4], *(torch.empty_like(t) for t in (tau, ln_weight, ln_bias)), *found[7:]


def _adjoints(q, lr, tau, ln_weight, start, initial, carried):
    """Room for all adjoints; what is summed up starts from zeros, and tau and the norm have one per row and head."""
    count = q.shape[0] * q.shape[1]
    tokens = [_token_major(q, q.shape[-1]) for _ in range(3)]
    shared = [lr.new_zeros(count, *t.shape[-1:]) for t in (tau, ln_weight, ln_weight)]
    dlr = lr.new_empty(lr.shape)
    zeros = [[_like(t).zero_() for t in several] for several in (initial, carried)]
    return *tokens, dlr, *shared, [_like(t) for t in start], *zeros


def _like(x: Tensor) -> Tensor:
    """Room for a result of the shape of x, which may itself be stored in any order."""
    return torch.empty_like(x, memory_format=torch.contiguous_format)


def _token_major(q: Tensor, width: int) -> Tensor:
    """[B, H, C, width] with heads last but one in storage: the layer flattens heads and features next."""
    batch, heads, columns, _ = q.shape
    return q.new_empty(batch, columns, heads, width).transpose(1, 2)


def _call(q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried, flags, stride):
    """A `Call` with its inputs, and the tensors it points to."""
    _check(q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried)
    q, k, v = (t if t.stride(-1) == 1 else t.contiguous() for t in (q, k, v))
    lr, tau, ln_weight, ln_bias = (t.contiguous() for t in (lr, tau, ln_weight, ln_bias))
    start, initial, carried = ([t.contiguous() for t in several] for several in (start, initial, carried))
    flags = [t if t is None else t.contiguous() for t in flags]
    call = _Call()
    call.batch, call.heads, columns, call.widths[0] = q.shape
    call.size, call.depth, call.stride, call.threads = tau.shape[0], len(start), stride, torch.get_num_threads()
    call.count = columns // call.size
    for i, weight in enumerate(start):
        call.widths[i + 1] = weight.shape[2]
    call.q, call.k, call.v = map(_tokens, (q, k, v))
    call.lr, call.tau, call.ln_weight, call.ln_bias = (t.data_ptr() for t in (lr, tau, ln_weight, ln_bias))
    call.start, call.initial = _pointers(start), _pointers(initial)
    call.carried_x, call.carried_g = _pointers(carried[::2]), _pointers(carried[1::2])
    names = ("carried_slots", "complete", "reset", "held", "last")
    for name, flag in zip(names, flags, strict=True):
        setattr(call, name, None if flag is None else flag.data_ptr())
    return call, (q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried, flags)


def _check(q, k, v, lr, tau, ln_weight, ln_bias, start, initial, carried) -> None:
    """Refuse what the other side, which has nothing but addresses, would read or write beyond its end."""
    batch, heads, columns, f = q.shape
    size, widths = tau.shape[0], [f, *(w.shape[2] for w in start)]
    if columns == 0 or columns % size or widths[-1] != f:
        raise ValueError(f"q must hold whole mini-batches of {size} and the width {widths[-1]}, got {tuple(q.shape)}")
    _check_tensors("k, v", q, [k, v], [q.shape] * 2)
    _check_tensors("lr", q, [lr], [q.shape[:3]])
    _check_tensors("tau, ln_weight, ln_bias", q, [tau, ln_weight, ln_bias], [(size,), (heads, f), (heads, f)])
    maps = [(batch * heads, a + 1, b) for a, b in zip(widths[:-1], widths[1:], strict=True)]
    rows = [(batch * heads, size, n) for pair in zip(widths[:-1], widths[1:], strict=True) for n in pair]
    _check_tensors("start", q, start, maps)
    _check_tensors("initial", q, initial, maps if initial else [])
    _check_tensors("carried", q, carried, rows if carried else [])


def _check_like(names: str, tensors: list[Tensor | None], wanted: list[Tensor]) -> None:
    _check_tensors(names, wanted[0] if wanted else None, tensors, [t.shape for t in wanted])


def _check_tensors(names: str, like: Tensor | None, tensors: list[Tensor | None], shapes: list) -> None:
    for tensor, shape in zip(tensors, shapes, strict=True):
        if tensor is None or (tensor.shape == tuple(shape) and tensor.dtype == like.dtype and tensor.is_cpu):
            continue
        wanted, got = f"{like.dtype} {tuple(shape)}", f"{tensor.dtype} {tuple(tensor.shape)}"
        raise ValueError(f"{names} must be {wanted} on the CPU, got {got} on {tensor.device}")


def _tokens(x: Tensor) -> _Tokens:
    return _Tokens(x.data_ptr(), *x.stride()[:3])


def _pointers(tensors: list[Tensor | None]) -> ctypes.Array:
    return _Pointers(*(None if t is None else t.data_ptr() for t in tensors))


def _run(name: str, call: _Call, dtype: torch.dtype) -> None:
    library, reason = load_library()
    if library is None:
        raise RuntimeError(reason)
    library.run(f"{name}_{'f64' if dtype == torch.float64 else 'f32'}", call)
