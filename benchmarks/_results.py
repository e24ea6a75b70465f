"""Reading a file of results: medians, ratios, the crossover with attention, and the targets of the library."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from benchmarks._harness import ResultFile, summary
from benchmarks.cases import LENGTHS, MEMORY_TOKENS

__all__ = ["TARGETS", "Crossing", "Results", "Target", "crossing"]

MIB_PER_GB = 1e9 / 2**20


class Results:
    """A file of results. What was not measured is None."""

    def __init__(self, path: Path):
        content = ResultFile.read(path)
        self.environment, self.settings, self.cases = (content[key] for key in ("environment", "settings", "cases"))
        self.clock = self.environment["clock"]

    def ratio(self, case: str, pair: str) -> dict | None:
        """Summary of the ratio "a/b" of a case: of times by the clock that counts here, or of peaks of memory."""
        clocks = self.cases.get(case, {}).get("ratios", {}).get(pair)
        return clocks and clocks.get("peak_mib", clocks.get(self.clock))

    def beyond(self, case: str, slower: str, ours: str, limit: str) -> dict | None:
        """Summary of (slower - limit) / (ours - limit) round by round: what is left when both are rid of the limit."""
        found = [self.contender(case, name) for name in (slower, ours, limit)]
        if None in found:
            return None
        rounds = zip(*(one["seconds"][self.clock] for one in found), strict=True)
        ratios = [(a - c) / (b - c) for a, b, c in rounds if b > c]
        return summary(ratios) if ratios else None

    def contender(self, case: str, name: str) -> dict | None:
        return self.cases.get(case, {}).get("contenders", {}).get(name)

    def seconds(self, case: str, name: str) -> dict | None:
        """Summary of the seconds of a round."""
        one = self.contender(case, name)
        return one and one[self.clock]

    def tokens_per_second(self, case: str, name: str) -> float | None:
        one = self.contender(case, name)
        return one and one["tokens"] / one[self.clock]["median"]

    def peak(self, case: str, name: str) -> dict | None:
        """Summary of the peak memory in MiB."""
        one = self.contender(case, name)
        return one and one["peak_mib"]

    def against(self, peer: str, net: str) -> dict[int, float]:
        """Time of a peer / our time in prefill, by number of tokens."""
        ratios = {t: self.ratio(f"prefill-peers-{t}", f"{peer}/ttt-{net}") for t in LENGTHS}
        return {tokens: one["median"] for tokens, one in ratios.items() if one}


@dataclass(frozen=True)
class Crossing:
    """`measured`: the smallest measured length from which on every ratio is above 1; None if there is none.

    `interpolated`: where the line through its neighbours in log(length), log(ratio) passes 1; None if the shortest
    length is already beyond.
    """

    measured: int | None
    interpolated: float | None


def crossing(ratios: dict[int, float]) -> Crossing:
    """Where ratios, by length, pass 1 for good."""
    lengths = sorted(ratios)
    beyond = [t for t in lengths if all(ratios[u] > 1 for u in lengths if u >= t)]
    if not beyond or beyond[0] == lengths[0]:
        return Crossing(beyond[0] if beyond else None, None)
    after, before = beyond[0], lengths[lengths.index(beyond[0]) - 1]
    low, high = math.log(ratios[before]), math.log(ratios[after])
    share = -low / (high - low)
    return Crossing(after, math.exp(math.log(before) + share * math.log(after / before)))


@dataclass(frozen=True)
class Target:
    """A number of the results and its bound: at least `bound`, or with `at_most` no more than that."""

    text: str
    value: Callable[[Results], dict | None]
    bound: float
    stretch: float | None = None
    at_most: bool = False
    style: str = "{:.2f}x"

    def verdict(self, results: Results) -> str:
        """In a word how the median stands to the bound."""
        value = self.value(results)
        if value is None:
            return "not measured"
        sign = -1 if self.at_most else 1
        if self.stretch is not None and sign * (value["median"] - self.stretch) >= 0:
            return "yes, stretch too"
        return "yes" if sign * (value["median"] - self.bound) >= 0 else "no"


def _ratio(case: str, pair: str) -> Callable[[Results], dict | None]:
    return lambda results: results.ratio(case, pair)


def _baseline(case: str, net: str, ours: str = "native-{}") -> Callable[[Results], dict | None]:
    return _ratio(case, f"eager-{net}/{ours.format(net)}")


def _share(case: str, net: str) -> Callable[[Results], dict | None]:
    return _ratio(case, f"gemm-{net}/native-{net}")


def _growth(results: Results) -> dict | None:
    """The factor over Llama at the greatest length / the factor at 8k, of medians, so without a spread."""
    ratios = results.against("llama", "linear")
    if not {8192, 32768} <= ratios.keys():
        return None
    growth = ratios[32768] / ratios[8192]
    return {"median": growth, "q1": growth, "q3": growth, "n": 1}


def _train_targets() -> list[Target]:
    bounds: Sequence[tuple[str, float]] = (("linear", 1.5), ("mlp", 1.4))
    return [
        Target(
            f"train step, small, {net}, B=2 T={t}: baseline / native", _baseline(f"train-small-{net}-{t}", net), b, 2
        )
        for net, b in bounds
        for t in (512, 1024)
    ]


def _memory_target(net: str) -> Target:
    case = f"memory-prefill-small-{net}-{MEMORY_TOKENS}"
    text = f"prefill of {MEMORY_TOKENS:,} tokens in one call, small, {net}: peak above the weights"
    return Target(text, lambda results: results.peak(case, f"ttt-{net}"), MIB_PER_GB, None, True, "{:.0f} MiB")


def _decode_target(net: str) -> Target:
    value = _baseline(f"decode-small-{net}", net, "ttt-{}+compiled")
    return Target(f"decode, small, {net}: baseline / compiled", value, 2.2, 4)


def _plasticity_target(backend: str, net: str) -> Target:
    own = f"{'ttt' if backend == 'chunked' else backend}-{net}"
    value = _ratio(f"extras-small-{net}-2048", f"{own}+plasticity/{own}")
    text = f"prefill 2048, small, {net}, {backend}: with plasticity / without"
    return Target(text, value, 1.03, None, True, "{:.3f}x")


TARGETS = [
    Target(
        "prefill 2048, small, linear: baseline / native", _baseline("prefill-small-linear-2048", "linear"), 1.6, 2.1
    ),
    Target("prefill 2048, small, mlp: baseline / native", _baseline("prefill-small-mlp-2048", "mlp"), 1.7, 2.0),
    *(_decode_target(net) for net in ("linear", "mlp")),
    *_train_targets(),
    Target(
        "train step, small with vocabulary 512, mlp, B=2 T=1024: peak memory, baseline / ours",
        _baseline("memory-train-small-mlp", "mlp", "ttt-{}"),
        3.5,
    ),
    Target(
        "prefill 2048, small, linear, native: share of the GEMM-only limit",
        _share("prefill-small-linear-2048", "linear"),
        0.6,
        style="{:.0%}",
    ),
    Target(
        "prefill 2048, 125m layers, linear, native: share of the GEMM-only limit",
        _share("prefill-125m-linear-2048", "linear"),
        0.65,
        0.8,
        style="{:.0%}",
    ),
    Target("prefill 8192, linear: Llama / ours", _ratio("prefill-peers-8192", "llama/ttt-linear"), 1),
    Target("the same ratio at 32768 tokens / at 8192", _growth, 1),
    *(_plasticity_target(backend, net) for backend in ("chunked", "native") for net in ("linear", "mlp")),
    *(_memory_target(net) for net in ("linear", "mlp")),
]
"""What the library promises."""
