"""The Triton backend: interpreted and compiled without a GPU, measured on one where there is one."""

import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy
import pytest
import torch
from packaging import version

from modeling_ttt import scan_triton
from modeling_ttt.scan import scan
from modeling_ttt.triton_sizes import PRECISIONS, group_size, group_tokens

from .scan_cases import Case, build, gradient_errors, moved, outputs, relative

ROOT = Path(__file__).parents[2]
needs_triton = pytest.mark.skipif(
    not scan_triton.TRITON_INSTALLED, reason="Triton is not installed: pip install -e '.[triton]'"
)


def _interpreter_is_broken():
    """Triton's interpreter before 3.7 cannot run a loop of run-time length with NumPy 2.4 or newer."""
    if not scan_triton.TRITON_INSTALLED:
        return False
    import triton

    return version.parse(triton.__version__) < version.parse("3.7") and version.parse(
        numpy.__version__
    ) >= version.parse("2.4")


interprets = pytest.mark.skipif(
    _interpreter_is_broken(), reason="Triton's interpreter before 3.7 does not work with NumPy 2.4 or newer"
)
compiles = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1", reason="TRITON_INTERPRET=1 leaves nothing to compile"
)
needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")


def on_cpu():
    return moved(build(Case(length=9)), torch.float32, "cpu", False)


@compiles
def test_on_a_machine_without_a_gpu_the_backend_refuses_and_auto_goes_on():
    inputs = on_cpu()
    with pytest.raises(ValueError, match="'triton' cannot serve this call: .*(not installed|needs a CUDA device)"):
        scan(inputs, "triton")
    for name, got in outputs(inputs, "auto").items():
        assert torch.equal(got, outputs(inputs, "chunked")[name])


def test_without_triton_the_backend_says_how_to_get_it(monkeypatch):
    monkeypatch.setattr(scan_triton, "TRITON_INSTALLED", False)
    assert "pip install" in scan_triton.unsupported(on_cpu())


def test_a_triton_that_does_not_import_is_a_reason_and_no_error(monkeypatch):
    monkeypatch.setattr(scan_triton, "TRITON_INSTALLED", True)
    monkeypatch.setitem(sys.modules, "modeling_ttt.triton_math", None)  # makes its import fail
    scan_triton._imported.cache_clear()
    try:
        assert "cannot be imported: ModuleNotFoundError" in scan_triton.unsupported(on_cpu())
    finally:
        scan_triton._imported.cache_clear()


def test_factors_are_rounded_like_the_model_and_like_products_of_torch():
    inputs, before = on_cpu(), torch.backends.cuda.matmul.fp32_precision
    assert scan_triton.operand_precision(inputs) == "ieee"
    assert scan_triton.operand_precision(replace(inputs, operand_dtype=torch.float16)) == "bf16"
    try:
        torch.backends.cuda.matmul.fp32_precision = "tf32"
        assert scan_triton.operand_precision(replace(inputs, operand_dtype=torch.float32)) == "tf32"
    finally:
        torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.parametrize("precision", PRECISIONS)
def test_a_group_holds_whole_mini_batches_and_never_spans_a_restart(precision):
    cpu = torch.device("cpu")
    for size in range(1, 65):
        mini_batches = group_size(size, 100, False, 64, precision, cpu)
        assert mini_batches == 1 or mini_batches * size <= group_tokens(64, precision, 90)
        assert group_size(size, 100, True, 64, precision, cpu) == 1


@needs_triton
@interprets
def test_interpreted_kernels_hold_their_claims():
    marks = ["-m", "not slow"]
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", *marks, "tests/modeling_ttt/triton_interpreted.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:]


@pytest.mark.slow
@needs_triton
@interprets
def test_operators_pass_opcheck_in_the_interpreter():
    run = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-m", "slow", "tests/modeling_ttt/triton_interpreted.py"],
        cwd=ROOT,
        env={**os.environ, "TRITON_INTERPRET": "1"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert run.returncode == 0, run.stdout[-6000:]


def check_builds(builds, capsys):
    """Compile for GPUs that are not there; hold the hard limits, and the stored counts of this Triton version."""
    from . import triton_compile as gate

    stored, wrong = gate.baseline(), []
    for one in builds(gate):
        counts = gate.measure(one)
        if counts["spilled"] and not gate.may_spill(one):
            wrong.append(f"{one.name} spills {counts['spilled']} bytes")
        if counts["shared"] > gate.SHARED_LIMIT[one.sm]:
            wrong.append(f"{one.name} needs {counts['shared']} bytes of shared memory")
        for name, allowed in stored.get(one.name, {}).items():
            if counts[name] > 1.1 * allowed:
                wrong.append(f"{one.name}: {name} rose from {allowed} to {counts[name]}")
    if not stored:
        with capsys.disabled():
            print(f"\nno stored counts for {gate.baseline_path().stem}: only hard limits were held", end=" ")
    assert not wrong, "\n".join(wrong)


@needs_triton
@compiles
def test_compiled_kernels_stay_within_their_limits(capsys):
    check_builds(lambda gate: gate.default_builds(), capsys)


@pytest.mark.slow
@needs_triton
@compiles
def test_kernels_of_every_size_stay_within_their_limits(capsys):
    check_builds(lambda gate: gate.all_builds(), capsys)


# On a GPU: tolerances are relative distances to float64.
LIMITS = {"ieee": 2e-5, "tf32": 2e-3, "bf16": 1e-2}
GPU_CASES = {
    "several_groups": Case(length=203, heads=3, head_dim=64, mini_batch=16),
    "goes_on": Case(length=150, first=11, head_dim=64, mini_batch=16, strided=True),
    "masks_and_phases": Case(length=90, batch=3, head_dim=64, mini_batch=16, masked=True, first=9),
    "borders": Case(length=90, head_dim=64, mini_batch=16, masked=True, first=9, borders=(22, 45)),
    "head_dim_16": Case(length=70, head_dim=16, mini_batch=16),
    "head_dim_96": Case(length=70, head_dim=96, mini_batch=16),
    "head_dim_128": Case(length=140, head_dim=128, mini_batch=16),
    "mini_batch_8": Case(length=140, head_dim=64, mini_batch=8),
    "mini_batch_64": Case(length=140, head_dim=64, mini_batch=64),
}


@pytest.fixture(params=PRECISIONS)
def precision(request):
    """A rounding of factors; gives the fields of a call that ask for it."""
    before = torch.backends.cuda.matmul.fp32_precision
    torch.backends.cuda.matmul.fp32_precision = "tf32" if request.param == "tf32" else "ieee"
    yield request.param, {"operand_dtype": torch.bfloat16 if request.param == "bf16" else torch.float32}
    torch.backends.cuda.matmul.fp32_precision = before


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("name", GPU_CASES)
@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_on_a_gpu_the_kernels_equal_float64(net, name, precision):
    precision, fields = precision
    found, gradients = gradient_errors(replace(GPU_CASES[name], net=net), "cuda", "chunked", **fields)
    assert max(found.values()) < LIMITS[precision], found
    assert max(gradients.values()) < 3 * LIMITS[precision], gradients


@pytest.mark.gpu
@needs_gpu
@needs_triton
@pytest.mark.parametrize("net", ["linear", "mlp"])
def test_two_runs_on_a_gpu_are_bit_equal(net, precision):
    inputs = replace(moved(build(Case(net=net, length=203, head_dim=64, mini_batch=16)), torch.float32, "cuda", False))
    inputs = replace(inputs, **precision[1])
    results = []
    for _ in range(2):
        found = outputs(inputs, "triton")
        grads = torch.autograd.grad(found["z"].square().sum(), [inputs.q, inputs.k, inputs.v, inputs.lr])
        results.append([*found.values(), *grads])
    assert all(torch.equal(a, b) for a, b in zip(*results, strict=True))


@pytest.mark.gpu
@needs_gpu
@needs_triton
def test_auto_uses_the_kernels_on_a_gpu():
    inputs = moved(build(Case(length=40, head_dim=64, mini_batch=16)), torch.float32, "cuda", False)
    assert scan_triton.unsupported(inputs) is None
    got, want = outputs(inputs, "auto"), outputs(inputs, "triton")
    assert all(torch.equal(got[name], want[name]) for name in want)
    assert relative(got["z"], outputs(inputs, "chunked")["z"].double().cpu()) < LIMITS["ieee"]
