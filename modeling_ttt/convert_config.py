"""Configurations of checkpoints: from the keys of the official code, from a preset, and from the shapes themselves."""

import json
import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError

from .configuration_ttt import PRESETS, TTTConfig

__all__ = [
    "build_config",
    "infer_sizes",
    "read_settings",
    "settings_from_jax",
    "settings_from_torch",
    "settings_to_jax",
]

Shapes = Mapping[str, tuple[int, ...]]

# What the official JAX code calls otherwise, and what it calls alike.
_RENAMED = {"max_sequence_length": "max_position_embeddings", "conv_width": "conv_kernel"}
_ALIKE = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "initializer_range",
    "rms_norm_eps",
    "tie_word_embeddings",
    "bos_token_id",
    "eos_token_id",
    "pad_token_id",
    "ttt_base_lr",
    "mini_batch_size",
    "rope_theta",
    "pre_conv",
)
_JAX_KEYS = _RENAMED | {name: name for name in _ALIKE}
# What no shape tells and no default may replace.
_NEEDED = ("seq_modeling_block", "ttt_base_lr", "rope_theta", "rms_norm_eps", "max_sequence_length")
_BLOCKS = {
    f"ttt_{kind}{suffix}": {"ttt_layer_type": kind, "share_qk": mamba, "use_gate": mamba}
    for kind in ("linear", "mlp")
    for suffix, mamba in (("", True), ("_base", False))
}
# Keys of a config.json that say how it was saved, and `use_cache`, which the official code has off.
_DROPPED = ("architectures", "auto_map", "dtype", "model_type", "torch_dtype", "transformers_version", "use_cache")


def read_settings(config: str | os.PathLike | Mapping[str, Any] | TTTConfig) -> dict[str, Any]:
    """Settings under our names from a preset ("125m", "125m-TTT"), a json file or a mapping with either's keys.

    ValueError for other names and for files that cannot be read.
    """
    if isinstance(config, TTTConfig):
        return settings_from_torch(config.to_dict(), "config")
    if isinstance(config, Mapping):
        return _by_keys(dict(config), "config")
    name = os.fspath(config)
    if Path(name).is_file():
        try:
            found = json.loads(Path(name).read_text(encoding="utf-8"))
        except (OSError, ValueError, RecursionError) as error:
            raise ValueError(f"config {name!r} cannot be read as JSON: {error}") from error
        if not isinstance(found, dict):
            raise ValueError(f"config {name!r} must hold one JSON object, got {type(found).__name__}")
        return _by_keys(found, name)
    size = name.removesuffix("-TTT")
    # The size that the paper calls 1.3B is 1b in the official code.
    size = "1b" if size == "1.3b" else size
    if size not in PRESETS:
        raise ValueError(f"config must be a json file or one of {sorted(PRESETS)}, got {name!r}")
    return dict(PRESETS[size])


def _by_keys(found: dict[str, Any], where: str) -> dict[str, Any]:
    jax = "seq_modeling_block" in found
    return settings_from_jax(found, where) if jax else settings_from_torch(found, where)


def settings_from_jax(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Translate the keys of the official JAX code; `where` is what messages name.

    Keys that concern its training only (dropout, rematerialisation) say nothing here. ValueError for a sequence block
    other than the TTT ones and when a key is missing that no shape can tell.
    """
    missing = [name for name in _NEEDED if found.get(name) is None]
    if missing:
        raise ValueError(f"{where}: the model configuration lacks {missing}")
    block = found["seq_modeling_block"]
    if not isinstance(block, str) or block not in _BLOCKS:
        raise ValueError(f"{where}: seq_modeling_block must be one of {list(_BLOCKS)}, got {block!r}")
    settings = {ours: found[theirs] for theirs, ours in _JAX_KEYS.items() if theirs in found}
    return settings | _BLOCKS[block]


def settings_from_torch(found: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Take over a config.json of the official PyTorch code or of ours; `where` is what messages name."""
    kind = found.get("model_type", "ttt")
    if kind != "ttt":
        raise ValueError(f"{where}: model_type must be 'ttt', got {kind!r}")
    return {name: value for name, value in found.items() if name not in _DROPPED and not name.startswith("_")}


def settings_to_jax(config: TTTConfig) -> dict[str, Any]:
    """The keys of the official JAX code; ValueError for what that code cannot do."""
    if config.share_qk != config.use_gate:
        raise ValueError(
            f"the JAX code has share_qk and use_gate both or neither, got {config.share_qk} and {config.use_gate}"
        )
    if config.hidden_act != "silu":
        raise ValueError(f"the JAX code has hidden_act 'silu' only, got {config.hidden_act!r}")
    for name in ("frozen_layers", "frozen_heads", "frozen_from"):
        if getattr(config, name) not in (None, [], {}):
            raise ValueError(f"the JAX code cannot freeze inner weights, got {name} = {getattr(config, name)!r}")
    values = config.to_dict() | {"ttt_base_lr": config.base_lr, "rope_theta": config.rope_parameters["rope_theta"]}
    settings = {theirs: values[ours] for theirs, ours in _JAX_KEYS.items()}
    return {"seq_modeling_block": f"ttt_{config.ttt_layer_type}{'' if config.use_gate else '_base'}", **settings}


def infer_sizes(shapes: Shapes, where: str) -> dict[str, Any]:
    """Every setting that names and shapes of parameters (under our names) tell; `where` is what messages name.

    ValueError when layers are missing in between, or a tensor that is needed for this is missing or has another
    number of dimensions.
    """

    def shape(name: str, rank: int) -> tuple[int, ...]:
        if name not in shapes or len(shapes[name]) != rank:
            got = list(shapes[name]) if name in shapes else "nothing"
            raise ValueError(f"{where}: {name!r} must be there with {rank} dimensions, got {got}")
        return shapes[name]

    layers = {int(match[1]) for name in shapes if (match := re.match(r"model\.layers\.(\d+)\.", name))}
    if layers != set(range(len(layers))) or not layers:
        raise ValueError(f"{where}: layers must be numbered from 0 without gaps, got {sorted(layers)[:50]}")
    mixer = "model.layers.0.seq_modeling_block."
    vocab_size, hidden_size = shape("model.embed_tokens.weight", 2)
    sizes = {
        "vocab_size": vocab_size,
        "hidden_size": hidden_size,
        "intermediate_size": shape("model.layers.0.mlp.gate_proj.weight", 2)[0],
        "num_hidden_layers": len(layers),
        "num_attention_heads": shape(f"{mixer}W1", 3)[0],
        "mini_batch_size": shape(f"{mixer}learnable_token_idx", 1)[0],
        "ttt_layer_type": "mlp" if f"{mixer}W2" in shapes else "linear",
        "share_qk": f"{mixer}conv_q.weight" in shapes,
        "use_gate": f"{mixer}g_proj.weight" in shapes,
        "pre_conv": "model.layers.0.conv.conv.weight" in shapes,
    }
    for name in ("model.layers.0.conv.conv.weight", f"{mixer}conv_q.weight"):
        if name in shapes:
            sizes["conv_kernel"] = shape(name, 3)[2]
    return sizes


def build_config(settings: Mapping[str, Any], sizes: Mapping[str, Any], where: str) -> TTTConfig:
    """Join what was said and what the shapes tell; ValueError when they differ or the result is no configuration."""
    differing = {name: (settings[name], value) for name, value in sizes.items() if settings.get(name, value) != value}
    if differing:
        told = "; ".join(f"{name} is {said!r} there, {found!r} here" for name, (said, found) in differing.items())
        raise ValueError(f"{where}: the configuration does not fit the parameters: {told}")
    try:
        return TTTConfig(**{**settings, **sizes})
    except (StrictDataclassError, TypeError, ValueError, LookupError) as error:
        raise ValueError(f"{where}: the model configuration is refused: {error}") from error
