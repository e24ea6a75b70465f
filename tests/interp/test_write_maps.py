"""Matrices of writes: their rows sum to what was read, pooled maps equal them, TracIn is a product of gradients."""

import pytest
import torch

from interp.attribution import (
    block_groups,
    inner_tracin,
    iterate_rows,
    pooled_write_map,
    read_contributions,
    span_groups,
    write_read_matrix,
    write_write_matrix,
)
from interp.inner_reads import GELU_RULES, INTERACTIONS, mini_batches, write_inputs
from interp.records import record_writes
from tests.interp.strong_models import random_ids, strong_model

LENGTH = 23
CONVENTIONS = [{"gelu_rule": a, "interaction": b} for a in GELU_RULES for b in INTERACTIONS]


@pytest.fixture
def records(layer_type):
    """Three rows with padding and document borders."""
    mask = torch.ones(3, LENGTH, dtype=torch.long)
    mask[0, :5], mask[1, 17:], mask[2, 8:10] = 0, 0, 0
    border = torch.zeros(3, LENGTH, dtype=torch.bool)
    border[0, 12] = border[2, 7] = border[2, 16] = True
    return record_writes(strong_model(layer_type), random_ids(3, LENGTH), attention_mask=mask, reset_at=border)


def test_shares_of_a_read_sum_to_it(records):
    reads = records[1].reads()
    for convention in CONVENTIONS:
        for t in (0, 4, 11, 22):
            found = read_contributions(records, 1, t, **convention)
            torch.testing.assert_close(
                found.base + found.curvature + found.vectors.sum(2), found.read, rtol=0, atol=1e-12
            )
            torch.testing.assert_close(found.vectors, sum(found.parts), rtol=0, atol=0)
            real = records.places.real[:, t]
            torch.testing.assert_close(found.read[real], reads[real][:, :, t], rtol=0, atol=1e-12)
            assert (found.curvature.abs().max() < 1e-14) or convention["gelu_rule"] == "gradient"
    assert found.vectors.abs().max() > 0.1


def test_nothing_is_read_across_a_border_from_behind_or_from_padding(records):
    matrix, places = write_read_matrix(records, 0), records.places
    assert matrix.triu(1).abs().max() == 0
    assert matrix[0, :, 12:, :12].abs().max() == 0 < matrix[0, :, 11, :12].abs().max()
    masked = ~places.real[:, None, None].expand(matrix.shape)
    assert matrix[masked].abs().max() == 0 and matrix.mT[masked].abs().max() == 0


def test_relative_shares_sum_to_one(records):
    rows = write_read_matrix(records, 1, mode="relative").sum(-1)
    real = records.places.real[:, None].expand(rows.shape)
    torch.testing.assert_close(rows[real], torch.ones_like(rows[real]), rtol=0, atol=1e-10)


def test_norms_are_the_lengths_of_the_shares(records):
    norms = write_read_matrix(records, 1, mode="norm", rows=[3, -1])
    for i, t in enumerate((3, 22)):
        expected = read_contributions(records, 1, t).vectors.norm(dim=-1)
        torch.testing.assert_close(norms[:, :, i], expected, rtol=0, atol=1e-12)


def test_rows_come_alone_in_blocks_or_together(records):
    whole = write_read_matrix(records, 1, mode="relative")
    blocks = list(iterate_rows(records, 1, mode="relative", rows=[5, 2, 20], block_rows=2))
    assert [rows for rows, _ in blocks] == [[5, 2], [20]]
    torch.testing.assert_close(torch.cat([b for _, b in blocks], 2), whole[:, :, [5, 2, 20]], rtol=0, atol=1e-12)


def test_what_later_keys_meet_comes_out_of_the_earlier_writes(records):
    """W_0 and the earlier writes give what the net makes of every key at the start of its mini-batch."""
    record = records[1]
    for i, x in enumerate(write_inputs(record)):
        matrix = write_write_matrix(records, 1, inner_map=i + 1)
        weight, bias = record.initial[i]
        found = x @ weight + bias + matrix @ record.gradients[i]
        met = torch.cat([b.xs[i] @ b.weights[i][0] + b.weights[i][1] for b in mini_batches(record)], 2)
        real = record.places.real[:, None].expand(record.lr.shape)
        torch.testing.assert_close(found[real], record.places.unalign(met)[real], rtol=0, atol=1e-12)
        place = record.places.mini_batch
        inside = place[:, :, None] <= place[:, None]  # a mini-batch's own and later writes
        assert matrix[inside[:, None].expand(matrix.shape)].abs().max() == 0 < matrix.abs().max()


def test_tracin_is_the_product_of_the_gradients_times_the_rate(records):
    record = records[0]
    flat = torch.cat(
        [
            torch.cat([x[..., None] * g[..., None, :], g[..., None, :]], -2).flatten(3)
            for x, g in zip(write_inputs(record), record.gradients, strict=True)
        ],
        -1,
    )
    steps = torch.arange(LENGTH).expand(3, -1)
    expected = record.places.rates(record.lr, record.token_rate, steps) * (flat @ flat.mT)
    torch.testing.assert_close(inner_tracin(records, 0), expected, rtol=0, atol=1e-10)
    rows = inner_tracin(records, 0, rows=[7])
    torch.testing.assert_close(rows[:, :, 0], expected[:, :, 7], rtol=0, atol=1e-10)


def test_tracin_is_the_first_order_change_of_the_inner_loss(layer_type):
    """Within the first mini-batch the only weights are W_0: the loss after the write against the loss before."""
    model, ids = strong_model(layer_type), random_ids(1, 4)
    small = torch.full((1, 1, 1, 1), 1e-5, dtype=torch.float64)
    records = record_writes(model, ids, ttt_lr_mult=small)
    with torch.no_grad():
        stats = model(ids, ttt_lr_mult=small, output_ttt_stats=True).ttt_stats[0]
    gained = (stats.loss_before - stats.loss_after).double()
    found = inner_tracin(records, 0).sum(-1)  # all writes up to each token
    torch.testing.assert_close(found, gained, rtol=1e-3, atol=1e-10)
    assert found[..., 0].min() > 0


@pytest.mark.parametrize("convention", CONVENTIONS[:2] + CONVENTIONS[-1:])
def test_pooled_maps_equal_the_dense_matrix(records, convention):
    groups = torch.randint(-1, 4, (3, LENGTH))
    member = torch.nn.functional.one_hot(groups + 1, 5).double()[:, None, :, 1:]
    direction = torch.randn(3, 2, LENGTH, 16, dtype=torch.float64)
    for mode, along in (("relative", None), ("signed", direction)):
        dense = write_read_matrix(records, 1, mode=mode, direction=along, **convention)
        found = pooled_write_map(records, 1, groups, mode=mode, direction=along, **convention)
        torch.testing.assert_close(found.values, dense @ member, rtol=0, atol=1e-10)
        pooled = pooled_write_map(records, 1, groups, mode=mode, direction=along, read_groups=groups, **convention)
        torch.testing.assert_close(pooled.values, member.mT @ dense @ member, rtol=0, atol=1e-10)
    shares = torch.stack([read_contributions(records, 1, t, **convention).vectors for t in range(LENGTH)], 2)
    expected = torch.einsum("bhtsf,bsg->bhtgf", shares, member[:, 0]).norm(dim=-1)
    found = pooled_write_map(records, 1, groups, mode="norm", **convention)
    torch.testing.assert_close(found.values, expected, rtol=0, atol=1e-10)


def test_pools_count_their_reads_and_make_tables(records):
    groups = span_groups(LENGTH, [(0, 6), (10, 20)])
    found = pooled_write_map(records, 1, groups, read_groups=groups, names=["old", "new"], read_names=["old", "new"])
    assert found.reads[:, 0].tolist() == [[1, 10], [6, 7], [6, 10]]
    table = found.to_pandas(row=1)
    assert table.query("head == 1 and read == 'new' and write == 'old'")["value"].item() == found.values[1, 1, 1, 0]
    torch.testing.assert_close(found.mean * found.reads[..., None], found.values)
    assert block_groups(10, 3).tolist() == [0, 0, 0, 0, 1, 1, 1, 2, 2, 2]


def test_what_does_not_fit_is_refused(records):
    with pytest.raises(ValueError, match="mode must be one of"):
        write_read_matrix(records, 0, mode="max")
    with pytest.raises(ValueError, match="direction belongs to mode 'signed'"):
        write_read_matrix(records, 0, mode="signed")
    for function, groups in ((write_read_matrix, {}), (pooled_write_map, {"groups": block_groups(LENGTH, 2)})):
        with pytest.raises(ValueError, match=r"direction must be broadcastable to \[3, 2, 23, 16\], got \[7\]"):
            function(records, 0, mode="signed", direction=torch.ones(7), **groups)
    with pytest.raises(ValueError, match="rows must be one or more columns"):
        write_read_matrix(records, 0, rows=[LENGTH])
    with pytest.raises(ValueError, match="inner_map must be in"):
        write_write_matrix(records, 0, inner_map=3)
    with pytest.raises(ValueError, match="groups must be integers"):
        pooled_write_map(records, 0, torch.zeros(7, dtype=torch.long))
    with pytest.raises(ValueError, match="does not allow"):
        groups = block_groups(LENGTH, 2)
        pooled_write_map(records, 0, groups, mode="norm", read_groups=groups)
    with pytest.raises(ValueError, match="spans must not overlap"):
        span_groups(5, [(0, 3), (2, 4)])


def test_chosen_heads_keep_their_names():
    records = record_writes(strong_model("linear"), random_ids(1, 9), heads=[1])
    found = pooled_write_map(records, 0, block_groups(9, 2))
    assert set(found.to_pandas()["head"]) == {1} and found.heads == (1,)
