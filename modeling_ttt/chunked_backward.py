"""Backward pass of the dual form, derived by hand: only the adjoint of the inner weights runs token-backwards in time.

Block by block the states are computed again from the one the forward kept; everything that does not depend on the
later mini-batches is worked out at once, and the loop over mini-batches in reverse holds the rest. Letters as in
`chunked_forward`: x, z, g are input, output and inner gradient of a map for the tokens that write, y and w the same
chain for the queries, S = [W; b]; a leading d marks the adjoint (the gradient of the outer loss).

Second-order terms of the LayerNorm: with xh the normalised z, r its reciprocal deviation, J the LayerNorm backward
(J is symmetric), p = gamma^2 xh + residual and g = J(p), an adjoint v of g gives
    d_residual = J(v),  d_gamma^2 = J(v) xh,
    dz = J(gamma^2 J(v)) - r mean(p xh) J(v) - (r / f) [ (v . xh) g + (v . g) xh ].
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from .chunked_forward import (
    Block,
    ForwardResult,
    Layout,
    Operands,
    blocks,
    carry_in,
    commit,
    inner_inputs,
    reset,
    write,
)
from .gelu import gelu_backward, gelu_derivatives, gelu_with_gate
from .objective import INNER_LN_EPS, layer_norm_backward

__all__ = ["backward"]


def backward(layout: Layout, operands: Operands, states: list[Tensor], adjoint: ForwardResult) -> list[Tensor | None]:
    """Gradients of `operands.flat()` from the adjoints of the forward's results (None where there is none)."""
    sums = _Gradients(layout, operands, adjoint)
    for first, stop in reversed(list(blocks(layout, layout.stride))):
        block = Block(layout, operands, first, stop)
        trace = _retrace(layout, operands, block, states)
        sums.add(block, trace)
    return sums.flat()


@dataclass
class _Trace:
    """What the forward computed in a block: states S, x, z, g of every map, each with leading [m, N].

    `passed` is the gradient at the output of every GELU, before it goes through it.
    """

    states: list[Tensor]
    xs: list[Tensor]
    zs: list[Tensor]
    gs: list[Tensor]
    passed: list[Tensor]


def _retrace(layout: Layout, operands: Operands, block: Block, stored: list[Tensor]) -> _Trace:
    """Compute the writes of a block again."""
    squared = operands.ln_weight.square()[:, None].repeat(layout.batch, 1, 1)
    carries = block.first == 0 and layout.borders.carried_slots is not None
    weights = [s[block.first // layout.stride].clone() for s in stored]
    inputs = [block.x, *inner_inputs(layout, block.x, block.count)]
    states = [w.new_empty(block.count, *w.shape) for w in weights]
    held: list[list[list[Tensor]]] = [[], [], []]
    for j in range(block.count):
        index = block.first + j
        weights = weights if j == 0 else reset(layout, weights, operands.initial, index)
        for kept, weight in zip(states, weights, strict=True):
            kept[j] = weight
        xs, *rest = write(weights, [x[j] for x in inputs], block.residual[j], squared)
        if carries and j == 0:
            carry_in(layout, operands.carried, xs, rest[1])
            for whole, x in zip(inputs[1:], xs[1:], strict=True):
                whole[0] = x
        for parts, part in zip(held, rest, strict=True):
            parts.append(part)
        if layout.borders.commits[index] and j + 1 < block.count:
            commit(weights, block.commit[j], block.commit_rate[j], xs, rest[1])
    return _Trace(states, inputs, *([torch.stack(part) for part in zip(*parts, strict=True)] for parts in held))


class _Gradients:
    """Gradients of the operands, summed up block by block from the last to the first."""

    def __init__(self, layout: Layout, operands: Operands, adjoint: ForwardResult):
        self.layout, self.operands, self.adjoint = layout, operands, adjoint
        shape = (layout.batch, layout.borders.count * layout.size, layout.heads)
        self.q, self.k, self.v = (operands.q.new_empty(*shape, t.shape[-1]).transpose(1, 2) for t in (operands.q,) * 3)
        self.lr = operands.q.new_empty(shape).transpose(1, 2)
        self.tau, self.ln_weight, self.ln_bias = (
            torch.zeros_like(t) for t in (operands.tau, operands.ln_weight, operands.ln_bias)
        )
        # Adjoint of the weights after the mini-batch at hand.
        self.weights = [
            torch.zeros_like(start) if given is None else given.clone()
            for start, given in zip(operands.start, adjoint.weights, strict=True)
        ]
        self.initial = [torch.zeros_like(t) for t in operands.initial]
        self.carried: list[Tensor] = []

    def flat(self) -> list[Tensor]:
        """In the order of `Operands.flat`."""
        fixed = [self.q, self.k, self.v, self.lr, self.tau, self.ln_weight, self.ln_bias]
        return [*fixed, *self.weights, *self.initial, *self.carried]

    def add(self, block: Block, trace: _Trace) -> None:
        """Go back through one block."""
        reads = _Reads(self, block, trace)
        chain = _Chain(self, block, trace, reads)
        for j in reversed(range(block.count)):
            chain.step(j)
        self._add_token_gradients(block, trace, reads, chain)

    def _add_token_gradients(self, block: Block, trace: _Trace, reads: "_Reads", chain: "_Chain") -> None:
        layout, operands = self.layout, self.operands
        first, stop = block.first, block.first + block.count
        batch = (layout.batch, layout.heads)
        ln_weight = operands.ln_weight[:, None]  # [H, 1, f]
        residual = chain.residual.unflatten(1, batch)  # [m, B, H, K, f]
        dk = _matmul(chain.dz, trace.states[0][..., :-1, :].transpose(-1, -2))
        dk = dk.add_(reads.dx[0]).addcmul_(block.commit_rate, chain.commit[0][..., :-1]).unflatten(1, batch)
        dtarget = -ln_weight * residual
        layout.cut(self.q, first, stop).copy_(reads.dq.unflatten(1, batch))
        layout.cut(self.k, first, stop).copy_(dk - dtarget)
        layout.cut(self.v, first, stop).copy_(dtarget)
        offset = operands.ln_bias[:, None] - layout.cut(operands.v, first, stop) + layout.cut(operands.k, first, stop)
        over = (0, 1, 3)
        self.ln_bias -= dtarget.sum(over)
        self.ln_weight += (residual * offset).sum(over)
        self.ln_weight += 2 * operands.ln_weight * (chain.residual * chain.normed).unflatten(1, batch).sum(over)
        # rate = tau_t lr_s; commit_rate = -tau_{K-1} lr_s where the mini-batch is complete
        rate = reads.rate.tril_()
        pairs = zip(chain.commit, trace.xs, strict=True)
        committed = sum((e * x).sum(-1, keepdim=True) for e, x in pairs)  # [m, N, K, 1]
        if block.complete is not None:
            committed = committed * block.complete
        self.tau += _matmul(rate, block.lr).sum((0, 1, 3))
        self.tau[-1] -= (committed * block.lr).sum()
        dlr = (rate * operands.tau[:, None]).sum(-2) - operands.tau[-1] * committed[..., 0] + reads.lr
        layout.cut(self.lr, first, stop).copy_(dlr.unflatten(1, batch))


class _Reads:
    """Adjoints of a block that do not depend on later mini-batches: of reads, norms and rows of the state.

    Attributes: dq [m, N, K, f]; per map dx and dg [m, N, K, .], y and w's adjoint dw; rate [m, N, K, K]; lr [m, N, K].
    """

    def __init__(self, gradients: _Gradients, block: Block, trace: _Trace):
        layout, adjoint = gradients.layout, gradients.adjoint
        self.block, self.trace = block, trace
        depth = len(trace.xs)
        queries = inner_inputs(layout, block.x, block.count)
        self.ys, ws, gates, products, scores = [block.y], [], [], [_matmul(block.y, block.x.mT)], [block.scores]
        for i in range(1, depth):
            w = _matmul(self.ys[-1], trace.states[i - 1])
            ws.append(_add_matmul(w, scores[-1], trace.gs[i - 1], alpha=-1))
            self.ys.append(queries[i - 1])
            gates.append(gelu_with_gate(ws[-1], out=self.ys[-1][..., :-1])[1])
            products.append(_matmul(self.ys[-1], trace.xs[i].mT))
            scores.append(products[-1] * block.rate)
        last = torch.zeros_like(block.residual)
        if adjoint.z is not None:
            last = layout.cut(adjoint.z, block.first, block.first + block.count).flatten(1, 2)
        self.dws = [last.contiguous()]
        self.dx, self.dg = [], []
        self.rate = torch.zeros_like(block.rate)
        for i in reversed(range(depth)):
            dw, x, g = self.dws[0], trace.xs[i][..., :-1], trace.gs[i]
            dscores = _matmul(dw, g.mT).neg_()
            self.rate.addcmul_(dscores, products[i])
            dproduct = dscores.mul_(block.rate)
            self.dg.insert(0, _add_matmul(torch.empty_like(g), scores[i].mT, dw, beta=0, alpha=-1))
            self.dx.insert(0, _matmul(dproduct.mT, self.ys[i][..., :-1]))
            dy = _add_matmul(_matmul(dw, trace.states[i][..., :-1, :].mT), dproduct, x)
            if i:
                self.dws.insert(0, gelu_backward(dy, ws[i - 1], gates[i - 1]))
        self.dq = dy
        self.lr = torch.zeros_like(block.lr[..., 0])
        if adjoint.norm is not None:
            self._add_norm(layout.cut(adjoint.norm, block.first, block.first + block.count).flatten(1, 2))
        if any(t is not None for pair in adjoint.rows for t in pair):
            self._add_rows(layout, adjoint)

    def _add_norm(self, dnorm: Tensor) -> None:
        """norm^2 = sum over maps of ||x||^2 ||g||^2, x with its 1."""
        squares = [
            (x.square().sum(-1, keepdim=True), g.square().sum(-1, keepdim=True))
            for x, g in zip(self.trace.xs, self.trace.gs, strict=True)
        ]
        norm = sum(x * g for x, g in squares).sqrt()
        factor = torch.where(norm > 0, dnorm[..., None] / norm, 0)
        for i, (x, g) in enumerate(squares):
            self.dg[i] += factor * x * self.trace.gs[i]
            self.dx[i] += factor * g * self.trace.xs[i][..., :-1]

    def _add_rows(self, layout: Layout, adjoint: ForwardResult) -> None:
        """The rows of the state are (x, lr g) of the mini-batch in which a batch row ends."""
        first, stop = self.block.first, self.block.first + self.block.count
        for index in (index for index in layout.borders.ends if first <= index < stop):
            j = index - first
            mark = layout.keeps(index)
            for i, (dx, dg) in enumerate(adjoint.rows):
                if dx is not None:
                    self.dx[i][j] += mark * dx
                if dg is not None:
                    self.dg[i][j] += mark * self.block.lr[j] * dg
                    self.lr[j] += (mark * dg * self.trace.gs[i][j]).sum(-1)


class _Chain:
    """The reverse loop over the mini-batches of a block: what depends on the adjoint of the weights after them.

    Attributes: residual, normed, dz [m, N, K, f] (adjoints of residual and of the first map's output, and the
    normalised z); commit: per map g times the adjoint of S transposed, [m, N, K, in + 1].
    """

    def __init__(self, gradients: _Gradients, block: Block, trace: _Trace, reads: _Reads):
        self.gradients, self.block, self.trace, self.reads = gradients, block, trace, reads
        z, width = trace.zs[-1], trace.zs[-1].shape[-1]
        self.squared = gradients.operands.ln_weight.square()[:, None].repeat(gradients.layout.batch, 1, 1)  # [N, 1, f]
        self.normed, self.mean, self.rstd = torch.native_layer_norm(z, [width], None, None, INNER_LN_EPS)
        upstream = torch.addcmul(block.residual, self.squared, self.normed)
        gradient = trace.gs[-1]
        self.along = self.rstd * (upstream * self.normed).mean(-1, keepdim=True)
        self.gradient_over_f = self.rstd / width * gradient
        self.normed_over_f = self.rstd / width * self.normed
        self.residual = torch.empty_like(block.residual)
        layout = gradients.layout
        all_commit = all(layout.borders.commits[block.first : block.first + block.count])
        self.commit = [torch.empty_like(x) if all_commit else torch.zeros_like(x) for x in trace.xs]
        self.committed = [x * block.commit_rate for x in trace.xs]
        self.slopes, self.bends = [], []  # of the GELU between maps; bends times the gradient that passes through
        for i, z in enumerate(trace.zs[:-1]):
            slope, bend = gelu_derivatives(z)
            self.slopes.append(slope)
            self.bends.append(bend.mul_(trace.passed[i]))
        self._stack_factors()

    def _stack_factors(self) -> None:
        """A mini-batch adds [x; y; du]^T [dz; dw; g] to the adjoint of S, one product; `step` fills in dz and du."""
        self.size = size = self.block.x.shape[2]
        self.left, self.right = [], []
        for i, (x, y, dw, g) in enumerate(
            zip(self.trace.xs, self.reads.ys, self.reads.dws, self.trace.gs, strict=True)
        ):
            parts = 3 if i else 2
            left, right = (t.new_empty(*t.shape[:2], parts * size, t.shape[-1]) for t in (x, dw))
            left[:, :, :size], left[:, :, size : 2 * size], right[:, :, size : 2 * size] = x, y, dw
            if i:
                left[:, :, 2 * size :, -1:], right[:, :, 2 * size :] = 0, g  # du goes through no bias
            self.left.append(left)
            self.right.append(right)
        self.dz = self.right[0][:, :, :size]

    def step(self, j: int) -> None:
        """Mini-batch j of the block: its adjoints, and the adjoint of the weights before it."""
        gradients, size = self.gradients, self.size
        layout, index = gradients.layout, self.block.first + j
        weights = [s[j] for s in self.trace.states]
        dgs, dxs = [dg[j] for dg in self.reads.dg], [dx[j] for dx in self.reads.dx]
        if layout.borders.commits[index]:
            for i, after in enumerate(gradients.weights):
                torch.bmm(self.trace.gs[i][j], after.mT, out=self.commit[i][j])
                dgs[i] = torch.baddbmm(dgs[i], self.committed[i][j], after)
                if i:
                    dxs[i] = torch.addcmul(dxs[i], self.block.commit_rate[j], self.commit[i][j][..., :-1])
        if index == 0 and layout.borders.carried_slots is not None:
            self._carry_out(dgs, dxs)
        for i, slope in enumerate(self.slopes):
            du = dgs[i] * slope[j]
            self.left[i + 1][j, :, 2 * size :, :-1] = du
            dgs[i + 1] = torch.baddbmm(dgs[i + 1], du, weights[i + 1][:, :-1])
        dz = self._through_objective(dgs[-1], j)
        for i in range(len(weights) - 1, 0, -1):
            self.right[i][j, :, :size] = dz
            dx = torch.baddbmm(dxs[i], dz, weights[i][:, :-1].mT)
            dz = dx.mul_(self.slopes[i - 1][j]).addcmul_(dgs[i - 1], self.bends[i - 1][j])
        self.right[0][j, :, :size] = dz
        for after, left, right in zip(gradients.weights, self.left, self.right, strict=True):
            after.baddbmm_(left[j].mT, right[j])
        if layout.borders.resets and layout.borders.resets[index]:
            self._leave_document(index)

    def _through_objective(self, v: Tensor, j: int) -> Tensor:
        """dz of the last map from the adjoint v of its inner gradient; keeps that of the residual."""
        z, mean, rstd = self.trace.zs[-1][j], self.mean[j], self.rstd[j]
        residual = self.residual[j].copy_(layer_norm_backward(v, z, mean, rstd))
        dz = layer_norm_backward(self.squared * residual, z, mean, rstd)
        dz.addcmul_(self.along[j], residual, value=-1)
        dz.addcmul_((v * self.normed[j]).sum(-1, keepdim=True), self.gradient_over_f[j], value=-1)
        return dz.addcmul_((v * self.trace.gs[-1][j]).sum(-1, keepdim=True), self.normed_over_f[j], value=-1)

    def _carry_out(self, dgs: list[Tensor], dxs: list[Tensor]) -> None:
        """Adjoints at carried slots belong to the rows of the incoming state and go no further."""
        layout = self.gradients.layout
        mark = layout.borders.carried_slots.repeat_interleave(layout.heads, 0)[..., None]
        for i, (x, _) in enumerate(self.gradients.operands.carried):
            # The keys of the first map carry theirs as tokens.
            self.gradients.carried += [torch.where(mark, dxs[i], 0) if i else torch.zeros_like(x)]
            self.gradients.carried += [torch.where(mark, dgs[i], 0)]
            dgs[i] = torch.where(mark, 0, dgs[i])
            dxs[i] = torch.where(mark, 0, dxs[i]) if i else dxs[i]

    def _leave_document(self, index: int) -> None:
        """Where a document started, the adjoint belongs to W_0 and nothing reaches the mini-batch before."""
        layout, gradients = self.gradients.layout, self.gradients
        mark = layout.per_head(layout.borders.reset[:, index])
        for i, before in enumerate(gradients.weights):
            gradients.initial[i] += torch.where(mark, before, 0)
            gradients.weights[i] = torch.where(mark, 0, before)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """Product of [m, N, ., .] tensors as one batched call."""
    return torch.bmm(a.flatten(0, 1), b.flatten(0, 1)).unflatten(0, a.shape[:2])


def _add_matmul(out: Tensor, a: Tensor, b: Tensor, beta: float = 1, alpha: float = 1) -> Tensor:
    """`out` = beta out + alpha a b in place, all [m, N, ., .]."""
    out.flatten(0, 1).baddbmm_(a.flatten(0, 1), b.flatten(0, 1), beta=beta, alpha=alpha)
    return out
