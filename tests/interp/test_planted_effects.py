"""The instrument on data whose truth is known: nulls are covered, planted effects found, confounds seen through."""

import re

import numpy as np
import pytest

from interp.adjustment import covariate_contrast
from interp.bucketing import Bucket
from interp.burn_in import fit_burn_in
from interp.permutation import permutation_test
from interp.resampling import Bootstrap
from interp.statistics import adjusted_contrast, bucket_contrast, position_strata
from interp.time_course import surprisal_correlation
from tests.interp.planted_effects import dependent_noise, grid, null_sample, runs_of_labels

SYNTAX, RETRIEVAL, NOVELTY, OTHER = Bucket
PAIR = [(NOVELTY, SYNTAX)]
FAST = Bootstrap(n_boot=400)


def coverage(simulations: int, one) -> float:
    generator = np.random.default_rng(11)
    return float(np.mean([one(generator) for _ in range(simulations)]))


def test_intervals_of_a_null_cover_95_percent():
    def ratio_covers(generator):
        plasticity, buckets, documents, _ = null_sample(generator, tokens=64)
        row = bucket_contrast(plasticity, buckets, documents, pairs=PAIR, boot=Bootstrap(n_boot=200)).iloc[0]
        return row["ratio_low"] <= 1 <= row["ratio_high"]

    assert 0.92 <= coverage(400, ratio_covers) <= 0.98


@pytest.mark.slow
def test_intervals_of_adjusted_and_lagged_nulls_cover_95_percent():
    def adjusted_covers(generator):
        plasticity, buckets, documents, positions = null_sample(generator)
        row = adjusted_contrast(
            plasticity, buckets, documents, positions, mini_batch_size=16, pairs=PAIR, boot=FAST
        ).iloc[0]
        return row["ratio_low"] <= 1 <= row["ratio_high"]

    def lag_covers(generator):
        plasticity, _, documents, positions = null_sample(generator)
        surprisal = np.exp(dependent_noise(generator, 20, 128))
        row = surprisal_correlation(plasticity, surprisal, documents, positions, lags=[0], boot=FAST).iloc[0]
        return row["pearson_log_low"] <= 0 <= row["pearson_log_high"]

    def level_covers(generator):
        # Few documents: blocks of tokens within them.
        noise = dependent_noise(generator, 4, 4096)
        document, _ = grid(4, 4096)
        buckets = runs_of_labels(generator, 4, 4096)
        row = bucket_contrast(np.exp(0.5 * noise)[:, None], buckets, document, pairs=PAIR, boot=FAST).iloc[0]
        return row["ratio_low"] <= 1 <= row["ratio_high"]

    for one in (adjusted_covers, lag_covers, level_covers):
        assert 0.92 <= coverage(600, one) <= 0.98, one.__name__


def test_planted_28_percent_is_recovered():
    generator = np.random.default_rng(0)
    plasticity, buckets, documents, positions = null_sample(generator, documents=24, tokens=512)
    plasticity[buckets == NOVELTY] *= 1.28
    options = {"mini_batch_size": 16, "pairs": PAIR}
    row = adjusted_contrast(plasticity, buckets, documents, positions, boot=FAST, **options).iloc[0]
    assert row["ratio_low"] < 1.28 < row["ratio_high"] and row["ratio_high"] - row["ratio_low"] < 0.15
    tested = permutation_test(plasticity, buckets, documents, positions, permutations=199, **options).iloc[0]
    assert tested["ratio"] == pytest.approx(row["ratio"], rel=1e-12)
    assert tested["p"] == 1 / 200 and tested["null_high"] < 1.1


def test_a_position_only_confound_is_null_after_adjustment_and_not_before():
    generator = np.random.default_rng(1)
    document, position = grid(12, 2048)
    novel = generator.random(len(position)) < 0.02 + 0.5 / np.sqrt(1 + position / 16)
    buckets = np.where(novel, NOVELTY, SYNTAX)
    trend = np.exp(-position / 300) + 0.3 / (1 + position % 16)
    plasticity = np.exp(trend + 0.3 * dependent_noise(generator, 12, 2048))[:, None]
    options = {"mini_batch_size": 16, "pairs": PAIR}
    raw = bucket_contrast(plasticity, buckets, document, pairs=PAIR, boot=FAST).iloc[0]
    adjusted = adjusted_contrast(plasticity, buckets, document, position, boot=FAST, **options).iloc[0]
    assert raw["ratio_low"] > 1.1
    assert adjusted["ratio_low"] < 1 < adjusted["ratio_high"]
    for scheme in ("shift", "shuffle"):
        tested = permutation_test(plasticity, buckets, document, position, permutations=99, scheme=scheme, **options)
        assert tested["p"].iloc[0] > 0.05


def test_permutations_of_a_null_seldom_call():
    generator = np.random.default_rng(2)
    called = []
    for seed in range(40):
        plasticity, buckets, documents, positions = null_sample(generator, documents=8)
        options = {"mini_batch_size": 16, "pairs": PAIR, "permutations": 39, "seed": seed}
        called.append(permutation_test(plasticity, buckets, documents, positions, **options)["p"].iloc[0] <= 0.05)
    assert np.mean(called) <= 0.15  # 5% of 40, and three standard errors


def test_an_effect_that_is_the_learning_rates_is_null_once_the_rate_is_held_fixed():
    generator = np.random.default_rng(3)
    plasticity, buckets, documents, positions = null_sample(generator, documents=16, tokens=256)
    rate = np.exp(0.5 * generator.normal(size=plasticity.shape)) * np.where(buckets == NOVELTY, 1.4, 1.0)[:, None]
    options = {"mini_batch_size": 16, "pairs": PAIR, "boot": FAST}
    row = covariate_contrast(plasticity * rate, rate, buckets, documents, positions, **options).iloc[0]
    assert row["ratio_low"] < 1 < row["ratio_high"] and row["slope"] == pytest.approx(1, abs=0.03)
    assert row["at_like_positions"] == pytest.approx(1.4, rel=0.05)
    # The oracle: least squares with one intercept per stratum, written out.
    strata = position_strata(positions, 16)
    design = np.column_stack([buckets == NOVELTY, np.log(rate[:, 0]), strata[:, None] == np.unique(strata)])
    solved = np.linalg.lstsq(design.astype(float), np.log((plasticity * rate)[:, 0]), rcond=None)[0]
    assert [np.log(row["ratio"]), row["slope"]] == pytest.approx(solved[:2].tolist(), abs=1e-8)


def test_a_planted_burn_in_of_2000_tokens_is_recovered():
    generator = np.random.default_rng(4)
    document, position = grid(12, 10_000)
    noise = np.exp(0.3 * generator.normal(size=len(position)) - 0.045)
    level = np.exp(0.2 * generator.normal(size=12))[document]
    values = level * (1 + np.exp(-position / 2000)) * noise
    fitted = fit_burn_in(values, document, position, mini_batch_size=16, boot=FAST)
    assert fitted.refusal is None and fitted.tau == pytest.approx(2000, rel=0.05)
    assert fitted.tau_low < 2000 < fitted.tau_high and fitted.half_life == pytest.approx(fitted.tau * np.log(2))
    assert fitted.relative == pytest.approx(2, rel=0.05) and fitted.count == 120_000 - 12 * (10_000 % 16)


@pytest.mark.parametrize(
    ("length", "shape", "reason"),
    [
        (4096, lambda p: 1 + np.exp(-p / 2000), "fewer than 4 times"),
        (4096, lambda p: np.ones(len(p)), "told from none|fewer than 4 times|rises"),
        (4096, lambda p: 2 - np.exp(-p / 200), "rises"),
        (64, lambda p: 1 + np.exp(-p / 10), "too few for a fit"),
    ],
)
def test_a_burn_in_that_cannot_be_seen_is_refused(length, shape, reason):
    generator = np.random.default_rng(5)
    document, position = grid(12, length)
    values = shape(position) * np.exp(0.2 * generator.normal(size=len(position)))
    fitted = fit_burn_in(values, document, position, mini_batch_size=16, boot=FAST)
    assert np.isnan(fitted.tau) and re.search(reason, fitted.refusal)


def test_a_planted_lagged_correlation_is_found_at_its_lag_only():
    generator = np.random.default_rng(6)
    document, position = grid(16, 600)
    surprisal = np.exp(generator.normal(size=len(position)))
    for lag in (-1, 0, 1):
        at = np.roll(np.log(surprisal), lag)
        plasticity = np.exp(0.35 * at + np.sqrt(1 - 0.35**2) * generator.normal(size=len(position)))[:, None]
        table = surprisal_correlation(plasticity, surprisal, document, position, boot=FAST)
        table = table[table["layer"] == 0].set_index("lag")
        assert table.loc[lag, "pearson_log"] == pytest.approx(0.35, abs=0.04)
        others = [other for other in (-1, 0, 1) if other != lag]
        assert (table.loc[others, "pearson_log"].abs() < 0.04).all()
