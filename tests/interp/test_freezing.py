"""Layer choices are read as written and refused when the model does not have them."""

from types import SimpleNamespace

import pytest

from interp.freezing import Freezing, freezing_multiplier, parse_freezing, parse_layers, ttt_layers


@pytest.mark.parametrize(
    ("text", "layers"),
    [("2,3", [2, 3]), ("0-2", [0, 1, 2]), ("0-1, 7", [0, 1, 7]), ("5", [5]), ("3,1-3", [1, 2, 3])],
)
def test_layers_are_parsed(text, layers):
    assert parse_layers(text) == layers


@pytest.mark.parametrize("text", ["", "a", "1-", "-1", "1,,2", "3-1", "0:2", "__import__('os')"])
def test_other_texts_are_refused(text):
    with pytest.raises(ValueError, match="layers"):
        parse_layers(text)


def test_all_means_every_ttt_layer():
    assert parse_freezing("all", [1, 3]) == Freezing("all", (1, 3))
    assert parse_freezing("1, 3", [1, 3]) == Freezing("1,3", (1, 3))
    with pytest.raises(ValueError, match=r"layers \[2\] are no TTT layers, the model has \[1, 3\]"):
        parse_freezing("1-3", [1, 3])


@pytest.mark.parametrize("text", ["foo", "", "al"])
def test_what_is_no_choice_of_layers_is_refused_with_all_that_is_allowed(text):
    with pytest.raises(ValueError, match="a freezing is 'all' or a choice of layers: layers are given as '2,3'"):
        parse_freezing(text, [1, 3])


def test_the_multiplier_is_zero_at_frozen_layers_by_their_absolute_index():
    assert freezing_multiplier(Freezing("x", (3,)), [1, 3, 5]).tolist() == [[[[1.0]], [[0.0]], [[1.0]]]]


def test_ttt_layers_come_from_layer_types():
    assert ttt_layers(SimpleNamespace(layer_types=["ttt", "full_attention", "ttt"])) == [0, 2]
    with pytest.raises(ValueError, match="not a TTT model"):
        ttt_layers(SimpleNamespace(model_type="llama"))
