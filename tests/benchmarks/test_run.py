"""Every case runs on tiny models, the file of results can be gone on with, and memory is measured in new processes."""

import dataclasses
import functools
import json

import pytest
import torch

from benchmarks import cases as cases_module
from benchmarks import run as run_module
from benchmarks._harness import ResultFile
from benchmarks.cases import Case, MemoryCase, Settings, all_cases
from benchmarks.models import GemmOnly, build_model, parameter_count
from benchmarks.peak_memory import HostMeter, MemoryArguments, measure_here, measure_in_new_process
from benchmarks.run import choose, main
from benchmarks.steps import Step, contender
from modeling_ttt.native_library import load_library


@pytest.fixture(autouse=True)
def no_generated_code(monkeypatch):
    """Generating code takes a minute, and is not what is tested."""
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))


def tiny(case):
    """The case on tiny models and one or two mini-batches."""
    step = dataclasses.replace(case.step, tokens=16 if case.step.kind == "decode" else 32, batch=1)
    return dataclasses.replace(case, size="tiny", step=step, seconds=0, min_rounds=1)


TIMED = [case for case in all_cases() if isinstance(case, Case)]


def kinds_of_cases():
    """One timed case per set of contenders and kind of step: lengths and sizes are the same code."""
    kinds = {(case.contenders, case.step.kind): case for case in TIMED}.values()
    compiled = "decode-small-mlp"  # as decode-small-linear, and compilers take long
    return [pytest.param(case, marks=pytest.mark.slow) if case.name == compiled else case for case in kinds]


@pytest.mark.parametrize("case", kinds_of_cases(), ids=lambda case: case.name)
def test_every_kind_of_case_runs(case):
    if any(name.startswith("native") for name in case.contenders) and load_library()[0] is None:
        pytest.skip(load_library()[1])
    record = tiny(case).measure(Settings())
    assert tuple(record["contenders"]) == case.contenders
    for one in record["contenders"].values():
        assert one["cpu"]["n"] == len(one["seconds"]["cpu"]) == 1
        assert one["tokens"] == (16 if case.step.kind == "decode" else 32)
    for a, b in case.pairs:
        seconds = [record["contenders"][name]["cpu"]["median"] for name in (a, b)]
        assert record["ratios"][f"{a}/{b}"]["cpu"]["median"] == pytest.approx(seconds[0] / seconds[1])


def test_cases_have_names_of_their_own_and_name_their_models():
    names = [case.name for case in all_cases()]
    assert len(set(names)) == len(names)
    for case in all_cases():
        assert {name for pair in case.pairs for name in pair} <= set(case.contenders)


def test_the_full_run_takes_at_most_a_quarter_of_an_hour_of_timing():
    assert sum(case.seconds for case in all_cases()) <= 15 * 60


def test_the_peers_have_as_many_parameters_as_ours():
    own = [parameter_count(build_model(f"ttt-{net}", "small")) for net in ("linear", "mlp")]
    for peer in ("llama", "mamba2", "gdn", "gdn-hybrid"):
        count = parameter_count(build_model(peer, "small"))
        assert all(0.85 < count / mine < 1.1 for mine in own), peer


def test_the_limit_has_the_linear_layers_of_the_model():
    ours = build_model("ttt-linear", "tiny")
    linear = [tuple(m.weight.shape) for m in ours.modules() if isinstance(m, torch.nn.Linear)]
    rates = [tuple(b.seq_modeling_block.learnable_ttt_lr_weight[:, 0].shape) for b in ours.model.layers]
    limit = build_model("gemm-linear", "tiny")
    assert isinstance(limit, GemmOnly)
    assert sorted(tuple(m.weight.shape) for m in limit.linears) == sorted(linear + rates)


def test_only_what_is_asked_for_is_returned():
    model = build_model("ttt-linear", "tiny")
    for name, wanted in (("ttt-linear", (False, False)), ("ttt-linear+stats", (True, True))):
        once = contender(name, model, Step("prefill", 1, 16, logits_to_keep=1))
        out = once.run(once.prepare())
        assert (out.plasticity is not None, out.ttt_stats is not None) == wanted
        assert out.logits.shape[1] == 1 and out.past_key_values is not None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: build_model("ttt", "tiny"), "model must be"),
        (lambda: build_model("llama", "huge"), "size must be one of"),
        (lambda: contender("ttt-linear+all", build_model("ttt-linear", "tiny"), Step("train", 1, 16)), "follows"),
        (lambda: contender("ttt-linear", build_model("ttt-linear", "tiny"), Step("read", 1, 16)), "kind must be"),
        (lambda: choose(["decode-*", "nothing"], False), "got 'nothing'"),
    ],
)
def test_what_does_not_exist_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


@pytest.fixture
def two_cases(monkeypatch):
    """Two tiny cases instead of all."""
    chosen = [tiny(case) for case in TIMED if case.name in ("decode-small-linear", "train-small-linear-512")]
    monkeypatch.setattr(run_module, "all_cases", lambda: chosen)


def test_a_run_writes_its_cases_and_goes_on_where_it_stopped(two_cases, tmp_path, capsys):
    path = tmp_path / "cpu.json"
    main(["--output", str(path), "--cases", "decode-*"])
    first = ResultFile.read(path)["cases"]
    assert list(first) == ["decode-small-linear"]
    main(["--output", str(path), "--resume"])
    both = ResultFile.read(path)["cases"]
    assert list(both) == ["decode-small-linear", "train-small-linear-512"]
    assert both["decode-small-linear"] == first["decode-small-linear"]
    main(["--output", str(path), "--again", "--cases", "decode-*"])
    again = ResultFile.read(path)["cases"]
    assert again["decode-small-linear"] != first["decode-small-linear"]
    assert again["train-small-linear-512"] == both["train-small-linear-512"]
    assert "decode-small-linear: ttt-linear" in capsys.readouterr().out


def test_cases_can_be_listed_and_the_long_ones_left_out(capsys):
    main(["--list_cases", "--quick", "--cases", "prefill-*"])
    listed = capsys.readouterr().out.split()
    assert "prefill-small-linear-8192" in listed and not any(name.endswith("32768") for name in listed)


def test_memory_is_the_highest_since_the_start_of_the_step():
    before = torch.ones(16 << 20)  # 64 MiB, given back before the meter starts: must not count
    del before
    meter = HostMeter()
    during = torch.ones(12 << 20)
    del during
    assert 46 < (meter.peak() - meter.before) / 2**20 < 60


PROMPT = MemoryArguments("ttt-linear", "tiny", "prefill", 1, 4096)


def test_memory_of_a_step_comes_with_its_weights():
    measured = measure_here(PROMPT)
    assert measured["weights_mib"] == pytest.approx(measured["parameters"] * 4 / 2**20)
    assert measured["peak_mib"] >= 0 and measured["method"] in ("VmHWM", "ru_maxrss")


@pytest.mark.slow
def test_memory_is_measured_in_a_new_process():
    here, there = measure_here(PROMPT), measure_in_new_process(PROMPT)
    assert there.keys() == here.keys()
    assert there["before_mib"] < here["before_mib"]
    with pytest.raises(RuntimeError, match="failed: ValueError: model must be"):
        measure_in_new_process(dataclasses.replace(PROMPT, contender="nothing"))


def test_a_memory_case_compares_peaks(monkeypatch):
    peaks = iter([100.0, 50.0, 120.0, 40.0])
    common = {"parameters": 1, "weights_mib": 1.0, "before_mib": 1.0, "method": "VmHWM"}
    monkeypatch.setattr(cases_module, "measure_in_new_process", lambda _: common | {"peak_mib": next(peaks)})
    case = MemoryCase("m", "tiny", Step("train", 1, 16), ("eager-mlp", "ttt-mlp"), (("eager-mlp", "ttt-mlp"),), 2)
    record = case.measure(Settings())
    assert record["contenders"]["eager-mlp"]["peak_mib"]["median"] == 110
    assert record["ratios"]["eager-mlp/ttt-mlp"]["peak_mib"] == {"median": 2.5, "q1": 2.25, "q3": 2.75, "n": 2}
    json.dumps(record)
