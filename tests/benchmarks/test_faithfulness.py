"""The comparison of estimators is resumable, and docs/attribution.md says what its results say."""

import json
import re

import pytest

from benchmarks import faithfulness
from benchmarks._harness import ROOT
from benchmarks.faithfulness import QUICK, main, report
from interp.loading import load_tokenizer
from interp.needle_question import NeedleQuestion

MODEL = str(ROOT / "model_cards" / "ttt-linear-tiny")


@pytest.mark.parametrize("name", ["ttt-linear-tiny", "ttt-mlp-tiny"])
def test_the_document_holds_the_numbers_of_the_results(name):
    found = report(faithfulness._read(ROOT / "benchmarks" / "results" / f"faithfulness-{name}.jsonl"))
    text = (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8")
    assert found.count("50 answered of 50 documents") == 2
    sources, agreement = found.split("faithfulness: ")
    for estimator in QUICK:
        share = re.search(rf"\| {estimator} \| ([^|]+) \|", sources)[1]
        row = re.search(rf"\| {estimator} \| ([^|]+) \| ([^|]+) \|\n", text)
        assert share == row[1 + (name == "ttt-mlp-tiny")].strip()
        numbers = re.search(rf"\| {estimator} \| ([^|]+ \| [^|]+) \|", agreement)[1]
        assert f"| {estimator} | {numbers} |" in text


def test_what_was_measured_is_not_measured_again(tmp_path, monkeypatch, capsys):
    path, calls = tmp_path / "rows.jsonl", []

    def measured(part, model, question, index):
        calls.append(index)
        return {"digit": index % 4, "offsets": dict.fromkeys(QUICK, 1)}

    monkeypatch.setattr(faithfulness, "measure", measured)
    monkeypatch.setattr(faithfulness, "load", lambda name: (None, load_tokenizer(name)))
    monkeypatch.setattr(NeedleQuestion, "answered", lambda question, model: [True])
    options = ["--model", MODEL, "--parts", "source", "--tokens", "96", "--output", str(path), "--documents"]
    main([*options, "1"])
    with path.open("a") as file:
        file.write('{"part": "sour')  # killed while writing
    main([*options, "3"])
    assert calls == [0, 1, 2]
    rows = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    assert [row["document"] for row in rows] == [0, 1, 2]
    assert "3 answered of 3 documents, 96 tokens" in capsys.readouterr().out
    with pytest.raises(ValueError, match="parts must be some of"):
        main(["--model", MODEL, "--parts", "all", "--output", str(path)])
