"""Measures what a checkpoint has learnt: nats per byte beside n-gram baselines, loss by position, needles.

python scripts/evaluate_checkpoint.py --model model_cards/ttt-linear-tiny --data <folder> --train_data <folder> \\
    --output model_cards/ttt-linear-tiny/evaluation.json
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import torch
from _evaluation import (
    NgramBaseline,
    loss_by_position,
    nats_per_byte,
    needle_accuracy,
    needle_windows,
    token_bytes,
    window_losses,
)
from _mix import token_stream
from _shared import option, parse, run
from _tokenizer import read_texts
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_ttt  # noqa: F401  (registers "model_type": "ttt")


@dataclass
class EvaluateArguments:
    """Measure a checkpoint on held-out text and on needles and write the numbers as json."""

    model: str = option(help="folder or Hub id of the checkpoint")
    data: str = option(help="held-out text: a file, or a folder of *.txt files")
    output: str = option(help="json file that receives the results")
    train_data: str | None = option(None, "training text; adds unigram, bigram and trigram baselines")
    length: int = option(2048, "tokens per window")
    max_tokens: int | None = option(None, "tokens of the held-out text to read; default: all")
    value_digits: list[int] = option([1, 2, 4, 8], "lengths of needle values")
    distances: list[int] = option([32, 128, 512, 1900], "tokens between definition and query")
    needles: int = option(64, "documents per length and distance")
    seed: int = option(1, "seed of the needle documents")
    frozen_layers: list[int] = option([], "layers that never write while being measured")
    num_threads: int | None = option(None, "CPU threads; default: as torch decides")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, measure, write, print."""
    arguments = parse(EvaluateArguments, argv)
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    results = evaluate(arguments)
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    for name, value in results["nats_per_byte"].items():
        print(f"{name:8} {value:.4f} nats per byte")
    for row in results["needles"]:
        print(
            "{value_digits} digits over {distance:5} tokens: {exact:.3f} exact, {digits:.3f} of digits".format(**row)
        )


def evaluate(arguments: EvaluateArguments) -> dict:
    """All numbers as plain values; losses in nats, lengths and distances in tokens."""
    tokenizer = AutoTokenizer.from_pretrained(arguments.model)
    model = AutoModelForCausalLM.from_pretrained(arguments.model, dtype=torch.float32)
    if arguments.frozen_layers:
        model.config.frozen_layers = arguments.frozen_layers
    held_out = token_stream(read_texts(arguments.data), tokenizer)
    bos, sizes = tokenizer.bos_token_id, token_bytes(tokenizer)
    losses, tokens = window_losses(model, held_out[: arguments.max_tokens], bos=bos, length=arguments.length)
    per_byte = {"model": nats_per_byte(losses, tokens, sizes)}
    if arguments.train_data:
        stream = token_stream(read_texts(arguments.train_data), tokenizer)
        for order, name in enumerate(("unigram", "bigram", "trigram"), start=1):
            baseline = NgramBaseline(stream, len(tokenizer), order).losses(tokens, bos)
            per_byte[name] = nats_per_byte(baseline, tokens, sizes)
    needles = []
    for digits in arguments.value_digits:
        for distance in arguments.distances:
            windows = needle_windows(
                tokenizer,
                held_out,
                value_digits=digits,
                distance=distance,
                count=arguments.needles,
                seed=arguments.seed,
            )
            found = needle_accuracy(model, windows, digits)
            needles.append({"value_digits": digits, "distance": distance, "documents": arguments.needles, **found})
    return {
        "arguments": {name: value for name, value in asdict(arguments).items() if name in _REPORTED},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "tokens": int(tokens.size),
        "bytes": int(sizes[tokens].sum()),
        "loss_nats_per_token": float(losses.mean()),
        "nats_per_byte": per_byte,
        "loss_by_position": loss_by_position(losses),
        "needles": needles,
    }


_REPORTED = ("length", "max_tokens", "needles", "seed", "frozen_layers")


if __name__ == "__main__":
    run(main)
