"""Any split of a sequence into calls is one call; padding on either side changes nothing."""

import pytest
import torch

from modeling_ttt.native_library import load_library

from .helpers import BACKBONES, cache_distance, distance, read_in_pieces, tiny, tokens

SPLITS = {
    "halves": [50],
    "mid_mini_batch": [3, 7, 30, 31, 33, 64, 99],
    "boundaries": [4, 8, 40],
    "token_by_token": list(range(1, 100)),
    "one_token_then_rest": [1],
}


@pytest.mark.parametrize("backbone", BACKBONES)
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_any_split_of_100_tokens_equals_one_call(kind, backbone):
    model = tiny(ttt_layer_type=kind, mini_batch_size=16 if backbone == "mamba" else 4, **BACKBONES[backbone])
    ids = tokens(length=100)
    logits, plasticity, cache = read_in_pieces(model, ids, [])
    for cuts in SPLITS.values():
        split_logits, split_plasticity, split_cache = read_in_pieces(model, ids, cuts)
        assert distance(split_logits, logits) < 1e-10
        assert distance(split_plasticity, plasticity) < 1e-10
        assert cache_distance(split_cache, cache) < 1e-10


def test_reference_backend_splits_like_the_chunked_one():
    model = tiny(ttt_layer_type="mlp", **BACKBONES["mamba"])
    ids = tokens(length=23)
    logits, plasticity, cache = read_in_pieces(model, ids, [5, 6, 17])
    model.config.ttt_backend = "reference"
    other_logits, other_plasticity, other_cache = read_in_pieces(model, ids, [2, 16])
    assert distance(other_logits, logits) < 1e-10
    assert distance(other_plasticity, plasticity) < 1e-10
    assert cache_distance(other_cache, cache) < 1e-10


def padded(rows, side, total):
    """ids and mask of rows of different lengths, padded on one side to `total`."""
    ids, mask = torch.zeros(len(rows), total, dtype=torch.long), torch.zeros(len(rows), total, dtype=torch.long)
    for i, row in enumerate(rows):
        place = slice(0, len(row)) if side == "right" else slice(total - len(row), total)
        ids[i, place], mask[i, place] = row, 1
    return ids, mask


def own(values, mask, row, dim):
    """The real tokens of one row."""
    return values[row].movedim(dim - 1, 0)[mask[row].bool()]


ROWS = [tokens(1, n, seed=n)[0] for n in (37, 6, 15, 1, 16)]


@pytest.mark.parametrize("cuts", [[], [11], [3, 20, 21], [32]], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_padded_rows_equal_unpadded_rows(kind, side, cuts):
    model = tiny(ttt_layer_type=kind, **BACKBONES["mamba"])
    ids, mask = padded(ROWS, side, 40)
    logits, plasticity, cache = read_in_pieces(model, ids, cuts, mask)
    for i, row in enumerate(ROWS):
        alone_logits, alone_plasticity, alone_cache = read_in_pieces(model, row[None], [])
        assert distance(own(logits, mask, i, 1), alone_logits[0]) < 1e-10
        for layer, alone in zip(plasticity, alone_plasticity, strict=True):
            assert distance(own(layer, mask, i, 2), alone[0].movedim(1, 0)) < 1e-10
            assert float(layer[i][:, ~mask[i].bool()].abs().sum()) == 0
        cache_row = [{n: t[i : i + 1] for n, t in layer.tensors.items()} for layer in cache.layers]
        for got, want in zip(cache_row, alone_cache.layers, strict=True):
            assert max(distance(got[n].double(), want.tensors[n].double()) for n in got) < 1e-10


def test_padding_in_the_middle_is_skipped_too():
    model = tiny(**BACKBONES["mamba"])
    row = tokens(1, 20)
    ids = torch.cat([row[:, :7], torch.zeros(1, 3, dtype=torch.long), row[:, 7:]], 1)
    mask = torch.ones_like(ids)
    mask[:, 7:10] = 0
    with torch.no_grad():
        got = model(ids, attention_mask=mask).logits[mask.bool()]
        assert distance(got, model(row).logits[0]) < 1e-10


def test_rows_at_different_phases_go_on_together():
    model = tiny(ttt_layer_type="mlp", **BACKBONES["mamba"])
    ids, mask = padded(ROWS, "left", 40)
    _, _, cache = read_in_pieces(model, ids, [], mask)
    more = tokens(len(ROWS), 9, seed=7)
    for cuts in ([], [1, 2, 3], [5]):
        _, _, fresh = read_in_pieces(model, ids, [], mask)
        logits, plasticity, _ = read_in_pieces(model, more, cuts, cache=fresh)
        for i, row in enumerate(ROWS):
            alone, alone_plasticity, _ = read_in_pieces(model, torch.cat([row, more[i]])[None], [])
            assert distance(logits[i], alone[0, -9:]) < 1e-10
            assert distance([p[i] for p in plasticity], [p[0, :, -9:] for p in alone_plasticity]) < 1e-10


def test_a_row_without_real_tokens_keeps_its_state():
    model = tiny(**BACKBONES["mamba"])
    ids = tokens(2, 10)
    _, _, cache = read_in_pieces(model, ids, [])
    before = [{n: t.clone() for n, t in layer.tensors.items()} for layer in cache.layers]
    mask = torch.ones(2, 20, dtype=torch.long)
    mask[1, 10:] = 0
    with torch.no_grad():
        model(tokens(2, 10, seed=5), attention_mask=mask, past_key_values=cache)
    for old, layer in zip(before, cache.layers, strict=True):
        assert all(torch.equal(old[n][1], layer.tensors[n][1]) for n in old)
        assert not torch.equal(old["W1"][0], layer.tensors["W1"][0])


@torch.no_grad()
def test_a_row_that_waits_keeps_its_open_writes():
    model = tiny(ttt_layer_type="mlp", **BACKBONES["mamba"])
    rows = [tokens(1, n, seed=n)[0] for n in (7, 9)]  # 7 = 3 mod 4: three open writes
    ids, mask = padded(rows, "right", 9)
    for cuts in ([8], [7], [7, 8]):
        _, _, cache = read_in_pieces(model, ids, cuts, mask)
        alone = read_in_pieces(model, rows[0][None], [])[2]
        for got, want in zip(cache.layers, alone.layers, strict=True):
            assert max(distance(got.tensors[n][:1].double(), want.tensors[n].double()) for n in got.tensors) < 1e-10
    before = read_in_pieces(model, ids, [], mask)[2]
    after = read_in_pieces(model, ids, [], mask)[2]
    nothing = torch.cat([mask, torch.zeros(2, 3, dtype=torch.long)], 1)
    model(tokens(2, 3), attention_mask=nothing, past_key_values=after)
    assert cache_distance(before, after) == 0


@pytest.mark.parametrize("seed", range(25))
def test_all_backends_agree_on_random_masks_borders_and_splits(seed):
    rng = torch.Generator().manual_seed(seed)

    def draw(low, high):
        return int(torch.randint(low, high, (1,), generator=rng))

    batch, length = draw(1, 4), draw(1, 14)
    edges = {"mini_batch_size": 1, "conv_kernel": 1} if seed % 5 == 0 else {"mini_batch_size": draw(2, 6)}
    model = tiny(ttt_layer_type="mlp" if seed % 2 else "linear", **{**BACKBONES["mamba"], **edges})
    if seed % 3 == 0:
        model.config.frozen_from = draw(0, 9)
    ids = tokens(batch, length, seed=seed)
    mask = (torch.rand(batch, length, generator=rng) < 0.7).long()
    border = torch.rand(batch, length, generator=rng) < 0.15
    cuts = sorted({draw(0, length) for _ in range(draw(0, 4))} - {0})
    results = {}
    backends = ["chunked", *(["native"] if load_library()[0] else []), "reference"]
    for backend in backends:
        model.config.ttt_backend = backend
        cache, logits, start = None, [], 0
        for end in [*cuts, length] if backend != "reference" else [length]:
            with torch.no_grad():
                out = model(
                    ids[:, start:end],
                    attention_mask=mask[:, start:end],
                    reset_at=border[:, start:end],
                    past_key_values=cache,
                    use_cache=True,
                )
            logits.append(out.logits)
            cache, start = out.past_key_values, end
        results[backend] = torch.cat(logits, 1)[mask.bool()], cache
    for backend in backends:
        if results[backend][0].numel():
            assert distance(results[backend][0], results["reference"][0]) < 1e-10
        assert cache_distance(results[backend][1], results["reference"][1]) < 1e-10


def test_rows_do_not_see_each_other():
    model = tiny(ttt_layer_type="mlp", **BACKBONES["mamba"])
    ids = tokens(3, 21)
    other = ids.clone()
    other[1] = tokens(1, 21, seed=9)[0]
    with torch.no_grad():
        a, b = model(ids), model(other)
    assert torch.equal(a.logits[[0, 2]], b.logits[[0, 2]])


@pytest.mark.parametrize("option", ["plain", "mask", "mult", "reset"])
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_a_token_never_changes_what_came_before_it(kind, option):
    model = tiny(ttt_layer_type=kind, **BACKBONES["mamba"])
    ids = tokens(1, 30)
    kwargs = {"plain": {}, "mask": {"attention_mask": torch.ones(1, 30).index_fill(1, torch.tensor([4, 5]), 0)}}
    kwargs["mult"] = {"ttt_lr_mult": torch.rand(1, 2, 2, 30, dtype=torch.float64)}
    kwargs["reset"] = {"reset_at": torch.zeros(1, 30, dtype=torch.bool).index_fill(1, torch.tensor([11]), True)}
    with torch.no_grad():
        base = model(ids, **kwargs[option])
        for t in (1, 3, 4, 16, 29):
            changed = ids.clone()
            changed[0, t] = 3 + (changed[0, t] - 2) % 60
            out = model(changed, **kwargs[option])
            assert distance(out.logits[:, :t], base.logits[:, :t]) == 0
            assert all(
                torch.equal(a[:, :, :t], b[:, :, :t]) for a, b in zip(out.plasticity, base.plasticity, strict=True)
            )


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_documents_packed_with_borders_equal_separate_documents(backend):
    model = tiny(ttt_layer_type="mlp", ttt_backend=backend, **BACKBONES["mamba"])
    documents = [tokens(1, n, seed=n) for n in (7, 4, 9, 1, 2)]
    ids = torch.cat(documents, 1)
    starts = torch.zeros_like(ids, dtype=torch.bool)
    positions = torch.cat([torch.arange(d.shape[1]) for d in documents])[None]
    starts[positions == 0] = True
    with torch.no_grad():
        alone = torch.cat([model(d).logits for d in documents], 1)
        assert distance(model(ids, reset_at=starts).logits, alone) < 1e-10
        assert distance(model(ids, position_ids=positions).logits, alone) < 1e-10
        unchanged = model(ids, position_ids=positions, attention_mask=torch.ones_like(ids)).logits
        assert distance(unchanged, model(ids).logits) < 1e-10
    for name, marks in (("reset_at", starts), ("position_ids", positions)):
        split, cache = [], None
        for start, end in ((0, 7), (7, 8), (8, 13), (13, 23)):  # the first cut lies on a border
            with torch.no_grad():
                piece = {name: marks[:, start:end]}
                out = model(ids[:, start:end], past_key_values=cache, use_cache=True, **piece)
            cache = out.past_key_values
            split.append(out.logits)
        assert distance(torch.cat(split, 1), alone) < 1e-10


def test_borders_with_padding_and_rows_of_their_own():
    model = tiny(**BACKBONES["mamba"])
    rows = [tokens(1, n, seed=n)[0] for n in (23, 14)]
    ids, mask = padded(rows, "left", 25)
    starts = torch.zeros_like(mask, dtype=torch.bool)
    starts[0, 25 - 23 + 10], starts[1, 25 - 14 + 3] = True, True
    with torch.no_grad():
        out = model(ids, attention_mask=mask, reset_at=starts)
        for i, (row, cut) in enumerate(zip(rows, (10, 3), strict=True)):
            alone = torch.cat([model(row[None, :cut]).logits, model(row[None, cut:]).logits], 1)[0]
            assert distance(out.logits[i, -len(row) :], alone) < 1e-10


def test_token_ids_as_borders_mark_the_first_token_of_a_document():
    model = tiny()
    ids = tokens(1, 12)
    ids[0, [0, 5]] = 1
    mask = ids == 1
    with torch.no_grad():
        assert torch.equal(model(ids, reset_at=1).logits, model(ids, reset_at=mask).logits)
        assert distance(model(ids, reset_at=[1]).logits[:, 5:], model(ids[:, 5:]).logits) < 1e-10
