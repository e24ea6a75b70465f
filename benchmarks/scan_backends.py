"""Time the scan backends of the inner loop against each other: `python benchmarks/scan_backends.py --help`."""

import json
import os
import platform
import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
import transformers
from transformers import HfArgumentParser

import modeling_ttt
from modeling_ttt import TTTConfig, TTTForCausalLM

BASELINE = "reference"
RESULTS = Path(__file__).resolve().parent / "results"


@dataclass
class Arguments:
    """What to time. Every number is a median over `repeats` rounds, in each of which all backends run once in turn."""

    backends: list[str] = field(default_factory=lambda: [BASELINE, "chunked"], metadata={"help": "backends to time"})
    layer_types: list[str] = field(default_factory=lambda: ["linear", "mlp"], metadata={"help": "inner nets"})
    hidden_size: int = field(default=256, metadata={"help": "model width C"})
    num_hidden_layers: int = field(default=2, metadata={"help": "layers"})
    num_attention_heads: int = field(default=4, metadata={"help": "heads H"})
    mini_batch_size: int = field(default=16, metadata={"help": "mini-batch size K in tokens"})
    tokens: int = field(default=128, metadata={"help": "tokens T per row"})
    batch_size: int = field(default=1, metadata={"help": "rows B"})
    repeats: int = field(default=20, metadata={"help": "rounds after the warm-up"})
    warm_up: int = field(default=2, metadata={"help": "rounds not counted"})
    device: str = field(default="cuda" if torch.cuda.is_available() else "cpu", metadata={"help": "torch device"})
    dtype: str = field(default="float32", metadata={"help": "dtype of the parameters"})
    output: str | None = field(
        default=None, metadata={"help": "JSON file, if not benchmarks/results/scan_backends-<device>.json"}
    )


def main(argv: list[str] | None = None) -> Path:
    """Time, print a table, write the numbers."""
    (args,) = HfArgumentParser(Arguments, description=__doc__).parse_args_into_dataclasses(argv)
    rows = []
    print(f"{'inner net':<10}{'step':<9}{'backend':<11}{'ms':>9}{'tokens/s':>11}{'speed-up':>10}")
    for layer_type in args.layer_types:
        models = {backend: build_model(args, layer_type, backend) for backend in args.backends}
        for name, step in (("prefill", prefill), ("train", train_step)):
            seconds = time_in_turn({backend: bind(step, model, args) for backend, model in models.items()}, args)
            for backend, measured in seconds.items():
                row = describe(layer_type, name, backend, measured, seconds.get(BASELINE), args)
                rows.append(row)
                ratio = "" if row["speed_up"] is None else f"{row['speed_up']:.2f}"
                print(
                    f"{layer_type:<10}{name:<9}{backend:<11}{1e3 * row['median_seconds']:>9.1f}"
                    f"{row['tokens_per_second']:>11.0f}{ratio:>10}"
                )
    return write(args, rows)


def build_model(args: Arguments, layer_type: str, backend: str) -> TTTForCausalLM:
    """A model with the same weights for every backend."""
    torch.manual_seed(0)
    config = TTTConfig(
        vocab_size=1024,
        hidden_size=args.hidden_size,
        intermediate_size=8 * args.hidden_size // 3 // 16 * 16,
        num_hidden_layers=args.num_hidden_layers,
        num_attention_heads=args.num_attention_heads,
        mini_batch_size=args.mini_batch_size,
        ttt_layer_type=layer_type,
        ttt_backend=backend,
    )
    return TTTForCausalLM(config).to(args.device, getattr(torch, args.dtype))


def bind(step: Callable, model: TTTForCausalLM, args: Arguments) -> Callable[[], None]:
    """The step on one batch of random tokens, as a call without arguments that returns when the device is done."""
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (args.batch_size, args.tokens), generator=generator).to(args.device)

    def run() -> None:
        step(model, ids)
        if ids.is_cuda:
            torch.cuda.synchronize()

    return run


@torch.no_grad()
def prefill(model: TTTForCausalLM, ids: torch.Tensor) -> None:
    """Read a prompt into a cache, plasticity included."""
    model.eval()(ids, use_cache=True, logits_to_keep=1)


def train_step(model: TTTForCausalLM, ids: torch.Tensor) -> None:
    """Forward and backward of the language-model loss, without the optimizer."""
    model.zero_grad()
    model.train()(ids, labels=ids, use_cache=False, output_plasticity=False).loss.backward()


def time_in_turn(runs: dict[str, Callable[[], None]], args: Arguments) -> dict[str, list[float]]:
    """Seconds of each run, round by round, so that a busy machine slows all of them alike."""
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for number in range(args.warm_up + args.repeats):
        for name, run in runs.items():
            start = time.perf_counter()
            run()
            if number >= args.warm_up:
                seconds[name].append(time.perf_counter() - start)
    return seconds


def describe(layer_type, step, backend, measured: list[float], baseline: list[float] | None, args: Arguments) -> dict:
    """One row of the results; `speed_up` is the median over rounds of baseline time / own time."""
    median = statistics.median(measured)
    quartiles = statistics.quantiles(measured, n=4) if len(measured) > 1 else [median] * 3
    pairs = zip(baseline or [], measured, strict=baseline is not None)
    return {
        "layer_type": layer_type,
        "step": step,
        "backend": backend,
        "median_seconds": median,
        "quartiles_seconds": [quartiles[0], quartiles[2]],
        "tokens_per_second": args.batch_size * args.tokens / median,
        "speed_up": statistics.median(b / m for b, m in pairs) if baseline else None,
    }


def write(args: Arguments, rows: list[dict]) -> Path:
    """Write the rows with what they were measured on; returns the file."""
    device = torch.device(args.device)
    path = Path(args.output) if args.output else RESULTS / f"scan_backends-{device.type}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {
        "arguments": asdict(args) | {"output": path.name},
        "baseline": BASELINE,
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else platform.machine(),
        "threads": torch.get_num_threads(),
        "versions": {
            "modeling_ttt": modeling_ttt.__version__,
            "python": platform.python_version(),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        },
        "rows": rows,
    }
    beside = path.with_suffix(".tmp")
    beside.write_text(json.dumps(record, indent=1) + "\n")
    os.replace(beside, path)
    print(f"written to {path}")
    return path


if __name__ == "__main__":
    main()
