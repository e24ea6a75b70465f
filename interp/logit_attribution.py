"""Direct logit attribution: the logit at a position as a sum over all writes of the text and named remainders.

From the unembedding the direction that raises the target is carried back through the final norm, the residual stream,
the output projection, the gate and the two norms of every TTT layer, each taken as it is at that position ("frozen"):
then everything that reaches the logit is a sum, and the share of every write in it is exact.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from accelerate.utils import align_module_device
from torch import Tensor, nn

from interp.captum_targets import LogitTarget, as_rows, check_multiplier
from interp.inner_reads import RowReads, check_convention, write_inputs
from interp.position_frame import Frame
from interp.records import NORM_EPS, LayerWrites, collect_writes
from interp.taps import PIECE_TOKENS
from interp.write_places import document_starts

__all__ = ["WriteAttribution", "direct_logit_attribution"]


@dataclass(frozen=True)
class WriteAttribution:
    """What every write adds to a target, directly (B documents, L chosen TTT layers, H heads, T columns).

    Attributes:
        writes: [B, L, H, T]; 0 at masked columns and behind the position.
        remainders: by name, [B, L, H], [B, L] or [B]: "embedding" of the token at the position; per layer "conv"
            (convolution before the layer), "initial" (the read at W_0), "query" (added to every read), "bias" (of the
            norms), "curvature" (of `gelu_rule="gradient"`), "mlp" (feed-forward layer); "layer" are TTT layers that
            were not chosen, as wholes; "head" is a bias of the unembedding.
        value: the target as the model gives it, [B].
        layers: absolute indices of the chosen TTT layers, rising.
        positions: columns of the target, [B].
        convention: how the writes of TTT-MLP share (`gelu_rule`, `interaction`); None for TTT-Linear.
    """

    writes: Tensor
    remainders: dict[str, Tensor]
    value: Tensor
    layers: tuple[int, ...]
    positions: Tensor
    convention: tuple[str, str] | None

    @property
    def total(self) -> Tensor:
        """All writes and remainders together, [B]."""
        parts = [self.writes, *self.remainders.values()]
        return sum(part.double().reshape(len(part), -1).sum(1) for part in parts)

    @property
    def completeness_error(self) -> Tensor:
        """How far the sum is from the target of the model, [B]: rounding alone."""
        return self.total - self.value.double()

    @property
    def tokens(self) -> Tensor:
        """The writes of every column, summed over layers and heads, [B, T]."""
        return self.writes.sum((1, 2))

    def top(self, count: int = 10) -> tuple[Tensor, Tensor]:
        """The columns whose writes add most, from the highest down, and what they add: [B, n] each."""
        values, columns = self.tokens.sort(dim=1, descending=True, stable=True)
        return columns[:, :count], values[:, :count]

    def to_pandas(self, row: int = 0) -> pd.DataFrame:
        """The writes of one document: columns `token`, `layer`, `head`, `contribution`."""
        layer, head, token = (i.ravel() for i in np.indices(self.writes.shape[1:]))
        table = {"token": token, "layer": np.asarray(self.layers)[layer], "head": head}
        return pd.DataFrame(table | {"contribution": self.writes[row].flatten().double().numpy()})

    def summary(self, row: int = 0) -> pd.DataFrame:
        """Where the target of one document comes from: `part` and `contribution`; they sum to the target."""
        parts = {"writes": self.writes, **self.remainders}
        values = [float(part[row].double().sum()) for part in parts.values()]
        return pd.DataFrame({"part": list(parts), "contribution": values})


@torch.no_grad()
def direct_logit_attribution(
    model: nn.Module,
    input_ids: Tensor,
    target: LogitTarget,
    *,
    layers: Sequence[int] | None = None,
    gelu_rule: str = "rescale",
    interaction: str = "shapley",
    attention_mask: Tensor | None = None,
    ttt_lr_mult: Tensor | None = None,
    reset_at: Tensor | int | Sequence[int] | None = None,
    piece_tokens: int = PIECE_TOKENS,
    progress: bool = False,
) -> WriteAttribution:
    """Split a logit, a difference of logits or a logit minus a mean over all writes up to its position.

    For texts [T] or [B, T] read from an empty state, in calls of about `piece_tokens` tokens; columns behind the last
    position are not read. `layers` (absolute indices in any order, None: all) are those whose writes are told apart.
    Conventions matter for TTT-MLP alone, see `interp.inner_reads`. A raw logit has a common part that no probability
    sees: a target with a contrast does without. The result lies on the CPU, in the dtype of the inner loop.

    Raises:
        ValueError: an argument does not fit.
    """
    check_convention(gelu_rule, interaction)
    ids, mask = as_rows(input_ids, attention_mask)
    length = ids.shape[1]
    positions = target.of(ids, mask)
    check_multiplier("ttt_lr_mult", ttt_lr_mult, length)
    used = int(positions.max()) + 1
    frame = Frame(model, positions, ids.device)
    if ttt_lr_mult is not None and ttt_lr_mult.dim():
        ttt_lr_mult = ttt_lr_mult[..., :used]
    border = document_starts(reset_at, ids)
    collected = collect_writes(
        model,
        ids[:, :used],
        None if mask is None else mask[:, :used],
        ttt_lr_mult,
        None if border is None else border[:, :used],
        layers,
        None,
        "cpu",
        piece_tokens,
        watch=frame.wanted(),
        on_piece=frame.see_outputs,
        options=frame.options,
        progress=progress,
    )
    direction, value, offset = frame.unembedding(target)
    chosen = {record.layer: record for record, _ in sorted(collected, key=lambda pair: pair[0].layer)}
    remainders: dict[str, list[Tensor]] = {}
    writes = []
    for i in range(len(frame.blocks)):
        parts = {name: (states * direction).sum(-1) for name, states in frame.added(i, i not in chosen).items()}
        if i in chosen:
            found, rest = _split_layer(frame, i, chosen[i], direction, gelu_rule, interaction)
            writes.append(F.pad(found, (0, length - used)))
            parts |= rest
        for name, part in parts.items():
            remainders.setdefault(name, []).append(part)
    named = {"embedding": (frame["embedding"] * direction).sum(-1)} | ({} if offset is None else {"head": offset})
    named |= {name: torch.stack(found, 1) for name, found in remainders.items()}
    records = list(chosen.values())
    convention = (gelu_rule, interaction) if len(records[0].initial) > 1 else None
    return WriteAttribution(torch.stack(writes, 1), named, value, tuple(chosen), positions, convention)


def _split_layer(
    frame: "Frame", i: int, record: LayerWrites, direction: Tensor, gelu_rule: str, interaction: str
) -> tuple[Tensor, dict[str, Tensor]]:
    """What the writes of one layer add, [B, H, T], and the layer's other parts by name."""
    mixer, q, readout = frame.mixers[i], frame[f"{i}.q"], frame[f"{i}.readout"]  # [B, H, f]
    back = frame.before(mixer.o_proj, f"{i}.mixer", direction)
    if hasattr(mixer, "g_proj"):
        back = back * F.gelu(frame[f"{i}.gate"], approximate="tanh")
    norm = mixer.post_norm
    with align_module_device(norm):
        weight, bias = norm.weight.detach().to(back), norm.bias.detach().to(back)
    bias_part = (bias * back).sum(-1)
    per_head = _before_norm(weight * back, readout.flatten(1), norm.eps).view_as(readout)  # [B, H, f]
    bias_part = bias_part + (record.norm_bias * per_head).sum((1, 2))
    reads = RowReads(record, write_inputs(record), q[:, :, None], frame.positions[:, None], gelu_rule, interaction)
    # The statistics of the inner norm are those of the read put together from the writes.
    back = _before_norm(record.norm_weight * per_head, reads.read[:, :, 0], NORM_EPS)[:, :, None]
    rest = {"initial": (reads.base * back).sum((2, 3)), "query": (q * per_head).sum(-1), "bias": bias_part}
    if gelu_rule == "gradient" and reads.slope is not None:
        rest["curvature"] = (reads.curvature * back).sum((2, 3))
    return reads.along(back)[:, :, 0], rest


def _before_norm(upstream: Tensor, x: Tensor, eps: float) -> Tensor:
    """A direction behind a frozen LayerNorm carried before it: its scale and the mean it takes off are those at x."""
    rstd = (x.var(-1, correction=0, keepdim=True) + eps).rsqrt()
    return rstd * (upstream - upstream.mean(-1, keepdim=True))
