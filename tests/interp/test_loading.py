"""Models and tokenizers load by name, and each thing that can be missing has its own message."""

import ast
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from interp.loading import load_model, load_tokenizer, parse_overrides
from tests.interp.tiny_corpus import make_model, make_tokenizer

JAX = Path(__file__).parents[1] / "modeling_ttt" / "goldens" / "jax" / "ttt_linear"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_model(tokenizer).save_pretrained(folder / "ttt")
    tokenizer.save_pretrained(folder / "ttt")
    sizes = {"hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1}
    LlamaForCausalLM(LlamaConfig(vocab_size=16, **sizes)).save_pretrained(folder / "llama")
    return folder


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "float64"])
def test_a_model_comes_in_the_dtype_asked_for_and_in_evaluation_mode(saved, dtype):
    model = load_model(saved / "ttt", dtype=dtype)
    assert model.dtype == getattr(torch, dtype) and not model.training
    assert model.model.embed_tokens.weight.dtype == getattr(torch, dtype)


def test_overrides_replace_configuration_keys(saved):
    model = load_model(saved / "ttt", overrides=parse_overrides(["frozen_layers=0-1", "ttt_base_lr=0.5"]))
    assert model.config.frozen_layers == [0, 1] and model.config.ttt_base_lr == 0.5
    for pair, message in [("frozen_layres=0", "no keys of TTTConfig"), ("ttt_backend=fast", "refused")]:
        with pytest.raises(ValueError, match=message):
            load_model(saved / "ttt", overrides=parse_overrides([pair]))


def test_another_configuration_can_be_given(saved, tmp_path):
    config = json.loads((saved / "ttt" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**config, "rms_norm_eps": 0.25}))
    assert load_model(saved / "ttt", config=tmp_path).config.rms_norm_eps == 0.25


def test_overrides_are_data_and_never_code():
    assert parse_overrides(["a=1", "b=x y", "c=[1, 2]", "d=true", "e=null", "frozen_layers=0-1,3"]) == {
        "a": 1,
        "b": "x y",
        "c": [1, 2],
        "d": True,
        "e": None,
        "frozen_layers": [0, 1, 3],
    }
    text = "__import__('os').system('false')"
    assert parse_overrides([f"a={text}"]) == {"a": text}
    for bad in ("a", "=1", "a b=1", f"{text}=1", f"frozen_layers={text}"):
        with pytest.raises(ValueError, match="key=value|layers are given"):
            parse_overrides([bad])


def test_what_is_missing_is_named(saved, tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "config.json").write_text('{"model_type": "ttt", "hidden_size": 31}')
    (tmp_path / "weightless").mkdir()
    (tmp_path / "weightless" / "config.json").write_text((saved / "ttt" / "config.json").read_text())
    for name, message in [
        (tmp_path / "absent", "model folder .*absent' does not exist"),
        ("./absent", "model folder './absent' does not exist"),
        (tmp_path / "empty", "no model in folder .*none of config.json"),
        (tmp_path / "broken", "(?s)configuration of model .* could not be read.*num_attention_heads"),
        (tmp_path / "weightless", "could not be loaded"),
        (saved / "llama", "not a TTT model: the configuration 'llama'"),
        ("nobody/nothing", "configuration of model 'nobody/nothing' could not be read"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_model(name)
    with pytest.raises(ValueError, match="dtype must be one of"):
        load_model(saved / "ttt", dtype="int8")


@pytest.mark.parametrize("device", ["foo", "cuda:99", "meta"])
def test_a_device_that_is_not_there_is_named(saved, device):
    with pytest.raises(ValueError, match=f"device must be one that works here, got '{device}': "):
        load_model(saved / "ttt", device=device)
    assert load_model(saved / "ttt", device="cpu").device.type == "cpu"


def test_a_missing_tokenizer_is_named(saved, tmp_path):
    assert load_tokenizer(saved / "ttt")("the")["input_ids"][0] == 0
    for name, message in [
        (saved / "llama", "no tokenizer in folder"),
        (tmp_path / "absent", "tokenizer folder .* does not exist"),
        ("nobody/nothing", "no tokenizer could be loaded from 'nobody/nothing'"),
    ]:
        with pytest.raises(ValueError, match=message):
            load_tokenizer(name)


def test_only_loading_imports_the_model_package():
    importing = set()
    for file in Path(interp.__path__[0]).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "modeling_ttt" for name in names):
                importing.add(file.name)
    assert importing == {"loading.py"}


def test_one_call_gives_model_and_tokenizer(saved):
    model, tokenizer = interp.load(saved / "ttt", dtype="float64")
    assert model.dtype == torch.float64
    assert model(**tokenizer("the", return_tensors="pt")).plasticity[0].shape[-1] == 2
    with pytest.raises(AttributeError, match="module 'interp' has no attribute 'lod'"):
        interp.lod  # noqa: B018
    with pytest.raises(ValueError, match="revision is for names on the Hub, got 'v1' for the path"):
        interp.load(saved / "ttt", revision="v1")
    with pytest.raises(ValueError, match="pass device or device_map, got 'cpu' and 'auto'"):
        interp.load(saved / "ttt", device="cpu", device_map="auto")


def test_a_device_map_places_the_model(saved):
    places = {"model.embed_tokens": "cpu", "model.layers": "disk", "model.norm": "cpu", "lm_head": "cpu"}
    model = load_model(saved / "ttt", device_map=places)
    assert model.hf_device_map == places
    ids = torch.arange(9)[None]
    assert torch.equal(model(ids).logits, load_model(saved / "ttt")(ids).logits)


def test_weights_that_do_not_fit_are_refused(saved, tmp_path):
    shutil.copytree(saved / "ttt", tmp_path / "ttt")
    weights = load_file(tmp_path / "ttt" / "model.safetensors")
    name = "model.layers.0.seq_modeling_block.W1"
    for broken, message in [
        ({key: value for key, value in weights.items() if key != name}, f"missing keys: {name}"),
        ({**weights, "model.extra": torch.ones(1)}, "unexpected keys: model.extra"),
        ({**weights, name: torch.ones(3)}, "W1"),
    ]:
        save_file(broken, tmp_path / "ttt" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(
            ValueError, match=f"could not be loaded: its weights do not fit the configuration: .*{message}"
        ):
            load_model(tmp_path / "ttt")
    (tmp_path / "ttt" / "model.safetensors").write_bytes(b"cut off")
    with pytest.raises(ValueError, match="could not be loaded"):
        load_model(tmp_path / "ttt")


# -------------------------------------------------------------------- checkpoints of the JAX code


def test_a_jax_checkpoint_is_converted_once(saved, tmp_path):
    source = Path(shutil.copytree(JAX / "params", tmp_path / "run"))
    cache = tmp_path / "cache"
    first = load_model(source, cache_dir=cache)
    (folder,) = (path for path in cache.iterdir() if path.is_dir())
    written = (folder / "model.safetensors").stat().st_mtime_ns
    again = load_model(source, cache_dir=cache)
    assert (folder / "model.safetensors").stat().st_mtime_ns == written
    ids = torch.arange(40)[None]
    assert torch.equal(first(ids).logits, again(ids).logits)
    with (source / "streaming_params").open("r+b") as file:
        file.seek(-1, 2)
        file.write(b"\0")
    load_model(source, cache_dir=cache)
    assert len([path for path in cache.iterdir() if path.is_dir()]) == 2, "a changed checkpoint is converted anew"
    model, tokenizer = interp.load(source, tokenizer=saved / "ttt", cache_dir=cache)
    assert model.config.model_type == "ttt" and tokenizer("the")["input_ids"]


def test_a_jax_checkpoint_without_what_it_needs_is_refused(tmp_path):
    source = Path(shutil.copytree(JAX / "params", tmp_path / "run"))
    with pytest.raises(ValueError, match="comes without a tokenizer: name the one that it was trained with"):
        interp.load(source, cache_dir=tmp_path / "cache")
    (source / "metadata.pkl").unlink()
    with pytest.raises(ValueError, match="there is no metadata.pkl or model_config.json beside it; pass config"):
        load_model(source, cache_dir=tmp_path / "cache")
    (tmp_path / "file").write_text("no folder")
    with pytest.raises(ValueError, match="could not be converted into cache_dir"):
        load_model(JAX / "trainstate", cache_dir=tmp_path / "file")


def test_a_repository_of_the_hub_loads_by_revision(saved, tmp_path, monkeypatch):
    """A cache laid out by hand, as the Hub's client leaves it; nothing is fetched."""
    repository = tmp_path / "models--someone--tiny"
    for revision, commit, eps in (("main", "a" * 40, 1e-6), ("v1", "b" * 40, 0.25)):
        shutil.copytree(saved / "ttt", repository / "snapshots" / commit)
        config = json.loads((saved / "ttt" / "config.json").read_text())
        (repository / "snapshots" / commit / "config.json").write_text(json.dumps({**config, "rms_norm_eps": eps}))
        (repository / "refs").mkdir(exist_ok=True)
        (repository / "refs" / revision).write_text(commit)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    for revision, eps in ((None, 1e-6), ("v1", 0.25), ("b" * 40, 0.25)):
        model, tokenizer = interp.load("someone/tiny", revision=revision)
        assert model.config.rms_norm_eps == eps and tokenizer("the")["input_ids"]
    with pytest.raises(ValueError, match="'someone/tiny'.* revision 'v9'"):
        interp.load("someone/tiny", revision="v9")
