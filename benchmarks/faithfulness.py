"""Compare estimators of write attribution with knock-outs: `python -m benchmarks.faithfulness --help`.

    python -m benchmarks.faithfulness --model model_cards/ttt-linear-tiny     # 50 answered documents, 20 to 60 minutes
    python -m benchmarks.faithfulness --model model_cards/ttt-linear-tiny     # again: goes on where it stopped
    python -m benchmarks.faithfulness --model model_cards/ttt-linear-tiny --report

With --parts source --tokens 1024 that part is measured on longer documents besides.

Two parts, a line of JSON per needle document in benchmarks/results/faithfulness-<model>.jsonl. "source": where the
highest number of the quick estimators lies, in documents of 256 tokens. "faithfulness": ranks, top-1 and areas under
erase curves against knock-outs recomputed for every token, in documents of 96 tokens. Both look at one digit of each
answer, documents taking the digits in turn.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.stats import binomtest
from tqdm import tqdm
from transformers import HfArgumentParser
from transformers.utils import logging

from benchmarks._harness import ROOT
from interp.faithfulness import ESTIMATORS, TRUTH, agreement, knockout_effects, normalised_aucs
from interp.loading import load
from interp.needle import NeedleOptions, needle_documents
from interp.needle_question import NeedleQuestion, needle_question

__all__ = ["PARTS", "FaithfulnessArguments", "main", "measure", "report"]

PARTS = ("source", "faithfulness")
QUICK = ("direct logit attribution", "gate gradient", "size of A", "size of share", "embedding gradient x input")
LENGTHS = {"source": 256, "faithfulness": 96}
DEPTHS = (0.0, 0.25, 0.5, 0.75, 1.0)


@dataclass
class FaithfulnessArguments:
    """Which model, how many documents, and where the results lie."""

    model: str = field(metadata={"help": "folder or Hub id of a TTT model that answers needle documents"})
    parts: list[str] = field(default_factory=lambda: list(PARTS), metadata={"help": f"some of {PARTS}"})
    documents: int = field(default=50, metadata={"help": "answered documents per part"})
    tokens: int | None = field(default=None, metadata={"help": f"tokens of a document, if not those of {LENGTHS}"})
    value_length: int = field(default=4, metadata={"help": "hexadecimal digits of the value"})
    seed: int = field(default=0, metadata={"help": "seed of the documents"})
    threads: int = field(default=1, metadata={"help": "threads of PyTorch"})
    report: bool = field(default=False, metadata={"help": "measure nothing, print the tables of the file"})
    output: str | None = field(default=None, metadata={"help": "file, if not benchmarks/results/faithfulness-*.jsonl"})


def main(argv: Sequence[str] | None = None) -> Path:
    """Measure what the file lacks and print its tables; returns the file."""
    parser = HfArgumentParser(FaithfulnessArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    name = Path(arguments.model).name
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"faithfulness-{name}.jsonl")
    if not arguments.report:
        logging.disable_progress_bar()
        torch.set_num_threads(arguments.threads)
        model, tokenizer = load(arguments.model)
        for part in arguments.parts:
            _measure_part(part, model, tokenizer, path, arguments)
    print(report(_read(path)))
    return path


def _measure_part(part: str, model: Any, tokenizer: Any, path: Path, arguments: FaithfulnessArguments) -> None:
    if part not in PARTS:
        raise ValueError(f"parts must be some of {PARTS}, got {part!r}")
    settings = {"part": part, "value_length": arguments.value_length, "seed": arguments.seed}
    settings["tokens"] = LENGTHS[part] if arguments.tokens is None else arguments.tokens
    done = [row for row in _read(path) if all(row[key] == value for key, value in settings.items())]
    answered, seen = sum(row["answered"] for row in done), {row["document"] for row in done}
    with tqdm(total=arguments.documents, initial=answered, desc=part, unit="document", file=sys.stderr) as bar:
        for index, question in _questions(tokenizer, settings):
            if answered >= arguments.documents:
                break
            if index in seen:
                continue
            row = settings | {"document": index, "answered": all(question.answered(model))}
            if row["answered"]:
                row |= measure(part, model, question, index)
                answered += 1
                bar.update()
            _append(path, row)


def _questions(tokenizer: Any, settings: dict[str, Any]) -> Iterator[tuple[int, NeedleQuestion]]:
    options = NeedleOptions(depths=DEPTHS, filler="text", value_length=settings["value_length"])
    limit = {"seq_length": settings["tokens"], "seed": settings["seed"], "options": options}
    for index, document in zip(count(), needle_documents(tokenizer, max_documents=10**9, **limit), strict=False):
        yield index, needle_question(document, tokenizer)


def measure(part: str, model: Any, question: NeedleQuestion, index: int) -> dict[str, Any]:
    """What is kept of one answered document."""
    ids, digit = question.input_ids, index % len(question.source)
    target, source = question.target(digit), question.source[digit]
    if part == "source":
        tops = {name: int(ESTIMATORS[name](model, ids, target).argmax()) - source for name in QUICK}
        return {"digit": digit, "offsets": tops}
    truth = knockout_effects(model, ids, target)
    scores = {name: estimate(model, ids, target) for name, estimate in ESTIMATORS.items()} | {TRUTH: truth}
    compared = {name: asdict(agreement(s, truth, target.position, [source])) for name, s in scores.items()}
    areas = normalised_aucs(model, ids, scores, target, seed=index)
    return {"digit": digit, "agreement": compared, "areas": areas}


def report(rows: list[dict[str, Any]]) -> str:
    """The tables of a file of results, in Markdown."""
    groups: dict[tuple, list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault(tuple(row[key] for key in ("part", "tokens", "value_length", "seed")), []).append(row)
    found = []
    for (part, tokens, digits, _), group in groups.items():
        answered = [row for row in group if row["answered"]]
        if answered:
            table = (_source_table if part == "source" else _faithfulness_table)(answered)
            head = f"{len(answered)} answered of {len(group)} documents, {tokens} tokens, {digits} digits"
            found.append(f"{part}: {head}\n\n{table}")
    return "\n\n".join(found)


def _source_table(rows: list[dict[str, Any]]) -> str:
    lines = ["| highest number | on the digit or the token behind it | on the digit itself |", "|---|---|---|"]
    for name in QUICK:
        near, own = (_share([row["offsets"][name] in places for row in rows]) for places in ((0, 1), (0,)))
        lines.append(f"| {name} | {near} | {own} |")
    return "\n".join(lines)


def _faithfulness_table(rows: list[dict[str, Any]]) -> str:
    names = list(rows[0]["agreement"])
    lines = [
        "| estimator | Spearman | Pearson | top-1 on the digit | top-1 as knock-out | deletion | insertion |",
        "|---|---|---|---|---|---|---|",
    ]
    for name in names:
        rank, linear = (_mean([row["agreement"][name][key] for row in rows]) for key in ("rank", "linear"))
        found, same = (_share([row["agreement"][name][key] for row in rows]) for key in ("found", "same_top"))
        deletion, insertion = (_mean([row["areas"][name][kind] for row in rows]) for kind in ("deletion", "insertion"))
        lines.append(f"| {name} | {rank} | {linear} | {found} | {same} | {deletion} | {insertion} |")
    bands = [_band([v for row in rows for v in row["areas"]["random"][kind]]) for kind in ("deletion", "insertion")]
    lines.append(f"| random order (middle 95 % of orders) | | | | | {bands[0]} | {bands[1]} |")
    return "\n".join(lines)


def _share(values: Sequence[bool]) -> str:
    """k of n and Wilson's 95% interval."""
    low, high = binomtest(sum(values), len(values)).proportion_ci(method="wilson")
    return f"{sum(values)} of {len(values)} [{low:.2f}, {high:.2f}]"


def _mean(values: Sequence[float]) -> str:
    """Mean and 95% bootstrap interval over documents."""
    values = np.asarray(values)
    draws = np.random.default_rng(0).choice(values, (2000, len(values))).mean(1)
    low, high = np.quantile(draws, [0.025, 0.975])
    return f"{values.mean():.2f} [{low:.2f}, {high:.2f}]"


def _band(values: Sequence[float]) -> str:
    low, middle, high = np.quantile(values, [0.025, 0.5, 0.975])
    return f"{middle:.2f} [{low:.2f}, {high:.2f}]"


def _append(path: Path, row: dict[str, Any]) -> None:
    """Add a row, on a line of its own also behind one that was cut short."""
    with path.open("a+b") as file:
        if file.tell():
            file.seek(-1, 2)
            file.write(b"" if file.read(1) == b"\n" else b"\n")
        file.write(json.dumps(row).encode() + b"\n")


def _read(path: Path) -> list[dict[str, Any]]:
    """Rows of a file, without lines that were cut short."""
    if not path.exists():
        return []
    rows = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            continue
    return rows


if __name__ == "__main__":
    main()
