"""The script leaves the report of a run beside it, or where it is told."""

from pathlib import Path

import pytest

from tests.interp.planted_run import planted_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def plot(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import plot_results

    return lambda *options: plot_results.main([str(option) for option in options])


def test_figures_go_into_the_run_folder_and_the_summary_is_printed(plot, tmp_path, capsys):
    run = planted_run(tmp_path / "run", documents=2, tokens=300)
    plot(run.path, "--n_boot", 80)
    folder = run.path / "figures"
    assert len(list(folder.glob("*.png"))) == 4 and (folder / "text.html").exists()
    out = capsys.readouterr().out
    assert out.startswith("planted read 600 tokens") and out.endswith(f"files in {folder}\n")


def test_another_folder_can_be_chosen(plot, tmp_path):
    run = planted_run(tmp_path / "run", documents=1, tokens=60, freezing=[])
    plot("--output_dir", tmp_path / "elsewhere", "--n_boot", 80, run.path, "--max_tokens", 10)
    assert (tmp_path / "elsewhere" / "captions.json").exists() and not (run.path / "figures").exists()
    assert "first 10 of the 60 tokens" in (tmp_path / "elsewhere" / "text.html").read_text()


def test_a_damaged_folder_is_refused_before_anything_is_written(plot, tmp_path):
    with pytest.raises(ValueError, match="has no run.json"):
        plot(tmp_path, "--output_dir", tmp_path / "figures")
    assert not (tmp_path / "figures").exists()


def test_too_few_resamples_are_refused(plot, tmp_path):
    run = planted_run(tmp_path / "run", documents=1, tokens=60, freezing=[])
    with pytest.raises(ValueError, match="n_boot must be at least 80"):
        plot(run.path, "--n_boot", 20)
    assert not (run.path / "figures").exists()


def test_help_gives_every_default_once(plot, capsys):
    with pytest.raises(SystemExit):
        plot("--help")
    out = " ".join(capsys.readouterr().out.split())
    assert "RUN_FOLDER" in out and out.count("(default: 2000)") == 1 and "default: None" not in out
