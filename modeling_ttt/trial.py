"""A trial run of a compiled backend against the chunked one, before it is trusted: compilers get kernels wrong."""

import itertools

import torch
from torch import Tensor

from .inner_net import INNER_NETS
from .scan_chunked import scan_chunked
from .token_grid import TokenGrid
from .ttt_state import ScanInputs, ScanOutput

__all__ = ["trial"]

TOLERANCE = {"ieee": 1e-4, "tf32": 1e-2, "bf16": 5e-2}
"""Largest relative distance to float32 by the rounding of factors, several times what rounding alone makes."""


def trial(run, device: torch.device, net: str, head_dim: int, size: int, precision: str, gradient: bool) -> str | None:
    """Run a small call with the scan `run` and with the chunked backend; say how they differ, None if they agree."""
    with torch.inference_mode(False), torch.autocast(device.type, enabled=False), torch.set_grad_enabled(gradient):
        inputs = _inputs(net, head_dim, size, precision, device)
        wanted = _results(inputs, scan_chunked, gradient)
        try:
            found = _results(inputs, run, gradient)
        except (torch.OutOfMemoryError, MemoryError):
            raise  # says nothing about the backend, and must not be remembered
        except Exception as error:  # whatever a compiler may raise; the call is then served by another backend
            return f"its self-check could not run: {type(error).__name__}: {str(error)[:300]}"
    for name, want in wanted.items():
        error = float((found[name] - want).norm() / want.norm().clamp(min=1e-12))
        if not error < TOLERANCE[precision]:
            return f"its self-check failed: {name} is off by {error:.1e} with factors in {precision}"
    return None


def _inputs(net: str, head_dim: int, size: int, precision: str, device: torch.device) -> ScanInputs:
    """Two heads over several groups of mini-batches and an open one, the same every time."""
    generator = torch.Generator().manual_seed(0)
    length = 2 * 64 + size + size // 2 + 1

    normal = _normal(generator, device)
    shape = (1, 2, length, head_dim)
    rates = torch.rand(*shape[:3], generator=generator, dtype=torch.float32, device="cpu").to(device)
    widths = INNER_NETS[net].shapes(head_dim)
    inputs = ScanInputs(
        net=INNER_NETS[net],
        q=normal(*shape),
        k=normal(*shape, scale=0.5),
        v=normal(*shape),
        lr=rates / head_dim,
        tau=1 / torch.arange(1, size + 1, device=device, dtype=torch.float32),
        ln_weight=1 + normal(2, head_dim, scale=0.2),
        ln_bias=normal(2, head_dim, scale=0.2),
        initial_weights=[(normal(2, a, b, scale=0.5 / a**0.5), normal(2, 1, b, scale=0.2)) for a, b in widths],
        state=None,
        grid=TokenGrid((1, length), size, device),
        operand_dtype=torch.bfloat16 if precision == "bf16" else None,
    )
    for leaf in _leaves(inputs):
        leaf.requires_grad_(torch.is_grad_enabled())
    return inputs


def _normal(generator: torch.Generator, device: torch.device):
    """Draws normal tensors, whatever default device or dtype the caller has set."""

    def normal(*shape: int, scale: float = 1.0) -> Tensor:
        drawn = torch.randn(*shape, generator=generator, dtype=torch.float32, device="cpu")
        return (drawn * scale).to(device)

    return normal


def _leaves(inputs: ScanInputs) -> list[Tensor]:
    named = (inputs.q, inputs.k, inputs.v, inputs.lr, inputs.tau, inputs.ln_weight, inputs.ln_bias)
    return [*named, *(t for pair in inputs.initial_weights for t in pair)]


def _results(inputs: ScanInputs, run, gradient: bool) -> dict[str, Tensor]:
    """Outputs by name, and the gradients of a sum of them."""
    output: ScanOutput = run(inputs)
    found = {"z": output.z, "plasticity": output.plasticity} | output.state.to_tensors()
    if not gradient:
        return found
    # Adjoints without a pattern: what is nearly equal in all features would vanish in the LayerNorm, but for rounding.
    normal = _normal(torch.Generator().manual_seed(1), inputs.q.device)
    total = sum((t * normal(*t.shape)).sum() for t in found.values())
    names = ["q", "k", "v", "lr", "tau", "ln_weight", "ln_bias", *itertools.chain(*inputs.net.parameter_names)]
    grads = torch.autograd.grad(total, _leaves(inputs))
    return {name: t.detach() for name, t in found.items()} | {
        f"gradient of {name}": grad for name, grad in zip(names, grads, strict=True)
    }
