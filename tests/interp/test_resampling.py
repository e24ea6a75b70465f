import numpy as np
import pytest
from scipy.signal import lfilter

from interp.resampling import (
    Bootstrap,
    Resampler,
    aligned_blocks,
    block_bootstrap_ci,
    cell_sums,
    interval,
    make_blocks,
    share_interval,
)


def autoregressive(generator, shape, phi=0.9):
    """Noise of mean 0 in which neighbours are alike."""
    noise = generator.normal(size=(shape[0], shape[1] + 200))
    return lfilter([1], [1, -phi], noise, axis=1)[:, 200:]


def covers(estimate, truth):
    return estimate.low <= truth <= estimate.high


def test_token_blocks_cover_the_mean_of_correlated_tokens_where_single_tokens_do_not():
    generator = np.random.default_rng(0)
    series = autoregressive(generator, (150, 6000))
    documents = np.zeros(6000, dtype=int)
    blocks = [block_bootstrap_ci(x, documents, boot=Bootstrap(n_boot=300)) for x in series]
    one_token = Bootstrap(n_boot=100, block_length=1)
    single = [block_bootstrap_ci(x, documents, boot=one_token) for x in series[:40]]
    assert 0.88 <= np.mean([covers(e, 0) for e in blocks]) <= 0.99
    assert np.mean([covers(e, 0) for e in single]) < 0.6


@pytest.mark.parametrize("statistic", ["mean", "median", "geometric_mean"])
def test_document_blocks_cover_when_documents_differ(statistic):
    generator = np.random.default_rng(1)
    documents = np.repeat(np.arange(12), 40)
    hits = []
    for _ in range(200):
        level = generator.normal(size=12)[documents] + generator.normal(size=480)
        values, truth = (np.exp(level), 1.0) if statistic == "geometric_mean" else (level, 0.0)
        estimate = block_bootstrap_ci(values, documents, statistic=statistic, boot=Bootstrap(n_boot=300))
        hits.append(covers(estimate, truth))
    assert 0.9 <= np.mean(hits) <= 0.99


def test_the_result_says_what_was_resampled():
    values = np.ones(4000)
    few = block_bootstrap_ci(values, np.repeat([0, 1], 2000))
    assert (few.unit, few.count) == ("blocks of 125 tokens", 4000) and few.blocks == 32
    assert block_bootstrap_ci(np.ones(8000), np.zeros(8000, int)).unit == "blocks of 258 to 259 tokens"
    many = block_bootstrap_ci(values, np.arange(4000) // 200)
    assert (many.unit, many.blocks) == ("documents", 20)


def test_blocks_never_cross_documents_or_windows():
    documents = np.repeat([5, 2, 9], [300, 1000, 17])
    windows = np.arange(len(documents)) // 150
    plain = make_blocks(documents)
    for b in range(plain.count):
        assert len(set(documents[plain.index == b])) == 1
        assert np.ptp(np.flatnonzero(plain.index == b)) == (plain.index == b).sum() - 1
    windowed = make_blocks(documents, windows=windows)
    for b in range(windowed.count):
        assert len(set(zip(documents[windowed.index == b], windows[windowed.index == b], strict=True))) == 1
    drawn = Resampler(windowed, Bootstrap(n_boot=80))
    counts = cell_sums(np.ones(len(windows)), windows, windows.max() + 1, windowed)[1]
    blocks_per_window = np.array([(windowed.stratum == w).sum() for w in range(windows.max() + 1)])
    assert (drawn.sums((counts > 0).astype(float)) == blocks_per_window).all()


def test_means_and_medians_of_a_draw_are_those_of_the_tokens_drawn():
    generator = np.random.default_rng(2)
    values = generator.lognormal(size=6000)
    values[::7] = np.nan
    documents = np.arange(6000) // 300
    group = generator.integers(0, 2, size=6000)
    blocks = make_blocks(documents)
    draw = Resampler(blocks, Bootstrap(n_boot=80))
    times = draw.sums(np.eye(blocks.count)).astype(int)
    means, medians = draw.means(*cell_sums(values, group, 2, blocks)), draw.medians(values, group, 2)
    for r in range(20):
        for g in range(2):
            drawn = np.repeat(values[group == g], times[r][documents[group == g]])
            assert means[r, g] == pytest.approx(np.nanmean(drawn), rel=1e-12)
            assert medians[r, g] == pytest.approx(np.nanmedian(drawn), abs=0.01)


def test_nothing_finite_is_nan_with_count_zero_and_one_block_has_no_interval():
    empty = block_bootstrap_ci([np.nan, np.nan], [0, 1])
    assert empty.count == 0 and np.isnan([empty.value, empty.low, empty.high]).all()
    assert np.isnan(block_bootstrap_ci([], []).value)
    one = block_bootstrap_ci([1.0, 2.0], [0, 0])
    assert one.value == 1.5 and np.isnan([one.low, one.high]).all()


def test_infinite_and_missing_values_are_left_out():
    values = np.array([1.0, np.inf, 3.0, np.nan])
    assert block_bootstrap_ci(values, [0, 0, 1, 1]).value == 2.0
    assert block_bootstrap_ci([0.0, 4.0, 9.0], [0, 0, 0], statistic="geometric_mean").value == pytest.approx(6.0)


def test_intervals_of_few_blocks_are_wider_than_plain_percentiles():
    draws = np.random.default_rng(3).normal(size=(4000, 2))
    low, high = interval(draws, [5, 1000], 0.95)
    assert high[0] - low[0] > 1.3 * (high[1] - low[1])
    assert high[1] - low[1] == pytest.approx(2 * 1.96, rel=0.05)


def test_the_interval_of_a_share_is_wilsons_and_no_point_where_all_end_alike():
    low, high = share_interval(np.array([0, 9, 18]), 18, 0.95)
    square = 1.959964**2
    half = np.sqrt(square / (18 + square)) / 2
    assert low == pytest.approx([0, 0.5 - half, 18 / (18 + square)], abs=1e-6)
    assert high == pytest.approx([square / (18 + square), 0.5 + half, 1], abs=1e-6)
    assert np.isnan(share_interval(0, 0, 0.95)).all()


def test_the_seed_decides():
    values = np.random.default_rng(4).normal(size=2000)
    documents = np.arange(2000) // 100
    first, again, other = (block_bootstrap_ci(values, documents, boot=Bootstrap(seed=s)) for s in (1, 1, 2))
    assert first == again and first != other


def test_draws_must_reach_beyond_the_ends_of_the_interval():
    with pytest.raises(ValueError, match="n_boot must be at least 80 for intervals of 95%, got 79"):
        Bootstrap(n_boot=79)
    assert Bootstrap(n_boot=80).n_boot == 80 and Bootstrap(n_boot=8, confidence=0.5).n_boot == 8


def test_shared_confidence_has_draws_enough():
    shared = Bootstrap(n_boot=100).shared(6)
    assert shared.confidence == pytest.approx(1 - 0.05 / 6) and shared.n_boot == 2000
    assert Bootstrap(n_boot=100).shared(150).n_boot == 12000
    assert Bootstrap(n_boot=9000).shared(6).n_boot == 9000


def test_aligned_blocks_are_exchanged_at_the_same_place_only():
    documents = np.repeat([4, 7, 1], [300, 200, 260])
    windows = np.concatenate([np.arange(n) >= 100 for n in (300, 200, 260)]).astype(int)
    blocks = aligned_blocks(documents, windows)
    assert blocks.documents == 3 and "at the same place" in blocks.unit
    for stratum in np.unique(blocks.stratum):
        members = np.flatnonzero(blocks.stratum == stratum)
        homes = [set(zip(documents[blocks.index == m], windows[blocks.index == m], strict=True)) for m in members]
        assert len(members) == 3 and all(len(home) == 1 for home in homes)
        assert len({document for home in homes for document, _ in home}) == 3
    many = aligned_blocks(np.repeat(np.arange(12), 50), np.tile(np.arange(50) // 25, 12))
    assert (many.unit, many.count, many.stratum) == ("documents", 12, None)


@pytest.mark.parametrize(
    ("option", "value"), [("n_boot", 0), ("confidence", 1.0), ("min_documents", 1), ("block_length", 0)]
)
def test_wrong_options_are_refused(option, value):
    with pytest.raises(ValueError, match=option):
        Bootstrap(**{option: value})


def test_wrong_input_is_refused():
    with pytest.raises(ValueError, match="statistic"):
        block_bootstrap_ci([1.0], [0], statistic="mode")
    with pytest.raises(ValueError, match="documents"):
        block_bootstrap_ci([1.0], [0, 1])
