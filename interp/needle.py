"""Retrieval documents: a key and its value, filler, and the question for the value at the end."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np

from interp.documents import Document, pydoc_topics, text_encoder

FILLERS = ("random", "text")
KEY_DIGITS = 8


@dataclass(frozen=True)
class NeedleOptions:
    """What needle documents look like.

    `depths`: which part of the filler stands before the definition, 0 (none) to 1 (all); documents take them
    in turn. `filler`: `random` (uniform ids from `min_filler_id` up, special tokens left out) or `text`
    (`filler_text`, else the language reference of Python, from a random place on). `value_length`: hex digits
    of the value, 1 to 8.
    """

    depths: tuple[float, ...] = (0.0,)
    filler: str = "random"
    value_length: int = 8
    min_filler_id: int = 100
    filler_text: str | None = None

    def __post_init__(self):
        if not self.depths or not all(0.0 <= depth <= 1.0 for depth in self.depths):
            raise ValueError(f"depths must be one or more numbers in [0, 1], got {self.depths}")
        if self.filler not in FILLERS:
            raise ValueError(f"filler must be one of {list(FILLERS)}, got {self.filler!r}")
        if not 1 <= self.value_length <= 8:
            raise ValueError(f"value_length must be in [1, 8], got {self.value_length}")
        if self.min_filler_id < 0:
            raise ValueError(f"min_filler_id must not be negative, got {self.min_filler_id}")
        if self.filler_text is not None and self.filler != "text":
            raise ValueError(f"filler_text is given, but filler is {self.filler!r}")


def needle_documents(
    tokenizer: Any,
    *,
    seq_length: int,
    max_documents: int | None,
    seed: int = 0,
    options: NeedleOptions | None = None,
) -> Iterator[Document]:
    """Make `Define Key=<8hex> Value=<hex>. `, filler around it, ` Query Key=<key> Value=` and the value.

    Every document has exactly `seq_length` tokens; `answer_mask` marks those of the value at the end.
    Document i depends on `seed`, i, the options and the tokenizer only. ValueError when `max_documents` is
    None (there is no end to them), when the vocabulary has no filler, or when `seq_length` has no room for
    definition and question.
    """
    if max_documents is None:
        raise ValueError("needle documents have no end: max_documents is needed")
    options = options or NeedleOptions()
    encode, prefix = text_encoder(tokenizer)
    filler_ids = _filler_ids(tokenizer, encode, options)

    def generate() -> Iterator[Document]:
        for index in range(max_documents):
            yield _document(index, np.random.default_rng([seed, index]))

    def _document(index: int, rng: np.random.Generator) -> Document:
        key, value = _hex(rng, KEY_DIGITS), _hex(rng, options.value_length)
        define = encode(f"Define Key={key} Value={value}. ")
        question = encode(f" Query Key={key} Value=")
        answered = encode(f" Query Key={key} Value={value}")
        answer = len(answered) - _common_length(question, answered)
        room = seq_length - len(prefix) - len(define) - len(answered)
        if room < 0:
            raise ValueError(f"seq_length={seq_length} has no room for a needle of {seq_length - room} tokens")
        depth = options.depths[index % len(options.depths)]
        filler = _filler(rng, filler_ids, room, options)
        before = round(depth * room)
        ids = np.concatenate([prefix, filler[:before], define, filler[before:], answered]).astype(np.int64)
        return Document(f"needle {index} depth {depth:g}", ids, np.arange(seq_length) >= seq_length - answer)

    return generate()


def _filler_ids(tokenizer: Any, encode: Any, options: NeedleOptions) -> np.ndarray:
    """The ids to draw from (random filler), or the text to cut from."""
    if options.filler == "random":
        special = set(tokenizer.all_special_ids)
        ids = [token for token in range(options.min_filler_id, len(tokenizer)) if token not in special]
        wanted = f"a token from min_filler_id={options.min_filler_id} on, the vocabulary has {len(tokenizer)}"
    else:
        text = options.filler_text
        if text is None:
            text = "\n\n\n".join(topic for _, topic in pydoc_topics())
        ids = encode(text)
        wanted = "filler_text with one token or more"
    if len(ids) == 0:
        raise ValueError(f"there is no filler: {options.filler!r} filler needs {wanted}")
    return np.asarray(ids, dtype=np.int64)


def _filler(rng: np.random.Generator, ids: np.ndarray, length: int, options: NeedleOptions) -> np.ndarray:
    if options.filler == "random":
        return rng.choice(ids, length)
    start = int(rng.integers(len(ids)))
    return np.take(ids, np.arange(start, start + length), mode="wrap")


def _hex(rng: np.random.Generator, digits: int) -> str:
    return f"{int(rng.integers(16**digits)):0{digits}x}"


def _common_length(first: np.ndarray, second: np.ndarray) -> int:
    """Number of ids that both begin with: the answer starts there, also where a tokenizer merges across the border."""
    length = min(len(first), len(second))
    differing = np.flatnonzero(first[:length] != second[:length])
    return int(differing[0]) if len(differing) else length
