import numpy as np
import pytest

from interp.freezing_sweep import answer_table, depth_table, loss_change, sweep_table
from interp.presets import sweep_freezings
from interp.resampling import Bootstrap
from interp.run_folder import Run
from interp.tables import UNFROZEN
from tests.interp.planted_run import planted_run

FAST = Bootstrap(n_boot=300)
FAMILIES = ("single", "prefix", "random")


def planted_sweep(path, documents=12, answers=4):
    """Two layers; freezing configuration j of (all, 0, 1) costs 0.6 / (j + 1) nats; layer 0 loses the answers."""
    freezings, named = sweep_freezings([0, 1], 2, FAMILIES)
    entries = [{"name": entry.name, "layers": list(entry.layers)} for entry in freezings]
    run = planted_run(path, documents=documents, freezing=entries, frozen_cost=0.6, answers=answers)
    greedy = np.zeros((len(run.tokens), 4), np.float32)
    answer = run.tokens["is_answer"].to_numpy()
    greedy[answer, 0] = greedy[answer, 3] = 1
    greedy[answer, 2] = run.tokens["position"][answer] % 2  # one digit of two, never a whole answer
    for index, entry in enumerate(run.meta["documents"]):
        entry["name"] = f"needle {index} depth {index % 2}"
    return Run(
        run.path, run.meta, run.tokens, run.plasticity, run.loss_frozen, run.freezing, {"greedy": greedy}
    ), named


@pytest.fixture(scope="module")
def swept(tmp_path_factory):
    return planted_sweep(tmp_path_factory.mktemp("sweep"))


def row_of(table, label):
    (row,) = [row for _, row in table.iterrows() if row["label"] == label]
    return row


def test_planted_costs_are_recovered_and_the_gap_is_shared_out(swept):
    run, named = swept
    table = sweep_table(run, named, boot=FAST)
    assert [*dict.fromkeys(table["family"])] == ["baseline", *FAMILIES]
    full, none = row_of(table, "nothing frozen"), row_of(table, "everything frozen")
    assert full["delta"] == 0 and full["recovered"] == 1 and full["active_layer_fraction"] == 1
    assert none["recovered"] == none["recovered_low"] == 0 and none["active_layer_fraction"] == 0
    for label, cost in (("everything frozen", 0.6), ("layer 0", 0.3), ("layer 1", 0.2)):
        row = row_of(table, label)
        assert row["delta_low"] < cost < row["delta_high"] and row["delta_high"] - row["delta_low"] < 0.01
        assert row["recovered"] == pytest.approx(1 - cost / 0.6, abs=0.01)
        assert row["mean_loss"] - full["mean_loss"] == pytest.approx(row["delta"], abs=1e-9)
    assert set(table["unit"]) == {"documents"} and set(table["count"]) == {12 * 511}


def test_the_null_band_is_that_of_random_subsets_of_the_same_size(swept):
    run, named = swept
    table = sweep_table(run, named, boot=FAST)
    row = row_of(table, "first 1")
    assert row["null_count"] == 2
    assert [row["null_low"], row["null_high"]] == sorted(
        [row_of(table, "layer 1")["delta"], row_of(table, "layer 0")["delta"]]
    )
    assert row_of(table, "first 2")["null_count"] == 0 and np.isnan(row_of(table, "first 2")["null_low"])


def test_without_a_gap_nothing_is_recovered(tmp_path):
    freezings, named = sweep_freezings([0, 1], 2, ("single",))
    entries = [{"name": entry.name, "layers": list(entry.layers)} for entry in freezings]
    run = planted_run(tmp_path, documents=12, freezing=entries, frozen_cost=0.0)
    assert sweep_table(run, named, boot=FAST)["recovered"].isna().all()


def test_answers_are_scored_whole_and_by_digit(swept):
    run, named = swept
    table = answer_table(run, named, boot=FAST)
    assert set(table["answers"]) == {12} and set(table["count"]) == {48}
    full, first, second = (row_of(table, label) for label in ("nothing frozen", "layer 0", "layer 1"))
    assert (full["exact"], full["digits"]) == (1, 1) and (first["exact"], first["digits"]) == (0, 0.5)
    # All of twelve, or none, is no certainty.
    assert full["exact_low"] < 0.8 and full["exact_high"] == 1 and first["exact_high"] > 0.2
    assert second["exact"] == 1 and second["delta"] == pytest.approx(0.2, abs=0.01)
    by_depth = depth_table(run)
    assert len(by_depth) == 2 * 4 and set(by_depth["answers"]) == {6}
    assert by_depth.set_index(["configuration", "depth"]).loc[(UNFROZEN, 1.0), "exact"] == 1


def test_every_token_keeps_its_change(swept):
    run, _ = swept
    changes = loss_change(run)
    assert list(changes) == ["document", "position", "all", "0", "1"] and len(changes) == len(run.tokens)
    assert np.isnan(changes["all"][0]) and changes["all"].mean() == pytest.approx(0.6, abs=0.01)


def test_wrong_input_is_refused(swept, tmp_path):
    run, named = swept
    with pytest.raises(ValueError, match="select must be bool"):
        sweep_table(run, named, select=[True])
    other = planted_run(tmp_path, freezing=[{"name": "0", "layers": [0]}])
    with pytest.raises(ValueError, match="no freezing 'all', it has \\['0'\\]"):
        sweep_table(other, {})
    with pytest.raises(ValueError, match="no answer tokens"):
        answer_table(other, {})
