"""The mini-batch grid against a plain loop over tokens."""

import random

import pytest
import torch

from modeling_ttt.token_grid import TokenGrid


def naive(real, border, starts, size):
    """Per row: (mini-batch, slot) of every real token, complete and reset mini-batches, position afterwards."""
    rows = []
    for marks, borders, start in zip(real, border, starts, strict=True):
        place, mini_batch, position, reset = [], 0, start, set()
        for is_real, is_border in zip(marks, borders, strict=True):
            if not is_real:
                place.append(None)
                continue
            if is_border:
                mini_batch += 1 if position % size else 0  # a mini-batch that was begun is left behind
                position = 0
                reset.add(mini_batch)
            place.append((mini_batch, position % size))
            position += 1
            if position % size == 0:
                mini_batch += 1
        rows.append((place, reset, position))
    return rows


@pytest.mark.parametrize("seed", range(40))
def test_grid_equals_a_loop_over_tokens(seed):
    rng = random.Random(seed)
    batch, length, size = rng.randint(1, 4), rng.randint(1, 15), rng.choice([1, 2, 4, 5])
    real = [[rng.random() < 0.7 for _ in range(length)] for _ in range(batch)]
    border = [[rng.random() < 0.2 for _ in range(length)] for _ in range(batch)]
    starts = [rng.randint(0, 9) for _ in range(batch)]
    grid = TokenGrid(
        (batch, length),
        size,
        torch.device("cpu"),
        torch.tensor(real),
        torch.tensor(border),
        torch.tensor(starts),
        torch.tensor(starts),
    )
    x = torch.arange(1, batch * length + 1).view(batch, length).float()
    packed = grid.pack(x, 1)
    assert packed.shape == (batch, grid.width)
    position, seen, _ = grid.advanced()
    for row, (place, reset, after) in enumerate(naive(real, border, starts, size)):
        count = sum(real[row])
        assert int(seen[row]) == starts[row] + count
        assert int(position[row]) == after
        filled = [0] * (1 + max((p[0] for p in place if p), default=0))
        filled[0] = starts[row] % size
        for t, where in enumerate(place):
            if where is None:
                continue
            mini_batch, slot = where
            assert int(grid.slot.expand(batch, -1)[row, t]) == slot
            assert float(packed[row, mini_batch * size + slot - grid.phase]) == float(x[row, t])
            filled[mini_batch] += 1
        assert int((packed[row] != 0).sum()) == count
        if grid.uniform:
            continue
        assert torch.equal(grid.unpack(packed, 1)[row], x[row] * torch.tensor(real[row]))
        assert {i for i in range(grid.reset.shape[1]) if grid.reset[row, i]} == reset
        complete = {i for i in range(grid.complete.shape[1]) if grid.complete[row, i]}
        assert complete == {i for i, n in enumerate(filled) if n == size}
        assert int(grid.last[row]) == max((p[0] for p in place if p), default=0)


@pytest.mark.parametrize("seed", range(20))
def test_windows_skip_masked_tokens_and_stop_at_borders(seed):
    rng = random.Random(seed)
    length, kernel = rng.randint(1, 10), rng.choice([1, 3, 4])
    real = [rng.random() < 0.7 for _ in range(length)]
    border = [rng.random() < 0.25 for _ in range(length)]
    grid = TokenGrid((1, length), 4, torch.device("cpu"), torch.tensor([real]), torch.tensor([border]))
    window, keep = grid.windows(kernel)
    # Names of the sources: tail entries t0.., tokens 0.., and "-" for the zero row.
    names = [f"t{i}" for i in range(kernel - 1)] + [str(i) for i in range(length)] + ["-"]
    history = [f"t{i}" for i in range(kernel - 1)]
    for t in range(length):
        if not real[t]:
            assert [names[i] for i in window[0, t]] == ["-"] * kernel
            continue
        if border[t]:
            history = ["-"] * (kernel - 1)
        history.append(str(t))
        assert [names[i] for i in window[0, t]] == history[len(history) - kernel :]
    assert [names[i] for i in keep[0]] == history[len(history) - (kernel - 1) :]


def test_a_grid_without_mask_or_borders_packs_nothing():
    grid = TokenGrid((2, 7), 4, torch.device("cpu"), torch.ones(2, 7, dtype=torch.bool))
    x = torch.rand(2, 3, 7)
    assert grid.uniform and grid.pack(x, 2) is x and grid.unpack(x, 2) is x
    later = TokenGrid((2, 7), 4, torch.device("cpu"), position=torch.tensor([6, 6]), seen=torch.tensor([6, 6]))
    assert later.uniform and (later.phase, later.width) == (2, 7)
    assert [(c.start, c.stop, g.phase) for c, g in later.segments(4)] == [(0, 2, 2), (2, 6, 0), (6, 7, 0)]
