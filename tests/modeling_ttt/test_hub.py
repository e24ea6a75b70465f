"""A pushed checkpoint loads anywhere: with the code it carries, or with the package and without running that code.

The snapshot is laid out as the Hub cache lays it out, because loading from a folder is more lenient than from the Hub.
"""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import modeling_ttt
from modeling_ttt import TTTForCausalLM, TTTModel

from .helpers import BACKBONES, tiny, tokens

PACKAGE = Path(modeling_ttt.__file__).parent
COMMIT = "0123456789abcdef0123456789abcdef01234567"

LOAD = """
import json, sys
sys.modules["modeling_ttt"] = None  # the package is not there
import torch
from transformers import AutoModel, AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained("someone/ttt", trust_remote_code=True).double()
base = AutoModel.from_pretrained("someone/ttt", trust_remote_code=True)
ids = torch.tensor(json.loads(sys.argv[1]))
with torch.no_grad():
    out = model(ids)
    text = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
with torch.no_grad():
    base_state = model(ids).past_key_values
assert model.clone_cache(base_state).get_seq_length() == ids.shape[1]
print(json.dumps({
    "module": type(model).__module__, "base": type(base).__name__, "logits": out.logits.sum().item(),
    "plasticity": out.plasticity[0].sum().item(), "text": text.tolist(),
}))
"""


@pytest.fixture
def snapshot(tmp_path, monkeypatch):
    """(HF_HOME holding the snapshot of a checkpoint pushed with its code, the model)."""
    monkeypatch.setattr(TTTForCausalLM, "_auto_class", None)
    TTTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model = tiny(dtype=torch.float32, ttt_layer_type="mlp", **BACKBONES["mamba"])
    home = tmp_path / "home"
    repo = home / "hub" / "models--someone--ttt"
    model.save_pretrained(repo / "snapshots" / COMMIT)
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(COMMIT)
    return home, model.double()


def run(code, home, *args, **env):
    """The last line printed by a clean process, offline, without the package's folder on the path."""
    clean = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    process = subprocess.run(
        [sys.executable, "-c", code, *args],
        capture_output=True,
        text=True,
        cwd=home,
        env={**clean, "HF_HOME": str(home), "HF_HUB_OFFLINE": "1", **env},
        check=False,
    )
    assert process.returncode == 0, process.stderr[-3000:]
    return process.stdout.strip().splitlines()[-1]


def test_a_pushed_checkpoint_loads_in_a_clean_process_without_the_package(snapshot):
    home, model = snapshot
    ids = tokens(1, 11)
    got = json.loads(run(LOAD, home, json.dumps(ids.tolist())))
    with torch.no_grad():
        out = model(ids)
        text = model.generate(ids, max_new_tokens=5, do_sample=False, eos_token_id=None)
    assert got["module"].startswith("transformers_modules.")
    assert got["base"] == "TTTModel"
    assert abs(got["logits"] - float(out.logits.sum())) < 1e-9
    assert abs(got["plasticity"] - float(out.plasticity[0].sum())) < 1e-9
    assert got["text"] == text.tolist()


def test_with_the_package_imported_no_remote_code_runs(snapshot):
    home, _ = snapshot
    for path in (home / "hub" / "models--someone--ttt" / "snapshots" / COMMIT).glob("*.py"):
        path.write_text("raise RuntimeError('remote code ran')\n")
    code = f"""
import sys
sys.path.insert(0, {str(PACKAGE.parent)!r})
import modeling_ttt
from transformers import AutoModel, AutoModelForCausalLM
for kwargs in ({{}}, {{"trust_remote_code": True}}):
    model = AutoModelForCausalLM.from_pretrained("someone/ttt", **kwargs)
    base = AutoModel.from_pretrained("someone/ttt", **kwargs)
    assert type(model) is modeling_ttt.TTTForCausalLM and type(base) is modeling_ttt.TTTModel
print("ours")
"""
    assert run(code, home) == "ours"


def test_code_is_written_only_when_asked(tmp_path, monkeypatch):
    monkeypatch.setattr(TTTForCausalLM, "_auto_class", None)
    tiny().save_pretrained(tmp_path / "plain")
    assert not list((tmp_path / "plain").glob("*.py"))
    assert "auto_map" not in json.loads((tmp_path / "plain" / "config.json").read_text())
    TTTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    tiny().save_pretrained(tmp_path / "code")
    written = {path.name for path in (tmp_path / "code").glob("*.py")}
    assert {"modeling_ttt.py", "configuration_ttt.py", "scan_chunked.py", "ttt_cache.py"} <= written
    assert "auto_map" in json.loads((tmp_path / "code" / "config.json").read_text())


def test_push_to_hub_uploads_the_code_when_asked(monkeypatch):
    uploaded = {}

    class FakeHub:
        def create_repo(self, repo_id, **kwargs):
            return type("Repo", (), {"repo_id": repo_id})

    class Card:
        def save(self, path):
            Path(path).write_text("card")

    hub = "transformers.utils.hub"
    monkeypatch.setattr(f"{hub}.hf_api", FakeHub)
    monkeypatch.setattr(f"{hub}.create_and_tag_model_card", lambda *args, **kwargs: Card())
    monkeypatch.setattr(
        TTTForCausalLM,
        "_upload_modified_files",
        lambda self, folder, repo_id, **kwargs: uploaded.update({repo_id: {p.name for p in Path(folder).iterdir()}}),
    )
    monkeypatch.setattr(TTTForCausalLM, "_auto_class", None)
    tiny().push_to_hub("someone/plain")
    TTTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    tiny().push_to_hub("someone/code")
    assert {"config.json", "model.safetensors", "README.md"} <= uploaded["someone/plain"]
    assert not any(name.endswith(".py") for name in uploaded["someone/plain"])
    assert {f"{name}.py" for name in shipped_files()} <= uploaded["someone/code"]


@pytest.mark.parametrize("shards", [1, 3])
def test_saving_and_loading_keeps_every_bit(tmp_path, shards):
    model = tiny(dtype=torch.float32, ttt_layer_type="mlp", tie_word_embeddings=False, **BACKBONES["mamba"])
    model.save_pretrained(tmp_path, max_shard_size="5GB" if shards == 1 else "60KB")
    assert len(list(tmp_path.glob("*.safetensors"))) >= shards
    loaded = TTTForCausalLM.from_pretrained(tmp_path)
    kept, original = loaded.config.to_dict(), model.config.to_dict()
    assert {k: v for k, v in kept.items() if k not in ("dtype", "_name_or_path")} == {
        k: v for k, v in original.items() if k not in ("dtype", "_name_or_path")
    }
    for (name, a), (other, b) in zip(model.state_dict().items(), loaded.state_dict().items(), strict=True):
        assert name == other and torch.equal(a, b)
    base = TTTModel.from_pretrained(tmp_path)
    assert torch.equal(base.norm.weight, model.model.norm.weight)


def shipped_files():
    """modeling_ttt.py and every sibling it imports, directly or not."""
    found, todo = set(), ["modeling_ttt"]
    while todo:
        name = todo.pop()
        if name not in found:
            found.add(name)
            text = (PACKAGE / f"{name}.py").read_text()
            todo += re.findall(r"^\s*from \.(\w+) import", text, flags=re.MULTILINE)
    return sorted(found)


@pytest.mark.parametrize("name", shipped_files())
def test_shipped_code_follows_the_rules_of_the_hub_loader(name):
    text = (PACKAGE / f"{name}.py").read_text()
    tree = ast.parse(text)
    imports = {
        line.strip()
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.level
        for line in [f"from .{node.module} import"]
    }
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            assert node.level in (0, 1), "only siblings are copied"
            assert node.level == 0 or (node.module and "." not in node.module), "no `from . import x`, no sub-packages"
            assert node.level == 1 or not node.module.startswith("modeling_ttt"), "no absolute self-import"
        if isinstance(node, ast.Import):
            assert not any(alias.name.split(".")[0] in ("triton", "modeling_ttt") for alias in node.names)
    # The loader finds imports with a regular expression, in docstrings too.
    for line in re.findall(r"^\s*from \.\w* import|^\s*from \.\w+", text, flags=re.MULTILINE):
        assert any(entry.startswith(line.strip()) for entry in imports), line
