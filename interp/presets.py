"""Named choices of layers: the presets of the earlier study, thirds, and the families that a sweep goes through."""

from collections.abc import Sequence
from itertools import combinations
from math import comb

import numpy as np

from interp.freezing import Freezing

__all__ = ["FAMILIES", "PRESETS", "PRESET_DEPTH", "THIRDS", "freeze_preset", "layer_thirds", "sweep_freezings"]

PRESET_DEPTH = 24
# The lists of the earlier study, for its 24 layers. The two drift presets were used on repetitive text.
PRESETS: dict[str, tuple[int, ...]] = {
    "wikitext": (),
    "cortex": (0, 1, 2, 3, 4),
    "retina": (20, 21, 22, 23),
    "middle_light": (0, 1, 22, 23),
    "middle_strict": (0, 1, 2, 3, 20, 21, 22, 23),
    "drift_uniform": (),
    "drift_retina": (20, 21, 22, 23),
}
THIRDS = ("early", "middle", "late")
ON_REPETITIVE_TEXT = ("drift_uniform", "drift_retina")
FAMILIES = ("single", "leave-one-in", "prefix", "suffix", "thirds", "random", "heads", "presets")


def freeze_preset(name: str, layers: Sequence[int]) -> list[int]:
    """Give the frozen layers of a preset as explicit indices among a model's TTT layers (in order).

    With 24 layers they are those of the earlier study. Otherwise every run of layers goes to the same relative depth,
    rounded, and keeps at least one layer. Also "early", "middle" and "late" (`layer_thirds`), and "all". ValueError
    for another name.
    """
    layers = list(layers)
    if name == "all":
        return layers
    if name in THIRDS:
        return layer_thirds(layers)[name]
    if name not in PRESETS:
        raise ValueError(f"preset must be one of {[*PRESETS, *THIRDS, 'all']}, got {name!r}")
    chosen: set[int] = set()
    for first, last in _runs(PRESETS[name]):
        start = round(first * len(layers) / PRESET_DEPTH)
        stop = round((last + 1) * len(layers) / PRESET_DEPTH)
        if stop <= start:
            start, stop = (0, 1) if first == 0 else (len(layers) - 1, len(layers))
        chosen |= set(layers[start:stop])
    return sorted(chosen)


def layer_thirds(layers: Sequence[int]) -> dict[str, list[int]]:
    """Cut a model's TTT layers into "early", "middle" and "late"; with 24 of them 0-7, 8-15 and 16-23.

    Where they do not divide by three the borders are rounded, so that the middle takes the odd ones of four.
    ValueError for fewer than three layers.
    """
    layers = list(layers)
    if len(layers) < 3:
        raise ValueError(f"thirds need three TTT layers or more, got {layers}")
    first, second = round(len(layers) / 3), round(2 * len(layers) / 3)
    return dict(zip(THIRDS, (layers[:first], layers[first:second], layers[second:]), strict=True))


def sweep_freezings(
    layers: Sequence[int],
    num_heads: int,
    families: Sequence[str] = FAMILIES[:6],
    *,
    random_subsets: int = 8,
    seed: int = 0,
) -> tuple[list[Freezing], dict[str, dict[str, str]]]:
    """Give the different freezings of some families, "all" first, and what each family calls them.

    The second value is {family: {label: name of the freezing}}: one freezing may belong to several families. Names
    list the frozen layers (`0,3`) or head (`layer 0 head 1`). Families:

    - single: one layer frozen; leave-one-in: all but one; prefix: the first n; suffix: the last n;
    - thirds: early, middle, late; presets: those of `PRESETS` that freeze something;
    - random: for every size that the other families freeze, `random_subsets` different subsets drawn without
      replacement (all of them where there are no more), the null band that a named subset must leave;
    - heads: one head of one layer.

    ValueError for an unknown family.
    """
    unknown = sorted(set(families) - set(FAMILIES))
    if unknown:
        raise ValueError(f"families must be among {list(FAMILIES)}, got {unknown}")
    layers = list(layers)
    members = {family: _family(family, layers) for family in families if family not in ("random", "heads")}
    if "random" in families:
        sizes = sorted({len(chosen) for group in members.values() for chosen in group.values()} or {1})
        members["random"] = _random(layers, [n for n in sizes if 0 < n < len(layers)], random_subsets, seed)
    found = {"all": Freezing("all", tuple(layers))}
    named: dict[str, dict[str, str]] = {}
    for family in families:
        if family == "heads":
            entries = [Freezing(f"layer {i} head {h}", (), {i: (h,)}) for i in layers for h in range(num_heads)]
            named[family] = {entry.name: entry.name for entry in entries}
        else:
            made = {label: _named(chosen, layers) for label, chosen in members[family].items() if chosen}
            named[family] = {label: entry.name for label, entry in made.items()}
            entries = list(made.values())
        found |= {entry.name: entry for entry in entries if entry.name not in found}
    return list(found.values()), named


def _named(chosen: Sequence[int], layers: Sequence[int]) -> Freezing:
    name = "all" if list(chosen) == list(layers) else ",".join(map(str, chosen))
    return Freezing(name, tuple(chosen))


def _family(family: str, layers: list[int]) -> dict[str, list[int]]:
    if family == "single":
        return {f"layer {layer}": [layer] for layer in layers}
    if family == "leave-one-in":
        return {f"all but layer {layer}": [other for other in layers if other != layer] for layer in layers}
    if family == "prefix":
        return {f"first {n}": layers[:n] for n in range(1, len(layers) + 1)}
    if family == "suffix":
        return {f"last {n}": layers[-n:] for n in range(1, len(layers) + 1)}
    if family == "thirds":
        return layer_thirds(layers)
    return {name: freeze_preset(name, layers) for name in PRESETS}


def _random(layers: list[int], sizes: Sequence[int], number: int, seed: int) -> dict[str, list[int]]:
    if number < 1:
        raise ValueError(f"random_subsets must be at least 1, got {number}")
    rng = np.random.default_rng(seed)
    found: dict[str, list[int]] = {}
    for size in sizes:
        if comb(len(layers), size) <= number:
            subsets = {tuple(subset) for subset in combinations(layers, size)}
        else:
            subsets = set()
            while len(subsets) < number:
                subsets.add(tuple(sorted(rng.choice(layers, size, replace=False).tolist())))
        found |= {f"{size} at random: {','.join(map(str, subset))}": list(subset) for subset in sorted(subsets)}
    return found


def _runs(indices: Sequence[int]) -> list[tuple[int, int]]:
    """First and last of every run of neighbours."""
    runs: list[tuple[int, int]] = []
    for index in indices:
        if runs and index == runs[-1][1] + 1:
            runs[-1] = (runs[-1][0], index)
        else:
            runs.append((index, index))
    return runs
