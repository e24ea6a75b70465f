"""Captions follow the data: planted effects in either direction, and none."""

import numpy as np
import pytest

from interp.captions import (
    bucket_caption,
    find_contrast,
    heatmap_caption,
    perplexity_caption,
    surprisal_caption,
)
from interp.statistics import Bootstrap
from interp.tables import ALL_TOKENS, POOLED, bucket_tables, perplexity_tables, surprisal_tables, time_tables
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


def test_a_difference_that_is_only_position_is_not_in_the_title(planted):
    caption = bucket_caption(bucket_tables(planted(position_only=True, documents=12), boot=BOOT))
    assert caption.title.startswith("Differences between buckets vanish at like positions: 3 of 6 pairs")
    sentence = next(part for part in caption.text.split(". ") if part.startswith("NOVELTY") and "times SYNTAX" in part)
    assert "over all positions" in sentence and sentence.endswith("at like positions (not told apart)")


def test_the_title_gives_the_ratio_at_like_positions(planted):
    tables = bucket_tables(planted(position_only=True, documents=12, bucket_factor=(1, 1, 1.5, 1)), boot=BOOT)
    title = bucket_caption(tables).title
    assert title.startswith("NOVELTY writes most: 1.5") or title.startswith("NOVELTY writes most: 1.4")
    pairs = tables.contrasts[tables.contrasts["layer"] == POOLED]
    raw = find_contrast(pairs[pairs["tokens"] == ALL_TOKENS], "NOVELTY", "RETRIEVAL")["ratio"]
    assert raw > 1.6 and "at like positions" in title


def test_a_contrast_is_found_in_either_order(planted):
    tables = bucket_tables(planted(bucket_factor=(1, 1, 1.5, 1)), boot=BOOT)
    pairs = tables.contrasts[(tables.contrasts["layer"] == 0) & (tables.contrasts["tokens"] == ALL_TOKENS)]
    one, other = find_contrast(pairs, "NOVELTY", "SYNTAX"), find_contrast(pairs, "SYNTAX", "NOVELTY")
    for name in ("ratio", "adjusted"):
        assert one[name] * other[name] == pytest.approx(1)
        assert one[f"{name}_low"] * other[f"{name}_high"] == pytest.approx(1)


def test_the_bucket_caption_compares_first_tokens_of_words(planted):
    run = planted()
    later = (run.tokens["bucket"] == 2) & (run.tokens["position"] % 2 == 1)
    run.tokens.loc[later, "is_word_start"] = False
    run.plasticity[later] *= 5  # new words write more only in their later tokens
    caption = bucket_caption(bucket_tables(run, boot=BOOT))
    assert caption.title.startswith("NOVELTY writes most")
    sentence = next(part for part in caption.text.split(". ") if part.startswith("On first tokens of words"))
    assert "RETRIEVAL 1.00" in sentence and "tokens per word: NOVELTY" in sentence
    assert sentence.count("not told apart") == 2


def test_without_syntax_the_largest_bucket_is_the_reference(planted):
    run = planted()
    run.tokens.loc[run.tokens["bucket"] == 0, "bucket"] = 2
    text = bucket_caption(bucket_tables(run, boot=BOOT)).text
    assert "Without tokens: SYNTAX." in text and "Drawn relative to NOVELTY" in text


@pytest.mark.parametrize(("documents", "said"), [(4, True), (12, False)])
def test_few_documents_say_nothing_about_others(planted, documents, said):
    run = planted(documents=documents)
    sentence = f"within these {documents} documents and say nothing about others"
    texts = [
        bucket_caption(bucket_tables(run, boot=BOOT)).text,
        surprisal_caption(surprisal_tables(run, boot=BOOT)).text,
        heatmap_caption(time_tables(run, boot=BOOT)).text,
        perplexity_caption(perplexity_tables(run, boot=BOOT)).text,
    ]
    assert [sentence in text for text in texts] == [said] * 4


def test_captions_name_the_confidence_asked_for(planted):
    run = planted()
    boot = Bootstrap(n_boot=200, confidence=0.9)
    texts = [
        bucket_caption(bucket_tables(run, boot=boot)).text,
        surprisal_caption(surprisal_tables(run, boot=boot)).text,
        heatmap_caption(time_tables(run, boot=boot)).text,
        perplexity_caption(perplexity_tables(run, boot=boot)).text,
    ]
    assert all("90%" in text and "95%" not in text for text in texts)


@pytest.mark.parametrize(
    ("power", "words"),
    [(0.5, "more surprising tokens write more"), (-0.5, "write less"), (0.0, "does not exclude no relation")],
)
def test_the_surprisal_caption_follows_the_sign(planted, power, words):
    caption = surprisal_caption(surprisal_tables(planted(surprisal_power=power), boot=BOOT))
    assert words in caption.text
    assert "(lag 0)" in caption.title and "r = " in caption.title and "[" in caption.title
    assert "With the surprisal of token t+1 r = " in caption.text and "token t-1 r = " in caption.text


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
    assert "in the first 100 tokens plasticity of all layers pooled is" in caption.title


def test_the_heat_map_caption_names_silent_layers_and_short_documents(planted):
    caption = heatmap_caption(time_tables(planted(silent_layers=[1], tokens=150), boot=BOOT))
    assert caption.title.startswith("Plasticity of layer 0")
    assert "Nothing is written in layer 1." in caption.text and "too short" in caption.text
    assert heatmap_caption(time_tables(planted(silent_layers=[0, 1]), boot=BOOT)).title.startswith("No layer writes")


@pytest.mark.parametrize(
    ("cost", "title", "words"),
    [
        (0.5, "over the whole text it raises the mean loss by 0.5", "worse without these writes"),
        (-0.5, "over the whole text it lowers the mean loss by 0.5", "better without these writes"),
        (0.0, "changes the mean loss by", "does not exclude no effect"),
    ],
)
def test_the_perplexity_caption_follows_the_cost(planted, cost, title, words):
    caption = perplexity_caption(perplexity_tables(planted(frozen_cost=cost, answers=4), boot=BOOT))
    assert title in caption.title and words in caption.text
    assert "On the 16 answer tokens" in caption.text and caption.title.startswith("On the answers freezing ")


def test_an_effect_that_is_not_excluded_to_be_none_does_not_lead_the_title(planted):
    run = planted(frozen_cost=0.0)
    noise = np.random.default_rng(0).normal(size=len(run.tokens)).astype(np.float32)
    run.loss_frozen[:, 0] += 20 * noise
    run.loss_frozen[:, 1] += 0.1
    title = perplexity_caption(perplexity_tables(run, boot=BOOT)).title
    assert "freezing first raises the mean loss by 0.1" in title


def test_without_freezing_the_perplexity_caption_says_so(planted):
    caption = perplexity_caption(perplexity_tables(planted(freezing=[]), boot=BOOT))
    assert "no freezing configuration was run" in caption.title


def test_too_little_data_is_said_instead_of_an_interval(planted):
    run = planted(documents=1, tokens=20, freezing=[])
    assert "no interval" in surprisal_caption(surprisal_tables(run, boot=BOOT)).title
    assert "no interval" in bucket_caption(bucket_tables(run, boot=BOOT)).text
