"""A run.json with a missing key or a value of the wrong type is refused, and the message names it."""

import copy

import pytest

from interp.run_meta import KIND, SCHEMA_VERSION, check_meta
from tests.interp.planted_run import planted_run


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    return planted_run(tmp_path_factory.mktemp("run"), tokens=8, documents=2).meta


def test_a_complete_one_passes_and_may_hold_more(whole):
    check_meta(whole, "it")
    check_meta({**whole, "notes": 1, "model": {**whole["model"], "extra": None}}, "it")
    assert (whole["kind"], whole["schema_version"]) == (KIND, SCHEMA_VERSION)


@pytest.mark.parametrize(
    ("path", "value"),
    [
        ("created", None),
        ("arguments", []),
        ("model", []),
        ("model.id", None),
        ("model.revision", 1),
        ("model.config_hash", None),
        ("model.num_parameters", "many"),
        ("model.ttt_layers", []),
        ("model.ttt_layers", 3),
        ("model.ttt_layers", ["a", "b"]),
        ("model.ttt_layers", [0, 0]),
        ("model.ttt_layers", [0, "d"]),
        ("model.frozen_layers", 5),
        ("model.frozen_layers", None),
        ("model.frozen_layers", [-1]),
        ("model.frozen_heads", [0]),
        ("model.frozen_heads", {"a": [0]}),
        ("model.frozen_heads", {"0": 1}),
        ("model.frozen_from", -1),
        ("model.frozen_from", "0"),
        ("model.num_heads", 0),
        ("model.mini_batch_size", None),
        ("model.mini_batch_size", "16"),
        ("model.mini_batch_size", True),
        ("model.dtype", 32),
        ("tokenizer", "gpt2"),
        ("tokenizer.vocab_size", 1.5),
        ("corpus", "x"),
        ("corpus.dataset_type", 3),
        ("documents", {}),
        ("documents", [1]),
        ("documents.0.document", "0"),
        ("documents.0.document", 1),
        ("documents.0.name", None),
        ("documents.0.tokens", 256.7),
        ("documents.0.bytes", None),
        ("bucketing", None),
        ("freezing", [3]),
        ("freezing.0.name", ["x"]),
        ("freezing.0.name", "first"),
        ("freezing.0.layers", 3),
        ("freezing.0.layers", [[1]]),
        ("seed", 0.5),
        ("versions", {"python": 3.11}),
        ("definitions", []),
        ("totals", []),
        ("totals.tokens", 10.0),
        ("totals.mean_loss", "1"),
        ("totals.mean_loss_frozen", 5),
        ("totals.mean_loss_frozen", []),
        ("totals.mean_loss_frozen", ["a", "b"]),
        ("totals.nats_per_byte", True),
        ("totals.seconds", None),
        ("num_shards", True),
        ("num_shards", 0),
    ],
)
def test_wrong_values_are_named(whole, path, value):
    meta = copy.deepcopy(whole)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = meta
    for key in way:
        inner = inner[key]
    inner[last] = value
    with pytest.raises(ValueError, match=f"run.json.*{last}"):
        check_meta(meta, "run.json")


@pytest.mark.parametrize(
    "path",
    [
        *["model.mini_batch_size", "model.frozen_heads", "model.frozen_from", "tokenizer.id", "documents.0.bytes"],
        *["freezing.0.layers", "totals.mean_loss_frozen", "totals.nats_per_byte", "definitions"],
    ],
)
def test_missing_keys_are_named(whole, path):
    meta = copy.deepcopy(whole)
    *way, last = [int(key) if key.isdigit() else key for key in path.split(".")]
    inner = meta
    for key in way:
        inner = inner[key]
    del inner[last]
    with pytest.raises(ValueError, match=str(last)):
        check_meta(meta, "run.json")
