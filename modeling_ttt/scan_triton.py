"""The inner loop as Triton kernels on a CUDA device: TTT-Linear and TTT-MLP, forward and backward.

The weights stay float32; the factors of products are rounded to bfloat16 in a half-precision model and to TF32 where
PyTorch's own float32 products on CUDA are, otherwise they are exact float32.
"""

import importlib.util
import itertools
from functools import cache

import torch
from torch import Tensor

from .aligned import AlignedTokens, align, unalign
from .inner_net import INNER_NETS, Weights
from .triton_check import self_check
from .triton_mlp_ops import mlp_forward
from .triton_ops import linear_forward
from .ttt_state import ScanInputs, ScanOutput, TTTState

__all__ = ["operand_precision", "scan_triton", "unsupported"]

TRITON_INSTALLED = importlib.util.find_spec("triton") is not None
MAX_HEAD_DIM = {"linear": 128, "mlp": 64}
MAX_MINI_BATCH = 64


def unsupported(inputs: ScanInputs) -> str | None:
    """Why this backend cannot serve a call, or None."""
    return _unsuited_place(inputs) or _unsuited_call(inputs) or _failed_check(inputs)


def _unsuited_place(inputs: ScanInputs) -> str | None:
    device = inputs.q.device
    if not TRITON_INSTALLED:
        return "Triton is not installed (pip install triton)"
    if _import_failure() is not None:
        return f"Triton is installed but cannot be imported: {_import_failure()}"
    if _interpreted():
        return None
    if device.type != "cuda":
        return f"it needs a CUDA device, the tensors are on {device.type!r}"
    if torch.version.cuda is None:
        return "it needs an NVIDIA GPU, this PyTorch was not built for CUDA"
    return None


def _unsuited_call(inputs: ScanInputs) -> str | None:
    f, size = inputs.q.shape[-1], inputs.tau.shape[0]
    if inputs.q.dtype != torch.float32:
        return f"its inner loop is in float32, this model's in {inputs.q.dtype}"
    if inputs.net not in INNER_NETS.values():
        return f"it has no kernels for the inner net {inputs.net.name!r}"
    if f > MAX_HEAD_DIM[inputs.net.name]:
        return f"it takes head dims up to {MAX_HEAD_DIM[inputs.net.name]} for {inputs.net.name!r}, got {f}"
    if size > MAX_MINI_BATCH:
        return f"it takes mini-batches of up to {MAX_MINI_BATCH} tokens, got {size}"
    if inputs.want_stats:
        return "it does not collect output_ttt_stats"
    if inputs.want_gradients:
        return "it does not collect the inner gradients that tap_inner_grad shows"
    return None


def _failed_check(inputs: ScanInputs) -> str | None:
    if not inputs.q.is_cuda:
        return None
    index = inputs.q.device.index
    shape = inputs.net.name, inputs.q.shape[-1], inputs.tau.shape[0]
    return self_check(
        torch.cuda.current_device() if index is None else index,
        *shape,
        operand_precision(inputs),
        _wants_gradient(inputs),
    )


def operand_precision(inputs: ScanInputs) -> str:
    """How the factors of products are rounded: "bf16", "tf32" or "ieee" (not at all)."""
    if inputs.operand_dtype in (torch.bfloat16, torch.float16):
        return "bf16"
    return "tf32" if _products_use_tf32() else "ieee"


def scan_triton(inputs: ScanInputs) -> ScanOutput:
    """Run the inner loop in kernels: a serial chain over the writes, then all reads in parallel."""
    tokens, start = align(inputs), inputs.start()
    if tokens.borders.count == 0:
        return ScanOutput(inputs.q, start, inputs.lr if inputs.want_plasticity else None)
    run = _linear if inputs.net == INNER_NETS["linear"] else _mlp
    z, norm, weights, rows = run(inputs, tokens, start, _arguments(inputs, tokens))
    plasticity = None
    if inputs.want_plasticity:
        plasticity = inputs.tau[-1] * inputs.lr.abs() * unalign(norm, inputs.grid)
        if inputs.grid.real is not None:
            plasticity = plasticity.masked_fill(~inputs.grid.real[:, None], 0)
    return ScanOutput(unalign(z, inputs.grid), TTTState(weights, _held_rows(inputs, tokens, rows)), plasticity)


def _arguments(inputs: ScanInputs, tokens: AlignedTokens) -> dict:
    """The arguments that all operators share."""
    commit = inputs.tau[-1] * tokens.lr
    if tokens.borders.complete is not None:
        commit = commit * tokens.borders.complete.repeat_interleave(inputs.tau.shape[0], 1)[:, None]
    precision = operand_precision(inputs)
    q, k, v = tokens.q, tokens.k, tokens.v
    if precision == "bf16":
        # What products round anyway may be stored so; v is in no product, and exact only in a bfloat16 model.
        q, k = q.bfloat16(), k.bfloat16()
        v = v.bfloat16() if inputs.operand_dtype == torch.bfloat16 else v
    named = {"q": q, "k": k, "v": v, "lr": tokens.lr, "commit": commit, "tau": inputs.tau, "precision": precision}
    named |= {"ln_weight": inputs.ln_weight, "ln_bias": inputs.ln_bias}
    flags = {"reset": tokens.borders.reset, "carried_slots": tokens.borders.carried_slots}
    flags["last"] = None if tokens.borders.held is None else _last(inputs, tokens)
    return named | {name: None if flag is None else flag.int() for name, flag in flags.items()}


def _linear(inputs: ScanInputs, tokens: AlignedTokens, start: TTTState, arguments: dict):
    """z and norm of every column, the weights at the end, and x and g of each row's last mini-batch."""
    z, norm, weight, bias, g, *_ = linear_forward(
        start_weight=start.weights[0][0],
        start_bias=start.weights[0][1],
        initial_weight=inputs.initial_weights[0][0],
        initial_bias=inputs.initial_weights[0][1],
        carried_gradient=None if tokens.carried is None else tokens.carried[0][1],
        **arguments,
    )
    return z, norm, [(weight, bias)], [(_last_rows(inputs, tokens, tokens.k), g)]


def _mlp(inputs: ScanInputs, tokens: AlignedTokens, start: TTTState, arguments: dict):
    """As `_linear`."""
    places = ("weight1", "bias1", "weight2", "bias2")
    named = {f"start_{n}": t for n, t in zip(places, itertools.chain(*start.weights), strict=True)}
    named |= {f"initial_{n}": t for n, t in zip(places, itertools.chain(*inputs.initial_weights), strict=True)}
    carried = (None,) * 3
    if tokens.carried is not None:
        (_, g1), (x2, g2) = tokens.carried
        carried = x2, g1, g2
    named |= zip(("carried_inner", "carried_gradient1", "carried_gradient2"), carried, strict=True)
    z, norm, w1, b1, w2, b2, x2, g1, g2, *_ = mlp_forward(**named, **arguments)
    rows = [(_last_rows(inputs, tokens, tokens.k), g1), (x2, g2)]
    return z, norm, [(w1, b1), (w2, b2)], rows


def _last_rows(inputs: ScanInputs, tokens: AlignedTokens, x: Tensor) -> Tensor | None:
    """x [B, H, M * K, ...] in each row's last mini-batch, [B, H, K, ...]; None if the new state holds no rows."""
    if tokens.borders.held is None:
        return None
    every = torch.arange(x.shape[0], device=x.device)
    return x.unflatten(2, (-1, inputs.tau.shape[0]))[every, :, _last(inputs, tokens)]


def _held_rows(inputs: ScanInputs, tokens: AlignedTokens, rows: list[tuple]) -> Weights:
    """The rows (x, lr * g) of the new state from (x, g) of each row's last mini-batch, [B, H, K, width]."""
    if tokens.borders.held is None:
        batch, heads, _, f = inputs.q.shape
        shapes = inputs.net.shapes(f)
        return [tuple(inputs.q.new_zeros(batch, heads, len(inputs.tau), n) for n in widths) for widths in shapes]
    held = tokens.borders.held[:, None, :, None]
    lr = _last_rows(inputs, tokens, tokens.lr)[..., None]
    return [(x * held, g * lr * held) for x, g in rows]


def _last(inputs: ScanInputs, tokens: AlignedTokens) -> Tensor:
    """[B], the mini-batch of each row's last token."""
    if tokens.borders.last is not None:
        return tokens.borders.last
    return torch.full((inputs.q.shape[0],), tokens.borders.count - 1, device=inputs.q.device)


def _wants_gradient(inputs: ScanInputs) -> bool:
    tensors = [inputs.q, inputs.k, inputs.v, inputs.lr, inputs.tau, inputs.ln_weight, inputs.ln_bias]
    pairs = list(inputs.initial_weights)
    if inputs.state is not None:
        pairs += inputs.state.weights + inputs.state.rows
    tensors += [t for pair in pairs for t in pair]
    return torch.is_grad_enabled() and any(t.requires_grad for t in tensors)


@torch.compiler.assume_constant_result
def _products_use_tf32() -> bool:
    return torch.backends.cuda.matmul.fp32_precision == "tf32"


@torch.compiler.assume_constant_result
def _interpreted() -> bool:
    """Triton was told to interpret its kernels on the CPU (its own variable TRITON_INTERPRET)."""
    return _imported()[1]


@torch.compiler.assume_constant_result
def _import_failure() -> str | None:
    return _imported()[0]


@cache
def _imported() -> tuple[str | None, bool]:
    """Why importing Triton fails, or None, and whether it interprets; a failed import is not tried again."""
    try:
        from .triton_math import INTERPRETED
    except Exception as error:  # whatever a half-installed package may raise
        return f"{type(error).__name__}: {str(error)[:300]}", False
    return None, bool(INTERPRETED.value)
