"""Verdicts follow from intervals by the rules that the report prints."""

import math

import pytest

from interp.claims import (
    CANNOT_TELL,
    NOT_REPRODUCED,
    REPRODUCED,
    REVERSED,
    judge_effect,
    judge_near_zero,
    judge_range,
)


@pytest.mark.parametrize(
    ("low", "high", "options", "verdict"),
    [
        (1.15, 1.4, {"claimed": 1.28}, REPRODUCED),
        (1.05, 1.4, {"claimed": 1.28}, CANNOT_TELL),
        (1.02, 1.1, {"claimed": 1.28}, NOT_REPRODUCED),
        (0.98, 1.05, {"claimed": 1.28}, NOT_REPRODUCED),
        (0.8, 0.95, {"claimed": 1.28}, REVERSED),
        (0.9, 1.3, {"claimed": 1.28}, CANNOT_TELL),
        (1.02, 1.1, {}, REPRODUCED),
        (0.98, 1.1, {}, CANNOT_TELL),
        (0.7, 0.8, {"claimed": 0.75}, REPRODUCED),
        (1.2, 1.4, {"claimed": 0.75}, REVERSED),
        (1.6, 2.4, {"claimed": 2.0, "control": (1.0, 1.2)}, REPRODUCED),
        (1.6, 2.4, {"claimed": 2.0, "control": (1.8, 2.5)}, NOT_REPRODUCED),
        (1.05, 1.4, {"claimed": 1.28, "control": (1.3, 1.5)}, NOT_REPRODUCED),
        (1.6, 2.4, {"claimed": 2.0, "control": (1.4, 1.8)}, CANNOT_TELL),
        (1.02, 1.1, {"control": (1.1, 1.2)}, NOT_REPRODUCED),
        (1.6, 2.4, {"claimed": 2.0, "control": (math.nan, math.nan)}, REPRODUCED),
        (1.2, 1.4, {"claimed": 1.28, "enough": False}, CANNOT_TELL),
        (math.nan, math.nan, {"claimed": 1.28}, CANNOT_TELL),
    ],
)
def test_an_effect_is_judged_by_its_whole_interval(low, high, options, verdict):
    assert judge_effect(low, high, null=1.0, **options).verdict == verdict


def test_fewer_documents_never_turn_cannot_tell_into_a_verdict():
    # The same effect and control with wider and wider intervals of either.
    for wider in (1.02, 1.1, 1.3):
        for low, high, control in ((1.5 / wider, 1.5 * wider, (1.4, 1.6)), (1.45, 1.55, (1.5 / wider, 1.5 * wider))):
            assert judge_effect(low, high, null=1.0, control=control).verdict == CANNOT_TELL


def test_differences_are_judged_on_their_own_scale():
    assert judge_effect(-0.3, -0.1, null=0.0, ratio=False).verdict == REVERSED
    assert judge_effect(0.2, 0.4, null=0.0, claimed=0.3, ratio=False).verdict == REPRODUCED
    assert judge_effect(0.01, 0.1, null=0.0, claimed=0.3, ratio=False).verdict == NOT_REPRODUCED
    with pytest.raises(ValueError, match="claimed must differ from null"):
        judge_effect(0.1, 0.2, null=0.0, claimed=0.0, ratio=False)


def test_near_zero_and_ranges():
    assert judge_near_zero(-0.05, 0.09, margin=0.1).verdict == REPRODUCED
    assert judge_near_zero(0.2, 0.3, margin=0.1).verdict == NOT_REPRODUCED
    assert judge_near_zero(-0.3, -0.2, margin=0.1).verdict == NOT_REPRODUCED
    assert judge_near_zero(0.05, 0.2, margin=0.1).verdict == CANNOT_TELL
    assert judge_range(1500, 3000, claimed=2000).verdict == REPRODUCED
    assert judge_range(100, 300, claimed=2000).verdict == NOT_REPRODUCED
    assert judge_range(500, 3000, claimed=2000).verdict == CANNOT_TELL
    for judge, options in ((judge_near_zero, {"margin": 0.1}), (judge_range, {"claimed": 2000})):
        assert judge(math.nan, math.nan, **options).verdict == CANNOT_TELL
        assert judge(1.0, 1.1, enough=False, **options).verdict == CANNOT_TELL
