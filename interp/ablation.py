"""What a model does without some of its writes: knock-outs, erase curves, and a state that never learnt a span.

A knock-out multiplies the inner learning rate of tokens by 0; their keys, values, convolutions and residuals stay. A
span is (first token, one past the last), in columns of the text given.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pandas as pd
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm.auto import tqdm

from interp.captum_targets import LogitTarget, as_rows, choose_writes
from interp.freezing import ttt_layers
from interp.taps import PIECE_TOKENS, kept_cache
from interp.write_gates import Spans, WriteGateModel, checked_spans
from interp.write_subtraction import subtracted_writes

__all__ = ["EraseCurve", "KnockoutResult", "erase_curve", "freeze_effects", "learn_without", "write_knockout"]

MODES = ("recompute", "subtract")
KINDS = ("deletion", "insertion")


@dataclass(frozen=True)
class KnockoutResult:
    """What a quantity is with all writes and without those of each span.

    The quantity is the surprisal of every token (nats, NaN for the first), [T] and [n, T]; or a `LogitTarget`, [1] and
    [n, 1]. Columns that are padding hold NaN.
    """

    spans: tuple[tuple[int, int], ...]
    mode: str
    baseline: Tensor
    knocked: Tensor

    @property
    def effect(self) -> Tensor:
        """With the writes minus without, as Captum counts, [n, T] or [n, 1]; a useful write lowers surprisal."""
        return self.baseline - self.knocked

    @property
    def total(self) -> Tensor:
        """The effect summed over the text, [n]."""
        return self.effect.nansum(1)

    def to_pandas(self) -> pd.DataFrame:
        """A row per span: `first`, `end` (one past the last token) and `effect`, summed over the text."""
        columns = {"first": [s[0] for s in self.spans], "end": [s[1] for s in self.spans]}
        return pd.DataFrame(columns | {"effect": self.total.tolist()})


@torch.no_grad()
def write_knockout(
    model: nn.Module,
    input_ids: Tensor,
    spans: Spans,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    mode: str = "recompute",
    target: LogitTarget | None = None,
    attention_mask: Tensor | None = None,
    rows: int = 8,
    progress: bool = False,
) -> KnockoutResult:
    """Leave out the writes of one span after another, in chosen layers (absolute indices) and heads (None: all).

    `mode="recompute"` is what the model does: later gradients see other weights. `"subtract"` takes the writes off
    every read of the chosen layers while their own inner gradients stay as they were, so that no later write makes up
    for them; for one layer both agree within the span's mini-batch. `target` None measures every token's surprisal.

    One document [T] or [1, T]; padding is set aside. `rows` spans run in one call, and a recomputed call starts from
    the last mini-batch border before the first of its spans. Tokens before a span keep their baseline: nothing reads
    forward in time.

    Raises:
        ValueError: an argument does not fit.
    """
    if mode not in MODES:
        raise ValueError(f"mode must be one of {MODES}, got {mode!r}")
    if rows < 1:
        raise ValueError(f"rows must be at least 1, got {rows}")
    ids, columns, length = _real_tokens(input_ids, attention_mask)
    checked = checked_spans(spans, length)
    places = choose_writes(model.config, layers, heads)
    asked = None if target is None else target.of(*as_rows(input_ids, attention_mask))
    at = None if asked is None else int(torch.searchsorted(columns, asked)[0])
    # In places among the real tokens from here on; a span of padding alone becomes empty.
    real = [tuple(torch.searchsorted(columns, torch.tensor(span)).tolist()) for span in checked]
    run = _Run(model, ids, target, at)
    baseline = run.values(1)[0]
    knocked = baseline.repeat(len(real), 1)
    order = sorted((i for i, (first, end) in enumerate(real) if first < end), key=lambda i: real[i][0])
    groups = [order[i : i + rows] for i in range(0, len(order), rows)]
    for group in tqdm(groups, unit="batch", disable=not progress):
        chosen = [real[i] for i in group]
        found = run.recomputed(chosen, *places) if mode == "recompute" else run.subtracted(chosen, *places)
        for i, values in zip(group, found, strict=True):
            first = real[i][0]
            if target is None:
                knocked[i, first + 1 :] = values[first + 1 :]
            elif at >= first:
                knocked[i] = values
    if target is None:
        baseline, knocked = (_spread(x, columns, length) for x in (baseline, knocked))
    return KnockoutResult(tuple(checked), mode, baseline, knocked)


def freeze_effects(
    model: nn.Module,
    input_ids: Tensor,
    *,
    layers: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
) -> tuple[list[int], Tensor]:
    """What freezing each layer by itself (None: every TTT layer) does to the surprisal of every token of a document.

    Absolute indices of the layers, and surprisal with the layer at W_0 less surprisal as it is, [layers, T], nats;
    positive where its learning helped; NaN for the first token and for padding.
    """
    ids, mask = as_rows(input_ids, attention_mask)
    layers = ttt_layers(model.config) if layers is None else list(layers)
    whole = [(0, ids.shape[1])]
    found = [write_knockout(model, ids, whole, layers=[i], attention_mask=mask).effect for i in layers]
    return layers, -torch.cat(found)


class _Run:
    """One document and what is measured on it; keeps the state at a mini-batch border, which moves on only."""

    def __init__(self, model: Any, ids: Tensor, target: LogitTarget | None, at: int | None):
        self.model, self.ids, self.target, self.at = model, ids, target, at
        self.length = ids.shape[1] if at is None else at + 1  # what comes behind is not read
        self.cache, self.column = None, 0

    def recomputed(self, spans: Spans, layers: list[int], heads: list[int]) -> Tensor:
        size = self.model.config.mini_batch_size
        border = min(spans[0][0], self.length - 1) // size * size
        for piece in _pieces(self.column, border):
            out = self.model(
                input_ids=self.ids[:, piece], past_key_values=self.cache, use_cache=True, logits_to_keep=1
            )
            self.cache, self.column = kept_cache(out), piece.stop
        gates = multiplier(self.model.config, self.ids.shape[1], spans, layers, heads)
        return self.values(len(spans), gates, border)

    def subtracted(self, spans: Spans, layers: list[int], heads: list[int]) -> Tensor:
        ids = self.ids[:, : self.length]
        keep = multiplier(self.model.config, self.ids.shape[1], spans, layers, heads)[:, layers[0], :, : self.length]
        with subtracted_writes(self.model, ids, layers, keep):
            logits = self.model(
                input_ids=ids.repeat(len(spans), 1), use_cache=False, output_plasticity=False, **self._kept(ids)
            ).logits
        if self.target is not None:
            return self.target.read(logits[:, -1])[:, None].cpu()
        values = self._empty(len(spans))
        values[:, 1:] = _surprisal(logits[:, :-1], ids[:, 1:])
        return values

    def values(self, rows: int, gates: Tensor | None = None, start: int = 0) -> Tensor:
        """The quantity of every row, [rows, T] or [rows, 1], run on from `start`; NaN at the columns before."""
        cache = None
        if start:
            cache = self.model.clone_cache(self.cache)
            cache.batch_repeat_interleave(rows)
        values = self._empty(rows)
        for piece in _pieces(start, self.length, max(1, PIECE_TOKENS // rows)):
            ids = self.ids[:, piece]
            out = self.model(
                input_ids=ids.repeat(rows, 1),
                past_key_values=cache,
                use_cache=True,
                ttt_lr_mult=None if gates is None else gates[..., piece],
                output_plasticity=False,
                **self._kept(ids),
            )
            if piece.stop < self.length:
                cache = kept_cache(out)
            if self.target is None:
                told = self.ids[:, piece.start + 1 : piece.stop + 1]
                values[:, piece.start + 1 : piece.start + 1 + told.shape[1]] = _surprisal(
                    out.logits[:, : told.shape[1]], told
                )
            elif piece.stop == self.length:
                values = self.target.read(out.logits[:, -1])[:, None].cpu()
        return values

    def _kept(self, ids: Tensor) -> dict[str, int]:
        return {} if self.target is None else {"logits_to_keep": 1}

    def _empty(self, rows: int) -> Tensor:
        dtype = torch.float64 if self.model.dtype == torch.float64 else torch.float32
        return torch.full((rows, self.ids.shape[1] if self.target is None else 1), torch.nan, dtype=dtype)


def multiplier(
    config: Any, length: int, spans: Spans, layers: list[int], heads: list[int], value: float = 0.0
) -> Tensor:
    """A row per span, float32 [n, L, H, T]: `value` at its tokens in places `layers` and `heads`, 1 elsewhere."""
    every_layer, every_head = choose_writes(config)
    gates = torch.ones(len(spans), len(every_layer), len(every_head), length)
    for row, (first, end) in zip(gates, spans, strict=True):
        row[torch.tensor(layers)[:, None], torch.tensor(heads), first:end] = value
    return gates


@torch.no_grad()
def learn_without(
    model: Any,
    input_ids: Tensor,
    spans: Spans,
    *,
    layers: Sequence[int] | None = None,
    heads: Sequence[int] | None = None,
    attention_mask: Tensor | None = None,
    past_key_values: Any = None,
) -> Any:
    """Read a text and return the cache of a model that never learnt some spans of it (in-context unlearning).

    The same as a forward pass with `ttt_lr_mult` 0 at the spans, which hold for all rows: the spans are read, with
    their convolutions and mini-batch positions, but not written. `past_key_values` is a state to go on from, such as
    one kept from before the first span; it stays as it is. What was summed into a state cannot be taken out of it
    again: later gradients were taken at the weights that held it, so the text since is read once more.

    Raises:
        ValueError: an argument does not fit.
    """
    ids, mask = as_rows(input_ids, attention_mask)
    length = ids.shape[1]
    places = choose_writes(model.config, layers, heads)
    gates = multiplier(model.config, length, checked_spans(spans, length), *places)
    gates = gates.amin(0, keepdim=True) if len(gates) else None
    cache = None if past_key_values is None else model.clone_cache(past_key_values)
    out = model(
        input_ids=ids,
        attention_mask=mask,
        past_key_values=cache,
        use_cache=True,
        ttt_lr_mult=gates,
        output_plasticity=False,
        logits_to_keep=1,
    )
    return kept_cache(out)


@dataclass(frozen=True)
class EraseCurve:
    """A target while writes go (deletion) or come (insertion) in an order, and the same for random orders.

    `fractions` [S + 1] of the writes done so far, `values` [S + 1], `random_values` [R, S + 1]. The target is the one
    given, so a faithful order has a low `auc` in deletion and a high one in insertion.
    """

    kind: str
    fractions: np.ndarray
    values: np.ndarray
    random_values: np.ndarray

    @property
    def auc(self) -> float:
        """Area under the curve, in units of the target."""
        return float(np.trapezoid(self.values, self.fractions))

    @property
    def random_auc(self) -> np.ndarray:
        """Area under the curve of every random order, [R]."""
        return np.trapezoid(self.random_values, self.fractions, axis=1)

    def to_pandas(self, coverage: float = 0.95) -> pd.DataFrame:
        """Columns `fraction`, `value`, and with random orders `random_low`, `random_high`, which hold `coverage`."""
        table = pd.DataFrame({"fraction": self.fractions, "value": self.values})
        if len(self.random_values):
            low = (1 - coverage) / 2
            table["random_low"], table["random_high"] = np.quantile(self.random_values, [low, 1 - low], axis=0)
        return table


@torch.no_grad()
def erase_curve(
    model: nn.Module,
    input_ids: Tensor,
    scores: Tensor,
    target: LogitTarget,
    *,
    kind: str = "deletion",
    steps: int = 16,
    random_orders: int = 8,
    seed: int = 0,
    rows: int = 8,
    attention_mask: Tensor | None = None,
    progress: bool = False,
) -> EraseCurve:
    """Knock writes out of one document (deletion) or let them in (insertion), from the highest score down.

    `scores` [T] orders tokens, [L, H, T] single writes (or [1, L, H, T], as attributions come); only writes of real
    tokens up to the target's position count. About `steps` equal groups; ties go by position. The random orders are
    drawn from `seed`.
    """
    if kind not in KINDS:
        raise ValueError(f"kind must be one of {KINDS}, got {kind!r}")
    if steps < 1 or rows < 1 or random_orders < 0:
        raise ValueError(f"steps and rows must be at least 1, random_orders 0, got {steps}, {rows}, {random_orders}")
    ids, mask = as_rows(input_ids, attention_mask)
    if len(ids) != 1:
        raise ValueError(f"an erase curve is of one document, got {len(ids)} rows")
    gated = WriteGateModel(model, ids, target, attention_mask=mask)
    scores = scores[0] if scores.dim() in (2, 4) and scores.shape[0] == 1 else scores
    full = gated.open_gates()[0]
    if scores.shape not in (full.shape, full.shape[-1:]) or not scores.isfinite().all():
        raise ValueError(f"scores must be finite, [{ids.shape[1]}] or {list(full.shape)}, got {list(scores.shape)}")
    counted = torch.arange(ids.shape[1]) <= gated.position[0]
    counted = (counted if mask is None else counted & (mask[0] != 0).cpu()).expand(scores.shape)
    places = counted.flatten().nonzero()[:, 0]
    if not len(places):
        raise ValueError(f"there is no real token up to position {target.position}")
    order = places[scores.flatten().cpu()[places].argsort(descending=True, stable=True)]
    generator = torch.Generator().manual_seed(seed)
    orders = [order, *(places[torch.randperm(len(places), generator=generator)] for _ in range(random_orders))]
    done = np.unique(np.linspace(0, len(places), min(steps, len(places)) + 1).round().astype(int))
    gates = _erased(orders, done, scores.shape, full, kind)
    batches = tqdm(
        _stacked(gates, rows), total=-(-len(orders) * len(done) // rows), unit="batch", disable=not progress
    )
    values = torch.cat([gated(batch).double().cpu() for batch in batches])
    values = values.view(len(orders), len(done)).numpy()
    return EraseCurve(kind, done / len(places), values[0], values[1:])


def _erased(orders: list[Tensor], done: np.ndarray, shape: torch.Size, full: Tensor, kind: str) -> Iterator[Tensor]:
    """Gates [L, H, T] for every order and every number of writes done."""
    before, after = (1.0, 0.0) if kind == "deletion" else (0.0, 1.0)
    for order in orders:
        for count in done:
            gates = full.new_full((shape.numel(),), before)
            gates[order[:count]] = after
            yield gates.view(shape).expand(full.shape)


def _stacked(items: Iterator[Tensor], rows: int) -> Iterator[Tensor]:
    batch: list[Tensor] = []
    for item in items:
        batch.append(item)
        if len(batch) == rows:
            yield torch.stack(batch)
            batch = []
    if batch:
        yield torch.stack(batch)


def _real_tokens(input_ids: Tensor, attention_mask: Tensor | None) -> tuple[Tensor, Tensor, int]:
    """The real tokens of one document [1, n], their columns [n], and the number of columns."""
    ids, mask = as_rows(input_ids, attention_mask)
    if len(ids) != 1:
        raise ValueError(f"a knock-out is of one document, got {len(ids)} rows")
    columns = torch.arange(ids.shape[1]) if mask is None else (mask[0] != 0).cpu().nonzero()[:, 0]
    if not len(columns):
        raise ValueError("attention_mask masks every token")
    return ids[:, columns.to(ids.device)], columns, ids.shape[1]


def _spread(values: Tensor, columns: Tensor, length: int) -> Tensor:
    out = values.new_full((*values.shape[:-1], length), torch.nan)
    out[..., columns] = values
    return out


def _pieces(start: int, end: int, size: int = PIECE_TOKENS) -> Iterator[slice]:
    for first in range(start, end, size):
        yield slice(first, min(end, first + size))


def _surprisal(logits: Tensor, told: Tensor) -> Tensor:
    """-log p of the tokens told [1, n] from logits [N, n, V], on the CPU, [N, n]; at least in float32."""
    logits = logits if logits.dtype == torch.float64 else logits.float()
    told = told.to(logits.device).expand(logits.shape[0], -1)
    return F.cross_entropy(logits.transpose(1, 2), told, reduction="none").cpu()
