"""The three metrics load through `evaluate` and agree with the statistics they stand for."""

from pathlib import Path

import evaluate
import numpy as np
import pytest

from interp.bucketing import Bucket
from interp.resampling import Bootstrap
from interp.statistics import adjusted_contrast

METRICS = Path(__file__).parents[2] / "interp" / "metrics"


@pytest.fixture
def load(tmp_path):
    """Loads a metric from the repository; its data go into a folder of the test."""
    return lambda name: evaluate.load(str(METRICS / name), cache_dir=str(tmp_path / name))


def test_plasticity_buckets_are_those_of_the_statistics(load):
    rng = np.random.default_rng(0)
    buckets = [rng.integers(0, 4, 200) for _ in range(12)]
    plasticity = [np.exp(0.3 * rng.normal(size=200)) * np.where(b == Bucket.NOVELTY, 1.5, 1.0) for b in buckets]
    metric = load("plasticity_buckets")
    found = metric.compute(predictions=plasticity, references=buckets, n_boot=200)
    assert found["unit"] == "documents" and found["documents"] == 12
    assert sum(found[b.name]["count"] for b in Bucket) == 2400 and "ratio" not in found["SYNTAX"]
    assert found["NOVELTY"]["ratio_low"] < 1.5 < found["NOVELTY"]["ratio_high"]
    expected = adjusted_contrast(
        np.concatenate(plasticity).astype(np.float32)[:, None],
        np.concatenate(buckets),
        np.repeat(np.arange(12), 200),
        np.tile(np.arange(200), 12),
        mini_batch_size=16,
        pairs=[(Bucket.NOVELTY, Bucket.SYNTAX)],
        boot=Bootstrap(n_boot=200),
    ).iloc[0]
    assert found["NOVELTY"]["ratio"] == pytest.approx(expected["ratio"])
    assert found["NOVELTY"]["ratio_low"] == pytest.approx(expected["ratio_low"])
    with pytest.raises(ValueError, match="as long as each other"):
        metric.compute(predictions=[[1.0, 2.0]], references=[[0]])


def test_perplexity_by_position_serves_losses_of_any_model(load):
    losses = np.tile(np.linspace(4, 2, 512), (12, 1))
    losses[:, 0] = np.nan
    found = load("perplexity_by_position").compute(predictions=losses.tolist(), window=128, n_boot=100)
    assert found["position"] == [128, 256, 384, 512] and found["count"] == [12 * 127, *[12 * 128] * 3]
    assert found["windowed"] == pytest.approx([np.exp(np.nanmean(losses[0, i : i + 128])) for i in range(0, 512, 128)])
    assert found["perplexity"] == found["cumulative"][-1] == pytest.approx(np.exp(np.nanmean(losses[0])))
    with pytest.raises(ValueError, match="0 nats or more"):
        load("perplexity_by_position").compute(predictions=[[0.5, -1.0]])


def test_needle_accuracy_counts_whole_values_and_characters(load):
    metric = load("needle_accuracy")
    found = metric.compute(
        predictions=["9f8e and more", "9f8", "0000"], references=["9f8e", "9f8e", "9f8e"], n_boot=100
    )
    assert found["exact"] == pytest.approx(1 / 3) and found["characters"] == pytest.approx((1 + 0.75 + 0) / 3)
    assert found["exact_low"] <= 1 / 3 <= found["exact_high"] and found["documents"] == 3
    # Two answers out of two say little about others.
    found = metric.compute(predictions=["9f8e", "0a"], references=["9f8e", "0a"], n_boot=100)
    assert found["exact_high"] == 1 and found["exact_low"] == pytest.approx(2 / (2 + 1.959964**2))
    with pytest.raises(ValueError, match="references must be values"):
        metric.compute(predictions=["a"], references=[""])
