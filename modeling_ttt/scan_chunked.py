"""The inner loop in the dual form of the paper (section 2.5): one mini-batch at a time, its tokens in parallel.

All gradients of a mini-batch are taken at the weights of its start, so per inner map its reads need only the scores
between readers and writers, and its commit is one product. The writes of an unfinished mini-batch are carried as rows
(x, lr * g); with them prefill, any continuation and decoding of a single token are this one step.
Inside, batch and heads are one dimension: N = B * H.
"""

from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

from .inner_net import Weights, forward_chain, output_gradients
from .inner_stats import step_stats
from .objective import reconstruction_gradient, scaled_residual
from .ttt_state import ScanInputs, ScanOutput, TTTState

__all__ = ["scan_chunked", "unsupported"]


def unsupported(inputs: ScanInputs) -> str | None:
    """Why this backend cannot serve a call, or None; it serves all."""
    return None


def scan_chunked(inputs: ScanInputs) -> ScanOutput:
    """Run the inner loop over the tokens of a call, one dual-form step per mini-batch (paper, eq. 7 and 8)."""
    grid, start = inputs.grid, inputs.start()
    batch, heads = inputs.q.shape[:2]
    step = _Step(inputs)
    weights = [tuple(t.reshape(batch * heads, *t.shape[2:]) for t in pair) for pair in start.weights]
    open_rows = None
    if grid.has_open_rows:
        open_rows = [tuple(t.reshape(batch * heads, *t.shape[2:]) for t in pair) for pair in start.rows]
    final_rows = None
    collected: dict[str, list[Tensor]] = {}
    for index, (slot, columns) in enumerate(grid.mini_batches()):
        if grid.resets and grid.resets[index]:
            weights = step.reset(weights, grid.reset[:, index])
        reads, rows = step.read(weights, open_rows, slot, columns, index)
        for name, value in reads.items():
            collected.setdefault(name, []).append(value)
        weights, final_rows = step.commit(weights, rows, final_rows, slot + columns, index)
        open_rows = None
    return step.finish(collected, weights, final_rows)


class _Step:
    """One mini-batch of the scan; holds the packed inputs cut into mini-batches."""

    def __init__(self, inputs: ScanInputs):
        self.inputs, self.grid = inputs, inputs.grid
        self.batch, self.heads = inputs.q.shape[:2]
        grid = self.grid
        sizes = [columns for _, columns in grid.mini_batches()]
        ln_weight, ln_bias = inputs.ln_weight[:, None], inputs.ln_bias[:, None]  # [H, 1, f]
        q, k, v = (grid.pack(t, 2) for t in (inputs.q, inputs.k, inputs.v))
        lr = grid.pack(inputs.lr, 2)
        target = v - k
        self.q, self.k, self.lr = (self._cut(t, sizes) for t in (q, k, lr))
        self.residual = self._cut(scaled_residual(target, ln_weight, ln_bias), sizes)
        self.target = self._cut(target, sizes) if inputs.want_stats else None
        self.ln_weight = ln_weight.repeat(self.batch, 1, 1)  # [N, 1, f]
        self.ln_bias = ln_bias.repeat(self.batch, 1, 1)
        self.ln_weight_squared = self.ln_weight.square()
        self.valid = None
        if not grid.uniform:
            self.valid = [part.repeat_interleave(self.heads, 0)[..., None] for part in grid.valid.split(sizes, 1)]

    @cached_property
    def initial(self) -> Weights:
        """W_0 of every row and head; only resets and statistics need it."""
        return [tuple(t.repeat(self.batch, 1, 1) for t in pair) for pair in self.inputs.initial_weights]

    def _cut(self, x: Tensor, sizes: list[int]) -> list[Tensor]:
        """[B, H, columns, ...] -> one contiguous [N, n, ...] per mini-batch."""
        return [part.reshape(-1, *part.shape[2:]) for part in x.split(sizes, dim=2)]

    def _per_head(self, rows: Tensor) -> Tensor:
        """[B] -> [N, 1, 1]."""
        return rows.repeat_interleave(self.heads).view(-1, 1, 1)

    def reset(self, weights: Weights, rows: Tensor) -> Weights:
        """Start the marked batch rows, [B] bool, from W_0."""
        mark = self._per_head(rows)
        return [
            tuple(torch.where(mark, new, old) for new, old in zip(first, pair, strict=True))
            for first, pair in zip(self.initial, weights, strict=True)
        ]

    def read(self, weights: Weights, open_rows: Weights | None, slot: int, columns: int, index: int):
        """Gradients of the tokens and reads of the queries of one mini-batch.

        Returns what is collected per token, [N, n, ...] by name, and the rows of the mini-batch up to its last token,
        per map (x [N, slots, in], lr * g [N, slots, out]).
        """
        q, k, lr = self.q[index], self.k[index], self.lr[index]
        inner_inputs, inner_outputs = forward_chain(weights, k)
        grad = reconstruction_gradient(inner_outputs[-1], self.residual[index], self.ln_weight_squared)
        grads = output_gradients(weights, inner_outputs, grad)
        rows = [
            self._merge(old, x, lr[..., None] * g, slot, index)
            for old, x, g in zip(open_rows or [None] * len(weights), inner_inputs, grads, strict=True)
        ]
        tau = self.inputs.tau[slot : slot + columns, None]  # [n, 1]
        reads = {"z": self._read_chain(weights, rows, q, tau)}
        if self.inputs.want_plasticity or self.inputs.want_stats:
            reads["gradient_norm"] = gradient_norm(inner_inputs, grads)
        if self.inputs.want_gradients:
            reads["gradients"] = torch.cat(grads, -1)
        if self.inputs.want_stats:
            after = self._read_chain(weights, rows, k, tau)
            reads |= step_stats(self, weights, rows, inner_outputs[-1], after, slot, index)
        return reads, rows

    def _merge(self, old: tuple[Tensor, Tensor] | None, x: Tensor, g: Tensor, slot: int, index: int):
        """The rows of the mini-batch up to its last token: those carried in (slots before) and the new ones."""
        if self.valid is not None:
            # Rows at different phases: a slot is carried in, new or empty; g is 0 where no token is.
            carried = 0 if old is None else old[0][:, slot : slot + x.shape[1]]
            x = torch.where(self.valid[index], x, carried)
            g = g if old is None else g + old[1][:, slot : slot + x.shape[1]]
        if old is None:
            return x, g
        return torch.cat([old[0][:, :slot], x], 1), torch.cat([old[1][:, :slot], g], 1)

    def _read_chain(self, weights: Weights, rows: Weights, x: Tensor, tau: Tensor) -> Tensor:
        """Read the net at inputs x [N, n, f] with every row's own weights W - tau_t * sum of the writes up to it."""
        for i, ((weight, bias), (writer, g)) in enumerate(zip(weights, rows, strict=True)):
            x = F.gelu(x, approximate="tanh") if i else x
            slots, n = writer.shape[1], x.shape[1]
            scores = torch.baddbmm(x.new_ones(1), x, writer.transpose(1, 2))  # the 1 carries the bias, [N, n, slots]
            scores = (scores * tau).tril(slots - n)
            x = torch.baddbmm(torch.baddbmm(bias, x, weight), scores, g, alpha=-1)
        return x

    def commit(self, weights: Weights, rows: Weights, kept: Weights | None, filled: int, index: int):
        """Fold a full mini-batch into the weights; keep the rows of one that stays open.

        `filled` is the number of slots that `rows` covers; `kept` holds, for rows of the batch whose tokens ended in
        an earlier mini-batch, what they keep.
        """
        size, tau = self.inputs.tau.shape[0], self.inputs.tau[-1]
        if self.grid.uniform:
            if filled == size:
                return [_folded(pair, row, tau) for pair, row in zip(weights, rows, strict=True)], None
            return weights, [tuple(F.pad(t, (0, 0, 0, size - filled)) for t in row) for row in rows]
        complete = self._per_head(self.grid.complete[:, index])
        if filled == size and self.grid.commits[index]:
            committed = [(x, g * complete) for x, g in rows]
            weights = [_folded(pair, row, tau) for pair, row in zip(weights, committed, strict=True)]
        if index in self.grid.ends:
            ends = self._per_head(self.grid.last == index)
            padded = [tuple(F.pad(t, (0, 0, 0, size - filled)) for t in row) for row in rows]
            kept = kept or [tuple(torch.zeros_like(t) for t in row) for row in padded]
            kept = [
                tuple(torch.where(ends, new * ~complete, old) for new, old in zip(row, before, strict=True))
                for row, before in zip(padded, kept, strict=True)
            ]
        return weights, kept

    def finish(self, collected: dict[str, list[Tensor]], weights: Weights, rows: Weights | None) -> ScanOutput:
        """Put the mini-batches together again, in the caller's layout."""
        inputs, grid = self.inputs, self.grid
        joined = {
            name: grid.unpack(torch.cat(parts, 1).unflatten(0, (self.batch, self.heads)), 2)
            for name, parts in collected.items()
        }
        if rows is None:
            rows = [tuple(w.new_zeros(w.shape[0], inputs.tau.shape[0], n) for n in w.shape[1:]) for w, _ in weights]
        unflat = [[tuple(t.unflatten(0, (self.batch, self.heads)) for t in p) for p in s] for s in (weights, rows)]
        z, norm = joined.pop("z"), joined.pop("gradient_norm", None)
        gradients = joined.pop("gradients", None)
        plasticity = None
        if inputs.want_plasticity:
            plasticity = inputs.tau[-1] * inputs.lr.abs() * norm
            if grid.real is not None:
                plasticity = plasticity.masked_fill(~grid.real[:, None], 0)
        stats = joined
        if inputs.want_stats:
            stats["inner_grad_norm"] = norm
        return ScanOutput(z, TTTState(*unflat), plasticity, gradients, stats)


def gradient_norm(inner_inputs: list[Tensor], grads: list[Tensor]) -> Tensor:
    """Frobenius norm of a token's inner gradient over all maps and biases, [..., n].

    Each map contributes ||x (x) g||^2 + ||g||^2 = (||x||^2 + 1) ||g||^2.
    """
    parts = [
        (x.square().sum(-1) + 1).sqrt() * torch.linalg.vector_norm(g, dim=-1)
        for x, g in zip(inner_inputs, grads, strict=True)
    ]
    return parts[0] if len(parts) == 1 else torch.linalg.vector_norm(torch.stack(parts), dim=0)


def _folded(pair: tuple[Tensor, Tensor], rows: tuple[Tensor, Tensor], tau: Tensor) -> tuple[Tensor, Tensor]:
    """(W, b) after the commit of `rows`."""
    (weight, bias), (x, g) = pair, rows
    step = tau * g
    return torch.baddbmm(weight, x.transpose(1, 2), step, alpha=-1), bias - step.sum(1, keepdim=True)
