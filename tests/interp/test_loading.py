"""Models and tokenizers load by name, and each thing that can be missing has its own message."""

import ast
import json
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import interp
from interp.loading import load_model, load_tokenizer, parse_overrides
from tests.interp.tiny_corpus import make_model, make_tokenizer


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
