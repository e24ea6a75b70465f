"""Write docs/benchmarks.md and its figure from a file of results: `python -m benchmarks.make_table --help`."""

import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from transformers import HfArgumentParser

from benchmarks._harness import ROOT
from benchmarks._results import TARGETS, Results, crossing
from benchmarks.cases import INNER_NETS, LENGTHS, MEMORY_TOKENS, PEERS
from benchmarks.steps import PROMPT_TOKENS

__all__ = ["TableArguments", "document", "draw_speed", "main"]

LABELS = {
    "ttt-linear": "TTT-Linear",
    "ttt-mlp": "TTT-MLP",
    "llama": "Llama (sdpa)",
    "mamba2": "Mamba2",
    "gdn": "gated delta net",
    "gdn-hybrid": "gated delta net, 3 + 1 full",
}
OWN = ("ttt-linear", "ttt-mlp")
WAYS = (("chunked", "ttt-{}"), ("native", "native-{}"), ("chunked, compiled", "ttt-{}+compiled"))
"""Ways of running our model, and their contenders."""
FIGURE = "images/benchmark_lengths.png"
NOT_MEASURED = "-"

Rows = Iterable[Sequence[str]]

METHOD = f"""- **Ratio**: contenders run in turn, each round starts with another, the ratio is taken within a round.
  Shown are the median over rounds and the quartiles, which describe the rounds of one run on one machine.
- **Ours**: `TTTForCausalLM`, without plasticity unless that is what is measured: the baseline and the peers have none.
  Where no way is named it is the default, `chunked`. **native**: `config.ttt_backend = "native"`; it has no
  `output_ttt_stats`. **compiled**: `torch.compile(model, fullgraph=True)`, compilation not counted; baseline and limit
  are not compiled, and the limit is that of the BLAS PyTorch calls, which compiled decoding does without.
- **Baseline**: `benchmarks/eager_baseline.py`, the same function from the same weights as a plain loop over
  mini-batches; a test holds its logits and gradients to the library's to 1e-10 in float64. It is our own code written
  for this comparison, not the official one.
- **Share of limit**: time of the matrix products of all linear layers on random inputs (`GemmOnly`, by segments of
  1,024 tokens) / our time; no inner loop, norm or activation is in it. The largest speed-up there can be is
  speed-up / share: how near a target lies depends on how fast the machine multiplies, since a plain loop pays for
  the same products.
- **Beyond limit**: (baseline - limit) / (ours - limit), round by round: how many times less we need for all the rest.
- **small**: width 256, 4 heads, 4 layers, vocabulary 4096. **125m layers**: two layers of the 125m preset,
  vocabulary 512.
- **Prefill**: B=1, logits of all positions, state returned. **Decode**: B=1, after {PROMPT_TOKENS} tokens, a whole
  mini-batch per round, so the commit is in the mean. **Train step**: forward and backward of the loss, no optimizer.
- **Peers** are those of Transformers without their CUDA kernels: on a CPU Mamba2 and the gated delta net (Qwen3-Next
  without experts) run through the PyTorch code that comes with them. An all-linear Qwen3-Next cannot make a cache
  there: in prefill it returns no state, in decoding its last layer has softmax attention.
- **Memory**: a new process per measurement; the kernel's high-water mark during the step less what was resident
  before it.

```bash
make bench                                                    # 15 minutes on an idle core, then this document
.venv/bin/python -m benchmarks.run --quick                    # a few minutes, into its own file
.venv/bin/python -m benchmarks.run --resume                   # go on after a stop
.venv/bin/python -m benchmarks.run --again --cases 'decode-*' # these anew; --list_cases names them
.venv/bin/python -m benchmarks.run --device cuda              # the same cases on a GPU, into its own file
.venv/bin/python -m benchmarks.make_table                     # this document from benchmarks/results/cpu.json
```"""


@dataclass
class TableArguments:
    """Where the numbers come from and where the document goes."""

    results: str = field(
        default=str(ROOT / "benchmarks" / "results" / "cpu.json"), metadata={"help": "file that benchmarks.run wrote"}
    )
    output: str = field(
        default=str(ROOT / "docs" / "benchmarks.md"), metadata={"help": "document; the figure goes beside it"}
    )


def main(argv: Sequence[str] | None = None) -> Path:
    """Write figure and document; returns the document."""
    (arguments,) = HfArgumentParser(TableArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(
        argv
    )
    results, output = Results(Path(arguments.results)), Path(arguments.output)
    figure = output.parent / FIGURE
    has_figure = draw_speed(results, figure)
    _write(output, document(results, Path(arguments.results).name, FIGURE if has_figure else None))
    for target in TARGETS:
        print(f"{target.verdict(results):<18}{target.text}: {_spread(target.value(results), target.style)}")
    for net in INNER_NETS:
        print(_crossover(results, net))
    print(f"written to {output}")
    return output


def document(results: Results, source: str, figure: str | None) -> str:
    """The whole document."""
    parts = [
        _head(results, source),
        "## Targets",
        _targets(results),
        "## Against the eager baseline, and the limit",
        _against_baseline(results),
        "## Against other architectures of its size",
        _against_peers(results, figure),
        "## Peak memory",
        _memory(results),
        "## What plasticity and the diagnostics cost",
        _extras(results),
        "## Against the token-by-token backend",
        _backends(results),
        "## How it is measured",
        METHOD,
    ]
    return "\n\n".join(part for part in parts if part) + "\n"


def _head(results: Results, source: str) -> str:
    env = results.environment
    versions = ", ".join(f"{name} {version}" for name, version in env["versions"].items())
    threads = "one thread" if env["threads"] == 1 else f"{env['threads']} threads"
    hardware = env["cpu"] if env["device"] == "cpu" else f"{env['device']}, {env['cpu']}"
    lines = [
        "# Benchmarks",
        "",
        f"Written by `benchmarks/make_table.py` from `benchmarks/results/{source}`, not by hand; `make bench` "
        "measures anew.",
        "",
        f"Measured on {hardware} ({env['cores']} cores, {threads}), float32, {versions}, "
        f"commit {env['revision'] or 'unknown'} (code {env['code']}). Times are {_clock(results)}.",
    ]
    if results.settings["quick"] or results.settings["scale"] < 1:
        lines += ["", "**A quick run: few rounds and without the longest cases. Its numbers are a first look.**"]
    if env["device"] == "cpu":
        lines += [
            "",
            "There are no GPU figures yet. What is said elsewhere about speed on a GPU is a prediction until it is "
            "measured and stands here.",
        ]
    return "\n".join(lines)


def _clock(results: Results) -> str:
    return "CPU time of the process" if results.clock == "cpu" else "wall time"


def _targets(results: Results) -> str:
    rows = []
    for target in TARGETS:
        sign = "at most " if target.at_most else "at least "
        value = target.value(results)
        rows.append(
            (
                target.text,
                sign + target.style.format(target.bound),
                NOT_MEASURED if target.stretch is None else target.style.format(target.stretch),
                _spread(value, target.style),
                NOT_MEASURED if value is None else str(value["n"]),
                target.verdict(results),
            )
        )
    return _table(("what", "target", "stretch", "median [quartiles]", "rounds", "reached"), rows)


def _against_baseline(results: Results) -> str:
    rows = []
    for net in INNER_NETS:
        cases = [f"prefill-small-{net}-{t}" for t in LENGTHS] + [f"prefill-125m-{net}-2048", f"decode-small-{net}"]
        cases += [f"train-small-{net}-{t}" for t in (512, 1024)] + [f"train-125m-{net}-512"]
        for case in cases:
            if case in results.cases:
                measured = results.cases[case]["contenders"]
                ways = ((way, name.format(net)) for way, name in WAYS)
                rows += [_baseline_row(results, case, net, *one) for one in ways if one[1] in measured]
    head = ("step", "inner net", "way", "tokens/s", "baseline, tokens/s", "speed-up", "share of limit", "beyond limit")
    table = _table(head, rows)
    decode = []
    for net in INNER_NETS:
        case, names = f"decode-small-{net}", (f"ttt-{net}", f"ttt-{net}+compiled", f"eager-{net}")
        own, compiled, baseline = (_milliseconds(results, case, name) for name in names)
        if own and baseline:
            faster = f", {compiled:.2f} ms through `torch.compile`" if compiled else ""
            decode.append(f"{net} {own:.2f} ms per token{faster} (baseline {baseline:.2f} ms)")
    return table + (f"\n\nDecoding: {', '.join(decode)}." if decode else "")


def _baseline_row(results: Results, case: str, net: str, way: str, own: str) -> Sequence[str]:
    eager, gemm = f"eager-{net}", f"gemm-{net}"
    return (
        _case_label(results, case),
        net,
        way,
        *(_number(results.tokens_per_second(case, one)) for one in (own, eager)),
        _spread(results.ratio(case, f"{eager}/{own}")),
        _spread(results.ratio(case, f"{gemm}/{own}"), "{:.0%}"),
        _spread(results.beyond(case, eager, own, gemm)),
    )


def _against_peers(results: Results, figure: str | None) -> str:
    names = (*OWN, *PEERS)
    lengths = [t for t in LENGTHS if f"prefill-peers-{t}" in results.cases]
    parts = []
    if lengths:
        rows = [
            (
                LABELS[name],
                _parameters(results, f"prefill-peers-{lengths[0]}", name),
                *(_number(results.tokens_per_second(f"prefill-peers-{t}", name)) for t in lengths),
            )
            for name in names
        ]
        parts.append(_table(("prefill, tokens/s", "parameters", *(f"T={t}" for t in lengths)), rows))
        ratios = [
            (f"{LABELS[peer]} / {LABELS[f'ttt-{net}']}",)
            + tuple(_spread(results.ratio(f"prefill-peers-{t}", f"{peer}/ttt-{net}")) for t in lengths)
            for net in INNER_NETS
            for peer in PEERS
        ]
        parts.append(_table(("time of the peer / ours", *(f"T={t}" for t in lengths)), ratios))
        parts += [_crossover(results, net) for net in INNER_NETS]
    if figure:
        parts.append(f"![Prefill speed against length]({figure})")
    for case, title in (("decode-peers", "decode, ms per token"), ("train-peers-512", "train step B=2 T=512, ms")):
        if case in results.cases:
            parts.append(_peer_table(results, case, title))
    return "\n\n".join(parts)


def _peer_table(results: Results, case: str, title: str) -> str:
    scale = 1e3 / results.cases[case]["step"]["tokens"] if case.startswith("decode") else 1e3
    rows = []
    for name, one in results.cases[case]["contenders"].items():
        ratios = ("1" if name == own else _spread(results.ratio(case, f"{name}/{own}")) for own in OWN)
        rows.append((LABELS[name], f"{one['parameters']:,}", f"{scale * one[results.clock]['median']:.2f}", *ratios))
    return _table((title, "parameters", "median", "its time / TTT-Linear's", "its time / TTT-MLP's"), rows)


def _crossover(results: Results, net: str) -> str:
    """Where ours becomes faster than attention, in words."""
    ratios = results.against("llama", net)
    found, label = crossing(ratios), LABELS[f"ttt-{net}"]
    if not ratios:
        return f"{label} was not compared with Llama."
    if found.measured is None:
        text = f"{label} is not faster than Llama at the longest measured length, {max(ratios)} tokens."
    elif found.interpolated is None:
        text = f"{label} is faster than Llama from the shortest measured length on, {found.measured} tokens."
    else:
        text = (
            f"{label} is faster than Llama at {found.measured} tokens and beyond, of the lengths measured; "
            f"interpolated, the two cross at about {found.interpolated:.0f} tokens."
        )
    if {8192, 32768} <= ratios.keys():
        text += f" At 8192 tokens Llama takes {ratios[8192]:.2f}x its time, at 32768 tokens {ratios[32768]:.2f}x."
    return text


def _memory(results: Results) -> str:
    rows = []
    for size, text in (("small", "small with vocabulary 512, B=2 T=1024"), ("125m", "125m layers, B=2 T=512")):
        for net in INNER_NETS:
            case = f"memory-train-{size}-{net}"
            if case in results.cases:
                for way, name in WAYS[:2]:
                    own = name.format(net)
                    peaks = [_spread(results.peak(case, one), "{:.0f}") for one in (own, f"eager-{net}")]
                    ratio = _spread(results.ratio(case, f"eager-{net}/{own}"))
                    rows.append((f"train step, {text}", net, way, *peaks, ratio))
    for net in INNER_NETS:
        case = f"memory-prefill-small-{net}-{MEMORY_TOKENS}"
        if case in results.cases:
            label = f"prefill of {MEMORY_TOKENS:,} tokens in one call, small, logits of the last"
            for way, name in WAYS[:2]:
                peak = _spread(results.peak(case, name.format(net)), "{:.0f}")
                rows.append((label, net, way, peak, NOT_MEASURED, NOT_MEASURED))
    if not rows:
        return "Not measured."
    header = ("step", "inner net", "way", "ours, MiB", "baseline, MiB", "baseline / ours")
    return (
        _table(header, rows)
        + "\n\nAbove what was resident just before the step: weights and inputs were there already and do not count."
    )


def _extras(results: Results) -> str:
    rows = []
    for net in INNER_NETS:
        case = f"extras-small-{net}-2048"
        for way, name in WAYS[:2]:
            own = name.format(net)
            ratios = [results.ratio(case, f"{own}+{option}/{own}") for option in ("plasticity", "stats")]
            if ratios[0]:
                rows.append((net, way, *(_spread(one, "{:.3f}x") for one in ratios), str(ratios[0]["n"])))
    if not rows:
        return "Not measured."
    header = ("prefill 2048, small", "way", "`output_plasticity`", "`output_ttt_stats` (and plasticity)", "rounds")
    return _table(header, rows) + "\n\nTime with it / time with neither."


def _backends(results: Results) -> str:
    rows = []
    for net in INNER_NETS:
        for kind in ("prefill", "train"):
            case = f"backends-{kind}-{net}-128"
            if case in results.cases:
                rows.append(
                    (f"{kind}, two layers, T=128", net, _spread(results.ratio(case, f"reference-{net}/ttt-{net}")))
                )
    if not rows:
        return "Not measured."
    return _table(("step", "inner net", "`reference` / ours"), rows)


def draw_speed(results: Results, path: Path) -> bool:
    """Tokens per second in prefill against the length, both axes logarithmic; False if there is too little to draw."""
    lengths = [t for t in LENGTHS if f"prefill-peers-{t}" in results.cases]
    if len(lengths) < 2:
        return False
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.ticker import FuncFormatter, NullFormatter

    figure, axes = pyplot.subplots(figsize=(7, 4.2), dpi=150, layout="constrained")
    for name, marker, line in zip((*OWN, *PEERS), "osD^v", ("-", "-", "--", "--", "--"), strict=True):
        speeds = [results.tokens_per_second(f"prefill-peers-{t}", name) for t in lengths]
        axes.plot(lengths, speeds, line, marker=marker, label=LABELS[name], linewidth=2.2 if name in OWN else 1.5)
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xticks(lengths, [f"{t:,}" for t in lengths])
    low, high = axes.get_ylim()
    axes.set_yticks([t for t in (500, 1000, 2000, 3000, 5000, 7000, 10000, 20000, 50000) if low <= t <= high])
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,.0f}"))
    axes.yaxis.set_minor_formatter(NullFormatter())
    axes.set_xlabel("tokens of the prompt")
    axes.set_ylabel("tokens per second")
    threads = results.environment["threads"]
    axes.set_title(f"Prefill, about 4.5 M parameters, {threads} thread{'s' if threads > 1 else ''}", fontsize=10)
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=5, frameon=False, fontsize=9, columnspacing=1.2)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    figure.savefig(beside, format="png", metadata={"Software": None})
    pyplot.close(figure)
    os.replace(beside, path)
    return True


def _case_label(results: Results, case: str) -> str:
    kind, size = case.split("-")[:2]
    step = results.cases[case]["step"]
    size = {"125m": "125m layers"}.get(size, size)
    return f"{kind}, {size}" if kind == "decode" else f"{kind}, {size}, B={step['batch']} T={step['tokens']}"


def _milliseconds(results: Results, case: str, name: str) -> float | None:
    speed = results.tokens_per_second(case, name)
    return speed and 1e3 / speed


def _parameters(results: Results, case: str, name: str) -> str:
    return f"{results.contender(case, name)['parameters']:,}"


def _number(value: float | None) -> str:
    return NOT_MEASURED if value is None else f"{value:,.0f}"


def _spread(value: dict | None, style: str = "{:.2f}x") -> str:
    """Median and quartiles."""
    if value is None:
        return NOT_MEASURED
    median, low, high = (style.format(value[key]) for key in ("median", "q1", "q3"))
    return median if value["n"] == 1 else f"{median} [{low}, {high}]"


def _table(header: Sequence[str], rows: Rows) -> str:
    lines = [header, ["---"] + ["---:"] * (len(header) - 1), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_suffix(".tmp")
    beside.write_text(text)
    os.replace(beside, path)


if __name__ == "__main__":
    main()
