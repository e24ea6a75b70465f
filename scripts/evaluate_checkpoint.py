"""Measures what a checkpoint has learnt: nats per byte beside n-gram baselines, loss by position, needles.

python scripts/evaluate_checkpoint.py --model model_cards/ttt-linear-tiny --data <validation> --test_data <test> \\
    --train_data <training> --length 8192 --output model_cards/ttt-linear-tiny/evaluation.json

Beside the json come the same numbers as a table (.csv) and a picture (.png).
"""

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _evaluation import (
    NgramBaseline,
    depth_windows,
    loss_by_position,
    nats_per_byte,
    needle_accuracy,
    needle_windows,
    token_bytes,
    window_losses,
)
from _evaluation_report import draw, write_table
from _mix import token_stream
from _shared import option, parse, run
from _tokenizer import read_texts
from torch import nn
from transformers import PreTrainedTokenizerBase

from interp.loading import load


@dataclass
class EvaluateArguments:
    """Measure a checkpoint on held-out text and on needles and write the numbers as json."""

    model: str = option(help="folder or Hub id of the checkpoint; may be one of the official JAX code")
    data: str = option(help="held-out text: a file, or a folder of *.txt files")
    output: str = option(help="json file that receives the results")
    test_data: str | None = option(None, "more held-out text, measured in the same way as the entry test")
    train_data: str | None = option(None, "training text; adds unigram, bigram and trigram baselines")
    tokenizer: str | None = option(None, "folder or Hub id of the tokenizer (default: that of the model)")
    length: int = option(2048, "tokens per window")
    max_tokens: int | None = option(None, "tokens of the held-out text to read; default: all")
    value_digits: list[int] = option([1, 2, 4, 8], "lengths of needle values")
    distances: list[int] = option([32, 128, 512, 1900], "tokens between definition and query")
    needles: int = option(64, "documents per length of value and distance")
    depth_lengths: list[int] = option([1024, 2048, 4096, 8192], "tokens of documents with a needle at each depth")
    depths: list[float] = option([0.0, 0.25, 0.5, 0.75, 1.0], "shares of their text in front of the definition")
    depth_digits: int = option(4, "digits of the values there")
    depth_needles: int = option(16, "documents per length and depth; 0 leaves this measurement out")
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
    write_table(results, path.with_suffix(".csv"))
    draw(results, path.with_suffix(".png"))
    _print(results)


def evaluate(arguments: EvaluateArguments) -> dict:
    """All numbers as plain values; losses in nats, lengths and distances in tokens."""
    model, tokenizer = load(arguments.model, tokenizer=arguments.tokenizer, ttt_only=False)
    if arguments.frozen_layers:
        if model.config.model_type != "ttt":
            raise ValueError(f"frozen_layers needs a TTT model, got model_type {model.config.model_type!r}")
        model.config.frozen_layers = arguments.frozen_layers
    baselines = _baselines(arguments, tokenizer)
    held_out = token_stream(read_texts(arguments.data), tokenizer)
    results = {
        "arguments": {name: value for name, value in asdict(arguments).items() if name in _REPORTED},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        **_language(model, tokenizer, held_out, baselines, arguments),
    }
    if arguments.test_data:
        test = token_stream(read_texts(arguments.test_data), tokenizer)
        results["test"] = _language(model, tokenizer, test, baselines, arguments)
    results["needles"] = _needles(model, tokenizer, held_out, arguments)
    if arguments.depth_needles:
        results["needles_by_depth"] = _needles_by_depth(model, tokenizer, held_out, arguments)
    return results


def _baselines(arguments: EvaluateArguments, tokenizer: PreTrainedTokenizerBase) -> dict[str, NgramBaseline]:
    if not arguments.train_data:
        return {}
    stream = token_stream(read_texts(arguments.train_data), tokenizer)
    names = ("unigram", "bigram", "trigram")
    return {name: NgramBaseline(stream, len(tokenizer), order) for order, name in enumerate(names, start=1)}


def _language(
    model: nn.Module,
    tokenizer: PreTrainedTokenizerBase,
    ids: np.ndarray,
    baselines: dict[str, NgramBaseline],
    arguments: EvaluateArguments,
) -> dict:
    """What a text costs, by token, by byte and by position."""
    bos, sizes = tokenizer.bos_token_id, token_bytes(tokenizer)
    losses, tokens = window_losses(model, ids[: arguments.max_tokens], bos=bos, length=arguments.length)
    per_byte = {"model": nats_per_byte(losses, tokens, sizes)}
    for name, baseline in baselines.items():
        per_byte[name] = nats_per_byte(baseline.losses(tokens, bos), tokens, sizes)
    return {
        "tokens": int(tokens.size),
        "bytes": int(sizes[tokens].sum()),
        "loss_nats_per_token": float(losses.mean()),
        "nats_per_byte": per_byte,
        "loss_by_position": loss_by_position(losses),
    }


def _needles(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, arguments: EvaluateArguments
) -> list[dict]:
    rows, options = [], {"count": arguments.needles, "seed": arguments.seed}
    for digits in arguments.value_digits:
        for distance in arguments.distances:
            windows = needle_windows(tokenizer, ids, value_digits=digits, distance=distance, **options)
            found = needle_accuracy(model, windows, digits)
            rows.append({"value_digits": digits, "distance": distance, "documents": arguments.needles, **found})
    return rows


def _needles_by_depth(
    model: nn.Module, tokenizer: PreTrainedTokenizerBase, ids: np.ndarray, arguments: EvaluateArguments
) -> list[dict]:
    rows, digits = [], arguments.depth_digits
    options = {"value_digits": digits, "count": arguments.depth_needles, "seed": arguments.seed}
    for length in arguments.depth_lengths:
        for depth in arguments.depths:
            windows = depth_windows(tokenizer, ids, length=length, depth=depth, **options)
            found = needle_accuracy(model, windows, digits)
            place = {"length": length, "depth": depth, "value_digits": digits}
            rows.append({**place, "documents": arguments.depth_needles, **found})
    return rows


def _print(results: dict) -> None:
    for label, found in (("", results), (" on test", results.get("test", {}))):
        for name, value in found.get("nats_per_byte", {}).items():
            print(f"{name:8} {value:.4f} nats per byte{label}")
    for row in results["needles"]:
        print(
            "{value_digits} digits over {distance:5} tokens: {exact:.3f} exact, {digits:.3f} of digits".format(**row)
        )
    for row in results.get("needles_by_depth", []):
        print("{length:5} tokens, depth {depth:.2f}: {exact:.3f} exact, {digits:.3f} of digits".format(**row))


_REPORTED = ("length", "max_tokens", "needles", "seed", "frozen_layers")


if __name__ == "__main__":
    run(main)
