"""The script prints one line per check, and its status says whether one failed."""

from pathlib import Path

import pytest

from tests.interp.planted_run import planted_run

ROOT = Path(__file__).parents[2]


@pytest.fixture
def check(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")
    import check_results

    return lambda *options: check_results.main([str(option) for option in options])


def test_a_healthy_run_succeeds(check, tmp_path, capsys):
    run = planted_run(tmp_path / "run", bucket_factor=(1, 1.3, 1.6, 0.8), early_factor=2.0)
    assert check(run.path) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == ["SUCCESS"] * 9 + ["FINDING"] * 2 + ["all"]
    assert "FINDING (yes) decay first/last: ratio 1.9" in lines[9]
    assert check(run.path, "--verbose") == 0
    assert len(capsys.readouterr().out.splitlines()) > len(lines)


def test_what_is_asked_for_can_fail(check, tmp_path, capsys):
    run = planted_run(tmp_path / "run")
    assert check("--allow_equal_buckets", run.path) == 0
    assert check(run.path, "--allow_equal_buckets", "--require_decay") == 1
    assert "FAILED decay first/last" in capsys.readouterr().out
    assert check(run.path) == 1
    assert "FAILED buckets differ: 0 of 18" in capsys.readouterr().out


def test_a_damaged_folder_ends_with_status_1_and_no_traceback(check, tmp_path, capsys):
    run = planted_run(tmp_path / "run")
    (run.path / "tokens-00000-of-00001.parquet").write_bytes(b"nothing")
    assert check(run.path) == 1
    out = capsys.readouterr().out
    assert out.startswith("FAILED folder:") and "cannot be read as parquet" in out
    assert check(tmp_path / "absent") == 1


def test_the_folder_is_a_positional_argument(check, capsys):
    with pytest.raises(SystemExit):
        check("--help")
    out = capsys.readouterr().out
    assert "RUN_FOLDER" in out.splitlines()[0] + out.splitlines()[1] and "--run_folder" not in out
    for wrong in ([], ["a", "b"], ["a", "--allow_equal"], ["a", "--require_decay", "b"]):
        with pytest.raises(SystemExit) as status:
            check(*wrong)
        assert status.value.code == 2
