"""The script asks a model and leaves tables that sum to the target, figures and a page."""

import json
from pathlib import Path

import pandas as pd
import pytest

ROOT = Path(__file__).parents[2]
MODEL = ROOT / "model_cards" / "ttt-linear-tiny"


@pytest.fixture
def attribute(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import attribute as script

    def call(*options):
        script.main([str(o) for o in ("--model", MODEL, "--exp_dir", tmp_path, "--exp_name", "asked", *options)])
        return tmp_path / "asked"

    return call


def test_the_answer_of_a_needle_document_is_traced_to_its_definition(attribute, capsys):
    folder = attribute("--needle_length", 80, "--knockouts", 3)
    out = capsys.readouterr().out
    names = {"writes.csv", "writes_by_head.csv", "parts.csv", "knockouts.csv", "write_map.csv", "attribution.json"}
    assert names | {"top_writes.png", "write_map.png", "attribution.html"} == {f.name for f in folder.iterdir()}
    writes, parts = pd.read_csv(folder / "writes.csv"), pd.read_csv(folder / "parts.csv")
    about = json.loads((folder / "attribution.json").read_text())
    assert parts["contribution"].sum() == pytest.approx(about["value"], abs=1e-4)
    assert writes["contribution"].sum() == pytest.approx(parts.set_index("part")["contribution"]["writes"], abs=1e-4)
    by_head = pd.read_csv(folder / "writes_by_head.csv").groupby("token")["contribution"].sum()
    assert by_head.to_numpy() == pytest.approx(writes["contribution"].to_numpy(), abs=1e-5)
    told = writes.index[writes["marked"]].item()
    assert writes["contribution"].idxmax() in (told, told + 1) and "<- told the answer" in out
    knockouts = pd.read_csv(folder / "knockouts.csv")
    assert len(knockouts) == 3 and knockouts["effect"][0] > 1


def test_a_text_and_a_question_are_asked_about(attribute, tmp_path, capsys):
    text = tmp_path / "text.txt"
    text.write_text("The $x_1$ & <b>value</b>\n\u4e2d\u6587 was blue. ", encoding="utf-8")
    folder = attribute("--text", text, "--question", "It was", "--answer", " blue", "--contrast", " red", " green")
    assert "less the mean of ' red', ' green'" in capsys.readouterr().out
    page = (folder / "attribution.html").read_text(encoding="utf-8")
    assert "<b>" not in page and "&lt;" in page
    with pytest.raises(ValueError, match="is there already: pass --overwrite"):
        attribute("--text", text)
    attribute("--text", text, "--overwrite", "--knockouts", 0, "--seq_length", 8)
    assert json.loads((folder / "attribution.json").read_text())["tokens"] == 8
    assert not (folder / "knockouts.csv").exists()


def test_what_does_not_fit_is_refused_before_anything_is_written(attribute, tmp_path):
    for options, message in (
        (("--answer", "7"), "go with --text"),
        (("--needle_length", 64, "--needle_digit", 4), r"needle_digit must be in \[0, 4\)"),
        (("--needle_length", 64, "--gelu_rule", "secant"), "gelu_rule must be one of"),
        (("--text", tmp_path / "none.txt"), "cannot be read"),
        (("--seq_length", 0), "seq_length must be at least 1"),
        (("--knockouts", -1), "knockouts must not be negative"),
    ):
        with pytest.raises(ValueError, match=message):
            attribute(*options)
        assert not (tmp_path / "asked").exists()
