"""Compiles the Triton kernels for a GPU that is not there, and counts what the compiler made of them.

`python -m tests.modeling_ttt.triton_compile` prints the table; `--write` stores it as the baseline of this version of
Triton.
"""

import argparse
import json
import re
import subprocess
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from modeling_ttt.objective import INNER_LN_EPS
from modeling_ttt.triton_linear import linear_chain_kernel, linear_read_kernel
from modeling_ttt.triton_linear_backward import (
    linear_back_chain_kernel,
    linear_back_read_kernel,
    linear_back_tokens_kernel,
)
from modeling_ttt.triton_mlp import mlp_chain_kernel, mlp_read_kernel
from modeling_ttt.triton_mlp_back_chain import mlp_back_chain_kernel
from modeling_ttt.triton_mlp_backward import mlp_back_read_kernel, mlp_expand_kernel
from modeling_ttt.triton_norm_backward import norm_back_kernel
from modeling_ttt.triton_sizes import MLP_TILE, PRECISIONS, group_tokens, stages, tile, warps

__all__ = ["SHARED_LIMIT", "Build", "all_builds", "baseline", "default_builds", "may_spill", "measure"]

BASELINES = Path(__file__).parent / "triton_baselines"
SHARED_LIMIT = {80: 163 * 1024, 90: 227 * 1024}
KERNELS = {
    "linear_chain": (linear_chain_kernel, "chain"),
    "linear_read": (linear_read_kernel, "read"),
    "linear_back_read": (linear_back_read_kernel, "backward"),
    "linear_back_chain": (linear_back_chain_kernel, "chain"),
    "linear_back_tokens": (linear_back_tokens_kernel, "backward"),
    "norm_back": (norm_back_kernel, "norm"),
    "mlp_chain": (mlp_chain_kernel, "mlp_chain"),
    "mlp_read": (mlp_read_kernel, "mlp_read"),
    "mlp_expand": (mlp_expand_kernel, "mlp_back"),
    "mlp_back_read": (mlp_back_read_kernel, "mlp_back"),
    "mlp_back_chain": (mlp_back_chain_kernel, "mlp_back"),
}
INT32_TENSORS = {"reset", "carried_slots", "last"}
HALF_TENSORS = {"q", "k", "v", "d_q", "d_k", "d_v"}
COUNTS = {"heads", "mini_batches", "groups"}


@dataclass(frozen=True)
class Build:
    """One kernel for one shape, precision and GPU; `extras` turns on restarts, carried rows, norms and kept rows."""

    kernel: str
    sm: int = 90
    head_dim: int = 64
    mini_batch: int = 16
    precision: str = "bf16"
    extras: bool = False

    @property
    def name(self) -> str:
        extras = "-extras" if self.extras else ""
        return f"{self.kernel}-sm{self.sm}-f{self.head_dim}-k{self.mini_batch}-{self.precision}{extras}"


def measure(build: Build) -> dict[str, int | float]:
    """Compile and count: registers, spilled bytes, shared memory, instructions, barriers, seconds."""
    kernel, kind = KERNELS[build.kernel]
    started = time.perf_counter()
    compiled = triton.compile(
        _source(kernel, build),
        target=GPUTarget("cuda", build.sm, 32),
        options={
            "num_warps": warps(kind, build.head_dim, build.mini_batch, build.precision),
            "num_stages": stages(kind),
        },
    )
    seconds = time.perf_counter() - started
    return _count(compiled) | {"shared": compiled.metadata.shared, "seconds": round(seconds, 1)}


def _source(kernel, build: Build) -> ASTSource:
    per_group = (
        1 if build.extras else max(1, group_tokens(build.head_dim, build.precision, build.sm) // build.mini_batch)
    )
    values = {
        "F": build.head_dim,
        "BLOCK_F": tile(build.head_dim),
        "K": build.mini_batch,
        "BLOCK_K": tile(build.mini_batch),
        "PER_GROUP": per_group,
        "BLOCK_T": tile(per_group * build.mini_batch),
        "M": 4 * build.head_dim,
        "BLOCK_M": MLP_TILE,
        "EPS": INNER_LN_EPS,
        "ONE_SUM": build.precision != "ieee",
        "PRECISION": PRECISIONS[build.precision],
        **dict.fromkeys(("RESETS", "CARRIED", "NORM", "ROWS"), build.extras),
    }
    signature, constants, attributes = {}, {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name.isupper():
            signature[name], constants[(place,)] = "constexpr", values[name]
            continue
        is_stride = name.endswith(("_row", "_head", "_token")) and name[0] in "qkv" and name[1] == "_"
        if name in COUNTS or is_stride:
            signature[name] = "i32"
        else:
            half = name in HALF_TENSORS and build.precision == "bf16"
            signature[name] = "*i32" if name in INT32_TENSORS else "*bf16" if half else "*fp32"
        if name not in COUNTS:  # buffers and strides are multiples of 16, as torch gives them for such head dims
            attributes[(place,)] = [["tt.divisibility", 16]]
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


def _count(compiled) -> dict[str, int]:
    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    with tempfile.NamedTemporaryFile(suffix=".cubin") as cubin:
        cubin.write(compiled.asm["cubin"])
        cubin.flush()

        def ask(option: str) -> str:
            return subprocess.run([tool, option, cubin.name], capture_output=True, text=True, check=True).stdout

        usage, code = ask("--dump-resource-usage"), ask("-sass")
    found = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
    return {
        "registers": int(found[1]),
        "spilled": int(found[2]) + int(found[3]),
        **_instructions(code),
    }


def _instructions(code: str) -> dict[str, int]:
    """Instructions and barriers of a kernel, and those of its longest loop: what a mini-batch costs a chain."""
    lines = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?);", code, re.M)
    text = {int(place, 16): instruction for place, instruction in lines}
    loop = range(0)
    for place, instruction in text.items():
        target = re.search(r"\bBRA(?:\.\w+)* .*?(0x[0-9a-f]+)", instruction)
        if target and int(target[1], 16) < place and place - int(target[1], 16) > len(loop):
            loop = range(int(target[1], 16), place)
    inside = [instruction for place, instruction in text.items() if place in loop]
    return {
        "instructions": len(text),
        "barriers": sum("BAR." in instruction for instruction in text.values()),
        "loop_instructions": len(inside),
        "loop_barriers": sum("BAR." in instruction for instruction in inside),
    }


CHAINS = ("linear_chain", "linear_back_chain")


def default_builds() -> list[Build]:
    """What the gate builds in every run: every kernel for sm_90, TTT-Linear for sm_80, the chains in more sizes."""
    found = [Build(kernel, sm) for kernel in KERNELS for sm in SHARED_LIMIT if sm == 90 or kernel.startswith("linear")]
    found += [Build(kernel, precision=precision) for kernel in CHAINS for precision in ("tf32", "ieee")]
    found += [Build(kernel, head_dim=head_dim) for kernel in CHAINS for head_dim in (96, 128)]
    return found + [Build(kernel, extras=True) for kernel in KERNELS if "chain" in kernel or "back_read" in kernel]


def all_builds() -> list[Build]:
    """Every head dim, mini-batch size and precision that matters on both GPUs, without the default ones; minutes."""
    shapes = [(16, 16), (64, 8), (64, 16), (64, 32), (64, 64), (96, 16), (128, 16)]
    found = []
    for kernel in KERNELS:
        for sm in SHARED_LIMIT:
            fits = [shape for shape in shapes if shape[0] <= 64 or not kernel.startswith("mlp")]
            found += [Build(kernel, sm, *shape) for shape in fits]
            found += [Build(kernel, sm, precision=precision) for precision in ("tf32", "ieee")]
            found += [Build(kernel, sm, 96, precision="tf32")] if kernel in CHAINS else []
            found.append(Build(kernel, sm, extras=True))
    default = default_builds()
    return [build for build in found if build not in default]


def may_spill(build: Build) -> bool:
    """The serial chains of TTT-Linear must not spill where a head's weights leave room for it."""
    return build.kernel not in CHAINS or build.head_dim > 64 or build.mini_batch > 32


def baseline_path() -> Path:
    """Where the counts of this Triton version are stored."""
    return BASELINES / f"triton-{triton.__version__}.json"


def baseline() -> dict[str, dict[str, int]]:
    """The stored counts by build, empty if this Triton version has none."""
    return json.loads(baseline_path().read_text()) if baseline_path().exists() else {}


def main() -> None:
    """Print what every build came to; with --write, store it."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--write", action="store_true", help="store the counts as the baseline of this Triton version")
    parser.add_argument("--only", default="", help="builds whose name contains this")
    args = parser.parse_args()
    counts = {}
    for build in default_builds() + all_builds():
        if args.only in build.name:
            counts[build.name] = measure(build)
            print(build.name, counts[build.name], flush=True)
    if args.write:
        BASELINES.mkdir(exist_ok=True)
        for one in counts.values():
            del one["seconds"]
        rows = ",\n".join(f" {json.dumps(name)}: {json.dumps(counts[name])}" for name in sorted(counts))
        baseline_path().write_text(f"{{\n{rows}\n}}\n")


if __name__ == "__main__":
    main()
