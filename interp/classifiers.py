"""What makes a word SYNTAX: its frequency in a corpus or its part of speech; and the earlier study's way."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np

from interp.words import TokenTable, Words, find_words, normalise

__all__ = [
    "FrequencyClassifier",
    "PartOfSpeechClassifier",
    "SingleTokens",
    "WordClassifier",
    "single_tokens",
]

# The hundred most frequent words of English, in the order of the Oxford English Corpus.
_TOP_WORDS = tuple(
    "the be to of and a in that have I it for not on with he as you do at this but his by from they we say her she or "  # noqa: SIM905
    "an will my one all would there their what so up out if about who get which go me when make can like time no just "
    "him know take people into year your good some could them see other than then now look only come its over think "
    "also back after use two how our work first well way even new want because any these give day most us".split()
)
_PUNCTUATION = (".", ",", "?", "!", ":", ";", "-", "\n")
_CLOSED_CLASSES = frozenset({"ADP", "AUX", "CCONJ", "DET", "PART", "PRON", "SCONJ"})


class WordClassifier(Protocol):
    """Tells the words that count as SYNTAX; `describe` (JSON values, with a `name`) is kept with the labels."""

    def is_syntax(self, words: Words) -> np.ndarray:
        """Say for every word [W] whether it is SYNTAX, bool [W]."""

    def describe(self) -> dict[str, Any]:
        """Say what the answer depends on."""


@dataclass(frozen=True)
class FrequencyClassifier:
    """The `top` most frequent words (letters only) of a corpus are SYNTAX; ties go by the alphabet."""

    words: frozenset[str]
    corpus: str
    top: int

    @classmethod
    def from_ids(
        cls, ids: Iterable[Any], tokenizer: Any, *, top: int = 100, corpus: str = "unnamed"
    ) -> "FrequencyClassifier":
        """Count the words of some sequences of token ids; ValueError when they hold fewer than `top` words."""
        if isinstance(top, bool) or not isinstance(top, int) or top < 1:
            raise ValueError(f"top must be a number of words from 1 on, got {top!r}")
        table = TokenTable.from_tokenizer(tokenizer)
        counts: Counter[str] = Counter()
        for row in ids:
            words = find_words(row, table)
            counts.update(form for form, kind in zip(words.forms, words.kinds, strict=True) if kind == 0)
        if len(counts) < top:
            raise ValueError(f"top must be at most the {len(counts)} different words of the corpus, got {top}")
        ranked = sorted(counts, key=lambda word: (-counts[word], word))
        return cls(frozenset(ranked[:top]), corpus, top)

    def is_syntax(self, words: Words) -> np.ndarray:
        return np.fromiter((form in self.words for form in words.forms), dtype=bool, count=len(words.forms))

    def describe(self) -> dict[str, Any]:
        return {"name": "frequency", "corpus": self.corpus, "top": self.top}


@dataclass(frozen=True)
class PartOfSpeechClassifier:
    """Words with a closed-class tag are SYNTAX.

    tag: a function from the normalised words of the text, in order, to as many tags. closed: the tags that count,
    by default those of Universal Dependencies for closed classes. name: of the tagger, kept with the labels.
    """

    tag: Callable[[Sequence[str]], Sequence[str]]
    closed: frozenset[str] = _CLOSED_CLASSES
    name: str = "custom tagger"

    def is_syntax(self, words: Words) -> np.ndarray:
        tags = list(self.tag(list(words.forms)))
        if len(tags) != len(words.forms):
            raise ValueError(f"tag must give one tag per word ({len(words.forms)}), got {len(tags)}")
        return np.fromiter((tag in self.closed for tag in tags), dtype=bool, count=len(tags))

    def describe(self) -> dict[str, Any]:
        return {"name": "part of speech", "tagger": self.name, "closed": sorted(self.closed)}


@dataclass(frozen=True)
class SingleTokens:
    """Token ids that count as SYNTAX in the manner of the earlier study, and what was left out.

    ids: sorted. dropped: words of the list that this tokenizer cannot write as one token in any of the forms used.
    """

    ids: np.ndarray
    dropped: tuple[str, ...]


def single_tokens(tokenizer: Any, words: Iterable[str] = _TOP_WORDS) -> SingleTokens:
    """Find the tokens that are one of the hundred most frequent English words, or punctuation, all by themselves.

    A word counts as `word`, ` word` and `Word`, as in the earlier study; its ` Word` (after a space, capitalised) is
    missing there, and so it is here. Words of several tokens are dropped.
    """
    table = TokenTable.from_tokenizer(tokenizer)
    by_piece: dict[bytes, list[int]] = {}
    for i, piece in enumerate(table.pieces):
        if piece and table.used[i] and i not in table.special:
            by_piece.setdefault(piece, []).append(i)
    found: set[int] = set()
    dropped = []
    for word in words:
        forms = (word, " " + word, word.capitalize())
        ids = {i for form in forms for i in by_piece.get(form.encode(), ())}
        found |= ids
        if not ids:
            dropped.append(normalise(word))
    found |= {i for mark in _PUNCTUATION for i in by_piece.get(mark.encode(), ())}
    return SingleTokens(np.array(sorted(found), dtype=np.int64), tuple(dropped))
