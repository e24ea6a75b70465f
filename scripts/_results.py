"""Command lines that begin with the run folder they are about."""

import sys
from collections.abc import Sequence
from typing import TypeVar

from _shared import parse

Arguments = TypeVar("Arguments")


def parse_with_folder(cls: type[Arguments], argv: Sequence[str] | None = None) -> Arguments:
    """As `parse`, for a dataclass with an option `run_folder` that may also be given as the first word."""
    words = list(sys.argv[1:] if argv is None else argv)
    if words and not words[0].startswith("-"):
        words.insert(0, "--run_folder")
    return parse(cls, words)
