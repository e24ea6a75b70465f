"""Model and documents in, run folder out."""

import hashlib
import json
import os
import platform
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from itertools import chain, islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from tqdm.auto import tqdm

from interp.bucketing import StopList, bucket_tokens, load_stop_words
from interp.documents import Document
from interp.freezing import Freezing, freezing_multiplier, ttt_layers
from interp.reader import DEFAULT_SEGMENT_LENGTH, STATS, Reading, evaluation_mode, read_batch
from interp.run_folder import RunFolder, token_table
from interp.words import TokenTable, byte_lengths, token_strings

DEFINITIONS = {
    "loss": "Surprisal of the token given those before it in its document, in nats; NaN at the first.",
    "plasticity": "Frobenius norm of what the token commits to the inner weights of a layer, biases "
    "included, heads combined as the root of the sum of squares; no unit.",
    "loss_frozen": "Like loss, while the layers of one freezing configuration never write, in nats.",
    "greedy": "1 where the token is the one that the model finds most likely given those before it, else 0; nothing "
    "frozen, then every freezing configuration.",
    "inner_lr": "Inner learning rate of the token's write, mean over heads; no unit.",
    "inner_grad_norm": "Frobenius norm of the token's inner gradient before any learning rate, heads combined.",
    "inner_loss_init": "Inner loss of the token at W_0, sum over heads.",
    "inner_loss_before": "Inner loss at the weights of the mini-batch start, sum over heads.",
    "inner_loss_after": "Inner loss at the weights that the token itself reads, sum over heads.",
    "state_drift": "Norm of the committed weights less W_0, heads combined.",
    "bucket": "0 SYNTAX (stop word), 1 RETRIEVAL (word seen before in the document), 2 NOVELTY (first "
    "occurrence), 3 OTHER (punctuation, white space, special tokens).",
    "word_id": "Number of the token's word in the document, -1 outside words.",
    "is_answer": "Whether the token belongs to the answer at the end of a retrieval document.",
    "position": "Index of the token in the document as read, in tokens, from 0.",
    "mean_loss": "Mean of loss over all tokens but the first of each document, in nats per token.",
    "bytes": "Number of UTF-8 bytes of all tokens of the document but the first.",
    "nats_per_byte": "Sum of loss by the number of UTF-8 bytes of the same tokens, in nats per byte.",
    "weights_fingerprint": "SHA-256 of the names, shapes and up to 1024 evenly spread values of every parameter.",
    "seconds": "Wall-clock time of all passes, freezing included, of the slowest process, in seconds.",
    "tokens_per_second": "Tokens of the run (each counted once) by seconds.",
    "pass_seconds": "Seconds of each reading, all processes added up: nothing frozen, then every freezing.",
}
_PACKAGES = (
    "torch",
    "transformers",
    "tokenizers",
    "numpy",
    "pyarrow",
    "datasets",
    "accelerate",
    "modeling-ttt",
)
_VALUES_PER_PARAMETER = 1024


def collect(
    model: Any,
    tokenizer: Any,
    documents: Iterable[Document],
    folder: str | os.PathLike,
    *,
    batch_size: int = 1,
    segment_length: int = DEFAULT_SEGMENT_LENGTH,
    freezing: Sequence[Freezing] = (),
    stop_words: str | os.PathLike | Iterable[str] | StopList = "en",
    numbers: str = "content",
    min_lag: int = 0,
    stats: bool = False,
    arguments: Mapping[str, Any] | None = None,
    corpus: Mapping[str, Any] | None = None,
    seed: int | None = None,
    rank: int = 0,
    world_size: int = 1,
    barrier: Callable[[], object] | None = None,
    overwrite: bool = False,
    resume: bool = False,
    progress: bool = False,
) -> Path:
    """Read every document with the model and leave a run folder; return the path of its run.json.

    Each entry of `freezing` is one more pass over the same documents. Buckets are made per document with
    `stop_words`, `numbers` and `min_lag` (tokens), as in `interp.bucketing`. `stats` keeps the diagnostics of the
    inner loop as well (`interp.reader.STATS`), at about twice the time. `arguments`, `corpus` and `seed`
    (JSON values) are kept in run.json. Of `world_size` processes that get the same documents, process `rank`
    reads every `world_size`-th; `barrier` must wait for all of them. Batches of `batch_size` documents are
    kept as they are done: `resume` goes on with an interrupted run of the same settings and weights. A run
    that fails before its first batch is done leaves nothing to resume. The model is put into evaluation mode
    for the time. ValueError for models without TTT layers, a missing tokenizer, two freezings of one name, no
    documents, and for folders as in `RunFolder.create`.
    """
    if batch_size < 1:
        raise ValueError(f"batch_size must be at least 1, got {batch_size}")
    names = [entry.name for entry in freezing]
    if len(set(names)) < len(names):
        raise ValueError(f"the names in freezing must differ, got {names}")
    reader = _Reader(
        model=model,
        table=_token_table(tokenizer),
        layers=ttt_layers(model.config),
        freezing=tuple(freezing),
        segment_length=segment_length,
        stats=stats,
        buckets={"stop_words": load_stop_words(stop_words), "numbers": numbers, "min_lag": min_lag},
    )
    meta = {
        "model": _describe_model(model, reader.layers),
        "tokenizer": {"id": getattr(tokenizer, "name_or_path", "") or None, "vocab_size": len(tokenizer)},
        "corpus": dict(corpus or {}),
        "bucketing": bucket_tokens([], reader.table, **reader.buckets).meta,
        "freezing": [_describe_freezing(entry) for entry in reader.freezing],
        "seed": seed,
    }
    wait = barrier or (lambda: None)
    batches = _batches(islice(enumerate(documents), rank, None, world_size), batch_size)
    # A corpus that cannot be read shall not leave a folder behind.
    first = next(batches, None)
    if first is None and rank == 0:
        raise ValueError("there are no documents to read")
    if rank == 0:
        sizes = {"batch_size": batch_size, "segment_length": segment_length, "world_size": world_size, "stats": stats}
        RunFolder.create(folder, arguments={**meta, **sizes}, overwrite=overwrite, resume=resume)
    wait()
    target = RunFolder(folder)
    try:
        with evaluation_mode(model):
            _collect_shard(reader, chain([first] if first else [], batches), target, rank, world_size, progress)
    except BaseException:
        if rank == 0:
            target.discard_empty()
        raise
    wait()
    if rank == 0:
        documents_read, totals = _totals(target.read_notes(world_size))
        whole = {**meta, "arguments": dict(arguments or {}), "documents": documents_read, "totals": totals}
        target.finish({**whole, "versions": _versions(), "definitions": DEFINITIONS}, world_size)
    wait()
    return target.path / "run.json"


@dataclass(frozen=True)
class _Reader:
    """Everything that turns documents into rows of the token table."""

    model: Any
    table: TokenTable
    layers: list[int]
    freezing: tuple[Freezing, ...]
    segment_length: int
    stats: bool
    buckets: dict[str, Any]

    def read(self, batch: Sequence[tuple[int, Document]]) -> tuple[pa.Table, dict[str, Any]]:
        """Rows of several numbered documents, and notes for run.json."""
        rows = [document.input_ids for _, document in batch]
        clock = [time.perf_counter()]
        readings = read_batch(self.model, rows, segment_length=self.segment_length, stats=self.stats)
        clock.append(time.perf_counter())
        frozen = []
        for freezing in self.freezing:
            frozen.append(self._read_frozen(rows, freezing))
            clock.append(time.perf_counter())
        per_pass = np.diff(clock).tolist()
        tables, notes = [], []
        for row, (index, document) in enumerate(batch):
            loss = readings[row].loss
            loss_frozen = np.stack([other[row].loss for other in frozen], axis=1) if frozen else None
            greedy = np.stack([readings[row].greedy, *(other[row].greedy for other in frozen)], axis=1)
            plasticity = readings[row].plasticity
            if plasticity.shape[1] != len(self.layers):
                got = plasticity.shape[1]
                raise ValueError(f"the model gives plasticity of {got} layers, its TTT layers are {self.layers}")
            extras = {"greedy": greedy, **readings[row].stats}
            tables.append(token_table(self._columns(index, document, loss), plasticity, loss_frozen, extras))
            notes.append(self._note(index, document, loss, loss_frozen))
        return pa.concat_tables(tables), {"documents": notes, "seconds": sum(per_pass), "pass_seconds": per_pass}

    def empty(self) -> pa.Table:
        """The table of a process without documents."""
        nothing = np.zeros(0, np.int64)
        columns = {**self._tokens(nothing), "document": nothing, "is_answer": nothing, "loss": nothing}
        loss_frozen = np.zeros((0, len(self.freezing))) if self.freezing else None
        per_layer = np.zeros((0, len(self.layers)))
        extras = dict.fromkeys(STATS if self.stats else (), per_layer)
        extras["greedy"] = np.zeros((0, 1 + len(self.freezing)))
        return token_table(columns, per_layer, loss_frozen, extras)

    def _read_frozen(self, rows: Sequence[np.ndarray], freezing: Freezing) -> list[Reading]:
        return read_batch(
            self.model,
            rows,
            segment_length=self.segment_length,
            lr_mult=freezing_multiplier(freezing, self.layers, self.model.config.num_attention_heads),
            plasticity=False,
        )

    def _columns(self, index: int, document: Document, loss: np.ndarray) -> dict[str, Any]:
        ids = document.input_ids
        answer = np.zeros(len(ids), bool) if document.answer_mask is None else document.answer_mask
        return {**self._tokens(ids), "document": np.full(len(ids), index), "is_answer": answer, "loss": loss}

    def _tokens(self, ids: np.ndarray) -> dict[str, Any]:
        # The model reads on across BOS and EOS tokens inside a document, so words count as seen across them.
        buckets = bucket_tokens(ids, self.table, doc_ids=np.zeros(len(ids), np.int64), **self.buckets)
        return {
            "position": np.arange(len(ids)),
            "token_id": ids,
            "token": token_strings(self.table, ids),
            "bucket": buckets.labels,
            "word_id": buckets.word_id,
            "is_word_start": buckets.is_word_start,
        }

    def _note(
        self, index: int, document: Document, loss: np.ndarray, loss_frozen: np.ndarray | None
    ) -> dict[str, Any]:
        per_pass = [loss] if loss_frozen is None else [loss, *loss_frozen.T]
        return {
            "document": index,
            "name": document.name,
            "tokens": len(document.input_ids),
            "bytes": int(byte_lengths(self.table, document.input_ids)[1:].sum()),
            "nats": [_finite(losses[1:].sum(dtype=np.float64)) for losses in per_pass],
        }


def _collect_shard(
    reader: _Reader,
    batches: Iterable[list[tuple[int, Document]]],
    folder: RunFolder,
    rank: int,
    world_size: int,
    progress: bool,
) -> None:
    done = folder.read_parts(rank, world_size)
    index = -1
    with tqdm(unit="tok", unit_scale=True, disable=not progress) as bar:
        for index, batch in enumerate(batches):
            if index in done:
                _check_same_documents(done[index], batch)
            else:
                table, notes = reader.read(batch)
                folder.write_part(table, index, rank, world_size, notes=notes)
            bar.update(sum(len(document.input_ids) for _, document in batch))
    if index < 0:
        folder.write_part(
            reader.empty(), 0, rank, world_size, notes={"documents": [], "seconds": 0.0, "pass_seconds": []}
        )
    folder.merge_parts(rank, world_size)


def _batches(items: Iterator[Any], size: int) -> Iterator[list[Any]]:
    while batch := list(islice(items, size)):
        yield batch


def _check_same_documents(note: Mapping[str, Any], batch: Sequence[tuple[int, Document]]) -> None:
    then = [(entry["document"], entry["name"], entry["tokens"]) for entry in note["documents"]]
    now = [(index, document.name, len(document.input_ids)) for index, document in batch]
    if then != now:
        raise ValueError(f"cannot resume: the interrupted run read {then}, now the documents are {now}")


def _totals(notes: Sequence[Sequence[Mapping[str, Any]]]) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The documents in order and the totals of run.json, from the notes of all processes."""
    entries = sorted(
        (entry for process in notes for part in process for entry in part["documents"]),
        key=lambda entry: entry["document"],
    )
    seconds = max(sum(part["seconds"] for part in process) for process in notes)
    tokens = sum(entry["tokens"] for entry in entries)
    nats = [_sum(column) for column in zip(*(entry["nats"] for entry in entries), strict=True)]
    means = [None if total is None else total / (tokens - len(entries)) for total in nats]
    size = sum(entry["bytes"] for entry in entries)
    totals = {
        "documents": len(entries),
        "tokens": tokens,
        "mean_loss": means[0],
        "mean_loss_frozen": means[1:],
        "nats_per_byte": nats[0] / size if size and nats[0] is not None else None,
        "seconds": seconds,
        "tokens_per_second": tokens / seconds,
        "pass_seconds": _add_columns(part["pass_seconds"] for process in notes for part in process),
    }
    return [{key: entry[key] for key in ("document", "name", "tokens", "bytes")} for entry in entries], totals


def _add_columns(rows: Iterable[Sequence[float]]) -> list[float]:
    return [sum(column) for column in zip(*(row for row in rows if row), strict=True)]


def _sum(values: Sequence[float | None]) -> float | None:
    return None if None in values else sum(values)


def _finite(value: float) -> float | None:
    return float(value) if np.isfinite(value) else None


def _token_table(tokenizer: Any) -> TokenTable:
    if tokenizer is None:
        raise ValueError("a tokenizer is needed to put tokens into buckets, got None")
    return TokenTable.from_tokenizer(tokenizer)


def _describe_model(model: Any, layers: list[int]) -> dict[str, Any]:
    config = model.config
    described = config.to_dict()
    # Neither says anything about the model itself: the same weights have them differently elsewhere.
    for key in ("_name_or_path", "transformers_version"):
        described.pop(key, None)
    text = json.dumps(described, sort_keys=True, default=str)
    frozen_heads = getattr(config, "frozen_heads", None) or {}
    frozen_from = getattr(config, "frozen_from", None)
    if isinstance(frozen_from, dict):
        frozen_from = {str(layer): index for layer, index in frozen_from.items()}
    return {
        "id": getattr(config, "_name_or_path", "") or type(model).__name__,
        "revision": getattr(config, "_commit_hash", None),
        "config_hash": hashlib.sha256(text.encode()).hexdigest(),
        "weights_fingerprint": _fingerprint(model),
        "num_parameters": sum(parameter.numel() for parameter in model.parameters()),
        "ttt_layers": layers,
        "frozen_layers": list(getattr(config, "frozen_layers", None) or []),
        "frozen_heads": {str(layer): list(heads) for layer, heads in frozen_heads.items()},
        "frozen_from": frozen_from,
        "num_heads": config.num_attention_heads,
        "mini_batch_size": config.mini_batch_size,
        "dtype": str(model.dtype).removeprefix("torch."),
    }


def _describe_freezing(entry: Freezing) -> dict[str, Any]:
    heads = {str(layer): list(chosen) for layer, chosen in entry.heads.items()}
    return {"name": entry.name, "layers": list(entry.layers), **({"heads": heads} if heads else {})}


def _fingerprint(model: Any) -> str:
    """SHA-256 of a sample of the weights: enough to tell two trainings of one architecture apart.

    Of parameters that are offloaded (on the meta device) only names and shapes count.
    """
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        digest.update(f"{name} {list(parameter.shape)}".encode())
        if not parameter.is_meta:
            flat = parameter.detach().reshape(-1)
            sample = torch.linspace(0, len(flat) - 1, min(len(flat), _VALUES_PER_PARAMETER), dtype=torch.float64)
            values = flat[sample.round().long().to(flat.device)]
            digest.update(values.double().cpu().numpy().tobytes())
    return digest.hexdigest()


def _versions() -> dict[str, str]:
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    return versions
