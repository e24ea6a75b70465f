"""Checkpoints of the official PyTorch code: safetensors or a pickle read as weights only, tied or not, in shards."""

import json
import os
import pickle
import shutil

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

from modeling_ttt.convert_jax import convert_checkpoint

from .helpers import distance, tiny, tokens

MAMBA = {"share_qk": True, "use_gate": True, "pre_conv": True}
CONSTANT = "model.layers.0.seq_modeling_block.token_idx"


@pytest.fixture(params=["linear", "mlp"])
def source(request):
    # The official PyTorch code has one base learning rate for both inner nets.
    options = {"ttt_layer_type": request.param, "ttt_base_lr": 1.0, "tie_word_embeddings": request.param == "mlp"}
    return tiny(dtype=torch.float32, **MAMBA, **options)


def official(model, folder, file="pytorch_model.bin", both_heads=True):
    """A folder as that code saves it: head and embedding both stored, a constant among the parameters."""
    folder.mkdir()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    if not both_heads and model.config.tie_word_embeddings:
        del state["lm_head.weight"]
    state[CONSTANT] = torch.arange(4).reciprocal().nan_to_num()
    save_file(state, folder / file) if file.endswith("safetensors") else torch.save(state, folder / file)
    config = model.config.to_dict()
    for name in ("ttt_backend", "output_plasticity", "output_ttt_stats", "ttt_base_lr", "rope_parameters", "dtype"):
        config.pop(name, None)
    config |= {"rope_theta": 10000.0, "use_cache": False, "scan_checkpoint_group_size": 0}
    config["transformers_version"] = "4.41.2"
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("both_heads", [True, False])
@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_official_checkpoints_give_the_same_logits(source, file, both_heads, tmp_path):
    done = convert_checkpoint(official(source, tmp_path / "theirs", file, both_heads), tmp_path / "out")
    assert done.dropped == [CONSTANT]
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "out").eval()
    ids = tokens(1, 21)
    assert distance(model(ids).logits, source(ids).logits) == 0
    assert model.config.use_cache, "off in the official configuration, on here"
    assert model.config.tie_word_embeddings == source.config.tie_word_embeddings
    assert ("lm_head.weight" in load_file(tmp_path / "out" / "model.safetensors")) != model.config.tie_word_embeddings


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_official_checkpoints_load_as_they_are_with_the_same_logits(source, file, tmp_path):
    folder = official(source, tmp_path / "theirs", file)
    model, found = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(found[what] for what in ("missing_keys", "unexpected_keys", "mismatched_keys"))
    assert model.config.base_lr == 1.0, "also for an MLP, whose default here is that of the paper"
    assert model.config.use_cache
    ids = tokens(1, 21)
    assert distance(model.eval()(ids).logits, source(ids).logits) == 0


def test_a_checkpoint_in_shards_is_read_whole_or_not_at_all(source, tmp_path):
    source.save_pretrained(tmp_path / "theirs", max_shard_size="20KB")
    shards = sorted((tmp_path / "theirs").glob("model-*.safetensors"))
    assert len(shards) > 3
    convert_checkpoint(tmp_path / "theirs", tmp_path / "out")
    found = load_file(tmp_path / "out" / "model.safetensors")
    assert all(torch.equal(found[name], source.state_dict()[name]) for name in found)
    shards[1].unlink()
    with pytest.raises(FileNotFoundError, match=shards[1].name):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "again")
    index = tmp_path / "theirs" / "model.safetensors.index.json"
    places = json.loads(index.read_text())
    places["weight_map"] = dict.fromkeys(places["weight_map"], "../out/model.safetensors")
    index.write_text(json.dumps(places))
    with pytest.raises(ValueError, match="shards must be plain file names"):
        convert_checkpoint(tmp_path / "theirs", tmp_path / "again")
    assert not (tmp_path / "again").exists()


class Hostile:
    """Runs a command where it is unpickled."""

    def __init__(self, flag):
        self.flag = flag

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def test_a_hostile_pickle_is_not_run(source, tmp_path):
    folder = official(source, tmp_path / "theirs")
    state = {name: value.clone() for name, value in source.state_dict().items()}
    for payload in ({**state, "x": Hostile(tmp_path / "flag")}, Hostile(tmp_path / "flag")):
        torch.save(payload, folder / "pytorch_model.bin")
        with pytest.raises(ValueError, match=r"pytorch_model\.bin: cannot be read as weights"):
            convert_checkpoint(folder, tmp_path / "out")
    (folder / "pytorch_model.bin").write_bytes(pickle.dumps(Hostile(tmp_path / "flag")))
    with pytest.raises(ValueError, match=r"pytorch_model\.bin: cut off, or saved by PyTorch before 1\.6"):
        convert_checkpoint(folder, tmp_path / "out")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["theirs"]


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.safetensors"])
def test_damaged_files_are_refused(source, file, tmp_path):
    folder = official(source, tmp_path / "theirs", file)
    whole = (folder / file).read_bytes()
    for cut in (0, 1, 100, len(whole) // 2, len(whole) - 1):
        (folder / file).write_bytes(whole[:cut])
        with pytest.raises(ValueError, match=file):
            convert_checkpoint(folder, tmp_path / "out")
    torch.save([1, 2], folder / "pytorch_model.bin")
    if file == "pytorch_model.bin":
        with pytest.raises(ValueError, match="expected a dict of tensors, got list"):
            convert_checkpoint(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_a_tied_head_that_is_no_copy_of_the_embedding_is_refused(tmp_path):
    source = tiny(dtype=torch.float32, tie_word_embeddings=False, ttt_base_lr=1.0)
    folder = official(source, tmp_path / "theirs")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "tie_word_embeddings": True}))
    with pytest.raises(ValueError, match="tie_word_embeddings is true, but lm_head.weight is not the embedding"):
        convert_checkpoint(folder, tmp_path / "out")
    done = convert_checkpoint(folder, tmp_path / "out", config={**config, "tie_word_embeddings": False})
    assert not done.config.tie_word_embeddings


def test_foreign_models_and_names_are_refused(source, tmp_path):
    folder = official(source, tmp_path / "theirs", "model.safetensors")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "model_type": "llama"}))
    with pytest.raises(ValueError, match="model_type must be 'ttt', got 'llama'"):
        convert_checkpoint(folder, tmp_path / "out")
    (folder / "config.json").write_text(json.dumps(config))
    state = load_file(folder / "model.safetensors")
    save_file({**state, "model.extra": torch.ones(1)}, folder / "model.safetensors")
    with pytest.raises(ValueError, match="unknown names: 'model.extra'"):
        convert_checkpoint(folder, tmp_path / "out")
    shutil.copy(folder / "model.safetensors", folder / "streaming_params")
    with pytest.raises(ValueError, match="holds streaming_params and model.safetensors: name one of the files"):
        convert_checkpoint(folder, tmp_path / "out")
