"""Forward pass of the dual form (paper, section 2.5): a mini-batch at a time, its tokens in parallel.

All gradients of a mini-batch are taken at the weights of its start, so a read needs per map only the scores between
readers and writers, and the commit is one product. What does not depend on the inner weights is worked out for many
mini-batches at once (`Block`); the loop over mini-batches holds the rest. Batch and heads are one dimension,
N = B * H. Weights and bias of a map are one matrix [W; b], [N, in + 1, out], and inputs carry a 1 behind their
features, so that the bias costs no operation of its own.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .aligned import Borders
from .gelu import gelu_backward, gelu_with_gate
from .inner_stats import state_drift, step_norm
from .objective import reconstruction_gradient, reconstruction_loss

__all__ = [
    "Block",
    "ForwardResult",
    "Layout",
    "Operands",
    "blocks",
    "carry_in",
    "commit",
    "forward",
    "inner_inputs",
    "reset",
    "write",
]

STATE_TOKENS = 128
"""Tokens per row between two states that are kept for the backward."""
BLOCK_TOKENS = 512
"""Tokens of all rows whose weight-independent terms are held at once; bounds what a scan needs beside its outputs."""


@dataclass
class Layout:
    """Sizes of a call, what happens between its mini-batches, and what to collect.

    `widths` holds (in, out) of every map; with `keep_states` the weights before every `stride`-th mini-batch are kept
    for the backward, which computes those between again.
    """

    batch: int
    heads: int
    size: int
    widths: list[tuple[int, int]]
    borders: Borders
    want_norm: bool = True
    want_stats: bool = False
    want_gradients: bool = False
    keep_states: bool = False

    @property
    def stride(self) -> int:
        """Mini-batches from one kept state to the next."""
        return max(1, STATE_TOKENS // self.size)

    def per_head(self, rows: Tensor) -> Tensor:
        """[B] -> [N, 1, 1]."""
        return rows.repeat_interleave(self.heads).view(-1, 1, 1)

    def keeps(self, index: int) -> Tensor:
        """The slots of mini-batch `index` whose rows the new state holds, [N, K, 1]."""
        last, held = self.borders.last, self.borders.held
        held = held if last is None else held & (last == index)[:, None]
        return held.repeat_interleave(self.heads, 0)[..., None]

    def cut(self, x: Tensor, first: int, stop: int) -> Tensor:
        """Columns of mini-batches first..stop-1, [B, H, M * K, ...] -> a view [m, B, H, K, ...]."""
        part = x[:, :, first * self.size : stop * self.size].unflatten(2, (stop - first, self.size))
        return part.movedim(2, 0)


@dataclass
class Operands:
    """The tensors of a call. q, k, v [B, H, M * K, f], lr [B, H, M * K], tau [K], LayerNorm weight and bias [H, f].

    `start` and `initial` hold [W; b] of every map, [N, in + 1, out], at the start of the call and of a document;
    `carried` per map (x, g) of the open mini-batch, [N, K, .], or nothing.
    """

    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    tau: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    start: list[Tensor]
    initial: list[Tensor] = field(default_factory=list)
    carried: list[tuple[Tensor, Tensor]] = field(default_factory=list)

    def flat(self) -> list[Tensor]:
        """All tensors in a fixed order."""
        fixed = [self.q, self.k, self.v, self.lr, self.tau, self.ln_weight, self.ln_bias]
        return [*fixed, *self.start, *self.initial, *(t for pair in self.carried for t in pair)]

    @classmethod
    def from_flat(cls, flat: list[Tensor], depth: int, has_initial: bool) -> "Operands":
        """The inverse of `flat`."""
        fixed, rest = flat[:7], list(flat[7:])
        start, rest = rest[:depth], rest[depth:]
        initial, rest = (rest[:depth], rest[depth:]) if has_initial else ([], rest)
        return cls(*fixed, start, initial, list(zip(rest[::2], rest[1::2], strict=True)))


@dataclass
class ForwardResult:
    """z [B, H, M * K, f]; norm [B, H, M * K]; weights per map [N, in + 1, out]; rows per map (x, lr * g) [N, K, .]."""

    z: Tensor
    norm: Tensor | None
    weights: list[Tensor]
    rows: list[tuple[Tensor, Tensor]]
    gradients: Tensor | None
    stats: dict[str, Tensor]
    states: list[Tensor]


class Block:
    """Mini-batches first..stop-1: every term that does not depend on the inner weights. m mini-batches, N = B * H.

    Attributes:
        x, y: keys and queries with a 1 behind them, [m, N, K, f + 1].
        residual: gamma (beta - target), [m, N, K, f].
        lr: [m, N, K, 1].  commit_rate: -tau_{K-1} lr where the mini-batch commits, else 0, [m, N, K, 1].
        rate: tau_t lr_s for writers s up to reader t, else 0, [m, N, K, K].
        scores: (q_t k_s + 1) times rate.  commit: x^T times commit_rate, [m, N, f + 1, K].
    """

    def __init__(self, layout: Layout, operands: Operands, first: int, stop: int):
        self.layout, self.first, self.count = layout, first, stop - first
        tau = operands.tau
        k, q, v, lr = (layout.cut(t, first, stop) for t in (operands.k, operands.q, operands.v, operands.lr))
        self.x, self.y = _extended(k), _extended(q)
        # All contiguous: a batched product falls back to a loop over heads when its result is not.
        residual = self.x[..., :-1].unflatten(1, k.shape[1:3]) - v
        self.target = -residual.flatten(1, 2) if layout.want_stats else None
        residual.add_(operands.ln_bias[:, None]).mul_(operands.ln_weight[:, None])
        self.residual = residual.flatten(1, 2).contiguous()
        self.lr = lr.contiguous().flatten(1, 2)[..., None]
        self.rate = (tau[:, None] * self.lr.transpose(2, 3)).tril_()
        self.scores = _bmm(self.y, self.x.transpose(2, 3)).mul_(self.rate)
        self.commit_rate = -tau[-1] * self.lr
        self.complete = None
        if layout.borders.complete is not None:
            complete = layout.borders.complete[:, first:stop].repeat_interleave(layout.heads, 0).t()
            self.complete = complete[..., None, None].to(tau.dtype)
            self.commit_rate = self.commit_rate * self.complete
        self.commit = self.x.transpose(2, 3) * self.commit_rate.transpose(2, 3)


def blocks(layout: Layout, step: int = 0):
    """Spans of mini-batches that are worked on together, (first, stop)."""
    step = step or max(1, BLOCK_TOKENS // (layout.size * max(1, layout.batch)))
    for first in range(0, layout.borders.count, step):
        yield first, min(first + step, layout.borders.count)


def forward(layout: Layout, operands: Operands) -> ForwardResult:
    """Run the inner loop over all mini-batches of a call.

    With `layout.keep_states` the weights at the start of every `stride`-th mini-batch are returned as `states`, per
    map [ceil(M / stride), N, in + 1, out].
    """
    weights = [weight.clone() for weight in operands.start]  # moved in place
    loop = _Loop(layout, operands)
    for first, stop in blocks(layout):
        block = Block(layout, operands, first, stop)
        weights = loop.run(block, weights)
    return loop.finish(weights)


class _Loop:
    """The loop over mini-batches and what it collects."""

    def __init__(self, layout: Layout, operands: Operands):
        self.layout, self.operands = layout, operands
        batch, heads = layout.batch, layout.heads
        q = operands.q
        self.ln_weight_squared = operands.ln_weight.square()[:, None].repeat(batch, 1, 1)  # [N, 1, f]
        # Heads last but one: the layer flattens heads and features next.
        self.z = q.new_empty(batch, layout.borders.count * layout.size, heads, q.shape[-1]).transpose(1, 2)
        self.norm = q.new_empty(batch, heads, layout.borders.count * layout.size) if layout.want_norm else None
        self.rows: list[tuple[Tensor, Tensor]] = []
        self.gradients: list[Tensor] = []
        self.stats: dict[str, list[Tensor]] = {}
        self.inputs, self.queries = (inner_inputs(layout, q) for _ in range(2))  # used again by every mini-batch
        stored = -(-layout.borders.count // layout.stride) if layout.keep_states else 0
        self.states = [s.new_empty(stored, *s.shape) for s in operands.start] if stored else []

    def run(self, block: Block, weights: list[Tensor]) -> list[Tensor]:
        """All mini-batches of a block; the weights after it."""
        layout = self.layout
        z = torch.empty_like(block.residual)
        depth = len(weights)
        # Norms of the inputs from map 2 on and of all gradients.
        norms = z.new_empty(2 * depth - 1 if layout.want_norm else 0, *z.shape[:-1])
        norm_rooms = [room.unbind() for room in norms]
        # One call cuts a tensor into its mini-batches; indexing would be a call for each.
        x, y, residual, scores, rate, out = (
            t.unbind() for t in (block.x, block.y, block.residual, block.scores, block.rate, z)
        )
        commits, commit_rates = block.commit.unbind(), block.commit_rate.unbind()
        collects = layout.borders.held is not None or layout.want_gradients or layout.want_stats
        for j in range(block.count):
            index = block.first + j
            if layout.borders.resets:
                weights = reset(layout, weights, self.operands.initial, index)
            if self.states:
                self._store(weights, index)
            xs, zs, gs, _ = write(weights, [x[j], *self.inputs], residual[j], self.ln_weight_squared)
            if index == 0 and layout.borders.carried_slots is not None:
                carry_in(layout, self.operands.carried, xs, gs)
            read(weights, [y[j], *self.queries], scores[j], rate[j], xs, gs, out=out[j])
            if layout.want_norm:
                for t, room in zip((*xs[1:], *gs), norm_rooms, strict=True):
                    torch.linalg.vector_norm(t, dim=-1, out=room[j])
            if collects:
                self._collect(block, j, weights, xs, zs, gs)
            if layout.borders.commits[index]:
                commit(weights, commits[j], commit_rates[j], xs, gs)
        layout.cut(self.z, block.first, block.first + block.count).copy_(z.unflatten(1, (layout.batch, layout.heads)))
        if layout.want_norm:
            self._store_norms(block, norms)
        return weights

    def _store(self, weights: list[Tensor], index: int) -> None:
        if index % self.layout.stride == 0:
            for states, weight in zip(self.states, weights, strict=True):
                states[index // self.layout.stride].copy_(weight)

    def _store_norms(self, block: Block, norms: Tensor) -> None:
        """n_t = sqrt(sum over maps of (||x||^2 + 1) ||g||^2); the inputs' 1 is already in ||x||."""
        depth = len(self.operands.start)
        inputs = [torch.linalg.vector_norm(block.x, dim=-1), *norms[: depth - 1]]
        terms = [x * g for x, g in zip(inputs, norms[depth - 1 :], strict=True)]
        norm = terms[0] if depth == 1 else torch.linalg.vector_norm(torch.stack(terms), dim=0)
        target = self.layout.cut(self.norm, block.first, block.first + block.count)
        target.copy_(norm.unflatten(1, (self.layout.batch, self.layout.heads)))

    def _collect(self, block: Block, j: int, weights, xs, zs, gs) -> None:
        layout, index = self.layout, block.first + j
        if layout.borders.held is not None and index in layout.borders.ends:
            keeps = layout.keeps(index)
            rows = [
                tuple(torch.where(keeps, t, 0) for t in (x[..., :-1], block.lr[j] * g))
                for x, g in zip(xs, gs, strict=True)
            ]
            # Every batch row ends in one mini-batch only: what the others add is zero.
            self.rows = [(x + a, g + b) for (x, g), (a, b) in zip(self.rows, rows, strict=True)] if self.rows else rows
        if layout.want_gradients:
            self.gradients.append(torch.cat(gs, -1))
        if layout.want_stats:
            for name, value in self._step_stats(block, j, weights, xs, zs, gs).items():
                self.stats.setdefault(name, []).append(value)

    def _step_stats(self, block: Block, j: int, weights, xs, zs, gs) -> dict[str, Tensor]:
        initial, tau = self.operands.initial, self.operands.tau
        batch = self.layout.batch
        norm = [t[:, None].repeat(batch, 1, 1) for t in (self.operands.ln_weight, self.operands.ln_bias)]
        own_scores = torch.bmm(xs[0], xs[0].transpose(1, 2)).mul_(block.rate[j])
        outputs = {
            "loss_init": apply_maps(initial, [xs[0], *self.queries])[0][-1],
            "loss_before": zs[-1],
            "loss_after": read(weights, [xs[0], *self.queries], own_scores, block.rate[j], xs, gs),
        }
        losses = {name: reconstruction_loss(z, block.target[j], *norm) for name, z in outputs.items()}
        writes = [(x, block.lr[j] * g) for x, g in zip(xs, gs, strict=True)]
        drift = state_drift(weights, initial).expand(-1, xs[0].shape[1])
        return losses | {"state_drift": drift, "step_norm": step_norm(writes, tau)}

    def finish(self, weights: list[Tensor]) -> ForwardResult:
        """Everything in the aligned layout."""

        def joined(parts: list[Tensor]) -> Tensor:
            return torch.cat(parts, 1).unflatten(0, (self.layout.batch, self.layout.heads))

        gradients = joined(self.gradients) if self.gradients else None
        stats = {name: joined(parts) for name, parts in self.stats.items()}
        return ForwardResult(self.z, self.norm, weights, self.rows, gradients, stats, self.states)


# -------------------------------------------------------------------- one mini-batch


def inner_inputs(layout: Layout, like: Tensor, *leading: int) -> list[Tensor]:
    """Room for the inputs of maps 2, 3, ... with their 1, [*leading, N, K, in + 1]."""
    shape = (*leading, layout.batch * layout.heads, layout.size)
    return [like.new_ones(*shape, width_in + 1) for width_in, _ in layout.widths[1:]]


def apply_maps(weights: list[Tensor], xs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """Outputs of every map at xs[0] [N, K, f + 1] and the gates of the GELUs between.

    The inputs of the maps after the first are written to xs[1:].
    """
    zs, gates = [torch.bmm(xs[0], weights[0])], []
    for weight, x in zip(weights[1:], xs[1:], strict=True):
        gates.append(gelu_with_gate(zs[-1], out=x[..., :-1])[1])
        zs.append(torch.bmm(x, weight))
    return zs, gates


def write(weights: list[Tensor], xs: list[Tensor], residual: Tensor, ln_weight_squared: Tensor):
    """Inputs (with their 1), outputs and gradients of every map for the tokens of one mini-batch.

    The fourth list holds what comes back through maps 2, 3, ...: the gradients at the outputs of the GELUs. `xs` is
    the keys and room for the other inputs, which it returns filled, in a new list.
    """
    zs, gates = apply_maps(weights, xs)
    gs = [reconstruction_gradient(zs[-1], residual, ln_weight_squared)]
    passed: list[Tensor] = []
    for i in range(len(weights) - 1, 0, -1):
        passed.insert(0, torch.bmm(gs[0], weights[i][:, :-1].mT))
        gs.insert(0, gelu_backward(passed[0], zs[i - 1], gates[i - 1]))
    return list(xs), zs, gs, passed


def read(weights: list[Tensor], ys: list[Tensor], scores: Tensor, rate: Tensor, xs, gs, out: Tensor | None = None):
    """The net at queries ys[0] [N, K, f + 1], each with its own weights W - sum of rate times the writes up to it.

    ys[1:] is room for the inputs of the maps after the first; `scores` are those of the first map.
    """
    last = len(weights) - 1
    for i, weight in enumerate(weights):
        z = torch.bmm(ys[i], weight, out=out if i == last else None).baddbmm_(scores, gs[i], alpha=-1)
        if i < last:
            gelu_with_gate(z, out=ys[i + 1][..., :-1])
            scores = torch.bmm(ys[i + 1], xs[i + 1].mT).mul_(rate)
    return z


def commit(weights: list[Tensor], first: Tensor, rate: Tensor, xs, gs) -> None:
    """Move the weights, in place, by the commit of a mini-batch; `first` and `rate` are its `Block.commit(_rate)`."""
    weights[0].baddbmm_(first, gs[0])
    for weight, x, g in zip(weights[1:], xs[1:], gs[1:], strict=True):
        weight.baddbmm_(x.mT, g * rate)


def reset(layout: Layout, weights: list[Tensor], initial: list[Tensor], index: int) -> list[Tensor]:
    """The weights at the start of a mini-batch: W_0 in the rows where a document starts."""
    if not (layout.borders.resets and layout.borders.resets[index]):
        return weights
    mark = layout.per_head(layout.borders.reset[:, index])
    return [torch.where(mark, new, old) for new, old in zip(initial, weights, strict=True)]


def carry_in(layout: Layout, carried: list[tuple[Tensor, Tensor]], xs: list[Tensor], gs: list[Tensor]) -> None:
    """Put, in the lists, the rows of tokens that an earlier call wrote in their slots of the first mini-batch."""
    mark = layout.borders.carried_slots.repeat_interleave(layout.heads, 0)[..., None]  # [N, K, 1]
    for i, (x, g) in enumerate(carried):
        gs[i] = torch.where(mark, g, gs[i])
        if i:  # the keys of the first map are aligned with them already
            xs[i] = torch.where(mark, torch.cat([x, torch.ones_like(x[..., :1])], -1), xs[i])


def _extended(x: Tensor) -> Tensor:
    """A view [m, B, H, K, f] -> contiguous [m, N, K, f + 1] with a 1 behind the features."""
    out = x.new_empty(*x.shape[:-1], x.shape[-1] + 1)
    out[..., -1:] = 1
    out[..., :-1] = x
    return out.flatten(1, 2)


def _bmm(a: Tensor, b: Tensor) -> Tensor:
    """Product over any number of leading dimensions as one batched call."""
    return torch.bmm(a.flatten(0, -3), b.flatten(0, -3)).unflatten(0, a.shape[:-2])
