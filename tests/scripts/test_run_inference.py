"""The script turns options into a run folder, on one or several processes, and says in one line what is wrong."""

import os
import re
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from interp.freezing import Freezing
from interp.needle import NeedleOptions
from interp.run_folder import read_run
from tests.interp.tiny_corpus import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]
TEXT = "It was the best of times, and it was the worst of times. " * 40


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def script(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import run_inference

    return run_inference


@pytest.fixture
def infer(script, checkpoint, tmp_path):
    """Runs the script in this process; gives back the run."""

    def run(*options, name="run", model=checkpoint):
        script.main(["--model", str(model), "--exp_dir", str(tmp_path), "--exp_name", name, *map(str, options)])
        return read_run(tmp_path / name)

    return run


@pytest.fixture
def calls(script, monkeypatch):
    """The arguments of what the script calls, by its name; positional ones by their number."""
    made = {}

    def spy(name, result=None):
        def call(*args, **kwargs):
            made[name] = {**dict(enumerate(args)), **kwargs}
            return result

        monkeypatch.setattr(script, name, call)

    spy("load_model", SimpleNamespace(config=SimpleNamespace(layer_types=["ttt", "ttt"])))
    for name in ("load_tokenizer", "load_corpus", "collect", "prepare", "summarise"):
        spy(name)
    return made


PG19, NEEDLE = ("--dataset_type", "pg19"), ("--dataset_type", "needle")
# Of every field of the arguments: options, and the calls, keywords and values that they must lead to.
REACHES = {
    "model": (["--model", "other"], ("load_model", 0, "other"), ("load_tokenizer", 0, "other")),
    "revision": (["--revision", "r"], ("load_model", "revision", "r"), ("load_tokenizer", "revision", "r")),
    "load_model_config": (["--load_model_config", "c"], ("load_model", "config", "c")),
    "config": (["--config", "a=1", "--config", "b=x"], ("load_model", "overrides", {"a": 1, "b": "x"})),
    "trust_remote_code": (
        ["--trust_remote_code"],
        ("load_model", "trust_remote_code", True),
        ("load_tokenizer", "trust_remote_code", True),
    ),
    "tokenizer_name": (["--tokenizer_name", "t"], ("load_tokenizer", 0, "t")),
    "dtype": (["--dtype", "bfloat16"], ("load_model", "dtype", "bfloat16")),
    "device": (["--device", "cuda:1"], ("load_model", "device", "cuda:1")),
    "dataset_type": ([*PG19], ("load_corpus", "dataset_type", "pg19")),
    "dataset_path": (
        ["--dataset_type", "text", "--dataset_path", "a", "b"],
        ("load_corpus", "path", ["a", "b"]),
    ),
    "dataset_config": ([*PG19, "--dataset_config", "c"], ("load_corpus", "config_name", "c")),
    "dataset_split": ([*PG19, "--dataset_split", "test"], ("load_corpus", "split", "test")),
    "text_column": ([*PG19, "--text_column", "body"], ("load_corpus", "text_column", "body")),
    "seq_length": (["--seq_length", "99"], ("load_corpus", "seq_length", 99)),
    "max_chars": ([*PG19, "--max_chars", "500"], ("load_corpus", "max_chars", 500)),
    "pieces_per_text": (["--pieces_per_text", "2"], ("load_corpus", "pieces_per_text", 2)),
    "max_steps": (["--max_steps", "3"], ("load_corpus", "max_documents", 3)),
    "batch_size": (["--batch_size", "4"], ("collect", "batch_size", 4), ("load_corpus", "max_documents", 40)),
    "segment_length": (["--segment_length", "16"], ("collect", "segment_length", 16)),
    "needle_depth": (
        [*NEEDLE, "--needle_depth", "0.5", "1"],
        ("load_corpus", "needle", NeedleOptions(depths=(0.5, 1.0))),
    ),
    "needle_filler": ([*NEEDLE, "--needle_filler", "text"], ("load_corpus", "needle", NeedleOptions(filler="text"))),
    "needle_value_length": (
        [*NEEDLE, "--needle_value_length", "2"],
        ("load_corpus", "needle", NeedleOptions(value_length=2)),
    ),
    "needle_filler_text": (
        [*NEEDLE, "--needle_filler", "text", "--needle_filler_text", "words.txt"],
        ("load_corpus", "needle", NeedleOptions(filler="text", filler_text="it\nwas\n")),
    ),
    "freeze": (
        ["--freeze", "all", "--freeze", "1"],
        ("collect", "freezing", [Freezing("all", (0, 1)), Freezing("1", (1,))]),
    ),
    "stop_words": (["--stop_words", "words.txt"], ("collect", "stop_words", Path("words.txt"))),
    "numbers": (["--numbers", "other"], ("collect", "numbers", "other")),
    "min_lag": (["--min_lag", "4"], ("collect", "min_lag", 4)),
    "stats": (["--stats"], ("collect", "stats", True)),
    "exp_dir": (["--exp_dir", "d"], ("collect", 3, Path("d/x-pydoc")), ("summarise", 0, Path("d/x-pydoc"))),
    "exp_name": (["--exp_name", "n"], ("collect", 3, Path("results/n"))),
    "overwrite": (["--overwrite"], ("collect", "overwrite", True)),
    "resume": (["--resume"], ("collect", "resume", True)),
    "seed": (["--seed", "7"], ("collect", "seed", 7), ("load_corpus", "seed", 7), ("prepare", 0, 7)),
    "quick_test": (
        ["--quick_test", "--batch_size", "3"],
        ("load_corpus", "seq_length", 256),
        ("load_corpus", "max_documents", 2),
    ),
}


@pytest.mark.parametrize("field", REACHES)
def test_every_option_reaches_what_it_is_for(script, calls, tmp_path, monkeypatch, field):
    (tmp_path / "words.txt").write_text("it\nwas\n")
    monkeypatch.chdir(tmp_path)
    options, *expected = REACHES[field]
    model = [] if field == "model" else ["--model", "x"]
    script.main(["--model", "x"])
    assert all(calls[name][key] != value for name, key, value in expected)
    script.main([*model, *options])
    assert [calls[name][key] for name, key, _ in expected] == [value for *_, value in expected]
    assert field in calls["collect"]["arguments"]


def test_no_option_is_without_such_a_test(script):
    assert set(REACHES) == {field.name for field in fields(script.InferenceArguments)}


def test_a_tokenizer_of_its_own_has_no_revision_of_the_model(script, calls):
    script.main(["--model", "x", "--revision", "r", "--tokenizer_name", "t"])
    assert calls["load_tokenizer"]["revision"] is None


def test_a_bundled_stop_list_comes_before_a_file_of_its_name(script, calls, tmp_path, monkeypatch):
    (tmp_path / "en").write_text("it")
    monkeypatch.chdir(tmp_path)
    script.main(["--model", "x", "--stop_words", "en"])
    assert calls["collect"]["stop_words"] == "en"


def test_every_option_reaches_the_run(infer, checkpoint, tmp_path, capsys):
    (tmp_path / "a.txt").write_text(TEXT)
    (tmp_path / "b.txt").write_text(TEXT.upper())
    (tmp_path / "stop.txt").write_text("it\nwas\n")
    run = infer(
        *["--tokenizer_name", checkpoint, "--dtype", "float64", "--device", "cpu", "--dataset_type", "text"],
        *["--dataset_path", tmp_path / "a.txt", tmp_path / "b.txt", "--seq_length", 64, "--max_chars", 500],
        *["--max_steps", 3, "--batch_size", 2, "--segment_length", 10, "--seed", 7, "--min_lag", 4],
        *["--freeze", "all", "--freeze", "0-1", "--freeze", "1", "--stop_words", tmp_path / "stop.txt"],
        *["--numbers", "other", "--config", "ttt_base_lr=0.5", "--config", "rms_norm_eps=1e-5"],
    )
    assert [entry["name"] for entry in run.meta["documents"]][:3] == ["a.txt", "b.txt", "a.txt [1]"]
    assert [entry["tokens"] for entry in run.meta["documents"]] == [64] * 6
    assert [entry["name"] for entry in run.freezing] == ["all", "0-1", "1"]
    np.testing.assert_array_equal(run.loss_frozen[:, 0], run.loss_frozen[:, 1])
    assert run.meta["model"]["dtype"] == "float64" and run.meta["seed"] == 7
    assert run.meta["bucketing"]["stop_words_size"] == 2 and run.meta["bucketing"]["min_lag"] == 4
    assert run.meta["bucketing"]["numbers"] == "other"
    assert run.meta["arguments"]["config"] == ["ttt_base_lr=0.5", "rms_norm_eps=1e-5"]
    printed = capsys.readouterr().out
    assert "6 documents, 384 tokens" in printed
    frozen = re.findall("nats per token with (.*) frozen", printed)
    assert frozen == ["all layers", "layers 0-1", "layer 1"]


def test_overrides_reach_the_model(infer):
    common = ("--quick_test", "--max_steps", 1, "--seq_length", 40)
    plain = infer(*common, name="plain")
    frozen = infer(*common, "--update_model_config", "frozen_layers=1", name="frozen")
    assert (frozen.plasticity[:, 1] == 0).all() and (plain.plasticity > 0).all()
    assert plain.meta["model"]["config_hash"] != frozen.meta["model"]["config_hash"]


def test_defaults_are_those_documented(script, checkpoint):
    arguments = script.parse(script.InferenceArguments, ["--model", str(checkpoint)])
    assert (arguments.seq_length, arguments.max_steps, arguments.batch_size, arguments.seed) == (2048, 10, 1, 0)
    assert (arguments.dataset_type, arguments.dtype, arguments.exp_dir) == ("pydoc", "float32", "results")


def test_names_of_the_earlier_script_are_understood(script):
    old = [
        "--load_checkpoint",
        "m",
        "--global_batch_size",
        "4",
        "--dataset_type",
        "synthetic",
        "--dataset_split",
        "test",
    ]
    arguments = script.parse(script.InferenceArguments, old)
    assert (arguments.model, arguments.batch_size, arguments.dataset_split) == ("m", 4, "test")


def test_quick_test_is_quick(infer):
    run = infer("--quick_test")
    assert [entry["tokens"] for entry in run.meta["documents"]] == [256, 256]


def test_needle_options_reach_the_documents(infer, checkpoint, capsys):
    run = infer(
        *["--dataset_type", "synthetic", "--seq_length", 120, "--max_steps", 4, "--needle_value_length", 2],
        *["--needle_depth", 0, 1, "--needle_filler", "text", "--load_model_config", checkpoint],
    )
    assert run.tokens.groupby("document")["is_answer"].sum().tolist() == [2] * 4
    assert [entry["name"] for entry in run.meta["documents"]][1] == "needle 1 depth 1"
    assert run.meta["corpus"]["needle"]["filler"] == "text"
    assert "nats per answer token" in capsys.readouterr().out


def test_datasets_are_read_by_path(infer, tmp_path):
    pq.write_table(pa.table({"body": [TEXT, TEXT[5:]]}), tmp_path / "books.parquet")
    run = infer(
        *["--dataset_type", "hub", "--dataset_path", tmp_path / "books.parquet", "--text_column", "body"],
        *["--dataset_split", "test", "--seq_length", 50, "--max_steps", 5],
    )
    assert [entry["name"] for entry in run.meta["documents"]] == ["row 0", "row 1"]


def test_a_finished_run_is_only_replaced_on_request(infer):
    common = ("--quick_test", "--max_steps", 1, "--seq_length", 40)
    infer(*common)
    with pytest.raises(ValueError, match="already holds a finished run"):
        infer(*common)
    assert infer(*common, "--seed", 1, "--overwrite").meta["seed"] == 1


@pytest.mark.parametrize(
    "options",
    [["--seq_len", "5"], ["--model_name", "x"], ["stray"], ["--dtype", "int8"], ["--dataset_type", "book"], []],
)
def test_typos_end_with_status_2(script, options):
    model = ["--model", "x"] if options else []
    with pytest.raises(SystemExit) as exit:
        script.main([*model, *options])
    assert exit.value.code == 2


@pytest.mark.parametrize("name", ["..", ".", "a/b", "a\\b", ""])
def test_exp_name_cannot_leave_exp_dir(script, calls, name):
    with pytest.raises(ValueError, match="plain folder name"):
        script.main(["--model", "x", "--exp_name", name])
    assert "collect" not in calls


def test_help_names_each_default_once(script, capsys):
    with pytest.raises(SystemExit):
        script.main(["--help"])
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text and "(default: [])" not in text
    assert not re.search(r"\(default[^)]*\) \(default", text)
    for help in ("every random generator (default: 0)", "(default: 1 for datasets)", "(default: 2048)"):
        assert help in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--max_steps", "0"], "max_steps must be at least 1, got 0"),
        (["--batch_size", "0", "--quick_test"], "batch_size must be at least 1, got 0"),
        (["--needle_depth", "0"], "dataset_type 'pydoc' has no use for needle_depth"),
        (["--text_column", "body"], "dataset_type 'pydoc' has no use for text_column"),
        ([*NEEDLE, "--dataset_config", "c", "--max_chars", "9"], "no use for dataset_config, max_chars"),
        (["--dataset_type", "text"], "dataset_type 'text' needs dataset_path"),
        (["--freeze", "foo"], "'all' or a choice of layers"),
    ],
)
def test_wrong_options_are_refused_by_their_names(script, calls, options, message):
    with pytest.raises(ValueError, match=message):
        script.main(["--model", "x", *options])
    assert "collect" not in calls


def test_a_binary_file_is_named(script, calls, tmp_path):
    file = tmp_path / "noise.bin"
    file.write_bytes(b"\xff\x00")
    with pytest.raises(ValueError, match="noise.bin' is not UTF-8"):
        script.main(["--model", "x", *NEEDLE, "--needle_filler", "text", "--needle_filler_text", str(file)])


def test_the_same_freezing_twice_is_refused(infer):
    with pytest.raises(ValueError, match=r"names in freezing must differ, got \['all', 'all'\]"):
        infer("--quick_test", "--freeze", "all", "all")


def test_too_few_documents_are_a_warning_that_names_the_limits(infer, tmp_path, caplog):
    (tmp_path / "a.txt").write_text(TEXT)
    infer("--dataset_type", "text", "--dataset_path", tmp_path / "a.txt", "--seq_length", 1200, "--max_steps", 4)
    assert "only 1 of 4 documents; more may come with a larger max_chars or pieces_per_text" in caplog.text


def test_bad_input_does_not_block_the_corrected_command(infer, tmp_path):
    (tmp_path / "a.txt").write_text("")
    options = ["--dataset_type", "text", "--dataset_path", tmp_path / "a.txt", "--seq_length", 40, "--max_steps", 1]
    with pytest.raises(ValueError, match="shorter than two tokens"):
        infer(*options)
    (tmp_path / "a.txt").write_text(TEXT)
    assert infer(*options).meta["totals"]["documents"] == 1


def test_wrong_input_is_one_line_and_status_1(script):
    with pytest.raises(SystemExit) as exit:
        script.run(lambda: script.main(["--model", "./absent"]))
    assert exit.value.code == "error: model folder './absent' does not exist or is no folder"
    with pytest.raises(SystemExit) as exit:
        script.run(lambda: 0)
    assert exit.value.code == 0


@pytest.mark.slow
def test_two_processes_of_accelerate_launch_equal_one(infer, checkpoint, tmp_path):
    options = ["--seq_length", "60", "--max_steps", "3", "--freeze", "1", "--dtype", "float64"]
    one = infer(*options, name="one")
    # A configuration file of MULTI_CPU, without a host file for MPI, would silently start one process.
    launch = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2"]
    where = ["--model", checkpoint, "--exp_dir", tmp_path, "--exp_name", "two", "--device", "cpu"]
    command = [*launch, ROOT / "scripts" / "run_inference.py", *where, *options]
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=300)
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("documents,") == 1
    two = read_run(tmp_path / "two")
    assert two.meta["num_shards"] == 2
    assert two.tokens.equals(one.tokens)
    np.testing.assert_array_equal(two.plasticity, one.plasticity)
    np.testing.assert_array_equal(two.loss_frozen, one.loss_frozen)
