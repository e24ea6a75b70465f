"""Inputs of the inner loop for comparing a backend with float64, without a model around them."""

from dataclasses import dataclass, replace

import torch

from modeling_ttt.inner_net import INNER_NETS
from modeling_ttt.scan import scan
from modeling_ttt.token_grid import TokenGrid
from modeling_ttt.ttt_state import ScanInputs, TTTState

__all__ = ["Case", "errors", "gradient_errors"]


@dataclass(frozen=True)
class Case:
    """One call of the scan. `first` tokens come in an earlier call, by the reference; options add what is named."""

    net: str = "linear"
    batch: int = 2
    heads: int = 2
    length: int = 21
    head_dim: int = 16
    mini_batch: int = 8
    first: int = 0
    masked: bool = False
    borders: tuple[int, ...] = ()
    frozen: bool = False
    strided: bool = False
    offset: float = 0.0
    seed: int = 0


def build(case: Case) -> ScanInputs:
    """Float64 inputs whose every tensor wants a gradient; the state is that after `first` tokens."""
    rng = torch.Generator().manual_seed(case.seed)

    def normal(*shape, scale=1.0, shift=0.0):
        return torch.randn(*shape, generator=rng, dtype=torch.float64) * scale + shift

    f, size = case.head_dim, case.mini_batch
    net = INNER_NETS[case.net]
    tau = 1 / torch.arange(1, size + 1, dtype=torch.float64) + 0.1 * torch.rand(size, generator=rng).double()
    total = case.first + case.length
    lr = torch.rand(case.batch, case.heads, total, generator=rng).double() / f
    if case.frozen:
        lr[:, :, total // 2 :] = 0
        lr[:, 0] = 0
    shape = (case.batch, case.heads, total, f)
    tokens = normal(*shape), normal(*shape, scale=0.5), normal(*shape)
    initial = [
        (normal(case.heads, a, b, scale=0.5 / a**0.5), normal(case.heads, 1, b, scale=0.2, shift=case.offset))
        for a, b in net.shapes(f)
    ]
    inputs = ScanInputs(
        net,
        *tokens,
        lr,
        tau,
        normal(case.heads, f, scale=0.2, shift=1),
        normal(case.heads, f, scale=0.2),
        initial,
        None,
        _grid(case, slice(0, total), None, None),
        want_plasticity=True,
    )
    if case.first:
        early = slice(0, case.first)
        before = replace(inputs, grid=_grid(case, early, None, None), **_cut(inputs, early))
        state = scan(before, "reference").state
        late = slice(case.first, total)
        grid = _grid(case, late, *before.grid.advanced())
        inputs = replace(inputs, grid=grid, **_cut(inputs, late), state=detach(state, torch.float64))
    return inputs


def _grid(case: Case, part: slice, position, seen, start=None) -> TokenGrid:
    total = case.first + case.length
    real = border = None
    if case.masked:
        real = torch.rand(case.batch, total, generator=torch.Generator().manual_seed(7)) < 0.7
    if case.borders:
        border = torch.zeros(case.batch, total, dtype=torch.bool)
        for row, column in enumerate(case.borders):
            border[row % case.batch, column] = True
            if real is not None:
                real[row % case.batch, column] = True
    real, border = (None if x is None else x[:, part] for x in (real, border))
    shape = (case.batch, len(range(*part.indices(total))))
    return TokenGrid(shape, case.mini_batch, torch.device("cpu"), real, border, position, seen, start)


def _cut(inputs: ScanInputs, part: slice) -> dict:
    return {name: getattr(inputs, name)[:, :, part] for name in ("q", "k", "v", "lr")}


def detach(state: TTTState, dtype: torch.dtype) -> TTTState:
    pairs = [[tuple(t.detach().to(dtype) for t in p) for p in side] for side in (state.weights, state.rows)]
    return TTTState(*pairs)


def leaves(inputs: ScanInputs) -> dict[str, torch.Tensor]:
    """The tensors of a call by name."""
    named = {name: getattr(inputs, name) for name in ("q", "k", "v", "lr", "tau", "ln_weight", "ln_bias")}
    for i, pair in enumerate(inputs.initial_weights):
        named |= {f"initial{i}{letter}": t for letter, t in zip("Wb", pair, strict=True)}
    if inputs.state is not None:
        named |= inputs.state.to_tensors()
    return named


def with_leaves(inputs: ScanInputs, named: dict[str, torch.Tensor]) -> ScanInputs:
    """The call with other tensors."""
    depth = inputs.net.depth
    state = None if inputs.state is None else TTTState.from_tensors(named, depth)
    initial = [(named[f"initial{i}W"], named[f"initial{i}b"]) for i in range(depth)]
    plain = {name: named[name] for name in ("q", "k", "v", "lr", "tau", "ln_weight", "ln_bias")}
    return replace(inputs, **plain, initial_weights=initial, state=state)


def outputs(inputs: ScanInputs, backend: str) -> dict[str, torch.Tensor]:
    """What a scan gives, by name, on the CPU."""
    out = scan(inputs, backend)
    return {"z": out.z, "plasticity": out.plasticity} | out.state.to_tensors()


def moved(inputs: ScanInputs, dtype: torch.dtype, device: str, strided: bool) -> ScanInputs:
    """The call as fresh leaves of another dtype on another device; `strided` stores q, k, v as [B, T, H, f]."""
    named = {name: t.detach().to(device, dtype) for name, t in leaves(inputs).items()}
    if strided:
        for name in "qkv":
            named[name] = named[name].transpose(1, 2).contiguous().transpose(1, 2)
    inputs = replace(inputs, grid=inputs.grid.to(torch.device(device)))
    return with_leaves(inputs, {name: t.requires_grad_() for name, t in named.items()})


def relative(got: torch.Tensor, want: torch.Tensor) -> float:
    """Distance over the size of what is wanted; the distance itself where that is nothing."""
    got, want = got.detach().double().cpu(), want.detach().double()
    assert got.shape == want.shape
    size = float(want.norm())
    return float((got - want).norm()) / (size if size > 1e-12 else 1.0)


def errors(case: Case, device: str = "cpu", oracle: str = "reference", **fields) -> dict[str, float]:
    """Relative error of every output of the triton backend, without gradients, against another's in float64."""
    exact = build(case)
    with torch.set_grad_enabled(oracle == "reference"):
        want = outputs(exact, oracle)
    with torch.no_grad():
        got = outputs(replace(moved(exact, torch.float32, device, case.strided), **fields), "triton")
    return {name: relative(got[name], want[name]) for name in want}


def gradient_errors(
    case: Case, device: str = "cpu", oracle: str = "reference", **fields
) -> tuple[dict[str, float], dict[str, float]]:
    """Relative errors of the outputs and of the gradients of a random sum of them, with respect to every input."""
    exact = moved(build(case), torch.float64, "cpu", False)
    ours = replace(moved(exact, torch.float32, device, case.strided), **fields)
    results, gradients = [], []
    for inputs, backend in ((ours, "triton"), (exact, oracle)):
        rng = torch.Generator().manual_seed(case.seed + 1)
        found, named = outputs(inputs, backend), leaves(inputs)
        weights = {name: torch.randn(t.shape, generator=rng, dtype=torch.float64) for name, t in found.items()}
        total = sum((found[name] * w.to(found[name])).sum() for name, w in weights.items())
        grads = torch.autograd.grad(total, list(named.values()), allow_unused=True)
        results.append(found)
        gradients.append(
            {
                # A slot that holds no write has no gradient to speak of: its zeros are not a choice.
                n: torch.zeros_like(t) if g is None else g * (t != 0).any(-1, keepdim=True) if n[0] in "xg" else g
                for (n, t), g in zip(named.items(), grads, strict=True)
            }
        )
    (got, want), (got_grad, want_grad) = results, gradients
    return (
        {name: relative(got[name], want[name]) for name in want},
        {name: relative(got_grad[name], want_grad[name]) for name in want_grad},
    )
