"""Peak memory of one step in a process of its own: `python -m benchmarks.peak_memory --help`.

The figure is the highest resident memory during the step less the resident memory just before it, when weights and
inputs are there and nothing has run yet. A new process per measurement, because the allocator keeps what it once had.

On Linux the kernel's own high-water mark is set back before the step. `ru_maxrss` alone would not do: a new process
starts with the mark of the one that launched it, and with that of its imports. On a GPU it is the allocator's peak.
"""

import json
import resource
import subprocess
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser

from benchmarks._harness import ROOT
from benchmarks.models import build_model
from benchmarks.steps import Step, contender

__all__ = ["HostMeter", "MemoryArguments", "measure_here", "measure_in_new_process"]

MIB = 1 << 20


@dataclass
class MemoryArguments:
    """Print the peak memory of one step as JSON."""

    contender: str = field(default="ttt-linear", metadata={"help": "model, see benchmarks/models.py"})
    size: str = field(default="small", metadata={"help": "size of the model, see benchmarks/models.py"})
    kind: str = field(default="prefill", metadata={"help": "prefill, decode or train"})
    batch: int = field(default=1, metadata={"help": "rows B"})
    tokens: int = field(default=2048, metadata={"help": "tokens T per row"})
    logits_to_keep: int = field(default=1, metadata={"help": "positions with logits in prefill, 0 for all"})
    backend: str = field(default="chunked", metadata={"help": "ttt_backend of our models"})
    device: str = field(default="cpu", metadata={"help": "torch device"})
    threads: int = field(default=1, metadata={"help": "threads of PyTorch"})


def measure_in_new_process(arguments: MemoryArguments) -> dict:
    """Run this file on the arguments.

    Raises:
        RuntimeError: the step failed, with the last line of what it said.
    """
    options = [word for name, value in asdict(arguments).items() for word in (f"--{name}", str(value))]
    words = [sys.executable, "-m", "benchmarks.peak_memory", *options]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        said = done.stderr.strip().splitlines()[-1:] or [f"exit code {done.returncode}"]
        raise RuntimeError(f"measuring the memory of {arguments.contender} failed: {said[0]}")
    return json.loads(done.stdout.splitlines()[-1])


def measure_here(arguments: MemoryArguments) -> dict:
    """MiB of the weights, before the step and above that during it."""
    torch.set_num_threads(arguments.threads)
    model = build_model(arguments.contender.partition("+")[0], arguments.size, arguments.backend, arguments.device)
    step = Step(arguments.kind, arguments.batch, arguments.tokens, arguments.logits_to_keep)
    once = contender(arguments.contender, model, step)
    weights = sum(p.numel() * p.element_size() for p in model.parameters())
    prepared = once.prepare()
    meter = _CudaMeter(arguments.device) if torch.device(arguments.device).type == "cuda" else HostMeter()
    result = once.run(prepared)
    peak = meter.peak()
    del result
    return {
        "weights_mib": weights / MIB,
        "before_mib": meter.before / MIB,
        "peak_mib": (peak - meter.before) / MIB,
        "method": meter.method,
        "parameters": once.parameters,
    }


class HostMeter:
    """Resident memory of this process from now on, in bytes."""

    def __init__(self):
        try:
            Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to what is resident now
            self.before, self.method = self._status("VmRSS"), "VmHWM"
        except OSError:
            self.before, self.method = self._maximum(), "ru_maxrss"

    def peak(self) -> int:
        return self._status("VmHWM") if self.method == "VmHWM" else self._maximum()

    @staticmethod
    def _status(field_name: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field_name + ":"))

    @staticmethod
    def _maximum() -> int:
        # Kilobytes, on macOS bytes.
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


class _CudaMeter:
    """Memory of the allocator of a GPU from now on, in bytes."""

    method = "max_memory_allocated"

    def __init__(self, device: str):
        self.device = device
        torch.cuda.reset_peak_memory_stats(device)
        self.before = torch.cuda.memory_allocated(device)

    def peak(self) -> int:
        return torch.cuda.max_memory_allocated(self.device)


def main(argv: list[str] | None = None) -> None:
    """Measure and print."""
    (arguments,) = HfArgumentParser(MemoryArguments, description=__doc__.splitlines()[0]).parse_args_into_dataclasses(
        argv
    )
    print(json.dumps(measure_here(arguments)))


if __name__ == "__main__":
    main()
