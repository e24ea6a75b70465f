"""Models and tokenizers by name, through the Auto classes, with one clear error for what can go wrong."""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

import modeling_ttt  # noqa: F401  (registers the TTT classes with the Auto classes)
from interp.freezing import parse_layers, ttt_layers

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float64": torch.float64}


def load_model(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    trust_remote_code: bool = False,
    config: str | os.PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
) -> Any:
    """Load a TTT causal language model from a folder or the Hub, in evaluation mode.

    `dtype` is that of the parameters, `device` (cpu) where they lie. `config` (a folder, file or Hub id)
    replaces the configuration stored with the model, and `overrides` replace single keys of it. ValueError
    when the model cannot be found or read, when it has no TTT layers, for unknown dtypes and keys, and for
    devices that this machine does not have.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    _check_device(device or "cpu")
    name = os.fspath(name_or_path)
    _check_folder("model", name, "config.json")
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    try:
        settings = AutoConfig.from_pretrained(name if config is None else os.fspath(config), **common)
    except (OSError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"the configuration of model {name!r} could not be read: {error}") from error
    ttt_layers(settings)
    settings = override_config(settings, overrides or {})
    try:
        model = AutoModelForCausalLM.from_pretrained(name, config=settings, dtype=DTYPES[dtype], **common)
    except (OSError, ValueError, RuntimeError) as error:
        raise ValueError(f"model {name!r} could not be loaded: {error}") from error
    return model.to(device or "cpu").eval()


def load_tokenizer(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer in a folder or on the Hub; ValueError when there is none."""
    name = os.fspath(name_or_path)
    _check_folder("tokenizer", name, "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        raise ValueError(f"no tokenizer could be loaded from {name!r}: {error}") from error


def parse_overrides(pairs: list[str]) -> dict[str, Any]:
    """Read configuration keys from `key=value`; values are JSON (`true`, `0.5`, `[0, 1]`) or else strings.

    Layer lists may be written `frozen_layers=0-3,7`. ValueError for anything without a key.
    """
    overrides = {}
    for pair in pairs:
        key, equals, text = pair.partition("=")
        if not equals or not key.isidentifier():
            raise ValueError(f"configuration overrides are given as key=value, got {pair!r}")
        try:
            value = json.loads(text)
        except ValueError:
            value = text
        if key == "frozen_layers" and not isinstance(value, list | None):
            value = parse_layers(text)
        overrides[key] = value
    return overrides


def override_config(config: PreTrainedConfig, overrides: Mapping[str, Any]) -> PreTrainedConfig:
    """Replace some keys of a configuration and validate it anew; ValueError for keys that it does not have."""
    if not overrides:
        return config
    known = config.to_dict()
    unknown = sorted(set(overrides) - set(known))
    if unknown:
        raise ValueError(f"configuration overrides {unknown} are no keys of {type(config).__name__}")
    try:
        return type(config).from_dict({**known, **overrides})
    except (TypeError, ValueError, StrictDataclassError) as error:
        raise ValueError(f"configuration overrides {dict(overrides)} are refused: {error}") from error


def _check_device(device: str | torch.device) -> None:
    try:
        # Builds without the device raise AssertionError; meta exists, but nothing can be read from it.
        torch.zeros(1, device=device).item()
    except (AssertionError, RuntimeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device must be one that works here, got {str(device)!r}: {reason}") from error


def _check_folder(what: str, name: str, *files: str) -> None:
    """A folder must hold one of `files`; a name that can only be a path must exist."""
    path = Path(name)
    if path.is_dir():
        if not any((path / file).exists() for file in files):
            raise ValueError(f"no {what} in folder {name!r}: it has none of {', '.join(files)}")
    elif path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1:
        raise ValueError(f"{what} folder {name!r} does not exist or is no folder")
