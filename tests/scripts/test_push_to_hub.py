"""One command publishes a checkpoint in one commit, and what it published loads anywhere; else nothing has happened.

The Hub is a stand-in on 127.0.0.1 (hub_stand_in.py). Nothing else is reached.
"""

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import huggingface_hub.constants
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import LlamaConfig, LlamaForCausalLM

from modeling_ttt import TTTConfig, TTTForCausalLM

from .hub_stand_in import HubStandIn, Refusal

ROOT = Path(__file__).parents[2]
REPO = "someone/ttt-tiny"
TOKEN, READ_TOKEN, BAD_TOKEN = "hf_writes", "hf_reads", "hf_revoked"
TEXT = "It was the best of times, it was the worst of times. " * 40
SIZES = {"vocab_size": 320, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 2}
EVALUATION = {
    "arguments": {"length": 64},
    "tokens": 1000,
    "bytes": 4000,
    "loss_nats_per_token": 4.5,
    "nats_per_byte": {"model": 1.25},
}


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture(scope="module")
def released(tmp_path_factory):
    """A checkpoint with everything that a release has, and things that do not belong into a repository."""
    sys.path.insert(0, str(ROOT / "scripts"))
    try:
        from _tokenizer import train_bpe
    finally:
        sys.path.remove(str(ROOT / "scripts"))
    folder = tmp_path_factory.mktemp("checkpoint") / "released"
    torch.manual_seed(0)
    config = TTTConfig(**SIZES, num_hidden_layers=2, mini_batch_size=4, ttt_layer_type="mlp", pre_conv=True)
    TTTForCausalLM(config).save_pretrained(folder)
    train_bpe([TEXT], vocab_size=300, model_max_length=4096, needles=20).save_pretrained(folder)
    (folder / "evaluation.json").write_text(json.dumps(EVALUATION))
    (folder / "curve.csv").write_text("step,loss\n1,5.0\n")
    (folder / "curve.png").write_bytes(b"\x89PNG" * 20)
    (folder / "optimizer.bin").write_bytes(b"moments")
    (folder / ".secret").write_text("not for others")
    (folder / "checkpoint-1").mkdir()
    return folder


@pytest.fixture
def checkpoint(released, tmp_path):
    """A copy of it to break."""
    return Path(shutil.copytree(released, tmp_path / "checkpoint"))


@pytest.fixture
def hub(monkeypatch, tmp_path):
    """The stand-in, where this process' client and its token go to."""
    with HubStandIn({TOKEN: "write", READ_TOKEN: "read"}) as hub:
        hub.be_the_only(monkeypatch, tmp_path)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield hub
    assert hub.unknown == [], "the client asks for what the stand-in does not have"


def publish(folder, *options):
    from push_to_hub import main

    new_card = () if (folder / "README.md").exists() else ("--license", "mit")
    return main(["--model", str(folder), "--repo_id", REPO, *new_card, *options])


def history(hub, revision="main"):
    return hub.repositories[REPO].history[revision][1 if revision == "main" else 0 :]


def digest(folder):
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in folder.iterdir() if path.is_file()}


def test_one_commit_holds_weights_code_tokenizer_card_and_results(hub, released, capsys):
    before = digest(released)
    publish(released)
    assert len(history(hub)) == 1
    files = hub.files(REPO)
    assert {
        "config.json",
        "model.safetensors",
        "modeling_ttt.py",
        "ttt_cache.py",
        "tokenizer.json",
        "README.md",
    } <= set(files)
    assert {"evaluation.json", "curve.csv", "curve.png", "tokenizer_config.json"} <= set(files)
    assert not {"optimizer.bin", ".secret", "checkpoint-1"} & set(files)
    assert files["model.safetensors"] == (released / "model.safetensors").read_bytes()
    for name in ("evaluation.json", "curve.png", "tokenizer.json"):
        assert files[name] == (released / name).read_bytes()
    assert "someone/ttt-tiny" in files["README.md"].decode() and "1.2500" in files["README.md"].decode()
    assert digest(released) == before, "the folder is only read"
    printed = capsys.readouterr().out
    assert f"pushed {hub.url}/{REPO}/commit/{history(hub)[0]}" in printed
    assert "left out: .secret, checkpoint-1, optimizer.bin" in printed


def test_pushing_the_same_again_makes_no_commit_and_says_so(hub, released, capsys):
    publish(released, "--max_shard_size", "60KB")
    sent = len(hub.uploads)
    publish(released, "--max_shard_size", "60KB")
    assert len(history(hub)) == 1 and len(hub.uploads) == sent
    assert f"nothing to do: {REPO} holds all of this already, commit {history(hub)[0]}" in capsys.readouterr().out


def test_shards_of_an_earlier_push_do_not_stay_beside_whole_weights(hub, released):
    publish(released, "--max_shard_size", "60KB")
    shards = {name for name in hub.files(REPO) if name.endswith((".safetensors", ".index.json"))}
    assert len(shards) > 3 and "model.safetensors" not in shards
    hub.repositories[REPO].commit("main", {**hub.files(REPO), "notes.txt": b"by hand"}, None)
    publish(released)
    kept = hub.files(REPO)
    assert "model.safetensors" in kept and not shards & set(kept)
    assert kept["notes.txt"] == b"by hand"


def test_after_a_dropped_connection_only_what_is_missing_is_sent(hub, released, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.breaks_upload = lambda number: number >= 2
    with pytest.raises(ConnectionError, match="broke .*nothing is half done. Run the same command again") as raised:
        publish(released, "--max_shard_size", "60KB")
    assert TOKEN not in str(raised.value) and raised.value.__suppress_context__
    assert history(hub) == [] and set(hub.files(REPO)) == {".gitattributes"}
    arrived, tried = set(hub.objects), len(hub.uploads)
    assert len(arrived) == 2 and tried > 4
    hub.breaks_upload = lambda number: False
    publish(released, "--max_shard_size", "60KB")
    again = [oid for oid, whole in hub.uploads[tried:] if whole]
    assert again and not arrived & set(again)
    assert len(history(hub)) == 1 and sorted(again) == sorted(set(hub.objects) - arrived)


def test_one_broken_upload_is_repeated_in_the_same_run(hub, released, monkeypatch):
    monkeypatch.setattr("huggingface_hub.utils._http.time.sleep", lambda seconds: None)
    hub.breaks_upload = lambda number: number == 1
    publish(released)
    assert [whole for _, whole in hub.uploads].count(False) == 1
    assert hub.files(REPO)["model.safetensors"] == (released / "model.safetensors").read_bytes()


@pytest.mark.parametrize(
    ("token", "sentence"),
    [
        (BAD_TOKEN, r"the Hub refused the token \(401\): log in again .*; nothing was pushed to someone/ttt-tiny"),
        (READ_TOKEN, r"the token may not write to someone/ttt-tiny \(403\).*; nothing was pushed to someone/ttt-tiny"),
    ],
)
@pytest.mark.parametrize("exists", [False, True])
def test_a_refused_token_is_one_sentence_and_nothing_is_pushed(hub, released, monkeypatch, token, sentence, exists):
    if exists:
        publish(released)
    before = (dict(hub.repositories[REPO].refs) if exists else None, len(hub.uploads))
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(PermissionError, match=sentence) as raised:
        publish(released, "--max_shard_size", "60KB", "--revision", "next")
    assert "\n" not in str(raised.value) and token not in str(raised.value)
    assert raised.value.__cause__ is None and raised.value.__suppress_context__
    assert len(hub.uploads) == before[1]
    assert (hub.repositories[REPO].refs if exists else hub.repositories.get(REPO)) == before[0]


def test_a_token_that_the_server_repeats_is_not_shown(hub, released, monkeypatch):
    def repeat(handler, token):
        raise Refusal(401, f"no such token {token}")

    monkeypatch.setattr(hub.server.RequestHandlerClass, "_role", repeat)
    with pytest.raises(PermissionError, match="no such token <token>") as raised:
        publish(released)
    assert TOKEN not in str(raised.value)


def test_without_a_token_nothing_is_asked(hub, released, monkeypatch):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(ValueError, match="there is no token: set HF_TOKEN, or log in with `hf auth login`"):
        publish(released)
    Path(huggingface_hub.constants.HF_TOKEN_PATH).write_text(f"{TOKEN}\n")
    assert hub.requests == []
    publish(released)
    assert len(history(hub)) == 1


@pytest.mark.parametrize("spelling", ["--dry_run", "--dry-run"])
def test_a_dry_run_shows_files_and_sizes_and_asks_nothing(hub, released, monkeypatch, capsys, spelling):
    monkeypatch.delenv("HF_TOKEN")
    publish(released, spelling, "--max_shard_size", "60KB", "--create_pr", "--revision", "next")
    assert hub.requests == []
    printed = capsys.readouterr().out
    assert re.search(r"^\d+ files of \d+\.\d kB for a pull request to someone/ttt-tiny, branch next$", printed, re.M)
    assert re.search(r"^ +\d+\.\d kB  model-00001-of-0000\d\.safetensors$", printed, re.M)
    assert re.search(r"^ +80 bytes  curve.png$", printed, re.M)
    assert printed.endswith("dry run: nothing was sent\n")


def test_a_private_repository_a_branch_and_a_pull_request(hub, released, capsys):
    publish(released, "--private", "--revision", "v2/next", "--message", "the second")
    assert hub.repositories[REPO].private
    assert set(hub.files(REPO)) == {".gitattributes"} and "config.json" in hub.files(REPO, "v2/next")
    publish(released, "--create_pr")
    assert history(hub) == [] and "config.json" in hub.files(REPO, "refs/pr/1")
    printed = capsys.readouterr().out
    assert f"pushed {hub.url}/{REPO}/discussions/1\n" in printed and "push with --revision refs/pr/1" in printed
    publish(released, "--revision", "refs/pr/1", "--max_shard_size", "60KB")
    assert len(history(hub, "refs/pr/1")) == 2 and history(hub) == []


def test_a_public_repository_is_not_taken_for_a_private_one(hub, released):
    publish(released)
    with pytest.raises(ValueError, match="someone/ttt-tiny is public already"):
        publish(released, "--private", "--max_shard_size", "60KB")
    assert len(history(hub)) == 1


def test_a_commit_that_came_in_between_is_not_overwritten(hub, released):
    def someone_else(number):
        if number == 0:
            hub.repositories[REPO].commit("main", {"model.safetensors": b"theirs"}, None)
        return False

    hub.breaks_upload = someone_else
    with pytest.raises(ValueError, match="changed on the Hub in the meantime"):
        publish(released)
    assert hub.files(REPO) == {"model.safetensors": b"theirs"}


def test_a_frozen_configuration_is_pushed_with_a_warning(hub, checkpoint, caplog):
    config = json.loads((checkpoint / "config.json").read_text())
    (checkpoint / "config.json").write_text(json.dumps({**config, "frozen_layers": [0]}))
    with caplog.at_level(logging.WARNING):
        publish(checkpoint)
    assert "every user of the model will load it frozen: {'frozen_layers': [0]}" in caplog.text
    assert json.loads(hub.files(REPO)["config.json"])["frozen_layers"] == [0]
    assert "`frozen_layers=[0]`" in hub.files(REPO)["README.md"].decode()


def test_what_a_reader_would_miss_or_should_not_see_is_warned_about(hub, checkpoint, caplog):
    for path in checkpoint.glob("tokenizer*"):
        path.unlink()
    (checkpoint / "run.json").write_text('{"data": "/home/me/books"}')
    with caplog.at_level(logging.WARNING):
        publish(checkpoint, "--dry_run")
    assert "there is no tokenizer in the folder" in caplog.text
    assert "run.json names a path of this machine: /home/me/books" in caplog.text


def test_a_tokenizer_from_elsewhere_takes_the_place_of_the_own_one(hub, released, checkpoint):
    (checkpoint / "tokenizer.json").write_text("broken")
    publish(checkpoint, "--tokenizer", str(released))
    assert json.loads(hub.files(REPO)["tokenizer.json"]) == json.loads((released / "tokenizer.json").read_text())
    assert str(released) not in hub.files(REPO)["tokenizer_config.json"].decode()


def test_weights_keep_their_dtype_and_a_control_carries_no_code(hub, tmp_path):
    torch.manual_seed(0)
    LlamaForCausalLM(LlamaConfig(**SIZES, num_hidden_layers=1)).to(torch.bfloat16).save_pretrained(tmp_path / "llama")
    publish(tmp_path / "llama")
    files = hub.files(REPO)
    assert files["model.safetensors"] == (tmp_path / "llama" / "model.safetensors").read_bytes()
    assert not any(name.endswith(".py") for name in files) and "auto_map" not in json.loads(files["config.json"])


def _edit_weights(folder, change):
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def _not_finite(folder):
    _edit_weights(folder, lambda tensors: tensors["model.norm.weight"].__setitem__(0, float("nan")))


def _missing(folder):
    _edit_weights(folder, lambda tensors: tensors.pop("model.norm.weight"))


def _unknown(folder):
    _edit_weights(folder, lambda tensors: tensors.update(extra=torch.zeros(1)))


def _reshaped(folder):
    _edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.zeros(7)}))


def _mixed(folder):
    _edit_weights(folder, lambda tensors: tensors.update({"model.norm.weight": torch.ones(32).half()}))


def _truncated(folder):
    path = folder / "model.safetensors"
    path.write_bytes(path.read_bytes()[:-100])


def _without_a_shard(folder):
    (folder / "model.safetensors").rename(folder / "model-00001-of-00002.safetensors")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def _card(text):
    return lambda folder: (folder / "README.md").write_text(text)


GOOD_FIELDS = "license: mit\nlibrary_name: transformers\npipeline_tag: text-generation\ntags:\n- ttt\n"
UNFIT = {
    "no folder": (
        lambda f: f.rename(f.with_name("gone")),
        "model must be the folder of a checkpoint, got .*checkpoint",
    ),
    "no config": (lambda f: (f / "config.json").unlink(), "model must be a folder with a config.json"),
    "broken config": (lambda f: (f / "config.json").write_text("{"), "config.json of model .* is not valid json"),
    "no model type": (lambda f: (f / "config.json").write_text("{}"), "must name a model_type"),
    "no weights": (lambda f: (f / "model.safetensors").unlink(), "must hold model.safetensors or .*index.json"),
    "not finite": (_not_finite, r"of its weights 1 not finite \(model.norm.weight\)"),
    "missing": (_missing, r"of its weights 1 missing \(model.norm.weight\)"),
    "unknown": (_unknown, r"of its weights 1 not of this model \(extra\)"),
    "reshaped": (_reshaped, r"of its weights 1 of another shape \(model.norm.weight\)"),
    "mixed": (_mixed, "stored in one of float64, float32, bfloat16, float16, got F16, F32"),
    "truncated": (_truncated, "weights 'model.safetensors' are no whole safetensors file"),
    "a shard less": (_without_a_shard, "names files that are not there: model-00002-of-00002.safetensors"),
    "broken index": (
        lambda f: (f / "model.safetensors").rename(f / "model.safetensors.index.json"),
        "must be json with a weight_map",
    ),
    "broken tokenizer": (
        lambda f: (f / "tokenizer.json").write_text("{}"),
        "the tokenizer beside the model does not load",
    ),
    "placeholder": (_card(f"---\n{GOOD_FIELDS}---\n[More Information Needed]\n"), "a placeholder .* is left"),
    "no model-index": (
        _card(f"---\n{GOOD_FIELDS}---\nA model.\n"),
        "model-index must be given, there are measurements",
    ),
    "broken evaluation": (lambda f: (f / "evaluation.json").write_text("["), "evaluation .* is not valid json"),
}


@pytest.mark.parametrize("name", UNFIT)
def test_what_is_not_fit_to_publish_is_refused_before_anything_is_asked(hub, checkpoint, name):
    spoil, message = UNFIT[name]
    spoil(checkpoint)
    with pytest.raises(ValueError, match=message):
        publish(checkpoint)
    assert hub.requests == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--repo_id", "someone"), "repo_id must be user/name.* got 'someone'"),
        (("--repo_id", "some one/x"), "repo_id must be user/name.* got 'some one/x'"),
        (("--repo_id", "a/b/c"), "repo_id must be user/name.* got 'a/b/c'"),
        (("--max_shard_size", "large"), "max_shard_size must be a number with KB, .* got 'large'"),
        (("--license", "freeware"), "license must be an identifier of the Hub, .* got 'freeware'"),
        (("--license", ""), "license must be given for a new card"),
        (("--evaluation", "nowhere.json"), "nowhere.json"),
        (("--tokenizer", "nobody/nothing"), "tokenizer 'nobody/nothing' does not load: nobody/nothing is not a"),
    ],
)
def test_wrong_options_are_named_before_anything_is_pushed(hub, released, options, message):
    with pytest.raises((ValueError, OSError), match=message):
        publish(released, *options)
    assert hub.repositories == {}


def test_options_for_a_new_card_are_not_ignored_where_there_is_a_card(hub, checkpoint):
    (checkpoint / "README.md").write_text("---\n---\n")
    with pytest.raises(ValueError, match="model has a README.md: license, datasets need new_card, which replaces it"):
        publish(checkpoint, "--license", "mit", "--datasets", "a/b")
    publish(checkpoint, "--license", "mit", "--new_card")
    assert "license: mit" in hub.files(REPO)["README.md"].decode()


def test_the_card_of_a_folder_loads_the_repository_once_it_is_pushed(hub, checkpoint, monkeypatch, capsys):
    from write_card import main as write_card

    monkeypatch.chdir(checkpoint.parent)
    write_card(["--model", checkpoint.name, "--license", "mit"])
    publish(Path(checkpoint.name))
    card = hub.files(REPO)["README.md"].decode()
    assert card.count(f'from_pretrained("{REPO}")') == 2 and checkpoint.name + '"' not in card
    assert f'from_pretrained("{checkpoint.name}")' in (checkpoint / "README.md").read_text(), "the folder is only read"
    assert f"the card loads {REPO} where it loaded" in capsys.readouterr().out


# From here on in clean processes, as users are.

PUSH = f"""
import runpy, sys
sys.path.insert(0, "{ROOT / "scripts"}")
folder = sys.argv[1]
sys.argv[1:] = ["--model", folder, "--repo_id", "{REPO}", "--private", "--license=mit", "--max_shard_size=60KB"]
try:
    runpy.run_path("{ROOT / "scripts" / "push_to_hub.py"}", run_name="__main__")
except SystemExit as end:
    assert end.code == 0, end.code
from transformers import AutoTokenizer
from modeling_ttt import TTTForCausalLM
TTTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
TTTForCausalLM.from_pretrained(folder).push_to_hub("someone/direct", max_shard_size="60KB")
AutoTokenizer.from_pretrained(folder).push_to_hub("someone/direct")
"""
LOAD = f"""
import json, sys
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
torch.set_num_threads(1)
results = []
for name in ("{REPO}", "someone/direct"):
    model = AutoModelForCausalLM.from_pretrained(name, trust_remote_code=TRUST)
    assert type(model).__module__.startswith(MODULE), type(model).__module__
    assert AutoTokenizer.from_pretrained(name, trust_remote_code=TRUST)("best of times")["input_ids"]
    with torch.no_grad():
        results.append(model(torch.tensor(json.loads(sys.argv[1]))).logits.flatten().tolist())
"""
WITH_PACKAGE = f"""
import json, modeling_ttt
TRUST, MODULE = False, "modeling_ttt."
{LOAD}
print(json.dumps(results))
"""
WITHOUT_PACKAGE = f"""
import sys
sys.modules["modeling_ttt"] = None  # the package is not there
TRUST, MODULE = True, "transformers_modules."
{LOAD}
exec(sys.argv[2])  # the code of the card
print(json.dumps([*results, [p.shape[-1] for p in outputs.plasticity]]))
"""


def start(code, home, hub, *arguments, path=None):
    """A clean process with a cache of its own, whose only Hub is the stand-in; `path` is where the package is."""
    home.mkdir()
    inherited = {
        name: value
        for name, value in os.environ.items()
        if not name.startswith(("HF_", "PYTHONPATH")) and not name.lower().endswith("_proxy")
    }
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_TOKEN": TOKEN, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.Popen(
        [sys.executable, "-c", code, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=home,
        env={**inherited, **settings, **({"PYTHONPATH": path} if path else {})},
    )


def finish(process):
    """What the process printed; it must have ended well and never have shown the token."""
    out, err = process.communicate(timeout=300)
    assert process.returncode == 0, err[-3000:]
    assert TOKEN not in out + err
    return out


def test_what_clean_processes_push_loads_in_others_with_and_without_the_package(hub, released, tmp_path):
    finish(start(PUSH, tmp_path / "a", hub, str(released), path=str(ROOT)))
    assert len(history(hub)) == 1 and hub.repositories[REPO].private
    assert sum(name.endswith(".safetensors") for name in hub.files(REPO)) > 1
    with torch.no_grad():
        ids = [list(range(2, 13))]
        expected = TTTForCausalLM.from_pretrained(released)(torch.tensor(ids)).logits.flatten().tolist()
    code = re.search(r"```python\n(.*?)```", hub.files(REPO)["README.md"].decode(), flags=re.DOTALL).group(1)
    with_package = start(WITH_PACKAGE, tmp_path / "b", hub, json.dumps(ids), path=str(ROOT))
    without = start(WITHOUT_PACKAGE, tmp_path / "c", hub, json.dumps(ids), code)
    assert json.loads(finish(with_package)) == [expected, expected]
    *logits, lengths = json.loads(finish(without))
    assert logits == [expected, expected]
    assert len(lengths) == 2 and lengths[0] > 3
    storage = [token for _, path, token in hub.requests if path.startswith("/lfs/")]
    assert storage and set(storage) == {None}, "the token goes to the Hub, not to its storage"
