"""The writes of a text as the numbers they are made of, read at the taps of a model while it reads.

O(T) numbers per head: a write is an outer product, and no T x T or f x f tensor is kept.
"""

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.captum_targets import as_rows, check_multiplier, choose_writes
from interp.freezing import ttt_layers
from interp.inner_reads import gelu, mini_batches
from interp.taps import PIECE_TOKENS, hooks, mixers, read_in_pieces
from interp.write_places import WritePlaces, document_starts, place_writes

__all__ = ["LayerWrites", "WriteRecords", "record_writes"]

NORM_EPS = 1e-6  # of the inner and of the outer norm of a TTT layer; no settings


@dataclass(frozen=True)
class LayerWrites:
    """The writes and reads of one layer, its chosen heads H; f head dim, in the dtype of the inner loop.

    Attributes:
        layer, heads: absolute index, and which heads.
        places: where the tokens stand among the mini-batches.
        k: keys [B, H, T, f], what the first inner map read when the token was written.
        gradients: per inner map the gradient at its output, [B, H, T, out].
        lr: inner learning rate of each token, multiplier and freezing included, 0 where masked, [B, H, T].
        token_rate: tau [K].
        initial: W_0 per inner map, (W [H, in, out], b [H, 1, out]).
        norm_weight, norm_bias: of the inner norm, [H, f].
        q, readout: queries and read-outs [B, H, T, f], q + LN(read).
        read_mean, read_rstd: mean and reciprocal deviation of the read in the inner norm, [B, H, T].
        post_mean, post_rstd: the same of the norm over all heads behind it, [B, T].
    """

    layer: int
    heads: tuple[int, ...]
    places: WritePlaces
    k: Tensor
    gradients: tuple[Tensor, ...]
    lr: Tensor
    token_rate: Tensor
    initial: tuple[tuple[Tensor, Tensor], ...]
    norm_weight: Tensor
    norm_bias: Tensor
    q: Tensor | None = None
    readout: Tensor | None = None
    read_mean: Tensor | None = None
    read_rstd: Tensor | None = None
    post_mean: Tensor | None = None
    post_rstd: Tensor | None = None

    def reads(self) -> Tensor:
        """The inner net read at every query, before the inner norm, [B, H, T, f]: computed from the writes alone."""
        q, parts = self.places.align(self.q), []
        for batch in mini_batches(self):
            a = q[:, :, batch.columns]
            tau = self.token_rate[: a.shape[2], None]
            for i, ((weight, bias), x, g) in enumerate(zip(batch.weights, batch.xs, batch.gs, strict=True)):
                a = gelu(a) if i else a
                a = a @ weight + bias - ((a @ x.mT + 1).tril() * (tau * batch.lr[:, :, None])) @ g
            parts.append(a)
        return self.places.unalign(torch.cat(parts, 2))

    def readout_of(self, reads: Tensor) -> Tensor:
        """What the layer makes of reads [B, H, T, f] at its queries: q + LN(read)."""
        weight, bias = self.norm_weight[:, None], self.norm_bias[:, None]
        return self.q + bias + weight * F.layer_norm(reads, reads.shape[-1:], eps=NORM_EPS)

    def commits(self) -> Tensor:
        """Norm of what each token commits to the weights, biases included, [B, H, T]: the model's plasticity."""
        squares = [
            sum((x.square().sum(-1) + 1) * g.square().sum(-1) for x, g in zip(batch.xs, batch.gs, strict=True))
            for batch in mini_batches(self)
        ]
        norm = self.places.unalign(torch.cat(squares, 2)).sqrt()
        return self.token_rate[-1] * self.lr.abs() * norm


@dataclass(frozen=True)
class WriteRecords:
    """The writes of a text [B, T] in some layers and heads of a model.

    `readout_error` is the largest difference between the read-outs put together from the writes and those of the
    model, over the largest read-out: rounding, when all is well.
    """

    input_ids: Tensor
    places: WritePlaces
    layers: tuple[LayerWrites, ...]
    readout_error: float

    def __getitem__(self, layer: int) -> LayerWrites:
        """The record of a layer by its absolute index; ValueError for one that was not recorded."""
        for record in self.layers:
            if record.layer == layer:
                return record
        raise ValueError(f"layer must be one of the recorded {[r.layer for r in self.layers]}, got {layer}")


@torch.no_grad()
def record_writes(
    model: nn.Module,
    input_ids: Tensor,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    ttt_lr_mult: Tensor | None = None,
    reset_at: Tensor | int | Sequence[int] | None = None,
    offload: torch.device | str | None = "cpu",
    piece_tokens: int = PIECE_TOKENS,
    progress: bool = False,
) -> WriteRecords:
    """Read a text [T] or [B, T] from an empty state and keep what its writes are made of.

    Layers are absolute indices, None takes all, heads likewise. The text is read in calls of about `piece_tokens`
    tokens that go on from each other; the records do not depend on it. `offload` is where they are kept (None: where
    the layer runs): 4 f + 3 numbers per head and token for TTT-Linear, 8 f + 3 for TTT-MLP. `ttt_lr_mult` and
    `reset_at` are those of the model.

    Raises:
        ValueError: an argument does not fit, or a layer read something else than its writes say.
    """
    ids, mask = as_rows(input_ids, attention_mask)
    names = ("tap_q", "tap_readout")
    collected = collect_writes(
        model, ids, mask, ttt_lr_mult, reset_at, layers, heads, offload, piece_tokens, names, progress=progress
    )
    records, errors = [], []
    for record, kept in collected:
        record = dataclasses.replace(record, q=kept["tap_q"], readout=kept["tap_readout"])
        reads = record.reads()
        difference = (record.readout_of(reads) - record.readout).masked_fill(~record.places.real[:, None, :, None], 0)
        errors.append(difference.abs().max() / record.readout.abs().max().clamp(min=1e-30))
        variance, mean = torch.var_mean(reads, -1, correction=0)
        records.append(
            dataclasses.replace(
                record,
                read_mean=mean,
                read_rstd=(variance + NORM_EPS).rsqrt(),
                post_mean=kept["post_mean"],
                post_rstd=kept["post_rstd"],
            )
        )
    worst = float(torch.stack([error.cpu() for error in errors]).max())  # NaN stays NaN
    if not worst < 0.1:  # far beyond the rounding of any dtype
        raise ValueError(f"the layers read something else than their writes say (relative difference {worst:.2g})")
    return WriteRecords(ids, records[0].places, tuple(records), worst)


def collect_writes(
    model: Any,
    ids: Tensor,
    mask: Tensor | None,
    ttt_lr_mult: Tensor | None,
    reset_at: Any,
    layers: Sequence[int] | None,
    heads: Sequence[int] | None,
    offload: torch.device | str | None,
    piece_tokens: int,
    names: Sequence[str] = (),
    watch: Sequence[tuple[nn.Module, Any]] = (),
    on_piece: Any = None,
    options: Any = None,
    progress: bool = False,
) -> list[tuple[LayerWrites, dict[str, Tensor]]]:
    """Read a text and give per chosen layer its writes and, whole, what went through the further taps `names`.

    `watch` holds further (module, function) pairs for `hooks`; `on_piece(columns)` is called before every call of the
    model, whose further arguments `options(columns)` gives.
    """
    places, chosen_heads = choose_writes(model.config, layers, heads)
    check_multiplier("ttt_lr_mult", ttt_lr_mult, ids.shape[1])
    found, present = mixers(model), ttt_layers(model.config)
    border = document_starts(reset_at, ids)
    keepers = [_Keeper(found[i], chosen_heads, ids.shape, offload, names) for i in places]
    wanted = [pair for keeper in keepers for pair in keeper.wanted()]
    with hooks([*wanted, *watch]), tqdm(total=ids.shape[1], unit="token", disable=not progress) as bar:

        def begin(piece: slice) -> dict[str, Any]:
            for keeper in keepers:
                keeper.piece = piece
            return {"logits_to_keep": 1} if options is None else options(piece)

        for piece, outputs in read_in_pieces(model, ids, mask, ttt_lr_mult, border, piece_tokens, begin):
            if on_piece is not None:
                on_piece(piece, outputs)
            bar.update(piece.stop - piece.start)
    real = None if mask is None else (mask != 0).cpu()
    grid = place_writes(tuple(ids.shape), model.config.mini_batch_size, real, None if border is None else border.cpu())
    return [
        (keeper.writes(present[i], tuple(chosen_heads), grid), keeper.kept)
        for i, keeper in zip(places, keepers, strict=True)
    ]


class _Keeper:
    """Gathers what goes through the taps of one layer, in tensors over the whole text made once."""

    def __init__(self, layer: Any, heads: list[int], shape: torch.Size, offload: Any, names: Sequence[str]):
        self.layer, self.heads, self.shape, self.offload = layer, heads, shape, offload
        self.names = ("tap_k", "tap_lr", "tap_inner_grad", *names)
        self.piece = slice(0, 0)
        self.kept: dict[str, Tensor] = {}
        self.fixed: dict[str, Any] = {}

    def wanted(self) -> list:
        """What to hook: (module, function) pairs."""
        pairs = [(getattr(self.layer, name), self._keep(name)) for name in self.names if name != "tap_readout"]
        return [*pairs, (self.layer.tap_readout, self._see_readout)]

    def _keep(self, name: str):
        return lambda output: self._store(name, output[:, self.heads], 2)

    def _see_readout(self, readout: Tensor) -> None:
        # Called inside the layer's forward, where its parameters are at hand also when it is offloaded.
        if not self.fixed:
            self._see_parameters(readout)
        if "tap_readout" in self.names:
            self._store("tap_readout", readout[:, self.heads], 2)
            variance, mean = torch.var_mean(readout.transpose(1, 2).flatten(2), -1, correction=0)
            self._store("post_mean", mean, 1)
            self._store("post_rstd", (variance + NORM_EPS).rsqrt(), 1)

    def _see_parameters(self, like: Tensor) -> None:
        layer, heads = self.layer, self.heads
        device = like.device if self.offload is None else self.offload

        def copied(p: Tensor) -> Tensor:
            return p.detach().to(device, like.dtype, copy=True)

        self.fixed = {
            "token_rate": copied(layer.token_rate(like.dtype)),
            "initial": tuple(
                tuple(copied(getattr(layer, name)[heads]) for name in pair) for pair in layer.inner_net.parameter_names
            ),
            "norm_weight": copied(layer.ttt_norm_weight[heads]),
            "norm_bias": copied(layer.ttt_norm_bias[heads]),
        }

    def _store(self, name: str, part: Tensor, dim: int) -> None:
        if name not in self.kept:
            shape = list(part.shape)
            shape[dim] = self.shape[1]
            self.kept[name] = part.new_zeros(shape, device=part.device if self.offload is None else self.offload)
        self.kept[name].narrow(dim, self.piece.start, part.shape[dim]).copy_(part)

    def writes(self, index: int, heads: tuple[int, ...], places: WritePlaces) -> LayerWrites:
        """The record without queries and read-outs, whose tensors stay in `kept`."""
        k, lr, gradients = (self.kept.pop(name) for name in ("tap_k", "tap_lr", "tap_inner_grad"))
        places = places.to(k.device)
        widths = [bias.shape[-1] for _, bias in self.fixed["initial"]]
        lr = lr[..., 0].masked_fill(~places.real[:, None], 0)
        return LayerWrites(index, heads, places, k, tuple(gradients.split(widths, -1)), lr, **self.fixed)
