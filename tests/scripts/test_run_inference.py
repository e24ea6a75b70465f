"""The script turns options into a run folder, on one or several processes, and says in one line what is wrong."""

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

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
    assert "6 documents, 384 tokens" in printed and "with layers 0-1 frozen" in printed


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


def test_exp_name_cannot_leave_exp_dir(infer):
    for name in ("..", "a/b", ""):
        with pytest.raises(ValueError, match="plain folder name"):
            infer(name=name) if name else infer("--exp_name", "..")


def test_wrong_input_is_one_line_and_status_1(script):
    with pytest.raises(SystemExit) as exit:
        script.run(lambda: script.main(["--model", "./absent"]))
    assert exit.value.code == "error: tokenizer folder './absent' does not exist or is no folder"
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
