"""The one door to the inner loop: chooses a backend and runs it."""

from collections.abc import Callable

from .scan_chunked import scan_chunked
from .scan_chunked import unsupported as chunked_unsupported
from .scan_reference import scan_reference
from .scan_reference import unsupported as reference_unsupported
from .ttt_state import ScanInputs, ScanOutput

__all__ = ["BACKENDS", "scan"]

BACKENDS: dict[str, tuple[Callable[[ScanInputs], ScanOutput], Callable[[ScanInputs], str | None]]] = {
    "reference": (scan_reference, reference_unsupported),
    "chunked": (scan_chunked, chunked_unsupported),
}
AUTO_ORDER = ("chunked", "reference")


def scan(inputs: ScanInputs, backend: str = "auto") -> ScanOutput:
    """Run the inner loop with a backend, or with the fastest that serves the call if `backend` is "auto".

    Raises:
        ValueError: the named backend is unknown or cannot serve this call; the message says why.
    """
    if backend == "auto":
        backend = next(name for name in AUTO_ORDER if BACKENDS[name][1](inputs) is None)
    elif backend not in BACKENDS:
        raise ValueError(f"ttt_backend must be 'auto' or one of {sorted(BACKENDS)}, got {backend!r}")
    run, unsupported = BACKENDS[backend]
    reason = unsupported(inputs)
    if reason is not None:
        raise ValueError(f"ttt_backend {backend!r} cannot serve this call: {reason}")
    return run(inputs)
