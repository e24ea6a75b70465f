"""A report is figures, their tables, captions and the text, side by side."""

import json

import pytest

from interp.report import write_report
from interp.statistics import Bootstrap
from tests.interp.planted_run import planted_run

FIGURES = ["plasticity_heatmap", "surprisal", "buckets", "perplexity"]


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp("report")
    run = planted_run(folder / "run", bucket_factor=(1, 1, 1.5, 1), answers=2)
    return write_report(run, folder / "a" / "figures", boot=Bootstrap(n_boot=100)), folder / "a" / "figures"


def test_every_file_is_there_and_listed(report):
    written, folder = report
    assert sorted(written.files) == sorted(folder.iterdir())
    assert {f"{name}.png" for name in FIGURES} | {"captions.json", "text.html"} < {p.name for p in written.files}


def test_captions_name_tables_that_exist(report):
    written, folder = report
    captions = json.loads((folder / "captions.json").read_text())
    assert list(captions) == FIGURES
    for name, caption in captions.items():
        assert caption["title"] == written.captions[name].title and caption["text"] == written.captions[name].text
        assert all((folder / table).exists() for table in caption["tables"])
    assert "answer_effects.csv" in captions["perplexity"]["tables"]


def test_the_summary_is_short_and_has_intervals(report):
    lines = report[0].summary.splitlines()
    assert len(lines) == 3 + len(FIGURES) and lines[0].startswith("planted read 2,048 tokens of 4 documents")
    assert "NOVELTY writes most" in report[0].summary
    assert all("[" in line for line in lines[1:5])
    assert lines[5].startswith("Brackets are 95% confidence intervals")
    assert lines[6] == "Intervals hold within these 4 documents and say nothing about others."


def test_the_summary_names_the_confidence_and_no_path(tmp_path):
    run = planted_run(tmp_path / "run", documents=12, tokens=40, freezing=[])
    run.meta["model"]["id"] = "/home/someone/models/mine"
    summary = write_report(run, tmp_path / "figures", boot=Bootstrap(n_boot=80, confidence=0.9)).summary
    assert summary.startswith("mine read 480 tokens of 12 documents") and "someone" not in summary
    assert "Brackets are 90%" in summary and "say nothing about others" not in summary
