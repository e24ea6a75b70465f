"""The document says what the file of results says: targets, ratios, crossover; and marks what was not measured."""

import json
from pathlib import Path

import pytest

from benchmarks._harness import SCHEMA, environment, summary
from benchmarks._results import TARGETS, Crossing, Results, crossing
from benchmarks.cases import LENGTHS, MemoryCase, all_cases
from benchmarks.make_table import FIGURE, TableArguments, document, main


def invented(case, seconds):
    """A record of the case in which contender i takes `seconds(i, T)`."""
    tokens = case.step.tokens
    times = {name: seconds(name, tokens) for name in case.contenders}
    unit = ("peak_mib",) if isinstance(case, MemoryCase) else ("cpu", "wall")
    return {
        "size": case.size,
        "step": {"kind": case.step.kind, "batch": case.step.batch, "tokens": tokens, "logits_to_keep": 0},
        "contenders": {
            name: {
                "parameters": 4_000_000,
                "tokens": tokens,
                "seconds": {u: [time] * 3 for u in unit},
                **{u: summary([time] * 3) for u in unit},
            }
            for name, time in times.items()
        },
        "ratios": {f"{a}/{b}": {u: summary([times[a] / times[b]] * 3) for u in unit} for a, b in case.pairs},
    }


def seconds(name, tokens):
    """Ours 1 s per 1000 tokens, the baseline twice that, Llama quadratic and level with ours at 4000 tokens."""
    kind = name.split("-")[0].split("+")[0]
    factor = {"eager": 2.0, "gemm": 0.7, "llama": tokens / 4000, "reference": 9.0}.get(kind, 1.0)
    return tokens / 1000 * factor * (1.02 if "+plasticity" in name else 1)


@pytest.fixture
def write_results(tmp_path):
    def write(cases, **settings):
        path = tmp_path / "cpu.json"
        settings = {"quick": False, "scale": 1.0, **settings}
        content = {"schema": SCHEMA, "environment": environment("cpu", 1), "settings": settings}
        content["cases"] = {case.name: invented(case, seconds) for case in cases}
        path.write_text(json.dumps(content))
        return path

    return write


def test_the_document_shows_targets_ratios_and_crossover(write_results, tmp_path, capsys):
    results = write_results(all_cases())
    document = main(["--results", str(results), "--output", str(tmp_path / "docs" / "benchmarks.md")])
    text = document.read_text()
    row = "| prefill 2048, small, {}: baseline / native | at least {} | {} | 2.00x [2.00x, 2.00x] | 3 | {} |"
    assert row.format("linear", "1.60x", "2.10x", "yes") in text
    assert row.format("mlp", "1.70x", "2.00x", "yes, stretch too") in text
    assert (
        "decode, small, linear: baseline / compiled | at least 2.20x | 4.00x | 2.00x [2.00x, 2.00x] | 3 | no |" in text
    )
    assert "share of the GEMM-only limit | at least 60% | - | 70% [70%, 70%] | 3 | yes |" in text
    # The baseline takes 2 s, we 1 s, the products 0.7 s: 1.3 s against 0.3 s of all the rest.
    assert "| 2.00x [2.00x, 2.00x] | 70% [70%, 70%] | 4.33x [4.33x, 4.33x] |" in text
    assert "with plasticity / without | at most 1.030x | - | 1.020x [1.020x, 1.020x] | 3 | yes |" in text
    assert "TTT-Linear is faster than Llama at 8192 tokens and beyond" in text
    assert "cross at about 4000 tokens" in text
    assert "At 8192 tokens Llama takes 2.05x its time, at 32768 tokens 8.19x." in text
    assert "There are no GPU figures yet" in text and "quick run" not in text
    assert "![Prefill speed against length](images/benchmark_lengths.png)" in text
    assert (document.parent / "images" / "benchmark_lengths.png").stat().st_size > 10_000
    assert not list(tmp_path.rglob("*.tmp"))
    printed = capsys.readouterr().out
    assert "no                decode, small, linear: baseline / compiled: 2.00x" in printed
    assert "cross at about 4000 tokens" in printed


def test_what_was_not_measured_is_said_to_be_so(write_results, tmp_path):
    results = write_results([case for case in all_cases() if case.name == "decode-small-mlp"], quick=True)
    text = main(["--results", str(results), "--output", str(tmp_path / "benchmarks.md")]).read_text()
    assert text.count("| not measured |") == len(TARGETS) - 1
    assert "A quick run" in text and "images/" not in text


def test_every_target_reads_a_case_that_exists(write_results):
    results = Results(write_results(all_cases()))
    assert [target.text for target in TARGETS if target.value(results) is None] == []


@pytest.mark.skipif(not Path(TableArguments().results).exists(), reason="nothing was measured here")
def test_the_document_is_what_the_results_say():
    arguments = TableArguments()
    written = Path(arguments.output).read_text()
    figure = FIGURE if FIGURE in written else None
    assert written == document(Results(Path(arguments.results)), Path(arguments.results).name, figure)


@pytest.mark.parametrize(
    ("ratios", "expected"),
    [
        ([0.5, 0.25, 1.5, 3], Crossing(8192, pytest.approx(2048 * 4 ** (2 / (2 + 0.585)), rel=1e-3))),
        ([2, 3, 4, 5], Crossing(512, None)),
        ([0.1, 0.2, 0.3, 0.4], Crossing(None, None)),
        ([1.2, 0.5, 2, 4], Crossing(8192, pytest.approx(4096))),
    ],
)
def test_the_crossover_is_the_length_from_which_on_every_ratio_is_above_one(ratios, expected):
    assert crossing(dict(zip(LENGTHS, ratios, strict=True))) == expected
