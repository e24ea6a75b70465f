"""Verdicts on the claims of an earlier study, by rule from intervals."""

import math
from dataclasses import dataclass

__all__ = [
    "CANNOT_TELL",
    "NOT_REPRODUCED",
    "REPRODUCED",
    "REVERSED",
    "RULES",
    "VERDICTS",
    "Verdict",
    "judge_effect",
    "judge_near_zero",
    "judge_range",
]

REPRODUCED = "reproduced"
NOT_REPRODUCED = "not reproduced"
REVERSED = "reversed"
CANNOT_TELL = "cannot tell (n too small)"
VERDICTS = (REPRODUCED, NOT_REPRODUCED, REVERSED, CANNOT_TELL)

RULES = {
    "effect": "The bar is half the claimed size (as a logarithm for ratios), or no effect where only a direction was "
    "claimed. Reproduced when the whole interval lies above the bar, and wholly above that of the control where there "
    "is one. Reversed when it lies wholly on the other side of no effect. Not reproduced when it lies wholly below "
    "the bar, or when its upper end lies above the control's lower end by less than the bar. Cannot tell in all "
    "other cases, and when fewer than ten documents were read.",
    "near zero": "Reproduced when the whole interval lies within 0.1 of 0, not reproduced when it lies wholly "
    "outside, cannot tell otherwise.",
    "range": "Reproduced when the whole interval lies within half to twice the claimed value, not reproduced when it "
    "lies wholly outside, cannot tell otherwise.",
    "location": "As for an effect in a direction: the layers named must cost more to freeze than other choices of as "
    "many layers do on average. Beyond that they must cost more than each of these, else it is not reproduced (where "
    "another choice costs more) or cannot be told.",
    "counted": "Operations are counted. The interval goes from what is saved at shares whose cost lies below 0.01 "
    "nats per token for certain to what is saved at the least share whose cost lies above for certain (by leaving out "
    "all writes where there is none): shares between those tried may be free. Reproduced when all of it lies above "
    "half the claimed saving, not reproduced when all of it lies below.",
}


@dataclass(frozen=True)
class Verdict:
    """One of `VERDICTS`, and why in a few words."""

    verdict: str
    why: str


def judge_effect(
    low: float,
    high: float,
    *,
    null: float,
    claimed: float | None = None,
    control: tuple[float, float] | None = None,
    enough: bool = True,
    ratio: bool = True,
) -> Verdict:
    """Judge an effect by its interval.

    `null` is no effect; `claimed` the size that was claimed (None: only that it is above `null`); a claim below `null`
    is one in the other direction. `ratio`: sizes are compared as logarithms. `control`: interval of the same quantity
    where the claimed cause is missing. `enough`: whether as many documents were read as the interval needs.
    ValueError when `claimed` equals `null`.
    """
    if claimed == null:
        raise ValueError(f"claimed must differ from null, got {claimed} for both")
    if not (math.isfinite(low) and math.isfinite(high)):
        return Verdict(CANNOT_TELL, "there is no interval")
    if not enough:
        return Verdict(CANNOT_TELL, "too few documents for an interval that speaks about others")
    scale = math.log if ratio else float
    down = claimed is not None and claimed < null

    def turn(value: float) -> float:
        distance = scale(value) - scale(null) if not ratio or value > 0 else -math.inf
        return -distance if down else distance

    near, far = sorted((turn(low), turn(high)))
    bar = 0.0 if claimed is None else turn(claimed) / 2
    if far < 0:
        return Verdict(REVERSED, "the whole interval lies on the other side of no effect")
    if claimed is not None and far < bar:
        return Verdict(NOT_REPRODUCED, "the whole interval lies below half the claimed size")
    known = control is not None and math.isfinite(control[0]) and math.isfinite(control[1])
    least, most = sorted(map(turn, control)) if known else (-math.inf, -math.inf)
    if far - least <= bar:
        return Verdict(NOT_REPRODUCED, "whatever effect there is, the control shows nearly as much or more")
    if near <= bar:
        what = "no effect" if claimed is None else "half the claimed size"
        return Verdict(CANNOT_TELL, f"the interval reaches over {what}")
    if near <= most:
        return Verdict(CANNOT_TELL, "there is an effect, but its interval and that of the control overlap")
    beyond = ", and beyond the control" if known else ""
    what = "on the claimed side of no effect" if claimed is None else "above half the claimed size"
    return Verdict(REPRODUCED, f"the whole interval lies {what}{beyond}")


def judge_near_zero(low: float, high: float, *, margin: float, enough: bool = True) -> Verdict:
    """Judge the claim that a quantity is near 0, within `margin`."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return Verdict(CANNOT_TELL, "there is no interval")
    if not enough:
        return Verdict(CANNOT_TELL, "too few documents for an interval that speaks about others")
    if -margin <= low and high <= margin:
        return Verdict(REPRODUCED, f"the whole interval lies within {margin:g} of 0")
    if low > margin or high < -margin:
        return Verdict(NOT_REPRODUCED, f"the whole interval lies more than {margin:g} from 0")
    return Verdict(CANNOT_TELL, f"the interval reaches over the margin of {margin:g}")


def judge_range(low: float, high: float, *, claimed: float, enough: bool = True) -> Verdict:
    """Judge the claim that a positive quantity is about `claimed`, from half of it to twice."""
    if not (math.isfinite(low) and math.isfinite(high)):
        return Verdict(CANNOT_TELL, "there is no interval")
    if not enough:
        return Verdict(CANNOT_TELL, "too few documents for an interval that speaks about others")
    if claimed / 2 <= low and high <= claimed * 2:
        return Verdict(REPRODUCED, f"the whole interval lies within {claimed / 2:g} and {claimed * 2:g}")
    if high < claimed / 2 or low > claimed * 2:
        return Verdict(NOT_REPRODUCED, f"the whole interval lies outside {claimed / 2:g} to {claimed * 2:g}")
    return Verdict(CANNOT_TELL, f"the interval reaches over {claimed / 2:g} or {claimed * 2:g}")
