"""The Python of docs/attribution.md and docs/captum.md runs and finds what it says."""

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


def test_the_examples_with_captum_agree_with_each_other(monkeypatch):
    monkeypatch.chdir(ROOT)
    text = (ROOT / "docs" / "captum.md").read_text(encoding="utf-8")
    space = {}
    for block in re.findall(r"```python\n(.*?)```", text, flags=re.DOTALL):
        exec(compile(block, "captum.md", "exec"), space)
    gates = space["gated"].open_gates()
    ends = [space["gated"](x * gates).item() for x in (0.0, 1.0)]
    assert abs(space["attribution"].sum() - (ends[1] - ends[0]) - space["delta"]).item() < 1e-4
    for first, end in space["spans"]:
        gates[..., first:end] = 0
        assert abs(space["knocked_out"][0, 0, 0, first] - (ends[1] - space["gated"](gates).item())) < 1e-4
        gates[..., first:end] = 1
    assert space["gradient"].shape == space["attribution"].shape
    assert len(space["found"].seq_attr_dict) == space["ids"].shape[1]
