"""The state along a stream is that of single runs, and its ranks are those of known matrices."""

import pytest
import torch

from interp.state import document_distance, effective_rank, follow_state, initial_state, stable_rank

LENGTH = 18


@pytest.fixture
def model(tiny_model):
    return tiny_model.double()


@pytest.fixture
def ids():
    return torch.randint(0, 64, (2, LENGTH), generator=torch.Generator().manual_seed(2))


def test_ranks_of_known_spectra():
    values = torch.tensor([[1.0, 1, 1, 1], [3, 0, 0, 0], [2, 1, 0, 0], [0, 0, 0, 0]]).double()
    assert stable_rank(values).tolist() == pytest.approx([4, 1, 1.25, 0])
    assert effective_rank(values).tolist() == pytest.approx([4, 1, 3 / 2 ** (2 / 3), 0])


def test_the_initial_state_is_that_of_the_parameters(model):
    layer = next(m for m in model.modules() if hasattr(m, "tap_readout"))
    for (weight, bias), (name, bias_name) in zip(
        initial_state(model)[0], layer.inner_net.parameter_names, strict=True
    ):
        assert torch.equal(weight[0], getattr(layer, name)) and torch.equal(bias[0], getattr(layer, bias_name))


def test_a_trace_is_what_single_runs_leave(model, ids):
    trace = follow_state(model, ids, [3, 8, 18])
    first = initial_state(model)
    states = []
    for end in (8, 18):
        with torch.no_grad():
            cache = model(ids[:, :end], use_cache=True).past_key_values
        states.append([layer.tensors for layer in cache.layers])
    for layer in range(2):
        names = [n for n in states[0][layer] if n[0] in "Wb"]
        start = {f"{x}{i}": p for i, pair in enumerate(first[layer], 1) for x, p in zip("Wb", pair, strict=True)}
        drift = sum((states[0][layer][n] - start[n]).square().sum((2, 3)) for n in names).sqrt()
        torch.testing.assert_close(trace.drift[:, layer, :, 1], drift)
        step = sum((states[1][layer][n] - states[0][layer][n]).square().sum((2, 3)) for n in names).sqrt()
        torch.testing.assert_close(trace.step[:, layer, :, 2], step)
        for i, values in enumerate(trace.singular_values, 1):
            expected = torch.linalg.svdvals(states[1][layer][f"W{i}"] - start[f"W{i}"])
            torch.testing.assert_close(values[:, layer, :, 2], expected, rtol=0, atol=1e-12)
    assert trace.drift[..., 0].max() == 0 and trace.effective_rank[0][..., 0].max() == 0  # nothing committed yet
    # Two mini-batches of four writes each: no more than eight directions.
    assert trace.singular_values[0][:, :, :, 1, 8:].max() < 1e-12


def test_a_trace_goes_on_from_a_state_and_leaves_it(model, ids):
    with torch.no_grad():
        cache = model(ids[:, :8], use_cache=True).past_key_values
    kept = cache.layers[0].tensors["W1"].clone()
    whole, later = follow_state(model, ids, [8, 16]), follow_state(model, ids[:, 8:], [8], past_key_values=cache)
    torch.testing.assert_close(later.drift[..., 0], whole.drift[..., 1])
    torch.testing.assert_close(later.step[..., 0], whole.step[..., 1])
    assert torch.equal(cache.layers[0].tensors["W1"], kept)


def test_the_table_names_every_number(model, ids):
    trace = follow_state(model, ids, [4, 16])
    table = trace.to_pandas()
    maps = len(trace.singular_values)
    assert len(table) == 2 * 2 * 2 * 2 * maps and set(table.tokens) == {4, 16}
    chosen = table[(table.row == 1) & (table.layer == 0) & (table["head"] == 1) & (table.tokens == 16)]
    assert chosen.drift.tolist() == pytest.approx([trace.drift[1, 0, 1, 1].item()] * maps)
    assert chosen.stable_rank.tolist() == pytest.approx([r[1, 0, 1, 1].item() for r in trace.stable_rank])


def test_documents_that_are_the_same_are_at_no_distance(model, ids):
    with torch.no_grad():
        pair = model(ids, use_cache=True).past_key_values
        again = model(ids[:1], use_cache=True).past_key_values
    found = document_distance(pair, again)
    assert found.shape == (2, 2, 3, 3)
    assert found[..., 0, 2].max() < 1e-12 < found[..., 0, 1].min()
    torch.testing.assert_close(found, found.mT)


def test_what_does_not_fit_is_refused(model, ids):
    for checkpoints in ([], [0, 4], [4, 4], [19]):
        with pytest.raises(ValueError, match="checkpoints must rise within 1 to 18"):
            follow_state(model, ids, checkpoints)
    with pytest.raises(ValueError, match="at least one cache"):
        document_distance()
