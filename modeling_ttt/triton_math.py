"""What all Triton kernels of the inner loop share: products in a chosen precision and sums of several things at once.

Two rules hold for every kernel. No value that came out of a product is transposed: Triton from 3.4.0 up to 3.7.1
can compile that wrongly for Hopper, so a transposed operand is loaded transposed or computed transposed. And nothing
but a product takes bfloat16: all other arithmetic widens first, since Triton's interpreter cannot compute in it.
"""

import contextlib

try:
    from triton import jit, knobs
    from triton import language as tl
except ImportError:  # inside try: the Hub loader demands what a checkpoint's files import outside
    raise

import torch

__all__ = ["INTERPRETED", "add2", "add5", "dot", "on_device"]

INTERPRETED = tl.constexpr(bool(knobs.runtime.interpret))


def on_device(x: torch.Tensor):
    """A context in which kernels start on the device of x."""
    return torch.cuda.device(x.device) if x.is_cuda else contextlib.nullcontext()


@jit
def dot(a, b, PRECISION: tl.constexpr):
    """a @ b, accumulated in float32; PRECISION 0 is float32, 1 is tf32, 2 rounds both factors to bfloat16."""
    if PRECISION == 2:
        if INTERPRETED:
            product = tl.dot(_rounded(a.to(tl.float32)), _rounded(b.to(tl.float32)), input_precision="ieee")
        else:
            product = tl.dot(a.to(tl.bfloat16), b.to(tl.bfloat16))
    elif PRECISION == 1:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="tf32")
    else:
        product = tl.dot(a.to(tl.float32), b.to(tl.float32), input_precision="ieee")
    return product


@jit
def _rounded(x):
    """x rounded to bfloat16, in float32; the interpreter's own cast truncates."""
    bits = x.to(tl.int32, bitcast=True)
    bits = (bits + 0x7FFF + ((bits >> 16) & 1)) & -65536
    return bits.to(tl.float32, bitcast=True)


@jit
def add2(a0, a1, b0, b1):
    return a0 + b0, a1 + b1


@jit
def add5(a0, a1, a2, a3, a4, b0, b1, b2, b3, b4):
    return a0 + b0, a1 + b1, a2 + b2, a3 + b3, a4 + b4
