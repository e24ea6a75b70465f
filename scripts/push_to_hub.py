"""Publishes a checkpoint: weights, code, tokenizer and card in one commit of a Hub repository.

python scripts/push_to_hub.py --model model_cards/ttt-linear-tiny --repo_id you/ttt-linear-tiny --dry_run
"""

import logging
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from _card import CardFacts, frozen_settings, read_evaluation, write_card
from _card_lint import lint_card
from _publishing import check_repo_id, push
from _shared import option, parse, prepare, run
from _staging import Staged, stage
from huggingface_hub import HfApi, get_token

log = logging.getLogger("push_to_hub")


@dataclass
class PushArguments:
    """Publish a checkpoint on the Hub in one commit. The token is that of HF_TOKEN or of `hf auth login`."""

    model: str = option(help="folder of the checkpoint; only read")
    repo_id: str = option(help="repository as user/name; made when there is none")
    dry_run: bool = option(False, "check everything and show files and sizes; nothing is sent")
    private: bool = option(False, "make a new repository private")
    revision: str | None = option(None, "branch to push to, made when there is none (default: main)")
    create_pr: bool = option(False, "open a pull request instead of pushing to the branch")
    message: str | None = option(None, "message of the commit")
    max_shard_size: str = option("5GB", "largest size of a file of weights")
    tokenizer: str | None = option(None, "folder or Hub id of the tokenizer (default: that of the folder)")

    new_card: bool = option(False, "write a new card where the folder has a README.md; it does so where there is none")
    license: str | None = option(None, "for a new card: license, as apache-2.0")
    language: list[str] = option([], "for a new card: language codes")
    datasets: list[str] = option([], "for a new card: Hub ids of the training data")
    base_model: str | None = option(None, "for a new card: Hub id of the model this one was made from")
    training: str | None = option(None, "for a new card: a text file that tells how the model was trained")
    evaluation: str | None = option(None, "json of evaluate_checkpoint.py (default: evaluation.json of the folder)")
    evaluation_data: str | None = option(None, "for a new card: what the evaluation read, as 'two held-out novels'")
    evaluation_split: str | None = option(None, "for a new card: its split, as validation")


FOR_NEW_CARD = (
    "license",
    "language",
    "datasets",
    "base_model",
    "training",
    "evaluation_data",
    "evaluation_split",
)


def main(argv: Sequence[str] | None = None) -> int:
    """Parse, stage, check, push, print."""
    arguments = parse(PushArguments, argv)
    prepare(seed=0)
    # The client of huggingface_hub 2 logs every request, and its own warnings would come twice.
    logging.getLogger("httpx2").setLevel(logging.WARNING)
    logging.getLogger("huggingface_hub").propagate = False
    check_repo_id(arguments.repo_id)
    token = None if arguments.dry_run else _token()
    with tempfile.TemporaryDirectory() as folder:
        staged = stage(arguments.model, folder, max_shard_size=arguments.max_shard_size, tokenizer=arguments.tokenizer)
        _place_card(arguments, staged)
        _show(arguments, staged)
        if arguments.dry_run:
            print("dry run: nothing was sent")
            return 0
        pushed = push(
            HfApi(token=token),
            staged.folder,
            arguments.repo_id,
            private=arguments.private,
            revision=arguments.revision,
            create_pr=arguments.create_pr,
            message=arguments.message or f"Upload {Path(arguments.model).resolve().name}",
        )
    if not pushed.changed:
        print(f"nothing to do: {arguments.repo_id} holds all of this already, commit {pushed.commit}")
        return 0
    if pushed.removed:
        print(f"removed weights of an earlier push: {', '.join(pushed.removed)}")
    print(f"pushed {pushed.url}")
    if arguments.create_pr:
        print(f"to change this pull request, push with --revision {pushed.revision} instead of --create_pr")
    return 0


def _token() -> str:
    token = get_token()
    if not token:
        raise ValueError("there is no token: set HF_TOKEN, or log in with `hf auth login`")
    return token


def _place_card(arguments: PushArguments, staged: Staged) -> None:
    """Write the card where there is none or a new one is asked for; ValueError when the card is not in order."""
    evaluation, name = _evaluation(arguments, staged.folder)
    path = staged.folder / "README.md"
    if path.is_file() and not arguments.new_card:
        unused = [name for name in FOR_NEW_CARD if getattr(arguments, name)]
        if unused:
            raise ValueError(f"model has a README.md: {', '.join(unused)} need new_card, which replaces it")
        _name_repository(path, arguments)
    else:
        if not arguments.license:
            raise ValueError("license must be given for a new card, as apache-2.0")
        facts = CardFacts(
            license=arguments.license,
            language=arguments.language,
            datasets=arguments.datasets,
            base_model=arguments.base_model,
            training=Path(arguments.training).read_text(encoding="utf-8") if arguments.training else None,
            evaluation=evaluation,
            evaluation_file=name,
            evaluation_data=arguments.evaluation_data or "held-out text",
            evaluation_split=arguments.evaluation_split,
        )
        parameters = sum(parameter.numel() for parameter in staged.model.parameters())
        card = write_card(arguments.repo_id, staged.model.config, parameters, staged.has_tokenizer, facts)
        path.write_text(card, encoding="utf-8")
    problems = lint_card(path.read_text(encoding="utf-8"), evaluation)
    if problems:
        raise ValueError(f"the card is not in order: {'; '.join(problems)}")


def _name_repository(card: Path, arguments: PushArguments) -> None:
    """Code in a card that loads the folder by its name here loads the repository there."""
    text = card.read_text(encoding="utf-8")
    found = text.replace(f'from_pretrained("{arguments.model.rstrip("/")}"', f'from_pretrained("{arguments.repo_id}"')
    if found != text:
        card.write_text(found, encoding="utf-8")
        print(f"the card loads {arguments.repo_id} where it loaded {arguments.model}")


def _evaluation(arguments: PushArguments, folder: Path) -> tuple[dict[str, Any] | None, str]:
    """The measurements and their file in the repository, where a file given by name is copied to."""
    path = folder / "evaluation.json"
    if arguments.evaluation:
        path.write_bytes(Path(arguments.evaluation).read_bytes())
    return (read_evaluation(path) if path.is_file() else None), path.name


def _show(arguments: PushArguments, staged: Staged) -> None:
    target = f"a pull request to {arguments.repo_id}" if arguments.create_pr else arguments.repo_id
    print(
        f"{len(staged.files)} files of {_size(sum(staged.files.values()))} for {target}, branch "
        f"{arguments.revision or 'main'}"
    )
    for name, size in staged.files.items():
        print(f"{_size(size):>10}  {name}")
    if staged.left_out:
        print(f"left out: {', '.join(staged.left_out)}")
    if not staged.has_tokenizer:
        log.warning("there is no tokenizer in the folder; --tokenizer adds one")
    for name, path in staged.machine_paths.items():
        log.warning("%s names a path of this machine: %s", name, path)
    if frozen_settings(staged.model.config):
        log.warning("every user of the model will load it frozen: %s", frozen_settings(staged.model.config))


def _size(count: int) -> str:
    for unit in ("bytes", "kB", "MB"):
        if count < 1000:
            return f"{count:.0f} {unit}" if unit == "bytes" else f"{count:.1f} {unit}"
        count /= 1000
    return f"{count:.1f} GB"


if __name__ == "__main__":
    run(main)
