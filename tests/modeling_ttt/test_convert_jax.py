"""Checkpoints of the official JAX code give its numbers here, and go back to the bit."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from modeling_ttt import TTTConfig, TTTForCausalLM
from modeling_ttt.configuration_ttt import PRESETS
from modeling_ttt.convert_jax import convert_checkpoint, export_jax, logits_fingerprint
from modeling_ttt.convert_names import from_jax, to_jax
from tests.conftest import TINY

from .helpers import distance, tiny, tokens
from .jax_streams import packed, read_records, unpacked, write_records

GOLDENS = Path(__file__).parent / "goldens" / "jax"
PARAMS = {kind: GOLDENS / f"ttt_{kind}" / "params" for kind in ("linear", "mlp")}
MAMBA = {"share_qk": True, "use_gate": True, "pre_conv": True}
# What no shape tells; the official metadata has all of it.
SETTINGS = {"ttt_base_lr": 1.0, "rope_theta": 10000.0, "rms_norm_eps": 1e-6, "max_sequence_length": 64}


def golden(kind):
    with np.load(GOLDENS / f"ttt_{kind}" / "golden.npz", allow_pickle=False) as file:
        return {name: torch.from_numpy(np.asarray(file[name])) for name in file.files}


def converted(source, tmp_path, **options):
    convert_checkpoint(source, tmp_path / "out", **options)
    return AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()


def as_leaves(model, dtype=None, chunk_values=None, prefix=()):
    """The parameters of one of our models as serialised leaves under the names of the JAX code."""
    leaves = {}
    for name, value in model.state_dict().items():
        if name == "lm_head.weight" and model.config.tie_word_embeddings:
            continue
        key, turn = to_jax(name)
        leaves[prefix + key] = packed(turn(value).to(dtype or value.dtype), chunk_values)
    return leaves


def jax_config(model, **changes):
    block = f"ttt_{model.config.ttt_layer_type}{'' if model.config.use_gate else '_base'}"
    return {"seq_modeling_block": block, **SETTINGS, "ttt_base_lr": model.config.base_lr, **changes}


def stream_of(model, folder, name="streaming_params", **options):
    """A folder with a stream and its model_config.json."""
    write_records(folder / name, as_leaves(model, **options))
    (folder / "model_config.json").write_text(json.dumps(jax_config(model)))
    return folder


# -------------------------------------------------------------------- the numbers of the official code


@pytest.mark.parametrize("backend", ["chunked", "reference"])
@pytest.mark.parametrize("source", ["linear", "mlp", "trainstate"])
def test_converted_checkpoints_give_the_numbers_of_the_jax_code(source, backend, tmp_path):
    kind = "linear" if source == "trainstate" else source
    path = GOLDENS / "ttt_linear" / "trainstate" if source == "trainstate" else PARAMS[kind]
    model, want = converted(path, tmp_path), golden(kind)
    model.config.ttt_backend = backend
    ids = want["input_ids"].long()
    with torch.no_grad():
        out = model(ids, labels=ids, output_hidden_states=True)
        slow = model(ids, ttt_lr_mult=want["ilr_mult_0.1bf16.value"]).logits
    assert distance(out.logits, want["logits"]) < 1e-5
    assert distance(slow, want["ilr_mult_0.1bf16.logits"]) < 1e-5
    losses = F.cross_entropy(out.logits.flatten(0, 1), want["target_ids"].long().flatten(), reduction="none")
    masks = want["loss_masks"]
    per_row = (losses.view_as(masks) * masks).sum(1) / masks.sum(1)  # theirs is a mean of means
    assert float(per_row.mean()) == pytest.approx(float(want["loss"]), abs=2e-6)
    assert float(out.loss) == pytest.approx(float(want["loss_hf_shift"]), abs=2e-6)
    for i in (0, 1, 2):
        assert distance(out.hidden_states[i], want[f"hidden_states.{i}"]) < 1e-5


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_inner_losses_equal_the_statistics_of_the_jax_code(kind, tmp_path):
    """Theirs are means over batch, heads and features of one token per mini-batch; ours half sums per token."""
    model, want = converted(PARAMS[kind], tmp_path), golden(kind)
    size, width = model.config.mini_batch_size, model.config.head_dim
    with torch.no_grad():
        out = model(want["input_ids"].long(), output_ttt_stats=True)
    for i, stats in enumerate(out.ttt_stats):

        def theirs(name, i=i):
            return want[f"ttt_stats.{i}.{name}"]

        last = slice(size - 1, None, size)
        for name, found in (("init", stats.loss_init), ("step_0", stats.loss_before), ("step_1", stats.loss_after)):
            got = 2 / width * found[:, :, last].mean((0, 1))
            torch.testing.assert_close(got, theirs(f"ttt_loss_mse_{name}"), rtol=1e-5, atol=1e-6)
        first = stats.target_dispersion[:, :, ::size].mean((0, 1))
        torch.testing.assert_close(first, theirs("ssl_tgt_last_in_mini_batch_from_mean_mse"), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_state_after_a_text_is_that_of_their_committed_weights(kind, tmp_path):
    """Their loss after the last commit, worked out here from the state in the cache."""
    model, want = converted(PARAMS[kind], tmp_path), golden(kind)
    seen = {}
    for i, block in enumerate(model.model.layers):
        tap, layer = block.seq_modeling_block.tap_k, block.seq_modeling_block
        tap.register_forward_hook(lambda module, args, out, i=i: seen.setdefault(("k", i), out.clone()))
        layer.v_proj.register_forward_hook(lambda module, args, out, i=i: seen.setdefault(("v", i), out.clone()))
    with torch.no_grad():
        cache = model(want["input_ids"].long(), use_cache=True).past_key_values
    for i, layer in enumerate(cache.layers):
        mixer = model.model.layers[i].seq_modeling_block
        k = seen["k", i][:, :, -1:]
        v = seen["v", i][:, -1:].unflatten(-1, (mixer.num_heads, -1)).transpose(1, 2)
        state, z = layer.tensors, k
        for depth in range(1, model.config.inner_net.depth + 1):
            z = F.gelu(z, approximate="tanh") if depth > 1 else z
            z = z @ state[f"W{depth}"] + state[f"b{depth}"]
        norm = F.layer_norm(z, z.shape[-1:], eps=1e-6) * mixer.ttt_norm_weight[:, None] + mixer.ttt_norm_bias[:, None]
        found = (norm - (v - k)).square().mean().detach()
        torch.testing.assert_close(found, want[f"ttt_stats.{i}.ttt_loss_mse_step_1"][-1], rtol=1e-5, atol=1e-6)


# -------------------------------------------------------------------- formats


def test_all_files_of_one_model_give_the_same_folder(tmp_path):
    train, params = GOLDENS / "ttt_linear" / "trainstate", PARAMS["linear"]
    sources = {"train": train, "file": train / "step_2" / "streaming_train_state_2", "flax": params / "flax_params"}
    found = {}
    for name, source in {**sources, "params": params / "streaming_params"}.items():
        done = convert_checkpoint(source, tmp_path / name)
        found[name] = load_file(tmp_path / name / "model.safetensors")
        assert (done.skipped > 50) == (name in ("train", "file")), "moments are stepped over and counted"
    for name in sources:
        assert found[name].keys() == found["params"].keys()
        assert all(torch.equal(found[name][key], found["params"][key]) for key in found[name])


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_there_and_back_gives_every_bit(kind, tmp_path):
    convert_checkpoint(PARAMS[kind], tmp_path / "ours", max_shard_bytes=100_000)
    assert len(list((tmp_path / "ours").glob("*.safetensors"))) > 3
    export_jax(tmp_path / "ours", tmp_path / "back")
    theirs, back = (read_records(folder / "streaming_params") for folder in (PARAMS[kind], tmp_path / "back"))
    assert sorted(back) == sorted(theirs)
    for key, value in theirs.items():
        assert back[key] == value, key
    convert_checkpoint(tmp_path / "back", tmp_path / "again")
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("ours", "again"))
    assert distance(list(one.parameters()), list(other.parameters())) == 0
    names = ("ttt_layer_type", "ttt_base_lr", "rope_parameters", "rms_norm_eps", "pre_conv", "conv_kernel", "use_gate")
    assert all(getattr(one.config, name) == getattr(other.config, name) for name in names)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("chunk_values", [None, 100])
def test_every_dtype_whole_or_in_chunks(dtype, chunk_values, tmp_path):
    source = tiny(dtype=torch.float32, **MAMBA, tie_word_embeddings=False)
    stream_of(source, tmp_path / "jax", dtype=dtype, chunk_values=chunk_values)
    convert_checkpoint(tmp_path / "jax", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert found.keys() == source.state_dict().keys()
    assert all(torch.equal(found[name], value.to(dtype)) for name, value in source.state_dict().items())
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out")
    assert model.dtype == dtype and not model.config.tie_word_embeddings
    export_jax(tmp_path / "out", tmp_path / "back", dtype="float32")
    back = read_records(tmp_path / "back" / "streaming_params")
    for key, value in as_leaves(source, dtype=torch.float32).items():
        wide = torch.from_numpy(unpacked(back[key]).copy())
        assert torch.equal(wide, torch.from_numpy(unpacked(value).copy()).to(dtype).float())


def test_chunks_we_write_are_those_msgpack_reads(tmp_path, monkeypatch):
    from modeling_ttt import convert_stream

    source = tiny(dtype=torch.float32, **MAMBA)
    source.save_pretrained(tmp_path / "ours")
    original = convert_stream.write_stream
    monkeypatch.setattr("modeling_ttt.convert_jax.write_stream", lambda *a, **k: original(*a, **k, chunk_bytes=400))
    export_jax(tmp_path / "ours", tmp_path / "back")
    assert read_records(tmp_path / "back" / "streaming_params") == dict(
        sorted(as_leaves(source, chunk_values=100).items())
    )


@pytest.mark.parametrize("overrides", [{}, MAMBA, {"pre_conv": True}, {**MAMBA, "ttt_layer_type": "mlp"}])
def test_every_backbone_is_read_off_its_names(overrides, tmp_path):
    source = tiny(dtype=torch.float32, **overrides)
    convert_checkpoint(stream_of(source, tmp_path / "jax"), tmp_path / "out")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokens(1, 21)
    source.config.rope_parameters["rope_theta"] = model.config.rope_parameters["rope_theta"]
    assert distance(model(ids).logits, source(ids).logits) < 1e-6


def test_every_parameter_has_one_name_there_and_back():
    for overrides in ({}, MAMBA, {**MAMBA, "ttt_layer_type": "mlp"}, {"tie_word_embeddings": False}):
        for name in tiny(**overrides).state_dict():
            if name != "lm_head.weight" or overrides.get("tie_word_embeddings") is False:
                assert from_jax(to_jax(name)[0])[0] == name


# -------------------------------------------------------------------- configuration


def test_presets_and_json_take_the_place_of_metadata(tmp_path, monkeypatch):
    source = tiny(dtype=torch.float32, **MAMBA)
    folder = stream_of(source, tmp_path / "jax")
    settings = json.loads((folder / "model_config.json").read_text())
    (folder / "model_config.json").unlink()
    with pytest.raises(ValueError, match=r"there is no metadata\.pkl or model_config\.json beside it; pass config"):
        convert_checkpoint(folder, tmp_path / "none")
    (tmp_path / "given.json").write_text(json.dumps(settings))
    one = convert_checkpoint(folder, tmp_path / "json", config=tmp_path / "given.json")
    two = convert_checkpoint(folder, tmp_path / "mapping", config=settings)
    assert one.fingerprint == two.fingerprint
    sizes = {name: getattr(source.config, name) for name in PRESETS["1b"]}
    monkeypatch.setitem(PRESETS, "1b", sizes)
    for name in ("1b", "1.3b", "1b-TTT"):
        found = convert_checkpoint(folder, tmp_path / name, config=name)
        assert found.fingerprint == one.fingerprint, "the official presets have the settings of this stream"
    with pytest.raises(ValueError, match="does not fit the parameters: .*hidden_size is 768 there, 32 here"):
        convert_checkpoint(folder, tmp_path / "preset", config="125m")
    with pytest.raises(ValueError, match=r"config must be a json file or one of .*125m.*, got '7b'"):
        convert_checkpoint(folder, tmp_path / "preset", config="7b")


def test_what_the_jax_code_cannot_do_is_not_exported(tmp_path):
    for name, overrides in {
        "share_qk and use_gate both or neither": {"share_qk": True},
        "cannot freeze inner weights": {"frozen_layers": [0]},
    }.items():
        TTTForCausalLM(TTTConfig(**{**TINY, **overrides})).save_pretrained(tmp_path / "ours")
        with pytest.raises(ValueError, match=name):
            export_jax(tmp_path / "ours", tmp_path / "back")
        assert not (tmp_path / "back").exists()


# -------------------------------------------------------------------- as users have it


def test_the_fingerprint_is_that_of_the_loaded_model_in_a_clean_process(tmp_path):
    done = convert_checkpoint(PARAMS["mlp"], tmp_path / "out")
    code = (
        "import json, sys, modeling_ttt\n"
        "from transformers import AutoModelForCausalLM\n"
        "from modeling_ttt.convert_jax import logits_fingerprint\n"
        "print(json.dumps(logits_fingerprint(AutoModelForCausalLM.from_pretrained(sys.argv[1]))))\n"
    )
    out = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "out"],
        check=True,
        capture_output=True,
        text=True,
        cwd=GOLDENS.parents[3],
    )
    found = json.loads(out.stdout)
    assert found["argmax"] == done.fingerprint["argmax"]
    assert found["last_position"] == pytest.approx(done.fingerprint["last_position"], abs=1e-5)
    recorded = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert recorded["fingerprint"] == done.fingerprint


def test_an_earlier_conversion_is_replaced_only_when_asked(tmp_path):
    convert_checkpoint(PARAMS["linear"], tmp_path / "out")
    with pytest.raises(ValueError, match="is there already; name another folder or pass overwrite"):
        convert_checkpoint(PARAMS["mlp"], tmp_path / "out")
    convert_checkpoint(PARAMS["mlp"], tmp_path / "out", overwrite=True)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "out").config.ttt_layer_type == "mlp"
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(ValueError, match="is no earlier conversion"):
        convert_checkpoint(PARAMS["mlp"], tmp_path / "mine", overwrite=True)
    assert (tmp_path / "mine" / "thesis.txt").is_file()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine", "out"]


def test_fingerprints_tell_models_apart():
    one, other = tiny(dtype=torch.float32), tiny(dtype=torch.float32, seed=1)
    assert logits_fingerprint(one) == logits_fingerprint(one) != logits_fingerprint(other)


def test_several_checkpoints_in_a_folder_are_not_guessed_between(tmp_path):
    for step in ("step_1", "step_2"):
        shutil.copytree(GOLDENS / "ttt_linear" / "trainstate" / "step_2", tmp_path / "run" / step)
    with pytest.raises(ValueError, match="holds several checkpoints, name one: 'step_1', 'step_2'"):
        convert_checkpoint(tmp_path / "run", tmp_path / "out")
    convert_checkpoint(tmp_path / "run" / "step_2", tmp_path / "out")
