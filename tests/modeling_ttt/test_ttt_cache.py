"""The state in the standard cache: generation, continuing, forking, shipping, and refusing what does not fit."""

import json

import pytest
import torch
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

from modeling_ttt import clone_cache, load_cache, save_cache

from .helpers import BACKBONES, cache_distance, distance, read_in_pieces, tiny, tokens


@pytest.fixture(scope="module", params=["linear", "mlp"])
def model(request):
    return tiny(ttt_layer_type=request.param, **BACKBONES["mamba"])


def generate(model, ids, new=12, **kwargs):
    torch.manual_seed(0)
    kwargs = {"do_sample": False, "eos_token_id": None, "pad_token_id": 0} | kwargs
    return model.generate(ids, max_new_tokens=new, **kwargs)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"num_beams": 3},
        {"num_beams": 4, "num_return_sequences": 2},
        {"do_sample": True, "num_return_sequences": 3},
        {"num_beams": 2, "do_sample": True},
        {"repetition_penalty": 1.3},
    ],
    ids=str,
)
def test_generation_with_the_cache_equals_generation_without(model, options):
    ids = tokens(2, 7)
    assert torch.equal(generate(model, ids, **options), generate(model, ids, use_cache=False, **options))


def test_left_padded_batch_generates_what_each_row_generates_alone(model):
    rows = [tokens(1, n, seed=n)[0] for n in (9, 3, 6)]
    ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
    for i, row in enumerate(rows):
        ids[i, 9 - len(row) :], mask[i, 9 - len(row) :] = row, 1
    together = generate(model, ids, attention_mask=mask)
    for i, row in enumerate(rows):
        assert torch.equal(together[i, 9:], generate(model, row[None])[0, len(row) :])


def test_prompt_read_in_chunks_and_inputs_embeds_generate_the_same(model):
    ids = tokens(2, 11)
    expected = generate(model, ids)
    assert torch.equal(generate(model, ids, prefill_chunk_size=4), expected)
    embeds = model.get_input_embeddings()(ids)
    assert torch.equal(generate(model, None, inputs_embeds=embeds), expected[:, 11:])


def test_a_conversation_goes_on_from_the_returned_state(model):
    ids, more = tokens(1, 9), tokens(1, 5, seed=4)
    first = generate(model, ids, return_dict_in_generate=True)
    history = torch.cat([first.sequences, more], 1)
    resumed = generate(model, history, past_key_values=first.past_key_values)
    assert torch.equal(resumed, generate(model, history))


def test_clone_forks_a_state_without_sharing(model):
    ids = tokens(2, 10)
    _, _, cache = read_in_pieces(model, ids, [])
    fork = clone_cache(cache)
    read_in_pieces(model, tokens(2, 7, seed=3), [], cache=fork)
    untouched = read_in_pieces(model, ids, [])[2]
    assert cache_distance(cache, untouched) == 0
    assert fork.get_seq_length() == 17 and cache.get_seq_length() == 10
    fork = clone_cache(cache)
    for layer in fork.layers:
        for tensor in layer.tensors.values():
            tensor.zero_()
    assert cache_distance(cache, untouched) == 0


def test_a_saved_state_goes_on_after_loading(model, tmp_path):
    ids, more = tokens(2, 10), tokens(2, 9, seed=3)
    _, _, cache = read_in_pieces(model, ids, [])
    save_cache(cache, tmp_path / "state.safetensors")
    assert [p.name for p in tmp_path.iterdir()] == ["state.safetensors"]
    loaded = load_cache(tmp_path / "state.safetensors", model.config)
    assert cache_distance(loaded, cache) == 0 and loaded.get_seq_length() == 10
    a = read_in_pieces(model, more, [], cache=loaded)[0]
    assert torch.equal(a, read_in_pieces(model, more, [], cache=cache)[0])


def test_loading_refuses_foreign_files(model, tmp_path):
    _, _, cache = read_in_pieces(model, tokens(1, 6), [])
    path = tmp_path / "state.safetensors"
    save_cache(cache, path)
    other = tiny(hidden_size=64, ttt_layer_type=model.config.ttt_layer_type, **BACKBONES["mamba"]).config
    with pytest.raises(ValueError, match="state of another model"):
        load_cache(path, other)
    deeper = tiny(num_hidden_layers=3, **BACKBONES["mamba"]).config
    with pytest.raises(ValueError, match="holds 2 layers, the configuration has 3"):
        load_cache(path, deeper)
    from safetensors.torch import save_file

    save_file({"x": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(ValueError, match="is not a TTT cache"):
        load_cache(tmp_path / "other.safetensors", model.config)
    (tmp_path / "junk").write_bytes(b"no tensors at all")
    with pytest.raises(ValueError, match="junk is not a safetensors file"):
        load_cache(tmp_path / "junk", model.config)
    with pytest.raises(TypeError, match="cache must be a transformers Cache, got NoneType"):
        save_cache(None, path)
    with pytest.raises(ValueError, match="holds no TTT state to save"):
        save_cache(DynamicCache(config=model.config), path)
    assert json.loads(json.dumps(load_cache(path, model.config).get_seq_length())) == 6


def test_cache_of_another_model_or_batch_is_refused_and_left_as_it_was(model):
    ids = tokens(2, 6)
    _, _, cache = read_in_pieces(model, ids, [])
    untouched = clone_cache(cache)
    with pytest.raises(ValueError, match="holds 2 rows, the batch has 3"):
        model(tokens(3, 4), past_key_values=cache)
    other = tiny(hidden_size=64, ttt_layer_type=model.config.ttt_layer_type, **BACKBONES["mamba"])
    with pytest.raises(ValueError, match="state of another model"):
        other(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="has 2 layers, the model has 3"):
        tiny(num_hidden_layers=3)(ids, past_key_values=cache)
    with pytest.raises(ValueError, match="broadcastable"):
        model(ids, past_key_values=cache, ttt_lr_mult=torch.ones(5))
    assert cache_distance(cache, untouched) == 0
    llama = LlamaForCausalLM(
        LlamaConfig(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=2)
    )
    kv = llama(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="holds no TTT state"):
        model(ids, past_key_values=kv)
    with pytest.raises(TypeError, match="must be a transformers Cache, got tuple"):
        model(ids, past_key_values=((1, 2),))


def test_an_empty_dynamic_cache_without_config_is_filled(model):
    cache = DynamicCache()
    with torch.no_grad():
        out = model(tokens(1, 5), past_key_values=cache, use_cache=True)
    assert out.past_key_values is cache and cache.get_seq_length() == 5


def test_reset_select_repeat_and_crop(model):
    ids = tokens(2, 9)
    _, _, cache = read_in_pieces(model, ids, [])
    cache.batch_repeat_interleave(2)
    cache.batch_select_indices(torch.tensor([3, 0]))
    swapped = read_in_pieces(model, ids.flip(0), [])[2]
    assert cache_distance(cache, swapped) < 1e-12
    with pytest.raises(ValueError, match="cannot be cropped"):
        cache.crop(-1)
    cache.reset()
    assert cache.get_seq_length() == 0
    assert distance(read_in_pieces(model, ids, [], cache=cache)[0], read_in_pieces(model, ids, [])[0]) == 0


def test_the_state_has_a_constant_size(model):
    def size(length):
        cache = read_in_pieces(model, tokens(1, length), [])[2]
        return sum(t.numel() * t.element_size() for layer in cache.layers for t in layer.tensors.values())

    assert size(3) == size(64) == size(101)


def test_assisted_decoding_and_static_cache_are_refused_or_right(model):
    ids = tokens(1, 6)
    with pytest.raises(ValueError, match=r"(?i)assisted|stateful"):
        generate(model, ids, assistant_model=tiny(**BACKBONES["mamba"]))
    static = generate(model, ids, cache_implementation="static")
    assert torch.equal(static, generate(model, ids))


def test_gradients_flow_through_a_carried_state(model):
    ids = tokens(1, 14)
    whole = model(ids).logits[:, 9:].square().sum()
    whole_grads = torch.autograd.grad(whole, list(model.parameters()), allow_unused=True)
    first = model(ids[:, :9], use_cache=True)
    split = model(ids[:, 9:], past_key_values=first.past_key_values).logits.square().sum()
    split_grads = torch.autograd.grad(split, list(model.parameters()), allow_unused=True)
    for a, b in zip(whole_grads, split_grads, strict=True):
        assert (a is None) == (b is None)
        assert a is None or distance(a, b) < 1e-9


@torch.no_grad()
def test_a_state_never_shares_storage_with_the_parameters(model):
    for length in (1, 3, 4, 9):
        cache = model(tokens(1, length), use_cache=True).past_key_values
        parameters = {p.untyped_storage().data_ptr() for p in model.parameters()}
        stored = {t.untyped_storage().data_ptr() for layer in cache.layers for t in layer.tensors.values()}
        assert not parameters & stored


@torch.no_grad()
def test_a_cache_passed_in_advances_even_when_none_is_asked_back(model):
    cache = DynamicCache(config=model.config)
    out = model(tokens(1, 6), past_key_values=cache, use_cache=False)
    assert out.past_key_values is None and cache.get_seq_length() == 6


@torch.no_grad()
def test_a_call_that_fails_half_way_leaves_the_cache_as_it_was(model):
    _, _, cache = read_in_pieces(model, tokens(2, 6), [])
    before = clone_cache(cache)

    def fail(*args):
        raise KeyboardInterrupt

    hook = model.model.layers[1].register_forward_hook(fail)
    with pytest.raises(KeyboardInterrupt):
        model(tokens(2, 5), past_key_values=cache)
    hook.remove()
    assert cache_distance(cache, before) == 0 and cache.get_seq_length() == 6
    cache.layers[1].length += 1
    with pytest.raises(ValueError, match="different numbers of tokens"):
        model(tokens(2, 5), past_key_values=cache)


@torch.no_grad()
def test_an_early_finished_row_goes_on_alone(model):
    """In a batch, `generate` feeds pad tokens to a row that has ended: its state is no longer that of its text."""
    ids = tokens(2, 7)
    plain = generate(model, ids)
    stop = int(plain[0, 9])  # the third new token of row 0
    out = generate(model, ids, eos_token_id=stop, return_dict_in_generate=True)
    ended = int((out.sequences[0, 7:] == stop).nonzero()[0]) + 8
    text = torch.cat([out.sequences[:1, :ended], tokens(1, 4, seed=5)], 1)
    alone = generate(model, out.sequences[:1, :ended], new=1, return_dict_in_generate=True)
    resumed = generate(model, text, past_key_values=alone.past_key_values)
    assert torch.equal(resumed, generate(model, text))
