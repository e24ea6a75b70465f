"""The inner state of one TTT layer and what a scan over it takes and gives: the records every backend shares."""

from dataclasses import dataclass, field

import torch
from torch import Tensor

from .inner_net import InnerNet, Weights
from .token_grid import TokenGrid

__all__ = ["ScanInputs", "ScanOutput", "TTTState", "scan_dtype"]


def scan_dtype(dtype: torch.dtype) -> torch.dtype:
    """The inner loop runs in float32, in a float64 model in float64."""
    return torch.float64 if dtype == torch.float64 else torch.float32


@dataclass
class TTTState:
    """The inner weights of a batch of rows and the writes of their open mini-batches.

    `weights[i]` is (W [B, H, in, out], b [B, H, 1, out]) of inner map i at the start of the open mini-batch. `rows[i]`
    is (x [B, H, K, in], g [B, H, K, out]): per slot the input and lr times the gradient of a token that has written
    but is not committed yet; slots not reached yet hold zeros in g. A read at position j uses
    `W - tau_j * x^T g`, the commit at the end of the mini-batch makes `W - tau_{K-1} * x^T g` the new W.
    """

    weights: Weights
    rows: Weights

    @classmethod
    def initial(cls, initial_weights: Weights, batch: int, mini_batch_size: int, dtype: torch.dtype) -> "TTTState":
        """W_0 for every row and an empty mini-batch. `initial_weights` holds (W [H, in, out], b [H, 1, out])."""
        weights, rows = [], []
        for weight, bias in initial_weights:
            # Copies: a state must never share storage with the parameters.
            weights.append(tuple(p.to(dtype).repeat(batch, *[1] * p.dim()) for p in (weight, bias)))
            heads, width_in, width_out = weight.shape
            shape = (batch, heads, mini_batch_size)
            rows.append(tuple(weight.new_zeros(*shape, n, dtype=dtype) for n in (width_in, width_out)))
        return cls(weights, rows)

    def to_tensors(self) -> dict[str, Tensor]:
        """Named tensors, batch first: `W1, b1, x1, g1, W2, ...`."""
        named = {}
        for i, ((weight, bias), (x, g)) in enumerate(zip(self.weights, self.rows, strict=True), start=1):
            named |= {f"W{i}": weight, f"b{i}": bias, f"x{i}": x, f"g{i}": g}
        return named

    @staticmethod
    def tensor_names(depth: int) -> list[str]:
        """Names of the tensors of a net of `depth` maps, as in `to_tensors`."""
        return [f"{letter}{i}" for i in range(1, depth + 1) for letter in "Wbxg"]

    @classmethod
    def from_tensors(cls, named: dict[str, Tensor], depth: int) -> "TTTState":
        """The inverse of `to_tensors` for a net of `depth` maps."""
        numbers = range(1, depth + 1)
        return cls(
            [(named[f"W{i}"], named[f"b{i}"]) for i in numbers],
            [(named[f"x{i}"], named[f"g{i}"]) for i in numbers],
        )


@dataclass
class ScanInputs:
    """What a scan reads. Token tensors are in the caller's layout, [B, H, T, ...]; all in `scan_dtype`.

    Attributes:
        net: the inner net.
        q, k, v: [B, H, T, f], q and k rotated.
        lr: [B, H, T], inner learning rate of each token's own write; 0 where it must not write.
        tau: [K], factor of every position in the mini-batch.
        ln_weight, ln_bias: [H, f] of the inner LayerNorm.
        initial_weights: W_0 and b_0 per map, [H, in, out] and [H, 1, out].
        state: the state to continue from, None for a new one.
        grid: where the tokens fall among the mini-batches.
        want_plasticity, want_stats, want_gradients: what to collect besides the read-out.
        operand_dtype: dtype of the model; a backend may round the factors of its products to it. None: no rounding.
    """

    net: InnerNet
    q: Tensor
    k: Tensor
    v: Tensor
    lr: Tensor
    tau: Tensor
    ln_weight: Tensor
    ln_bias: Tensor
    initial_weights: Weights
    state: TTTState | None
    grid: TokenGrid
    want_plasticity: bool = True
    want_stats: bool = False
    want_gradients: bool = False
    operand_dtype: torch.dtype | None = None

    def start(self) -> TTTState:
        """The state to begin with."""
        if self.state is not None:
            return self.state
        return TTTState.initial(self.initial_weights, self.q.shape[0], self.tau.shape[0], self.q.dtype)


@dataclass
class ScanOutput:
    """What a scan gives, in the caller's layout.

    Attributes:
        z: [B, H, T, f], the inner net read at every query before the inner LayerNorm.
        state: the state after the last token.
        plasticity: [B, H, T], Frobenius norm of what each token commits, or None.
        gradients: [B, H, T, sum of map widths], gradient at the output of every inner map side by side, or None.
        stats: per-token tensors [B, H, T] by name, empty unless asked for.
    """

    z: Tensor
    state: TTTState
    plasticity: Tensor | None = None
    gradients: Tensor | None = None
    stats: dict[str, Tensor] = field(default_factory=dict)
