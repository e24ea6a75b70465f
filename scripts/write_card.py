"""Writes the README.md of a checkpoint's folder from its configuration and its measurements.

python scripts/write_card.py --model model_cards/ttt-mlp-tiny --license apache-2.0 --training training.md \\
    --evaluation_data "two held-out novels" --compare llama-tiny=model_cards/llama-tiny/evaluation.json
"""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from _card import CardFacts, read_evaluation, write_card
from _card_lint import lint_card
from _shared import option, parse, run
from safetensors import safe_open
from transformers import AutoConfig

import modeling_ttt  # noqa: F401  (registers "model_type": "ttt")


@dataclass
class CardArguments:
    """Write README.md in the folder of a checkpoint, from evaluation.json, curve.png and evaluation.png there."""

    model: str = option(help="folder of the checkpoint, as users will name it")
    license: str = option(help="license, as apache-2.0")
    language: list[str] = option(["en"], "language codes")
    datasets: list[str] = option([], "Hub ids of the training data")
    base_model: str | None = option(None, "Hub id of the model this one was made from")
    training: str | None = option(None, "a text file that tells how the model was trained")
    remarks: str | None = option(None, "a text file that says what the measurements mean")
    evaluation_data: str = option("held-out text", "what the evaluation read, as 'two held-out novels'")
    evaluation_split: str = option("validation", "its split")
    test_split: str = option("test", "the split of its --test_data")
    compare: list[str] = option([], "NAME=evaluation.json of other checkpoints, for a table")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, write, say where."""
    arguments = parse(CardArguments, argv)
    folder = Path(arguments.model)
    if not (folder / "config.json").is_file():
        raise ValueError(f"model must be the folder of a checkpoint with a config.json, got {arguments.model!r}")
    path = folder / "evaluation.json"
    evaluation = read_evaluation(path) if path.is_file() else None
    facts = CardFacts(
        license=arguments.license,
        language=arguments.language,
        datasets=arguments.datasets,
        base_model=arguments.base_model,
        training=_read(arguments.training),
        remarks=_read(arguments.remarks),
        evaluation=evaluation,
        evaluation_data=arguments.evaluation_data,
        evaluation_split=arguments.evaluation_split,
        test_split=arguments.test_split,
        others=_others(arguments.compare),
        pictures=tuple(file.name for file in sorted(folder.glob("*.png"))),
    )
    config = AutoConfig.from_pretrained(folder)
    has_tokenizer = (folder / "tokenizer_config.json").is_file()
    text = write_card(arguments.model, config, _parameters(folder), has_tokenizer, facts, local=True)
    problems = lint_card(text, evaluation)
    if problems:
        raise ValueError(f"the card would not be in order: {'; '.join(problems)}")
    beside = folder / ".README.md.part"
    beside.write_text(text, encoding="utf-8")
    os.replace(beside, folder / "README.md")
    print(f"wrote {folder / 'README.md'}")


def _read(path: str | None) -> str | None:
    return None if path is None else Path(path).read_text(encoding="utf-8")


def _others(pairs: list[str]) -> dict[str, dict]:
    others = {}
    for pair in pairs:
        name, equals, path = pair.partition("=")
        if not equals or not name or not Path(path).is_file():
            raise ValueError(f"compare must be NAME=evaluation.json of a file that exists, got {pair!r}")
        others[name] = read_evaluation(path)
    return others


def _parameters(folder: Path) -> int:
    """Numbers in the weights of a folder; a tied head is not stored and not counted."""
    total = 0
    for path in folder.glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            for name in file.keys():  # noqa: SIM118  (no mapping)
                size = 1
                for n in file.get_slice(name).get_shape():
                    size *= n
                total += size
    return total


if __name__ == "__main__":
    run(main)
