"""Checks pass on a healthy run, and each fails, with the numbers, on what it is there for."""

import dataclasses
import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from interp.checks import (
    CheckResult,
    check_active_layers,
    check_buckets_differ,
    check_buckets_present,
    check_decay,
    check_finite,
    check_freezing,
    check_partition,
    check_shapes,
    check_totals,
    run_checks,
)
from interp.run_folder import META_FILE
from interp.statistics import Bootstrap, bucket_contrast
from interp.wording import excludes
from tests.interp.planted_run import planted_run

BOOT = Bootstrap(n_boot=200)
EFFECTS = {"bucket_factor": (1, 1.3, 1.6, 0.8), "early_factor": 2.0}


@pytest.fixture
def run(tmp_path):
    return planted_run(tmp_path / "run", **EFFECTS)


def changed(run, rows, **columns):
    tokens = run.tokens.copy()
    for name, value in columns.items():
        tokens.loc[rows, name] = np.asarray(value, dtype=tokens[name].dtype)
    return dataclasses.replace(run, tokens=tokens)


def with_meta(run, key, **values):
    return dataclasses.replace(run, meta={**run.meta, key: {**run.meta[key], **values}})


def test_a_healthy_run_passes_everything(run):
    results = run_checks(run.path, require_decay=True, boot=BOOT)
    assert all(result.passed for result in results), results
    assert len({result.name for result in results}) == len(results) == 11
    assert "2,048 tokens of 4 documents" in results[1].message


@pytest.mark.parametrize(
    "damage",
    [
        lambda path: (path / META_FILE).unlink(),
        lambda path: (path / META_FILE).write_text("{"),
        lambda path: (path / "tokens-00000-of-00001.parquet").write_bytes(b"PAR1 not parquet"),
        lambda path: (path / "tokens-00000-of-00001.parquet").unlink(),
    ],
)
def test_a_damaged_folder_is_one_failed_check_that_names_it(run, damage):
    damage(run.path)
    (result,) = run_checks(run.path)
    assert result.name == "folder" and result.failed
    assert str(run.path) in result.message and "Traceback" not in result.message


def test_a_folder_that_is_not_there_fails(tmp_path):
    assert [result.failed for result in run_checks(tmp_path / "absent")] == [True]


def test_shapes_must_be_those_of_run_json(run):
    assert check_shapes(run).passed
    assert (
        "plasticity is [2048, 1]" in check_shapes(dataclasses.replace(run, plasticity=run.plasticity[:, :1])).message
    )
    assert not check_shapes(dataclasses.replace(run, loss_frozen=run.loss_frozen[:, :1])).passed
    short = dataclasses.replace(run, tokens=run.tokens[run.tokens["position"] < 1])
    assert "fewer than 2 tokens" in check_shapes(short).message


@pytest.mark.parametrize("value", [np.nan, np.inf, -1.0])
def test_values_that_are_not_finite_or_negative_are_located(run, value):
    plasticity = run.plasticity.copy()
    plasticity[515, 1] = value
    result = check_finite(dataclasses.replace(run, plasticity=plasticity))
    assert not result.passed
    assert "plasticity of layer 1 has 1 values" in result.message and "document 1, position 3" in result.message
    assert "loss has 1 values" in check_finite(changed(run, 7, loss=value)).message
    frozen = run.loss_frozen.copy()
    frozen[9, 1] = value
    assert "loss frozen 'first'" in check_finite(dataclasses.replace(run, loss_frozen=frozen)).message


def test_the_first_token_has_no_loss(run):
    assert "not defined" in check_finite(changed(run, 512, loss=1.0)).message


def test_not_finite_values_end_the_checks_of_a_folder(tmp_path):
    run = planted_run(tmp_path / "run", frozen_cost=np.nan)
    assert [result.name for result in run_checks(run.path) if result.failed] == ["finite values"]


@pytest.mark.parametrize(
    ("rows", "columns", "words"),
    [
        (3, {"bucket": 7}, "1 tokens have no bucket, first value 7"),
        ([5, 6], {"word_id": 5, "bucket": [1, 2]}, "1 words have tokens of different buckets"),
        (8, {"word_id": -1, "bucket": 1}, "1 tokens outside words are not OTHER"),
        (512, {"bucket": 1}, "documents [1] begin with a RETRIEVAL word"),
    ],
)
def test_buckets_must_be_a_partition_into_words(run, rows, columns, words):
    assert check_partition(run).passed
    result = check_partition(changed(run, rows, **columns))
    assert not result.passed and words in result.message


def test_an_empty_bucket_fails(run):
    without = changed(run, run.tokens["bucket"] == 1, bucket=2)
    assert check_buckets_present(without).message == "no token is RETRIEVAL"
    assert not check_buckets_present(without).passed
    assert check_buckets_present(changed(run, run.tokens["bucket"] == 3, bucket=0)).passed


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"mean_loss": 1.0}, "mean_loss: run.json has 1.0"),
        ({"mean_loss": None}, "mean_loss: run.json has None"),
        ({"documents": 3}, "documents: run.json has 3, the tokens give 4"),
        ({"mean_loss_frozen": [0.0, 0.0]}, "mean_loss_frozen of 'first'"),
        ({"mean_loss_frozen": [None, None]}, "mean_loss_frozen of 'all': run.json has None"),
        ({"nats_per_byte": 0.1}, "nats_per_byte: run.json has 0.1"),
        ({"nats_per_byte": None}, "nats_per_byte: run.json has None"),
    ],
)
def test_totals_must_agree_with_the_tokens(run, values, words):
    assert check_totals(run).passed
    result = check_totals(with_meta(run, "totals", **values))
    assert not result.passed and words in result.message


def test_nats_per_byte_rest_on_the_bytes_of_the_documents(run):
    documents = [{**entry, "bytes": entry["bytes"] + 100} for entry in run.meta["documents"]]
    other = dataclasses.replace(run, meta={**run.meta, "documents": documents})
    assert "nats_per_byte" in check_totals(other).message
    none = dataclasses.replace(run, meta={**run.meta, "documents": [{**e, "bytes": 0} for e in documents]})
    assert "its documents have no bytes" in check_totals(none).message


def test_a_layer_that_never_writes_must_be_a_frozen_one(tmp_path):
    run = planted_run(tmp_path / "run", silent_layers=[1])
    assert "layer 1 has plasticity 0 at all 2,048 tokens" in check_active_layers(run).message
    assert check_active_layers(with_meta(run, "model", frozen_layers=[1])).passed
    both = check_active_layers(with_meta(run, "model", frozen_layers=[0, 1]))
    assert not both.passed and "layer 0 is frozen but has plasticity" in both.message


def test_what_the_model_has_frozen_may_not_write(tmp_path):
    silent = planted_run(tmp_path / "silent", silent_layers=[1])
    assert check_active_layers(with_meta(silent, "model", frozen_heads={"1": [0, 1]})).passed
    assert (
        "layer 1 has plasticity 0" in check_active_layers(with_meta(silent, "model", frozen_heads={"1": [0]})).message
    )
    nothing = planted_run(tmp_path / "nothing", silent_layers=[0, 1])
    assert check_active_layers(with_meta(nothing, "model", frozen_from=0)).passed
    assert "frozen from token 100 but" in check_active_layers(with_meta(silent, "model", frozen_from=100)).message
    silent.plasticity[silent.tokens["position"] >= 100] = 0
    assert check_active_layers(with_meta(silent, "model", frozen_from=100, frozen_layers=[1])).passed


@pytest.mark.parametrize(
    "frozen", [{"frozen_layers": [0, 1]}, {"frozen_heads": {"0": [0, 1], "1": [1, 0]}}, {"frozen_from": 0}]
)
def test_freezing_what_the_model_has_frozen_already_changes_nothing(run, frozen):
    same = np.repeat(run.tokens["loss"].to_numpy()[:, None], 2, axis=1)
    assert check_freezing(with_meta(dataclasses.replace(run, loss_frozen=same), "model", **frozen)).passed
    assert (
        "only layers that are frozen already but changes" in check_freezing(with_meta(run, "model", **frozen)).message
    )


def test_freezing_must_change_the_loss_and_nothing_else(run):
    assert check_freezing(run).passed
    same = np.repeat(run.tokens["loss"].to_numpy()[:, None], 2, axis=1)
    assert "'all' changes no loss at all" in check_freezing(dataclasses.replace(run, loss_frozen=same)).message
    nothing = dataclasses.replace(run, freezing=[{"name": "none", "layers": []}] * 2)
    assert "freezes nothing but changes a loss" in check_freezing(nothing).message
    unknown = dataclasses.replace(run, freezing=[{"name": "late", "layers": [9]}] * 2)
    assert "no TTT layers" in check_freezing(unknown).message


def test_buckets_that_cannot_be_told_apart_fail_unless_allowed(tmp_path):
    run = planted_run(tmp_path / "run")
    result = next(r for r in run_checks(run.path, boot=BOOT) if r.name == "buckets differ")
    assert result.failed and result.message.startswith("0 of 18 pairs told apart at like positions, at 95%")
    assert not any(r.failed for r in run_checks(run.path, require_buckets=False, boot=BOOT))


def test_buckets_that_differ_by_position_alone_are_not_told_apart(tmp_path):
    run = planted_run(tmp_path / "run", documents=24, position_only=True)
    raw = bucket_contrast(run.plasticity, run.tokens["bucket"], run.tokens["document"], boot=BOOT)
    assert excludes(raw.set_index(["layer", "bucket_a", "bucket_b"]).loc[0, "NOVELTY", "SYNTAX"], "ratio", 1.0)
    result = check_buckets_differ(run, boot=BOOT)
    assert not result.passed and "over all positions 1." in result.message


def test_a_difference_beyond_position_is_told_apart(tmp_path):
    run = planted_run(tmp_path / "run", documents=24, position_only=True, bucket_factor=(1, 1, 1.2, 1))
    assert check_buckets_differ(run, boot=BOOT).passed


def test_one_layer_with_a_difference_is_enough(tmp_path):
    run = planted_run(tmp_path / "run")
    plasticity = run.plasticity.copy()
    plasticity[run.tokens["bucket"] == 2, 1] *= 2  # too small a layer to show in the pooled norm
    message = check_buckets_differ(dataclasses.replace(run, plasticity=plasticity), boot=BOOT).message
    assert "layer 1: 3 of 6 pairs told apart" in message and "layer 0: 0 of 6" in message


@pytest.mark.parametrize(
    ("early", "passed", "word"), [(2.0, True, "falls"), (0.5, False, "rises"), (1.0, False, "no change")]
)
def test_decay_is_a_finding_in_either_direction(tmp_path, early, passed, word):
    run = planted_run(tmp_path / "run", early_factor=early)
    results = list(check_decay(run, boot=BOOT))
    assert [(r.name, r.passed) for r in results] == [("decay first/last", passed), ("decay first/steady", passed)]
    assert all(word in r.message and not r.failed for r in results)


def test_decay_fails_a_run_only_when_required(tmp_path):
    run = planted_run(tmp_path / "run", bucket_factor=EFFECTS["bucket_factor"])
    assert not any(r.failed for r in run_checks(run.path, boot=BOOT))
    assert [r.name for r in run_checks(run.path, require_decay=True, boot=BOOT) if r.failed] == ["decay first/last"]


def test_short_documents_have_no_decay_to_check(tmp_path):
    results = list(check_decay(planted_run(tmp_path / "run", tokens=150), boot=BOOT))
    assert all("no document has 200 tokens" in r.message for r in results)


def test_a_finding_cannot_fail():
    assert not CheckResult("x", False, "", required=False).failed and CheckResult("x", False, "").failed


@pytest.mark.parametrize(
    ("key", "name", "value"),
    [
        ("totals", "mean_loss_frozen", 5),
        ("totals", "mean_loss_frozen", []),
        ("model", "frozen_layers", 5),
        ("model", "ttt_layers", ["a", "b"]),
        ("model", "mini_batch_size", None),
        ("freezing", 0, {"name": "all", "layers": 3}),
        ("freezing", 0, {"name": "all", "layers": [[1]]}),
        ("documents", 0, {"document": 0, "name": "d", "tokens": 512.7, "bytes": 1}),
    ],
)
def test_malformed_entries_fail_instead_of_raising(run, key, name, value):
    meta = json.loads((run.path / META_FILE).read_text())
    meta[key][name] = value
    (run.path / META_FILE).write_text(json.dumps(meta))
    (result,) = run_checks(run.path, boot=BOOT)
    assert result.failed and result.name == "folder" and key in result.message


def test_a_failed_partition_ends_the_checks_of_a_folder(run):
    file = run.path / "tokens-00000-of-00001.parquet"
    table = pq.read_table(file)
    bucket = table.column("bucket").to_numpy().copy()
    bucket[10] = 7
    pq.write_table(table.set_column(4, "bucket", pa.array(bucket)), file)
    results = run_checks(run.path, boot=BOOT)
    assert [r.name for r in results if r.failed] == ["bucket partition"] == [results[-1].name]
    assert "first value 7" in results[-1].message
