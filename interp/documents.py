"""One document as token ids, and what turns text into it."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np


@dataclass(frozen=True)
class Document:
    """One document: `input_ids` int64 [T] with T >= 2, and for retrieval documents `answer_mask` bool [T]."""

    name: str
    input_ids: np.ndarray
    answer_mask: np.ndarray | None = None

    def __post_init__(self):
        if self.input_ids.ndim != 1 or len(self.input_ids) < 2:
            shape = list(self.input_ids.shape)
            raise ValueError(f"document {self.name!r} must have two tokens or more, got input_ids of {shape}")
        if self.answer_mask is not None and self.answer_mask.shape != self.input_ids.shape:
            raise ValueError(f"document {self.name!r}: answer_mask and input_ids must have the same shape")


def text_encoder(tokenizer: Any, max_chars: int | None = None) -> tuple[Callable[[str], np.ndarray], list[int]]:
    """Make a function from text to ids int64 [n] without special tokens, and the ids that begin a document.

    The function reads `max_chars` characters at most. A document begins with BOS if the tokenizer puts one
    in front of a text. ValueError when `tokenizer` is None.
    """
    if tokenizer is None:
        raise ValueError("text needs a tokenizer, got None")

    def encode(text: str) -> np.ndarray:
        ids = tokenizer(text[:max_chars], add_special_tokens=False, verbose=False)["input_ids"]
        return np.asarray(ids, dtype=np.int64)

    bos = tokenizer.bos_token_id
    begins_with_bos = bos is not None and tokenizer("a")["input_ids"][:1] == [bos]
    return encode, [bos] if begins_with_bos else []


def pydoc_topics() -> list[tuple[str, str]]:
    """List name and text of each topic of the language reference that comes with Python, by name.

    ValueError when this Python was packaged without it.
    """
    try:
        from pydoc_data.topics import topics
    except ImportError as error:
        raise ValueError("this Python comes without pydoc_data.topics: give a text instead") from error
    return sorted(topics.items())
