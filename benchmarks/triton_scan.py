"""Time the Triton backend of the inner loop on a CUDA device: `python benchmarks/triton_scan.py`, under nine minutes.

Nothing is timed that is wrong: every rounding of factors is first compared with float64, and left out if it is off.
Then come, per size, the inner loop in the `triton` and the `chunked` backend (both through `modeling_ttt.scan.scan`,
from tensors as the layer makes them) and causal attention (SDPA, bfloat16) on the same shapes, in turn round by round;
the kernels alone replayed as a CUDA graph; and reading one token. A result is the median over rounds with its
quartiles. Caches of the device stay as the round before left them.
"""

import json
import os
import platform
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path

import torch
import torch.nn.functional as F
from transformers import HfArgumentParser

import modeling_ttt
from modeling_ttt.inner_net import INNER_NETS
from modeling_ttt.scan import scan
from modeling_ttt.token_grid import TokenGrid
from modeling_ttt.ttt_state import ScanInputs

RESULTS = Path(__file__).resolve().parent / "results"
MINI_BATCH = 16
# Largest relative distance to float64, outputs and gradients.
LIMITS = {"bf16": (1.5e-2, 4e-2), "tf32": (2e-3, 6e-3), "ieee": (2e-5, 6e-5)}
# (rows, heads, tokens): the sizes of 125m (12 heads) and 1.3b (32 heads), what matters most first.
CELLS = [
    (1, 32, 2048), (16, 32, 2048), (1, 12, 2048), (1, 32, 8192), (1, 32, 32768), (4, 32, 8192), (16, 12, 2048),
    (16, 32, 8192), (1, 12, 32768),
]  # fmt: skip
DECODE_ROWS = (1, 64, 512)


@dataclass
class Arguments:
    """What to spend and where to write."""

    budget: float = field(default=520.0, metadata={"help": "seconds after which no further size is begun"})
    rounds: int = field(default=15, metadata={"help": "rounds per size after the warm-up"})
    head_dim: int = field(default=64, metadata={"help": "head dim f"})
    output: str | None = field(
        default=None, metadata={"help": "JSON file, if not benchmarks/results/triton_scan-<device>.json"}
    )


class Report:
    """The results, written anew after every cell, so that a run cut short loses only the cell it was at."""

    def __init__(self, args: Arguments):
        name = torch.cuda.get_device_name()
        default = RESULTS / f"triton_scan-{name.lower().replace(' ', '-')}.json"
        self.path = Path(args.output) if args.output else default
        self.started, self.budget = time.perf_counter(), args.budget
        import triton

        self.content = {
            "device": name,
            "capability": list(torch.cuda.get_device_capability()),
            "versions": {
                "modeling_ttt": modeling_ttt.__version__,
                "python": platform.python_version(),
                "torch": torch.__version__,
                "triton": triton.__version__,
                "cuda": torch.version.cuda,
            },
            "head_dim": args.head_dim,
            "mini_batch_size": MINI_BATCH,
            "correctness": [],
            "cells": [],
            "complete": False,
        }

    def left(self) -> float:
        return self.budget - (time.perf_counter() - self.started)

    def add(self, kind: str, row: dict) -> None:
        self.content[kind].append(row)
        self.write()
        print(json.dumps(row), flush=True)

    def write(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.content, indent=1) + "\n")
        os.replace(beside, self.path)


def main(argv: list[str] | None = None) -> Path:
    """Check, time, write; returns the file."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    if not torch.cuda.is_available():
        sys.exit("benchmarks/triton_scan.py needs a CUDA device; torch sees none")
    report = Report(args)
    right = {net: [p for p in LIMITS if is_right(report, net, p, args.head_dim)] for net in INNER_NETS}
    for cell in CELLS:
        for net in INNER_NETS:
            for precision in right[net][:2]:
                if report.left() > 20:
                    time_cell(report, args, net, precision, cell)
    for rows in DECODE_ROWS:
        for net in INNER_NETS:
            if right[net] and report.left() > 10:
                time_decode(report, args, net, right[net][0], rows)
    report.content["complete"] = True
    report.write()
    print(f"written to {report.path}")
    return report.path


def make(net: str, rows: int, heads: int, tokens: int, f: int, dtype: torch.dtype = torch.float32) -> ScanInputs:
    """Random tensors of one call, q, k and v as the layer lays them out; the same for every dtype."""
    generator = torch.Generator("cuda").manual_seed(0)

    def normal(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return (torch.randn(*shape, generator=generator, device="cuda") * scale).to(dtype)

    q, k, v = (normal(rows, tokens, heads, f, scale=scale).transpose(1, 2) for scale in (1.0, 0.5, 1.0))
    return ScanInputs(
        net=INNER_NETS[net],
        q=q,
        k=k,
        v=v,
        lr=torch.rand(rows, heads, tokens, generator=generator, device="cuda").to(dtype) / f,
        tau=1 / torch.arange(1, MINI_BATCH + 1, device="cuda", dtype=dtype),
        ln_weight=1 + normal(heads, f, scale=0.2),
        ln_bias=normal(heads, f, scale=0.2),
        initial_weights=[
            (normal(heads, a, b, scale=0.02), normal(heads, 1, b, scale=0.02)) for a, b in INNER_NETS[net].shapes(f)
        ],
        state=None,
        grid=TokenGrid((rows, tokens), MINI_BATCH, torch.device("cuda")),
    )


def rounded(inputs: ScanInputs, precision: str) -> ScanInputs:
    """The call with factors rounded as named."""
    torch.backends.cuda.matmul.fp32_precision = "tf32" if precision == "tf32" else "ieee"
    return replace(inputs, operand_dtype=torch.bfloat16 if precision == "bf16" else torch.float32)


def leaves(inputs: ScanInputs) -> list[torch.Tensor]:
    """What a training step differentiates."""
    pairs = [t for pair in inputs.initial_weights for t in pair]
    found = [inputs.q, inputs.k, inputs.v, inputs.lr, inputs.tau, inputs.ln_weight, inputs.ln_bias, *pairs]
    return [t.requires_grad_() for t in found]


def forward(inputs: ScanInputs, backend: str) -> torch.Tensor:
    with torch.no_grad():
        return scan(inputs, backend).z


def train(inputs: ScanInputs, backend: str) -> tuple[torch.Tensor, ...]:
    """Forward and backward; the adjoint of z is z."""
    wanted = leaves(inputs)
    z = scan(replace(inputs, want_plasticity=False), backend).z
    return torch.autograd.grad(z, wanted, z.detach())


def is_right(report: Report, net: str, precision: str, f: int) -> bool:
    """Whether the kernels agree with float64, twice bit for bit; goes into the report."""
    size = (2, 3, 203, f)
    exact, ours = make(net, *size, dtype=torch.float64), make(net, *size)
    row = {"net": net, "precision": precision}
    try:
        ours = rounded(ours, precision)
        row["z"] = distance(forward(ours, "triton"), forward(exact, "chunked"))
        row["bit_equal"] = bool(torch.equal(forward(ours, "triton"), forward(ours, "triton")))
        pairs = zip(train(ours, "triton"), train(exact, "chunked"), strict=True)
        row["gradients"] = max(distance(got, want) for got, want in pairs)
    except Exception as error:  # a compiler that fails is a result too
        row["error"] = f"{type(error).__name__}: {str(error)[:300]}"
    limits = LIMITS[precision]
    row["right"] = bool(
        row.get("bit_equal") and row["z"] < limits[0] and row.get("gradients", 0) < limits[1] and "error" not in row
    )
    report.add("correctness", row)
    return row["right"]


def distance(got: torch.Tensor, want: torch.Tensor) -> float:
    return float((got.double() - want).norm() / want.norm())


def time_cell(report: Report, args: Arguments, net: str, precision: str, cell: tuple[int, int, int]) -> None:
    """One size: forward, and forward and backward, of all contenders."""
    rows, heads, tokens = cell
    inputs = rounded(make(net, *cell, args.head_dim), precision)
    half = [t.to(torch.bfloat16).contiguous().requires_grad_() for t in (inputs.q, inputs.k, inputs.v)]

    def attend() -> torch.Tensor:
        with torch.no_grad():
            return F.scaled_dot_product_attention(*half, is_causal=True)

    def attend_and_back() -> tuple[torch.Tensor, ...]:
        out = F.scaled_dot_product_attention(*half, is_causal=True)
        return torch.autograd.grad(out, half, out.detach())

    runs = {backend: lambda backend=backend: forward(inputs, backend) for backend in ("triton", "chunked")}
    contenders = {"forward": runs | {"sdpa": attend}}
    runs = {backend: lambda backend=backend: train(inputs, backend) for backend in ("triton", "chunked")}
    contenders["train"] = runs | {"sdpa": attend_and_back}
    row = {"rows": rows, "heads": heads, "tokens": tokens, "net": net, "precision": precision}
    for step, sides in contenders.items():
        try:
            row[step] = time_in_turn(sides, args.rounds, min(12.0, report.left() / 4))
        except torch.OutOfMemoryError:
            row[step] = "out of memory"
            torch.cuda.empty_cache()
    row["graph"] = graph_time(lambda: forward(inputs, "triton"), args.rounds)
    if row["graph"] is not None:
        row["us_per_mini_batch"] = 1e6 * row["graph"] * MINI_BATCH / tokens
    report.add("cells", row)


def time_decode(report: Report, args: Arguments, net: str, precision: str, rows: int) -> None:
    """Read one token in the middle of a mini-batch, 32 heads."""
    before = rounded(make(net, rows, 32, 5, args.head_dim), precision)
    with torch.no_grad():
        state = scan(before, "chunked").state
    inputs = rounded(make(net, rows, 32, 1, args.head_dim), precision)
    grid = TokenGrid((rows, 1), MINI_BATCH, torch.device("cuda"), None, None, *before.grid.advanced())
    inputs = replace(inputs, state=state, grid=grid)
    sides = {backend: lambda backend=backend: forward(inputs, backend) for backend in ("triton", "chunked")}
    row = {"rows": rows, "heads": 32, "tokens": 1, "net": net, "precision": precision}
    row["decode"] = time_in_turn(sides, args.rounds, 3.0)
    row["graph"] = graph_time(sides["triton"], args.rounds)
    report.add("cells", row)


def time_in_turn(sides: dict[str, Callable], rounds: int, seconds: float) -> dict[str, dict]:
    """Seconds of every side, round by round, until the rounds or the time are used up."""
    measured: dict[str, list[float]] = {name: [] for name in sides}
    for run in sides.values():
        run()
        run()
    started = time.perf_counter()
    for _ in range(rounds):
        for name, run in sides.items():
            measured[name].append(once(run))
        if time.perf_counter() - started > seconds and len(measured[name]) >= 3:
            break
    return {name: summary(values) for name, values in measured.items()}


def once(run: Callable) -> float:
    """Seconds on the device from an idle start."""
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    run()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1e3


def summary(seconds: list[float]) -> dict:
    low, _, high = statistics.quantiles(seconds, n=4)
    return {"median": statistics.median(seconds), "quartiles": [low, high], "rounds": len(seconds)}


def graph_time(run: Callable, rounds: int) -> float | None:
    """Median seconds of the call replayed as a CUDA graph; None where it cannot be captured."""
    torch.cuda.synchronize()
    side = torch.cuda.Stream()
    try:
        with torch.cuda.stream(side):
            run()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            run()
    except RuntimeError:
        torch.cuda.synchronize()
        return None
    graph.replay()
    return statistics.median(once(graph.replay) for _ in range(rounds))


if __name__ == "__main__":
    main()
