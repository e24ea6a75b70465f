"""Needle documents ask for exactly what they define, where they say, and depend on the seed only."""

import hashlib
import re

import numpy as np
import pytest

from interp.needle import NeedleOptions, needle_documents
from tests.interp.tiny_corpus import make_tokenizer


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def make(tokenizer, count=4, seq_length=300, seed=0, **options):
    options = NeedleOptions(**options)
    return list(needle_documents(tokenizer, seq_length=seq_length, max_documents=count, seed=seed, options=options))


def parts(tokenizer, document):
    text = tokenizer.decode(document.input_ids, skip_special_tokens=True)
    found = re.search(
        r"Define Key=([0-9a-f]{8}) Value=([0-9a-f]+)\. .* Query Key=([0-9a-f]{8}) Value=([0-9a-f]+)$",
        text,
        re.S,
    )
    return found.groups()


@pytest.mark.parametrize(("filler", "value_length"), [("random", 1), ("random", 3), ("random", 8), ("text", 8)])
def test_the_question_is_answered_by_the_definition(tokenizer, filler, value_length):
    for document in make(tokenizer, filler=filler, value_length=value_length, depths=(0.0, 0.4, 1.0)):
        key, value, asked, answer = parts(tokenizer, document)
        assert (key, value) == (asked, answer) and len(value) == value_length
        assert tokenizer.decode(document.input_ids[document.answer_mask]) == value
        assert document.answer_mask.sum() == value_length and document.answer_mask[-1]
        assert document.input_ids.shape == document.answer_mask.shape == (300,)
        assert document.input_ids[0] == tokenizer.bos_token_id


def test_the_depth_places_the_definition(tokenizer):
    define = np.array(tokenizer("Define Key=", add_special_tokens=False)["input_ids"])
    documents = make(tokenizer, count=6, depths=(0.0, 0.5, 1.0), seq_length=500)
    starts = [
        next(i for i in range(500) if np.array_equal(d.input_ids[i : i + len(define)], define)) for d in documents
    ]
    room = 500 - 1 - len("Define Key=12345678 Value=12345678. ") - len(" Query Key=12345678 Value=12345678")
    assert starts == [1, 1 + room // 2, 1 + room] * 2


def test_the_same_seed_gives_the_same_bytes_on_every_machine(tokenizer):
    first, again, other = (make(tokenizer, seed=seed) for seed in (3, 3, 4))
    assert [d.input_ids.tobytes() for d in first] == [d.input_ids.tobytes() for d in again]
    assert all(not np.array_equal(a.input_ids, b.input_ids) for a, b in zip(first, other, strict=True))
    digest = hashlib.sha256(b"".join(d.input_ids.astype("<i8").tobytes() for d in first)).hexdigest()
    assert digest[:16] == "f678f460fbceb96c"


def test_a_document_does_not_depend_on_how_many_there_are(tokenizer):
    few, many = make(tokenizer, count=2), make(tokenizer, count=5)
    assert [d.input_ids.tobytes() for d in few] == [d.input_ids.tobytes() for d in many[:2]]
    assert len({parts(tokenizer, d)[0] for d in many}) == 5


def test_random_filler_is_uniform_over_ordinary_ids(tokenizer):
    (document,) = make(tokenizer, count=1, seq_length=20_000, min_filler_id=50, depths=(1.0,))
    filler = document.input_ids[1:-100]
    counts = np.bincount(filler, minlength=len(tokenizer))
    assert counts[:50].sum() == 0 and not np.isin(filler, tokenizer.all_special_ids).any()
    expected = len(filler) / (len(tokenizer) - 50)
    assert abs(counts[50:] - expected).max() < 6 * np.sqrt(expected)


def test_text_filler_is_the_text_given(tokenizer):
    (document,) = make(tokenizer, count=1, filler="text", filler_text="and the ", depths=(1.0,))
    assert "and the and the and the" in tokenizer.decode(document.input_ids)


def test_answer_starts_where_a_tokenizer_merges_across_the_border():
    from tokenizers import AddedToken

    tokenizer = make_tokenizer()
    tokenizer.add_tokens([AddedToken(f"={digit}", normalized=False) for digit in "0123456789abcdef"])
    for document in make(tokenizer, value_length=2):
        assert tokenizer.decode(document.input_ids[document.answer_mask])[-2:] == parts(tokenizer, document)[3]
        assert document.answer_mask.sum() == 2


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"depths": (1.5,)}, r"depths must be one or more numbers in \[0, 1\]"),
        ({"depths": ()}, "depths must be"),
        ({"filler": "noise"}, "filler must be one of"),
        ({"value_length": 9}, "value_length must be in"),
        ({"min_filler_id": -1}, "min_filler_id"),
        ({"filler_text": "x"}, "filler_text is given, but filler is 'random'"),
        ({"min_filler_id": 10_000}, "no filler"),
        ({"filler": "text", "filler_text": ""}, "no filler"),
    ],
)
def test_wrong_options_are_refused(tokenizer, options, message):
    with pytest.raises(ValueError, match=message):
        make(tokenizer, **options)


def test_lengths_are_checked(tokenizer):
    with pytest.raises(ValueError, match="seq_length=40 has no room for a needle of 71 tokens"):
        make(tokenizer, seq_length=40)
    with pytest.raises(ValueError, match="max_documents"):
        needle_documents(tokenizer, seq_length=100, max_documents=None)
