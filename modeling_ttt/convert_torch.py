"""Checkpoints of the official PyTorch code (and ours): safetensors or pytorch_model.bin, whole or in shards."""

import json
import re
import zipfile
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from .convert_leaves import FLOAT_DTYPES, Leaf

__all__ = ["TORCH_FILES", "index_torch", "read_json"]

TORCH_FILES = (
    "model.safetensors.index.json",
    "model.safetensors",
    "pytorch_model.bin.index.json",
    "pytorch_model.bin",
)
"""What holds the weights, in order of preference."""

_SAFETENSORS_DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
    "F64": torch.float64,
}
# Constants that some versions of the official code saved with the parameters.
_CONSTANTS = re.compile(r"model\.layers\.\d+\.seq_modeling_block\.(rotary_emb\.inv_freq|token_idx)")


def index_torch(file: Path) -> tuple[dict[str, Leaf], list[str]]:
    """Index one of `TORCH_FILES` by parameter, without its numbers; and the names of constants that are left out.

    A pickle is read with `weights_only=True`. FileNotFoundError without the file or a shard; ValueError, naming file
    and parameter, for anything that is damaged, there twice or of another dtype.
    """
    leaves: dict[str, Leaf] = {}
    for shard in _shards(file):
        if not shard.is_file():
            raise FileNotFoundError(f"checkpoint file {str(shard)!r} does not exist or is no file")
        found = _index_safetensors(shard) if shard.suffix == ".safetensors" else _index_pickle(shard)
        twice = sorted(set(found) & set(leaves))
        if twice:
            raise ValueError(f"{shard}: {twice} are also in another file")
        leaves |= found
    constants = sorted(name for name in leaves if _CONSTANTS.fullmatch(name))
    for name in constants:
        del leaves[name]
    for leaf in leaves.values():
        if 0 in leaf.shape:
            raise ValueError(f"{file}: the shape {list(leaf.shape)} of {leaf.name!r} holds no numbers")
        if leaf.dtype not in FLOAT_DTYPES.values():
            raise ValueError(f"{file}: dtype of {leaf.name!r} must be one of {list(FLOAT_DTYPES)}, got {leaf.dtype}")
    return leaves, constants


def read_json(file: Path) -> dict[str, Any]:
    """Read a JSON object; FileNotFoundError without the file, ValueError for anything else in it."""
    if not file.is_file():
        raise FileNotFoundError(f"{str(file)!r} does not exist or is no file")
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{str(file)!r} cannot be read as JSON: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{str(file)!r} must hold one JSON object, got {type(found).__name__}")
    return found


def _shards(file: Path) -> list[Path]:
    if file.suffix != ".json":
        return [file]
    places = read_json(file).get("weight_map")
    if not isinstance(places, dict) or not places:
        raise ValueError(f"{file}: the index has no weight_map")
    names = set(places.values())
    strange = [name for name in names if not isinstance(name, str) or Path(name).name != name]
    if strange:
        raise ValueError(f"{file}: shards must be plain file names, got {strange}")
    return [file.parent / name for name in sorted(names)]


def _index_safetensors(file: Path) -> dict[str, Leaf]:
    def reader(name: str):
        def read() -> Tensor:
            # Opened anew each time: what was read before leaves the memory with its mapping.
            with safe_open(file, framework="pt") as tensors:
                return tensors.get_tensor(name)

        return read

    try:
        with safe_open(file, framework="pt") as tensors:
            found = {name: tensors.get_slice(name) for name in tensors.keys()}  # noqa: SIM118 (no mapping)
            return {
                name: Leaf(
                    name, tuple(part.get_shape()), _safetensors_dtype(file, name, part.get_dtype()), reader(name)
                )
                for name, part in found.items()
            }
    except (SafetensorError, OSError) as error:
        raise ValueError(f"{file}: cannot be read as safetensors: {error}") from error


def _safetensors_dtype(file: Path, name: str, dtype: str) -> torch.dtype:
    if dtype not in _SAFETENSORS_DTYPES:
        raise ValueError(f"{file}: dtype of {name!r} must be one of {list(_SAFETENSORS_DTYPES)}, got {dtype}")
    return _SAFETENSORS_DTYPES[dtype]


def _index_pickle(file: Path) -> dict[str, Leaf]:
    tensors = _load_pickle(file)
    strange = [name for name, value in tensors.items() if not isinstance(name, str) or not isinstance(value, Tensor)]
    if strange:
        raise ValueError(f"{file}: expected tensors by name, got other values at {strange[:10]}")
    return {
        name: Leaf(name, tuple(value.shape), value.dtype, lambda name=name: _load_pickle(file)[name])
        for name, value in tensors.items()
    }


def _load_pickle(file: Path) -> dict[str, Tensor]:
    """Map the file into memory: nothing of it is there before it is used."""
    if not zipfile.is_zipfile(file):
        raise ValueError(f"{file}: cut off, or saved by PyTorch before 1.6: load and save it with a newer one")
    try:
        found = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except (UnpicklingError, RuntimeError, ValueError, TypeError, LookupError, AttributeError, EOFError) as error:
        raise ValueError(f"{file}: cannot be read as weights: {error}") from error
    if not isinstance(found, dict):
        raise ValueError(f"{file}: expected a dict of tensors, got {type(found).__name__}")
    return found
