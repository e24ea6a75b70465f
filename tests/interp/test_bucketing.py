import random
import time
import unicodedata
from pathlib import Path

import numpy as np
import pytest
from transformers import PreTrainedTokenizerFast

import interp
from interp.bucketing import BUCKET_NAMES, Bucket, bucket_tokens, bundled_stop_lists, load_stop_words
from interp.words import TokenTable
from tests.interp import tiny_tokenizers

SYNTAX, RETRIEVAL, NOVELTY, OTHER = Bucket
KINDS = ["byte_level", "sentencepiece"]
PARTS = ["the", "House", "house's", "don’t", "naïve", "NAÏVE", "ﬁne", "fine", "Straße", "STRASSE", "e\u0301té", "été"]
PARTS += [
    "数学を学ぶ",
    "カタカナー",
    "คณิตศาสตร์",
    "1,000.5",
    "3rd",
    "9f3a",
    "mother-in-law",
    "12",
    "Key=",
    "river",
    "x",
    "😀",
]
GLUE = [" ", " ", " ", "", "\n", ", ", ". ", "-", "'", "\u00a0", "\u200d", "()", "\x00"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    return getattr(tiny_tokenizers, request.param)()


def random_text(generator: random.Random, parts: int) -> str:
    return "".join(generator.choice(PARTS) + generator.choice(GLUE) for _ in range(parts))


def token_sizes(ids, tokenizer) -> list[int]:
    """Bytes per token, without looking at what they are: a byte-level character is one byte."""
    sizes = []
    for i in ids:
        token = tokenizer.id_to_token(i)
        if tokenizer.model.byte_fallback:
            sizes.append(1 if token.startswith("<0x") else len(token.replace("▁", " ").encode()))
        else:
            sizes.append(len(token))
    return sizes


def written_text(ids, tokenizer) -> tuple[str, list[int]]:
    """The text that tokens of a lossy tokenizer write, and bytes per token; an unknown token writes a line feed."""
    pieces = []
    for i in ids:
        token = tokenizer.id_to_token(i)
        if token in ("[UNK]", "<unk>"):
            pieces.append("\n")
        elif token.endswith("</w>"):
            pieces.append(token[:-4] + " ")
        elif tokenizer.model.__class__.__name__ == "BPE":
            pieces.append(token)
        else:
            pieces.append(token[2:] if token.startswith("##") else " " + token)
    return "".join(pieces), [len(piece.encode()) for piece in pieces]


def shape(character: str) -> str:
    """U: letter of a script without spaces, L: other letter or mark, M: mark, N: digit, else a dot."""
    category = unicodedata.category(character)[0]
    name = unicodedata.name(character, "")
    unspaced = ("CJK", "HIRAGANA", "KATAKANA", "THAI")
    if category in "LMN" and name.startswith(unspaced):
        return "U"
    return category if category in "LMN" else "."


def spans(text: str) -> list[tuple[int, int, str]]:
    """Words of a text, character by character."""
    kinds = [shape(character) for character in text] + ["."]
    found, i = [], 0
    while i < len(text):
        j = i
        if kinds[i] == "U":
            while kinds[j] in "UM":
                j += 1
            found.append((i, j, "unspaced"))
        elif kinds[i] == "N":
            while kinds[j] == "N" or (j + 1 < len(text) and text[j] in ".,:/" and kinds[j + 1] == "N"):
                j += 1
            while kinds[j] in "LMN":
                j += 1
            found.append((i, j, "word" if set(kinds[i:j]) & set("LM") else "number"))
        elif kinds[i] in "LM":
            while kinds[j] in "LM":
                j += 1
            if kinds[j] == "N":
                while kinds[j] in "LMN":
                    j += 1
            else:
                while j + 1 < len(text) and text[j] in "'’-" and kinds[j + 1] in "LM":
                    j += 1
                    while kinds[j] in "LM":
                        j += 1
            found.append((i, j, "word"))
        i = max(j, i + 1)
    return found


def naive_labels(text, sizes, numbers="content", min_lag=0):
    """Labels, word of every token: bytes looked up one at a time, earlier words searched one by one."""
    stops = load_stop_words("en").words
    token_of_byte = [t for t, size in enumerate(sizes) for _ in range(size)]
    token_starts = {sum(sizes[:t]) for t in range(len(sizes))}
    at = [len(text[:i].encode()) for i in range(len(text) + 1)]
    words = []
    for i, j, kind in spans(text):
        cuts = [i, *(c for c in range(i + 1, j) if kind == "unspaced" and at[c] in token_starts), j]
        words += [(at[a], at[b], text[a:b], kind) for a, b in zip(cuts[:-1], cuts[1:], strict=True)]
    labels, keys = [], []
    for w, (begin, _, surface, kind) in enumerate(words):
        form = unicodedata.normalize("NFKC", surface).casefold().replace("’", "'")
        key = form[:-2] if form.endswith("'s") else form
        keys.append(key)
        distances = [token_of_byte[begin] - token_of_byte[words[v][1] - 1] for v in range(w) if keys[v] == key]
        if kind == "number" and numbers == "other":
            labels.append(OTHER)
        elif form in stops or key in stops:
            labels.append(SYNTAX)
        else:
            labels.append(RETRIEVAL if any(d >= min_lag for d in distances) else NOVELTY)
    word_of_byte = {byte: w for w, (a, b, *_) in enumerate(words) for byte in range(a, b)}
    result, owner, start = [], [], 0
    for size in sizes:
        own = [word_of_byte[byte] for byte in range(start, start + size) if byte in word_of_byte]
        owner.append(own[0] if own else -1)
        result.append(labels[own[0]] if own else OTHER)
        start += size
    return result, owner


def encode(text, tokenizer):
    return tokenizer.encode(text, add_special_tokens=False).ids


@pytest.mark.parametrize("options", [{}, {"min_lag": 16}, {"numbers": "other"}])
def test_labels_equal_those_found_byte_by_byte(tokenizer, options):
    generator = random.Random(1)
    space = " " if tokenizer.model.byte_fallback else ""
    seen = set()
    for _ in range(40):
        text = random_text(generator, 40)
        ids = encode(text, tokenizer)
        result = bucket_tokens(ids, tokenizer, **options)
        labels, owner = naive_labels(space + text, token_sizes(ids, tokenizer), **options)
        assert result.labels.tolist() == labels
        word_starts = [o >= 0 and o not in owner[:t] for t, o in enumerate(owner)]
        assert result.is_word_start.tolist() == word_starts
        assert (result.word_id >= 0).tolist() == [o >= 0 for o in owner]
        assert len(np.unique(result.word_id[result.word_id >= 0])) == len({o for o in owner if o >= 0})
        seen |= set(labels)
    assert seen == set(Bucket)


@pytest.mark.parametrize("kind", ["wordpiece", "suffix"])
def test_labels_of_lossy_tokenizers_equal_those_found_byte_by_byte(kind):
    tokenizer = getattr(tiny_tokenizers, kind)()
    generator = random.Random(5)
    for _ in range(30):
        ids = tokenizer.encode(random_text(generator, 40), add_special_tokens=False).ids
        text, sizes = written_text(ids, tokenizer)
        labels, owner = naive_labels(text, sizes)
        result = bucket_tokens(ids, tokenizer)
        assert result.labels.tolist() == labels
        assert (result.word_id >= 0).tolist() == [o >= 0 for o in owner]


def test_types_and_meta(tokenizer):
    result = bucket_tokens(encode("the river", tokenizer), tokenizer)
    assert (result.labels.dtype, result.word_id.dtype, result.is_word_start.dtype) == (np.uint8, np.int32, bool)
    meta = result.meta
    assert meta["stop_words"] == "en" and meta["stop_words_version"] == "1" and len(meta["stop_words_sha256"]) == 64
    assert meta["numbers"] == "content" and meta["min_lag"] == 0 and meta["byte_exact"] is True
    assert BUCKET_NAMES[SYNTAX] == "SYNTAX"


def test_sub_tokens_inherit_the_label_of_their_word(tokenizer):
    ids = encode("strange harbours, strange harbours", tokenizer)
    result = bucket_tokens(ids, tokenizer)
    assert len(ids) > 7
    by_word = {w: set(result.labels[result.word_id == w].tolist()) for w in range(4)}
    assert by_word == {0: {NOVELTY}, 1: {NOVELTY}, 2: {RETRIEVAL}, 3: {RETRIEVAL}}


def test_documents_side_by_side_are_labelled_as_each_alone(tokenizer):
    generator = random.Random(2)
    documents = [encode(random_text(generator, 30), tokenizer) for _ in range(4)]
    joined = bucket_tokens(
        np.concatenate(documents), tokenizer, doc_ids=np.repeat([7, 3, 9, 1], [len(d) for d in documents])
    )
    alone = [bucket_tokens(d, tokenizer) for d in documents]
    assert joined.labels.tolist() == np.concatenate([one.labels for one in alone]).tolist()
    assert joined.is_word_start.tolist() == np.concatenate([one.is_word_start for one in alone]).tolist()


def test_a_document_ends_at_eos_unless_doc_ids_say_otherwise():
    fast = PreTrainedTokenizerFast(tokenizer_object=tiny_tokenizers.byte_level(), eos_token="</s>")
    ids = fast("river</s>river", add_special_tokens=False)["input_ids"]
    end = ids.index(fast.eos_token_id)
    split = bucket_tokens(ids, fast)
    assert split.labels[end] == OTHER and split.word_id[end] == -1
    assert set(split.labels[end + 1 :].tolist()) == {NOVELTY}
    whole = bucket_tokens(ids, fast, doc_ids=[0] * len(ids))
    assert set(whole.labels[end + 1 :].tolist()) == {RETRIEVAL}


def test_a_prefix_that_ends_with_a_word_keeps_its_labels(tokenizer):
    generator = random.Random(3)
    table = TokenTable.from_tokenizer(tokenizer)
    for _ in range(5):
        ids = encode(random_text(generator, 30), tokenizer)
        full = bucket_tokens(ids, table)
        ends = [t for t in range(1, len(ids)) if full.is_word_start[t] or full.word_id[t] < 0]
        for cut in ends:
            prefix = bucket_tokens(ids[:cut], table)
            assert prefix.labels.tolist() == full.labels[:cut].tolist()


def test_lag_is_counted_from_the_end_of_the_earlier_word():
    tokenizer = tiny_tokenizers.byte_level()
    ids = encode("river, river", tokenizer)
    result = bucket_tokens(ids, tokenizer)
    first_end = np.flatnonzero(result.word_id == 0)[-1]
    second = np.flatnonzero(result.word_id == 1)[0]
    lag = int(second - first_end)
    assert bucket_tokens(ids, tokenizer, min_lag=lag).labels[second] == RETRIEVAL
    assert bucket_tokens(ids, tokenizer, min_lag=lag + 1).labels[second] == NOVELTY


def test_any_iterable_serves_as_stop_list(tokenizer):
    ids = encode("The RIVER", tokenizer)
    result = bucket_tokens(ids, tokenizer, stop_words={"River"})
    assert [result.labels[result.word_id == w][0] for w in (0, 1)] == [NOVELTY, SYNTAX]
    assert result.meta["stop_words"] == "custom" and result.meta["stop_words_version"] is None
    assert load_stop_words(["b", "a"]).sha256 == load_stop_words(iter(["A", "B"])).sha256
    assert set(bucket_tokens(ids, tokenizer, stop_words=[]).labels.tolist()) <= {NOVELTY, OTHER}


def test_a_file_of_stop_words_is_read_like_the_bundled_list(tmp_path):
    file = tmp_path / "mine.txt"
    file.write_text("# Some words, version 7\n\n# articles\nThe\n  a \n", encoding="utf-8-sig")
    stops = load_stop_words(file)
    assert (stops.name, stops.version, stops.words) == ("mine.txt", "7", {"the", "a"})
    bundled = Path(interp.__path__[0]) / "stop_words" / "en.txt"
    assert load_stop_words(bundled).words == load_stop_words("en").words
    assert load_stop_words(bundled).sha256 == load_stop_words("en").sha256
    assert bundled_stop_lists() == ["en"]
    file.write_text("one\ntwo words\n")
    with pytest.raises(ValueError, match="mine.txt' must hold one word per line, got 'two words'"):
        load_stop_words(file)
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match="mine.txt' is not UTF-8"):
        load_stop_words(file)
    with pytest.raises(ValueError, match="absent.txt' cannot be read"):
        load_stop_words(tmp_path / "absent.txt")


def test_the_bundled_list_holds_closed_class_words_only():
    words = load_stop_words("en").words
    assert {"the", "of", "would", "don't", "herself", "whereas"} <= words
    assert not words & {"time", "people", "good", "world", "life", "love", "man", "home", "system", "able", "1"}
    assert 150 <= len(words) <= 250


def test_wrong_options_are_refused(tokenizer):
    ids = encode("strange rivers", tokenizer)
    cases = [
        ({"stop_words": "xx"}, ValueError, "stop_words"),
        ({"stop_words": [1]}, TypeError, "stop_words"),
        ({"stop_words": None}, TypeError, "stop_words"),
        ({"numbers": "skip"}, ValueError, "numbers"),
        ({"min_lag": -1}, ValueError, "min_lag"),
        ({"min_lag": 1.5}, TypeError, "min_lag"),
        ({"doc_ids": [0]}, ValueError, "doc_ids"),
        ({"doc_ids": np.zeros(len(ids))}, TypeError, "doc_ids"),
    ]
    assert len(ids) > 1
    for options, error, name in cases:
        with pytest.raises(error, match=name):
            bucket_tokens(ids, tokenizer, **options)


def test_an_empty_sequence_gives_empty_labels(tokenizer):
    result = bucket_tokens([], tokenizer)
    assert result.labels.shape == result.word_id.shape == result.is_word_start.shape == (0,)


def test_131072_tokens_take_less_than_two_seconds(tokenizer):
    generator = random.Random(4)
    ids = encode(random_text(generator, 2000), tokenizer)
    ids = np.resize(np.array(ids), 131072)
    table = TokenTable.from_tokenizer(tokenizer)
    began = time.process_time()
    bucket_tokens(ids, table)
    assert time.process_time() - began < 2
