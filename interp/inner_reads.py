"""What a read of a TTT layer gets from every write: the exact arithmetic of one layer, on recorded factors.

A write is per inner map an outer product -rate * [x; 1] (x) g, so a read at input a gets -rate * (a . x + 1) * g from
it. For a net of one map that is all. With two maps (TTT-MLP) the sum over writes is exact, the share of each a
convention:

`gelu_rule` says how the GELU between the maps is made linear: "rescale" takes the secant between the read at W_0 and
the read as it is (DeepLIFT, arXiv 1704.02685), "gradient" the slope at the read as it is, which leaves a curvature
over. `interaction` says who gets the product of what both maps learnt: "first" the writes to map 2, as if map 1 had
learnt first and been read through W_0 of map 2; "second" the writes to map 1, the other way round; "shapley" half
each.
"""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["GELU_RULES", "INTERACTIONS", "MiniBatch", "RowReads", "check_convention", "mini_batches", "write_inputs"]

GELU_RULES = ("rescale", "gradient")
INTERACTIONS = ("shapley", "first", "second")
_MIDPOINT = 1e-7

Maps = list[tuple[Tensor, Tensor]]


def check_convention(gelu_rule: str, interaction: str) -> None:
    """ValueError for names that are not in `GELU_RULES` and `INTERACTIONS`."""
    if gelu_rule not in GELU_RULES:
        raise ValueError(f"gelu_rule must be one of {GELU_RULES}, got {gelu_rule!r}")
    if interaction not in INTERACTIONS:
        raise ValueError(f"interaction must be one of {INTERACTIONS}, got {interaction!r}")


@dataclass(frozen=True)
class MiniBatch:
    """One mini-batch of all rows: `columns` of the aligned layout, n of them.

    `weights` per inner map (W [B, H, in, out], b [B, H, 1, out]) at its start; `starts` [B] bool rows that start from
    W_0 here, None for none; per map the inputs `xs` [B, H, n, in] and gradients `gs` [B, H, n, out]; `lr` [B, H, n].
    """

    columns: slice
    weights: Maps
    starts: Tensor | None
    xs: list[Tensor]
    gs: list[Tensor]
    lr: Tensor


def mini_batches(layer: Any) -> Iterator[MiniBatch]:
    """Go through a layer's writes (`interp.records.LayerWrites`) mini-batch by mini-batch, committing on the way."""
    places, size = layer.places, layer.places.mini_batch_size
    k, lr, *gradients = (places.align(x) for x in (layer.k, layer.lr, *layer.gradients))
    batch = len(k)
    initial = [tuple(p.expand(batch, -1, -1, -1) for p in pair) for pair in layer.initial]
    weights, starts = initial, None if places.uniform else places.starts
    for m, first in enumerate(range(0, k.shape[2], size)):
        at = slice(first, first + size)
        new = None if starts is None or not bool(starts[:, m].any()) else starts[:, m]
        if new is not None:
            weights = [
                tuple(torch.where(new[:, None, None, None], p, w) for p, w in zip(*pairs, strict=True))
                for pairs in zip(initial, weights, strict=True)
            ]
        xs = [k[:, :, at]]
        for weight, bias in weights[:-1]:
            xs.append(gelu(xs[-1] @ weight + bias))
        gs, rate = [g[:, :, at] for g in gradients], lr[:, :, at]
        yield MiniBatch(at, weights, new, xs, gs, rate)
        # An incomplete mini-batch is followed by nothing or by W_0, so that it may be committed here.
        scaled = [g * (rate * layer.token_rate[-1])[..., None] for g in gs]
        weights = [
            (weight - x.mT @ g, bias - g.sum(2, keepdim=True))
            for (weight, bias), x, g in zip(weights, xs, scaled, strict=True)
        ]


def write_inputs(layer: Any) -> list[Tensor]:
    """The inputs x of every inner map when each token was written, [B, H, T, in]; computed anew, the first is k."""
    if len(layer.initial) == 1:
        return [layer.k]
    found = [[x for x in batch.xs[1:]] for batch in mini_batches(layer)]
    return [layer.k, *(layer.places.unalign(torch.cat(parts, 2)) for parts in zip(*found, strict=True))]


class RowReads:
    """Reads of one layer at some columns, split over all writes.

    Args:
        layer: the layer's record (`interp.records.LayerWrites`).
        xs: `write_inputs(layer)`.
        q: queries of the reads, [B, H, R, f].
        rows: their columns, int64 [B, R].
        gelu_rule, interaction: see `check_convention`.

    Attributes:
        coefficients: per map [B, H, R, T], what g of a write is multiplied by in the read at that map.
        base: the read at W_0, [B, H, R, f].
        read: the read as it is, before the inner norm, [B, H, R, f].
        curvature: what `gelu_rule="gradient"` leaves out, [B, H, R, f]; else zeros.
    """

    def __init__(
        self,
        layer: Any,
        xs: list[Tensor],
        q: Tensor,
        rows: Tensor,
        gelu_rule: str = "rescale",
        interaction: str = "shapley",
    ):
        check_convention(gelu_rule, interaction)
        if len(layer.initial) > 2:
            raise ValueError(f"attribution knows inner nets of one or two maps, got {len(layer.initial)}")
        self.gradients, self.xs = layer.gradients, xs
        self.rates = layer.places.rates(layer.lr, layer.token_rate, rows)  # [B, H, R, T]
        self.slope = None
        (weight, bias), *behind = layer.initial
        first = -self.rates * (q @ xs[0].mT + 1)
        start = q @ weight + bias
        end = start + first @ layer.gradients[0]
        if not behind:
            self.coefficients, self.base, self.read = [first], start, end
            self.curvature = torch.zeros_like(end)
            return
        ((self.weight, bias),) = behind
        x0, x1 = gelu(start), gelu(end)
        self.slope = slope(start, end, x0, x1, gelu_rule)
        # The share of the two orders "map 1 learns first" and "map 2 learns first".
        self.share = {"shapley": 0.5, "first": 1.0, "second": 0.0}[interaction]
        between = self.share * x1 + (1 - self.share) * x0
        self.coefficients = [first, -self.rates * (between @ xs[1].mT + 1)]
        self.base = x0 @ self.weight + bias
        self.read = x1 @ self.weight + bias - (self.rates * (x1 @ xs[1].mT + 1)) @ layer.gradients[1]
        bent = (x1 - x0) - self.slope * (end - start)
        self.curvature = self._between(bent)

    def _between(self, x: Tensor) -> Tensor:
        """x [B, H, R, m] through the second map: the mean of W_0 and of what the read sees, by the convention."""
        learnt = (self.rates * (x @ self.xs[1].mT)) @ self.gradients[1]
        return x @ self.weight - (1 - self.share) * learnt

    def along(self, direction: Tensor) -> Tensor:
        """Every write's contribution to the read, projected on `direction` [B, H, R, f]: [B, H, R, T]."""
        return sum(self.parts_along(direction))

    def parts_along(self, direction: Tensor) -> list[Tensor]:
        """The same for the writes to each inner map by themselves."""
        last = direction @ self.gradients[-1].mT  # [B, H, R, T]
        found = [self.coefficients[-1] * last]
        if self.slope is not None:
            back = direction @ self.weight.mT - (1 - self.share) * ((self.rates * last) @ self.xs[1])
            found.insert(0, self.coefficients[0] * ((self.slope * back) @ self.gradients[0].mT))
        return found

    def vectors(self) -> list[Tensor]:
        """Every write's contribution as a vector, per inner map [B, H, R, T, f]; R * T * f numbers per head."""
        found = [self.coefficients[-1][..., None] * self.gradients[-1][:, :, None]]
        if self.slope is not None:
            found.insert(0, self.coefficients[0][..., None] * self._first_vectors())
        return found

    def _first_vectors(self) -> Tensor:
        """Gradients of map 1 carried to the read, [B, H, R, T, f]."""
        learnt = self.xs[1].mT[:, :, None] @ (self.rates[..., None] * self.gradients[1][:, :, None])  # [B, H, R, m, f]
        through = self.weight[:, None] - (1 - self.share) * learnt
        return self.gradients[0][:, :, None] @ (self.slope[..., None] * through)


def slope(start: Tensor, end: Tensor, x0: Tensor, x1: Tensor, gelu_rule: str) -> Tensor:
    """What stands for the slope of the GELU between two points: that of the secant, or that at the end."""
    ones = torch.ones_like(end)
    if gelu_rule == "gradient":
        return torch.ops.aten.gelu_backward(ones, end, approximate="tanh")
    moved = end - start
    near = moved.abs() < _MIDPOINT
    midpoint = torch.ops.aten.gelu_backward(ones, (start + end) / 2, approximate="tanh")
    return torch.where(near, midpoint, (x1 - x0) / torch.where(near, ones, moved))


def gelu(x: Tensor) -> Tensor:
    """The activation of inner nets."""
    return F.gelu(x, approximate="tanh")
