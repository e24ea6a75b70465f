"""What of a study's tables its verdicts hang on."""

import pandas as pd
import pytest

from interp._columns import POOLED
from interp.claims import CANNOT_TELL, NOT_REPRODUCED, REPRODUCED
from interp.study_claims import _burn_in, _efficiency


def skipping(costs, inner: float, unit: str = "documents") -> dict[str, pd.DataFrame]:
    """A table of skipping from {share: (low, delta, high)}; `inner`: share of operations that all writes are."""
    rows = [
        {"share": share, "rule": rule, "skipped": share, "delta_low": low, "delta": delta, "delta_high": high}
        | {"saved_writes": share * inner / 2, "saved_inner": share * inner}
        for share, (low, delta, high) in costs.items()
        for rule in ("small gradient", "at random")
    ]
    return {"skipping": pd.DataFrame(rows).assign(model="m", corpus="skip", unit=unit, documents=16)}


@pytest.mark.parametrize(
    ("costs", "inner", "unit", "bounds", "verdict"),
    [
        # A share between 0.5 and 0.9 may be free and save enough.
        ({0.5: (-0.01, 0.005, 0.02), 0.9: (0.1, 0.2, 0.3)}, 0.5, "documents", (0.25, 0.0, 0.45), CANNOT_TELL),
        ({0.2: (0.1, 0.2, 0.3), 0.9: (0.2, 0.3, 0.4)}, 0.5, "documents", (0.0, 0.0, 0.1), NOT_REPRODUCED),
        ({0.5: (-0.01, 0.0, 0.005), 0.9: (0.1, 0.2, 0.3)}, 0.5, "documents", (0.25, 0.25, 0.45), REPRODUCED),
        # Without intervals, or with few documents, nothing bounds the cost.
        ({0.5: (float("nan"), 0.2, float("nan"))}, 0.5, "documents", (0.0, 0.0, 0.5), CANNOT_TELL),
        ({0.5: (0.1, 0.2, 0.3)}, 0.5, "blocks of 256 tokens", (0.0, 0.0, 0.5), CANNOT_TELL),
        # Where all writes together are too little, nothing needs a bound.
        ({0.5: (0.1, 0.2, 0.3)}, 0.03, "blocks of 256 tokens", (0.0, 0.0, 0.03), NOT_REPRODUCED),
    ],
)
def test_savings_are_bounded_by_the_first_share_that_costs_too_much_for_certain(costs, inner, unit, bounds, verdict):
    (claim,) = _efficiency("m", None, skipping(costs, inner, unit))
    assert (claim.value, claim.low, claim.high) == pytest.approx(bounds)
    assert claim.verdict == verdict


@pytest.mark.parametrize(("n", "verdict"), [(2000, REPRODUCED), (40, CANNOT_TELL)])
def test_a_burn_in_over_fewer_tokens_than_claimed_is_not_the_claimed_one(n, verdict):
    place = {"model": "m", "corpus": "long", "layer": POOLED, "unit": "documents", "documents": 12}
    measured = {"ratio": 2.0, "ratio_low": 1.8, "ratio_high": 2.2, "n": n}
    decay = [{**place, **measured, "comparison": name} for name in ("first/steady", "first/last")]
    fit = {**place, **dict.fromkeys(("tau", "tau_low", "tau_high"), float("nan")), "refusal": "too short"}
    claims = list(_burn_in("m", None, {"decay": pd.DataFrame(decay), "burn_in": pd.DataFrame([fit])}))
    assert [claim.verdict for claim in claims] == [verdict, CANNOT_TELL]
