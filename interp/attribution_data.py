"""What figures and pages of an attribution show: the text with a number per token, and how far back reads reach."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch

from interp.logit_attribution import WriteAttribution
from interp.records import WriteRecords
from interp.write_maps import iterate_rows

__all__ = ["AttributedText", "LagHistogram", "attributed_text", "lag_histogram"]


@dataclass(frozen=True)
class AttributedText:
    """A text of T tokens and what the write of each adds to a target; the tables behind the figures.

    `tokens` are their texts, `layers` absolute indices, `by_layer` float64 [T, L], `position` the column whose next
    token was asked about, `question` what the target is in words, `value` its value; `marked` columns are pointed out.
    """

    tokens: tuple[str, ...]
    layers: tuple[int, ...]
    by_layer: np.ndarray
    position: int
    question: str
    value: float
    marked: tuple[int, ...] = ()

    @property
    def contributions(self) -> np.ndarray:
        """All layers together, [T]."""
        return self.by_layer.sum(1)

    @property
    def layer_names(self) -> list[str]:
        """Names of the columns of `by_layer`."""
        return [f"layer_{layer}" for layer in self.layers]

    def to_pandas(self) -> pd.DataFrame:
        """A row per token: `column`, `token`, `contribution` and one column per layer."""
        table = {"column": np.arange(len(self.tokens)), "token": list(self.tokens), "contribution": self.contributions}
        table |= dict(zip(self.layer_names, self.by_layer.T, strict=True))
        return pd.DataFrame(table | {"marked": np.isin(table["column"], self.marked)})

    def top(self, count: int = 10) -> pd.DataFrame:
        """The rows of `to_pandas` with the largest contributions by size, largest first."""
        table = self.to_pandas()
        return table.iloc[table["contribution"].abs().argsort(kind="stable")[::-1][:count]]


def attributed_text(
    attribution: WriteAttribution,
    tokens: Sequence[str],
    question: str,
    *,
    row: int = 0,
    marked: Sequence[int] = (),
) -> AttributedText:
    """One document of an attribution with the texts of its tokens.

    Raises:
        ValueError: the number of tokens is another, or a marked column is none of the text.
    """
    by_layer = attribution.writes[row].sum(1).T.double().numpy()  # [T, L]
    if len(tokens) != len(by_layer):
        raise ValueError(f"tokens must hold the {len(by_layer)} texts of the document, got {len(tokens)}")
    if any(not 0 <= column < len(tokens) for column in marked):
        raise ValueError(f"marked must be columns in [0, {len(tokens)}), got {list(marked)}")
    return AttributedText(
        tuple(tokens),
        attribution.layers,
        by_layer,
        int(attribution.positions[row]),
        question,
        float(attribution.value[row]),
        tuple(marked),
    )


@dataclass(frozen=True)
class LagHistogram:
    """How far back the reads of a layer reach; heads and documents together.

    Bin i holds lags `low[i]` to `high[i]` in columns; `mass` is the sum of the sizes of the shares there, `pairs` how
    many pairs of a read and a write it holds, over `reads` reads. What `mode` means says `write_read_matrix`.
    """

    layer: int
    mode: str
    reads: int
    low: np.ndarray
    high: np.ndarray
    mass: np.ndarray
    pairs: np.ndarray

    def to_pandas(self) -> pd.DataFrame:
        """Columns `low`, `high`, `pairs`, `mass`, `share` (of all mass) and `mean` (mass per pair)."""
        with np.errstate(divide="ignore", invalid="ignore"):
            share, mean = self.mass / self.mass.sum(), self.mass / self.pairs
        return pd.DataFrame(
            {
                "low": self.low,
                "high": self.high,
                "pairs": self.pairs,
                "mass": self.mass,
                "share": share,
                "mean": mean,
            }
        )


def lag_histogram(
    records: WriteRecords, layer: int, *, rows: Sequence[int] | None = None, mode: str = "coefficient"
) -> LagHistogram:
    """Sizes of what reads take from writes by lag, in bins that double: 0, 1, 2 to 3, 4 to 7, ...

    `rows` are the reading columns, None takes 64 spread over the text. `mode` as in `write_read_matrix`, not "signed".
    """
    length = records.input_ids.shape[1]
    if rows is None:
        rows = np.unique(np.linspace(0, length - 1, min(64, length)).round().astype(int)).tolist()
    if mode == "signed":
        raise ValueError("mode must not be 'signed': sizes have no direction")
    count = int(length).bit_length() + 1
    mass, pairs, reads = np.zeros(count), np.zeros(count), 0
    columns = torch.arange(length)
    for block, values in iterate_rows(records, layer, rows=rows, mode=mode):
        lag = torch.tensor(block)[:, None] - columns  # [r, T]
        bin_of = torch.where(lag >= 0, torch.floor(torch.log2(lag.clamp(min=1))) + 1, 0.0).where(lag > 0, 0.0).long()
        real = records.places.real.cpu()
        seen = ((lag >= 0) & real[:, None] & real[:, block, None]).double()  # [B, r, T]
        sizes = values.abs().double().cpu().sum(1)
        for total, weights in ((mass, sizes * seen), (pairs, seen * values.shape[1])):
            total += np.bincount(
                bin_of.expand(weights.shape).flatten().numpy(), weights.flatten().numpy(), minlength=count
            )
        reads += int(real[:, block].sum()) * values.shape[1]
    used = max(1, int(np.flatnonzero(pairs).max(initial=0)) + 1)
    low = np.array([0, *(2**i for i in range(count - 1))])[:used]
    high = np.array([0, *(2 ** (i + 1) - 1 for i in range(count - 1))])[:used]
    return LagHistogram(layer, mode, reads, low, high, mass[:used], pairs[:used])
