"""Documents to read: natural text, retrieval documents and tokens made beforehand, as lazy streams."""

import logging
from collections.abc import Callable, Iterable, Iterator, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from interp.documents import Document, pydoc_topics, text_encoder
from interp.files import read_text
from interp.needle import NeedleOptions, needle_documents

DATASET_TYPES = ("pydoc", "text", "needle", "synthetic", "repeated", "pg19", "wikitext", "hub", "tokens")
DEFAULT_SEQ_LENGTH = 2048
DEFAULT_SPLIT = "validation"
HUB_DEFAULTS = {
    "pg19": {"path": "emozilla/pg19", "config": None, "name_column": "short_book_title"},
    "wikitext": {"path": "Salesforce/wikitext", "config": "wikitext-103-raw-v1", "name_column": None},
    "hub": {"path": None, "config": None, "name_column": None},
}
_OF_TEXTS = frozenset({"max_chars", "pieces_per_text"})
_OF_DATASETS = _OF_TEXTS | {"path", "split", "config_name", "text_column"}
USED_OPTIONS = {
    "pydoc": frozenset({"pieces_per_text"}),
    "text": _OF_TEXTS | {"path"},
    "needle": frozenset({"needle"}),
    "synthetic": frozenset({"needle"}),
    "repeated": frozenset(),
    "tokens": frozenset({"path", "pieces_per_text"}),
    **dict.fromkeys(HUB_DEFAULTS, _OF_DATASETS),
}
REPEATED_SENTENCE = "The quick brown fox jumps over the lazy dog. "
_CHARS_PER_TOKEN = 16  # more than a token of natural text has
_LEAST_CHARS = 200_000
_BUILDERS = {".parquet": "parquet", ".json": "json", ".jsonl": "json", ".csv": "csv"}

log = logging.getLogger(__name__)


def load_corpus(
    dataset_type: str,
    tokenizer: Any,
    *,
    path: str | Path | Sequence[str | Path] | None = None,
    seq_length: int = DEFAULT_SEQ_LENGTH,
    max_documents: int | None = None,
    max_chars: int | None = None,
    pieces_per_text: int | None = None,
    split: str | None = None,
    config_name: str | None = None,
    text_column: str | None = None,
    seed: int = 0,
    needle: NeedleOptions | None = None,
) -> Iterator[Document]:
    """Open a corpus and give its documents one by one, each of at most `seq_length` tokens.

    `dataset_type` is one of

    - `pydoc`: the language reference that comes with Python (its topics, joined until they are long enough);
    - `text`: UTF-8 files; `path` is a file, several, or a folder (its *.txt files);
    - `needle` (or `synthetic`): retrieval documents of `interp.needle`, from `seed` and `needle` (NeedleOptions);
    - `repeated`: one sentence again and again; each of the `max_documents` documents begins a token later in it;
    - `pg19`, `wikitext`, `hub`: a dataset read as a stream; `path` is a Hub id, a local file or folder of the same
      columns; `split` (validation), `config_name` and `text_column` (text) say which part of it;
    - `tokens`: made beforehand; `path` is a 1-D integer .npy (memory-mapped) or a parquet with `input_ids`.

    Each text is cut into pieces, all first pieces before all second ones; `pieces_per_text` limits them (default: 1
    for datasets, else no limit). Only a first piece may be shorter than `seq_length`. If the tokenizer begins texts
    with a BOS token, so does every piece. At most `max_chars` characters of each text are read; without it 200,000,
    or 16 per token of all the pieces that `max_documents` and `pieces_per_text` allow where that is more, which for
    files with neither of the two is no limit. Texts shorter than two tokens are skipped and counted in a warning.
    ValueError for arguments that are wrong or that the type has no use for (`USED_OPTIONS`), and when no text is
    long enough.
    """
    if dataset_type not in DATASET_TYPES:
        raise ValueError(f"dataset_type must be one of {list(DATASET_TYPES)}, got {dataset_type!r}")
    limits = {"seq_length": seq_length, "max_documents": max_documents, "max_chars": max_chars}
    _check_limits(**limits, pieces_per_text=pieces_per_text)
    given = {"path": path, "max_chars": max_chars, "pieces_per_text": pieces_per_text, "split": split}
    given |= {"config_name": config_name, "text_column": text_column, "needle": needle}
    _refuse_unused(dataset_type, given)
    if dataset_type in ("needle", "synthetic"):
        return needle_documents(
            tokenizer, seq_length=seq_length, max_documents=max_documents, seed=seed, options=needle
        )
    if dataset_type == "repeated":
        return _repeated(tokenizer, seq_length, max_documents)
    if dataset_type == "tokens":
        texts, prefix = _token_files(_existing(path)), []
    else:
        if dataset_type in HUB_DEFAULTS:
            pieces_per_text = pieces_per_text or 1
        encode, prefix = text_encoder(tokenizer, max_chars or _most_chars(seq_length, max_documents, pieces_per_text))
        room = seq_length - len(prefix)
        if dataset_type == "pydoc":
            texts = _pydoc(encode, room)
        elif dataset_type == "text":
            texts = _text_files(_existing(path, suffix=".txt"), encode)
        else:
            rows = _open_dataset(dataset_type, path, split or DEFAULT_SPLIT, config_name, text_column or "text")
            texts = ((name, encode(text)) for name, text in rows)
    documents = _cut(texts, np.array(prefix, np.int64), seq_length, pieces_per_text, dataset_type)
    return islice(documents, max_documents)


def _repeated(tokenizer: Any, seq_length: int, max_documents: int | None) -> Iterator[Document]:
    if max_documents is None:
        raise ValueError("repeated documents have no end: max_documents is needed")
    encode, prefix = text_encoder(tokenizer)
    sentence = encode(REPEATED_SENTENCE)

    def generate() -> Iterator[Document]:
        for index in range(max_documents):
            ids = np.resize(np.roll(sentence, -index), seq_length - len(prefix))
            yield Document(f"repeated {index}", np.concatenate([prefix, ids]).astype(np.int64))

    return generate()


def _cut(
    texts: Iterable[tuple[str, np.ndarray]],
    prefix: np.ndarray,
    seq_length: int,
    pieces_per_text: int | None,
    dataset_type: str,
) -> Iterator[Document]:
    room = seq_length - len(prefix)
    rest: list[tuple[str, np.ndarray]] = []
    short: list[str] = []
    empty = True
    try:
        for name, ids in texts:
            if len(ids) < 2:
                short.append(name)
                continue
            empty = False
            yield Document(name, np.concatenate([prefix, ids[:room].astype(np.int64)]))
            if pieces_per_text != 1 and len(ids) >= 2 * room:
                rest.append((name, ids[room:]))
    finally:
        # Said here because whoever has enough documents closes the stream before its end.
        if short and not empty:
            log.warning("skipped %d text(s) shorter than two tokens: %s", len(short), _some(short))
    if empty:
        reason = f": {_some(short)} shorter than two tokens" if short else ""
        raise ValueError(f"the {dataset_type!r} corpus holds no text of two tokens or more{reason}")
    piece = 1
    while rest and (pieces_per_text is None or piece < pieces_per_text):
        for name, ids in rest:
            yield Document(f"{name} [{piece}]", np.concatenate([prefix, ids[:room].astype(np.int64)]))
        rest = [(name, ids[room:]) for name, ids in rest if len(ids) >= 2 * room]
        piece += 1


def _some(names: Sequence[str]) -> str:
    shown = ", ".join(map(repr, names[:5]))
    return shown if len(names) <= 5 else f"{shown} and {len(names) - 5} more"


def _most_chars(seq_length: int, max_documents: int | None, pieces_per_text: int | None) -> int | None:
    """How much of a text can matter: None for all of it."""
    limits = [limit for limit in (max_documents, pieces_per_text) if limit is not None]
    return max(_LEAST_CHARS, _CHARS_PER_TOKEN * seq_length * min(limits)) if limits else None


def _pydoc(encode: Callable[[str], np.ndarray], room: int) -> Iterator[tuple[str, np.ndarray]]:
    names: list[str] = []
    parts: list[np.ndarray] = []
    whole = False
    for name, text in pydoc_topics():
        names.append(name)
        parts.append(encode(text.strip() + "\n\n\n"))
        if sum(map(len, parts)) >= room:
            whole = True
            yield _joined_name(names), np.concatenate(parts)
            names, parts = [], []
    if not whole:
        yield _joined_name(names), np.concatenate(parts)


def _joined_name(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{names[0]} to {names[-1]}"


def _text_files(files: Sequence[Path], encode: Callable[[str], np.ndarray]) -> Iterator[tuple[str, np.ndarray]]:
    for file in files:
        yield file.name, encode(read_text(file))


def _token_files(files: Sequence[Path]) -> Iterator[tuple[str, np.ndarray]]:
    for file in files:
        if file.suffix == ".npy":
            yield file.name, _read_npy(file)
        elif file.suffix == ".parquet":
            yield from _read_token_parquet(file)
        else:
            raise ValueError(f"tokens are read from .npy and .parquet files, got {str(file)!r}")


def _read_npy(file: Path) -> np.ndarray:
    try:
        ids = np.load(file, mmap_mode="r", allow_pickle=False)
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as an array: {error}") from error
    if ids.ndim != 1 or not np.issubdtype(ids.dtype, np.integer):
        raise ValueError(f"{str(file)!r} must hold a 1-D integer array, got {ids.dtype} {list(ids.shape)}")
    return ids


def _read_token_parquet(file: Path) -> Iterator[tuple[str, np.ndarray]]:
    try:
        with pq.ParquetFile(file) as parquet:
            columns = {field.name: field.type for field in parquet.schema_arrow}
            dtype = columns.get("input_ids", pa.null())
            if not (pa.types.is_list(dtype) or pa.types.is_large_list(dtype)) or not pa.types.is_integer(
                dtype.value_type
            ):
                raise ValueError(f"it needs a column input_ids of lists of integers, it has {columns}")
            row = 0
            for batch in parquet.iter_batches(batch_size=16, columns=["input_ids"]):
                for ids in batch.column(0):
                    yield f"{file.name} row {row}", ids.values.to_numpy().astype(np.int64)
                    row += 1
    except (OSError, pa.ArrowException, ValueError, AttributeError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as tokens: {error}") from error


def _open_dataset(
    dataset_type: str, path: Any, split: str, config_name: str | None, text_column: str
) -> Iterator[tuple[str, str]]:
    import datasets

    defaults = HUB_DEFAULTS[dataset_type]
    source = str(path or defaults["path"] or "")
    if not source:
        raise ValueError("dataset_type 'hub' needs path: the id of a dataset")
    local = Path(source)
    if local.is_file():
        if local.suffix not in _BUILDERS:
            raise ValueError(f"dataset files are {sorted(_BUILDERS)}, got path {source!r}")
        arguments = {"path": _BUILDERS[local.suffix], "data_files": {split: source}, "name": config_name}
    elif local.is_dir():
        arguments = {"path": source, "name": config_name}
    else:
        arguments = {"path": source, "name": config_name or (defaults["config"] if path is None else None)}
    try:
        rows = datasets.load_dataset(**arguments, split=split, streaming=True)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"dataset {source!r}, split {split!r}, could not be opened: {error} "
            "(without network, dataset_type 'pydoc' and 'needle' always work)"
        ) from error
    texts = _dataset_texts(rows, source, text_column, defaults["name_column"])
    return _wikitext_articles(texts) if dataset_type == "wikitext" else texts


def _dataset_texts(
    rows: Iterable[dict[str, Any]], source: str, text_column: str, name_column: str | None
) -> Iterator[tuple[str, str]]:
    for index, row in enumerate(rows):
        if not isinstance(row.get(text_column), str):
            raise ValueError(f"dataset {source!r} has no text in column {text_column!r}: it has {sorted(row)}")
        yield str(row.get(name_column) or f"row {index}"), row[text_column]


def _wikitext_articles(lines: Iterable[tuple[str, str]]) -> Iterator[tuple[str, str]]:
    """Joins lines into articles, which begin with ` = Title = ` (sections have more equals signs)."""
    title, article = "", []
    for _, line in lines:
        heading = line.strip()
        if heading.startswith("= ") and heading.endswith(" =") and not heading.startswith("= ="):
            if article:
                yield title, "".join(article)
            title, article = heading[2:-2], []
        article.append(line if line.endswith("\n") else line + "\n")
    if article:
        yield title, "".join(article)


def _existing(path: Any, suffix: str | None = None) -> list[Path]:
    """The files named by `path`, folders replaced by their files (of that suffix), in order."""
    files: list[Path] = []
    for entry in [path] if isinstance(path, str | Path) else path:
        entry = Path(entry)
        if not entry.exists():
            raise ValueError(f"path {str(entry)!r} does not exist")
        suffixes = {suffix} if suffix else {".npy", ".parquet"}
        inside = sorted(file for file in entry.rglob("*") if file.suffix in suffixes) if entry.is_dir() else [entry]
        if not inside:
            raise ValueError(f"folder {str(entry)!r} holds no {' or '.join(sorted(suffixes))} files")
        files += inside
    return files


def _check_limits(**limits: int | None) -> None:
    for name, value in limits.items():
        least = 2 if name == "seq_length" else 1
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}, got {value}")


def _refuse_unused(dataset_type: str, given: dict[str, Any]) -> None:
    used = USED_OPTIONS[dataset_type]
    useless = {name: value for name, value in given.items() if value is not None and name not in used}
    if useless:
        raise ValueError(f"dataset_type {dataset_type!r} has no use for {useless}")
    if dataset_type in ("text", "tokens") and not given["path"]:
        raise ValueError(f"dataset_type {dataset_type!r} needs path: a file, several, or a folder")
