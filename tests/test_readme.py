"""Every Python block of the README runs, in order, and its flags exist."""

import contextlib
import io
import re
from pathlib import Path

import pytest

from modeling_ttt import TTTForCausalLM

ROOT = Path(__file__).parents[1]
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    (tmp_path / "model_cards").symlink_to(ROOT / "model_cards")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(TTTForCausalLM, "_auto_class", None)  # the last block registers the code for pushing
    blocks = re.findall(r"```python\n(.*?)```", TEXT, flags=re.DOTALL)
    assert len(blocks) >= 5
    namespace = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for block in blocks:
            exec(compile(block, "README.md", "exec"), namespace)
    assert namespace["learnt"], "the README says that this layer lowers its inner loss"
    assert namespace["answer"] == "9f8e7d6c"
    assert "9f8e7d6c" not in (namespace["frozen"], namespace["forgotten"])
    assert (tmp_path / "state.safetensors").is_file()
    assert (tmp_path / "with_code" / "modeling_ttt.py").is_file()


@pytest.mark.parametrize("link", sorted(set(re.findall(r"\]\(([^)#:]+)\)", TEXT))))
def test_links_to_files_exist(link):
    assert (ROOT / link).exists()


def test_flags_of_the_commands_exist():
    commands = re.findall(r"scripts/(\w+)\.py((?:[^`\n]|\\\n)*)", TEXT)
    for name, rest in commands:
        source = (ROOT / "scripts" / f"{name}.py").read_text(encoding="utf-8")
        for flag in re.findall(r"--(\w+)", rest):
            assert flag == "help" or re.search(rf"\b{flag}: ", source), f"{name}: --{flag}"
