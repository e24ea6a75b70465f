"""Corpora give documents of the length asked for, lazily and always the same, and refuse bad input."""

from itertools import islice

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from interp.corpora import Document, load_corpus
from tests.interp.tiny_corpus import make_tokenizer

TEXT = "It was the best of times, and it was the worst of times. " * 40


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def write(path, text):
    path.write_text(text, encoding="utf-8")
    return path


def body(document):
    """The ids after BOS."""
    assert document.input_ids[0] == 0
    return document.input_ids[1:]


def test_pydoc_gives_full_length_documents_that_begin_with_topics(tokenizer):
    from pydoc_data.topics import topics

    documents = list(load_corpus("pydoc", tokenizer, seq_length=3000, max_documents=12))
    assert [len(document.input_ids) for document in documents] == [3000] * 12
    for document in documents:
        first_topic = document.name.split(" to ")[0]
        assert tokenizer.decode(body(document)).startswith(topics[first_topic].strip()[:200])
    again = list(load_corpus("pydoc", tokenizer, seq_length=3000, max_documents=12))
    assert all(np.array_equal(a.input_ids, b.input_ids) for a, b in zip(documents, again, strict=True))
    assert len({document.input_ids.tobytes() for document in documents}) == 12


def test_pydoc_joins_topics_for_long_documents(tokenizer):
    (document,) = load_corpus("pydoc", tokenizer, seq_length=150_000, max_documents=1)
    assert len(document.input_ids) == 150_000


def test_text_is_cut_into_consecutive_pieces(tmp_path, tokenizer):
    file = write(tmp_path / "a.txt", TEXT)
    documents = list(load_corpus("text", tokenizer, path=file, seq_length=101))
    whole = tokenizer(TEXT, add_special_tokens=False)["input_ids"]
    assert len(documents) == len(whole) // 100
    np.testing.assert_array_equal(np.concatenate([body(d) for d in documents]), whole[: 100 * len(documents)])
    assert [document.name for document in documents[:2]] == ["a.txt", "a.txt [1]"]


def test_all_first_pieces_come_before_all_second_ones(tmp_path, tokenizer):
    write(tmp_path / "b.txt", TEXT)
    write(tmp_path / "a.txt", TEXT.upper())
    write(tmp_path / "notes.md", "not read")
    documents = load_corpus("text", tokenizer, path=tmp_path, seq_length=64, max_documents=5)
    assert [d.name for d in documents] == ["a.txt", "b.txt", "a.txt [1]", "b.txt [1]", "a.txt [2]"]
    one_each = load_corpus("text", tokenizer, path=tmp_path, seq_length=64, pieces_per_text=1)
    assert [d.name for d in one_each] == ["a.txt", "b.txt"]


def test_only_a_first_piece_may_be_short(tmp_path, tokenizer):
    short, long = write(tmp_path / "short.txt", "x" * 30), write(tmp_path / "long.txt", "x" * 130)
    documents = list(load_corpus("text", tokenizer, path=[short, long], seq_length=101))
    assert [(d.name, len(d.input_ids)) for d in documents] == [("short.txt", 31), ("long.txt", 101)]


def test_max_chars_limits_what_is_read(tmp_path, tokenizer):
    file = write(tmp_path / "a.txt", "x" * 500)
    (document,) = load_corpus("text", tokenizer, path=file, seq_length=400, max_chars=50)
    assert len(document.input_ids) == 51


def test_without_a_bos_tokenizer_there_is_no_bos(tmp_path):
    file = write(tmp_path / "a.txt", "x" * 30)
    (document,) = load_corpus("text", make_tokenizer(bos=False), path=file, seq_length=400)
    assert len(document.input_ids) == 30


def test_documents_are_made_as_they_are_asked_for(tmp_path, tokenizer):
    good, bad = write(tmp_path / "good.txt", TEXT), tmp_path / "zbad.txt"
    bad.write_bytes(b"\xff\xfe\x00latin")
    documents = load_corpus("text", tokenizer, path=[good, bad], seq_length=64)
    assert next(documents).name == "good.txt"
    with pytest.raises(ValueError, match="zbad.txt.* is not UTF-8"):
        next(documents)


def test_a_long_text_is_read_as_far_as_documents_are_asked_for(tmp_path, tokenizer):
    text = "it was the best of times and " * 9000
    assert len(text) > 260_000
    file = write(tmp_path / "book.txt", text)
    whole = len(tokenizer(text, add_special_tokens=False)["input_ids"]) // 2000
    for wanted in (None, whole + 5):
        documents = list(load_corpus("text", tokenizer, path=file, seq_length=2001, max_documents=wanted))
        assert len(documents) == whole
    limited = list(load_corpus("text", tokenizer, path=file, seq_length=2001, max_chars=100_000))
    assert len(limited) < whole // 2


def test_of_a_dataset_as_much_is_read_as_one_document_needs(tmp_path, tokenizer):
    pq.write_table(pa.table({"text": ["the " * 150_000]}), tmp_path / "long.parquet")
    (document,) = load_corpus("hub", tokenizer, path=tmp_path / "long.parquet", seq_length=250_000)
    assert len(document.input_ids) == 250_000


def test_short_texts_between_others_are_skipped_with_one_warning(tmp_path, tokenizer, caplog):
    files = [write(tmp_path / f"{i}.txt", text) for i, text in enumerate(["", TEXT, "x", TEXT, "\ufeff"])]
    documents = list(load_corpus("text", tokenizer, path=tmp_path, seq_length=64, max_documents=3))
    assert [document.name for document in documents] == ["1.txt", "3.txt", "1.txt [1]"]
    assert [record.getMessage() for record in caplog.records] == [
        "skipped 3 text(s) shorter than two tokens: '0.txt', '2.txt', '4.txt'"
    ]
    with pytest.raises(ValueError, match="no text of two tokens or more: '0.txt', '2.txt' shorter"):
        list(load_corpus("text", tokenizer, path=[files[0], files[2]]))


@pytest.mark.parametrize("text", ["", "x"])
def test_a_text_shorter_than_two_tokens_is_refused(tmp_path, tokenizer, text):
    file = write(tmp_path / "tiny.txt", text)
    with pytest.raises(ValueError, match="no text of two tokens or more: 'tiny.txt' shorter than two tokens"):
        list(load_corpus("text", tokenizer, path=file))


def test_pg19_reads_one_document_per_book(tmp_path, tokenizer):
    rows = {
        "short_book_title": ["Emma", "Persuasion"],
        "publication_date": [1815, 1817],
        "url": ["", ""],
        "text": [TEXT, TEXT[::-1]],
    }
    pq.write_table(pa.table(rows), tmp_path / "validation.parquet")
    for path in (tmp_path / "validation.parquet", tmp_path):
        documents = list(load_corpus("pg19", tokenizer, path=path, seq_length=128))
        assert [(d.name, len(d.input_ids)) for d in documents] == [("Emma", 128), ("Persuasion", 128)]
        assert tokenizer.decode(body(documents[1])) == TEXT[::-1][: len(tokenizer.decode(body(documents[1])))]


def test_wikitext_lines_are_joined_into_articles(tmp_path, tokenizer):
    lines = ["", " = First Title = \n", "", " The text . \n", " = = Section = = \n", " More . \n"]
    lines += [" = Second = \n", " End . \n"]
    pq.write_table(pa.table({"text": lines}), tmp_path / "wiki.parquet")
    documents = list(load_corpus("wikitext", tokenizer, path=tmp_path / "wiki.parquet", split="test"))
    assert [document.name for document in documents] == ["First Title", "Second"]
    text = tokenizer.decode(body(documents[0]))
    assert text.startswith(" = First Title = \n") and " = = Section = = \n" in text and text.endswith(" More . \n")


def test_any_dataset_with_a_text_column_is_read(tmp_path, tokenizer):
    write(tmp_path / "rows.jsonl", '{"body": "hello world"}\n{"body": ""}\n{"body": "again"}\n')
    arguments = {"path": tmp_path / "rows.jsonl", "text_column": "body"}
    documents = list(load_corpus("hub", tokenizer, **arguments))
    assert [d.name for d in documents] == ["row 0", "row 2"]
    assert tokenizer.decode(body(documents[1])) == "again"
    with pytest.raises(ValueError, match=r"no text in column 'text': it has \['body'\]"):
        next(load_corpus("hub", tokenizer, path=tmp_path / "rows.jsonl"))


def test_a_dataset_without_text_or_without_network_is_an_error(tmp_path, tokenizer):
    pq.write_table(pa.table({"text": ["", "", "x"]}), tmp_path / "empty.parquet")
    with pytest.raises(ValueError, match="no text of two tokens"):
        list(load_corpus("hub", tokenizer, path=tmp_path / "empty.parquet"))
    with pytest.raises(ValueError, match="'nobody/nothing', split 'validation', could not be opened"):
        load_corpus("hub", tokenizer, path="nobody/nothing")


@pytest.mark.parametrize("dtype", [np.uint16, np.int32, np.int64])
def test_token_arrays_are_cut_without_a_tokenizer(tmp_path, dtype):
    np.save(tmp_path / "ids.npy", np.arange(1050, dtype=dtype))
    documents = list(load_corpus("tokens", None, path=tmp_path / "ids.npy", seq_length=100))
    assert len(documents) == 10 and documents[0].input_ids.dtype == np.int64
    np.testing.assert_array_equal(np.concatenate([d.input_ids for d in documents]), np.arange(1000))


def test_token_parquet_gives_a_document_per_row(tmp_path):
    pq.write_table(pa.table({"input_ids": [[1, 2, 3], list(range(90))]}), tmp_path / "ids.parquet")
    documents = list(load_corpus("tokens", None, path=tmp_path, seq_length=40))
    assert [len(d.input_ids) for d in documents] == [3, 40, 40]
    np.testing.assert_array_equal(documents[2].input_ids, np.arange(40, 80))


def test_bad_token_files_are_refused(tmp_path):
    np.save(tmp_path / "two.npy", np.zeros((2, 2), np.int64))
    np.save(tmp_path / "float.npy", np.zeros(9))
    np.save(tmp_path / "object.npy", np.array([{}, {}], dtype=object), allow_pickle=True)
    np.save(tmp_path / "one.npy", np.zeros(1, np.int64))
    pq.write_table(pa.table({"ids": [[1, 2]]}), tmp_path / "column.parquet")
    pq.write_table(pa.table({"input_ids": [[1.5, 2.0]]}), tmp_path / "float.parquet")
    write(tmp_path / "broken.parquet", "PAR1")
    write(tmp_path / "text.txt", TEXT)
    messages = {
        "two.npy": "1-D integer",
        "float.npy": "1-D integer",
        "object.npy": "cannot be read as an array",
        "one.npy": "shorter than two tokens",
        "column.parquet": "needs a column input_ids",
        "float.parquet": "needs a column input_ids",
        "broken.parquet": "cannot be read as tokens",
        "text.txt": "read from .npy and .parquet",
    }
    for name, message in messages.items():
        with pytest.raises(ValueError, match=message):
            list(load_corpus("tokens", None, path=tmp_path / name))


WRONG = [
    ({"dataset_type": "books"}, "dataset_type must be one of"),
    ({"dataset_type": "pydoc", "seq_length": 1}, "seq_length must be at least 2"),
    ({"dataset_type": "pydoc", "max_documents": 0}, "max_documents must be at least 1"),
    ({"dataset_type": "pydoc", "path": "x"}, "has no use for {'path': 'x'}"),
    ({"dataset_type": "needle", "split": "test"}, "has no use for {'split': 'test'}"),
    ({"dataset_type": "text", "path": "x", "text_column": "body"}, "has no use for {'text_column': 'body'}"),
    ({"dataset_type": "text"}, "needs path"),
    ({"dataset_type": "text", "path": "absent.txt"}, "'absent.txt' does not exist"),
    ({"dataset_type": "hub"}, "needs path"),
]


@pytest.mark.parametrize(("arguments", "message"), WRONG)
def test_wrong_arguments_are_refused_at_once(tokenizer, arguments, message):
    with pytest.raises(ValueError, match=message):
        load_corpus(tokenizer=tokenizer, **arguments)


@pytest.mark.parametrize("dataset_type", ["pydoc", "needle", "text"])
def test_text_needs_a_tokenizer(tmp_path, dataset_type):
    path = write(tmp_path / "a.txt", TEXT) if dataset_type == "text" else None
    with pytest.raises(ValueError, match="tokenizer"):
        load_corpus(dataset_type, None, path=path, max_documents=1)


def test_a_folder_without_texts_is_refused(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="holds no .txt files"):
        load_corpus("text", tokenizer, path=tmp_path)


def test_documents_check_their_shape():
    with pytest.raises(ValueError, match="two tokens or more"):
        Document("d", np.zeros(1, np.int64))
    with pytest.raises(ValueError, match="same shape"):
        Document("d", np.zeros(3, np.int64), np.zeros(2, bool))


def test_needles_come_through_load_corpus_under_both_names(tokenizer):
    streams = [
        load_corpus(name, tokenizer, seq_length=200, max_documents=3, seed=5) for name in ("needle", "synthetic")
    ]
    for first, second in zip(*(islice(stream, 3) for stream in streams), strict=True):
        np.testing.assert_array_equal(first.input_ids, second.input_ids)
