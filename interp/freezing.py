"""Which layers and heads stop writing: choices from text, as multipliers of the inner rate, and for a block."""

import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from numbers import Integral
from typing import Any

import torch

__all__ = [
    "Freezing",
    "freeze",
    "freezing_multiplier",
    "parse_freezing",
    "parse_layers",
    "ttt_layers",
]


@dataclass(frozen=True)
class Freezing:
    """A set of frozen layers (absolute indices, in order), and of frozen heads: they read W_0 and never write."""

    name: str
    layers: tuple[int, ...]
    heads: Mapping[int, tuple[int, ...]] = field(default_factory=dict, hash=False)


def ttt_layers(config: Any) -> list[int]:
    """Give the absolute indices of a model's TTT layers; ValueError when its configuration has none."""
    kinds = getattr(config, "layer_types", None) or []
    layers = [index for index, kind in enumerate(kinds) if kind == "ttt"]
    if not layers:
        kind = getattr(config, "model_type", type(config).__name__)
        raise ValueError(f"not a TTT model: the configuration {kind!r} has layer_types {list(kinds)} without 'ttt'")
    return layers


@contextmanager
def freeze(
    model: Any,
    layers: Sequence[int] | None = None,
    heads: Mapping[int, Sequence[int]] | None = None,
    from_token: int | None = None,
) -> Iterator[Any]:
    """Keep parts of a model from writing within the block, and give the model back as it was, whatever happens.

    Without `layers` and `heads` every TTT layer is frozen. `layers` are absolute indices, `heads` is {layer: heads};
    with `from_token` (index of a real token of a row) `layers`, or else all, write up to that token. Blocks nest: what
    an outer one freezes stays frozen. What is frozen is the model's default, `model.config.frozen_*`, so it holds
    for every call, `generate` included, and for classes that came with a Hub checkpoint; wrapped models
    (`accelerate`, DistributedDataParallel, compiled ones) are looked through. The weights and any cache stay as they
    are: reading on from a cache keeps what it has learnt.

    Gives the model. ValueError for layers and heads that the model has not, for `from_token` below 0 and for
    `from_token` with `heads`; TypeError for entries that are no integers.
    """
    config = _config_of(model)
    known = ttt_layers(config)
    if layers is None and heads is None:
        layers = known
    chosen = _check_indices("layers", () if layers is None else layers, known)
    by_layer = _check_heads(heads or {}, known, config.num_attention_heads)
    names = ("frozen_layers", "frozen_heads", "frozen_from")
    before = {name: getattr(config, name, None) for name in names}
    if from_token is None:
        changed = _with_layers(before, chosen, by_layer)
    else:
        if heads is not None:
            raise ValueError(f"from_token freezes whole layers, not heads: got from_token={from_token}, heads={heads}")
        if isinstance(from_token, bool) or not isinstance(from_token, int) or from_token < 0:
            raise ValueError(f"from_token must be the index of a token, 0 or more, got {from_token!r}")
        changed = {**before, "frozen_from": _earlier(before["frozen_from"], known, chosen, from_token)}
    try:
        for name, value in changed.items():
            setattr(config, name, value)
        yield model
    finally:
        for name, value in before.items():
            setattr(config, name, value)


def parse_layers(text: str) -> list[int]:
    """Read indices from `2,3`, `0-1` or `0-3,7`, sorted; ValueError for anything else."""
    layers: set[int] = set()
    for part in text.split(","):
        match = re.fullmatch(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?", part)
        if match is None:
            raise ValueError(f"layers are given as '2,3', '0-1' or '0-3,7', got {text!r}")
        first, last = int(match[1]), int(match[2] or match[1])
        if last < first:
            raise ValueError(f"a range of layers goes upwards, got {part.strip()!r}")
        layers.update(range(first, last + 1))
    return sorted(layers)


def parse_freezing(text: str, layers: Sequence[int]) -> Freezing:
    """Read a configuration from `all` or indices as for `parse_layers`; its name is the text.

    `layers` are the TTT layers of the model; ValueError when others are asked for.
    """
    try:
        chosen = list(layers) if text.strip() == "all" else parse_layers(text)
    except ValueError as error:
        raise ValueError(f"a freezing is 'all' or a choice of layers: {error}") from error
    unknown = sorted(set(chosen) - set(layers))
    if unknown:
        raise ValueError(f"freezing {text!r}: layers {unknown} are no TTT layers, the model has {list(layers)}")
    return Freezing(text.replace(" ", ""), tuple(chosen))


def freezing_multiplier(freezing: Freezing, layers: Sequence[int], num_heads: int = 1) -> torch.Tensor:
    """Make a multiplier of the inner learning rate, float32 [1, L, H or 1, 1]: 0 at what is frozen, 1 elsewhere."""
    values = torch.ones(1, len(layers), num_heads if freezing.heads else 1, 1)
    for place, layer in enumerate(layers):
        if layer in freezing.layers:
            values[:, place] = 0.0
        elif layer in freezing.heads:
            values[:, place, list(freezing.heads[layer])] = 0.0
    return values


def _config_of(model: Any) -> Any:
    """The configuration of a model or of the one it wraps."""
    seen = model
    while getattr(seen, "config", None) is None or not hasattr(seen.config, "layer_types"):
        inner = getattr(seen, "module", None)
        if inner is None:
            return getattr(seen, "config", seen)
        seen = inner
    return seen.config


def _check_indices(name: str, values: Sequence[int], allowed: Sequence[int]) -> list[int]:
    if not isinstance(values, Iterable):
        raise TypeError(f"{name} must be a sequence of integers, got {values!r}")
    values = list(values)
    wrong = [value for value in values if isinstance(value, bool) or not isinstance(value, Integral)]
    if wrong:
        raise TypeError(f"{name} must be integers, got {wrong}")
    # NumPy's integers as Python's, which a configuration can be saved with.
    chosen = {int(value) for value in values}
    unknown = sorted(chosen - set(allowed))
    if unknown:
        raise ValueError(f"{name} must be among {list(allowed)}, got {unknown}")
    return sorted(chosen)


def _check_heads(heads: Mapping[int, Sequence[int]], known: Sequence[int], number: int) -> dict[int, list[int]]:
    _check_indices("the layers of heads", list(heads), known)
    return {
        int(layer): _check_indices(f"heads of layer {layer}", list(h), range(number)) for layer, h in heads.items()
    }


def _with_layers(before: Mapping[str, Any], layers: Sequence[int], heads: Mapping[int, list[int]]) -> dict[str, Any]:
    merged = {layer: list(frozen) for layer, frozen in (before["frozen_heads"] or {}).items()}
    for layer, frozen in heads.items():
        merged[layer] = sorted({*merged.get(layer, ()), *frozen})
    whole = sorted({*(before["frozen_layers"] or ()), *layers})
    return {**before, "frozen_layers": whole or None, "frozen_heads": merged or None}


def _earlier(before: Any, known: Sequence[int], layers: Sequence[int], token: int) -> int | dict[int, int]:
    """The earlier of two beginnings for every layer; one number where all TTT layers share it."""
    merged = dict(before) if isinstance(before, dict) else {} if before is None else dict.fromkeys(known, before)
    for layer in layers:
        merged[layer] = min(token, merged.get(layer, token))
    shared = set(merged.values())
    return shared.pop() if len(shared) == 1 and set(merged) == set(known) else merged
