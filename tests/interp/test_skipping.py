import numpy as np
import pytest
import torch

from interp.reader import read_batch
from interp.resampling import Bootstrap
from interp.skipping import skip_small_updates, write_cost
from modeling_ttt import TTTConfig, TTTForCausalLM
from tests.conftest import TINY

FAST = Bootstrap(n_boot=100)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return TTTForCausalLM(TTTConfig(**TINY)).double().eval()


@pytest.fixture(scope="module")
def rows():
    return [np.random.default_rng(i).integers(3, 64, 40 + i) for i in range(3)]


def test_a_settled_gate_is_that_of_its_own_reading(model, rows):
    table = skip_small_updates(model, rows, shares=(0.5,), rounds=20, boot=FAST)
    small, chance = table.iloc[0], table.iloc[1]
    assert (small["rule"], chance["rule"]) == ("small gradient", "at random")
    assert small["unsettled"] == 0 and small["skipped"] == pytest.approx(0.5, abs=0.1)
    assert chance["skipped"] == pytest.approx(0.5, abs=0.12)
    assert small["count"] == sum(len(row) - 1 for row in rows)


def test_skipping_next_to_nothing_changes_next_to_nothing(model, rows):
    table = skip_small_updates(model, rows, shares=(0.001,), boot=FAST)
    assert table["skipped"].iloc[0] < 0.03 and abs(table["delta"].iloc[0]) < 0.01


def test_the_gate_of_the_last_round_makes_the_loss_that_is_told(model, rows):
    # One layer, so that the gate of a token depends on earlier writes only through its own gradient.
    limit = np.quantile(
        np.concatenate([r.stats["inner_grad_norm"] for r in read_batch(model, rows, stats=True)]), 0.5, axis=0
    )
    keep = [(r.stats["inner_grad_norm"] >= limit).T for r in read_batch(model, rows, stats=True)]
    gate = torch.ones(3, 2, 1, 42)
    for b, kept in enumerate(keep):
        gate[b, :, 0, : kept.shape[1]] = torch.from_numpy(kept.astype(np.float32))
    expected = np.concatenate([r.loss for r in read_batch(model, rows, lr_mult=gate)])
    row = skip_small_updates(model, rows, shares=(0.5,), rounds=1, boot=FAST).iloc[0]
    assert row["mean_loss"] == pytest.approx(np.nanmean(expected.astype(np.float64)), rel=1e-6)


def test_writes_are_counted_from_the_shapes(layer_type):
    torch.manual_seed(0)
    model = TTTForCausalLM(TTTConfig(**TINY, ttt_layer_type=layer_type))
    share = write_cost(model)
    f, m, heads, layers = 16, 64, 2, 2
    writes = layers * heads * (f * f if layer_type == "linear" else 2 * f * m)
    backward = 0 if layer_type == "linear" else layers * heads * f * m
    outer = sum(p.numel() for p in model.parameters()) - writes
    assert share["writes"] == pytest.approx(writes / (outer + 3 * writes + backward))
    assert share["inner"] == pytest.approx((2 * writes + backward) / (outer + 3 * writes + backward))


def test_wrong_options_are_refused(model, rows):
    with pytest.raises(ValueError, match="shares must lie between 0 and 1"):
        skip_small_updates(model, rows, shares=(1.0,))
    with pytest.raises(ValueError, match="rounds must be at least 1"):
        skip_small_updates(model, rows, rounds=0)
