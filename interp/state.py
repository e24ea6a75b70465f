"""What a text has made of the inner weights: spectra, ranks and drift along a stream, and distances between documents.

All is said of the committed state, the weights at the start of the open mini-batch, less W_0. Numbers are float64.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from interp.captum_targets import as_rows
from interp.freezing import ttt_layers
from interp.taps import kept_cache

__all__ = [
    "StateTrace",
    "document_distance",
    "effective_rank",
    "follow_state",
    "initial_state",
    "learnt_weights",
    "stable_rank",
]

Maps = list[tuple[Tensor, Tensor]]


@dataclass(frozen=True)
class StateTrace:
    """The state at C checkpoints of B rows; letters as in the package: L TTT layers, H heads.

    Attributes:
        checkpoints: columns read so far, [C].
        layers: absolute indices of the TTT layers, L of them.
        singular_values: per inner map, of W - W_0, falling, [B, L, H, C, min(in, out)].
        drift: Frobenius norm of the state less W_0, all maps and biases, [B, L, H, C].
        step: the same distance from the checkpoint before (the first: from the start of the call), [B, L, H, C].
    """

    checkpoints: tuple[int, ...]
    layers: tuple[int, ...]
    singular_values: tuple[Tensor, ...]
    drift: Tensor
    step: Tensor

    @property
    def effective_rank(self) -> tuple[Tensor, ...]:
        """Per inner map, [B, L, H, C]; see `effective_rank`."""
        return tuple(effective_rank(values) for values in self.singular_values)

    @property
    def stable_rank(self) -> tuple[Tensor, ...]:
        """Per inner map, [B, L, H, C]; see `stable_rank`."""
        return tuple(stable_rank(values) for values in self.singular_values)

    def to_pandas(self) -> pd.DataFrame:
        """A row per row of the batch, layer, head, checkpoint and inner map (from 1)."""
        index = torch.cartesian_prod(*(torch.arange(n) for n in self.drift.shape)).T
        row, layer, head, checkpoint = index
        tables = []
        for i, (effective, stable) in enumerate(zip(self.effective_rank, self.stable_rank, strict=True), start=1):
            table = {
                "row": row,
                "layer": torch.tensor(self.layers)[layer],
                "head": head,
                "tokens": torch.tensor(self.checkpoints)[checkpoint],
                "map": torch.full_like(row, i),
                "effective_rank": effective.flatten(),
                "stable_rank": stable.flatten(),
                "drift": self.drift.flatten(),
                "step": self.step.flatten(),
            }
            tables.append(pd.DataFrame({name: values.numpy() for name, values in table.items()}))
        return pd.concat(tables, ignore_index=True)


@torch.no_grad()
def follow_state(
    model: Any,
    input_ids: Tensor,
    checkpoints: Sequence[int],
    *,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
) -> StateTrace:
    """Read a stream [T] or [B, T] and look at the state after each number of columns in `checkpoints`.

    A checkpoint within a mini-batch shows the last commit. The text is read once, up to the last checkpoint, and of
    earlier states only the one before is kept. `past_key_values` is a state to go on from; it stays as it is.

    Raises:
        ValueError: checkpoints do not rise from 1 to T.
    """
    ids, mask = as_rows(input_ids, attention_mask)
    checkpoints = [int(c) for c in checkpoints]
    rising = all(a < b for a, b in zip([0, *checkpoints], checkpoints, strict=False))
    if not checkpoints or not rising or checkpoints[-1] > ids.shape[1]:
        raise ValueError(f"checkpoints must rise within 1 to {ids.shape[1]}, got {checkpoints}")
    layers = ttt_layers(model.config)
    first = initial_state(model, ids.device)
    cache = None if past_key_values is None else model.clone_cache(past_key_values)
    before = [[(torch.zeros(()), torch.zeros(()))] * len(maps) for maps in first]
    if cache is not None and cache.get_seq_length():
        before = learnt_weights(cache, first)
    spectra, drift, step = [], [], []
    for start, end in zip([0, *checkpoints], checkpoints, strict=False):
        outputs = model(
            input_ids=ids[:, start:end],
            attention_mask=None if mask is None else mask[:, start:end],
            past_key_values=cache,
            use_cache=True,
            output_plasticity=False,
            logits_to_keep=1,
        )
        cache = kept_cache(outputs)
        now = learnt_weights(cache, first)
        spectra.append([torch.stack(per_map, 1) for per_map in zip(*(map(_spectra, now)), strict=True)])
        drift.append(torch.stack([_norm(maps) for maps in now], 1))
        moved = [
            [(w - v, b - a) for (w, b), (v, a) in zip(x, y, strict=True)] for x, y in zip(now, before, strict=True)
        ]
        step.append(torch.stack([_norm(maps) for maps in moved], 1))
        before = now
    values = tuple(torch.stack(per_map, 3) for per_map in zip(*spectra, strict=True))
    return StateTrace(tuple(checkpoints), tuple(layers), values, torch.stack(drift, 3), torch.stack(step, 3))


@torch.no_grad()
def initial_state(model: Any, device: torch.device | str = "cpu") -> list[Maps]:
    """W_0 of every TTT layer, as (W [1, H, in, out], b [1, H, 1, out]) per inner map, float64 on the CPU.

    Taken from the cache of a token that did not write, so that it serves offloaded models, whose parameters are at
    hand inside a forward only.
    """
    outputs = model(
        input_ids=torch.zeros(1, 1, dtype=torch.long, device=device),
        ttt_lr_mult=torch.zeros(1),
        use_cache=True,
        output_plasticity=False,
    )
    return _weights(kept_cache(outputs))


def learnt_weights(cache: Any, initial: list[Maps]) -> list[Maps]:
    """The committed weights of a cache less W_0 (from `initial_state`), (dW, db) per layer and inner map, [B, ...]."""
    return [
        [(w - w0, b - b0) for (w, b), (w0, b0) in zip(maps, starts, strict=True)]
        for maps, starts in zip(_weights(cache), initial, strict=True)
    ]


def document_distance(*caches: Any) -> Tensor:
    """Frobenius distance between the states of all rows of some caches, all maps and biases, [L, H, N, N], float64.

    The N rows are those of the first cache, then those of the next. W_0 drops out.
    """
    if not caches:
        raise ValueError("document_distance needs at least one cache")
    weights = [_weights(cache) for cache in caches]
    distances = []
    for layer in zip(*weights, strict=True):
        rows = torch.cat([torch.cat([p.flatten(2) for pair in maps for p in pair], 2) for maps in layer])  # [N, H, D]
        per_head = rows.transpose(0, 1)
        distances.append(torch.cdist(per_head, per_head, compute_mode="donot_use_mm_for_euclid_dist"))
    return torch.stack(distances)


def effective_rank(singular_values: Tensor) -> Tensor:
    """exp of the entropy of the singular values made to sum to 1 (Roy and Vetterli), last axis; 0 for none."""
    total = singular_values.sum(-1, keepdim=True)
    share = singular_values / total.where(total > 0, torch.ones_like(total))
    rank = torch.special.entr(share).sum(-1).exp()
    return rank.where(total[..., 0] > 0, torch.zeros_like(rank))


def stable_rank(singular_values: Tensor) -> Tensor:
    """Squared Frobenius norm over the squared largest singular value, over the last axis; 0 for a zero matrix."""
    squares = singular_values.square()
    largest = squares.amax(-1)
    return squares.sum(-1) / largest.where(largest > 0, torch.ones_like(largest))


def _weights(cache: Any) -> list[Maps]:
    found = []
    for i, layer in enumerate(cache.layers):
        tensors = getattr(layer, "tensors", None)
        if tensors is None:
            continue  # a layer of another kind
        if not tensors:
            raise ValueError(f"layer {i} of the cache holds no TTT state yet")
        depth = sum(name.startswith("W") for name in tensors)
        found.append([tuple(tensors[f"{x}{n}"].detach().double().cpu() for x in "Wb") for n in range(1, depth + 1)])
    if not found:
        raise ValueError("the cache holds no TTT layer")
    return found


def _spectra(maps: Maps) -> list[Tensor]:
    return [torch.linalg.svdvals(weight) for weight, _ in maps]


def _norm(maps: Maps) -> Tensor:
    """[B, H]."""
    return sum(p.square().sum((2, 3)) for pair in maps for p in pair).sqrt()
