"""Models and tokenizers by name, through the Auto classes, with one clear error for what can go wrong."""

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple

import torch
from filelock import FileLock
from huggingface_hub import constants, snapshot_download
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedConfig

from interp.freezing import parse_layers, ttt_layers
from interp.hub_files import broken_connection, fetch_jax, has_config, holds_jax
from modeling_ttt.convert_jax import convert_checkpoint, find_source  # this import registers the Auto classes, too

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
    "auto": "auto",
}
_JAX_NAMES = ("streaming_params*", "streaming_train_state*", "flax_params*", "step_*")
# Part of the name of a converted folder: raised when a conversion comes to give something else.
_CONVERSION = 1
_NO_TOKENIZER = "JAX checkpoint {!r} comes without a tokenizer: name the one that it was trained with"
_LOADING_PROBLEMS = ("missing_keys", "unexpected_keys", "mismatched_keys")


class Loaded(NamedTuple):
    """A causal language model in evaluation mode and its tokenizer."""

    model: Any
    tokenizer: Any


def load(
    name_or_path: str | os.PathLike,
    *,
    tokenizer: str | os.PathLike | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
    **options: Any,
) -> Loaded:
    """Load a model and its tokenizer, as `load_model` (which takes `options`) and `load_tokenizer` do.

    `tokenizer` names another folder or Hub id for the tokenizer; JAX checkpoints, which come without one, need it.
    """
    of_model = {"revision": revision, "trust_remote_code": trust_remote_code}
    of_tokenizer = of_model if tokenizer is None else {"trust_remote_code": trust_remote_code}
    # First, since it is quick to fail.
    found = load_tokenizer(name_or_path if tokenizer is None else tokenizer, **of_tokenizer)
    return Loaded(load_model(name_or_path, **of_model, **options), found)


def load_model(
    name_or_path: str | os.PathLike,
    *,
    revision: str | None = None,
    dtype: str = "float32",
    device: str | torch.device | None = None,
    device_map: str | Mapping[str, Any] | None = None,
    trust_remote_code: bool = False,
    config: str | os.PathLike | None = None,
    overrides: Mapping[str, Any] | None = None,
    ttt_only: bool = True,
    cache_dir: str | os.PathLike | None = None,
) -> Any:
    """Load a TTT causal language model from a folder, the Hub or a JAX checkpoint, in evaluation mode.

    `dtype` is that of the parameters ("auto": as stored); `device` (cpu) is where they lie, or `device_map` spreads
    them. `config` (a folder, file or Hub id) replaces the configuration stored with the model, and `overrides` replace
    single keys of it. A checkpoint of the official JAX code (a folder, a file in it, or the Hub id of one) is
    converted first, into a folder below `cache_dir` (default: beside the Hub's cache) that is used again until the
    checkpoint changes; there `config` is a preset or a json file. `ttt_only=False` also takes models without TTT
    layers, as controls.

    ValueError when the model cannot be found, fetched or read, when parameters are missing or of another shape, when
    it has no TTT layers, for unknown dtypes and keys, for a `revision` of a folder, and for devices that this machine
    lacks.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {list(DTYPES)}, got {dtype!r}")
    if device is not None and device_map is not None:
        raise ValueError(f"pass device or device_map, got {str(device)!r} and {device_map!r}")
    _check_device(device or "cpu")
    name = os.fspath(name_or_path)
    _check_revision(name, revision)
    foreign = _jax_folder(name, revision)
    if foreign is not None:
        converted = convert_to_cache(foreign, config=config, cache_dir=cache_dir)
        name, revision, config = os.fspath(converted), None, None
    _check_folder("model", name, "config.json")
    common = {"revision": revision, "trust_remote_code": trust_remote_code}
    settings = _load_config(name if config is None else os.fspath(config), name, common)
    if ttt_only:
        ttt_layers(settings)
    settings = override_config(settings, overrides or {})
    placed = {} if device_map is None else {"device_map": device_map}
    model = _load_weights(name, config=settings, dtype=DTYPES[dtype], **common, **placed)
    return (model if device_map is not None else model.to(device or "cpu")).eval()


def load_tokenizer(
    name_or_path: str | os.PathLike, *, revision: str | None = None, trust_remote_code: bool = False
) -> Any:
    """Load the tokenizer in a folder or on the Hub; ValueError when there is none."""
    name = os.fspath(name_or_path)
    _check_revision(name, revision)
    if is_jax_checkpoint(name):
        raise ValueError(_NO_TOKENIZER.format(name))
    _check_folder("tokenizer", name, "tokenizer_config.json", "tokenizer.json", "tokenizer.model", "vocab.json")
    try:
        return AutoTokenizer.from_pretrained(name, revision=revision, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError) as error:
        if not Path(name).exists() and holds_jax(name, revision):
            raise ValueError(_NO_TOKENIZER.format(name)) from None
        where = "" if revision is None else f", revision {revision!r}"
        raise ValueError(f"no tokenizer could be loaded from {name!r}{where}: {_reason(error)}") from error


def is_jax_checkpoint(name: str | os.PathLike) -> bool:
    """Whether a path is a checkpoint of the official JAX code: one of its files, or a folder with them."""
    path = Path(name)
    if path.is_file():
        return find_source(path).is_jax
    if not path.is_dir() or (path / "config.json").exists():
        return False
    return any(True for pattern in _JAX_NAMES for _ in path.glob(pattern))


def convert_to_cache(
    source: str | os.PathLike,
    *,
    config: str | os.PathLike | None = None,
    cache_dir: str | os.PathLike | None = None,
) -> Path:
    """Convert a JAX checkpoint, unless that was done before and it has not changed since, and give the folder.

    Processes that ask at the same time wait for the first one. ValueError when it cannot be converted or the cache
    cannot be written to.
    """
    root = Path(cache_dir or Path(constants.HF_HOME) / "modeling_ttt")
    files = find_source(source)
    states = [_file_state(file) for file in (files.weights, files.config) if file is not None]
    given = None if config is None else os.fspath(config)
    if given is not None and Path(given).is_file():
        given = hashlib.sha256(Path(given).read_bytes()).hexdigest()
    key = hashlib.sha256(json.dumps([_CONVERSION, states, given]).encode()).hexdigest()[:24]
    folder = root / f"{files.weights.resolve().parent.name}-{key}"
    try:
        root.mkdir(parents=True, exist_ok=True)
        with FileLock(root / f".{folder.name}.lock"):
            if not folder.is_dir():
                convert_checkpoint(files.weights, folder, config=config)
    except OSError as error:
        raise ValueError(f"{str(source)!r} could not be converted into cache_dir {str(root)!r}: {error}") from error
    return folder


def local_copy(name_or_path: str | os.PathLike, *, revision: str | None = None) -> Path:
    """Give a local path as it is, or what a conversion reads of a Hub repository; ValueError when there is neither."""
    name = os.fspath(name_or_path)
    _check_revision(name, revision)
    if Path(name).exists():
        return Path(name)
    _check_folder("checkpoint", name)
    found = _jax_folder(name, revision)
    if found is not None:
        return found
    try:
        return Path(snapshot_download(name, revision=revision, allow_patterns=["*.json", "*.safetensors", "*.bin"]))
    except (OSError, ValueError, HFValidationError) as error:
        where = "" if revision is None else f", revision {revision!r},"
        told = f"checkpoint {name!r}{where} is no path here and could not be fetched: {_reason(error)}"
        raise ValueError(told) from error


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


def _jax_folder(name: str, revision: str | None) -> Path | None:
    """The JAX checkpoint that a name stands for, fetched if it is one of the Hub; None for anything else."""
    if is_jax_checkpoint(name):
        return Path(name)
    if not _is_hub_id(name):
        return None
    try:
        return fetch_jax(name, revision)
    except OSError as error:
        raise ValueError(f"JAX checkpoint {name!r} could not be fetched: {_reason(error)}") from error


def _load_config(source: str, name: str, common: Mapping[str, Any]) -> PreTrainedConfig:
    try:
        return AutoConfig.from_pretrained(source, **common)
    except (OSError, ValueError, ImportError, StrictDataclassError) as error:
        if _is_hub_id(source) and has_config(source, common["revision"]) is False:
            raise ValueError(f"repository {source!r} holds neither a config.json nor a JAX checkpoint") from error
        where = "" if common["revision"] is None else f", revision {common['revision']!r},"
        told = f"the configuration of model {name!r}{where} could not be read: {_reason(error)}"
        raise ValueError(told) from error


def _reason(error: Exception) -> str:
    """What went wrong; where a connection broke, the libraries guess at other reasons."""
    broken = broken_connection(error)
    return str(error) if broken is None else f"the Hub could not be reached ({type(broken).__name__}: {broken})"


def _load_weights(name: str, **settings: Any) -> Any:
    try:
        # Other shapes are reported below, by name.
        model, found = AutoModelForCausalLM.from_pretrained(
            name, output_loading_info=True, ignore_mismatched_sizes=True, **settings
        )
    except (OSError, ValueError, TypeError, KeyError, ImportError, RuntimeError, SafetensorError) as error:
        raise ValueError(f"model {name!r} could not be loaded: {_reason(error)}") from error
    wrong = {what: sorted(map(str, found[what])) for what in _LOADING_PROBLEMS if found.get(what)}
    if wrong:
        told = "; ".join(f"{what.replace('_', ' ')}: {', '.join(names)}" for what, names in wrong.items())
        raise ValueError(f"model {name!r} could not be loaded: its weights do not fit the configuration: {told}")
    return model


def _file_state(file: Path) -> list[Any]:
    """What changes with the file: where it is, and what the system notes whenever it is written to or replaced."""
    state = file.stat()
    return [str(file.resolve()), state.st_dev, state.st_ino, state.st_size, state.st_mtime_ns, state.st_ctime_ns]


def _check_revision(name: str, revision: str | None) -> None:
    if revision is not None and Path(name).exists():
        raise ValueError(f"revision is for names on the Hub, got {revision!r} for the path {name!r}")


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
    elif not _is_hub_id(name):
        raise ValueError(f"{what} folder {name!r} does not exist or is no folder")


def _is_hub_id(name: str) -> bool:
    path = Path(name)
    return not (path.exists() or path.is_absolute() or name.startswith(".") or name.count("/") > 1)
