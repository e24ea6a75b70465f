"""Numbers, counts and names in words."""

import pandas as pd
import pytest

from interp.wording import count_of, format_number, format_share, freezing_label, scope_of, token_label


@pytest.mark.parametrize(
    ("name", "label"), [("all", "all layers"), ("0-3,7", "layers 0-3,7"), ("0", "layer 0"), ("late", "late")]
)
def test_configurations_are_put_into_words(name, label):
    assert freezing_label(name) == label


def test_numbers_have_three_digits():
    assert [format_number(x) for x in (0.012345, 1.5, 12345.6, 1e9)] == ["0.0123", "1.5", "12,346", "1e+09"]


def test_shares_keep_their_digits():
    assert [format_share(x) for x in (0.95, 0.5, 0.999, 1 - 0.05 / 6)] == ["95%", "50%", "99.9%", "99.1667%"]


def test_counts_have_a_plural():
    assert [count_of(n, "document") for n in (0, 1, 2000)] == ["0 documents", "1 document", "2,000 documents"]


def test_lags_name_tokens():
    assert [token_label(lag) for lag in (0, 1, -2)] == ["t", "t-1", "t+2"]


def test_only_resampled_documents_stand_for_others():
    assert scope_of(pd.Series({"unit": "documents", "documents": 12})) == ""
    assert "this one document" in scope_of(pd.Series({"unit": "blocks of 16 tokens", "documents": 1}))
    assert "these 3 documents" in scope_of(pd.Series({"unit": "blocks of 16 tokens", "documents": 3}))
