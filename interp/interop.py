"""Our numbers in the layouts of other libraries, none of which is needed: CircuitsVis and TransformerLens."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from interp.inner_reads import write_inputs
from interp.logit_attribution import WriteAttribution
from interp.records import WriteRecords
from interp.write_maps import write_read_matrix

__all__ = ["TTTMixer", "circuitsvis_heads", "circuitsvis_tokens"]

NEGATIVE, POSITIVE = "#d55e00", "#0072b2"


def circuitsvis_heads(
    records: WriteRecords,
    layer: int,
    tokens: Sequence[str],
    *,
    row: int = 0,
    columns: slice | None = None,
    mode: str = "relative",
) -> dict[str, Any]:
    """Keyword arguments of `circuitsvis.attention.attention_heads` for one layer and document.

    `attention` [heads, reading token, writing token] from `write_read_matrix`; `tokens` are the texts of all T tokens,
    `columns` a part of them (the picture has a cell per pair). Signed, so both colours are given.

    Raises:
        ValueError: the number of tokens is another.
    """
    length = records.input_ids.shape[1]
    if len(tokens) != length:
        raise ValueError(f"tokens must hold the {length} texts of the document, got {len(tokens)}")
    chosen = list(range(length))[columns or slice(None)]
    values = write_read_matrix(records, layer, mode=mode, rows=chosen)[row][..., chosen]  # [H, R, R]
    limit = float(values.abs().max()) or 1.0
    return {
        "attention": values.float(),
        "tokens": [tokens[i] for i in chosen],
        "attention_head_names": [f"L{layer}H{head}" for head in records[layer].heads],
        "max_value": limit,
        "min_value": -limit,
        "negative_color": NEGATIVE,
        "positive_color": POSITIVE,
        "mask_upper_tri": True,
    }


def circuitsvis_tokens(attribution: WriteAttribution, tokens: Sequence[str], *, row: int = 0) -> dict[str, Any]:
    """Keyword arguments of `circuitsvis.tokens.colored_tokens_multi`: values [tokens, 1 + layers], with labels.

    Raises:
        ValueError: the number of tokens is another.
    """
    writes = attribution.writes[row].sum(1)  # [L, T]
    if len(tokens) != writes.shape[1]:
        raise ValueError(f"tokens must hold the {writes.shape[1]} texts of the document, got {len(tokens)}")
    values = torch.cat([writes.sum(0, keepdim=True), writes]).T.float()
    labels = ["all layers", *(f"layer {layer}" for layer in attribution.layers)]
    return {"tokens": list(tokens), "values": values, "labels": labels}


class TTTMixer:
    """The methods of TransformerLens' protocol of recurrent mixers (`SSMMixerProtocol`), on `WriteRecords` as cache.

    There the effective attention of a delta rule is a heuristic; here it is exact, because the value of a token is
    taken to be what it wrote, minus its inner gradient, which depends on the writes before it.
    """

    def compute_effective_attention(self, cache: WriteRecords, layer_idx: int, inner_map: int = 1) -> Tensor:
        """M [batch, heads, reading token, writing token]; the read at the map is M @ (-gradients) + what W_0 gives."""
        return -write_read_matrix(cache, layer_idx, inner_map=inner_map)

    @torch.no_grad()
    def compute_ssm_state(
        self, cache: WriteRecords, layer_idx: int, time_step: int | None = None, inner_map: int = 1
    ) -> Tensor:
        """The weights that tokens read with, the bias as last row: [batch, heads, tokens, in + 1, out].

        Of one `time_step` (negative: from the end) alone [batch, heads, in + 1, out]; all tokens need T states.

        Raises:
            ValueError: an index is out of range.
        """
        record, length = cache[layer_idx], cache.input_ids.shape[1]
        if not 1 <= inner_map <= len(record.initial):
            raise ValueError(f"inner_map must be in [1, {len(record.initial)}], got {inner_map}")
        if time_step is not None and not -length <= time_step < length:
            raise ValueError(f"time_step must be in [-{length}, {length}), got {time_step}")
        steps = list(range(length)) if time_step is None else [time_step % length]
        x, g = write_inputs(record)[inner_map - 1], record.gradients[inner_map - 1]
        x = torch.cat([x, torch.ones_like(x[..., :1])], -1)
        initial = torch.cat(record.initial[inner_map - 1], -2)
        states = []
        for step in steps:
            rows = torch.full((len(x), 1), step, device=x.device)
            rates = record.places.rates(record.lr, record.token_rate, rows)[:, :, 0, :, None]  # [B, H, T, 1]
            states.append(initial - (x * rates).mT @ g)
        return torch.stack(states, 2) if time_step is None else states[0]
