"""Official TTT checkpoints, of the JAX code and of the PyTorch code, as folders for Transformers; and the way back."""

import json
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GenerationConfig

from .configuration_ttt import TTTConfig
from .convert_config import settings_to_jax
from .convert_leaves import FLOAT_DTYPES, Leaf
from .convert_names import to_jax
from .convert_output import RECORD, folder_beside, write_safetensors
from .convert_source import Checkpoint, ConfigLike, find_source, read_checkpoint
from .convert_stream import index_stream, write_stream
from .convert_verify import logits_fingerprint, verify_folder

__all__ = ["Conversion", "convert_checkpoint", "export_jax", "find_source", "logits_fingerprint"]

Progress = Callable[[int, int], None]


@dataclass(frozen=True)
class Conversion:
    """What was written: folder, files with weights, configuration, and what was left out.

    `skipped` counts leaves of an optimizer's state, `dropped` names stored constants that are no parameters;
    `fingerprint` are logits of a fixed text, in float32 (see `logits_fingerprint`), None for a JAX stream.
    """

    output: Path
    files: list[str]
    config: TTTConfig
    dtype: str
    parameters: int
    skipped: int
    dropped: list[str]
    fingerprint: dict[str, Any] | None


def convert_checkpoint(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    config: ConfigLike | None = None,
    tokenizer: str | os.PathLike | None = None,
    dtype: str | None = None,
    max_shard_bytes: int = 5 * 10**9,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Convert an official checkpoint, a file or a folder, into a folder for `from_pretrained`, and verify it.

    `source` is a stream file of the JAX code (train state or parameters), its `flax_params`, or a checkpoint of the
    PyTorch code. `config` (a preset such as "125m", a json file or a mapping) takes the place of the configuration
    beside it; `tokenizer`, a folder or Hub id, is written too. Parameters keep their dtype or get `dtype`. `progress`
    is called with the bytes done and their total. One leaf is in memory at a time. The folder is whole or absent.

    Raises FileNotFoundError without the source, ValueError, naming file and leaf, for anything in it that is damaged,
    unknown, missing, of another shape or not finite, and when `output` is there already (`overwrite` replaces an
    earlier conversion).
    """
    if max_shard_bytes < 1:
        raise ValueError(f"max_shard_bytes must be at least 1, got {max_shard_bytes}")
    checkpoint = read_checkpoint(source, config)
    name = _one_dtype(checkpoint, dtype)
    vocabulary = None if tokenizer is None else _load_tokenizer(os.fspath(tokenizer), checkpoint.config)
    built, shapes = checkpoint.config, {name: leaf.shape for name, leaf in checkpoint.leaves.items()}
    built.architectures, built.dtype = ["TTTForCausalLM"], name
    with folder_beside(output, overwrite=overwrite) as folder:
        files = write_safetensors(
            folder,
            checkpoint.leaves,
            FLOAT_DTYPES[name],
            max_shard_bytes=max_shard_bytes,
            progress=_counter(progress, checkpoint.leaves.values()),
        )
        built.save_pretrained(folder)
        GenerationConfig.from_model_config(built).save_pretrained(folder)
        if vocabulary is not None:
            vocabulary.save_pretrained(folder)
        fingerprint = verify_folder(folder, built, shapes, FLOAT_DTYPES[name])
        conversion = _conversion(output, files, checkpoint, name, fingerprint)
        _write_record(folder, checkpoint, conversion)
    return conversion


def export_jax(
    source: str | os.PathLike,
    output: str | os.PathLike,
    *,
    config: ConfigLike | None = None,
    dtype: str | None = None,
    overwrite: bool = False,
    progress: Progress | None = None,
) -> Conversion:
    """Write a checkpoint as `streaming_params` and `model_config.json` of the official JAX code, bit for bit.

    `source` is one of ours (or any other that `convert_checkpoint` takes), and the other arguments are as there.
    Raises what that raises, and ValueError for a configuration that the JAX code does not have.
    """
    checkpoint = read_checkpoint(source, config)
    name = _one_dtype(checkpoint, dtype)
    settings = settings_to_jax(checkpoint.config)
    leaves: dict[tuple[str, ...], Leaf] = {}
    for ours, leaf in checkpoint.leaves.items():
        found = to_jax(ours)
        if found is None:
            raise ValueError(f"{checkpoint.files.weights}: the JAX code has no parameter {ours!r}")
        leaves[found[0]] = leaf.turned(found[1])
    with folder_beside(output, overwrite=overwrite) as folder:
        file = folder / "streaming_params"
        write_stream(file, leaves, FLOAT_DTYPES[name], progress=_counter(progress, leaves.values()))
        written = {key: leaf.shape for key, leaf in index_stream(file).leaves.items()}
        if written != {key: leaf.shape for key, leaf in leaves.items()}:
            raise ValueError(f"{file}: what was written is not what was read")
        (folder / "model_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
        conversion = _conversion(output, [file.name], checkpoint, name, None)
        _write_record(folder, checkpoint, conversion)
    return conversion


def _one_dtype(checkpoint: Checkpoint, dtype: str | None) -> str:
    if dtype is not None:
        if dtype not in FLOAT_DTYPES:
            raise ValueError(f"dtype must be one of {list(FLOAT_DTYPES)}, got {dtype!r}")
        return dtype
    names = {value: name for name, value in FLOAT_DTYPES.items()}
    found = sorted({names[leaf.dtype] for leaf in checkpoint.leaves.values()})
    if len(found) != 1:
        raise ValueError(f"{checkpoint.files.weights}: parameters are of {found}; pass the dtype all shall have")
    return found[0]


def _load_tokenizer(name: str, config: TTTConfig) -> Any:
    try:
        tokenizer = AutoTokenizer.from_pretrained(name)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error
    if len(tokenizer) > config.vocab_size:
        raise ValueError(f"tokenizer {name!r} has {len(tokenizer)} tokens, the model {config.vocab_size}")
    return tokenizer


def _counter(progress: Progress | None, leaves: Any) -> Callable[[int], None]:
    total, done = sum(leaf.nbytes for leaf in leaves), 0

    def count(nbytes: int) -> None:
        nonlocal done
        done += nbytes
        if progress is not None:
            progress(done, total)

    return count


def _conversion(output, files: list[str], checkpoint: Checkpoint, dtype: str, fingerprint) -> Conversion:
    parameters = sum(torch.Size(leaf.shape).numel() for leaf in checkpoint.leaves.values())
    skipped, dropped = checkpoint.skipped, checkpoint.dropped
    return Conversion(Path(output), files, checkpoint.config, dtype, parameters, skipped, dropped, fingerprint)


def _write_record(folder: Path, checkpoint: Checkpoint, conversion: Conversion) -> None:
    source = checkpoint.files
    record = {
        "source": {"file": source.weights.name, "bytes": source.weights.stat().st_size, "jax": source.is_jax},
        "dtype": conversion.dtype,
        "parameters": conversion.parameters,
        "skipped": conversion.skipped,
        "dropped": conversion.dropped,
        "fingerprint": conversion.fingerprint,
    }
    (folder / RECORD).write_text(json.dumps(record, indent=2) + "\n", encoding="utf-8")
