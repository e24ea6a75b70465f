"""The command line converts both ways, says what it left out, and ends in one sentence when it cannot."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
GOLDENS = ROOT / "tests" / "modeling_ttt" / "goldens" / "jax"


@pytest.fixture
def convert(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    from convert_checkpoint import main

    return lambda *options: main([str(option) for option in options])


def test_there_and_back_as_the_help_says(convert, tmp_path, capsys):
    convert("--source", GOLDENS / "ttt_linear" / "trainstate", "--output", tmp_path / "ours")
    out = capsys.readouterr().out
    assert "left out: " in out and "values of the training's state" in out
    assert "verified: names, shapes, finite numbers; first logits after a fixed text:" in out
    convert("--source", tmp_path / "ours", "--output", tmp_path / "back", "--to", "jax")
    assert {path.name for path in (tmp_path / "back").iterdir()} == {
        "streaming_params",
        "model_config.json",
        "conversion.json",
    }


def test_errors_are_one_sentence_and_an_exit_code(tmp_path):
    process = subprocess.run(
        [sys.executable, ROOT / "scripts" / "convert_checkpoint.py", "--source", tmp_path, "--output", tmp_path / "x"],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": str(ROOT)},
    )
    assert process.returncode != 0
    assert "holds no checkpoint: none of streaming_params" in process.stderr
    assert "Traceback" not in process.stderr


def test_a_tokenizer_for_the_jax_format_is_refused(convert, tmp_path):
    with pytest.raises(ValueError, match="the JAX format has no tokenizer beside it"):
        convert("--source", GOLDENS, "--output", tmp_path / "x", "--to", "jax", "--tokenizer", "some/where")
