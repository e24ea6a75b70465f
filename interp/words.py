"""Token ids back to bytes, and bytes back to words, for any tokenizer with a `tokenizers` backend."""

import functools
import json
import unicodedata
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import regex

__all__ = [
    "LETTERS",
    "NUMBER",
    "TokenTable",
    "Words",
    "byte_lengths",
    "find_words",
    "normalise",
    "token_bytes",
    "token_strings",
]

LETTERS, NUMBER = 0, 1

# Scripts written without spaces between words: a run of them is a whole sentence, so the token is the unit.
# The prolonged sound marks belong to no script of their own.
_SCRIPTS = (
    r"\p{Han}\p{Hiragana}\p{Katakana}ーｰ\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}"
    r"\p{Tai_Le}\p{New_Tai_Lue}\p{Tai_Tham}\p{Tai_Viet}\p{Javanese}\p{Balinese}"
)
_LETTER = rf"[[\p{{L}}\p{{M}}]--[{_SCRIPTS}]]"
_DIGIT = rf"[\p{{N}}--[{_SCRIPTS}]]"
_UNSPACED = rf"[[{_SCRIPTS}]&&[\p{{L}}\p{{M}}\p{{N}}]]"
_UNIT = regex.compile(
    rf"""(?V1)
    (?P<unspaced> {_UNSPACED}(?:{_UNSPACED}|\p{{M}})*+ )
  | (?P<digits> (?: {_LETTER}++{_DIGIT} | {_DIGIT}++(?:[.,:/]{_DIGIT}++)*+ ) (?:{_LETTER}|{_DIGIT})*+ )
  | (?P<word> {_LETTER}++(?:['’-]{_LETTER}++)*+ )
    """,
    regex.VERBOSE,
)
_HAS_LETTER = regex.compile(r"[\p{L}\p{M}]")
_BYTE_TOKEN = regex.compile(r"<0x([0-9A-Fa-f]{2})>")
_APOSTROPHES = str.maketrans("’ʼ＇", "'''")


@dataclass(frozen=True)
class TokenTable:
    """The bytes that every token id of a tokenizer stands for.

    pieces: bytes per id; special tokens and ids that are not in use hold b"".
    special: display text of the special (and unknown) tokens, by id.
    used: bool [ids], False for gaps in the id space.
    kind: "byte_level", "sentencepiece", "wordpiece", "suffix" or "word_level".
    exact: True if the joined pieces are the encoded text byte for byte, apart from a leading space; False if
        the tokenizer normalises the text (case, accents, white space) or has no way to write unknown bytes.
    leading_spaces: spaces that the tokenizer's own decoding drops from the start of a text.
    opens, closes: ids that begin (BOS) and end (EOS) a document.
    """

    pieces: tuple[bytes, ...]
    special: dict[int, str]
    used: np.ndarray
    kind: str
    exact: bool
    leading_spaces: int
    opens: frozenset[int]
    closes: frozenset[int]

    @classmethod
    def from_tokenizer(cls, tokenizer: Any) -> "TokenTable":
        """Read the table of a fast Transformers tokenizer or `tokenizers.Tokenizer`; a table stays as it is.

        Raises TypeError for tokenizers without a `tokenizers` backend, ValueError for those whose tokens do
        not tell where words begin.
        """
        if isinstance(tokenizer, cls):
            return tokenizer
        backend = getattr(tokenizer, "backend_tokenizer", tokenizer)
        if not (hasattr(backend, "to_str") and hasattr(backend, "get_vocab")):
            raise TypeError(
                "tokenizer must be a fast Transformers tokenizer, a tokenizers.Tokenizer or a TokenTable, "
                f"got {type(tokenizer).__name__}"
            )
        spec = json.loads(backend.to_str())
        scheme = _read_scheme(spec)
        added = {token["id"]: token for token in spec.get("added_tokens", ())}
        special = {i: token["content"] for i, token in added.items() if token["special"]}
        vocab = backend.get_vocab(with_added_tokens=True)
        by_id = {i: token for token, i in vocab.items()}
        for i in (*getattr(tokenizer, "all_special_ids", ()), *_unknown_ids(spec["model"], vocab)):
            special.setdefault(i, by_id[i])
        pieces = [b""] * (max(by_id, default=-1) + 1)
        used = np.zeros(len(pieces), dtype=bool)
        for i, token in by_id.items():
            used[i] = True
            if i not in special:
                # Added tokens are matched in the text, so they are not byte-coded in a byte-level vocabulary.
                literal = i in added and scheme.kind == "byte_level"
                pieces[i] = token.encode() if literal else scheme.to_bytes(token)
        return cls(
            pieces=tuple(pieces),
            special=special,
            used=used,
            kind=scheme.kind,
            exact=scheme.exact,
            leading_spaces=scheme.leading_spaces,
            opens=_ids(tokenizer, "bos_token_id"),
            closes=_ids(tokenizer, "eos_token_id"),
        )

    def check_ids(self, ids: Any) -> np.ndarray:
        """Return `ids` as int64 [T]; ValueError or TypeError if they are not ids of this tokenizer."""
        array = np.asarray(ids)
        if array.ndim != 1:
            raise ValueError(f"ids must have one dimension, got shape {array.shape}")
        if array.size == 0:
            return array.astype(np.int64)
        if not np.issubdtype(array.dtype, np.integer):
            raise TypeError(f"ids must be integers, got dtype {array.dtype}")
        array = array.astype(np.int64)
        inside = (array >= 0) & (array < len(self.pieces))
        bad = array[~inside] if not inside.all() else array[~self.used[array]]
        if bad.size:
            raise ValueError(f"ids must be ids of the tokenizer (0 to {len(self.pieces) - 1}), got {int(bad[0])}")
        return array


@dataclass(frozen=True)
class Words:
    """The words of a token sequence, in the order of the text.

    of_token: int64 [T], index of the word that the token belongs to (the first one that it has a byte of), -1
        for tokens without a byte of a word.
    is_start: bool [T], True at the first token that belongs to its word.
    forms: normalised text of every word [W].
    kinds: uint8 [W], LETTERS or NUMBER (no letter in it).
    begin, end: int64 [W], index of the tokens that hold the first and the last byte of the word.
    """

    of_token: np.ndarray
    is_start: np.ndarray
    forms: list[str]
    kinds: np.ndarray
    begin: np.ndarray
    end: np.ndarray


def token_strings(tokenizer: Any, ids: Any) -> list[str]:
    """Give the text of each token for display, on its own: bytes that are no UTF-8 by themselves show as U+FFFD.

    Special tokens show their own name. `tokenizer` may be a TokenTable.
    """
    table = TokenTable.from_tokenizer(tokenizer)
    ids = table.check_ids(ids).tolist()
    text = {i: table.special.get(i, table.pieces[i].decode("utf-8", "replace")) for i in set(ids)}
    return [text[i] for i in ids]


def token_bytes(tokenizer: Any, ids: Any) -> list[bytes]:
    """Give the bytes of each token of a text that starts at the first id; joined they are the UTF-8 text.

    Special tokens give b"". A leading space which the tokenizer adds to every text is left out of the first
    token, as in the tokenizer's own decoding. `tokenizer` may be a TokenTable.
    """
    table = TokenTable.from_tokenizer(tokenizer)
    pieces = [table.pieces[i] for i in table.check_ids(ids).tolist()]
    first = next((t for t, piece in enumerate(pieces) if piece), None)
    if first is not None:
        piece = pieces[first]
        spaces = len(piece) - len(piece.lstrip(b" "))
        pieces[first] = piece[min(spaces, table.leading_spaces) :]
    return pieces


def byte_lengths(tokenizer: Any, ids: Any) -> np.ndarray:
    """Count the bytes of each token of a text, int64 [T]; nats per byte = sum of losses / sum of lengths."""
    pieces = token_bytes(tokenizer, ids)
    return np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))


def normalise(word: str) -> str:
    """Apply NFKC and case folding, and write every apostrophe as U+0027."""
    folded = unicodedata.normalize("NFKC", word).casefold()
    return unicodedata.normalize("NFKC", folded).translate(_APOSTROPHES)


def find_words(ids: Any, tokenizer: Any, breaks: np.ndarray | None = None) -> Words:
    """Rebuild the words of a token sequence from the bytes of its tokens.

    A word is a run of letters and marks, with inner apostrophes and hyphens; a run of letters and digits with
    at least one digit is one word too ("1,000.5", "3rd", "9f3a"). In scripts without spaces the word is the
    token, or the shortest run of tokens that holds whole characters. No word crosses a special token.

    ids [T]; breaks: bool [T], True at tokens before which a word must end. `tokenizer` may be a TokenTable.
    """
    table = TokenTable.from_tokenizer(tokenizer)
    ids = table.check_ids(ids)
    data, start, stop = _lay_out(ids, table, breaks)
    left, right, forms, kinds = _find_units(data, start[stop > start])
    word = np.searchsorted(right, start, side="right")
    reached = np.append(left, len(data))[word]
    belongs = (stop > start) & (reached < stop)
    of_token = np.where(belongs, word, -1)
    is_start = belongs & (of_token != np.concatenate([[-1], np.maximum.accumulate(of_token)])[:-1])
    begin = np.searchsorted(stop, left, side="right")
    end = np.searchsorted(stop, right - 1, side="right")
    return Words(of_token, is_start, forms, kinds, begin, end)


@dataclass(frozen=True)
class _Scheme:
    kind: str
    exact: bool
    leading_spaces: int
    to_bytes: Callable[[str], bytes]


def _read_scheme(spec: dict[str, Any]) -> _Scheme:
    """How the vocabulary of a serialised tokenizer writes text, from its decoder, pre-tokenizer and model."""
    decoders = list(_flatten(spec.get("decoder"), "decoders"))
    parts = decoders + list(_flatten(spec.get("pre_tokenizer"), "pretokenizers"))
    types = {part["type"] for part in parts}
    model = spec["model"]
    exact = _keeps_text(spec.get("normalizer"))
    suffix = next((part["suffix"] for part in decoders if part["type"] == "BPEDecoder"), None)
    suffix = suffix or model.get("end_of_word_suffix") or ""
    if "ByteLevel" in types:
        to_bytes = functools.partial(_byte_level_bytes, suffix=suffix)
        return _Scheme("byte_level", exact and not suffix, 0, to_bytes)
    space = _space_mark(parts)
    if space is not None or model.get("byte_fallback"):
        fallback = bool(model.get("byte_fallback"))
        to_bytes = functools.partial(_sentencepiece_bytes, space=space, fallback=fallback)
        return _Scheme("sentencepiece", exact and fallback, _dropped_spaces(decoders), to_bytes)
    prefix = model.get("continuing_subword_prefix") or ""
    if model["type"] == "WordPiece" and prefix:
        return _Scheme("wordpiece", False, 1, functools.partial(_prefixed_bytes, prefix=prefix))
    if suffix:
        return _Scheme("suffix", False, 0, functools.partial(_suffixed_bytes, suffix=suffix))
    if model["type"] == "WordLevel":
        return _Scheme("word_level", False, 1, lambda token: b" " + token.encode())
    raise ValueError(
        f"cannot rebuild words: this {model['type']} tokenizer marks neither spaces nor word parts (decoder "
        f"{sorted(part['type'] for part in decoders)}); byte-level, SentencePiece, WordPiece, "
        "end-of-word-suffix and word-level tokenizers are supported"
    )


def _flatten(part: dict[str, Any] | None, key: str) -> Iterator[dict[str, Any]]:
    if part is None:
        return
    if part["type"] == "Sequence":
        for inner in part[key]:
            yield from _flatten(inner, key)
    else:
        yield part


def _keeps_text(normalizer: dict[str, Any] | None) -> bool:
    """True if the normalizer only writes spaces in another way."""
    for step in _flatten(normalizer, "normalizers"):
        marks_space = step["type"] == "Replace" and step.get("pattern") == {"String": " "}
        if step["type"] != "Prepend" and not marks_space:
            return False
    return True


def _space_mark(parts: list[dict[str, Any]]) -> str | None:
    for part in parts:
        if part["type"] == "Metaspace":
            return part["replacement"]
        if part["type"] == "Replace" and part.get("content") == " ":
            return part["pattern"].get("String")
    return None


def _dropped_spaces(decoders: list[dict[str, Any]]) -> int:
    for part in decoders:
        if part["type"] == "Metaspace" and part.get("prepend_scheme", "always") != "never":
            return 1
        if part["type"] == "Strip" and part["content"] == " ":
            return part["start"]
    return 0


def _unknown_ids(model: dict[str, Any], vocab: dict[str, int]) -> list[int]:
    """The id that stands for text which the vocabulary cannot write: its bytes are lost."""
    if model.get("unk_id") is not None:
        return [model["unk_id"]]
    return [vocab[model["unk_token"]]] if model.get("unk_token") in vocab else []


def _ids(tokenizer: Any, name: str) -> frozenset[int]:
    value = getattr(tokenizer, name, None)
    return frozenset() if value is None else frozenset([value])


@functools.cache
def _byte_of_character() -> dict[str, int]:
    """The byte-level alphabet: printable Latin-1 bytes are themselves, the others follow from U+0100 on."""
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    hidden = [byte for byte in range(256) if byte not in printable]
    table = {chr(byte): byte for byte in printable}
    table.update({chr(256 + n): byte for n, byte in enumerate(hidden)})
    return table


def _byte_level_bytes(token: str, suffix: str) -> bytes:
    ends_word = bool(suffix) and token.endswith(suffix)
    stem = token[: -len(suffix)] if ends_word else token
    table = _byte_of_character()
    coded = all(character in table for character in stem)
    data = bytes(table[character] for character in stem) if coded else stem.encode()
    return data + b" " if ends_word else data


def _sentencepiece_bytes(token: str, space: str | None, fallback: bool) -> bytes:
    match = _BYTE_TOKEN.fullmatch(token) if fallback else None
    if match:
        return bytes.fromhex(match.group(1))
    return (token.replace(space, " ") if space else token).encode()


def _prefixed_bytes(token: str, prefix: str) -> bytes:
    return token[len(prefix) :].encode() if token.startswith(prefix) and token != prefix else b" " + token.encode()


def _suffixed_bytes(token: str, suffix: str) -> bytes:
    return token[: -len(suffix)].encode() + b" " if token.endswith(suffix) else token.encode()


def _lay_out(ids: np.ndarray, table: TokenTable, breaks: np.ndarray | None) -> tuple[bytes, np.ndarray, np.ndarray]:
    """Join the pieces, with a line feed at every special token and break; bytes where tokens start, stop."""
    pieces = [table.pieces[i] for i in ids.tolist()]
    length = np.fromiter(map(len, pieces), dtype=np.int64, count=len(pieces))
    gap = np.isin(ids, list(table.special))
    if breaks is not None:
        gap |= breaks
    for t in np.flatnonzero(gap):
        pieces[t] = b"\n" + pieces[t]
    stop = np.cumsum(length + gap)
    return b"".join(pieces), stop - length, stop


def _find_units(data: bytes, starts: np.ndarray) -> tuple[np.ndarray, np.ndarray, list[str], np.ndarray]:
    """Byte spans, normalised forms and kinds of the words in `data`, whose tokens start at bytes `starts`."""
    text = data.decode("utf-8", "surrogateescape")
    offset = _byte_offsets(text)
    is_whole = np.zeros(len(data) + 1, dtype=bool)
    is_whole[offset] = True
    whole = set(starts[is_whole[starts]].tolist())
    fold = functools.cache(normalise)
    left, right, forms, kinds = [], [], [], []
    for match in _UNIT.finditer(text):
        first, last = match.span()
        for a, b in _split(first, last, offset, whole) if match.lastgroup == "unspaced" else ((first, last),):
            left.append(a)
            right.append(b)
            forms.append(fold(text[a:b]))
            number = match.lastgroup != "word" and not _HAS_LETTER.search(text, a, b)
            kinds.append(NUMBER if number else LETTERS)
    left, right = np.array(left, dtype=np.int64), np.array(right, dtype=np.int64)
    return offset[left], offset[right], forms, np.array(kinds, dtype=np.uint8)


def _byte_offsets(text: str) -> np.ndarray:
    """Byte offset of every character and of the end, int64 [characters + 1]; an escaped byte is one."""
    code = np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    width = 1 + (code > 0x7F).astype(np.int64) + (code > 0x7FF) + (code > 0xFFFF)
    width[(code >= 0xDC80) & (code <= 0xDCFF)] = 1
    return np.concatenate([[0], np.cumsum(width)])


def _split(first: int, last: int, offset: np.ndarray, whole: set[int]) -> Iterable[tuple[int, int]]:
    """Cut a run of characters wherever a token begins with a whole character."""
    cuts = [first, *(c for c in range(first + 1, last) if int(offset[c]) in whole), last]
    return zip(cuts[:-1], cuts[1:], strict=True)
