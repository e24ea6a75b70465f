import time

import numpy as np
import pandas as pd
import pytest
from scipy import stats

from interp.bucketing import Bucket
from interp.statistics import (
    POOLED,
    Bootstrap,
    adjusted_contrast,
    bucket_contrast,
    bucket_stats,
    position_strata,
)

SYNTAX, RETRIEVAL, NOVELTY, OTHER = Bucket
FAST = Bootstrap(n_boot=300)


def sample(generator, documents=12, tokens=400, layers=2):
    """Random buckets and log-normal plasticity with a level of its own in every document."""
    document = np.repeat(np.arange(documents), tokens)
    bucket = generator.choice(4, p=[0.4, 0.3, 0.1, 0.2], size=len(document))
    level = generator.normal(size=documents)[document] * 0.3
    plasticity = np.exp(level[:, None] + generator.normal(size=(len(document), layers)) * 0.5)
    return plasticity, bucket, document


def confounded(generator, documents=12, tokens=2048, k=16):
    """Novelty and plasticity both fall over the document and within the mini-batch; neither knows of the other."""
    document, position = np.repeat(np.arange(documents), tokens), np.tile(np.arange(tokens), documents)
    novel = generator.random(len(position)) < 0.02 + 0.5 / np.sqrt(1 + position / 16)
    bucket = np.where(novel, NOVELTY, generator.choice([SYNTAX, RETRIEVAL], size=len(position)))
    trend = np.exp(-position / 300) + 0.3 / (1 + position % k)
    plasticity = np.exp(trend + generator.normal(size=len(position)) * 0.3)[:, None]
    return plasticity, bucket, document, position


def row_of(table, **where):
    chosen = table.loc[np.logical_and.reduce([table[k] == v for k, v in where.items()])]
    assert len(chosen) == 1
    return chosen.iloc[0]


def test_levels_are_those_of_the_tokens():
    plasticity, bucket, document = sample(np.random.default_rng(0))
    table = bucket_stats(plasticity, bucket, document, layers=[3, 7], boot=FAST)
    assert table["layer"].tolist() == [3] * 4 + [7] * 4 + [POOLED] * 4
    pooled = np.sqrt((plasticity**2).sum(1))
    for layer, values in ((3, plasticity[:, 0]), (7, plasticity[:, 1]), (POOLED, pooled)):
        syntax = stats.gmean(values[bucket == SYNTAX])
        for b in Bucket:
            row, own = row_of(table, layer=layer, bucket=b.name), values[bucket == b]
            expected = [len(own), own.mean(), np.median(own), stats.gmean(own) / syntax]
            assert row[["count", "mean", "median", "ratio"]].tolist() == pytest.approx(expected, rel=1e-12)
            for name in ("mean", "median", "ratio"):
                assert row[f"{name}_low"] <= row[name] <= row[f"{name}_high"]
    assert set(table["unit"]) == {"documents"} and set(table["blocks"]) == {12}
    assert set(table["documents"]) == {12} and set(table["confidence"]) == {0.95}
    assert table.select_dtypes("number").shape[1] == table.shape[1] - 3


def test_an_empty_bucket_is_nan_with_count_zero_and_leaves_the_others_alone():
    plasticity, bucket, document = sample(np.random.default_rng(1))
    bucket[bucket == NOVELTY] = SYNTAX
    table = bucket_stats(plasticity, bucket, document, boot=FAST)
    empty = row_of(table, layer=0, bucket="NOVELTY")
    assert empty["count"] == 0 and empty["blocks"] == 0
    assert empty.filter(regex="mean|median|ratio").isna().all()
    assert row_of(table, layer=0, bucket="RETRIEVAL").notna().all()
    contrast = row_of(
        bucket_contrast(plasticity, bucket, document, pairs=[(NOVELTY, SYNTAX)], layers=[0, 1], boot=FAST), layer=0
    )
    assert contrast["count_a"] == 0
    assert contrast.filter(regex="ratio|difference|hedges|cliffs").isna().all()


def test_without_syntax_the_largest_bucket_is_the_reference():
    plasticity, bucket, document = sample(np.random.default_rng(1))
    assert set(bucket_stats(plasticity, bucket, document, boot=FAST)["reference"]) == {"SYNTAX"}
    bucket[bucket == SYNTAX] = OTHER
    table = bucket_stats(plasticity, bucket, document, boot=FAST)
    assert set(table["reference"]) == {"OTHER"}
    assert (table.loc[table["bucket"] == "OTHER", "ratio"] == 1).all()
    assert np.isfinite(table.loc[table["bucket"] == "NOVELTY", "ratio_low"]).all()


def test_a_frozen_layer_has_level_zero_and_no_ratio():
    plasticity, bucket, document = sample(np.random.default_rng(2))
    plasticity[:, 1] = 0
    row = row_of(bucket_stats(plasticity, bucket, document, boot=FAST), layer=1, bucket="NOVELTY")
    assert row["mean"] == row["median"] == row["mean_high"] == 0 and np.isnan(row["ratio"])


def test_missing_values_are_left_out():
    plasticity, bucket, document = sample(np.random.default_rng(3))
    holes = plasticity.copy()
    holes[::5] = np.nan
    keep = np.arange(len(bucket)) % 5 != 0
    with_holes = bucket_stats(holes, bucket, document, boot=FAST)
    without = bucket_stats(plasticity[keep], bucket[keep], document[keep], boot=FAST)
    pd.testing.assert_frame_equal(with_holes, without, rtol=1e-9)


def test_contrasts_cover_all_pairs_and_agree_with_scipy():
    plasticity, bucket, document = sample(np.random.default_rng(4), layers=1)
    plasticity[bucket == NOVELTY] *= 1.3
    table = bucket_contrast(plasticity, bucket, document, boot=FAST)
    assert len(table) == 2 * 6
    for _, row in table[table["layer"] == 0].iterrows():
        a, b = (plasticity[bucket == Bucket[row[f"bucket_{side}"]], 0] for side in "ab")
        assert (row["count_a"], row["count_b"]) == (len(a), len(b))
        assert row["ratio"] == pytest.approx(stats.gmean(a) / stats.gmean(b))
        assert row["difference"] == pytest.approx(a.mean() - b.mean())
        u = stats.mannwhitneyu(a, b).statistic
        assert row["cliffs_delta"] == pytest.approx(2 * u / (len(a) * len(b)) - 1)
        spread = np.sqrt((a.var(ddof=1) * (len(a) - 1) + b.var(ddof=1) * (len(b) - 1)) / (len(a) + len(b) - 2))
        assert row["hedges_g"] == pytest.approx((a.mean() - b.mean()) / spread, rel=1e-3)


def test_intervals_cover_a_planted_ratio():
    generator = np.random.default_rng(5)
    hits = []
    for _ in range(120):
        plasticity, bucket, document = sample(generator, layers=1)
        plasticity[bucket == NOVELTY] *= 1.25
        row = bucket_contrast(plasticity, bucket, document, pairs=[(NOVELTY, RETRIEVAL)], boot=FAST).iloc[0]
        hits.append(row["ratio_low"] <= 1.25 <= row["ratio_high"])
    assert 0.88 <= np.mean(hits) <= 0.995


def test_adjusting_for_position_removes_what_position_alone_makes():
    generator = np.random.default_rng(6)
    plasticity, bucket, document, position = confounded(generator)
    options = {"mini_batch_size": 16, "pairs": [(NOVELTY, RETRIEVAL)], "boot": FAST}
    null = adjusted_contrast(plasticity, bucket, document, position, **options).iloc[0]
    assert null["raw_ratio"] > 1.1
    assert null["ratio_low"] < 1 < null["ratio_high"] and abs(null["ratio"] - 1) < 0.02
    plasticity[bucket == NOVELTY] *= 1.2
    planted = adjusted_contrast(plasticity, bucket, document, position, **options).iloc[0]
    assert planted["ratio_low"] < 1.2 < planted["ratio_high"] and planted["ratio_low"] > 1.1


def test_shuffled_labels_give_a_ratio_of_one():
    generator = np.random.default_rng(7)
    plasticity, bucket, document, position = confounded(generator)
    shuffled = generator.permutation(bucket)
    row = adjusted_contrast(
        plasticity, shuffled, document, position, mini_batch_size=16, pairs=[(NOVELTY, SYNTAX)], boot=FAST
    ).iloc[0]
    assert row["ratio_low"] < 1 < row["ratio_high"]


def test_the_adjusted_ratio_is_least_squares_with_one_intercept_per_stratum():
    generator = np.random.default_rng(8)
    plasticity, bucket, document, position = confounded(generator, documents=3, tokens=256)
    row = adjusted_contrast(
        plasticity, bucket, document, position, mini_batch_size=16, pairs=[(NOVELTY, SYNTAX)], boot=FAST
    ).iloc[0]
    two = (bucket == NOVELTY) | (bucket == SYNTAX)
    strata = position_strata(position, 16)[two]
    design = np.column_stack([bucket[two] == NOVELTY, strata[:, None] == np.unique(strata)]).astype(float)
    slope = np.linalg.lstsq(design, np.log(plasticity[two, 0]), rcond=None)[0][0]
    assert np.log(row["ratio"]) == pytest.approx(slope, abs=1e-9)
    assert row["unit"].startswith("blocks of")


def test_buckets_without_a_shared_stratum_have_no_adjusted_ratio():
    position = np.arange(64)
    bucket = np.where(position < 24, NOVELTY, SYNTAX)
    table = adjusted_contrast(np.ones((64, 1)), bucket, np.zeros(64, int), position, mini_batch_size=8, boot=FAST)
    row = row_of(table, layer=0, bucket_a="NOVELTY", bucket_b="SYNTAX")
    assert row["strata"] == row["count_a"] == 0 and np.isnan(row["ratio"]) and row["raw_ratio"] == 1


def test_strata_separate_places_in_the_mini_batch_and_halve_octaves():
    strata = position_strata(np.arange(64), 8)
    assert len(set(strata[:8])) == 8
    assert (strata % 8 == np.arange(64) % 8).all()
    assert (np.diff(strata // 8) >= 0).all() and strata[0] // 8 == 0


def test_no_tokens_at_all_give_empty_cells():
    none = np.zeros(0, dtype=int)
    table = bucket_stats(np.zeros((0, 2)), none, none, boot=FAST)
    assert (table["count"] == 0).all() and table["mean"].isna().all()
    assert (bucket_contrast(np.zeros((0, 2)), none, none, boot=FAST)["count_a"] == 0).all()
    assert adjusted_contrast(np.zeros((0, 2)), none, none, none, mini_batch_size=4, boot=FAST)["ratio"].isna().all()


def test_wrong_input_is_refused():
    plasticity, bucket, document = sample(np.random.default_rng(9), tokens=20)
    with pytest.raises(ValueError, match="plasticity"):
        bucket_stats(plasticity[:, 0], bucket, document)
    with pytest.raises(ValueError, match="layers"):
        bucket_stats(plasticity, bucket, document, layers=[0])
    with pytest.raises(ValueError, match="documents"):
        bucket_stats(plasticity, bucket, document[1:])
    with pytest.raises(ValueError, match="buckets"):
        bucket_stats(plasticity, bucket + 1, document)
    with pytest.raises(TypeError, match="buckets"):
        bucket_stats(plasticity, bucket * 1.0, document)
    with pytest.raises(ValueError, match="pairs"):
        bucket_contrast(plasticity, bucket, document, pairs=[(1, 1)])
    with pytest.raises(ValueError, match="mini_batch_size"):
        adjusted_contrast(plasticity, bucket, document, document, mini_batch_size=0)


def test_two_thousand_resamples_of_100k_tokens_take_seconds():
    plasticity, bucket, document = sample(np.random.default_rng(10), documents=4, tokens=25_000, layers=3)
    began = time.process_time()
    table = bucket_stats(plasticity, bucket, document)
    bucket_contrast(plasticity, bucket, document)
    assert time.process_time() - began < 6
    assert set(table["blocks"]) == {392}
