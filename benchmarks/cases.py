"""The cases of `make bench`: which contenders run which step, which ratios are taken, and how long it may last."""

from collections.abc import Callable
from dataclasses import asdict, dataclass

from benchmarks._harness import interleave, ratio, summary
from benchmarks.models import build_model
from benchmarks.peak_memory import MemoryArguments, measure_in_new_process
from benchmarks.steps import Step, contender

__all__ = ["INNER_NETS", "LENGTHS", "MEMORY_TOKENS", "PEERS", "Case", "MemoryCase", "Settings", "all_cases"]

INNER_NETS = ("linear", "mlp")
LENGTHS = (512, 2048, 8192, 32768)
TRAIN_LENGTHS = (512, 1024)
PEERS = ("llama", "mamba2", "gdn")
DECODED = 16
"""Tokens per round of decoding: one mini-batch, so that every round holds one commit."""
MEMORY_TOKENS = 131072

Pair = tuple[str, str]


@dataclass(frozen=True)
class Settings:
    """What holds for all cases of a run; `scale` multiplies the time of every case."""

    device: str = "cpu"
    threads: int = 1
    backend: str = "chunked"
    logits_to_keep: int = 0
    scale: float = 1.0


@dataclass(frozen=True)
class Case:
    """Contenders timed in turn; a pair (a, b) is reported as time of a / time of b."""

    name: str
    size: str
    step: Step
    contenders: tuple[str, ...]
    pairs: tuple[Pair, ...]
    seconds: float
    min_rounds: int = 5
    quick: bool = True

    def measure(self, settings: Settings, on_round: Callable[[int], None] = lambda number: None) -> dict:
        """Time all contenders; the record for the file of results."""
        models = {}
        for name in self.contenders:
            base = name.partition("+")[0]
            models[base] = models.get(base) or build_model(base, self.size, settings.backend, settings.device)
        step = _with_logits(self.step, settings)
        contenders = [contender(name, models[name.partition("+")[0]], step) for name in self.contenders]
        rounds = interleave(
            contenders,
            seconds=self.seconds * settings.scale,
            min_rounds=self.min_rounds if settings.scale >= 1 else min(self.min_rounds, 2),
            # A warm-up of the longest steps would take as long as what is measured.
            warm_up=0 if step.tokens > 8192 else 1,
            device=settings.device,
            on_round=on_round,
        )
        return {
            "size": self.size,
            "step": asdict(step),
            "contenders": {
                c.name: {
                    "parameters": c.parameters,
                    "tokens": c.tokens,
                    **{clock: summary(getattr(rounds[c.name], clock)) for clock in ("cpu", "wall")},
                    "seconds": {k: [round(s, 7) for s in v] for k, v in asdict(rounds[c.name]).items()},
                }
                for c in contenders
            },
            "ratios": {
                f"{a}/{b}": {c: ratio(getattr(rounds[a], c), getattr(rounds[b], c)) for c in ("cpu", "wall")}
                for a, b in self.pairs
            },
        }


@dataclass(frozen=True)
class MemoryCase:
    """Peak memory of a step, each measurement in a new process; a pair (a, b) is reported as peak of a / peak of b."""

    name: str
    size: str
    step: Step
    contenders: tuple[str, ...]
    pairs: tuple[Pair, ...] = ()
    repeats: int = 1
    quick: bool = True
    seconds: float = 0.0

    def measure(self, settings: Settings, on_round: Callable[[int], None] = lambda number: None) -> dict:
        """Measure all contenders in turn; the record for the file of results."""
        measured: dict[str, list[dict]] = {name: [] for name in self.contenders}
        for number in range(self.repeats):
            for name in self.contenders:
                common = {key: getattr(settings, key) for key in ("backend", "device", "threads")}
                arguments = MemoryArguments(name, self.size, **asdict(self.step), **common)
                measured[name].append(measure_in_new_process(arguments))
            on_round(number)
        peaks = {name: [one["peak_mib"] for one in several] for name, several in measured.items()}
        return {
            "size": self.size,
            "step": asdict(self.step),
            "contenders": {
                name: {
                    **{key: several[0][key] for key in ("parameters", "weights_mib", "method")},
                    "tokens": self.step.batch * self.step.tokens,
                    "peak_mib": summary(peaks[name]),
                }
                for name, several in measured.items()
            },
            "ratios": {f"{a}/{b}": {"peak_mib": ratio(peaks[a], peaks[b])} for a, b in self.pairs},
        }


def _with_logits(step: Step, settings: Settings) -> Step:
    return Step(step.kind, step.batch, step.tokens, settings.logits_to_keep)


def all_cases() -> list[Case | MemoryCase]:
    """Every case, the shortest of a kind first."""
    return [*_prefill(), *_decode(), *_train(), *_memory(), *_extras(), *_backends()]


def _own(net: str) -> str:
    return f"ttt-{net}"


def _prefill() -> list[Case]:
    """Against the baseline and the limit set by the matrix products, and apart from that against the peers."""
    cases = []
    own_seconds = dict(zip(LENGTHS, (10, 20, 25, 30), strict=True))
    peer_seconds = dict(zip(LENGTHS, (10, 20, 30, 60), strict=True))
    for tokens in LENGTHS:
        step, few, quick = Step("prefill", 1, tokens), 2 if tokens > 8192 else 3, tokens <= 8192
        for net in INNER_NETS:
            names, pairs = _against_baseline(net)
            name = f"prefill-small-{net}-{tokens}"
            cases.append(Case(name, "small", step, names, pairs, own_seconds[tokens], few, quick))
        names, pairs = _against_peers(PEERS)
        cases.append(Case(f"prefill-peers-{tokens}", "small", step, names, pairs, peer_seconds[tokens], few, quick))
    for net in INNER_NETS:
        names, pairs = _against_baseline(net)
        cases.append(Case(f"prefill-125m-{net}-2048", "125m-layers", Step("prefill", 1, 2048), names, pairs, 15))
    return cases


def _decode() -> list[Case]:
    step = Step("decode", 1, DECODED)
    cases = []
    for net in INNER_NETS:
        names, pairs = _against_baseline(net)
        compiled = f"{_own(net)}+compiled"
        # Inside a mini-batch, where decoding is, `native` does what `chunked` does.
        names = (*(name for name in names if not name.startswith("native")), compiled)
        pairs = (*(pair for pair in pairs if not pair[1].startswith("native")), (f"eager-{net}", compiled))
        cases.append(Case(f"decode-small-{net}", "small", step, names, pairs, 10, 10))
    names, pairs = _against_peers(("llama", "mamba2", "gdn-hybrid"))
    return [*cases, Case("decode-peers", "small", step, names, pairs, 12, 10)]


def _train() -> list[Case]:
    cases = []
    for net in INNER_NETS:
        names, pairs = _against_baseline(net)
        for tokens in TRAIN_LENGTHS:
            step = Step("train", 2, tokens)
            cases.append(Case(f"train-small-{net}-{tokens}", "small", step, names, pairs, 12))
        cases.append(Case(f"train-125m-{net}-512", "125m-layers", Step("train", 2, 512), names, pairs, 12))
    names, pairs = _against_peers(PEERS)
    return [*cases, Case("train-peers-512", "small", Step("train", 2, 512), names, pairs, 15)]


def _memory() -> list[MemoryCase]:
    cases = []
    for net in INNER_NETS:
        names, pairs = _against_baseline(net, limit=False)
        small, wide = Step("train", 2, 1024), Step("train", 2, 512)
        cases.append(MemoryCase(f"memory-train-small-{net}", "small-v512", small, names, pairs, repeats=2))
        cases.append(MemoryCase(f"memory-train-125m-{net}", "125m-layers", wide, names, pairs, quick=False))
        step = Step("prefill", 1, MEMORY_TOKENS, logits_to_keep=1)
        name = f"memory-prefill-small-{net}-{MEMORY_TOKENS}"
        cases.append(MemoryCase(name, "small", step, (_own(net), f"native-{net}"), quick=False))
    return cases


def _extras() -> list[Case]:
    """What plasticity and the diagnostics add. Small differences: the rounds are short and many."""
    cases = []
    for net in INNER_NETS:
        own = _own(net)
        names = (own, f"{own}+plasticity", f"{own}+stats")
        pairs = tuple((name, own) for name in names[1:])
        native = f"native-{net}"
        names, pairs = (*names, native, f"{native}+plasticity"), (*pairs, (f"{native}+plasticity", native))
        cases.append(Case(f"extras-small-{net}-2048", "small", Step("prefill", 1, 2048), names, pairs, 25, 10))
    return cases


def _backends() -> list[Case]:
    """The dual form against the paper's token-by-token form, which is there to be right and not to be fast."""
    cases = []
    for net in INNER_NETS:
        names = (f"reference-{net}", _own(net))
        for kind in ("prefill", "train"):
            name = f"backends-{kind}-{net}-128"
            cases.append(Case(name, "two-layers", Step(kind, 1, 128), names, (names,), 3, 3))
    return cases


def _against_baseline(net: str, limit: bool = True) -> tuple[tuple[str, ...], tuple[Pair, ...]]:
    own, native, eager, gemm = _own(net), f"native-{net}", f"eager-{net}", f"gemm-{net}"
    names, pairs = (own, native, eager), ((eager, own), (eager, native))
    return (names + (gemm,), pairs + ((gemm, own), (gemm, native))) if limit else (names, pairs)


def _against_peers(peers: tuple[str, ...]) -> tuple[tuple[str, ...], tuple[Pair, ...]]:
    own = tuple(_own(net) for net in INNER_NETS)
    return own + peers, tuple((peer, name) for name in own for peer in peers)
