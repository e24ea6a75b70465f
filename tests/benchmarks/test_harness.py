"""The harness times contenders in turn, takes ratios within rounds, and keeps results whatever interrupts it."""

import json
import time

import pytest

from benchmarks._harness import Contender, ResultFile, environment, interleave, ratio, summary


def recording(name, log, prepare=None):
    return Contender(name, run=lambda prepared: log.append((name, prepared)), prepare=prepare or (lambda: None))


def test_contenders_run_in_turn_and_every_round_starts_with_another():
    log = []
    rounds = interleave([recording(name, log) for name in "abc"], seconds=0, min_rounds=3, warm_up=1)
    assert [name for name, _ in log] == list("cab" + "abc" + "bca" + "cab")  # the first is the warm-up
    assert all(len(r.cpu) == len(r.wall) == 3 for r in rounds.values())


def test_only_the_run_is_timed_and_it_gets_what_was_prepared():
    log = []
    rounds = interleave([recording("a", log, lambda: time.sleep(0.05) or "ready")], seconds=0, min_rounds=2, warm_up=0)
    assert log == [("a", "ready")] * 2
    assert max(rounds["a"].wall) < 0.04


def test_rounds_go_on_for_the_time_given_but_not_beyond_the_maximum():
    sleeper = Contender("a", run=lambda _: time.sleep(0.01))
    assert 4 <= len(interleave([sleeper], seconds=0.1, min_rounds=1)["a"].wall) <= 11
    assert len(interleave([sleeper], seconds=60, min_rounds=1, max_rounds=2)["a"].wall) == 2


def test_cpu_time_leaves_out_waiting():
    rounds = interleave([Contender("a", run=lambda _: time.sleep(0.05))], seconds=0, min_rounds=1, warm_up=0)["a"]
    assert rounds.wall[0] >= 0.05 > 5 * rounds.cpu[0]


@pytest.mark.parametrize(
    ("names", "rounds", "message"), [("aa", (1, 2), "names of their own"), ("ab", (3, 2), "min_rounds must lie")]
)
def test_what_cannot_be_compared_is_refused(names, rounds, message):
    with pytest.raises(ValueError, match=message):
        interleave([recording(name, []) for name in names], 0, *rounds)


def test_a_ratio_is_taken_within_rounds():
    # A machine ten times slower in the second round does not change it.
    slow, fast = [2.0, 20.0, 4.0], [1.0, 10.0, 2.0]
    assert ratio(slow, fast) == {"median": 2.0, "q1": 2.0, "q3": 2.0, "n": 3}
    with pytest.raises(ValueError):
        ratio([1.0], [1.0, 2.0])


def test_a_summary_has_median_quartiles_and_number():
    assert summary([5, 1, 2, 4, 3]) == {"median": 3, "q1": 2, "q3": 4, "n": 5}
    assert summary([7.0]) == {"median": 7.0, "q1": 7.0, "q3": 7.0, "n": 1}


def test_the_environment_says_what_numbers_depend_on():
    env = environment("cpu", threads=1)
    assert env["clock"] == "cpu" and environment("cpu", threads=2)["clock"] == "wall"
    assert env["versions"].keys() == {"modeling_ttt", "python", "torch", "transformers"}
    assert env["cpu"] and len(env["code"]) == 12


def test_results_are_on_disk_after_every_case_and_can_be_added_to(tmp_path):
    path = tmp_path / "results" / "cpu.json"
    env, settings = {"threads": 1, "revision": "a"}, {"backend": "chunked"}
    ResultFile(path, env, settings, keep=False).add("first", {"x": 1})
    assert json.loads(path.read_text())["cases"] == {"first": {"x": 1}}
    ResultFile(path, {**env, "revision": "b"}, settings, keep=True).add("second", {"x": 2})
    assert ResultFile.read(path)["cases"] == {"first": {"x": 1}, "second": {"x": 2}}
    assert [p.name for p in path.parent.iterdir()] == ["cpu.json"]
    ResultFile(path, env, settings, keep=False).add("third", {})
    assert list(ResultFile.read(path)["cases"]) == ["third"]


def test_numbers_measured_otherwise_are_not_mixed(tmp_path):
    path = tmp_path / "cpu.json"
    ResultFile(path, {"threads": 1, "revision": "a"}, {}, keep=False).add("first", {})
    with pytest.raises(ValueError, match="threads 1 there and 2 here"):
        ResultFile(path, {"threads": 2, "revision": "a"}, {}, keep=True)
    path.write_text('{"schema": 0}')
    with pytest.raises(ValueError, match="schema 1, got 0"):
        ResultFile.read(path)
