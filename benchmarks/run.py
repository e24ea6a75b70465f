"""Run the benchmarks of `make bench` and write benchmarks/results/<device>.json: `python -m benchmarks.run --help`.

    python -m benchmarks.run                              # all cases, about 15 minutes on one core
    python -m benchmarks.run --quick                      # short rounds, no long cases, a few minutes
    python -m benchmarks.run --cases 'decode-*' --again   # these anew, the others as they are
    python -m benchmarks.run --resume                     # go on after a stop

The file is written after every case.
"""

import fnmatch
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from benchmarks._harness import ROOT, ResultFile, environment
from benchmarks.cases import Case, MemoryCase, Settings, all_cases

__all__ = ["RESULTS", "RunArguments", "main"]

RESULTS = ROOT / "benchmarks" / "results"
QUICK_SCALE = 0.15


@dataclass
class RunArguments:
    """What to run and where to write it."""

    cases: list[str] = field(default_factory=lambda: ["*"], metadata={"help": "names of cases, * and ? are wildcards"})
    list_cases: bool = field(default=False, metadata={"help": "print the names of the cases and stop"})
    quick: bool = field(default=False, metadata={"help": "short rounds, without the longest cases"})
    resume: bool = field(default=False, metadata={"help": "keep what the file has, measure what it lacks"})
    again: bool = field(default=False, metadata={"help": "keep what the file has, measure the chosen cases anew"})
    device: str = field(default="cpu", metadata={"help": "torch device"})
    threads: int = field(default=1, metadata={"help": "threads of PyTorch"})
    backend: str = field(default="chunked", metadata={"help": "ttt_backend of our models"})
    logits_to_keep: int = field(default=0, metadata={"help": "positions with logits in prefill, 0 for all"})
    scale: float = field(default=1.0, metadata={"help": "factor of the time of every case"})
    output: str | None = field(default=None, metadata={"help": "JSON file, if not benchmarks/results/<device>.json"})


def main(argv: Sequence[str] | None = None) -> Path | None:
    """Run the chosen cases one after another; returns the file of results."""
    (arguments,) = HfArgumentParser(RunArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(
        argv
    )
    cases = choose(arguments.cases, arguments.quick)
    if arguments.list_cases:
        print("\n".join(case.name for case in cases))
        return None
    # The peers say on every start that they run without their CUDA kernels, which the document says once.
    logging.set_verbosity_error()
    torch.set_num_threads(arguments.threads)
    settings = Settings(
        device=arguments.device,
        threads=arguments.threads,
        backend=arguments.backend,
        logits_to_keep=arguments.logits_to_keep,
        scale=arguments.scale * (QUICK_SCALE if arguments.quick else 1),
    )
    name = torch.device(arguments.device).type + ("-quick" if arguments.quick else "")
    path = Path(arguments.output) if arguments.output else RESULTS / f"{name}.json"
    results = ResultFile(
        path,
        environment(arguments.device, arguments.threads),
        {**asdict(settings), "quick": arguments.quick},
        keep=arguments.resume or arguments.again,
    )
    if not arguments.again:
        cases = [case for case in cases if case.name not in results.cases]
    with tqdm(cases, unit="case", file=sys.stderr, dynamic_ncols=True) as bar:
        for case in bar:
            bar.set_description(case.name)
            record = case.measure(settings, lambda number: bar.set_postfix_str(f"round {number + 1}", False))
            results.add(case.name, record)
            bar.write(describe(case.name, record))
    print(f"written to {path}")
    return path


def choose(patterns: Sequence[str], quick: bool) -> list[Case | MemoryCase]:
    """The cases that match one of the patterns; with `quick` without those that take long.

    Raises:
        ValueError: a pattern matches no case.
    """
    cases = all_cases()
    for pattern in patterns:
        if not fnmatch.filter([case.name for case in cases], pattern):
            raise ValueError(f"cases must match one of {[case.name for case in cases]}, got {pattern!r}")
    chosen = [case for case in cases if any(fnmatch.fnmatch(case.name, pattern) for pattern in patterns)]
    return [case for case in chosen if case.quick or not quick]


def describe(name: str, record: dict) -> str:
    """One line on a case: medians of its contenders, then of its ratios."""
    parts = []
    for contender, one in record["contenders"].items():
        value = f"{one['peak_mib']['median']:.0f} MiB" if "peak_mib" in one else f"{1e3 * one['cpu']['median']:.1f} ms"
        parts.append(f"{contender} {value}")
    for pair, clocks in record["ratios"].items():
        parts.append(f"{pair} {next(iter(clocks.values()))['median']:.2f}")
    return f"{name}: " + ", ".join(parts)


if __name__ == "__main__":
    main()
