"""What all benchmarks share: interleaved timing, ratios per round, the environment, and files of results.

Several contenders run in turn, round after round, each round starting with another one. A busy machine slows all of
a round alike, so what counts is the ratio within a round; a result is the median over rounds with its quartiles. CPU
time of the process and wall time are both kept; with one thread on a CPU the ratio of CPU times is the one to read.
"""

import hashlib
import json
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import transformers

import modeling_ttt

__all__ = ["Contender", "ResultFile", "Rounds", "environment", "interleave", "ratio", "summary"]

SCHEMA = 1
ROOT = Path(__file__).resolve().parents[1]


@dataclass
class Contender:
    """One side of a comparison: `run(prepare())` is a measurement of `tokens` tokens, of which only `run` is timed."""

    name: str
    run: Callable[[Any], Any]
    prepare: Callable[[], Any] = lambda: None
    tokens: int = 1
    parameters: int | None = None


@dataclass
class Rounds:
    """Seconds of every round of one contender, by clock."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


def interleave(
    contenders: Sequence[Contender],
    seconds: float,
    min_rounds: int,
    max_rounds: int = 1000,
    warm_up: int = 1,
    device: torch.device | str = "cpu",
    on_round: Callable[[int], None] = lambda number: None,
) -> dict[str, Rounds]:
    """Time the contenders in turn until `seconds` have gone by and `min_rounds` are full.

    Round r starts with contender r modulo their number, so that none always runs after the same neighbour or first.
    The warm-up rounds are not counted, neither in the results nor in the seconds.

    Raises:
        ValueError: two contenders have one name, or the numbers of rounds do not fit.
    """
    names = [contender.name for contender in contenders]
    if len(set(names)) != len(names):
        raise ValueError(f"contenders must have names of their own, got {names}")
    if not 1 <= min_rounds <= max_rounds:
        raise ValueError(f"min_rounds must lie in 1..max_rounds, got {min_rounds} and {max_rounds}")
    rounds = {name: Rounds() for name in names}
    start = time.perf_counter()
    for number in range(-warm_up, max_rounds):
        if number == 0:
            start = time.perf_counter()
        if number >= min_rounds and time.perf_counter() - start >= seconds:
            break
        first = number % len(contenders)
        for contender in [*contenders[first:], *contenders[:first]]:
            cpu, wall = _time_once(contender, torch.device(device))
            if number >= 0:
                rounds[contender.name].cpu.append(cpu)
                rounds[contender.name].wall.append(wall)
        on_round(number)
    return rounds


def _time_once(contender: Contender, device: torch.device) -> tuple[float, float]:
    """CPU seconds of the process (all threads) and wall seconds of one run."""
    prepared = contender.prepare()
    _synchronize(device)
    wall, cpu = time.perf_counter(), time.process_time()
    result = contender.run(prepared)
    _synchronize(device)
    cpu, wall = time.process_time() - cpu, time.perf_counter() - wall
    del result  # its memory is given back outside the timing, for every contender alike
    return cpu, wall


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def summary(values: Sequence[float]) -> dict[str, float]:
    """Median, lower and upper quartile, number."""
    ordered = sorted(values)
    quartiles = statistics.quantiles(ordered, n=4, method="inclusive") if len(ordered) > 1 else [ordered[0]] * 3
    return {"median": quartiles[1], "q1": quartiles[0], "q3": quartiles[2], "n": len(ordered)}


def ratio(numerator: Sequence[float], denominator: Sequence[float]) -> dict[str, float]:
    """Summary of the ratios round by round; above 1 the denominator was faster."""
    return summary([a / b for a, b in zip(numerator, denominator, strict=True)])


def environment(device: str, threads: int) -> dict[str, Any]:
    """What the numbers depend on, without anything that names the machine."""
    is_cuda = torch.device(device).type == "cuda"
    return {
        "device": torch.cuda.get_device_name(device) if is_cuda else "cpu",
        "cpu": _cpu_model(),
        "cores": os.cpu_count(),
        "threads": threads,
        # With several threads CPU time counts them all, and on a GPU it counts only the launches.
        "clock": "wall" if is_cuda or threads > 1 else "cpu",
        "revision": _revision(),
        "code": _code(),
        "versions": {
            "modeling_ttt": modeling_ttt.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor() or platform.machine()
    names = [line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def _revision() -> str | None:
    """Commit the files are based on; None outside a repository."""
    words = ["git", "rev-parse", "--short=12", "HEAD"]
    try:
        return subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None


def _code() -> str:
    """Digest of the library as it is on disk, committed or not."""
    digest = hashlib.sha256()
    sources = (path for path in Path(modeling_ttt.__file__).parent.iterdir() if path.suffix in (".py", ".cpp", ".h"))
    for path in sorted(sources):
        digest.update(path.read_bytes())
    return digest.hexdigest()[:12]


def _flat(head: dict[str, Any]) -> dict[str, Any]:
    """What must agree for two results to compare; a commit that leaves the code as it is changes no number."""
    return {
        f"{part} {key}": value
        for part in ("environment", "settings")
        for key, value in head[part].items()
        if key != "revision"
    }


class ResultFile:
    """A JSON file of results, `{"schema", "environment", "settings", "cases": {name: record}}`.

    It is written anew after every case, beside and renamed, so that an interrupted run loses one case at most.
    """

    def __init__(self, path: Path, environment: dict[str, Any], settings: dict[str, Any], keep: bool):
        """Start a file, or with `keep` go on with the one at `path`.

        Raises:
            ValueError: the file to go on with was measured elsewhere or otherwise, so that its numbers do not compare.
        """
        self.path = path
        head = {"schema": SCHEMA, "environment": environment, "settings": settings}
        self.cases: dict[str, dict] = {}
        if keep and path.exists():
            known = self.read(path)
            self.cases = known.pop("cases")
            there, here = _flat(known), _flat(head)
            different = [key for key in here | there if there.get(key) != here.get(key)]
            if different:
                raise ValueError(
                    f"cannot add to {path.name}, which was measured otherwise: "
                    + ", ".join(f"{key} {there.get(key)!r} there and {here.get(key)!r} here" for key in different)
                )
        self.head = head

    @staticmethod
    def read(path: Path) -> dict[str, Any]:
        """The content of a file.

        Raises:
            ValueError: it is of another schema.
        """
        content = json.loads(path.read_text())
        if content.get("schema") != SCHEMA:
            raise ValueError(f"{path.name} must have schema {SCHEMA}, got {content.get('schema')!r}")
        return content

    def add(self, name: str, record: dict[str, Any]) -> None:
        """Keep the record of a case and write the file."""
        self.cases[name] = record
        self.path.parent.mkdir(parents=True, exist_ok=True)
        beside = self.path.with_suffix(".tmp")
        beside.write_text(json.dumps(self.head | {"cases": self.cases}, indent=1) + "\n")
        os.replace(beside, self.path)
