"""The Python of docs/attribution.md runs and finds what it says."""

import contextlib
import io
import re
from pathlib import Path

ROOT = Path(__file__).parents[2]


def test_the_example_finds_the_told_digit(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "attribution.md").read_text(encoding="utf-8")
    (block,) = re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL)
    space = {}
    with contextlib.redirect_stdout(io.StringIO()):
        exec(compile(block, "attribution.md", "exec"), space)
    assert space["tokenizer"].decode(space["ids"][0, space["columns"][0, 0]]) == "9"
    assert abs(space["found"].completeness_error.item()) < 1e-4
    assert abs(space["shares"].sum(-1) - 1).max() < 1e-4 and space["pooled"].values.shape == (1, 4, 8, 8)
