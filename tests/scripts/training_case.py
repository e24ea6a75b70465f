"""A training small enough for a test: a tokenizer, two books, a config, and the arguments that go with them."""

import json
from pathlib import Path

ROOT = Path(__file__).parents[2]
TEXT = "It was the best of times, it was the worst of times, it was the age of wisdom, 1775. " * 60
CONFIG = {
    "model_type": "ttt",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "mini_batch_size": 4,
    "share_qk": True,
    "pre_conv": True,
    "use_gate": True,
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 300,
    "hidden_size": 16,
    "intermediate_size": 24,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
}


def new_tokenizer():
    """A byte-level BPE of 300 entries; `scripts` must be importable."""
    from _tokenizer import train_bpe

    return train_bpe([TEXT], vocab_size=300, model_max_length=4096, needles=50)


def fill(folder: Path, tokenizer) -> Path:
    """Lay out tokenizer/, config.json, books/ and held.txt in a folder, and return it."""
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text(TEXT)
    (folder / "books" / "b.txt").write_text(TEXT.upper())
    (folder / "held.txt").write_text(TEXT[:2000])
    return folder


def arguments(workplace: Path, output: Path, *options: object) -> list[str]:
    """The command line of 8 steps on that folder; later options override."""
    return [
        *["--config", str(workplace / "config.json"), "--tokenizer", str(workplace / "tokenizer")],
        *["--train_data", str(workplace / "books"), "--validation_data", str(workplace / "held.txt")],
        *["--output_dir", str(output), "--stages", "24x4:4", "48x2:4", "--warmup_steps", "2"],
        *["--log_every", "2", "--eval_every", "4", "--eval_tokens", "200", *map(str, options)],
    ]


def read_metrics(run: Path) -> list[dict]:
    """The rows of metrics.jsonl without how fast the machine was."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in row.items() if name != "tokens_per_second"} for row in rows]


def assert_same_training(one: Path, other: Path, step: int = 8) -> None:
    """Weights, moments and metrics of two runs are equal to the bit."""
    import torch
    from safetensors.torch import load_file

    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (load_file(run / f"checkpoint-{step}" / name) for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    assert read_metrics(one) == read_metrics(other)
