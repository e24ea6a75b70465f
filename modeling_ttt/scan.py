"""The one door to the inner loop: chooses a backend and runs it."""

from collections.abc import Callable

from .scan_chunked import scan_chunked
from .scan_chunked import unsupported as chunked_unsupported
from .scan_native import scan_native
from .scan_native import unsupported as native_unsupported
from .scan_reference import scan_reference
from .scan_reference import unsupported as reference_unsupported
from .scan_triton import scan_triton
from .scan_triton import unsupported as triton_unsupported
from .ttt_state import ScanInputs, ScanOutput

__all__ = ["BACKENDS", "scan"]

BACKENDS: dict[str, tuple[Callable[[ScanInputs], ScanOutput], Callable[[ScanInputs], str | None]]] = {
    "reference": (scan_reference, reference_unsupported),
    "chunked": (scan_chunked, chunked_unsupported),
    "native": (scan_native, native_unsupported),
    "triton": (scan_triton, triton_unsupported),
}
# Without "native": that compiles code on the user's machine, which is to be asked for.
AUTO_ORDER = ("triton", "chunked")


def scan(inputs: ScanInputs, backend: str = "auto") -> ScanOutput:
    """Run the inner loop with a backend, or with the fastest that serves the call if `backend` is "auto".

    Raises:
        ValueError: the named backend is unknown or cannot serve this call; the message says why.
    """
    if backend == "auto":
        order = AUTO_ORDER if inputs.q.is_cuda else AUTO_ORDER[1:]  # Triton's interpreter is for tests
        return next(run for run, unsupported in map(BACKENDS.get, order) if unsupported(inputs) is None)(inputs)
    if backend not in BACKENDS:
        raise ValueError(f"ttt_backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    run, unsupported = BACKENDS[backend]
    reason = unsupported(inputs)
    if reason is not None:
        raise ValueError(f"ttt_backend {backend!r} cannot serve this call: {reason}")
    return run(inputs)
