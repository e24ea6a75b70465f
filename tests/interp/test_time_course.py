import numpy as np
import pytest
from scipy import stats

from interp.resampling import Bootstrap
from interp.time_course import freezing_effects, perplexity_by_index, surprisal_correlation, temporal_decay

FAST = Bootstrap(n_boot=300)


def grid(documents, tokens):
    return np.repeat(np.arange(documents), tokens), np.tile(np.arange(tokens), documents)


def test_decay_recovers_a_planted_burn_in():
    generator = np.random.default_rng(0)
    for documents, unit in ((12, "documents"), (3, "blocks of 16 to 17 tokens at the same place in their document")):
        document, position = grid(documents, 1000)
        level = np.where(position < 100, 2.0, 1.0)
        plasticity = (level * generator.lognormal(sigma=0.2, size=len(position)))[:, None]
        table = temporal_decay(plasticity, document, position, n=100, layers=[4], boot=FAST)
        assert table["layer"].tolist() == [4, -1] * 2
        for _, row in table.iterrows():
            assert row["ratio_low"] < 2 < row["ratio_high"] and row["ratio_high"] - row["ratio_low"] < 0.3
            assert row["ratio"] == pytest.approx(row["mean_first"] / row["mean_reference"])
        last, steady = table.iloc[0], table.iloc[2]
        assert (last["comparison"], last["tokens_first"], last["tokens_reference"]) == (
            "first/last",
            100 * documents,
            100 * documents,
        )
        assert (steady["comparison"], steady["tokens_reference"]) == ("first/steady", 500 * documents)
        assert last["unit"] == unit


@pytest.mark.parametrize("documents", [2, 9])
def test_a_burst_at_the_start_is_no_noise_with_few_documents(documents):
    generator = np.random.default_rng(0)
    document, position = grid(documents, 2048)
    plasticity = (np.where(position < 16, 20.0, 1.0) * generator.lognormal(0, 0.2, len(position)))[:, None]
    row = temporal_decay(plasticity, document, position, boot=FAST).iloc[0]
    assert row["ratio"] == pytest.approx(4, rel=0.1)  # (16 * 20 + 84) / 100
    assert row["ratio_low"] > 3 and row["ratio_high"] < 5


def test_one_document_has_a_decay_without_interval():
    document, position = grid(1, 1000)
    row = temporal_decay(np.where(position < 100, 2.0, 1.0)[:, None], document, position, boot=FAST).iloc[0]
    assert row["ratio"] == 2 and np.isnan([row["ratio_low"], row["ratio_high"]]).all()


def test_documents_too_short_for_both_windows_are_left_out():
    document = np.repeat([0, 1], [30, 199])
    position = np.concatenate([np.arange(30), np.arange(199)])
    plasticity = np.ones((len(document), 1))
    some = temporal_decay(plasticity, document, position, n=50, boot=FAST)
    assert (some["documents"] == 1).all() and (some["ratio"] == 1).all()
    none = temporal_decay(plasticity, document, position, n=100, boot=FAST)
    assert (none["documents"] == 0).all() and (none["tokens_first"] == 0).all() and none["ratio"].isna().all()


def test_the_lag_of_a_planted_tie_is_found():
    generator = np.random.default_rng(1)
    document, position = grid(12, 300)
    surprisal = generator.exponential(size=len(position)) + 0.01
    before = np.where(position > 0, np.roll(surprisal, 1), np.nan)
    plasticity = (before**0.5 * generator.lognormal(sigma=0.3, size=len(position)))[:, None]
    table = surprisal_correlation(plasticity, surprisal, document, position, lags=(-1, 0, 1, 2), boot=FAST)
    table = table[table["layer"] == 0].set_index("lag")
    assert table.loc[1, "spearman_low"] > 0.5 and table.loc[1, "pearson_log_low"] > 0.5
    for lag in (-1, 0, 2):
        assert table.loc[lag, "spearman_low"] < 0 < table.loc[lag, "spearman_high"]
    assert table["count"].tolist() == [12 * 298, 12 * 299, 12 * 299, 12 * 298]


def test_correlations_agree_with_scipy_and_partial_ones_with_residuals():
    generator = np.random.default_rng(2)
    document, position = grid(3, 500)
    surprisal = generator.exponential(size=1500)
    surprisal[position == 0] = np.nan
    strata = position // 50
    plasticity = np.exp(strata * 0.5 + generator.normal(size=1500) + np.nan_to_num(surprisal))[:, None]
    row = surprisal_correlation(plasticity, surprisal, document, position, lags=[0], strata=strata, boot=FAST).iloc[0]
    keep = np.isfinite(surprisal)
    x, y = np.log(plasticity[keep, 0]), np.log(surprisal[keep])
    assert row["count"] == keep.sum()
    assert row["pearson_log"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert row["spearman"] == pytest.approx(stats.spearmanr(x, y).statistic)
    dummies = (strata[keep][:, None] == np.unique(strata)).astype(float)
    x, y = (v - dummies @ np.linalg.lstsq(dummies, v, rcond=None)[0] for v in (x, y))
    assert row["partial"] == pytest.approx(stats.pearsonr(x, y).statistic)
    assert row["partial_low"] < row["partial"] < row["partial_high"]


def test_correlation_intervals_cover():
    generator = np.random.default_rng(3)
    document, position = grid(12, 60)
    rho, hits = 0.4, []
    for _ in range(100):
        x, y = generator.multivariate_normal([0, 0], [[1, rho], [rho, 1]], size=len(position)).T
        table = surprisal_correlation(np.exp(x)[:, None], np.exp(y), document, position, lags=[0], boot=FAST)
        hits.append(table.loc[0, "pearson_log_low"] <= rho <= table.loc[0, "pearson_log_high"])
    assert 0.88 <= np.mean(hits) <= 0.995


def test_selected_tokens_keep_their_neighbours():
    document, position = grid(1, 40)
    surprisal = np.arange(1.0, 41.0)
    plasticity = np.where(position % 2 == 0, np.roll(surprisal, 1), 1.0)[:, None]
    table = surprisal_correlation(
        plasticity, surprisal, document, position, lags=[1], select=position % 2 == 0, boot=FAST
    )
    assert table.loc[0, "spearman"] == pytest.approx(1) and table.loc[0, "count"] == 19


def test_a_constant_or_frozen_layer_has_no_correlation():
    document, position = grid(2, 50)
    surprisal = np.random.default_rng(4).exponential(size=100)
    plasticity = np.column_stack([np.zeros(100), np.full(100, 3.7)])
    strata = position // 7
    table = surprisal_correlation(plasticity, surprisal, document, position, strata=strata, boot=FAST)
    assert table.filter(regex="pearson|spearman|partial").isna().all(axis=None)
    assert (table["count"] > 0).all()


def test_perplexity_is_that_of_the_tokens_read():
    generator = np.random.default_rng(5)
    document, position = grid(12, 100)
    loss = generator.exponential(size=1200)
    loss[position == 0] = np.nan
    table = perplexity_by_index({"none": loss, "all": loss + 0.5}, document, position, window=32, boot=FAST)
    assert table["position"].tolist() == [32, 64, 96, 100] * 2
    for _, row in table[table["configuration"] == "none"].iterrows():
        end = row["position"]
        start = (end - 1) // 32 * 32
        assert row["cumulative"] == pytest.approx(np.exp(np.nanmean(loss[position < end])))
        inside = (position >= start) & (position < end)
        assert row["windowed"] == pytest.approx(np.exp(np.nanmean(loss[inside])))
        assert row["count"] == np.isfinite(loss[inside]).sum()
        assert row["cumulative_low"] < row["cumulative"] < row["cumulative_high"]
        assert row["windowed_low"] < row["windowed"] < row["windowed_high"]
    both = table.pivot(index="position", columns="configuration", values=["cumulative", "cumulative_low"])
    for name in ("cumulative", "cumulative_low"):
        assert (both[name]["all"] / both[name]["none"]).tolist() == pytest.approx([np.exp(0.5)] * 4)


def test_perplexity_of_one_document_still_has_intervals():
    document, position = grid(1, 1024)
    loss = np.random.default_rng(6).exponential(size=1024)
    table = perplexity_by_index({"none": loss}, document, position, window=256, boot=FAST)
    assert table["unit"].tolist() == ["blocks of 32 tokens"] * 4 and (table["blocks"] == 8).all()
    assert table.filter(regex="low|high").notna().all(axis=None)
    width = table["cumulative_high"] - table["cumulative_low"]
    assert width.iloc[-1] < 0.7 * width.iloc[0]


def test_a_window_of_one_stretch_has_no_interval_nor_what_holds_it():
    losses = np.random.default_rng(0).gamma(2.0, size=64)
    table = perplexity_by_index({"model": losses}, np.zeros(64, int), np.arange(64), window=16, boot=FAST)
    for name in ("windowed", "cumulative"):
        assert table[name].notna().all() and table[f"{name}_low"].isna().all() and table[f"{name}_high"].isna().all()


def test_windows_that_no_document_reaches_are_nan():
    document, position = grid(1, 10)
    table = perplexity_by_index({"none": np.ones(10)}, document, position + 100, window=64, boot=FAST)
    first = table.iloc[0]
    assert first["count"] == 0 and np.isnan(first["cumulative"]) and np.isnan(first["windowed"])


def test_freezing_is_compared_token_by_token():
    generator = np.random.default_rng(7)
    document, _ = grid(12, 200)
    loss = generator.exponential(size=2400) + generator.normal(size=12)[document]
    loss[::200] = np.nan
    frozen = loss + 0.05 + generator.normal(size=2400) * 0.01
    table = freezing_effects({"none": loss, "all": frozen}, document, baseline="none", boot=FAST)
    base, other = table.iloc[0], table.iloc[1]
    assert base["delta"] == base["delta_low"] == base["delta_high"] == 0
    assert base["mean_loss"] == pytest.approx(np.nanmean(loss))
    assert base["perplexity"] == pytest.approx(np.exp(np.nanmean(loss)))
    assert other["delta_low"] < 0.05 < other["delta_high"] and other["delta_high"] - other["delta_low"] < 0.01
    assert other["count"] == 2400 - 12


def test_wrong_input_is_refused():
    document, position = grid(2, 10)
    loss, plasticity = np.ones(20), np.ones((20, 1))
    with pytest.raises(ValueError, match="baseline"):
        freezing_effects({"none": loss}, document, baseline="full")
    with pytest.raises(ValueError, match="window"):
        perplexity_by_index({"none": loss}, document, position, window=0)
    with pytest.raises(ValueError, match="loss"):
        perplexity_by_index({"none": loss[1:]}, document, position)
    with pytest.raises(ValueError, match="n must"):
        temporal_decay(plasticity, document, position, n=0)
    with pytest.raises(ValueError, match="surprisal"):
        surprisal_correlation(plasticity, loss[1:], document, position)
    with pytest.raises(TypeError, match="positions"):
        surprisal_correlation(plasticity, loss, document, position * 1.0)
