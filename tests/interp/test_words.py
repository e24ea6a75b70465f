import random

import numpy as np
import pytest
from tokenizers import AddedToken, Tokenizer, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from interp.words import TokenTable, byte_lengths, find_words, token_bytes, token_strings
from tests.interp import tiny_tokenizers

TEXT = "The mother-in-law's house, 1,000.5 pounds; 数学を e\u0301té 😀\x00 \r\n\n  naïve ﬁne Key=9f3a"


def random_text(generator: random.Random, length: int = 60) -> str:
    pieces = ["the ", "House", " house's", "\n", "\u00a0", "é", "e\u0301", "数", "ー", "ไ", "😀", "\u200d", "\x00"]
    ranges = [(0x20, 0xD800), (0xE000, 0x110000)]
    strange = [chr(generator.randrange(*generator.choice(ranges))) for _ in range(length // 4)]
    return "".join(generator.choice([*pieces, *strange]) for _ in range(length))


def words_of(ids, tokenizer) -> list[str]:
    """The text of the tokens of each word, joined."""
    words = find_words(ids, tokenizer)
    pieces = TokenTable.from_tokenizer(tokenizer)
    joined: dict[int, bytes] = {}
    for i, word in zip(ids, words.of_token.tolist(), strict=True):
        if word >= 0:
            joined[word] = joined.get(word, b"") + pieces.pieces[i]
    return [piece.decode("utf-8", "replace").strip() for piece in joined.values()]


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece"])
def test_joined_token_bytes_are_the_text_byte_for_byte(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    generator = random.Random(0)
    for text in [TEXT, *(random_text(generator) for _ in range(50))]:
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        assert b"".join(token_bytes(tokenizer, ids)) == text.encode()
        assert byte_lengths(tokenizer, ids).sum() == len(text.encode())
    assert TokenTable.from_tokenizer(tokenizer).exact


@pytest.mark.parametrize("kind", ["metaspace", "wordpiece", "suffix", "word_level"])
def test_lossy_tokenizers_give_what_their_own_decoding_gives(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    ids = tokenizer.encode("the house stood by the river and the housing").ids
    joined = b"".join(token_bytes(tokenizer, ids)).decode()
    assert joined.strip() == tokenizer.decode(ids)
    assert not TokenTable.from_tokenizer(tokenizer).exact


@pytest.mark.parametrize("kind", ["byte_level", "sentencepiece", "metaspace", "wordpiece", "suffix", "word_level"])
def test_words_are_rebuilt_from_their_parts(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    ids = tokenizer.encode("the house stood by the wonderful river").ids
    assert words_of(ids, tokenizer) == ["the", "house", "stood", "by", "the", "wonderful", "river"]
    words = find_words(ids, tokenizer)
    assert words.is_start.sum() == 7
    assert words.forms == ["the", "house", "stood", "by", "the", "wonderful", "river"]


def test_the_kind_is_read_from_the_tokenizer_itself():
    for kind, name in [("metaspace", "sentencepiece"), ("byte_level", "byte_level"), ("suffix", "suffix")]:
        assert TokenTable.from_tokenizer(getattr(tiny_tokenizers, kind)()).kind == name


def test_a_byte_level_tokenizer_without_decoder_is_known_by_its_pre_tokenizer():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.train_from_iterator(tiny_tokenizers.LINES, trainers.BpeTrainer(vocab_size=200, show_progress=False))
    assert TokenTable.from_tokenizer(tokenizer).kind == "byte_level"


def test_token_strings_are_per_id_and_show_half_characters_as_replacement():
    tokenizer = tiny_tokenizers.sentencepiece()
    ids = [tokenizer.token_to_id(name) for name in ("<s>", "▁the", "<0xE6>", "<0x0A>")]
    assert token_strings(tokenizer, ids) == ["<s>", " the", "\ufffd", "\n"]
    assert token_bytes(tokenizer, ids) == [b"", b"the", b"\xe6", b"\n"]


def test_added_tokens_are_text_and_special_tokens_are_not():
    tokenizer = tiny_tokenizers.byte_level()
    tokenizer.add_tokens([AddedToken("é!", normalized=False)])
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    ids = fast("aé!b</s><pad>", add_special_tokens=False)["input_ids"]
    assert b"".join(token_bytes(fast, ids)) == "aé!b".encode()
    assert token_strings(fast, ids)[-2:] == ["</s>", "<pad>"]


def test_no_word_crosses_a_special_token():
    tokenizer = tiny_tokenizers.byte_level()
    ids = [*tokenizer.encode("house").ids, tokenizer.token_to_id("</s>"), *tokenizer.encode("boat").ids]
    assert find_words(ids, tokenizer).forms == ["house", "boat"]


def test_word_shapes():
    tokenizer = tiny_tokenizers.byte_level()
    text = "don’t mother-in-law, 1,000.5 3rd 9f3a x=y ﬁne STRASSE straße 12:30. -a- e\u0301"
    forms = find_words(tokenizer.encode(text).ids, tokenizer).forms
    expected = ["don't", "mother-in-law", "1,000.5", "3rd", "9f3a", "x", "y", "fine", "strasse", "strasse"]
    assert forms == [*expected, "12:30", "a", "é"]


def test_without_spaces_the_word_is_the_shortest_run_of_tokens_with_whole_characters():
    tokenizer = tiny_tokenizers.sentencepiece()
    ids = tokenizer.encode("数学数数").ids
    words = find_words(ids, tokenizer)
    assert words.forms == ["数", "学", "数", "数"]
    three_bytes_each = [tokenizer.token_to_id("<0xE6>") == i for i in ids]
    assert sum(three_bytes_each) == 3


def test_wrong_tokenizers_and_ids_are_refused():
    plain = Tokenizer(models.BPE())
    plain.pre_tokenizer = pre_tokenizers.Whitespace()
    plain.train_from_iterator(["a house"], trainers.BpeTrainer(show_progress=False))
    with pytest.raises(ValueError, match="cannot rebuild words"):
        TokenTable.from_tokenizer(plain)
    with pytest.raises(TypeError, match="fast Transformers tokenizer"):
        TokenTable.from_tokenizer(object())
    tokenizer = tiny_tokenizers.byte_level()
    for ids, error in [([[1]], ValueError), ([0.5], TypeError), ([-1], ValueError), ([10**6], ValueError)]:
        with pytest.raises(error, match="ids must"):
            token_strings(tokenizer, ids)


def test_an_empty_text_has_no_words():
    tokenizer = tiny_tokenizers.byte_level()
    words = find_words(np.array([], dtype=np.int64), tokenizer)
    assert words.forms == [] and words.of_token.shape == (0,) and token_bytes(tokenizer, []) == []
