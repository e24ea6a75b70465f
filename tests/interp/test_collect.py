"""A run holds what the model computed, however the work was cut into segments, batches, processes and attempts."""

import threading

import numpy as np
import pytest
import torch

from interp.bucketing import bucket_tokens
from interp.collect import _fingerprint, collect
from interp.corpora import Document, load_corpus
from interp.freezing import Freezing, freezing_multiplier
from interp.reader import evaluation_mode, read_batch
from interp.run_folder import read_run
from tests.interp.tiny_corpus import make_model, make_tokenizer

LENGTHS = (37, 5, 50, 16, 2)
FREEZING = [Freezing("all", (0, 1)), Freezing("1", (1,))]
TEXT = "The king and the queen saw the king. Then the 3 kings of naïve Köln went and — the end. " * 3


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.fixture(scope="module")
def model(tokenizer):
    torch.manual_seed(0)
    return make_model(tokenizer, torch.float64).eval()


@pytest.fixture(scope="module")
def documents(tokenizer):
    ids = np.array(tokenizer(TEXT)["input_ids"])
    rows = [ids[i : i + length] for i, length in enumerate(LENGTHS)]
    masks = [np.arange(length) >= length - 3 if i == 2 else None for i, length in enumerate(LENGTHS)]
    return [Document(f"d{i}", row, mask) for i, (row, mask) in enumerate(zip(rows, masks, strict=True))]


@pytest.fixture(scope="module")
def whole(tokenizer, model, documents, tmp_path_factory):
    """One document at a time, each in one segment."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    collect(model, tokenizer, documents, folder, segment_length=100, freezing=FREEZING, seed=3)
    return read_run(folder)


def assert_same_run(run, expected):
    losses = run.tokens["loss"], expected.tokens["loss"]
    np.testing.assert_allclose(*losses, rtol=1e-6)
    np.testing.assert_allclose(run.plasticity, expected.plasticity, rtol=1e-6, atol=1e-12)
    np.testing.assert_allclose(run.loss_frozen, expected.loss_frozen, rtol=1e-6)
    assert run.tokens.drop(columns="loss").equals(expected.tokens.drop(columns="loss"))
    assert run.meta["documents"] == expected.meta["documents"]
    for name in ("documents", "tokens", "mean_loss", "nats_per_byte"):
        assert run.meta["totals"][name] == pytest.approx(expected.meta["totals"][name], rel=1e-6)


def test_loss_and_plasticity_are_those_of_one_plain_pass(model, documents, whole):
    for index, document in enumerate(documents):
        rows = (whole.tokens["document"] == index).to_numpy()
        with torch.no_grad():
            output = model(torch.tensor(document.input_ids)[None])
            frozen = model(torch.tensor(document.input_ids)[None], ttt_lr_mult=torch.zeros(1, 1, 1, 1))
        for logits, loss in (
            (output.logits, whole.tokens["loss"][rows].to_numpy()),
            (frozen.logits, whole.loss_frozen[rows, 0]),
        ):
            surprisal = -logits[0].log_softmax(-1)[np.arange(len(loss) - 1), document.input_ids[1:]]
            assert np.isnan(loss[0])
            np.testing.assert_allclose(loss[1:], surprisal.numpy(), rtol=1e-6)
        norms = np.stack([layer[0].square().sum(0).sqrt().numpy() for layer in output.plasticity], axis=1)
        np.testing.assert_allclose(whole.plasticity[rows], norms, rtol=1e-6)
    assert (whole.plasticity > 0).all()


def test_token_columns_are_those_of_the_documents(tokenizer, documents, whole):
    tokens = whole.tokens
    assert tokens["token_id"].tolist() == np.concatenate([d.input_ids for d in documents]).tolist()
    assert tokens["position"].tolist() == [i for length in LENGTHS for i in range(length)]
    answers = tokens.loc[tokens["is_answer"], ["document", "position"]]
    assert answers.to_numpy().tolist() == [[2, 47], [2, 48], [2, 49]]
    for index, document in enumerate(documents):
        rows = tokens[tokens["document"] == index]
        buckets = bucket_tokens(document.input_ids, tokenizer)
        assert rows["bucket"].tolist() == buckets.labels.tolist()
        assert rows["word_id"].tolist() == buckets.word_id.tolist()
        assert rows["is_word_start"].tolist() == buckets.is_word_start.tolist()
    first = tokens[tokens["document"] == 0]["token"].tolist()
    assert first[0] == "<s>" and "".join(first[1:]) == TEXT[: len("".join(first[1:]))]


def test_incomplete_characters_are_shown_as_replacement(tokenizer, model, tmp_path):
    document = Document("d", np.array(tokenizer("aö")["input_ids"]))
    collect(model, tokenizer, [document], tmp_path)
    assert read_run(tmp_path).tokens["token"].tolist() == ["<s>", "a", "\ufffd", "\ufffd"]


def test_run_json_says_what_was_run(tokenizer, model, documents, whole):
    meta, losses = whole.meta, whole.tokens["loss"].dropna()
    assert meta["model"]["ttt_layers"] == [0, 1] and meta["model"]["mini_batch_size"] == 4
    assert meta["model"]["dtype"] == "float64" and meta["model"]["num_heads"] == 2
    assert meta["freezing"] == [{"name": "all", "layers": [0, 1]}, {"name": "1", "layers": [1]}]
    sizes = [len(tokenizer.decode(d.input_ids[1:]).encode()) for d in documents]
    assert meta["documents"][1] == {"document": 1, "name": "d1", "tokens": 5, "bytes": sizes[1]}
    assert [entry["bytes"] for entry in meta["documents"]] == sizes
    assert meta["totals"]["mean_loss"] == pytest.approx(losses.mean(), rel=1e-6)
    assert meta["totals"]["mean_loss_frozen"] == pytest.approx(
        np.nanmean(whole.loss_frozen, axis=0).tolist(), rel=1e-6
    )
    assert meta["totals"]["nats_per_byte"] == pytest.approx(losses.sum() / sum(sizes), rel=1e-6)
    assert meta["bucketing"]["stop_words"] == "en" and meta["seed"] == 3 and meta["versions"]["torch"]
    assert len(meta["model"]["config_hash"]) == 64
    assert [meta["model"][key] for key in ("frozen_layers", "frozen_heads", "frozen_from")] == [[], {}, None]


def test_run_json_says_what_the_configuration_freezes(tokenizer, documents, tmp_path):
    settings = {"frozen_layers": [1], "frozen_heads": {0: [1]}, "frozen_from": 30}
    collect(make_model(tokenizer, **settings), tokenizer, documents[:1], tmp_path)
    run = read_run(tmp_path)
    assert {key: run.meta["model"][key] for key in settings} == {**settings, "frozen_heads": {"0": [1]}}
    assert (run.plasticity[:30, 0] > 0).all() and (run.plasticity[30:] == 0).all()


def test_words_count_as_seen_across_special_tokens_inside_a_document(tokenizer, model, tmp_path):
    ids = np.array([0, *tokenizer("king", add_special_tokens=False)["input_ids"]])
    collect(model, tokenizer, [Document("packed", np.concatenate([ids, ids]))], tmp_path)
    buckets = read_run(tmp_path).tokens["bucket"].tolist()
    assert buckets == [3, 2, 2, 2, 2, 3, 1, 1, 1, 1]


@pytest.mark.parametrize("segment_length", [1, 3, 16, 49])
def test_segments_do_not_change_the_tables(tokenizer, model, documents, whole, tmp_path, segment_length):
    collect(model, tokenizer, documents, tmp_path, segment_length=segment_length, freezing=FREEZING)
    assert_same_run(read_run(tmp_path), whole)


@pytest.mark.parametrize(("batch_size", "segment_length"), [(2, 100), (5, 7), (3, 4)])
def test_padded_batches_equal_single_documents(
    tokenizer, model, documents, whole, tmp_path, batch_size, segment_length
):
    sizes = {"batch_size": batch_size, "segment_length": segment_length}
    collect(model, tokenizer, documents, tmp_path, freezing=FREEZING, **sizes)
    assert_same_run(read_run(tmp_path), whole)


@pytest.mark.parametrize("world_size", [2, 7])
def test_several_processes_equal_one(tokenizer, model, documents, whole, tmp_path, world_size):
    barrier, failures = threading.Barrier(world_size, timeout=60), []

    def work(rank):
        try:
            ranks = {"rank": rank, "world_size": world_size, "barrier": barrier.wait}
            collect(model, tokenizer, documents, tmp_path, batch_size=2, freezing=FREEZING, **ranks)
        except Exception as failure:
            failures.append(failure)
            barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(world_size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not failures
    run = read_run(tmp_path)
    assert run.meta["num_shards"] == world_size == len(list(tmp_path.glob("tokens-*.parquet")))
    assert_same_run(run, whole)


def interrupted(documents, after):
    yield from documents[:after]
    raise RuntimeError("the machine stopped")


def test_an_interrupted_run_goes_on_where_it_stopped(tokenizer, model, documents, whole, tmp_path):
    common = {"folder": tmp_path, "segment_length": 100, "freezing": FREEZING, "seed": 3}
    with pytest.raises(RuntimeError, match="stopped"):
        collect(model, tokenizer, interrupted(documents, 3), **common)
    with pytest.raises(ValueError, match="interrupted run"):
        read_run(tmp_path)
    with pytest.raises(ValueError, match="resume or overwrite"):
        collect(model, tokenizer, documents, **common)
    with pytest.raises(ValueError, match="seed: 3 -> 4"):
        collect(model, tokenizer, documents, **{**common, "seed": 4}, resume=True)
    with pytest.raises(ValueError, match="cannot resume: the interrupted run read"):
        collect(model, tokenizer, documents[1:], **common, resume=True)
    calls = []
    handle = model.register_forward_pre_hook(lambda *_: calls.append(1))
    collect(model, tokenizer, documents, **common, resume=True)
    handle.remove()
    assert len(calls) == 2 * (1 + len(FREEZING))
    assert_same_run(read_run(tmp_path), whole)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["run.json", "tokens-00000-of-00001.parquet"]


def test_a_run_does_not_go_on_with_other_weights(tokenizer, model, documents, tmp_path):
    with pytest.raises(RuntimeError, match="stopped"):
        collect(model, tokenizer, interrupted(documents, 2), tmp_path)
    torch.manual_seed(0)
    other = make_model(tokenizer, torch.float64).eval()
    begun = collect(other, tokenizer, documents, tmp_path / "same")
    with torch.no_grad():
        other.model.norm.weight[3] += 1e-6
    with pytest.raises(ValueError, match="cannot resume with other arguments .model.weights_fingerprint: "):
        collect(other, tokenizer, documents, tmp_path, resume=True)
    collect(model, tokenizer, documents, tmp_path, resume=True)
    fingerprints = {read_run(folder).meta["model"]["weights_fingerprint"] for folder in (tmp_path, begun.parent)}
    assert len(fingerprints) == 1


def test_the_fingerprint_sees_every_parameter_of_any_dtype(tokenizer):
    model = make_model(tokenizer).to(torch.bfloat16)
    prints = {_fingerprint(model)}
    for parameter in model.parameters():
        with torch.no_grad():
            parameter.add_(1)
        prints.add(_fingerprint(model))
    assert len(prints) == 1 + len(list(model.parameters()))
    assert _fingerprint(model.to("meta")) == _fingerprint(make_model(tokenizer).to("meta"))


def broken(documents):
    raise ValueError("this corpus cannot be read")
    yield from documents


def test_a_run_that_fails_before_its_first_batch_does_not_block_the_next(tokenizer, model, documents, tmp_path):
    small = make_model(tokenizer, vocab_size=50)
    folder = tmp_path / "run"
    with pytest.raises(ValueError, match="cannot be read"):
        collect(model, tokenizer, broken(documents), folder)
    assert not folder.exists()
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        collect(small, tokenizer, documents, folder)
    collect(model, tokenizer, documents[:1], folder)
    with pytest.raises(ValueError, match="outside the model's vocabulary"):
        collect(small, tokenizer, documents, folder, overwrite=True)
    assert read_run(folder).meta["totals"]["documents"] == 1


def test_two_freezings_of_one_name_are_refused(tokenizer, model, documents, tmp_path):
    with pytest.raises(ValueError, match=r"must differ, got \['1', '1'\]"):
        collect(model, tokenizer, documents, tmp_path, freezing=[FREEZING[1], FREEZING[1]])


def test_no_call_is_longer_than_a_segment(tokenizer, model, documents, tmp_path):
    lengths = []
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: lengths.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    collect(model, tokenizer, documents, tmp_path, segment_length=16)
    handle.remove()
    assert max(lengths) == 16 and sum(lengths) == sum(LENGTHS)


def test_a_frozen_layer_has_no_plasticity_and_changes_the_loss(model, documents, whole):
    row = documents[0].input_ids
    (free,) = read_batch(model, [row])
    (frozen,) = read_batch(model, [row], lr_mult=freezing_multiplier(FREEZING[1], [0, 1]))
    assert (frozen.plasticity[:, 1] == 0).all()
    np.testing.assert_array_equal(frozen.plasticity[:, 0], free.plasticity[:, 0])
    rows = (whole.tokens["document"] == 0).to_numpy()
    np.testing.assert_allclose(whole.loss_frozen[rows, 1], frozen.loss, rtol=1e-6)
    # Token 2 is the first that can be predicted by weights that token 1 and 0 have changed or not.
    assert (np.abs(whole.loss_frozen[rows, 1] - whole.tokens["loss"][rows])[2:] > 0).mean() > 0.9


def test_training_mode_is_given_back(tokenizer, documents, tmp_path):
    torch.manual_seed(0)
    model = make_model(tokenizer).train()
    model.model.norm.eval()
    collect(model, tokenizer, documents[:1], tmp_path / "a")
    assert model.training and model.lm_head.training and not model.model.norm.training
    with pytest.raises(RuntimeError), evaluation_mode(model):
        assert not model.training
        raise RuntimeError
    assert model.training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_bfloat16_model_gives_float32_tables(tokenizer, model, documents, whole, tmp_path):
    torch.manual_seed(0)
    half = make_model(tokenizer, torch.float64).to(torch.bfloat16)
    collect(half, tokenizer, documents, tmp_path, freezing=FREEZING, segment_length=16)
    run = read_run(tmp_path)
    assert run.meta["model"]["dtype"] == "bfloat16" and run.tokens["loss"].dtype == np.float32
    assert run.meta["totals"]["mean_loss"] == pytest.approx(whole.meta["totals"]["mean_loss"], rel=0.02)


def test_a_needle_run_marks_its_answers(tokenizer, model, tmp_path):
    documents = load_corpus("needle", tokenizer, seq_length=100, max_documents=2)
    collect(model, tokenizer, documents, tmp_path)
    tokens = read_run(tmp_path).tokens
    assert tokens.groupby("document")["is_answer"].sum().tolist() == [8, 8]


def test_what_cannot_be_collected_is_refused(tokenizer, model, documents, tmp_path):
    other = torch.nn.Linear(2, 2)
    other.config = type("Config", (), {"layer_types": ["full_attention"], "model_type": "llama"})()
    for arguments, message in [
        ((model, None, documents), "tokenizer is needed"),
        ((other, tokenizer, documents), "not a TTT model: the configuration 'llama'"),
        ((model, tokenizer, []), "no documents"),
    ]:
        with pytest.raises(ValueError, match=message):
            collect(*arguments, tmp_path, overwrite=True)
    with pytest.raises(ValueError, match="batch_size must be at least 1"):
        collect(model, tokenizer, documents, tmp_path, batch_size=0)
    with pytest.raises(ValueError, match="segment_length must be at least 1"):
        collect(model, tokenizer, documents, tmp_path, segment_length=0, overwrite=True)
    small = make_model(tokenizer, vocab_size=50)
    with pytest.raises(ValueError, match="outside the model's vocabulary of 50"):
        collect(small, tokenizer, documents, tmp_path, overwrite=True)
