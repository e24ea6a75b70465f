"""Captions follow the data: planted effects in either direction, and none."""

import pytest

from interp.captions import (
    bucket_caption,
    format_number,
    freezing_label,
    heatmap_caption,
    perplexity_caption,
    surprisal_caption,
)
from interp.statistics import Bootstrap
from interp.tables import bucket_tables, perplexity_tables, surprisal_tables, time_tables
from tests.interp.planted_run import planted_run

BOOT = Bootstrap(n_boot=200)


@pytest.fixture
def planted(tmp_path):
    return lambda **effects: planted_run(tmp_path / "run", **{"tokens": 400, **effects})


@pytest.mark.parametrize(
    ("factor", "begin"),
    [
        ((1, 1, 1.5, 1), "NOVELTY writes most"),
        ((1, 1.5, 1, 1), "RETRIEVAL writes most"),
        ((1.5, 1, 1, 1), "SYNTAX writes most"),
        ((1, 1, 1, 1), "No two buckets can be told apart"),
        ((0.5, 1, 1, 0.5), "cannot be told apart"),
    ],
)
def test_the_bucket_caption_names_the_planted_bucket(planted, factor, begin):
    caption = bucket_caption(bucket_tables(planted(bucket_factor=factor), boot=BOOT))
    assert begin in caption.title
    assert ("No two" in begin) == ("No two" in caption.text)


def test_a_difference_that_is_only_position_is_said_to_be_so(planted):
    run = planted(early_factor=3.0, noise=0.1)
    early = run.tokens["position"] < 100
    run.tokens.loc[early & (run.tokens["bucket"] == 1), "bucket"] = 2  # new words come early
    text = bucket_caption(bucket_tables(run, boot=BOOT)).text
    sentence = next(part for part in text.split(". ") if part.startswith("NOVELTY") and "times SYNTAX" in part)
    assert "at like positions, where no difference is not excluded" in sentence


@pytest.mark.parametrize(
    ("power", "words"),
    [(0.5, "more surprising tokens write more"), (-0.5, "write less"), (0.0, "does not exclude no relation")],
)
def test_the_surprisal_caption_follows_the_sign(planted, power, words):
    caption = surprisal_caption(surprisal_tables(planted(surprisal_power=power), boot=BOOT))
    assert words in caption.text
    assert "(lag 0)" in caption.title and "r = " in caption.title and "[" in caption.title


def test_the_surprisal_caption_says_which_token_is_meant(planted):
    caption = surprisal_caption(surprisal_tables(planted(), lag=1, boot=BOOT))
    assert "Surprisal of token t-1 against plasticity of token t" in caption.title


@pytest.mark.parametrize(
    ("early", "words"), [(2.0, "it falls"), (0.5, "it rises"), (1.0, "does not exclude no change")]
)
def test_the_heat_map_caption_follows_the_decay(planted, early, words):
    caption = heatmap_caption(time_tables(planted(early_factor=early), boot=BOOT))
    assert words in caption.text
    assert "largest in layer 0" in caption.title and "smallest in layer 1" in caption.title


def test_the_heat_map_caption_names_silent_layers_and_short_documents(planted):
    caption = heatmap_caption(time_tables(planted(silent_layers=[1], tokens=150), boot=BOOT))
    assert caption.title.startswith("Plasticity of layer 0")
    assert "Nothing is written in layer 1." in caption.text and "too short" in caption.text
    assert heatmap_caption(time_tables(planted(silent_layers=[0, 1]), boot=BOOT)).title.startswith("No layer writes")


@pytest.mark.parametrize(
    ("cost", "title", "words"),
    [
        (0.5, "freezing all layers raises the mean loss by 0.5", "worse without these writes"),
        (-0.5, "freezing all layers lowers the mean loss by 0.5", "better without these writes"),
        (0.0, "freezing", "does not exclude no effect"),
    ],
)
def test_the_perplexity_caption_follows_the_cost(planted, cost, title, words):
    caption = perplexity_caption(perplexity_tables(planted(frozen_cost=cost, answers=4), boot=BOOT))
    assert title in caption.title and words in caption.text
    assert "On the 16 answer tokens" in caption.text and ", on the answers " in caption.title


def test_without_freezing_the_perplexity_caption_says_so(planted):
    caption = perplexity_caption(perplexity_tables(planted(freezing=[]), boot=BOOT))
    assert "no freezing configuration was run" in caption.title


def test_too_little_data_is_said_instead_of_an_interval(planted):
    run = planted(documents=1, tokens=20, freezing=[])
    assert "no interval" in surprisal_caption(surprisal_tables(run, boot=BOOT)).title
    assert "no interval" in bucket_caption(bucket_tables(run, boot=BOOT)).text


@pytest.mark.parametrize(("name", "label"), [("all", "all layers"), ("0-3,7", "layers 0-3,7"), ("late", "late")])
def test_configurations_are_put_into_words(name, label):
    assert freezing_label(name) == label


def test_numbers_have_three_digits():
    assert [format_number(x) for x in (0.012345, 1.5, 12345.6, 1e9)] == ["0.0123", "1.5", "12,346", "1e+09"]
