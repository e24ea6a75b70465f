"""The inner loop in C++ on a CPU: the passes of `inner_loop.cpp`, compiled on first use, behind the shared seam."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache

import torch
from torch import Tensor

from .chunked_forward import ForwardResult, Layout, Operands
from .dual_scan import Passes, is_differentiable, scan_dual
from .inner_net import INNER_NETS
from .native_call import MAX_DEPTH, backward_pass, call_layout_fits, forward_pass
from .native_library import load_library
from .scan_chunked import stays_inside, within_mini_batch
from .trial import trial
from .ttt_state import ScanInputs, ScanOutput

__all__ = ["scan_native", "unsupported"]


def unsupported(inputs: ScanInputs) -> str | None:
    """Why this backend cannot serve a call, or None. The first call compiles the library, which takes seconds."""
    if inputs.q.device.type != "cpu":
        return f"it is for CPUs, the tensors are on {inputs.q.device.type!r}"
    if inputs.want_stats:
        return "it does not collect output_ttt_stats"
    if inputs.net.depth > MAX_DEPTH:
        return f"it takes inner nets of up to {MAX_DEPTH} maps, {inputs.net.name!r} has {inputs.net.depth}"
    return _missing()


def scan_native(inputs: ScanInputs) -> ScanOutput:
    """Run the inner loop over the tokens of a call, see `scan_dual`."""
    if stays_inside(inputs) and not is_differentiable(inputs):
        return within_mini_batch(inputs)
    return scan_dual(inputs, PASSES)


@torch.compiler.assume_constant_result
def _missing() -> str | None:
    return _checked()


@cache
def _checked() -> str | None:
    """Why there is no library that can be trusted, or None; run once per process."""
    library, reason = load_library()
    if library is None:
        return reason
    if not call_layout_fits():
        return f"{library.path.name} was compiled with another layout of its argument"
    # In a thread of its own, which has none of the modes of the caller: torch.export, say, would trace the trial.
    with ThreadPoolExecutor(1) as alone:
        return alone.submit(_tried).result()


def _tried() -> str | None:
    trials = (trial(scan_native, torch.device("cpu"), net, 40, 16, "ieee", True) for net in INNER_NETS)
    return next((reason for reason in trials if reason is not None), None)


def _forward(layout: Layout, operands: Operands) -> ForwardResult:
    z, norm, gradients, weights, rows, states = forward_pass(
        *_arguments(layout, operands),
        layout.stride if layout.keep_states else 0,
        layout.want_norm,
        layout.want_gradients,
    )
    return ForwardResult(
        z,
        norm if layout.want_norm else None,
        weights,
        list(zip(rows[::2], rows[1::2], strict=True)),
        gradients if layout.want_gradients else None,
        {},
        states,
    )


def _backward(layout: Layout, operands: Operands, states: list[Tensor], adjoint: ForwardResult) -> list[Tensor]:
    weights = []
    if any(d is not None for d in adjoint.weights):
        weights = [
            torch.zeros_like(s) if d is None else d for s, d in zip(operands.start, adjoint.weights, strict=True)
        ]
    rows = [d for pair in adjoint.rows for d in pair]
    *fixed, start, initial, carried = backward_pass(
        *_arguments(layout, operands), layout.stride, states, adjoint.z, adjoint.norm, weights, rows
    )
    return [*fixed, *start, *initial, *carried]


def _arguments(layout: Layout, operands: Operands) -> tuple:
    borders = layout.borders
    flags = [borders.carried_slots, borders.complete, borders.reset, borders.held, borders.last]
    fixed = operands.flat()[:7]
    return *fixed, operands.start, operands.initial, [t for pair in operands.carried for t in pair], flags


PASSES = Passes(_forward, _backward)
