"""The numbers of a model card: n-gram baselines equal counting by hand, needles are scored as greedy decoding."""

import csv
import json
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM

from tests.scripts.training_case import LLAMA

ROOT = Path(__file__).parents[2]
TEXT = "It was the best of times, it was the worst of times. " * 40


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture
def tokenizer():
    from _tokenizer import train_bpe

    return train_bpe([TEXT], vocab_size=300, model_max_length=4096, needles=20)


class Copier(nn.Module):
    """Predicts the token that stood `distance` tokens before the next one."""

    def __init__(self, distance, vocab_size):
        super().__init__()
        self.distance, self.vocab_size = distance, vocab_size
        self.anchor = nn.Parameter(torch.zeros(()))

    def forward(self, input_ids, use_cache=False, logits_to_keep=0):
        logits = nn.functional.one_hot(input_ids.roll(self.distance - 1, 1), self.vocab_size).float() * 50
        return SimpleNamespace(logits=logits[:, -logits_to_keep:])


def test_ngram_probabilities_equal_a_count_by_hand_and_sum_to_one():
    from _evaluation import NgramBaseline

    stream = np.array([0, 1, 2, 1, 2, 1, 0, 2, 2, 1])
    model = NgramBaseline(stream, 3, order=2)
    unigram = (np.array([2, 4, 4]) + 1) / 13
    # Behind 1 stand 2, 2 and 0: three tokens of two kinds.
    expected = (np.array([1, 0, 2]) + 2 * unigram) / 5
    got = np.exp(-model.losses(np.array([[1, token] for token in range(3)]), bos=0)[:, 1])
    np.testing.assert_allclose(got, expected)
    trigram = NgramBaseline(stream, 3, order=3)
    for first in range(3):
        for second in range(3):
            windows = np.array([[first, second, token] for token in range(3)])
            assert np.exp(-trigram.losses(windows, bos=0)[:, 2]).sum() == pytest.approx(1.0)


def test_higher_orders_predict_regular_text_better(tokenizer):
    from _evaluation import NgramBaseline
    from _mix import token_stream

    stream = token_stream({"a": TEXT}, tokenizer)
    windows = stream[1:101].astype(np.int64).reshape(2, 50)
    means = [NgramBaseline(stream, len(tokenizer), order).losses(windows, 0).mean() for order in (1, 2, 3)]
    assert means[0] > means[1] > means[2]


def test_nats_per_byte_counts_the_bytes_of_the_text(tokenizer):
    from _evaluation import nats_per_byte, token_bytes

    ids = np.array(tokenizer.encode("naïve times", add_special_tokens=False))
    sizes = token_bytes(tokenizer)
    assert sizes[ids].sum() == len("naïve times".encode())
    assert sizes[tokenizer.all_special_ids].sum() == 0
    assert nats_per_byte(np.full(len(ids), 2.0), ids, sizes) == pytest.approx(2.0 * len(ids) / 12)


def test_window_losses_cover_every_token_once(tokenizer):
    from _evaluation import window_losses

    ids = np.arange(10, 33)
    losses, tokens = window_losses(Copier(1, 300), ids, bos=0, length=6)
    np.testing.assert_array_equal(tokens.ravel(), np.arange(10, 30))
    assert losses.shape == (4, 5)
    with pytest.raises(ValueError, match="length must be at most the 24 tokens"):
        window_losses(Copier(1, 300), ids, bos=0, length=25)


def test_loss_by_context_is_that_of_the_same_tokens_read_alone(tokenizer):
    from _evaluation import loss_by_context

    torch.manual_seed(0)
    model = LlamaForCausalLM(LlamaConfig(**{**LLAMA, "initializer_range": 0.5})).double().eval()
    ids = np.random.default_rng(0).integers(3, 300, 5 * 63 + 20)
    read = []
    rows = loss_by_context(model, ids, bos=0, length=64, most=3, tick=read.append)
    assert [row["length"] for row in rows] == [8, 16, 32, 64] and sum(read) == 3 * (8 + 16 + 32 + 64)
    for row in rows:
        alone = []
        for window in (0, 2, 4):
            last = ids[window * 63 : window * 63 + 63][-(row["length"] - 1) :]
            logits = model(torch.tensor([[0, *last]])).logits[0, -5:-1].log_softmax(-1).detach()
            alone.append([-float(logits[i, token]) for i, token in enumerate(last[-4:])])
        row["alone"] = np.asarray(alone).mean(1)
        assert row["loss"] == pytest.approx(row["alone"].mean(), rel=1e-5)
        assert (row["windows"], row["tokens"]) == (3, 4)
    for row in rows:
        difference = row["alone"] - rows[-1]["alone"]
        assert row["difference"] == pytest.approx(difference.mean(), abs=1e-5)
        assert row["error"] == pytest.approx(difference.std(ddof=1) / 3**0.5, abs=1e-5)
    # Whoever looks two tokens back gains nothing from more.
    assert all(row["difference"] == 0 for row in loss_by_context(Copier(2, 300), ids, bos=0, length=64))
    assert loss_by_context(Copier(2, 300), ids, bos=0, length=64, most=1)[0]["error"] is None
    with pytest.raises(ValueError, match="length must be at least 32 for a loss by context, got 31"):
        loss_by_context(model, ids, bos=0, length=31)


def test_parts_of_a_measurement_last_until_it_is_finished_and_serve_no_other(tmp_path):
    from _parts import Parts

    path, calls = tmp_path / ".parts", []

    def measure():
        calls.append(1)
        return {"rows": (1, 2.5)}

    for _ in range(2):
        parts = Parts(path, {"seed": 1, "lengths": (3, 4)})
        assert parts.get("a", measure) == {"rows": [1, 2.5]}
    assert len(calls) == 1 and len(parts) == 1
    assert len(Parts(path, {"seed": 2, "lengths": (3, 4)})) == 0
    parts.finish()
    assert list(tmp_path.iterdir()) == []
    path.write_text("[1]")
    with pytest.raises(ValueError, match="holds no parts of a measurement; remove it"):
        Parts(path, {})


def test_needles_are_right_when_the_value_is_copied_and_wrong_when_not(tokenizer):
    from _evaluation import needle_accuracy, needle_windows
    from _mix import token_stream

    stream = token_stream({"a": TEXT}, tokenizer)
    windows = needle_windows(tokenizer, stream, value_digits=4, distance=20, count=6, seed=0)
    text = tokenizer.decode(windows[0], skip_special_tokens=True)
    assert text.startswith(" Define Key=") and " Query Key=" in text
    define, _, query = text.partition(" Query ")
    assert define[1:].split(".")[0].removeprefix("Define ") == query
    words = len(windows[0]) - 1 - next(i for i in range(len(windows[0])) if windows[0][i] == windows[0][-1])
    apart = [d for d in range(1, words + 1) if (windows[:, -4:] == windows[:, -4 - d : len(windows[0]) - d]).all()]
    assert needle_accuracy(Copier(apart[0], len(tokenizer)), windows, 4) == {"exact": 1.0, "digits": 1.0}
    assert needle_accuracy(Copier(1, len(tokenizer)), windows, 4)["exact"] == 0.0


def test_the_depth_of_a_needle_moves_it_through_a_document_of_one_length(tokenizer):
    from _evaluation import depth_windows, needle_windows
    from _mix import token_stream

    stream = token_stream({"a": TEXT}, tokenizer)
    options = {"value_digits": 2, "count": 3, "seed": 0}
    define = tokenizer.encode(" Define", add_special_tokens=False)
    places = []
    for depth in (0.0, 0.5, 1.0):
        windows = depth_windows(tokenizer, stream, length=120, depth=depth, **options)
        assert windows.shape == (3, 120)
        text = tokenizer.decode(windows[0], skip_special_tokens=True)
        (key, value), asked = (
            text.split(" Define Key=")[1].split(".")[0].split(" Value="),
            text.split(" Query Key=")[1],
        )
        assert asked == f"{key} Value={value}"
        row = windows[0].tolist()
        places.append(next(i for i in range(120) if row[i : i + len(define)] == define))
    bare = needle_windows(tokenizer, stream, distance=0, **options).shape[1]
    assert places == [1, 1 + round(0.5 * (120 - bare)), 1 + 120 - bare]
    for change, message in (
        ({"depth": 1.5}, "depth must lie between 0 and 1, got 1.5"),
        ({"length": bare}, f"length must be above the {bare} tokens of the needle itself, got {bare}"),
        ({"length": 10**6}, "distance must be below the"),
    ):
        with pytest.raises(ValueError, match=message):
            depth_windows(tokenizer, stream, **{"length": 120, "depth": 0.0, **options, **change})


def test_the_script_writes_every_number(tokenizer, tmp_path, monkeypatch, capsys):
    from evaluate_checkpoint import main

    from modeling_ttt import TTTConfig, TTTForCausalLM

    config = TTTConfig(
        vocab_size=300, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2
    )
    TTTForCausalLM(config).save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    (tmp_path / "text.txt").write_text(TEXT)
    options = [
        *["--model", str(tmp_path / "model"), "--data", str(tmp_path / "text.txt"), "--length", "32"],
        *["--train_data", str(tmp_path / "text.txt"), "--output", str(tmp_path / "out" / "evaluation.json")],
        *["--value_digits", "1", "2", "--distances", "8", "--needles", "4"],
        *["--test_data", str(tmp_path / "text.txt"), "--depth_lengths", "60", "90", "--depths", "0", "0.5"],
        *["--depth_needles", "2", "--depth_digits", "1"],
    ]
    main(options)
    results = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert set(results["nats_per_byte"]) == {"model", "unigram", "bigram", "trigram"}
    assert [(row["value_digits"], row["distance"]) for row in results["needles"]] == [(1, 8), (2, 8)]
    assert results["loss_by_position"][-1]["to"] == 31
    assert results["test"]["nats_per_byte"] == results["nats_per_byte"]
    assert [row["length"] for row in results["loss_by_context"]] == [4, 8, 16, 32]
    assert [(row["length"], row["depth"]) for row in results["needles_by_depth"]] == [
        (60, 0.0),
        (60, 0.5),
        (90, 0.0),
        (90, 0.5),
    ]
    with (tmp_path / "out" / "evaluation.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert {row["text"] for row in rows} == {"data", "test", ""}
    assert len([row for row in rows if row["depth"]]) == 8
    assert len([row for row in rows if row["measure"] == "nats per token, last 2"]) == 8
    assert (tmp_path / "out" / "evaluation.png").stat().st_size > 1000
    assert {path.suffix for path in (tmp_path / "out").iterdir()} == {".json", ".csv", ".png"}
    capsys.readouterr()
    monkeypatch.setattr("evaluate_checkpoint.draw", lambda *_: (_ for _ in ()).throw(OSError("no room")))
    with pytest.raises(OSError, match="no room"):
        main(options)
    monkeypatch.undo()
    monkeypatch.syspath_prepend(ROOT / "scripts")
    main(options)
    assert "going on behind 7 parts" in capsys.readouterr().out
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text()) == results
    main([*options, "--frozen_layers", "0"])
    frozen = json.loads((tmp_path / "out" / "evaluation.json").read_text())
    assert frozen["nats_per_byte"]["model"] != results["nats_per_byte"]["model"]
    LlamaForCausalLM(LlamaConfig(**LLAMA)).save_pretrained(tmp_path / "model")
    main(options)
    assert json.loads((tmp_path / "out" / "evaluation.json").read_text())["parameters"] != results["parameters"]
    with pytest.raises(ValueError, match="frozen_layers needs a TTT model, got model_type 'llama'"):
        main([*options, "--frozen_layers", "0"])
    assert frozen["nats_per_byte"]["bigram"] == results["nats_per_byte"]["bigram"]
