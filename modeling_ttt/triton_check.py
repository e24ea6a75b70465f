"""A trial run of the Triton kernels against the chunked backend, before they are trusted on a device.

Compilers get kernels wrong: Triton from 3.4.0 up to 3.7.1 is known to on Hopper. The trial compiles the very kernels
the call will use, so the time it takes is mostly spent early, not twice.
"""

from functools import cache

import torch
from transformers.utils import logging

from .trial import trial

__all__ = ["self_check"]

logger = logging.get_logger(__name__)


@torch.compiler.assume_constant_result
def self_check(index: int, net: str, head_dim: int, size: int, precision: str, gradient: bool) -> str | None:
    """Why the kernels of a configuration cannot be trusted on CUDA device `index`, or None; run once per process."""
    return _outcome(index, net, head_dim, size, precision, gradient)


@cache
def _outcome(index: int, *configuration) -> str | None:
    device = torch.device("cuda", index)
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0 or higher, {torch.cuda.get_device_name(device)} has less"
    from .scan_triton import scan_triton

    reason = trial(scan_triton, device, *configuration)
    if reason is not None:
        logger.warning(f"The Triton kernels are not used on {device}: {reason}")
    return reason
