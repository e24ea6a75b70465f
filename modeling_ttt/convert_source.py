"""Where the weights and the configuration of an official checkpoint are, and both read under our names."""

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from .configuration_ttt import TTTConfig
from .convert_config import build_config, infer_sizes, read_settings, settings_from_jax, settings_from_torch
from .convert_leaves import Leaf, listed
from .convert_metadata import read_model_config
from .convert_names import expected_shapes, from_jax, to_jax
from .convert_stream import index_stream, joined
from .convert_torch import TORCH_FILES, index_torch, read_json

__all__ = ["Checkpoint", "ConfigLike", "SourceFiles", "find_source", "read_checkpoint"]

ConfigLike = str | os.PathLike | Mapping[str, Any] | TTTConfig

JAX_FILES = ("streaming_params", "streaming_train_state", "flax_params")
"""What holds the weights, in order of preference; `_<step>` may follow."""


@dataclass(frozen=True)
class SourceFiles:
    """The file with the weights (or the index of its shards), of the JAX code or of PyTorch, and its configuration."""

    weights: Path
    config: Path | None
    is_jax: bool


@dataclass(frozen=True)
class Checkpoint:
    """An official checkpoint under our names, its numbers unread.

    `skipped` counts leaves of an optimizer's state, `dropped` names what is stored but no parameter.
    """

    files: SourceFiles
    config: TTTConfig
    leaves: dict[str, Leaf]
    skipped: int
    dropped: list[str]


def find_source(source: str | os.PathLike) -> SourceFiles:
    """Find the checkpoint in a folder (also in its only `step_<n>`) or that a file is.

    FileNotFoundError when there is nothing of that name; ValueError when it holds no checkpoint or several.
    """
    path = Path(source)
    if path.is_file():
        return _source_of(path, is_jax=path.suffix not in (".safetensors", ".bin", ".json"))
    if not path.is_dir():
        raise FileNotFoundError(f"checkpoint {str(path)!r} does not exist")
    found = _jax_file(path)
    torch_files = [path / name for name in TORCH_FILES if (path / name).is_file()]
    if found and torch_files:
        raise ValueError(f"folder {str(path)!r} holds {found.name} and {torch_files[0].name}: name one of the files")
    if found or torch_files:
        return _source_of(found or torch_files[0], is_jax=found is not None)
    steps = [file for folder in sorted(path.glob("step_*")) if folder.is_dir() and (file := _jax_file(folder))]
    if len(steps) > 1:
        raise ValueError(
            f"folder {str(path)!r} holds several checkpoints, name one: {listed(f.parent.name for f in steps)}"
        )
    if not steps:
        names = ", ".join([*(f"{name}[_<step>]" for name in JAX_FILES), *TORCH_FILES])
        raise ValueError(f"folder {str(path)!r} holds no checkpoint: none of {names}")
    return _source_of(steps[0], is_jax=True)


def _jax_file(folder: Path) -> Path | None:
    for name in JAX_FILES:
        found = sorted(file for file in folder.glob(f"{name}*") if re.fullmatch(rf"{name}(_\d+)?", file.name))
        if len(found) > 1:
            raise ValueError(
                f"folder {str(folder)!r} holds several checkpoints, name one: {listed(f.name for f in found)}"
            )
        if found:
            return found[0]
    return None


def _source_of(weights: Path, is_jax: bool) -> SourceFiles:
    step = re.search(r"_\d+$", weights.name)
    # Of another step it describes the same model; shapes are compared in any case.
    jax = (f"metadata{step[0] if step else ''}.pkl", "metadata.pkl", "model_config.json")
    names = jax if is_jax else ("config.json",)
    configs = [weights.parent / name for name in names if (weights.parent / name).is_file()]
    return SourceFiles(weights, configs[0] if configs else None, is_jax)


def read_checkpoint(source: str | os.PathLike, config: ConfigLike | None = None) -> Checkpoint:
    """Read an official checkpoint's index, translate its names, and check every name and shape.

    `config` (a preset, a json file or a mapping) takes the place of the configuration beside it. ValueError, with
    all names, when some are unknown or missing, when shapes are wrong, and when there is no configuration.
    """
    files = find_source(source)
    settings = _settings(files, config)
    leaves, skipped, dropped, unknown = _read_jax(files) if files.is_jax else _read_torch(files, settings)
    where = str(files.weights)
    unmapped = f"; unknown names: {listed(unknown)}" if unknown else ""
    try:
        sizes = infer_sizes({name: leaf.shape for name, leaf in leaves.items()}, where)
    except ValueError as error:
        raise ValueError(f"{error}{unmapped}") from error
    sizes["tie_word_embeddings"] = "lm_head.weight" not in leaves
    built = build_config(settings, sizes, where)
    shapes = expected_shapes(built)
    missing = [_shown(name, files.is_jax) for name in shapes if name not in leaves]
    unknown += [leaf.name for name, leaf in leaves.items() if name not in shapes]
    wrong = {
        leaf.name: f"{leaf.name!r} {list(leaf.shape)} instead of {list(shapes[name])}"
        for name, leaf in leaves.items()
        if shapes.get(name, leaf.shape) != leaf.shape
    }
    problems = [f"unknown names: {listed(unknown)}"] if unknown else []
    problems += [f"missing names: {listed(missing)}"] if missing else []
    problems += [f"wrong shapes (as in PyTorch): {'; '.join(wrong.values())}"] if wrong else []
    if problems:
        raise ValueError(f"{where}: {'; '.join(problems)}")
    return Checkpoint(files, built, leaves, skipped, dropped)


def _settings(files: SourceFiles, config: ConfigLike | None) -> dict[str, Any]:
    if config is not None:
        settings = read_settings(config)
    elif files.config is None:
        wanted = "metadata.pkl or model_config.json" if files.is_jax else "config.json"
        raise ValueError(f"{files.weights}: there is no {wanted} beside it; pass config, a preset or a json file")
    elif files.config.suffix == ".pkl":
        settings = settings_from_jax(read_model_config(files.config), str(files.config))
    elif files.is_jax:
        settings = settings_from_jax(read_json(files.config), str(files.config))
    else:
        settings = settings_from_torch(read_json(files.config), str(files.config))
    if not files.is_jax and "ttt_backend" not in settings:
        # Only we write that key. The official PyTorch code has one base learning rate for both inner nets.
        settings.setdefault("ttt_base_lr", 1.0)
    return settings


def _read_jax(files: SourceFiles) -> tuple[dict[str, Leaf], int, list[str], list[str]]:
    index = index_stream(files.weights)
    leaves, unknown = {}, []
    for key, leaf in index.leaves.items():
        found = from_jax(key)
        if found is None:
            unknown.append(joined(key))
        else:
            leaves[found[0]] = leaf.turned(found[1])
    return leaves, index.skipped, [], unknown


def _read_torch(files: SourceFiles, settings: dict[str, Any]) -> tuple[dict[str, Leaf], int, list[str], list[str]]:
    leaves, dropped = index_torch(files.weights)
    head, table = leaves.get("lm_head.weight"), leaves.get("model.embed_tokens.weight")
    tied = settings.get("tie_word_embeddings")
    if head is not None and table is not None and tied is not False:
        if head.shape == table.shape and torch.equal(head.read(), table.read()):
            del leaves["lm_head.weight"]
        elif tied:
            raise ValueError(
                f"{files.weights}: tie_word_embeddings is true, but lm_head.weight is not the embedding; "
                "pass a config that has it false"
            )
    return leaves, 0, dropped, []


def _shown(name: str, is_jax: bool) -> str:
    found = to_jax(name) if is_jax else None
    return joined(found[0]) if found else name
