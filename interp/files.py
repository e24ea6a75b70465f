"""Files that are whole or absent: everything is written beside its place and renamed into it."""

import json
import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq


@contextmanager
def write_beside(file: str | os.PathLike) -> Iterator[Path]:
    """Give a path beside `file` to write to; it takes the place of `file` if the block succeeds."""
    file = Path(file)
    beside = file.with_name(f".{os.getpid()}.{file.name}")
    try:
        yield beside
        os.replace(beside, file)
    finally:
        beside.unlink(missing_ok=True)


def write_text(file: str | os.PathLike, text: str) -> None:
    """Write `text` as UTF-8."""
    with write_beside(file) as beside:
        beside.write_text(text, encoding="utf-8")


def read_text(file: str | os.PathLike) -> str:
    """Read UTF-8 text, without a byte order mark; ValueError, naming the file, when it cannot be read as such."""
    try:
        return Path(file).read_text(encoding="utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{os.fspath(file)!r} is not UTF-8 text: {error}") from error
    except OSError as error:
        raise ValueError(f"{os.fspath(file)!r} cannot be read: {error.strerror}") from error


def write_parquet(file: str | os.PathLike, tables: Iterable[pa.Table]) -> None:
    """Write tables of one schema below each other, holding one at a time; ValueError when there is none."""
    with write_beside(file) as beside:
        writer = None
        try:
            for table in tables:
                writer = writer or pq.ParquetWriter(beside, table.schema, compression="zstd")
                writer.write_table(table)
        finally:
            if writer is not None:
                writer.close()
        if writer is None:
            raise ValueError(f"no table to write to {str(file)!r}")


def read_parquet(file: str | os.PathLike) -> pa.Table:
    """Read one parquet file; ValueError, naming it, when that fails."""
    try:
        return pq.read_table(file, partitioning=None)
    except (OSError, pa.ArrowException) as error:
        raise ValueError(f"{str(file)!r} cannot be read as parquet: {error}") from error


def read_json(file: str | os.PathLike) -> Any:
    """Read one JSON file; ValueError, naming it, when that fails."""
    try:
        return json.loads(Path(file).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as JSON: {error}") from error


def to_json(value: Any) -> str:
    """Write strict JSON (NaN is a ValueError); numpy scalars and paths count as numbers and strings."""
    return json.dumps(value, indent=2, ensure_ascii=False, allow_nan=False, default=_plain) + "\n"


def _plain(value: Any) -> Any:
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    raise TypeError(f"only JSON values can be written, got {value!r} of type {type(value).__name__}")
