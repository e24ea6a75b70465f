"""How a training reads its windows: packed documents, rows in parts, streams, presets and trackers."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from filelock import FileLock
from safetensors.torch import load_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

import modeling_ttt  # noqa: F401  (registers "model_type": "ttt")
from tests.scripts.training_case import (
    CONFIG,
    LLAMA,
    TEXT,
    arguments,
    assert_same_training,
    fill,
    new_tokenizer,
    read_metrics,
)

ROOT = Path(__file__).parents[2]
MODELS = {"linear": CONFIG, "mlp": {**CONFIG, "ttt_layer_type": "mlp"}, "llama": LLAMA}
BOS = 0


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


@pytest.fixture(autouse=True)
def fresh_accelerate():
    """One process is one Accelerator's; the tests of this file ask for several precisions."""
    Accelerator(cpu=True)
    AcceleratorState._reset_state()
    yield
    AcceleratorState._reset_state()


@pytest.fixture(scope="module")
def tokenizer():
    with pytest.MonkeyPatch.context() as patch:
        patch.syspath_prepend(ROOT / "scripts")
        return new_tokenizer()


@pytest.fixture(scope="module")
def workplace(tmp_path_factory, tokenizer):
    return fill(tmp_path_factory.mktemp("training"), tokenizer)


def new_model(name, layers=2):
    torch.manual_seed(0)
    values = {**MODELS[name], "num_hidden_layers": layers, "initializer_range": 0.25}
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values)).double()


def gradients(model, ids, weights, *, step=0, **options):
    """Losses, plasticity and gradients of the rows, weighted as given, with fresh gradients."""
    from _step import Reader, StepOptions

    model.zero_grad()
    reader = Reader(model, StepOptions(**options), Accelerator(cpu=True))
    losses, plasticity = reader.gradients(ids, weights, torch.tensor(1.0), step, measured=True)
    return losses, plasticity, {name: value.grad.clone() for name, value in model.named_parameters()}


@pytest.mark.parametrize("name", MODELS)
def test_packed_documents_cost_and_teach_what_separate_ones_do(name):
    """A row of three documents whose state is reset at their borders, against three calls."""
    model = new_model(name)
    rng = np.random.default_rng(0)
    documents = [torch.tensor([[BOS, *rng.integers(3, 300, size)]]) for size in (6, 13, 9)]
    packed = torch.cat(documents, 1)
    weights = torch.ones(packed.shape).masked_fill(packed == BOS, 0.0)
    losses, _, found = gradients(model, packed, weights, document_start=BOS)
    expected: dict[str, torch.Tensor] = {}
    begin = 0
    for document in documents:
        alone, _, part = gradients(model, document, torch.ones(document.shape))
        size = document.shape[1]
        torch.testing.assert_close(losses[:, begin : begin + size - 1], alone, rtol=1e-5, atol=1e-6)
        expected = {key: expected.get(key, 0) + value for key, value in part.items()}
        begin += size
    for key, value in expected.items():
        torch.testing.assert_close(found[key], value, rtol=1e-4, atol=1e-6)
    run_together, _, _ = gradients(model, packed, weights)
    assert (run_together - losses)[:, -8:].abs().max() > 1e-3


@pytest.mark.parametrize("name", MODELS)
def test_rows_in_parts_and_blocks_computed_again_give_the_same_gradients(name):
    model = new_model(name)
    ids, weights = torch.randint(3, 300, (5, 14)), torch.rand(5, 14)
    losses, plasticity, found = gradients(model, ids, weights)
    others = [gradients(model, ids, weights, micro_rows=2)]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    model.train()
    assert model.is_gradient_checkpointing
    others.append(gradients(model, ids, weights))
    for other_losses, other_plasticity, other in others:
        torch.testing.assert_close(other_losses, losses)
        assert (other_plasticity is None) == (plasticity is None) == (name == "llama")
        assert plasticity is None or other_plasticity == pytest.approx(plasticity, rel=1e-5)
        for key, value in found.items():
            torch.testing.assert_close(other[key], value, rtol=1e-5, atol=1e-7)


def test_the_inner_rate_rises_from_a_tenth_to_one():
    from _step import StepOptions, inner_lr_mult

    assert [inner_lr_mult(step, 4) for step in (0, 2, 4, 9)] == pytest.approx([0.1, 0.55, 1.0, 1.0])
    model, ids, weights = new_model("mlp"), torch.randint(3, 300, (2, 14)), torch.ones(2, 14)
    _, full, _ = gradients(model, ids, weights)
    for step, share in ((0, 0.1), (2, 0.55), (4, 1.0)):
        losses, _, _ = gradients(model, ids, weights, step=step, inner_warmup_steps=4)
        logits = model(input_ids=ids, ttt_lr_mult=torch.tensor(share)).logits
        torch.testing.assert_close(losses, cross_entropies(logits, ids))
    assert gradients(model, ids, weights, step=4, inner_warmup_steps=4)[1] == full
    assert gradients(model, ids, weights, step=0, inner_warmup_steps=4)[1] < 0.2 * full
    with pytest.raises(ValueError, match="inner_warmup_steps needs a TTT model, got a LlamaForCausalLM"):
        gradients(new_model("llama"), ids, weights, inner_warmup_steps=4)
    with pytest.raises(ValueError, match="micro_rows must be at least 1, got 0"):
        StepOptions(micro_rows=0)


def cross_entropies(logits, ids):
    logits = logits[:, :-1].float().transpose(1, 2)
    return torch.nn.functional.cross_entropy(logits, ids[:, 1:], reduction="none").detach()


@pytest.fixture
def stories(tmp_path):
    """A jsonl of five documents of different sizes."""
    path = tmp_path / "stories.jsonl"
    path.write_text("".join(json.dumps({"text": TEXT[: 40 * (n + 1)]}) + "\n" for n in range(5)))
    return path


def open_documents(path, tokenizer):
    from _documents import DocumentStream, open_stream

    return DocumentStream(open_stream(str(path), None, "train"), tokenizer, "text")


def test_a_stream_packs_documents_end_to_end_and_begins_again(stories, tokenizer):
    stream = open_documents(stories, tokenizer)
    ids = np.concatenate([stream.batch(0, 3, 20)[0].ravel() for _ in range(10)])
    epoch = []
    for line in stories.read_text().splitlines():
        text = tokenizer(json.loads(line)["text"], add_special_tokens=False)["input_ids"]
        epoch += [tokenizer.bos_token_id, *text, tokenizer.eos_token_id]
    assert len(epoch) < len(ids)
    np.testing.assert_array_equal(ids, np.resize(epoch, len(ids)))


def test_a_stream_goes_on_where_its_state_was_taken(stories, tokenizer):
    stream = open_documents(stories, tokenizer)
    for _ in range(7):
        state = json.loads(json.dumps(stream.state_dict()))
        expected, _ = stream.batch(0, 2, 21)
        other = open_documents(stories, tokenizer)
        other.load_state_dict(state)
        np.testing.assert_array_equal(other.batch(0, 2, 21)[0], expected)
        other.load_state_dict(state)
        np.testing.assert_array_equal(other.batch(0, 1, 42)[0], expected.reshape(1, 42))


def test_bad_streams_are_named(stories, tmp_path, tokenizer):
    from _documents import DocumentStream, open_stream

    with pytest.raises(ValueError, match=r"train_data .*nowhere.* could not be opened"):
        open_stream(str(tmp_path / "nowhere"), None, "train")
    (tmp_path / "a.doc").write_text("text")
    with pytest.raises(ValueError, match="train_data as a stream must be one of"):
        open_stream(str(tmp_path / "a.doc"), None, "train")
    with pytest.raises(ValueError, match=r"text_column must be a column of text, got 'story' of \['text'\]"):
        DocumentStream(open_stream(str(stories), None, "train"), tokenizer, "story").batch(0, 1, 8)


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_streamed_training_is_stopped_and_resumed_bit_for_bit(workplace, stories, tmp_path, precision, capsys):
    from train import main

    options = ["--streaming", "--train_data", stories, "--reset_documents", "--mixed_precision", precision]
    options += ["--micro_rows", 1, "--gradient_checkpointing", "--inner_warmup_steps", 3]
    main(arguments(workplace, tmp_path / "whole", *options))
    for _ in range(3):
        main(arguments(workplace, tmp_path / "parts", *options, "--max_minutes", 0))
    assert capsys.readouterr().out.count("stopped before the end") == 3
    main(arguments(workplace, tmp_path / "parts", *options))
    assert_same_training(tmp_path / "whole", tmp_path / "parts")
    rows = read_metrics(tmp_path / "whole")
    assert all(row["plasticity"] > 0 and 0 < row["loss"] < 7 for row in rows)
    assert "validation_loss" in rows[-1] and "needle_1_exact" not in rows[-1]


@pytest.mark.parametrize(
    ("preset", "lr", "warmup", "steps", "width"),
    [
        ("125m", 3e-3, 480, 4800, 768),
        ("350m", 1.5e-3, 1350, 13500, 1024),
        ("760m", 1.25e-3, 2900, 29000, 1536),
        ("1.3b", 1e-3, 5000, 50000, 2048),
    ],
)
def test_presets_are_the_official_recipes(preset, lr, warmup, steps, width):
    from _recipes import RECIPES
    from _schedule import Stage

    plan, arguments = filled("--preset", preset)
    assert plan.stages == (Stage(2048, 256, steps),)
    assert (plan.lr, plan.min_lr, plan.warmup_steps, plan.decay_steps) == (lr, 1e-5, warmup, None)
    assert (arguments.weight_decay, arguments.beta1, arguments.beta2, arguments.clip) == (0.1, 0.9, 0.95, 1.0)
    assert arguments.inner_warmup_steps == 0
    assert filled("--preset", preset, "--overrides", '{"ttt_layer_type": "mlp"}')[1].inner_warmup_steps == warmup
    from modeling_ttt import TTTConfig

    assert TTTConfig.preset(RECIPES[preset].size).hidden_size == width


def test_tokens_per_step_stay_constant_while_windows_grow():
    from _schedule import Stage

    plan, _ = filled("--preset", "125m", "--stages", "2048:3000", "8192:1000", "32768:800", "--lr", "0.001")
    assert plan.stages == (Stage(2048, 256, 3000), Stage(8192, 64, 1000), Stage(32768, 16, 800))
    assert (plan.lr, plan.warmup_steps) == (1e-3, 480)
    for stages, message in (
        ("512:8", "stages must name their rows"),
        ("3000:8", "tokens_per_step must be a multiple"),
    ):
        options = ["--tokens_per_step", "4096"] if stages == "3000:8" else []
        with pytest.raises(ValueError, match=message):
            filled("--config", "config.json", "--stages", stages, *options)


def filled(*options):
    from _shared import parse
    from train import TrainArguments, fill_in, plan_of

    needed = ["--tokenizer", "t", "--train_data", "d", "--validation_data", "v", "--output_dir", "o"]
    arguments = fill_in(parse(TrainArguments, [*needed, *options]))
    return plan_of(arguments), arguments


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--preset", "125m"], "exactly one of config, preset and init must be given"),
        (["--overrides", "[1]"], "overrides must be a json object"),
        (["--overrides", "{"], "overrides must be a json object"),
        (["--report_to", "carrier-pigeon"], "report_to: 'carrier-pigeon' must be one of"),
        (["--keep_every", "0"], "keep_every must be at least 1"),
        (["--micro_rows", "0"], "micro_rows must be at least 1"),
        (["--inner_warmup_steps", "-1"], "inner_warmup_steps must be at least 0"),
    ],
)
def test_bad_arguments_are_named(workplace, tmp_path, options, message):
    from train import main

    with pytest.raises(ValueError, match=message):
        main(arguments(workplace, tmp_path / "run", *options))


def test_processes_that_accelerate_does_not_see_are_an_error(workplace, tmp_path, monkeypatch):
    from train import main

    alone = Accelerator(cpu=True)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setattr("train.Accelerator", lambda **_: alone)
    with pytest.raises(
        ValueError, match="2 processes were started, but accelerate sees 1: .* ACCELERATE_USE_CPU=true"
    ):
        main(arguments(workplace, tmp_path / "run"))


def test_trackers_receive_what_the_metrics_say(workplace, tmp_path, monkeypatch):
    from accelerate.tracking import GeneralTracker
    from train import main

    class Notebook(GeneralTracker):
        name, requires_logging_directory = "notebook", False
        tracker, seen = None, []

        def store_init_configuration(self, values):
            self.seen.append(values["lr"])

        def log(self, values, step, **_):
            self.seen.append({**values, "step": step})

    notebook = Notebook()
    monkeypatch.setattr("train.Accelerator", lambda **given: Accelerator(**{**given, "log_with": notebook}))
    main(arguments(workplace, tmp_path / "run", "--lr", "0.002"))
    lr, *rows = notebook.seen
    speeds = [row.pop("tokens_per_second") for row in rows]
    assert lr == 0.002 and all(speed > 0 for speed in speeds)
    assert rows == [{k: v for k, v in row.items() if v is not None} for row in read_metrics(tmp_path / "run")]


def test_texts_are_tokenised_once_and_again_when_they_change(tokenizer, tmp_path, monkeypatch):
    import _mix

    ids = _mix.cached_token_stream({"a": TEXT}, tokenizer, tmp_path)
    np.testing.assert_array_equal(ids, _mix.token_stream({"a": TEXT}, tokenizer))
    calls = []
    monkeypatch.setattr(_mix, "token_stream", lambda *given: calls.append(given) or np.zeros(3, np.uint16))
    again = _mix.cached_token_stream({"a": TEXT}, tokenizer, tmp_path)
    np.testing.assert_array_equal(again, ids)
    assert again.dtype == ids.dtype and not calls
    for changed in ({"a": TEXT + "."}, {"a": TEXT, "b": TEXT}):
        assert len(_mix.cached_token_stream(changed, tokenizer, tmp_path)) == 3
    assert len(calls) == 2


def test_milestones_are_kept_beside_the_newest_two(workplace, tmp_path):
    from train import main

    main(arguments(workplace, tmp_path / "run", "--keep_every", 3))
    assert {path.name for path in (tmp_path / "run").glob("checkpoint-*")} == {
        f"checkpoint-{step}" for step in (3, 6, 8)
    }


def test_training_goes_on_from_the_weights_of_a_checkpoint(workplace, tmp_path):
    """A rate of almost 0 leaves them as they were; the other folder cannot be gone on with."""
    from train import main

    main(arguments(workplace, tmp_path / "first", "--export", tmp_path / "model", "--export_dtype", "float32"))
    rest = arguments(workplace, tmp_path / "second", "--init", tmp_path / "model")[2:]
    same = ["--lr", "1e-12", "--min_lr", "0"]
    main([*rest, *same, "--export", str(tmp_path / "again"), "--export_dtype", "float32"])
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name) for name in ("model", "again"))
    for name, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[name], value, rtol=1e-6, atol=1e-8)
    before, after = (read_metrics(tmp_path / run)[-1]["validation_loss"] for run in ("first", "second"))
    assert after == pytest.approx(before, abs=1e-5)
    main([*rest, *same])
    with pytest.raises(ValueError, match="holds another training"):
        main([*rest, *same, "--init", str(tmp_path / "again"), "--overrides", '{"ttt_base_lr": 0.5}'])
    with pytest.raises(ValueError, match="model folder .*nowhere.* does not exist"):
        main([*rest, "--init", str(tmp_path / "nowhere")])


def test_a_gradient_that_is_not_finite_ends_the_training_before_it_spoils_anything(workplace, tmp_path):
    from train import main

    with pytest.raises(ValueError, match=r"the gradient of step \d is not finite at the learning rate .*lower lr"):
        main(arguments(workplace, tmp_path / "run", "--lr", "1e30", "--save_minutes", 0))
    saved = sorted((tmp_path / "run").glob("checkpoint-*"))
    assert saved
    for file in saved[-1].glob("*.safetensors"):
        assert all(torch.isfinite(value).all() for value in load_file(file).values())


def test_two_trainings_do_not_share_a_folder(workplace, tmp_path):
    from train import main

    with FileLock(tmp_path / ".lock"), pytest.raises(ValueError, match="another training runs in output_dir"):
        main(arguments(workplace, tmp_path))
    assert not (tmp_path / "metrics.jsonl").exists()
    main(arguments(workplace, tmp_path, "--max_minutes", 0))


def test_an_export_replaces_weights_and_nothing_else(workplace, tmp_path):
    from train import main

    (tmp_path / "model").mkdir()
    for name in ("README.md", "model-00001-of-00002.safetensors", "model.safetensors.index.json"):
        (tmp_path / "model" / name).write_text("from before")
    main(arguments(workplace, tmp_path / "run", "--export", tmp_path / "model"))
    left = {path.name for path in (tmp_path / "model").iterdir()}
    assert {"README.md", "model.safetensors", "config.json", "tokenizer.json"} <= left
    assert not any(name.startswith((".", "model-")) or name.endswith("index.json") for name in left)
    assert AutoModelForCausalLM.from_pretrained(tmp_path / "model").dtype == torch.bfloat16
    assert not [path for path in (tmp_path / "run").iterdir() if path.name.endswith(".part")]


def test_any_tokenizer_serves_a_training_without_needles(workplace, tmp_path):
    """One that knows whole words only, and breaks no needle into digits."""
    from train import main

    words = Tokenizer(models.WordLevel({"<unk>": 0, "<s>": 1, "</s>": 2, "it": 3, "was": 4, "times": 5}, "<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
    PreTrainedTokenizerFast(tokenizer_object=words, **special).save_pretrained(tmp_path / "words")
    options = ["--tokenizer", tmp_path / "words", "--output_dir", tmp_path / "run"]
    with pytest.raises(ValueError, match="tokenizer must tell the 16 hexadecimal digits apart"):
        main(arguments(workplace, tmp_path / "run", *options))
    main(arguments(workplace, tmp_path / "run", *options, "--needle_fraction", 0))
    assert "needle_1_exact" not in read_metrics(tmp_path / "run")[-1]
