"""The sweep of freezings from the command line: what is frozen, what is written, what is refused."""

from pathlib import Path

import pandas as pd
import pytest
import torch

from interp.run_folder import read_run
from tests.interp.tiny_corpus import make_model, make_tokenizer

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("checkpoint")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_model(tokenizer, num_hidden_layers=3).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def freezing(monkeypatch, checkpoint, tmp_path):
    """Runs the script; gives the folder of the run."""
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import run_freezing

    def call(*options, name="run"):
        where = ["--model", str(checkpoint), "--exp_dir", str(tmp_path), "--exp_name", name, "--n_boot", "80"]
        run_freezing.main([*where, *map(str, options)])
        return tmp_path / name

    return call


def test_needles_are_swept_and_scored_and_every_token_keeps_its_loss(freezing):
    needles = ["--dataset_type", "needle", "--needle_filler", "text", "--needle_depth", "0", "0.5"]
    folder = freezing(*needles, "--seq_length", "80", "--max_steps", "4", "--skip_shares", "0.5")
    table = pd.read_csv(folder / "freezing.csv")
    assert list(dict.fromkeys(table["family"])) == [
        "baseline",
        "single",
        "leave-one-in",
        "prefix",
        "suffix",
        "thirds",
        "random",
    ]
    assert table["active_layer_fraction"].between(0, 1).all() and (table["tokens_per_second"] > 0).all()
    answers = pd.read_csv(folder / "answers.csv")
    assert {"exact", "exact_low", "digits", "recovered", "delta_low", "null_low"} <= set(answers) and set(
        answers["answers"]
    ) == {4}
    assert set(pd.read_csv(folder / "answers_by_depth.csv")["depth"]) == {0, 0.5}
    assert set(pd.read_csv(folder / "skipping.csv")["rule"]) == {"small gradient", "at random"}
    run = read_run(folder)
    assert run.loss_frozen.shape == (320, len(run.freezing)) and run.extras["greedy"].shape == (
        320,
        1 + len(run.freezing),
    )
    change = pd.read_parquet(folder / "loss_change.parquet")
    assert len(change) == 320 and change["all"].mean() == pytest.approx(table.iloc[1]["delta"], abs=1e-6)
    assert {file.name for file in folder.glob("*.png")} == {"freezing.png", "answers.png", "skipping.png"}


def test_presets_are_scaled_and_overrides_are_not_evaluated(freezing, caplog):
    common = ["--dataset_type", "repeated", "--seq_length", "40", "--max_steps", "2"]
    folder = freezing(*common, "--preset", "retina", "middle_strict", "--config", "ttt_base_lr=0.5", "--freeze", "1")
    table = pd.read_csv(folder / "freezing.csv", dtype={"layers": str}).set_index("label")
    assert table.loc["retina", "layers"] == "2" and table.loc["middle_strict", "layers"] == "0,2"
    assert table.loc["1", "family"] == "asked for"
    assert read_run(folder).meta["arguments"]["config"] == ["ttt_base_lr=0.5"]
    with pytest.raises(ValueError, match="preset must be one of"):
        freezing(*common, "--preset", "lobe", name="other")
    with pytest.raises(ValueError, match="families must be among"):
        freezing(*common, "--families", "lobes", name="other")
    with pytest.raises(ValueError, match="configuration overrides"):
        freezing(*common, "--config", "ttt_base_lr=__import__('os').getcwd()", name="other")
    with pytest.raises(ValueError, match="frozen_layers must lie in"):
        freezing(*common, "--config", "frozen_layers=0-7", name="other")


def test_single_heads_can_be_frozen(freezing):
    folder = freezing("--families", "heads", "--seq_length", "40", "--max_steps", "2", "--dataset_type", "pydoc")
    table = pd.read_csv(folder / "freezing.csv")
    assert (table["family"] == "heads").sum() == 6 and table["active_layer_fraction"].iloc[-1] == pytest.approx(
        1 - 1 / 6
    )
