"""The run folder keeps what is written, replaces runs only by finished ones and refuses damaged folders."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from interp.run_folder import RunFolder, read_run, shard_name, token_table
from tests.interp.planted_run import run_meta


def make_table(document, length=4, layers=2, frozen=1, seed=0):
    rng = np.random.default_rng(seed + document)
    loss = rng.random(length, np.float32)
    loss[0] = np.nan
    columns = {
        "document": np.full(length, document),
        "position": np.arange(length),
        "token_id": rng.integers(0, 50, length),
        "token": [f"t{i}\ufffd" for i in range(length)],
        "bucket": rng.integers(0, 4, length),
        "word_id": np.arange(length) - 1,
        "is_word_start": np.arange(length) % 2 == 0,
        "is_answer": np.zeros(length, bool),
        "loss": loss,
    }
    return token_table(columns, rng.random((length, layers), np.float32), rng.random((length, frozen), np.float32))


def make_meta(documents, frozen=1):
    table = pa.concat_tables([make_table(i, frozen=frozen) for i in documents])
    return run_meta(table, [{"name": "all", "layers": [0, 1]}] * frozen)


def write_shard(folder, table, rank=0, world_size=1):
    folder.write_part(table, 0, rank, world_size)
    folder.merge_parts(rank, world_size)


def write_run(path, documents=(0, 1), world_size=1, frozen=1, **create):
    folder = RunFolder.create(path, **create)
    for rank in range(world_size):
        mine = [make_table(i, frozen=frozen) for i in documents[rank::world_size]]
        write_shard(folder, pa.concat_tables(mine), rank, world_size)
    folder.finish(make_meta(documents, frozen=frozen), world_size)
    return path


def test_what_is_written_is_read_back(tmp_path):
    run = read_run(write_run(tmp_path / "run"))
    wanted = pa.concat_tables([make_table(0), make_table(1)])
    for name in run.tokens:
        np.testing.assert_array_equal(run.tokens[name].to_numpy(), wanted.column(name).to_numpy(), err_msg=name)
    np.testing.assert_array_equal(run.plasticity, np.array(wanted.column("plasticity").to_pylist(), np.float32))
    np.testing.assert_array_equal(run.loss_frozen, np.array(wanted.column("loss_frozen").to_pylist(), np.float32))
    assert run.plasticity.dtype == run.loss_frozen.dtype == np.float32
    assert run.ttt_layers == [0, 1] and run.freezing == [{"name": "all", "layers": [0, 1]}]
    assert run.meta["schema_version"] == 1 and run.meta["created"].endswith("+00:00")


def test_the_number_of_shards_does_not_change_the_run(tmp_path):
    one = read_run(write_run(tmp_path / "one", documents=range(5)))
    three = read_run(write_run(tmp_path / "three", documents=range(5), world_size=3))
    assert three.meta["num_shards"] == 3
    assert one.tokens.equals(three.tokens)
    np.testing.assert_array_equal(one.plasticity, three.plasticity)
    np.testing.assert_array_equal(one.loss_frozen, three.loss_frozen)


def test_without_freezing_the_column_is_absent(tmp_path):
    path = write_run(tmp_path / "run", frozen=0)
    assert "loss_frozen" not in pq.read_schema(path / shard_name(0, 1)).names
    assert read_run(path).loss_frozen.shape == (8, 0)


def test_a_finished_folder_holds_the_agreed_files_only(tmp_path):
    folder = RunFolder.create(tmp_path / "run")
    for index in (1, 0):
        folder.write_part(make_table(index), index, notes={"seconds": index})
    assert folder.read_parts() == {0: {"seconds": 0}, 1: {"seconds": 1}}
    folder.merge_parts()
    assert folder.read_parts() == {0: {"seconds": 0}, 1: {"seconds": 1}}
    assert folder.read_notes() == [[{"seconds": 0}, {"seconds": 1}]]
    folder.merge_parts()
    folder.finish(make_meta((0, 1)))
    assert sorted(file.name for file in folder.path.iterdir()) == [
        "run.json",
        "tokens-00000-of-00001.parquet",
    ]
    assert read_run(folder.path).tokens["document"].tolist() == [0] * 4 + [1] * 4


def test_a_finished_run_is_replaced_by_a_finished_run_only(tmp_path):
    path = write_run(tmp_path / "run", world_size=2)
    with pytest.raises(ValueError, match="already holds a finished run"):
        RunFolder.create(path)
    with pytest.raises(ValueError, match="already holds a finished run"):
        RunFolder.create(path, resume=True)
    folder = RunFolder.create(path, overwrite=True)
    assert read_run(path).meta["num_shards"] == 2
    write_shard(folder, make_table(7))
    assert set(read_run(path).tokens["document"]) == {0, 1}
    folder.finish(make_meta((7,)))
    assert set(read_run(path).tokens["document"]) == {7}


def test_an_interrupted_run_is_resumed_with_the_same_arguments_only(tmp_path):
    first = RunFolder.create(tmp_path, arguments={"seq_length": 64, "dtype": "float32"})
    first.write_part(make_table(0), 0)
    with pytest.raises(ValueError, match="interrupted run"):
        RunFolder.create(tmp_path)
    with pytest.raises(ValueError, match=r"seq_length: 64 -> 32"):
        RunFolder.create(tmp_path, arguments={"seq_length": 32, "dtype": "float32"}, resume=True)
    again = RunFolder.create(tmp_path, arguments={"seq_length": 64, "dtype": "float32"}, resume=True)
    assert list(again.read_parts()) == [0]
    assert RunFolder.create(tmp_path, overwrite=True).read_parts() == {}


def test_a_refused_resumption_names_the_inner_key_only(tmp_path):
    RunFolder.create(tmp_path, arguments={"model": {"id": "m", "dtype": "float32"}, "seed": 0})
    with pytest.raises(ValueError) as error:
        RunFolder.create(tmp_path, arguments={"model": {"id": "m", "dtype": "float64"}, "seed": 0}, resume=True)
    assert "(model.dtype: 'float32' -> 'float64')" in str(error.value)


def test_only_an_unfinished_run_without_parts_is_discarded(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.discard_empty()
    assert not folder.unfinished.exists()
    folder.discard_empty()
    folder = RunFolder.create(tmp_path)
    folder.write_part(make_table(0), 0, rank=1, world_size=2)
    folder.discard_empty()
    assert list(folder.read_parts(1, 2)) == [0]


def test_a_failed_write_leaves_nothing_behind(tmp_path):
    folder = RunFolder.create(tmp_path)
    folder.write_part(make_table(0), 0)
    folder.write_part(make_table(1, layers=3), 1)
    with pytest.raises(ValueError, match="schema"):
        folder.merge_parts()
    assert not (folder.unfinished / shard_name(0, 1)).exists()
    assert list(folder.read_parts()) == [0, 1]
    assert not list(folder.unfinished.glob(".*"))


def test_finish_demands_every_shard_and_key(tmp_path):
    folder = RunFolder.create(tmp_path)
    write_shard(folder, make_table(0), 0, 2)
    with pytest.raises(ValueError, match="tokens-00001-of-00002.parquet"):
        folder.finish(make_meta((0,)), 2)
    with pytest.raises(ValueError, match="totals"):
        folder.finish({key: value for key, value in make_meta((0,)).items() if key != "totals"})
    with pytest.raises(ValueError, match="JSON compliant"):
        folder.finish(make_meta((0,)) | {"seed": float("nan")}, 1)
    assert not (tmp_path / "run.json").exists()


def test_tables_with_wrong_columns_are_refused(tmp_path):
    good = make_table(0)
    columns = {name: good.column(name).to_pylist() for name in good.column_names[:9]}
    with pytest.raises(ValueError, match="missing \\['loss'\\]"):
        token_table({name: value for name, value in columns.items() if name != "loss"}, np.zeros((4, 2)))
    with pytest.raises(ValueError, match="same length"):
        token_table(columns, np.zeros((3, 2)))
    with pytest.raises(ValueError, match="plasticity must be"):
        token_table(columns, np.zeros(4))


def edit_meta(path, **changes):
    file = path / "run.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def rewrite_shard(path, change):
    file = path / shard_name(0, 1)
    pq.write_table(change(pq.read_table(file)), file)


DAMAGES = {
    "does not exist": lambda path: [file.unlink() for file in path.iterdir()] and path.rmdir(),
    "has no run.json": lambda path: (path / "run.json").unlink(),
    "cannot be read as JSON": lambda path: (path / "run.json").write_text('{"kind": '),
    "does not describe a run": lambda path: edit_meta(path, kind="other"),
    "schema_version 2": lambda path: edit_meta(path, schema_version=2),
    "num_shards must be a positive integer, got '1'": lambda path: edit_meta(path, num_shards="1"),
    "'loss' must be float, got double": lambda path: rewrite_shard(
        path, lambda t: t.set_column(8, "loss", pa.array([0.0] * 8))
    ),
    "not announced": lambda path: (path / shard_name(1, 3)).write_bytes(b""),
    "announces 2 shard": lambda path: edit_meta(path, num_shards=2),
    "cannot be read as parquet": lambda path: (path / shard_name(0, 1)).write_bytes(b"PAR1 not parquet"),
    r"columns \['bucket'\] are missing": lambda path: rewrite_shard(path, lambda t: t.drop_columns(["bucket"])),
    "'plasticity' has 2 entries per token, run.json announces 3": lambda path: edit_meta(
        path, model={**make_meta((0, 1))["model"], "ttt_layers": [0, 1, 2]}
    ),
    "'loss_frozen' has 1 entries per token, run.json announces 0": lambda path: edit_meta(
        path, freezing=[], totals={**make_meta((0, 1))["totals"], "mean_loss_frozen": []}
    ),
    "holds 7 tokens": lambda path: rewrite_shard(path, lambda t: t.slice(1)),
    r"documents \[1\] differ": lambda path: edit_meta(path, documents=make_meta((0, 1))["documents"][:1]),
    "without gaps": lambda path: rewrite_shard(
        path, lambda t: t.set_column(1, "position", pa.array([0, 1, 2, 3, 0, 1, 2, 2], pa.int32()))
    ),
    "contain nulls": lambda path: rewrite_shard(
        path, lambda t: t.set_column(8, "loss", pa.array([None] * 8, pa.float32()))
    ),
}


@pytest.mark.parametrize("message", DAMAGES)
def test_a_damaged_folder_is_refused_with_its_reason(tmp_path, message):
    path = write_run(tmp_path / "run")
    DAMAGES[message](path)
    with pytest.raises(ValueError, match=message):
        read_run(path)


def test_a_truncated_shard_is_refused(tmp_path):
    path = write_run(tmp_path / "run")
    file = path / shard_name(0, 1)
    file.write_bytes(file.read_bytes()[:-20])
    with pytest.raises(ValueError, match="cannot be read as parquet"):
        read_run(path)


def test_an_interrupted_run_is_not_read(tmp_path):
    write_shard(RunFolder.create(tmp_path), make_table(0))
    with pytest.raises(ValueError, match="interrupted run"):
        read_run(tmp_path)


@pytest.mark.parametrize(
    ("name", "shown"),
    [
        ("owner/name", "owner/name"),
        ("model_cards/tiny", "model_cards/tiny"),
        ("/home/someone/mine/", "mine"),
        ("~/mine", "mine"),
        ("C:\\Users\\someone\\mine", "mine"),
        ("../someone/mine", "mine"),
    ],
)
def test_the_name_of_a_model_is_no_local_path(tmp_path, name, shown):
    run = read_run(write_run(tmp_path / "run"))
    run.meta["model"]["id"] = name
    assert run.model_name == shown
