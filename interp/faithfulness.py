"""Which estimator says what a knock-out would do, and which finds where a fact was stored.

Every estimator gives a number per token of a text; the truth is the model run again without the writes of that token.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from scipy.stats import pearsonr, spearmanr
from torch import Tensor

from interp.ablation import erase_curve, write_knockout
from interp.captum_inputs import input_attribution
from interp.captum_targets import LogitsFromEmbeddings, LogitTarget
from interp.logit_attribution import direct_logit_attribution
from interp.records import record_writes
from interp.write_gates import gate_gradient, gate_integrated_gradients
from interp.write_maps import write_read_matrix

__all__ = ["ESTIMATORS", "Agreement", "agreement", "knockout_effects", "normalised_aucs"]

TRUTH = "knock-out"


def _coefficients(model: Any, ids: Tensor, target: LogitTarget) -> Tensor:
    return _over_layers(model, ids, target, "coefficient")


def _share_norms(model: Any, ids: Tensor, target: LogitTarget) -> Tensor:
    return _over_layers(model, ids, target, "norm")


def _over_layers(model: Any, ids: Tensor, target: LogitTarget, mode: str) -> Tensor:
    """Sizes of what the read at the target's position takes from each write, summed over layers and heads."""
    row = int(target.columns(1, len(ids))[0])
    records = record_writes(model, ids[: row + 1])
    total = torch.zeros(len(ids), dtype=records.layers[0].k.dtype)
    for record in records.layers:
        total[: row + 1] += write_read_matrix(records, record.layer, mode=mode, rows=[row]).abs().sum((0, 1, 2))
    return total


ESTIMATORS: dict[str, Callable[[Any, Tensor, LogitTarget], Tensor]] = {
    "direct logit attribution": lambda model, ids, target: direct_logit_attribution(model, ids, target).tokens[0],
    "gate gradient": lambda model, ids, target: gate_gradient(model, ids, target)[0].sum((0, 1)),
    "gate integrated gradients": lambda model, ids, target: gate_integrated_gradients(
        model, ids, target, n_steps=16, rows=16
    )[0][0].sum((0, 1)),
    "size of A": _coefficients,
    "size of share": _share_norms,
    "embedding gradient x input": lambda model, ids, target: input_attribution(
        LogitsFromEmbeddings(model, target), ids, "InputXGradient"
    ).tokens[0],
}
"""Per name a function (model, ids [T], target) -> a number per token [T]. All but the sizes are signed."""


def knockout_effects(model: Any, input_ids: Tensor, target: LogitTarget, rows: int = 32) -> Tensor:
    """The target less what it is without the writes of one token, for every token [T]."""
    used = int(target.columns(1, len(input_ids))[0]) + 1
    found = write_knockout(model, input_ids, [(s, s + 1) for s in range(used)], target=target, rows=rows)
    effects = torch.zeros(len(input_ids), dtype=found.knocked.dtype)
    effects[:used] = found.total
    return effects


@dataclass(frozen=True)
class Agreement:
    """How an estimator's numbers for one text compare with the knock-outs.

    `rank` and `linear`: Spearman's and Pearson's correlation over the tokens up to the position; `top`: the column of
    the highest number; `found`: it is a source or the token behind one; `same_top`: it is that of the knock-outs.
    """

    rank: float
    linear: float
    top: int
    found: bool
    same_top: bool


def agreement(scores: Tensor, effects: Tensor, position: int, source: Sequence[int]) -> Agreement:
    """Compare scores [T] with knock-out effects [T] up to `position`; the columns `source` told the answer."""
    a, b = (x[: position + 1].double().numpy() for x in (scores, effects))
    top = int(a.argmax())
    constant = np.ptp(a) == 0 or np.ptp(b) == 0
    rank, linear = (0.0, 0.0) if constant else (spearmanr(a, b).statistic, pearsonr(a, b).statistic)
    around = {column + shift for column in source for shift in (0, 1)}
    return Agreement(float(rank), float(linear), top, top in around, top == int(b.argmax()))


def normalised_aucs(
    model: Any,
    input_ids: Tensor,
    scores: dict[str, Tensor],
    target: LogitTarget,
    *,
    steps: int = 6,
    random_orders: int = 2,
    seed: int = 0,
) -> dict[str, dict[str, Any]]:
    """Area under deletion and insertion curves by estimator, 0 the target with no write and 1 with all.

    A faithful order has a low area in deletion and a high one in insertion. "random" holds the areas of random orders.
    """
    areas: dict[str, dict[str, Any]] = {name: {} for name in [*scores, "random"]}
    for kind in ("deletion", "insertion"):
        for i, (name, values) in enumerate(scores.items()):
            orders = random_orders if i == 0 else 0
            curve = erase_curve(
                model, input_ids, values, target, kind=kind, steps=steps, random_orders=orders, seed=seed, rows=32
            )
            full, none = curve.values[[0, -1]] if kind == "deletion" else curve.values[[-1, 0]]
            areas[name][kind] = float((curve.auc - none) / (full - none))
            if orders:
                areas["random"][kind] = ((curve.random_auc - none) / (full - none)).tolist()
    return areas
