"""What every script does in the same way: parse, seed, log, place its results, fail."""

import argparse
import logging
import sys
from collections.abc import Callable, Sequence
from dataclasses import MISSING, field, fields
from pathlib import Path
from typing import Any, TypeVar

from transformers import HfArgumentParser, set_seed
from transformers.utils import logging as transformers_logging

Arguments = TypeVar("Arguments")


def option(default: Any = MISSING, help: str = "", aliases: Sequence[str] = (), **settings: Any) -> Any:
    """Make a field of an arguments dataclass: default (a required option without), help text, other names.

    A list as default makes an option with one or several values. The help names the default, unless it is an
    absent value or the text speaks of it itself.
    """
    absent = default is MISSING or default is None or default is False or default == []
    if not absent and "default" not in help:
        help = f"{help} (default: {default})"
    metadata = {"help": help.replace("%", "%%"), **settings}
    if aliases:
        metadata["aliases"] = list(aliases)
    if isinstance(default, list):
        return field(default_factory=default.copy, metadata=metadata)
    return field(default=default, metadata=metadata)


def repeated(help: str = "", aliases: Sequence[str] = ()) -> Any:
    """Make a `list[str]` field whose option may be given several times, each time with one or several values."""
    return option([], help, aliases, action="append")


def parse(cls: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line into an instance of the dataclass `cls`, whose docstring introduces --help.

    Unknown and abbreviated options end the program with status 2.
    """
    layout = {"description": cls.__doc__, "formatter_class": argparse.HelpFormatter}
    parser = HfArgumentParser(cls, allow_abbrev=False, **layout)
    arguments, rest = parser.parse_args_into_dataclasses(
        list(sys.argv[1:] if argv is None else argv), return_remaining_strings=True, look_for_args_file=False
    )
    if rest:
        parser.error(f"unknown arguments: {' '.join(rest)}")
    for entry in fields(cls):
        if entry.metadata.get("action") == "append":
            groups = getattr(arguments, entry.name)
            setattr(arguments, entry.name, [value for group in groups for value in group])
    return arguments


def prepare(seed: int, is_main_process: bool = True) -> None:
    """Seed python, numpy and torch, let only the main process log below warnings, hide loading bars."""
    set_seed(seed)
    transformers_logging.disable_progress_bar()
    level = logging.INFO if is_main_process else logging.WARNING
    logging.basicConfig(level=level, format="%(levelname)s %(message)s", stream=sys.stderr)
    for noisy in ("httpx", "httpcore", "fsspec", "filelock", "urllib3", "datasets"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
    if not is_main_process:
        transformers_logging.set_verbosity_error()


def run_folder(exp_dir: str, exp_name: str) -> Path:
    """Name the folder `<exp_dir>/<exp_name>`; ValueError when the name is not a plain one."""
    if not exp_name or exp_name in (".", "..") or "/" in exp_name or "\\" in exp_name:
        raise ValueError(f"exp_name must be a plain folder name, got {exp_name!r}")
    return Path(exp_dir) / exp_name


def run(main: Callable[[], int | None]) -> None:
    """Run a script: its status is what `main` returns, or 1 with one line when what it was given is wrong."""
    try:
        status = main()
    except (ValueError, TypeError, OSError) as error:
        sys.exit(f"error: {error}")
    sys.exit(status or 0)
