"""`metadata.pkl` of the official JAX code, read without running anything that it names.

A pickle is a program. Of this one every name it imports is replaced by an inert record, and names outside a fixed list
are refused; nothing it calls does anything. What could exhaust the machine while merely being read is refused before.
"""

import io
import os
import pickle
import pickletools
from pathlib import Path
from typing import Any

__all__ = ["read_model_config"]

MAX_BYTES = 2**20
MAX_TUPLES = 2000

_BUILTINS = ("bool", "bytes", "complex", "dict", "float", "frozenset", "int", "list", "set", "str", "tuple")
ALLOWED = frozenset(
    [("builtins", name) for name in _BUILTINS]
    + [("ml_collections.config_dict.config_dict", name) for name in ("ConfigDict", "FieldReference")]
    + [("ttt.models.model", "ModelConfig")]
)
"""All names that a metadata.pkl of the official code has."""


class _Inert:
    """Stands for whatever the pickle names: takes any arguments and any state, does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "_Inert":
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any):
        self.state: Any = None

    def __setstate__(self, state: Any) -> None:
        self.state = state


class _InertUnpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> type[_Inert]:
        if (module, name) not in ALLOWED:
            allowed = ", ".join(sorted(".".join(entry) for entry in ALLOWED))
            raise pickle.UnpicklingError(f"it names {module}.{name}; allowed are {allowed}")
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        raise pickle.UnpicklingError(f"it refers to an object outside, {pid!r}")


def read_model_config(path: str | os.PathLike) -> dict[str, Any]:
    """The model configuration in a metadata.pkl: the keys of the official JAX code, plain values.

    FileNotFoundError without the file; ValueError, naming it, for a pickle that is damaged, holds anything else or
    names anything that a metadata.pkl has not.
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"metadata file {str(path)!r} does not exist or is no file")
    if path.stat().st_size > MAX_BYTES:
        raise ValueError(f"{path}: a metadata.pkl has at most {MAX_BYTES} bytes, got {path.stat().st_size}")
    raw = path.read_bytes()
    try:
        _refuse_exhausting(raw)
        found = _InertUnpickler(io.BytesIO(raw)).load()
    # A damaged pickle fails in as many ways as the objects it builds.
    except (pickle.UnpicklingError, ValueError, TypeError, AttributeError, LookupError, EOFError) as error:
        raise ValueError(f"{path}: not the metadata of a TTT model: {error}") from error
    except (ImportError, ArithmeticError, MemoryError, RecursionError) as error:
        raise ValueError(f"{path}: not the metadata of a TTT model: {type(error).__name__} {error}") from error
    config = _plain(found.get("model_config")) if isinstance(found, dict) else None
    if not isinstance(config, dict) or not all(isinstance(key, str) for key in config):
        raise ValueError(f"{path}: a metadata.pkl holds a dict with the dict 'model_config', this one does not")
    return config


def _refuse_exhausting(raw: bytes) -> None:
    """Numbers of memo entries make room for themselves, tuples of tuples exhaust the stack when they are hashed."""
    tuples = 0
    for code, argument, _ in pickletools.genops(raw):
        if code.name in ("PUT", "BINPUT", "LONG_BINPUT") and not 0 <= argument <= len(raw):
            raise ValueError(f"memo entry {argument} in a pickle of {len(raw)} bytes")
        tuples += code.name in ("TUPLE", "TUPLE1", "TUPLE2", "TUPLE3", "FROZENSET")
    if tuples > MAX_TUPLES:
        raise ValueError(f"it builds {tuples} tuples, at most {MAX_TUPLES} are read")


def _plain(value: Any) -> Any:
    """A dict, also from inside the configuration class of ml_collections."""
    if isinstance(value, _Inert) and isinstance(value.state, dict):
        value = value.state.get("_fields", value.state)
        if isinstance(value, dict):
            return {key: _field(entry) for key, entry in value.items()}
    return value


def _field(value: Any) -> Any:
    if isinstance(value, _Inert) and isinstance(value.state, dict):
        return value.state.get("_value")
    return value
