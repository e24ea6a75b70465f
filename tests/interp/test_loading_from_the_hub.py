"""Names of the Hub load: models, and checkpoints of the JAX code as they were released; each failure says what it is.

The Hub is a stand-in on 127.0.0.1.
"""

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM

import interp
from interp.hub_files import jax_files
from interp.loading import load_model, load_tokenizer, local_copy
from modeling_ttt.convert_jax import convert_checkpoint
from tests.interp.tiny_corpus import make_model, make_tokenizer
from tests.scripts.hub_stand_in import HubStandIn

JAX = Path(__file__).parents[1] / "modeling_ttt" / "goldens" / "jax" / "ttt_linear"
TRAIN_STATE = (JAX / "trainstate" / "step_2" / "streaming_train_state_2").read_bytes()
METADATA = (JAX / "trainstate" / "step_2" / "metadata_2.pkl").read_bytes()
TOKEN = "hf_reads"


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    tokenizer = make_tokenizer()
    torch.manual_seed(0)
    make_model(tokenizer).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.fixture
def hub(monkeypatch, tmp_path):
    with HubStandIn({TOKEN: "read"}) as hub:
        hub.be_the_only(monkeypatch, tmp_path / "home")
        monkeypatch.delenv("HF_TOKEN", raising=False)
        monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
        yield hub
    assert hub.unknown == [], "the client asks for what the stand-in does not have"


def files_of(folder):
    return {path.name: path.read_bytes() for path in folder.iterdir()}


def asked_for(hub):
    return {path.rsplit("/", 1)[-1] for method, path, _ in hub.requests if method == "GET" and "/resolve/" in path}


def test_a_released_jax_checkpoint_loads_by_its_name(hub, saved, tmp_path, monkeypatch):
    """A repository as the authors of the JAX code released theirs: a train state, no config.json."""
    others = {"README.md": b"A model.", "dataset.pkl": b"nothing to unpickle", ".gitattributes": b""}
    hub.put("official/ttt", {"streaming_train_state": TRAIN_STATE, "metadata.pkl": METADATA, **others})
    model, tokenizer = interp.load("official/ttt", tokenizer=saved)
    assert tokenizer("the")["input_ids"]
    convert_checkpoint(JAX / "trainstate", tmp_path / "converted")
    expected = AutoModelForCausalLM.from_pretrained(tmp_path / "converted").eval()
    ids = torch.arange(40)[None]
    assert torch.equal(model(ids).logits, expected(ids).logits)
    assert asked_for(hub) == {"streaming_train_state", "metadata.pkl"}, "what no conversion reads stays there"
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    asked = len(hub.requests)
    assert torch.equal(load_model("official/ttt")(ids).logits, expected(ids).logits)
    assert len(hub.requests) == asked
    assert {path.name for path in local_copy("official/ttt").iterdir()} == {"streaming_train_state", "metadata.pkl"}


def test_a_jax_checkpoint_of_the_hub_needs_a_tokenizer_and_a_configuration(hub, saved):
    hub.put("official/ttt", {"step_2/streaming_train_state_2": TRAIN_STATE})
    with pytest.raises(ValueError, match="JAX checkpoint 'official/ttt' comes without a tokenizer: name the one"):
        interp.load("official/ttt")
    assert asked_for(hub) == set(), "that is known before anything large is fetched"
    with pytest.raises(ValueError, match=r"there is no metadata\.pkl or model_config\.json beside it; pass config"):
        load_model("official/ttt")
    with pytest.raises(ValueError, match="the configuration does not fit the parameters: .*hidden_size is 768 there"):
        load_model("official/ttt", config="125m")
    hub.put("official/ttt", {"step_2/streaming_train_state_2": TRAIN_STATE, "step_2/metadata_2.pkl": METADATA})
    assert load_model("official/ttt").config.hidden_size == 64
    hub.put("official/ttt", {"step_2/streaming_train_state_2": b"", "step_4/streaming_train_state_4": b""})
    with pytest.raises(ValueError, match=r"repository 'official/ttt' holds several JAX checkpoints \(step_2/"):
        load_model("official/ttt")


def test_the_files_of_a_jax_checkpoint_are_chosen_as_those_of_a_folder():
    for names, chosen in (
        (["README.md", "config.json", "model.safetensors", "streaming_params.txt", "a/streaming_params"], []),
        (["streaming_params", "streaming_train_state", "metadata.pkl"], ["streaming_params", "metadata.pkl"]),
        (["flax_params", "model_config.json", "x.pkl"], ["flax_params", "model_config.json"]),
        (["streaming_train_state", "step_3/streaming_params_3", "step_4/flax_params"], ["streaming_train_state"]),
        (["step_3/streaming_params_3", "metadata_3.pkl"], ["step_3/streaming_params_3"]),
        (
            ["streaming_params_7", "metadata_7.pkl", "metadata.pkl", "metadata_8.pkl"],
            ["streaming_params_7", "metadata_7.pkl", "metadata.pkl"],
        ),
    ):
        assert jax_files(names, "it") == chosen
    for names in (["streaming_params_1", "streaming_params_2"], ["step_1/flax_params", "step_2/streaming_params"]):
        with pytest.raises(ValueError, match="it holds several JAX checkpoints"):
            jax_files(names, "it")


def test_each_way_a_repository_fails_to_load_is_told_apart(hub, saved, monkeypatch):
    whole = files_of(saved)
    hub.put("someone/whole", whole)
    hub.put("someone/hidden", whole, private=True)
    hub.put("someone/notes", {"README.md": b"Nothing yet."})
    hub.put("someone/weightless", {name: value for name, value in whole.items() if "safetensors" not in name})
    hub.put("someone/cut", {**whole, "model.safetensors": whole["model.safetensors"][:-9]})
    config = json.loads(whole["config.json"])
    hub.put("someone/llama", {**whole, "config.json": json.dumps({**config, "model_type": "llama"}).encode()})
    for name, options, message in (
        ("someone/nothing", {}, "'someone/nothing' could not be read: .*not a valid model identifier"),
        ("someone/hidden", {}, "'someone/hidden' could not be read: .*private repository, make sure to pass a token"),
        ("someone/whole", {"revision": "v9"}, "'someone/whole', revision 'v9', could not be read: v9 is not a valid"),
        ("someone/notes", {}, "repository 'someone/notes' holds neither a config.json nor a JAX checkpoint"),
        ("someone/weightless", {}, "'someone/weightless' could not be loaded: .*model.safetensors"),
        ("someone/cut", {}, "'someone/cut' could not be loaded: .*file not fully covered"),
        ("someone/llama", {}, "not a TTT model: the configuration 'llama'"),
    ):
        with pytest.raises(ValueError, match=f"(?s){message}"):
            load_model(name, **options)
    with pytest.raises(ValueError, match="no tokenizer could be loaded from 'someone/notes'"):
        load_tokenizer("someone/notes")
    with pytest.raises(ValueError, match=r"checkpoint 'someone/nothing' is no path here and could not be fetched"):
        local_copy("someone/nothing")
    monkeypatch.setenv("HF_TOKEN", "hf_revoked")
    with pytest.raises(ValueError, match="could not be read") as raised:
        load_model("someone/hidden")
    assert "hf_revoked" not in str(raised.value)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    ids = torch.arange(9)[None]
    assert torch.equal(load_model("someone/hidden")(ids).logits, load_model(saved)(ids).logits)


def test_a_connection_that_breaks_is_called_that_and_the_next_try_succeeds(hub, saved, monkeypatch):
    hub.put("someone/whole", files_of(saved))
    hub.breaks_download = True
    with pytest.raises(ValueError, match=r"'someone/whole' could not be loaded: the Hub could not be reached \(\w+: "):
        load_model("someone/whole")
    hub.breaks_download = False
    assert load_model("someone/whole").config.model_type == "ttt"
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    template = "http://127.0.0.1:9/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr("huggingface_hub.constants.HUGGINGFACE_CO_URL_TEMPLATE", template)
    with pytest.raises(ValueError, match=r"'someone/other' could not be read: the Hub could not be reached \(\w+: "):
        load_model("someone/other")


def test_a_conversion_fetches_a_pytorch_checkpoint_without_the_rest(hub, saved, tmp_path):
    hub.put("someone/torch", {**files_of(saved), "training.log": b"long", "optimizer.pt": b"longer"})
    convert_checkpoint(local_copy("someone/torch"), tmp_path / "out")
    assert not {"training.log", "optimizer.pt"} & asked_for(hub)
