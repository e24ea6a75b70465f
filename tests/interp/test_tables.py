"""The tables hold what the tokens of a run say."""

import dataclasses

import numpy as np
import pandas as pd
import pytest

from interp.statistics import POOLED, Bootstrap
from interp.tables import (
    ALL_TOKENS,
    UNFROZEN,
    WORD_STARTS,
    bucket_tables,
    loss_columns,
    perplexity_tables,
    pooled_plasticity,
    run_tables,
    save_tables,
    surprisal_tables,
    time_tables,
)
from tests.interp.planted_run import FREEZING, planted_run

BOOT = Bootstrap(n_boot=100)


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("run"), tokens=500, answers=3)


def test_time_columns_are_means_over_whole_mini_batches(run):
    table = time_tables(run, max_columns=10, boot=BOOT).plasticity
    assert table.groupby("layer").size().tolist() == [8, 8]  # 500 tokens in stretches of 64
    assert ((table["stop"] - table["start"])[:7] % 16 == 0).all() and table["stop"].max() == 500
    inside = (run.tokens["position"] >= 64) & (run.tokens["position"] < 128)
    row = table[(table["layer"] == 1) & (table["start"] == 64)].iloc[0]
    assert row["plasticity"] == pytest.approx(run.plasticity[inside, 1].mean(), rel=1e-6)
    assert row["tokens"] == inside.sum() == 4 * 64 and row["documents"] == 4


@pytest.mark.parametrize("tokens", [2, 17, 5000])
def test_there_are_never_more_columns_than_asked_for(tmp_path, tokens):
    table = time_tables(planted_run(tmp_path, documents=1, tokens=tokens), max_columns=100, boot=BOOT).plasticity
    assert table["start"].nunique() <= 100 and table["tokens"].sum() == 2 * tokens


def test_histogram_counts_every_token_once(run):
    table = surprisal_tables(run, boot=BOOT).histogram
    assert table["tokens"].sum() == len(run.tokens) - 4  # no surprisal at the first token of four documents
    assert (table["surprisal_low"] < table["surprisal_high"]).all()


def test_lag_takes_the_surprisal_of_the_token_before(tmp_path):
    run = planted_run(tmp_path, surprisal_power=0.5, noise=0.05)
    shifted = run.tokens.groupby("document")["loss"].shift(-1)
    later = dataclasses.replace(run, tokens=run.tokens.assign(loss=shifted))
    tables = surprisal_tables(later, lag=1, boot=BOOT)
    pooled = tables.correlation[tables.correlation["layer"] == POOLED].set_index("lag")["pearson_log"]
    assert pooled[1] > 0.9 and abs(pooled[0]) < 0.1
    assert tables.trend["plasticity"].iloc[-1] > 1.5 * tables.trend["plasticity"].iloc[0]


def test_contrasts_carry_the_ratio_at_like_positions(run):
    table = bucket_tables(run, boot=BOOT).contrasts
    assert len(table) == 2 * 3 * 6 and np.isfinite(table[["adjusted", "adjusted_low", "adjusted_high"]]).all(axis=None)


def test_word_starts_leave_out_the_later_tokens_of_words(run):
    starts = run.tokens["is_word_start"].copy()
    starts[run.tokens["position"] % 2 == 1] = False
    half = dataclasses.replace(run, tokens=run.tokens.assign(is_word_start=starts))
    tables = bucket_tables(half, boot=BOOT)
    means = tables.means[tables.means["layer"] == 1].set_index(["tokens", "bucket"])
    novelty = run.tokens["bucket"] == 2
    assert means.loc[(ALL_TOKENS, "NOVELTY"), "count"] == novelty.sum()
    assert means.loc[(WORD_STARTS, "NOVELTY"), "count"] == (novelty & starts).sum()
    assert means.loc[(WORD_STARTS, "NOVELTY"), "mean"] == pytest.approx(run.plasticity[novelty & starts, 1].mean())
    outside = (run.tokens["word_id"] < 0).sum()
    assert means.loc[(WORD_STARTS, "OTHER"), "count"] == means.loc[(ALL_TOKENS, "OTHER"), "count"] == outside
    assert set(tables.contrasts["tokens"]) == {ALL_TOKENS, WORD_STARTS}


def test_pairs_are_told_apart_at_like_positions_only_where_plasticity_knows_the_bucket(tmp_path):
    null = planted_run(tmp_path / "null", documents=12, position_only=True)
    table = bucket_tables(null, boot=BOOT).contrasts
    assert table["apart"].any() and not table["adjusted_apart"].any()
    told = planted_run(tmp_path / "told", documents=12, position_only=True, bucket_factor=(1, 1, 1.2, 1))
    table = bucket_tables(told, boot=BOOT).contrasts
    assert table.loc[table["bucket_a"] == "NOVELTY", "adjusted_apart"].all()


def test_every_table_with_intervals_says_how_they_were_made(run):
    for name, frame in run_tables(run, boot=Bootstrap(n_boot=100, confidence=0.9)).frames().items():
        if any(column.endswith("_low") for column in frame) and name != "surprisal_histogram":
            assert (frame["confidence"] == 0.9).all() and frame["unit"].notna().all(), name


def test_freezing_costs_what_was_planted(run):
    tables = perplexity_tables(run, boot=BOOT)
    effects = tables.effects.set_index("configuration")
    assert list(effects.index) == [UNFROZEN, "all", "first"]
    assert effects["delta"].tolist() == pytest.approx([0, 0.5, 0.25], abs=0.005)
    last = tables.curve.groupby("configuration")["cumulative"].last()
    assert last["all"] / last[UNFROZEN] == pytest.approx(np.exp(0.5), rel=0.01)


def test_answers_are_tabulated_only_where_there_are_some(run, tmp_path):
    answers = perplexity_tables(run, boot=BOOT).answers
    assert answers["count"].tolist() == [12, 12, 12]
    assert perplexity_tables(planted_run(tmp_path), boot=BOOT).answers is None


def test_losses_are_compared_on_tokens_that_have_all_of_them(run):
    frozen = run.loss_frozen.copy()
    frozen[7, 1] = np.nan
    losses = loss_columns(dataclasses.replace(run, loss_frozen=frozen))
    assert all(np.isnan(loss[7]) for loss in losses.values())


def test_a_run_without_losses_is_refused(run):
    with pytest.raises(ValueError, match="no token has a finite loss"):
        loss_columns(dataclasses.replace(run, loss_frozen=np.full_like(run.loss_frozen, np.nan)))


def test_a_configuration_with_the_name_of_the_baseline_is_refused(run):
    named = dataclasses.replace(run, freezing=[FREEZING[0], {"name": UNFROZEN, "layers": [0]}])
    with pytest.raises(ValueError, match="may be called 'nothing frozen'"):
        loss_columns(named)


def test_pooling_is_the_root_of_the_sum_of_squares():
    assert pooled_plasticity(np.array([[3.0, 4.0], [0.0, 2.0]], np.float32)).tolist() == [5.0, 2.0]


def test_saved_tables_read_back_with_pooled_spelt_out(run, tmp_path):
    frames = run_tables(run, boot=BOOT).frames()
    paths = save_tables(frames, tmp_path)
    assert sorted(path.stem for path in paths) == sorted(frames) and "answer_effects" in frames
    read = pd.read_csv(tmp_path / "bucket_means.csv")
    assert set(read["layer"].astype(str)) == {"0", "1", "pooled"}
    np.testing.assert_allclose(read["mean"], frames["bucket_means"]["mean"], rtol=1e-12)


@pytest.mark.parametrize("tokens", [2, 3, 20])
def test_a_run_of_few_tokens_has_tables_without_intervals(tmp_path, tokens):
    run = planted_run(tmp_path, documents=1, tokens=tokens, layers=1, freezing=[])
    tables = run_tables(run, boot=BOOT)
    assert np.isnan(tables.time.decay["ratio"]).all()
    assert tables.perplexity.effects["configuration"].tolist() == [UNFROZEN]
