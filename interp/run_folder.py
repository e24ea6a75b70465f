"""The folder that a run leaves: `run.json` and one parquet file of tokens per process.

While a run is going on everything lies in the sub-folder `unfinished/`; `RunFolder.finish` moves the shards up
and writes `run.json` last. So a folder with a `run.json` is a whole run, and only a finished run replaces another.
"""

import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass, field
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath, PureWindowsPath
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa

from interp.files import read_json, read_parquet, to_json, write_parquet, write_text
from interp.run_meta import KIND, META_KEYS, SCHEMA_VERSION, check_meta

META_FILE = "run.json"
UNFINISHED = "unfinished"
SCALAR_COLUMNS = {
    "document": pa.int32(),
    "position": pa.int32(),
    "token_id": pa.int32(),
    "token": pa.string(),
    "bucket": pa.int8(),
    "word_id": pa.int32(),
    "is_word_start": pa.bool_(),
    "is_answer": pa.bool_(),
    "loss": pa.float32(),
}
# Columns that a run may have besides: greedy has an entry per reading (nothing frozen, then each freezing), the others
# one per layer.
GREEDY = "greedy"
STAT_COLUMNS = (
    "inner_lr",
    "inner_grad_norm",
    "inner_loss_init",
    "inner_loss_before",
    "inner_loss_after",
    "state_drift",
)
_SHARD = re.compile(r"tokens-(\d{5})-of-(\d{5})\.parquet")


@dataclass(frozen=True)
class Run:
    """A finished run, its N tokens ordered by document and position.

    `meta` is run.json, `tokens` the scalar columns, `plasticity` float32 [N, L] with the heads combined,
    `loss_frozen` float32 [N, F] in nats, `freezing` the F configurations it belongs to. `extras` may hold "greedy"
    float32 [N, 1 + F] (1 where the model finds the token most likely; nothing frozen, then each configuration) and
    the diagnostics `STAT_COLUMNS`, float32 [N, L].
    """

    path: Path
    meta: dict[str, Any]
    tokens: pd.DataFrame
    plasticity: np.ndarray
    loss_frozen: np.ndarray
    freezing: list[dict[str, Any]]
    extras: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def ttt_layers(self) -> list[int]:
        """Absolute index of the layer in each column of `plasticity`."""
        return list(self.meta["model"]["ttt_layers"])

    @property
    def model_name(self) -> str:
        """The model's id; the last part only of a path that tells where it lies on a machine."""
        name = self.meta["model"]["id"]
        local = PurePosixPath(name).is_absolute() or PureWindowsPath(name).is_absolute() or name[:1] in ("~", ".")
        return (PureWindowsPath(name).name or name) if local else name


def shard_name(rank: int, world_size: int) -> str:
    """Name the token file of process `rank` of `world_size`."""
    if not 0 <= rank < world_size:
        raise ValueError(f"rank must be in [0, world_size={world_size}), got {rank}")
    return f"tokens-{rank:05d}-of-{world_size:05d}.parquet"


def token_table(
    columns: Mapping[str, Any],
    plasticity: np.ndarray,
    loss_frozen: np.ndarray | None = None,
    extras: Mapping[str, np.ndarray] | None = None,
) -> pa.Table:
    """Give tokens as an arrow table with the columns and types of the run schema.

    `columns` holds every scalar column as a sequence of N; `plasticity` is [N, L]; `loss_frozen` is [N, F],
    or None for F = 0; `extras` as in `Run`. ValueError when a column is missing, unknown or of another length.
    """
    if set(columns) != set(SCALAR_COLUMNS):
        missing, unknown = set(SCALAR_COLUMNS) - set(columns), set(columns) - set(SCALAR_COLUMNS)
        raise ValueError(
            f"columns must be {list(SCALAR_COLUMNS)}: missing {sorted(missing)}, unknown {sorted(unknown)}"
        )
    arrays = {name: pa.array(columns[name], type=dtype) for name, dtype in SCALAR_COLUMNS.items()}
    lengths = {name: len(array) for name, array in arrays.items()}
    arrays["plasticity"] = _to_lists("plasticity", plasticity)
    lengths["plasticity"] = len(plasticity)
    if loss_frozen is not None and loss_frozen.shape[1] > 0:
        arrays["loss_frozen"] = _to_lists("loss_frozen", loss_frozen)
        lengths["loss_frozen"] = len(loss_frozen)
    unknown = set(extras or {}) - {GREEDY, *STAT_COLUMNS}
    if unknown:
        raise ValueError(f"extras must be among {[GREEDY, *STAT_COLUMNS]}, got {sorted(unknown)}")
    for name, values in (extras or {}).items():
        arrays[name] = _to_lists(name, values)
        lengths[name] = len(values)
    if len(set(lengths.values())) > 1:
        raise ValueError(f"all columns must have the same length, got {lengths}")
    return pa.table(arrays)


class RunFolder:
    """Writer of one run folder; `RunFolder(path)` joins a run that another process created."""

    def __init__(self, path: str | os.PathLike):
        self.path = Path(path)
        self.unfinished = self.path / UNFINISHED

    @classmethod
    def create(
        cls,
        path: str | os.PathLike,
        *,
        arguments: Mapping[str, Any] | None = None,
        overwrite: bool = False,
        resume: bool = False,
    ) -> "RunFolder":
        """Start a run in `path`, or go on with the interrupted one that lies there.

        `arguments` (JSON values) is what the run depends on: resuming with other ones is refused. ValueError
        when the folder holds a finished run and `overwrite` is False, or an interrupted one and neither
        `overwrite` nor `resume` is given. A finished run is not touched before `finish` replaces it.
        """
        if overwrite and resume:
            raise ValueError("overwrite and resume exclude each other: give at most one")
        folder = cls(path)
        if folder.path.exists() and not folder.path.is_dir():
            raise ValueError(f"path {str(folder.path)!r} is a file, a run needs a folder")
        wanted = json.loads(to_json(arguments or {}))
        begun = folder.unfinished / "arguments.json"
        if resume and begun.exists():
            _refuse_other_arguments(read_json(begun), wanted)
            return folder
        if not overwrite and (folder.path / META_FILE).exists():
            raise ValueError(f"{str(folder.path)!r} already holds a finished run: choose another name or overwrite it")
        if folder.unfinished.exists():
            if not (overwrite or resume):
                raise ValueError(f"{str(folder.path)!r} holds an interrupted run: resume or overwrite it")
            shutil.rmtree(folder.unfinished)
        folder.unfinished.mkdir(parents=True)
        write_text(begun, to_json(wanted))
        return folder

    def write_part(
        self,
        table: pa.Table,
        index: int,
        rank: int = 0,
        world_size: int = 1,
        *,
        notes: Mapping[str, Any] | None = None,
    ) -> None:
        """Keep a piece of a shard, so that an interrupted run can go on.

        `merge_parts` joins the pieces in the order of `index`; `notes` (JSON values) is kept for `read_notes`.
        """
        parts = self._parts(rank, world_size)
        parts.mkdir(parents=True, exist_ok=True)
        write_text(parts / f"{index:08d}.json", to_json(dict(notes or {})))
        write_parquet(parts / f"{index:08d}.parquet", [table])

    def read_parts(self, rank: int = 0, world_size: int = 1) -> dict[int, dict[str, Any]]:
        """Give the notes of the pieces that process `rank` has written so far, by index."""
        merged = self._notes(rank, world_size)
        if self._shard(rank, world_size).exists() and merged.exists():
            return dict(enumerate(read_json(merged)))
        files = sorted(self._parts(rank, world_size).glob("[0-9]*.parquet"))
        return {int(file.stem): read_json(file.with_suffix(".json")) for file in files}

    def merge_parts(self, rank: int = 0, world_size: int = 1) -> None:
        """Join the pieces of process `rank` into its shard, one at a time, and remove them."""
        if self._shard(rank, world_size).exists():
            return
        notes = self.read_parts(rank, world_size)
        if list(notes) != list(range(len(notes))) or not notes:
            raise ValueError(f"process {rank} of {world_size} has the parts {list(notes)}, not 0, 1, 2, ...")
        parts = self._parts(rank, world_size)
        write_text(self._notes(rank, world_size), to_json(list(notes.values())))
        tables = (read_parquet(parts / f"{index:08d}.parquet") for index in notes)
        write_parquet(self._shard(rank, world_size), tables)
        shutil.rmtree(parts)

    def read_notes(self, world_size: int = 1) -> list[list[dict[str, Any]]]:
        """Give the notes of every merged shard: one list per process, one entry per piece."""
        return [list(self.read_parts(rank, world_size).values()) for rank in range(world_size)]

    def discard_empty(self) -> None:
        """Remove what `create` made, unless a process has kept a part already."""
        if self.unfinished.exists() and not any(self.unfinished.rglob("*.parquet")):
            shutil.rmtree(self.unfinished)

    def finish(self, meta: Mapping[str, Any], num_shards: int = 1) -> Path:
        """Move the shards, all of which must be written, into place and write run.json; return its path.

        `meta` holds the run.json keys apart from schema_version, kind, created and num_shards, which are
        added here. ValueError when a key or a shard is missing.
        """
        own = {
            "schema_version": SCHEMA_VERSION,
            "kind": KIND,
            "created": datetime.now(UTC).isoformat(timespec="seconds"),
            "num_shards": num_shards,
        }
        whole = {**own, **meta}
        absent = [key for key in META_KEYS if key not in whole]
        if absent:
            raise ValueError(f"meta lacks the keys {absent}")
        text = to_json({key: whole[key] for key in (*META_KEYS, *(set(whole) - set(META_KEYS)))})
        names = [shard_name(rank, num_shards) for rank in range(num_shards)]
        absent = [name for name in names if not (self.unfinished / name).exists()]
        if absent:
            raise ValueError(f"cannot finish {str(self.path)!r}: shards {absent} have not been written")
        (self.path / META_FILE).unlink(missing_ok=True)
        for old in self.path.glob("tokens-*.parquet"):
            if _SHARD.fullmatch(old.name):
                old.unlink()
        for name in names:
            os.replace(self.unfinished / name, self.path / name)
        write_text(self.path / META_FILE, text)
        shutil.rmtree(self.unfinished)
        return self.path / META_FILE

    def _shard(self, rank: int, world_size: int) -> Path:
        return self.unfinished / shard_name(rank, world_size)

    def _notes(self, rank: int, world_size: int) -> Path:
        return self._shard(rank, world_size).with_suffix(".json")

    def _parts(self, rank: int, world_size: int) -> Path:
        return self._shard(rank, world_size).with_suffix(".parts")


def read_run(path: str | os.PathLike) -> Run:
    """Read and validate a run folder.

    ValueError, naming the file, for anything missing, damaged, of another schema version or at odds with run.json.
    """
    path = Path(path)
    meta = _read_meta(path)
    tables = [_read_shard(path / name, meta) for name in _shard_names(path, meta["num_shards"])]
    table = pa.concat_tables(tables)
    tokens = pd.DataFrame({name: _column(table, name) for name in SCALAR_COLUMNS})
    plasticity = _from_lists(table, "plasticity")
    freezing = list(meta["freezing"])
    loss_frozen = _from_lists(table, "loss_frozen") if freezing else np.zeros((len(tokens), 0), np.float32)
    extras = {name: _from_lists(table, name) for name in (GREEDY, *STAT_COLUMNS) if name in table.column_names}
    order = np.lexsort((tokens["position"].to_numpy(), tokens["document"].to_numpy()))
    tokens = tokens.iloc[order].reset_index(drop=True)
    _check_documents(path, meta, tokens)
    extras = {name: values[order] for name, values in extras.items()}
    return Run(path, meta, tokens, plasticity[order], loss_frozen[order], freezing, extras)


def _read_meta(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise ValueError(f"run folder {str(path)!r} does not exist or is not a folder")
    file = path / META_FILE
    if not file.exists():
        state = "an interrupted run (resume it)" if (path / UNFINISHED).exists() else "no run"
        raise ValueError(f"run folder {str(path)!r} has no {META_FILE}: it holds {state}")
    meta = read_json(file)
    check_meta(meta, repr(str(file)))
    return meta


def _shard_names(path: Path, num_shards: int) -> list[str]:
    wanted = {shard_name(rank, num_shards) for rank in range(num_shards)}
    found = {file.name for file in path.iterdir() if _SHARD.fullmatch(file.name)}
    if wanted != found:
        raise ValueError(
            f"run folder {str(path)!r}: {META_FILE} announces {num_shards} shard(s); "
            f"missing {sorted(wanted - found)}, not announced {sorted(found - wanted)}"
        )
    return sorted(wanted)


def _read_shard(file: Path, meta: dict[str, Any]) -> pa.Table:
    table = read_parquet(file)
    _check_columns(table, str(file))
    widths = {"plasticity": len(meta["model"]["ttt_layers"]), "loss_frozen": len(meta["freezing"])}
    optional = {GREEDY: 1 + len(meta["freezing"]), **dict.fromkeys(STAT_COLUMNS, len(meta["model"]["ttt_layers"]))}
    widths |= {name: width for name, width in optional.items() if name in table.column_names}
    for name, width in widths.items():
        got = table.schema.field(name).type.list_size if name in table.column_names else 0
        if got != width:
            raise ValueError(
                f"{str(file)!r}: column {name!r} has {got} entries per token, {META_FILE} announces {width}"
            )
    return table.select([*SCALAR_COLUMNS, *(name for name, width in widths.items() if width)])


def _check_columns(table: pa.Table, where: str) -> None:
    absent = [name for name in (*SCALAR_COLUMNS, "plasticity") if name not in table.column_names]
    if absent:
        raise ValueError(f"{where}: columns {absent} are missing")
    for name, dtype in SCALAR_COLUMNS.items():
        if table.schema.field(name).type != dtype:
            raise ValueError(f"{where}: column {name!r} must be {dtype}, got {table.schema.field(name).type}")
    for name in {"plasticity", "loss_frozen", GREEDY, *STAT_COLUMNS} & set(table.column_names):
        dtype = table.schema.field(name).type
        if not pa.types.is_fixed_size_list(dtype) or dtype.value_type != pa.float32():
            raise ValueError(f"{where}: column {name!r} must be fixed_size_list<float32>, got {dtype}")
    with_nulls = [name for name in table.column_names if table.column(name).null_count]
    if with_nulls:
        raise ValueError(f"{where}: columns {with_nulls} contain nulls")


def _check_documents(path: Path, meta: dict[str, Any], tokens: pd.DataFrame) -> None:
    announced = {entry["document"]: entry["tokens"] for entry in meta["documents"]}
    total = meta["totals"]["tokens"]
    if len(tokens) != total:
        raise ValueError(f"run folder {str(path)!r} holds {len(tokens)} tokens, {META_FILE} announces {total}")
    found = tokens.groupby("document", sort=True).size().to_dict()
    if found != announced:
        wrong = sorted(key for key in announced.keys() | found.keys() if announced.get(key) != found.get(key))
        raise ValueError(f"run folder {str(path)!r}: token counts of documents {wrong[:8]} differ from {META_FILE}")
    if (tokens["position"] != tokens.groupby("document").cumcount()).any():
        raise ValueError(f"run folder {str(path)!r}: positions of a document are not 0, 1, 2, ... without gaps")


def _refuse_other_arguments(begun: dict[str, Any], wanted: dict[str, Any]) -> None:
    begun, wanted = _flat(begun), _flat(wanted)
    differing = sorted(key for key in begun.keys() | wanted.keys() if begun.get(key) != wanted.get(key))
    if differing:
        detail = ", ".join(f"{key}: {begun.get(key)!r} -> {wanted.get(key)!r}" for key in differing)
        raise ValueError(f"cannot resume with other arguments ({detail}); use the same ones or overwrite")


def _flat(arguments: dict[str, Any]) -> dict[str, Any]:
    """The same with `outer.inner` as the keys of objects in it."""
    flat: dict[str, Any] = {}
    for key, value in arguments.items():
        inner = value if isinstance(value, dict) and value else {"": value}
        flat |= {f"{key}.{name}" if name else key: entry for name, entry in inner.items()}
    return flat


def _to_lists(name: str, values: np.ndarray) -> pa.FixedSizeListArray:
    values = np.ascontiguousarray(values, dtype=np.float32)
    if values.ndim != 2 or values.shape[1] < 1:
        raise ValueError(f"{name} must be [N, n] with n >= 1, got shape {values.shape}")
    return pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])


def _from_lists(table: pa.Table, name: str) -> np.ndarray:
    column = table.column(name)
    flat = [chunk.flatten().to_numpy(zero_copy_only=False) for chunk in column.chunks]
    return np.concatenate([*flat, np.zeros(0, np.float32)]).reshape(-1, column.type.list_size)


def _column(table: pa.Table, name: str) -> Any:
    column = table.column(name)
    return column.to_pandas() if name == "token" else column.to_numpy()
