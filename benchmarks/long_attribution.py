"""Time and peak memory of the direct logit attribution of one target over a long text.

    python -m benchmarks.long_attribution --model model_cards/ttt-linear-tiny --tokens 32768

Random tokens, one process per measurement: memory is the highest resident memory during the attribution less what was
resident before it, when the weights are there.
"""

import json
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from transformers import HfArgumentParser
from transformers.utils import logging

from benchmarks.peak_memory import MIB, HostMeter
from interp.attribution import direct_logit_attribution
from interp.captum_targets import LogitTarget
from interp.loading import load_model

__all__ = ["LongArguments", "main", "measure"]


@dataclass
class LongArguments:
    """Print seconds, MiB above the weights and the completeness error as JSON."""

    model: str = field(metadata={"help": "folder or Hub id of a TTT model"})
    tokens: int = field(default=32768, metadata={"help": "tokens of the text"})
    piece_tokens: int = field(default=2048, metadata={"help": "tokens of one call of the model"})
    threads: int = field(default=1, metadata={"help": "threads of PyTorch"})


def measure(arguments: LongArguments) -> dict:
    """The target is the logit of one token less the mean of two others behind the last token."""
    torch.set_num_threads(arguments.threads)
    model = load_model(arguments.model)
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(model.config.vocab_size, (1, arguments.tokens), generator=generator)
    meter, wall, cpu = HostMeter(), time.perf_counter(), time.process_time()
    found = direct_logit_attribution(
        model, ids, LogitTarget(-1, 5, [6, 7]), piece_tokens=arguments.piece_tokens, progress=True
    )
    return {
        "model": Path(arguments.model).name,
        "tokens": arguments.tokens,
        "wall_seconds": time.perf_counter() - wall,
        "cpu_seconds": time.process_time() - cpu,
        "peak_mib": (meter.peak() - meter.before) / MIB,
        "target": float(found.value[0]),
        "completeness_error": float(found.completeness_error[0]),
    }


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = HfArgumentParser(LongArguments, description=__doc__.splitlines()[0])
    (arguments,) = parser.parse_args_into_dataclasses(argv)
    logging.disable_progress_bar()
    print(json.dumps(measure(arguments)))


if __name__ == "__main__":
    main()
