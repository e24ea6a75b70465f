"""What run.json must hold: the keys of every run and the types of their values."""

from collections.abc import Callable, Mapping
from typing import Any

SCHEMA_VERSION = 1
KIND = "plasticity_run"
META_KEYS = (
    "schema_version",
    "kind",
    "created",
    "arguments",
    "model",
    "tokenizer",
    "corpus",
    "documents",
    "bucketing",
    "freezing",
    "seed",
    "versions",
    "definitions",
    "totals",
    "num_shards",
)


def check_meta(meta: Any, where: str) -> None:
    """Check the content of a run.json, `where` being its name in messages.

    ValueError for another kind or schema version, for a missing key and for a value of the wrong type.
    Keys beyond the agreed ones are allowed.
    """
    if not isinstance(meta, dict) or meta.get("kind") != KIND:
        raise ValueError(f"{where} does not describe a run of kind {KIND!r}")
    if meta.get("schema_version") != SCHEMA_VERSION:
        raise ValueError(
            f"{where} has schema_version {meta.get('schema_version')!r}, this version reads {SCHEMA_VERSION}"
        )
    absent = [key for key in META_KEYS if key not in meta]
    if absent:
        raise ValueError(f"{where} lacks the keys {absent}")
    _check(meta, _WHOLE, where)
    for name in ("model", "tokenizer", "totals"):
        _check(meta[name], _PARTS[name], where, f"{name}.")
    for name in ("documents", "freezing"):
        for index, entry in enumerate(meta[name]):
            _check(entry, _PARTS[name], where, f"{name}[{index}].")
    if len(meta["totals"]["mean_loss_frozen"]) != len(meta["freezing"]):
        raise ValueError(
            f"{where}: totals.mean_loss_frozen must have one entry per freezing configuration "
            f"({len(meta['freezing'])}), got {meta['totals']['mean_loss_frozen']!r}"
        )
    for name, key in (("documents", "document"), ("freezing", "name")):
        values = [entry[key] for entry in meta[name]]
        if len(set(values)) < len(values):
            raise ValueError(f"{where}: {name} must differ in {key!r}, got {values}")
    dataset = meta["corpus"].get("dataset_type")
    if not _text_or_none(dataset):
        raise ValueError(f"{where}: corpus.dataset_type must be a string, got {dataset!r}")


Rule = tuple[Callable[[Any], bool], str]


def _check(values: Mapping[str, Any], rules: Mapping[str, Rule], where: str, prefix: str = "") -> None:
    for key, (holds, allowed) in rules.items():
        if key not in values:
            raise ValueError(f"{where}: {prefix}{key} is missing, it must be {allowed}")
        if not holds(values[key]):
            raise ValueError(f"{where}: {prefix}{key} must be {allowed}, got {values[key]!r}")


def _integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _text(value: Any) -> bool:
    return isinstance(value, str)


def _text_or_none(value: Any) -> bool:
    return value is None or isinstance(value, str)


def _number_or_none(value: Any) -> bool:
    return value is None or _number(value)


def _index(value: Any) -> bool:
    return _integer(value) and value >= 0


def _indices(value: Any) -> bool:
    return isinstance(value, list) and all(map(_index, value)) and len(set(value)) == len(value)


def _frozen_heads(value: Any) -> bool:
    return isinstance(value, dict) and all(key.isdecimal() and _indices(heads) for key, heads in value.items())


def _frozen_from(value: Any) -> bool:
    if isinstance(value, dict):
        return all(key.isdecimal() and _index(index) for key, index in value.items())
    return value is None or _index(value)


def _texts(value: Any) -> bool:
    return isinstance(value, dict) and all(map(_text, value.values()))


def _objects(value: Any) -> bool:
    return isinstance(value, list) and all(isinstance(entry, dict) for entry in value)


_OBJECT: Rule = (lambda value: isinstance(value, dict), "an object")
_OBJECTS: Rule = (_objects, "a list of objects")
_TEXT: Rule = (_text, "a string")
_TEXTS: Rule = (_texts, "an object of strings")
_TEXT_OR_NULL: Rule = (_text_or_none, "a string or null")
_COUNT: Rule = (_index, "a whole number from 0")
_POSITIVE: Rule = (lambda value: _index(value) and value > 0, "a positive integer")
_LAYERS: Rule = (_indices, "a list of different whole numbers from 0")
_NUMBER: Rule = (_number, "a number")
_NUMBER_OR_NULL: Rule = (_number_or_none, "a number or null")

_WHOLE: dict[str, Rule] = {
    "created": _TEXT,
    **dict.fromkeys(("arguments", "model", "tokenizer", "corpus", "bucketing", "totals"), _OBJECT),
    "documents": _OBJECTS,
    "freezing": _OBJECTS,
    "seed": (lambda value: value is None or _integer(value), "an integer or null"),
    "versions": _TEXTS,
    "definitions": _TEXTS,
    "num_shards": _POSITIVE,
}
_PARTS: dict[str, dict[str, Rule]] = {
    "model": {
        "id": _TEXT,
        "revision": _TEXT_OR_NULL,
        "config_hash": _TEXT,
        "num_parameters": _COUNT,
        "ttt_layers": (lambda value: _indices(value) and value != [], "a non-empty list of different layer indices"),
        "frozen_layers": _LAYERS,
        "frozen_heads": (_frozen_heads, "an object {layer: [heads]}"),
        "frozen_from": (_frozen_from, "a whole number from 0, an object {layer: number} or null"),
        "num_heads": _POSITIVE,
        "mini_batch_size": _POSITIVE,
        "dtype": _TEXT,
    },
    "tokenizer": {"id": _TEXT_OR_NULL, "vocab_size": _POSITIVE},
    "documents": {"document": _COUNT, "name": _TEXT, "tokens": _COUNT, "bytes": _COUNT},
    "freezing": {"name": _TEXT, "layers": _LAYERS},
    "totals": {
        "documents": _COUNT,
        "tokens": _COUNT,
        "mean_loss": _NUMBER_OR_NULL,
        "mean_loss_frozen": (
            lambda value: isinstance(value, list) and all(map(_number_or_none, value)),
            "a list of numbers or nulls",
        ),
        "nats_per_byte": _NUMBER_OR_NULL,
        "seconds": _NUMBER,
        "tokens_per_second": _NUMBER,
    },
}
