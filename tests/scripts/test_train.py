"""A training is a function of its arguments: killed and resumed it ends in the same bits, and bad arguments end it."""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from transformers import PreTrainedTokenizerFast

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


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        from _tokenizer import train_bpe

        return train_bpe([TEXT], vocab_size=300, model_max_length=4096, needles=50)


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("training")
    tokenizer.save_pretrained(folder / "tokenizer")
    (folder / "config.json").write_text(json.dumps(CONFIG))
    (folder / "books").mkdir()
    (folder / "books" / "a.txt").write_text(TEXT)
    (folder / "books" / "b.txt").write_text(TEXT.upper())
    (folder / "held.txt").write_text(TEXT[:2000])
    return folder


@pytest.fixture
def train(workplace):
    """Runs the script in this process with small settings."""

    def run(output, *options):
        from train import main

        main(
            [
                *["--config", str(workplace / "config.json"), "--tokenizer", str(workplace / "tokenizer")],
                *["--train_data", str(workplace / "books"), "--validation_data", str(workplace / "held.txt")],
                *["--output_dir", str(output), "--stages", "24x4:4", "48x2:4", "--warmup_steps", "2"],
                *["--log_every", "2", "--eval_every", "4", "--eval_tokens", "200", *map(str, options)],
            ]
        )

    return run


def stream_of(tokenizer):
    from _mix import token_stream

    return token_stream({"a": TEXT, "b": TEXT.upper()}, tokenizer)


def test_the_tokenizer_is_lossless_and_spends_one_token_per_needle_digit(tokenizer):
    text = " Query Key=3fa9c01b Value=deadbeef. “Naïve” cafés, 1234;\n\n\tend "
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids, skip_special_tokens=True) == text
    tokens = tokenizer.tokenize(text)
    value = tokens.index("ĠValue=")
    assert tokens[value + 1 : value + 10] == [*"deadbeef", "."]
    assert tokens[value - 8 : value] == [*"3fa9c01b"]
    assert not any(len(token.strip("Ġ")) > 1 and any(c.isdigit() for c in token) for token in tokenizer.get_vocab())


def test_a_window_is_a_function_of_seed_and_number(tokenizer):
    from _mix import MixSettings, WindowMix

    stream = stream_of(tokenizer)
    ids, weights = WindowMix(stream, tokenizer, MixSettings(seed=3)).batch(0, 16, 64)
    mix = WindowMix(stream, tokenizer, MixSettings(seed=3))
    later = [mix.window(index, 64) for index in reversed(range(16))][::-1]
    np.testing.assert_array_equal(ids, [window for window, _ in later])
    np.testing.assert_array_equal(weights, [weight for _, weight in later])
    other, _ = WindowMix(stream, tokenizer, MixSettings(seed=4)).batch(0, 16, 64)
    assert not (ids == other).all(1).any()
    assert (ids[:, 0] == tokenizer.bos_token_id).all()


def test_an_epoch_reads_no_passage_twice(tokenizer):
    from _mix import MixSettings, WindowMix

    stream = np.arange(1000, dtype=np.uint16)
    mix = WindowMix(stream, tokenizer, MixSettings(needle_fraction=0.0))
    ids, _ = mix.batch(0, 1000 // 31 - 1, 32)
    assert len(np.unique(ids[:, 1:])) == ids[:, 1:].size


def test_a_stage_goes_on_where_an_earlier_one_of_its_length_ended(tokenizer):
    """Stages of 32, 64, 32 and 32 tokens read, in those of 32, the windows that one long stage of 32 reads."""
    from _mix import MixSettings, WindowMix

    mix = WindowMix(stream_of(tokenizer), tokenizer, MixSettings(needle_fraction=0.25, recall_windows=5))
    earlier = ((32, 8), (64, 4), (32, 6))
    parts = [*mix.batch(0, 8, 32)[0], *mix.batch(0, 6, 32, earlier[:2])[0], *mix.batch(0, 10, 32, earlier)[0]]
    books = [row for row in parts if not set(row[1:].tolist()) <= set(mix.words.digits)]
    assert len({row.tobytes() for row in parts}) == len(parts) == 24
    assert len(books) > 12
    # Only the curriculum, which counts the windows of all lengths, sees the other stage.
    easy = WindowMix(
        mix.stream, tokenizer, MixSettings(needle_fraction=0.25, recall_windows=5, curriculum_windows=10**9)
    )
    parts = [*easy.batch(0, 8, 32)[0], *easy.batch(0, 6, 32, earlier[:2])[0], *easy.batch(0, 10, 32, earlier)[0]]
    np.testing.assert_array_equal(parts, easy.batch(0, 24, 32)[0])


def test_needle_windows_take_their_share_and_weigh_answers(tokenizer):
    from _mix import MixSettings, WindowMix

    mix = WindowMix(stream_of(tokenizer), tokenizer, MixSettings(needle_fraction=0.25, answer_weight=3.0))
    _, weights = mix.batch(0, 400, 64)
    with_answers = (weights == 3.0).any(1)
    assert 0.2 < with_answers.mean() <= 0.25
    _, weights = WindowMix(mix.stream, tokenizer, MixSettings(needle_fraction=0.0)).batch(0, 40, 64)
    assert (weights == 1.0).all()


def test_the_first_windows_are_all_copies_and_move_no_book_window(tokenizer):
    from _mix import MixSettings, WindowMix

    stream = stream_of(tokenizer)
    plain = WindowMix(stream, tokenizer, MixSettings(needle_fraction=0.25))
    late = WindowMix(stream, tokenizer, MixSettings(needle_fraction=0.25, recall_windows=10))
    ids, _ = late.batch(0, 6, 150)
    assert set(ids[:, 1:].ravel()) <= set(late.words.digits)
    # Four of them are left when the next stage begins; behind them the books come in their usual order.
    for number in range(8):
        if number % 4 != 3:
            np.testing.assert_array_equal(late.window(4 + number, 64, ((150, 6),))[0], plain.window(number, 64)[0])


def test_answers_repeat_the_value_defined_for_their_key(tokenizer):
    from _mix import MixSettings, WindowMix

    mix = WindowMix(stream_of(tokenizer), tokenizer, MixSettings(needle_fraction=1.0, curriculum_windows=1))
    ids, weights = mix.batch(1, 20, 400)
    asked = 0
    for row, weight in zip(ids, weights, strict=True):
        defined = {}
        for piece in tokenizer.decode(row).split(" Key=")[1:]:
            key, _, rest = piece.partition(" Value=")
            value = rest.partition(".")[0]
            complete = "." in rest
            if complete and key in defined:
                asked += 1
                assert defined[key] == value
            elif complete:
                defined[key] = value
        assert set(weight) <= {0.0, 1.0, 2.0}
    assert asked > 50


def test_the_curriculum_goes_from_one_digit_to_the_full_task(tokenizer):
    from _mix import Difficulty, MixSettings, WindowMix

    easy, hard = Difficulty.at(0.0, 2048), Difficulty.at(1.0, 2048)
    assert (easy.value_digits, easy.live_keys) == (1, 1)
    assert (hard.value_digits, hard.live_keys, round(hard.mean_gap)) == (8, 8, 1024)
    assert Difficulty.at(7.0, 2048) == hard
    mix = WindowMix(
        stream_of(tokenizer), tokenizer, MixSettings(needle_fraction=1.0, random_filler=0.0, curriculum_windows=1000)
    )

    assert (easy.copying, hard.copying) == (0.75, 0.0)

    def longest(before):
        ids, _ = mix.batch(0, 20, 200, ((64, before),))
        text = " ".join(tokenizer.batch_decode(ids))
        return max(len(value) for value in re.findall(r"Value=([0-9a-f]*)\.", text))

    assert longest(0) == 1
    assert longest(1000) == 8


def test_copy_windows_repeat_runs_of_digits_and_weigh_the_repeats(tokenizer):
    from _mix import MixSettings, WindowMix

    mix = WindowMix(
        stream_of(tokenizer), tokenizer, MixSettings(needle_fraction=1.0, curriculum_windows=10**9, answer_weight=2.5)
    )
    ids, weights = mix.batch(0, 40, 150)
    digits = set(mix.words.digits)
    copies = [row for row in range(40) if set(ids[row, 1:]) <= digits]
    assert 22 <= len(copies) <= 38
    for row in copies:
        for place in np.flatnonzero(weights[row] == 2.5):
            assert ids[row, place] in ids[row, max(1, place - 32) : place]


def test_the_schedule_warms_up_decays_and_can_grow_before_the_decay():
    from _schedule import Plan, Stage

    cosine = Plan((Stage(16, 4, 10),), lr=1.0, min_lr=0.1, warmup_steps=4)
    assert [cosine.learning_rate(step) for step in range(4)] == [0.25, 0.5, 0.75, 1.0]
    assert cosine.learning_rate(6) == pytest.approx(0.55)
    assert cosine.learning_rate(9) == pytest.approx(0.1)
    short = Plan((Stage(16, 4, 10), Stage(32, 2, 4)), lr=1.0, min_lr=0.0, warmup_steps=2, decay_steps=4)
    long = Plan((Stage(16, 4, 10), Stage(32, 2, 8)), lr=1.0, min_lr=0.0, warmup_steps=2, decay_steps=4)
    assert long.same_past(short, 10)
    assert not long.same_past(short, 11)
    assert long.place(11) == (Stage(32, 2, 8), 2, ((16, 40),))
    assert long.tokens_before(11) == 10 * 64 + 64


def assert_same_training(one, other):
    for name in ("model.safetensors", "optimizer.safetensors"):
        first, second = (load_file(run / "checkpoint-8" / name) for run in (one, other))
        assert first.keys() == second.keys()
        assert all(torch.equal(first[key], second[key]) for key in first)
    kept = [
        [{k: v for k, v in json.loads(line).items() if k != "tokens_per_second"} for line in lines]
        for lines in ((run / "metrics.jsonl").read_text().splitlines() for run in (one, other))
    ]
    assert kept[0] == kept[1]
    assert [row["step"] for row in kept[0]] == [2, 4, 6, 8]
    assert all(row["plasticity"] > 0 for row in kept[0])


def test_stopped_and_resumed_equals_uninterrupted_bit_for_bit(train, tmp_path, capsys):
    train(tmp_path / "whole")
    for _ in range(5):
        train(tmp_path / "parts", "--max_minutes", 0)
    assert capsys.readouterr().out.count("stopped before the end") == 5
    train(tmp_path / "parts")
    assert_same_training(tmp_path / "whole", tmp_path / "parts")


def test_killed_behind_a_checkpoint_equals_uninterrupted_bit_for_bit(train, tmp_path):
    train(tmp_path / "whole", "--save_minutes", 0)
    train(tmp_path / "killed", "--save_minutes", 0)
    shutil.rmtree(tmp_path / "killed" / "checkpoint-8")
    train(tmp_path / "killed")
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


def test_training_lowers_the_loss_and_exports_a_checkpoint(train, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    train(tmp_path / "run", "--stages", "32x4:40", "--lr", "0.02", "--export", tmp_path / "hub")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert rows[-1]["loss"] < rows[0]["loss"] - 0.5
    assert rows[-1]["validation_nats_per_byte"] < rows[1]["validation_nats_per_byte"]
    assert {"curve.csv", "curve.png"} <= {path.name for path in (tmp_path / "run").iterdir()}
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hub")
    assert model.dtype == torch.bfloat16
    assert len(AutoTokenizer.from_pretrained(tmp_path / "hub")) == 300
    assert "local" not in (tmp_path / "hub" / "tokenizer_config.json").read_text()


def test_a_half_written_checkpoint_is_not_resumed_from(train, tmp_path):
    train(tmp_path / "run", "--max_minutes", "0")
    (tmp_path / "run" / ".checkpoint-7.part").mkdir()
    with (tmp_path / "run" / "metrics.jsonl").open("a") as file:
        file.write('{"step": 3, "lo')
    train(tmp_path / "run")
    rows = [json.loads(line) for line in (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == [2, 4, 6, 8]


def test_another_training_is_not_continued(train, tmp_path):
    train(tmp_path / "run", "--max_minutes", "0")
    for change in (["--seed", "1"], ["--lr", "0.1"], ["--needle_fraction", "0.5"], ["--stages", "16x4:8"]):
        with pytest.raises(ValueError, match="output_dir .* holds another training"):
            train(tmp_path / "run", *change)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--stages", "24x4"], "stages must look like LENGTHxROWS:STEPS"),
        (["--stages", "24x0:4"], "stages must look like LENGTHxROWS:STEPS"),
        (["--lr", "0"], "lr must be positive"),
        (["--warmup_steps", "99"], "warmup_steps must lie between 0 and 8"),
        (["--decay_steps", "99"], "decay_steps must lie between 0 and 6"),
        (["--needle_fraction", "1.5"], "needle_fraction must lie between 0 and 1"),
        (["--recall_windows", "-1"], "recall_windows must be at least 0"),
        (["--answer_weight", "1"], "answer_weight must be above 1"),
        (["--log_every", "0"], "log_every must be at least 1"),
        (["--config", "nowhere.json"], "config must be a config.json"),
        (["--train_data", "nowhere"], "data must be a text file or a folder"),
        (["--stages", "99999x1:4", "--warmup_steps", "0"], "length must be below"),
    ],
)
def test_bad_arguments_are_named(train, tmp_path, options, message):
    with pytest.raises(ValueError, match=message):
        train(tmp_path / "run", *options)


def test_unknown_options_end_the_script(train, tmp_path, capsys):
    with pytest.raises(SystemExit):
        train(tmp_path / "run", "--learning_rate", "1")
    assert "--learning_rate" in capsys.readouterr().err


def command(workplace, output, *options):
    return [
        *[ROOT / "scripts" / "train.py", "--config", workplace / "config.json", "--tokenizer"],
        *[workplace / "tokenizer", "--train_data", workplace / "books", "--validation_data", workplace / "held.txt"],
        *["--output_dir", output, "--stages", "24x4:4", "48x2:4", "--warmup_steps", 2, "--log_every", 2],
        *["--eval_every", 4, "--eval_tokens", 200, *options],
    ]


ENVIRONMENT = {**os.environ, "ACCELERATE_USE_CPU": "true", "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


LAUNCHERS = {
    "torchrun": ["torch.distributed.run", "--standalone", "--nproc_per_node", 2],
    "accelerate": ["accelerate.commands.launch", "--multi_gpu", "--num_processes", 2, "--main_process_port", 0],
}


@pytest.mark.slow
@pytest.mark.parametrize("processes", [1, 2])
def test_killed_with_signal_9_and_resumed_equals_uninterrupted_bit_for_bit(workplace, tmp_path, processes):
    def start(output):
        launcher = ["-m", *LAUNCHERS["torchrun"]] if processes == 2 else []
        parts = [sys.executable, *launcher, *command(workplace, output, "--save_minutes", 0, "--num_threads", 1)]
        streams = {"stdout": subprocess.DEVNULL, "stderr": subprocess.PIPE}
        return subprocess.Popen([*map(str, parts)], env=ENVIRONMENT, start_new_session=True, **streams)

    whole = start(tmp_path / "whole")
    assert whole.wait(timeout=300) == 0, whole.stderr.read()
    killed = start(tmp_path / "killed")
    deadline = time.monotonic() + 300
    while not (tmp_path / "killed" / "checkpoint-2").is_dir() and time.monotonic() < deadline:
        time.sleep(0.002)
    # Launcher and workers at once: none of them gets to say anything to another.
    os.killpg(killed.pid, signal.SIGKILL)
    assert killed.wait(timeout=60) == -9
    left = {path.name for path in (tmp_path / "killed").glob("checkpoint-*")}
    assert left and "checkpoint-8" not in left
    again = start(tmp_path / "killed")
    assert again.wait(timeout=300) == 0, again.stderr.read()
    assert_same_training(tmp_path / "whole", tmp_path / "killed")


@pytest.mark.slow
@pytest.mark.parametrize("launcher", LAUNCHERS)
def test_two_processes_train_as_one(train, workplace, tmp_path, launcher):
    """Each takes every second row; the sums are the same up to their order."""
    train(tmp_path / "one")
    parts = [sys.executable, "-m", *LAUNCHERS[launcher], *command(workplace, tmp_path / "two")]
    done = subprocess.run([*map(str, parts)], env=ENVIRONMENT, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    for run, processes in (("one", 1), ("two", 2)):
        assert json.loads((tmp_path / run / "checkpoint-8" / "state.json").read_text())["processes"] == processes
    one, two = (load_file(tmp_path / run / "checkpoint-8" / "model.safetensors") for run in ("one", "two"))
    for name in one:
        torch.testing.assert_close(two[name], one[name], rtol=1e-3, atol=1e-5)


def test_a_tokenizer_that_does_not_fit_is_refused_or_warned_of(train, tmp_path, tokenizer, caplog):
    from train import check_tokenizer

    with pytest.raises(ValueError, match=r"vocab_size must be at least the 300 of the tokenizer, got 200"):
        train(tmp_path / "run", "--overrides", '{"vocab_size": 200}')
    train(tmp_path / "run", "--stages", "16x1:2")
    assert "vocab_size" not in caplog.text
    train(tmp_path / "larger", "--stages", "16x1:2", "--overrides", '{"vocab_size": 301}')
    assert "vocab_size is 301" in caplog.text
    check_tokenizer(tokenizer)
    without = PreTrainedTokenizerFast(tokenizer_object=tokenizer.backend_tokenizer, eos_token="</s>")
    with pytest.raises(ValueError, match="tokenizer must have a bos_token_id"):
        check_tokenizer(without)
