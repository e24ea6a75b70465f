"""Command lines about one run folder: `SCRIPT RUN_FOLDER [--option ...]`."""

import argparse
from collections.abc import Sequence
from dataclasses import MISSING, Field, fields
from typing import TypeVar

Arguments = TypeVar("Arguments")


def parse_with_folder(cls: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """Read the command line into an instance of the dataclass `cls`, whose docstring introduces --help.

    Fields without a default are positional and may stand anywhere; a field that is False by default is a switch.
    Unknown and abbreviated options end the program with status 2.
    """
    parser = argparse.ArgumentParser(description=cls.__doc__, allow_abbrev=False)
    for entry in fields(cls):
        _add(parser, entry)
    return cls(**vars(parser.parse_args(argv)))


def _add(parser: argparse.ArgumentParser, entry: Field) -> None:
    text, default = entry.metadata["help"], entry.default
    if default is MISSING:
        parser.add_argument(entry.name, metavar=entry.name.upper(), help=text)
    elif default is False:
        parser.add_argument(f"--{entry.name}", action="store_true", help=text)
    elif default is None:
        parser.add_argument(f"--{entry.name}", help=text)
    else:
        parser.add_argument(f"--{entry.name}", type=type(default), default=default, help=text)
