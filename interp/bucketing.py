"""Label every token as syntax, retrieval, novelty or other, from the text alone."""

import hashlib
import os
from collections.abc import Iterable
from dataclasses import dataclass
from enum import IntEnum
from pathlib import Path
from typing import Any

import numpy as np

from interp.classifiers import WordClassifier, single_tokens
from interp.files import read_text
from interp.words import NUMBER, TokenTable, Words, find_words, normalise

__all__ = [
    "BUCKET_NAMES",
    "Bucket",
    "StopList",
    "TokenBuckets",
    "bucket_tokens",
    "bundled_stop_lists",
    "load_stop_words",
    "single_token_buckets",
]


class Bucket(IntEnum):
    """What a token's word is in its document.

    SYNTAX: a closed-class word (stop list). RETRIEVAL: a content word that occurred before in the document.
    NOVELTY: a content word at its first occurrence. OTHER: punctuation, white space, special tokens.
    """

    SYNTAX = 0
    RETRIEVAL = 1
    NOVELTY = 2
    OTHER = 3


_STOP_WORDS = Path(__file__).parent / "stop_words"
BUCKET_NAMES = tuple(bucket.name for bucket in Bucket)


@dataclass(frozen=True)
class StopList:
    """Words that count as SYNTAX, normalised, with name, version (None unless the file names one) and sha256."""

    name: str
    version: str | None
    sha256: str
    words: frozenset[str]

    def is_syntax(self, words: Words) -> np.ndarray:
        """Say for every word whether it, or it without its possessive, is in the list, bool [W]."""
        known = {form: form in self.words or _stem(form) in self.words for form in set(words.forms)}
        return np.fromiter((known[form] for form in words.forms), dtype=bool, count=len(words.forms))

    def describe(self) -> dict[str, Any]:
        """Give name, version, sha256 and size."""
        return {
            "stop_words": self.name,
            "stop_words_version": self.version,
            "stop_words_sha256": self.sha256,
            "stop_words_size": len(self.words),
        }


@dataclass(frozen=True)
class TokenBuckets:
    """Labels of a token sequence.

    labels: uint8 [T], values of `Bucket`; all tokens of a word share its label.
    word_id: int32 [T], number of the token's word in the order of the text, -1 for tokens outside words.
    is_word_start: bool [T], True at the first token of a word; the others are easier to predict.
    meta: what the labels depend on, ready for JSON: stop_words, stop_words_version, stop_words_sha256,
        stop_words_size (or `classifier`, the description of another one), numbers, min_lag, tokenizer_kind,
        byte_exact.
    """

    labels: np.ndarray
    word_id: np.ndarray
    is_word_start: np.ndarray
    meta: dict[str, Any]


def bucket_tokens(
    ids: Any,
    tokenizer: Any,
    *,
    stop_words: str | os.PathLike | Iterable[str] | StopList = "en",
    numbers: str = "content",
    min_lag: int = 0,
    doc_ids: Any = None,
    classifier: WordClassifier | None = None,
) -> TokenBuckets:
    """Label every token of one or several documents.

    A word was seen before if an equal word (normalised, without possessive 's) ended at least `min_lag`
    tokens before the first token of this one, in the same document. The label of a token may depend on later
    tokens of its own word, so it serves analysis; it is not a causal feature.

    Args:
        ids: token ids [T].
        tokenizer: a fast Transformers tokenizer, a `tokenizers.Tokenizer`, or a `TokenTable` of one.
        stop_words: as for `load_stop_words`.
        numbers: "content" (numbers are retrieval or novelty) or "other".
        min_lag: in tokens; the mini-batch size demands an occurrence in an earlier mini-batch.
        doc_ids: integers [T], equal within a document. Without them a document begins at the start, at each
            BOS and after each EOS token.
        classifier: what makes a word SYNTAX, instead of `stop_words` (`interp.classifiers`).

    Raises ValueError or TypeError for ids of another tokenizer, shapes that differ and unknown options.
    """
    table = TokenTable.from_tokenizer(tokenizer)
    ids = table.check_ids(ids)
    classifier = classifier or load_stop_words(stop_words)
    described = classifier.describe()
    if numbers not in ("content", "other"):
        raise ValueError(f'numbers must be "content" or "other", got {numbers!r}')
    if isinstance(min_lag, bool) or not isinstance(min_lag, int | np.integer):
        raise TypeError(f"min_lag must be an integer, got {min_lag!r}")
    if min_lag < 0:
        raise ValueError(f"min_lag must be 0 or more tokens, got {min_lag}")
    documents = _documents(ids, table, doc_ids)
    words = find_words(ids, table, breaks=np.diff(documents, prepend=documents[:1]) != 0)
    labels = np.full(len(ids), Bucket.OTHER, dtype=np.uint8)
    inside = words.of_token >= 0
    syntax = np.asarray(classifier.is_syntax(words))
    if syntax.shape != (len(words.forms),) or syntax.dtype != bool:
        raise ValueError(f"classifier must give bool [{len(words.forms)}], got {syntax.dtype} {list(syntax.shape)}")
    labels[inside] = _label_words(words, documents, syntax, numbers, min_lag)[words.of_token[inside]]
    word_id = np.full(len(ids), -1, dtype=np.int32)
    word_id[inside] = np.cumsum(words.is_start)[inside] - 1
    meta = {
        **(described if isinstance(classifier, StopList) else {"classifier": described}),
        "numbers": numbers,
        "min_lag": int(min_lag),
        "tokenizer_kind": table.kind,
        "byte_exact": table.exact,
    }
    return TokenBuckets(labels, word_id, words.is_start, meta)


def single_token_buckets(ids: Any, tokenizer: Any, *, doc_ids: Any = None) -> TokenBuckets:
    """Label tokens in the manner of the earlier study, for comparison with its figures.

    SYNTAX are the tokens of `interp.classifiers.single_tokens`; of the others a token id seen before in the
    document is RETRIEVAL, its first occurrence NOVELTY. Parts of words are judged by themselves. Special tokens,
    which fall under NOVELTY there, are OTHER here. Arguments and errors as in `bucket_tokens`.
    """
    table = TokenTable.from_tokenizer(tokenizer)
    ids = table.check_ids(ids)
    chosen = single_tokens(table)
    documents = _documents(ids, table, doc_ids)
    _, first, inverse = np.unique(np.stack([documents, ids]), axis=1, return_index=True, return_inverse=True)
    seen = first[inverse.reshape(-1)] < np.arange(len(ids))
    labels = np.where(seen, Bucket.RETRIEVAL, Bucket.NOVELTY).astype(np.uint8)
    labels[np.isin(ids, chosen.ids)] = Bucket.SYNTAX
    labels[np.isin(ids, list(table.special))] = Bucket.OTHER
    words = find_words(ids, table, breaks=np.diff(documents, prepend=documents[:1]) != 0)
    word_id = np.where(words.of_token >= 0, np.cumsum(words.is_start) - 1, -1).astype(np.int32)
    described = {"name": "single tokens", "syntax_tokens": len(chosen.ids), "dropped_words": list(chosen.dropped)}
    meta = {"classifier": described, "tokenizer_kind": table.kind, "byte_exact": table.exact}
    return TokenBuckets(labels, word_id, words.is_start, meta)


def bundled_stop_lists() -> list[str]:
    """Name the stop lists that come with the package, by their language codes."""
    return sorted(file.stem for file in _STOP_WORDS.iterdir() if file.suffix == ".txt")


def load_stop_words(stop_words: str | os.PathLike | Iterable[str] | StopList) -> StopList:
    """Load a stop list: a bundled one by its language code, a file by its path, or any iterable of words.

    A file holds one word per line; lines that begin with # are comments, and the first may end in "version X".
    The sha256 is that of the text of the file, or of the sorted normalised words of an iterable joined by line
    feeds. Raises ValueError for an unknown name and a file that cannot be read, TypeError for anything else.
    """
    if isinstance(stop_words, StopList):
        return stop_words
    if isinstance(stop_words, str):
        names = bundled_stop_lists()
        if stop_words not in names:
            raise ValueError(f"stop_words must be a path, words or one of {names}, got {stop_words!r}")
        return _read_stop_list(_STOP_WORDS / f"{stop_words}.txt", stop_words)
    if isinstance(stop_words, os.PathLike):
        return _read_stop_list(Path(stop_words), Path(stop_words).name)
    if not isinstance(stop_words, Iterable) or isinstance(stop_words, bytes):
        raise TypeError(f"stop_words must be a name, a path or an iterable of words, got {type(stop_words).__name__}")
    words = list(stop_words)
    for word in words:
        if not isinstance(word, str):
            raise TypeError(f"stop_words must hold strings, got {word!r}")
    normal = frozenset(map(normalise, words))
    digest = hashlib.sha256("\n".join(sorted(normal)).encode()).hexdigest()
    return StopList("custom", None, digest, normal)


def _read_stop_list(file: Path, name: str) -> StopList:
    text = read_text(file)
    lines = [line.strip() for line in text.splitlines()]
    words = [line for line in lines if line and not line.startswith("#")]
    several = next((word for word in words if len(word.split()) > 1), None)
    if several is not None:
        raise ValueError(f"stop list {str(file)!r} must hold one word per line, got {several!r}")
    first = lines[0] if lines and lines[0].startswith("#") else ""
    version = first.rpartition("version ")[2] if "version " in first else None
    return StopList(name, version, hashlib.sha256(text.encode()).hexdigest(), frozenset(map(normalise, words)))


def _documents(ids: np.ndarray, table: TokenTable, doc_ids: Any) -> np.ndarray:
    """Document of every token, int64 [T]."""
    if doc_ids is None:
        begins = np.isin(ids, list(table.opens))
        begins[1:] |= np.isin(ids[:-1], list(table.closes))
        return np.cumsum(begins)
    documents = np.asarray(doc_ids)
    if documents.shape != ids.shape:
        raise ValueError(f"doc_ids must have the shape of ids {ids.shape}, got {documents.shape}")
    if documents.size and not np.issubdtype(documents.dtype, np.integer):
        raise TypeError(f"doc_ids must be integers, got dtype {documents.dtype}")
    return documents.astype(np.int64)


def _label_words(words: Words, documents: np.ndarray, syntax: np.ndarray, numbers: str, min_lag: int) -> np.ndarray:
    """Bucket of every word, uint8 [W]."""
    vocabulary: dict[str, int] = {}
    form = np.array([vocabulary.setdefault(w, len(vocabulary)) for w in words.forms], dtype=np.int64)
    keys: dict[str, int] = {}
    key_of_form = np.array([keys.setdefault(_stem(w), len(keys)) for w in vocabulary], dtype=np.int64)
    document = np.unique(documents, return_inverse=True)[1][words.begin]
    occurrence = document * len(keys) + key_of_form[form]
    _, first, inverse = np.unique(occurrence, return_index=True, return_inverse=True)
    # The first occurrence is the farthest one, so it decides for any lag.
    first = first[inverse]
    lag = words.begin - words.end[first]
    seen = (first < np.arange(len(first))) & (lag >= min_lag)
    labels = np.where(seen, Bucket.RETRIEVAL, Bucket.NOVELTY).astype(np.uint8)
    labels[syntax] = Bucket.SYNTAX
    if numbers == "other":
        labels[words.kinds == NUMBER] = Bucket.OTHER
    return labels


def _stem(form: str) -> str:
    """Drop a possessive 's; the bare apostrophe of a plural is never part of a word."""
    return form.removesuffix("'s")
