"""Measures what a checkpoint has learnt: nats per byte beside n-gram baselines, loss by position and context, needles.

python scripts/evaluate_checkpoint.py --model model_cards/ttt-linear-tiny --data <validation> --test_data <test> \\
    --train_data <training> --length 8192 --output model_cards/ttt-linear-tiny/evaluation.json

Beside the json come the same numbers as a table (.csv) and a picture (.png). Run again, it goes on where it stopped.
"""

import hashlib
import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from _checkpoints import weights_hash
from _evaluation import (
    NgramBaseline,
    depth_windows,
    loss_by_context,
    loss_by_position,
    nats_per_byte,
    needle_accuracy,
    needle_windows,
    token_bytes,
    window_losses,
)
from _evaluation_report import draw, write_table
from _mix import token_stream
from _parts import Parts
from _shared import option, parse, run
from _tokenizer import read_texts
from torch import nn
from tqdm import tqdm
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
    context_windows: int = option(
        32, "windows whose last tokens are read behind more and more text; 0 leaves this measurement out"
    )
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
    path = Path(arguments.output)
    path.parent.mkdir(parents=True, exist_ok=True)
    parts, results = evaluate(arguments, path.with_name(f".{path.name}.parts"))
    beside = path.with_name(f".{path.name}.part")
    beside.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    os.replace(beside, path)
    write_table(results, path.with_suffix(".csv"))
    draw(results, path.with_suffix(".png"))
    parts.finish()
    _print(results)


def evaluate(arguments: EvaluateArguments, unfinished: Path) -> tuple[Parts, dict]:
    """All numbers as plain values; losses in nats, lengths and distances in tokens.

    `unfinished` keeps what is measured already, until the `Parts` that come back are finished.
    """
    model, tokenizer = load(arguments.model, tokenizer=arguments.tokenizer, ttt_only=False)
    if arguments.frozen_layers:
        if model.config.model_type != "ttt":
            raise ValueError(f"frozen_layers needs a TTT model, got model_type {model.config.model_type!r}")
        model.config.frozen_layers = arguments.frozen_layers
    named = {"data": arguments.data, "test": arguments.test_data, "train": arguments.train_data}
    texts = {name: token_stream(read_texts(path), tokenizer) for name, path in named.items() if path}
    identity = {
        "arguments": {name: value for name, value in asdict(arguments).items() if name not in _NO_NUMBERS},
        "config": json.loads(model.config.to_json_string(use_diff=False)),
        "weights": weights_hash(model),
        "texts": {name: hashlib.sha256(ids.tobytes()).hexdigest() for name, ids in texts.items()},
    }
    parts, work = Parts(unfinished, identity), _Measuring(model, tokenizer, arguments, texts)
    if len(parts):
        print(f"going on behind {len(parts)} parts that were measured before")
    results = {
        "arguments": {name: value for name, value in asdict(arguments).items() if name in _REPORTED},
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
    }
    for name in ("data", "test"):
        if name in texts:
            found = dict(parts.get(name, lambda name=name: work.language(name)))
            if arguments.context_windows:
                found["loss_by_context"] = parts.get(f"{name} by context", lambda name=name: work.contexts(name))
            results |= found if name == "data" else {name: found}
    results["needles"] = parts.get("needles", work.needles)
    if arguments.depth_needles:
        lengths = arguments.depth_lengths
        rows = [parts.get(f"needles in {n}", lambda n=n: work.needles_by_depth(n)) for n in lengths]
        results["needles_by_depth"] = [row for of_length in rows for row in of_length]
    return parts, results


class _Measuring:
    """One model, the texts it is measured on, and a bar for each measurement."""

    def __init__(
        self,
        model: nn.Module,
        tokenizer: PreTrainedTokenizerBase,
        arguments: EvaluateArguments,
        texts: dict[str, np.ndarray],
    ):
        self.model, self.tokenizer, self.arguments, self.texts = model, tokenizer, arguments, texts
        self._baselines: dict[str, NgramBaseline] | None = None

    def language(self, name: str) -> dict:
        """What a text costs, by token, by byte and by position."""
        bos, sizes = self.tokenizer.bos_token_id, token_bytes(self.tokenizer)
        with _bar(name) as bar:
            losses, tokens = window_losses(
                self.model, self._text(name), bos=bos, length=self.arguments.length, tick=bar.update
            )
        per_byte = {"model": nats_per_byte(losses, tokens, sizes)}
        for order, baseline in self._ngrams().items():
            per_byte[order] = nats_per_byte(baseline.losses(tokens, bos), tokens, sizes)
        return {
            "tokens": int(tokens.size),
            "bytes": int(sizes[tokens].sum()),
            "loss_nats_per_token": float(losses.mean()),
            "nats_per_byte": per_byte,
            "loss_by_position": loss_by_position(losses),
        }

    def contexts(self, name: str) -> list[dict]:
        """What the same tokens of a text cost behind more and more of it."""
        options = {"length": self.arguments.length, "most": self.arguments.context_windows}
        with _bar(f"{name} by context") as bar:
            return loss_by_context(
                self.model, self._text(name), bos=self.tokenizer.bos_token_id, tick=bar.update, **options
            )

    def needles(self) -> list[dict]:
        """Needles answered, by digits of the value and distance of the query."""
        options = {"count": self.arguments.needles, "seed": self.arguments.seed}
        rows = []
        with _bar("needles") as bar:
            for digits in self.arguments.value_digits:
                for distance in self.arguments.distances:
                    place = {"value_digits": digits, "distance": distance}
                    windows = needle_windows(self.tokenizer, self.texts["data"], **place, **options)
                    found = needle_accuracy(self.model, windows, digits, tick=bar.update)
                    rows.append({**place, "documents": self.arguments.needles, **found})
        return rows

    def needles_by_depth(self, length: int) -> list[dict]:
        """Needles answered in documents of one length, by depth."""
        digits, count = self.arguments.depth_digits, self.arguments.depth_needles
        rows = []
        with _bar(f"needles in {length}") as bar:
            for depth in self.arguments.depths:
                place = {"length": length, "depth": depth, "value_digits": digits}
                windows = depth_windows(
                    self.tokenizer, self.texts["data"], **place, count=count, seed=self.arguments.seed
                )
                found = needle_accuracy(self.model, windows, digits, tick=bar.update)
                rows.append({**place, "documents": count, **found})
        return rows

    def _text(self, name: str) -> np.ndarray:
        return self.texts[name][: self.arguments.max_tokens]

    def _ngrams(self) -> dict[str, NgramBaseline]:
        if self._baselines is None:
            orders = {"unigram": 1, "bigram": 2, "trigram": 3} if "train" in self.texts else {}
            size = len(self.tokenizer)
            self._baselines = {name: NgramBaseline(self.texts["train"], size, order) for name, order in orders.items()}
        return self._baselines


def _bar(what: str) -> tqdm:
    return tqdm(desc=what, unit=" tokens", unit_scale=True, mininterval=2.0)


def _print(results: dict) -> None:
    for label, found in (("", results), (" on test", results.get("test", {}))):
        for name, value in found.get("nats_per_byte", {}).items():
            print(f"{name:8} {value:.4f} nats per byte{label}")
        for row in found.get("loss_by_context", []):
            print("{loss:8.4f} nats per token in the last {tokens} of {length}".format(**row) + label)
    for row in results["needles"]:
        print(
            "{value_digits} digits over {distance:5} tokens: {exact:.3f} exact, {digits:.3f} of digits".format(**row)
        )
    for row in results.get("needles_by_depth", []):
        print("{length:5} tokens, depth {depth:.2f}: {exact:.3f} exact, {digits:.3f} of digits".format(**row))


_REPORTED = ("length", "max_tokens", "needles", "seed", "frozen_layers")
_NO_NUMBERS = ("model", "tokenizer", "output", "data", "test_data", "train_data", "num_threads")


if __name__ == "__main__":
    run(main)
