import numpy as np
import pytest

from interp.bucketing import Bucket, bucket_tokens, load_stop_words, single_token_buckets
from interp.classifiers import FrequencyClassifier, PartOfSpeechClassifier, single_tokens
from interp.words import TokenTable, find_words
from tests.interp import tiny_tokenizers

SYNTAX, RETRIEVAL, NOVELTY, OTHER = Bucket
TEXT = "the river and the house and the river, the boat"


@pytest.fixture(scope="module")
def tokenizer():
    return tiny_tokenizers.byte_level()


def by_word(result) -> list[int]:
    return [int(result.labels[result.word_id == w][0]) for w in range(result.word_id.max() + 1)]


def test_a_stop_list_as_classifier_is_the_stop_list(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    as_list, as_classifier = (
        bucket_tokens(ids, tokenizer, stop_words="en"),
        bucket_tokens(ids, tokenizer, classifier=load_stop_words("en")),
    )
    assert as_list.labels.tolist() == as_classifier.labels.tolist() and as_list.meta == as_classifier.meta


def test_the_most_frequent_words_of_a_corpus_are_syntax(tokenizer):
    ids = tokenizer.encode(TEXT).ids
    classifier = FrequencyClassifier.from_ids([ids], tokenizer, top=2, corpus="toy")
    assert classifier.words == {"the", "and"}  # the 4, and 2, river 2 comes later in the alphabet
    result = bucket_tokens(ids, tokenizer, classifier=classifier)
    assert by_word(result) == [0, 2, 0, 0, 2, 0, 0, 1, 0, 2]
    assert result.meta["classifier"] == {"name": "frequency", "corpus": "toy", "top": 2}
    with pytest.raises(ValueError, match="top must be at most the 5 different words"):
        FrequencyClassifier.from_ids([ids], tokenizer, top=6)
    with pytest.raises(ValueError, match="top must be a number"):
        FrequencyClassifier.from_ids([ids], tokenizer, top=0)


def test_a_tagger_sees_the_words_in_order_and_closed_classes_are_syntax(tokenizer):
    seen = []

    def tag(words):
        seen.extend(words)
        return ["DET" if word == "the" else "NOUN" for word in words]

    ids = tokenizer.encode("The river, the boat").ids
    result = bucket_tokens(ids, tokenizer, classifier=PartOfSpeechClassifier(tag, name="toy"))
    assert seen == ["the", "river", "the", "boat"] and by_word(result) == [0, 2, 0, 2]
    assert result.meta["classifier"]["tagger"] == "toy"
    with pytest.raises(ValueError, match="one tag per word"):
        bucket_tokens(ids, tokenizer, classifier=PartOfSpeechClassifier(lambda words: words[1:]))


def test_a_classifier_of_another_shape_is_refused(tokenizer):
    class Wrong:
        def is_syntax(self, words):
            return np.zeros(len(words.forms))

        def describe(self):
            return {"name": "wrong"}

    with pytest.raises(ValueError, match="classifier must give bool"):
        bucket_tokens(tokenizer.encode(TEXT).ids, tokenizer, classifier=Wrong())


def test_single_tokens_follow_the_earlier_study(tokenizer):
    table = TokenTable.from_tokenizer(tokenizer)
    chosen = single_tokens(tokenizer)
    pieces = {table.pieces[i] for i in chosen.ids}
    assert b" the" in pieces and b"." in pieces and b"\n" in pieces
    assert b" The" not in pieces and "people" in chosen.dropped
    ids = tokenizer.encode(TEXT + ".").ids
    labels = single_token_buckets(ids, tokenizer).labels.tolist()
    for t, i in enumerate(ids):
        expected = SYNTAX if i in chosen.ids else RETRIEVAL if i in ids[:t] else NOVELTY
        assert labels[t] == expected


def test_single_token_labels_start_anew_with_every_document_and_leave_special_tokens_out(tokenizer):
    end = tokenizer.token_to_id("</s>")
    ids = [*tokenizer.encode("river").ids, end]
    labels = single_token_buckets(ids * 2, tokenizer, doc_ids=np.repeat([0, 1], len(ids))).labels
    assert labels[: len(ids)].tolist() == labels[len(ids) :].tolist() and labels[len(ids) - 1] == OTHER
    words = find_words(ids * 2, tokenizer)
    assert (single_token_buckets(ids * 2, tokenizer).word_id >= 0).tolist() == (words.of_token >= 0).tolist()
