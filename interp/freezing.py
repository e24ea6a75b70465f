"""Which layers stop writing: such choices from text, and as multipliers of the inner learning rate."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class Freezing:
    """A set of frozen layers (absolute indices, in order): they read W_0 and never write."""

    name: str
    layers: tuple[int, ...]


def ttt_layers(config: Any) -> list[int]:
    """Give the absolute indices of a model's TTT layers; ValueError when its configuration has none."""
    kinds = getattr(config, "layer_types", None) or []
    layers = [index for index, kind in enumerate(kinds) if kind == "ttt"]
    if not layers:
        kind = getattr(config, "model_type", type(config).__name__)
        raise ValueError(f"not a TTT model: the configuration {kind!r} has layer_types {list(kinds)} without 'ttt'")
    return layers


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


def freezing_multiplier(freezing: Freezing, layers: Sequence[int]) -> torch.Tensor:
    """Make a multiplier of the inner learning rate, float32 [1, L, 1, 1]: 0 at frozen layers, 1 elsewhere."""
    values = [0.0 if layer in freezing.layers else 1.0 for layer in layers]
    return torch.tensor(values).view(1, -1, 1, 1)
