"""The inner loop in C++: compiled once, checked before it is trusted, the same function as the other backends."""

import shutil
import subprocess
import sys

import pytest
import torch

from modeling_ttt import native_call, native_library, scan_native
from modeling_ttt.native_call import backward_pass, forward_pass
from modeling_ttt.native_library import load_library
from modeling_ttt.scan import scan

from .helpers import NEEDS_NATIVE, distance, tiny, tokens
from .scan_cases import Case, build, leaves, moved, outputs, relative, with_leaves

pytestmark = NEEDS_NATIVE

HARD = Case(length=40, first=9, masked=True, borders=(20, 31, 12))


@pytest.mark.parametrize("net", ["linear", "mlp"])
@pytest.mark.parametrize("head_dim", [6, 16, 40])
def test_float32_is_as_near_to_float64_as_the_chunked_backend(net, head_dim):
    """Head dims that fill no vector, one, and several with a rest."""
    exact = build(Case(net=net, head_dim=head_dim, mini_batch=5, length=203))
    want = outputs(exact, "reference")
    single = moved(exact, torch.float32, "cpu", True)
    with torch.no_grad():
        got, other = outputs(single, "native"), outputs(single, "chunked")
    for name in want:
        assert relative(got[name], want[name]) < max(2e-6, 3 * relative(other[name], want[name])), name


@pytest.mark.parametrize("batch", [1, 2])
def test_how_a_state_is_stored_does_not_matter(batch):
    inputs = moved(build(Case(net="mlp", batch=batch, first=5, length=22)), torch.float64, "cpu", False)
    named = leaves(inputs)
    for name in inputs.state.to_tensors():
        order = torch.channels_last if name[0] in "Wb" else torch.contiguous_format
        stored = named[name].detach().contiguous(memory_format=order)
        stored = stored if name[0] in "Wb" else stored.mT.contiguous().mT
        named[name] = stored.requires_grad_()
    inputs, found = with_leaves(inputs, named), []
    for backend in ("native", "chunked"):
        out = outputs(inputs, backend)
        total = sum(t.square().sum() for t in out.values())
        wanted = [t for name, t in named.items() if not name.startswith("initial")]
        found.append([*out.values(), *torch.autograd.grad(total, wanted)])
    assert distance(*found) < 1e-9


@pytest.mark.parametrize(
    ("name", "change"),
    [("lr", torch.Tensor.float), ("lr", lambda t: t[:, :1]), ("ln_weight", lambda t: t[:1]), ("tau", lambda t: t[1:])],
    ids=["dtype", "heads of lr", "heads of the norm", "mini-batch"],
)
def test_what_would_be_read_beyond_its_end_is_refused(name, change):
    """As a hook at a tap may return it."""
    inputs = moved(build(Case(length=21)), torch.float64, "cpu", False)
    tokens = native_arguments(inputs)
    tokens[name] = change(tokens[name].detach())
    with pytest.raises(ValueError, match=f"{name}.* must be torch.float64 .*, got|whole mini-batches of 7"):
        forward_pass(*tokens.values())


def native_arguments(inputs):
    """What `forward_pass` is called with, by name."""
    named, seen = ("q", "k", "v", "lr", "tau", "ln_weight", "ln_bias"), []
    with pytest.MonkeyPatch.context() as patch, torch.no_grad():
        patch.setattr(scan_native, "forward_pass", lambda *args: seen.append(args) or forward_pass(*args))
        scan_native.scan_native(inputs)
    (args,) = seen
    return dict(zip([*named, *range(len(args) - len(named))], args, strict=True))


def test_threads_change_nothing():
    inputs = moved(build(Case(net="mlp", batch=3, heads=3, length=50)), torch.float64, "cpu", False)
    threads = torch.get_num_threads()
    try:
        found = []
        for count in (1, 3):
            torch.set_num_threads(count)
            out = outputs(inputs, "native")
            grads = torch.autograd.grad(sum(t.square().sum() for t in out.values()), list(leaves(inputs).values()))
            found.append([*out.values(), *grads])
    finally:
        torch.set_num_threads(threads)
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_numbers_that_are_none_reach_the_output():
    inputs = moved(build(Case(net="mlp", batch=2, length=24)), torch.float32, "cpu", False)
    with torch.no_grad():
        inputs.k[0, 0, 3] = float("nan")
        inputs.v[1, 1] = 1e30
        out = scan(inputs, "native")
    assert out.z[0, 0].isnan().any() and out.plasticity[0, 0, 3].isnan()
    assert out.z[0, 1].isfinite().all() and out.z[1, 0].isfinite().all()


@pytest.mark.parametrize("case", [Case(net="mlp", length=21), HARD], ids=["plain", "hard"])
def test_the_passes_are_operators_that_compilers_can_take(case, monkeypatch):
    assert scan_native._checked() is None  # now, so that its calls are not among those recorded
    inputs, calls = moved(build(case), torch.float64, "cpu", False), []
    for name, operator in (("forward_pass", forward_pass), ("backward_pass", backward_pass)):

        def record(*args, operator=operator):
            calls.append((operator, args))
            return operator(*args)

        monkeypatch.setattr(scan_native, name, record)
    found = outputs(inputs, "native")
    torch.autograd.grad(sum(t.sum() for t in found.values()), inputs.q)
    assert [operator for operator, _ in calls] == [forward_pass, backward_pass]
    for operator, args in calls:
        detached = torch.utils._pytree.tree_map_only(torch.Tensor, torch.detach, args)
        torch.library.opcheck(operator, detached, test_utils=("test_schema", "test_faketensor"))


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_model_compiles_and_trains_as_one_graph(kind):
    torch._dynamo.reset()
    model, ids = tiny(ttt_layer_type=kind, num_hidden_layers=1, use_cache=False, ttt_backend="native"), tokens(2, 40)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    found = []
    for run in (compiled, model):
        model.zero_grad()
        out = run(ids, labels=ids)
        out.loss.backward()
        found.append([out.logits, *out.plasticity, *(p.grad.clone() for p in model.parameters())])
    assert distance(*found) < 1e-10


def test_the_first_call_may_be_an_export():
    """Which traces everything it runs, and is not to trace the self-check."""
    model, ids = tiny(num_hidden_layers=1, use_cache=False, ttt_backend="native"), tokens(1, 20)
    scan_native._checked.cache_clear()
    with torch.no_grad():
        program = torch.export.export(model, (ids,), strict=False)
        assert scan_native._checked.cache_info().currsize == 1
        assert distance(program.module()(ids).logits, model(ids).logits) < 1e-12


def test_what_it_cannot_serve_it_names():
    model = tiny(ttt_backend="native")
    with pytest.raises(ValueError, match="'native' cannot serve this call: it does not collect output_ttt_stats"):
        model(tokens(1, 20), output_ttt_stats=True)
    assert model(tokens(1, 20)).ttt_stats is None


def test_auto_never_compiles_anything(monkeypatch):
    monkeypatch.setattr(native_library, "load_library", lambda: pytest.fail("asked for a library"))
    monkeypatch.setattr(scan_native, "_checked", lambda: pytest.fail("asked for a library"))
    assert tiny(ttt_backend="auto")(tokens(1, 20)).logits.isfinite().all()


def test_a_library_that_computes_something_else_is_not_used(monkeypatch):
    right = scan_native.forward_pass

    def wrong(*args):
        z, *rest = right(*args)
        return (1.001 * z, *rest)

    monkeypatch.setattr(scan_native, "forward_pass", wrong)
    assert scan_native._checked.__wrapped__().startswith("its self-check failed: z is off by")
    monkeypatch.setattr(scan_native, "call_layout_fits", lambda: False)
    assert "another layout" in scan_native._checked.__wrapped__()


@pytest.fixture
def fresh_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(native_library.constants, "HF_HOME", str(tmp_path))
    return tmp_path / "modeling_ttt"


def test_without_a_compiler_or_the_source_it_says_so(monkeypatch, fresh_folder):
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name: None)
        assert "there is no C++ compiler: none of c++, g++, clang++" in load_library.__wrapped__()[1]
    monkeypatch.setattr(native_library, "SOURCE", native_library.SOURCE.with_name("elsewhere.cpp"))
    assert "not beside its module" in load_library.__wrapped__()[1]


def test_a_compiler_that_fails_leaves_no_library_and_is_quoted(monkeypatch, fresh_folder, tmp_path):
    broken = tmp_path / "broken.cpp"
    broken.write_text("this is no C++\n")
    monkeypatch.setattr(native_library, "SOURCE", broken)
    monkeypatch.setattr(native_library, "HEADERS", ())
    library, reason = load_library.__wrapped__()
    assert library is None and "could not make its library" in reason and "error" in reason
    assert list(fresh_folder.iterdir()) == []


def test_another_source_makes_another_library(monkeypatch, tmp_path):
    key = native_library._key(shutil.which("c++") or shutil.which("g++"))
    source = tmp_path / "inner_loop.cpp"
    source.write_bytes(native_library.SOURCE.read_bytes() + b"\n")
    monkeypatch.setattr(native_library, "SOURCE", source)
    monkeypatch.setattr(native_library, "HEADERS", ())
    assert native_library._key(shutil.which("c++") or shutil.which("g++")) != key


def test_a_pass_without_memory_raises(monkeypatch):
    library, _ = load_library()
    monkeypatch.setattr(library, "_library", type("Failing", (), {"ttt_forward_f64": staticmethod(lambda call: 1)}))
    inputs = moved(build(Case(length=21)), torch.float64, "cpu", False)
    with pytest.raises(MemoryError, match="ttt_forward_f64: no memory"):
        scan_native.scan_native(inputs)


def test_a_call_is_laid_out_as_the_compiler_lays_it_out():
    assert native_call.call_layout_fits()


def test_importing_the_package_compiles_nothing():
    code = "import modeling_ttt, modeling_ttt.native_library as n; assert n.load_library.cache_info().currsize == 0"
    subprocess.run([sys.executable, "-c", code], check=True)
