"""Training windows from a stream of documents, packed end to end, which can be left and taken up again exactly."""

from pathlib import Path

import datasets
import numpy as np
from transformers import PreTrainedTokenizerBase

BUILDERS = {".txt": "text", ".json": "json", ".jsonl": "json", ".parquet": "parquet", ".csv": "csv"}


def open_stream(source: str, config_name: str | None, split: str) -> datasets.IterableDataset:
    """A dataset as a stream: a file (one document per line or row), a folder, or the id of a dataset on the Hub.

    Raises ValueError when it cannot be opened.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in BUILDERS:
        raise ValueError(f"train_data as a stream must be one of {sorted(BUILDERS)}, got {source!r}")
    files = {"data_files": {split: source}} if path.is_file() else {}
    try:
        return datasets.load_dataset(
            BUILDERS[path.suffix] if files else source, config_name, split=split, streaming=True, **files
        )
    except (OSError, ValueError) as error:
        raise ValueError(f"train_data {source!r}, split {split!r}, could not be opened: {error}") from error


class DocumentStream:
    """Windows of `length` ids cut from documents joined as bos .. eos, in the order of the stream, again and again.

    Has the interface of `WindowMix`; all tokens weigh 1. Where it stands is `state_dict()`, plain values: the
    stream in front of the current document, and the ids taken from that document.
    """

    def __init__(self, rows: datasets.IterableDataset, tokenizer: PreTrainedTokenizerBase, text_column: str):
        self.rows, self.tokenizer, self.text_column = rows, tokenizer, text_column
        self._start = self._before = rows.state_dict()
        self._taken = 0
        self._documents = iter(rows)
        self._rest = np.empty(0, np.int64)

    def batch(
        self, first: int, rows: int, length: int, earlier: tuple[tuple[int, int], ...] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """The next `rows` windows: ids int64 and weights float32, both [rows, length].

        The number of the first window and the stages before, which `WindowMix` needs, are told by where the stream
        stands. Raises ValueError when there are no documents or they hold no text.
        """
        parts, missing = [], rows * length
        while missing:
            if not len(self._rest):
                self._before, self._rest, self._taken = self._next_document()
            part, self._rest = self._rest[:missing], self._rest[missing:]
            self._taken += len(part)
            missing -= len(part)
            parts.append(part)
        return np.concatenate(parts).reshape(rows, length), np.ones((rows, length), np.float32)

    def state_dict(self) -> dict:
        """Where the stream stands, as plain values."""
        return {"before": self._before, "taken": self._taken}

    def load_state_dict(self, state: dict) -> None:
        """Go to where `state_dict` was called."""
        self.rows.load_state_dict(state["before"])
        self._documents = iter(self.rows)
        self._rest = np.empty(0, np.int64)
        self._before, self._taken = state["before"], 0
        if state["taken"]:
            self._before, ids, _ = self._next_document()
            self._rest, self._taken = ids[state["taken"] :], state["taken"]

    def _next_document(self) -> tuple[dict, np.ndarray, int]:
        before = self.rows.state_dict()
        row = next(self._documents, None)
        if row is None:
            self.rows.load_state_dict(self._start)
            before, self._documents = self._start, iter(self.rows)
            row = next(self._documents, None)
        if row is None:
            raise ValueError("train_data must hold at least one document, got none")
        text = row.get(self.text_column)
        if not isinstance(text, str):
            raise ValueError(f"text_column must be a column of text, got {self.text_column!r} of {sorted(row)}")
        ids = self.tokenizer(text, add_special_tokens=False)["input_ids"]
        return before, np.asarray([self.tokenizer.bos_token_id, *ids, self.tokenizer.eos_token_id], np.int64), 0
