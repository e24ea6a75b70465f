"""Results of a long measurement, kept part by part, so that one that was stopped goes on where it was."""

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any


class Parts:
    """Parts of a result by name, in a file beside it that lasts until `finish`.

    What an earlier measurement left there counts if it has the same `identity`: all that decides the numbers, as
    plain values. Raises ValueError when the file is none of ours.
    """

    def __init__(self, path: Path, identity: dict[str, Any]):
        self.path, self.identity = path, json.loads(json.dumps(identity))
        self._found: dict[str, Any] = {}
        if path.is_file():
            try:
                stored = json.loads(path.read_text(encoding="utf-8"))
                same, parts = stored["identity"] == self.identity, dict(stored["parts"])
            except (ValueError, TypeError, KeyError) as error:
                raise ValueError(f"{str(path)!r} holds no parts of a measurement; remove it: {error}") from error
            self._found = parts if same else {}

    def __len__(self) -> int:
        return len(self._found)

    def get(self, name: str, measure: Callable[[], Any]) -> Any:
        """The part of this name, measured now unless it is there, as json gives it back."""
        if name not in self._found:
            self._found[name] = json.loads(json.dumps(measure()))
            beside = self.path.with_name(f"{self.path.name}.new")
            beside.write_text(json.dumps({"identity": self.identity, "parts": self._found}), encoding="utf-8")
            os.replace(beside, self.path)
        return self._found[name]

    def finish(self) -> None:
        """Forget the parts: the result is written."""
        self.path.unlink(missing_ok=True)
