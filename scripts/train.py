"""Trains a causal language model; the same command again goes on where it stopped, to the bit on a CPU.

python scripts/train.py --config scripts/configs/ttt-linear-tiny.json --tokenizer model_cards/ttt-linear-tiny \\
    --train_data <folder> --validation_data <folder> --output_dir <folder> --export <folder>
python scripts/train.py --preset 125m --tokenizer <Hub id> --train_data <Hub id> --streaming --reset_documents \\
    --validation_data <folder> --output_dir <folder> --mixed_precision bf16 --gradient_checkpointing --micro_rows 8

Several processes share the rows of every step; the bar says how many there are. docs/training.md names the launchers.
"""

import hashlib
import json
import logging
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from _checkpoints import weights_hash
from _documents import DocumentStream, open_stream
from _evaluation import Validation
from _mix import MixSettings, WindowMix, cached_token_stream
from _recipes import PLAIN, RECIPES
from _release import export, write_curve
from _schedule import Plan, Stage
from _shared import option, parse, run
from _step import StepOptions
from _tokenizer import read_texts
from _training import LoopSettings, Windows, train
from accelerate import Accelerator
from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerBase

from interp.loading import load_model, load_tokenizer
from modeling_ttt import TTTConfig

log = logging.getLogger("train")


@dataclass
class TrainArguments:
    """Train a causal language model, from scratch or from a checkpoint, on text and needles; run again to resume."""

    tokenizer: str = option(help="folder or Hub id of the tokenizer")
    train_data: str = option(help="text file, or folder of *.txt files, each one document; see also --streaming")
    validation_data: str = option(help="text file or folder of *.txt files for validation")
    output_dir: str = option(
        help="folder for checkpoints, metrics.jsonl, curve.csv, curve.png and the tokens of the data"
    )
    config: str | None = option(None, "config.json with a model_type, or the folder of one; else --preset or --init")
    preset: Literal[tuple(RECIPES)] | None = option(
        None, "official size with its recipe, which other options override"
    )
    init: str | None = option(None, "folder or Hub id of a checkpoint to go on from, with its weights and config")
    overrides: str | None = option(None, """fields of the config as json, e.g. '{"ttt_layer_type": "mlp"}'""")
    streaming: bool = option(False, "train_data is a dataset (Hub id, folder or file) to stream: no needles")
    dataset_config: str | None = option(None, "configuration name of a streamed dataset")
    dataset_split: str = option("train", "split of a streamed dataset")
    text_column: str = option("text", "column of a streamed dataset that holds the text")
    reset_documents: bool = option(False, "reset the state at document borders and predict nothing across them")
    stages: list[str] = option(
        [],
        "LENGTHxROWS:STEPS one after the other, rows of all processes together; LENGTH:STEPS with --tokens_per_step "
        f"(default: of the preset, else {' '.join(PLAIN['stages'])})",
    )
    tokens_per_step: int | None = option(None, "tokens of a step in stages that name no rows")
    micro_rows: int | None = option(None, "rows that pass through the model at a time; default: all of a process")
    lr: float | None = option(None, f"peak learning rate (default: of the preset, else {PLAIN['lr']})")
    min_lr: float = option(1e-5, "learning rate at the end of the decay")
    warmup_steps: int | None = option(
        None, f"steps of linear warm-up (default: of the preset, else {PLAIN['warmup_steps']})"
    )
    decay_steps: int | None = option(None, "last steps, in which the rate falls; default: all after the warm-up")
    inner_warmup_steps: int | None = option(
        None,
        "steps in which the inner rate rises from a tenth (default: warmup_steps with a preset and an MLP, else 0)",
    )
    weight_decay: float = option(0.1, "AdamW weight decay, on every parameter")
    beta1: float = option(0.9, "AdamW beta 1")
    beta2: float = option(0.95, "AdamW beta 2")
    clip: float = option(1.0, "largest gradient norm")
    needle_fraction: float = option(0.375, "share of windows that hold needles")
    random_filler: float = option(0.2, "share of needle windows that are filled with random ids")
    answer_weight: float = option(2.0, "loss weight of tokens that can be recalled; above 1")
    recall_windows: int = option(0, "windows at the start that hold nothing but repeated digits")
    curriculum_windows: int = option(8192, "windows, after those, until needles are as hard as they get")
    seed: int = option(0, "seed of the weights and of the order of the data")
    mixed_precision: Literal["no", "bf16"] = option("no", "autocast of accelerate")
    gradient_checkpointing: bool = option(False, "compute blocks again in the backward pass to save GPU memory")
    num_threads: int | None = option(None, "CPU threads; default: as torch decides")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    report_to: list[str] = option([], "trackers of accelerate that receive the same numbers, e.g. tensorboard")
    eval_every: int = option(250, "steps between validations")
    eval_tokens: int = option(65_536, "tokens of the validation text read each time")
    eval_length: int | None = option(None, "tokens per window there; default: as in the last stage")
    save_minutes: float = option(5.0, "minutes between checkpoints")
    keep_every: int | None = option(None, "keep the checkpoints of every so many steps; default: only the newest two")
    max_minutes: float | None = option(None, "stop with a checkpoint after this long")
    export: str | None = option(None, "folder that receives the finished model, laid out for the Hub")
    export_dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "dtype of the exported weights")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, draw the curve, export when the plan is finished."""
    arguments = fill_in(parse(TrainArguments, argv))
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    plan = plan_of(arguments)
    accelerator = new_accelerator(arguments)
    tokenizer = load_tokenizer(arguments.tokenizer)
    check_tokenizer(tokenizer)
    model = new_model(arguments, len(tokenizer))
    windows, data_identity = data_of(arguments, tokenizer)
    held_out = cached_token_stream(read_texts(arguments.validation_data), tokenizer, Path(arguments.output_dir))
    eval_length = arguments.eval_length or plan.stages[-1].length
    # With no needles in the windows, tokenizers that break them up serve, too.
    needles = not arguments.streaming and (arguments.needle_fraction > 0 or arguments.recall_windows > 0)
    validate = Validation(tokenizer, held_out[: arguments.eval_tokens], eval_length, needles=needles)
    settings = settings_of(arguments, model, tokenizer, data_identity)
    finished = train(model, windows, plan, settings, accelerator, validate)
    accelerator.end_training()
    if not accelerator.is_main_process:
        return
    write_curve(settings.folder / "metrics.jsonl", settings.folder)
    if not finished:
        print("stopped before the end; run the same command again to go on")
    elif arguments.export:
        export(model, tokenizer, arguments.export, arguments.export_dtype)
        print(f"exported to {arguments.export}")


def fill_in(arguments: TrainArguments) -> TrainArguments:
    """Give arguments that were left out the values of the preset, or the plain ones."""
    given = {name: getattr(arguments, name) for name in ("config", "preset", "init")}
    if sum(value is not None for value in given.values()) != 1:
        raise ValueError(f"exactly one of config, preset and init must be given, got {given}")
    if (
        arguments.preset
        and arguments.inner_warmup_steps is None
        and _overrides(arguments).get("ttt_layer_type") == "mlp"
    ):
        arguments.inner_warmup_steps = arguments.warmup_steps or RECIPES[arguments.preset].warmup_steps
    values = RECIPES[arguments.preset].values() if arguments.preset else PLAIN
    for name, value in {**values, "inner_warmup_steps": 0}.items():
        if getattr(arguments, name) in (None, []):
            setattr(arguments, name, value)
    return arguments


def new_accelerator(arguments: TrainArguments) -> Accelerator:
    """Accelerator with the trackers asked for; ValueError when they, or processes that were started, are missing."""
    known = sorted(map(str, LOGGER_TYPE_TO_CLASS))
    usable = sorted(map(str, get_available_trackers()))
    for name in arguments.report_to:
        if name not in usable:
            why = "is not installed here" if name in known else f"must be one of {known}"
            raise ValueError(f"report_to: {name!r} {why}; installed are {usable}")
    accelerator = Accelerator(
        mixed_precision=arguments.mixed_precision,
        log_with=arguments.report_to or None,
        project_dir=arguments.output_dir,
    )
    started = int(os.environ.get("WORLD_SIZE", "1"))
    if started != accelerator.num_processes:
        raise ValueError(
            f"{started} processes were started, but accelerate sees {accelerator.num_processes}: on CPUs set the "
            "environment variable ACCELERATE_USE_CPU=true"
        )
    numbers = {name: value for name, value in asdict(arguments).items() if isinstance(value, int | float | str)}
    accelerator.init_trackers(Path(arguments.output_dir).name, config=numbers)
    return accelerator


def check_tokenizer(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise ValueError unless the tokenizer has tokens for the borders of documents."""
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer must have a {name}, which marks the borders of documents, got None")


def plan_of(arguments: TrainArguments) -> Plan:
    """The schedule that the arguments describe."""
    return Plan(
        stages=tuple(Stage.parse(stage, arguments.tokens_per_step) for stage in arguments.stages),
        lr=arguments.lr,
        min_lr=arguments.min_lr,
        warmup_steps=arguments.warmup_steps,
        decay_steps=arguments.decay_steps,
    )


def data_of(arguments: TrainArguments, tokenizer: PreTrainedTokenizerBase) -> tuple[Windows, dict]:
    """Where the windows come from, and what makes them these and no others."""
    if arguments.streaming:
        name = [arguments.train_data, arguments.dataset_config, arguments.dataset_split, arguments.text_column]
        return DocumentStream(open_stream(*name[:3]), tokenizer, arguments.text_column), {"stream": name}
    settings = MixSettings(
        seed=arguments.seed,
        needle_fraction=arguments.needle_fraction,
        random_filler=arguments.random_filler,
        answer_weight=arguments.answer_weight,
        recall_windows=arguments.recall_windows,
        curriculum_windows=arguments.curriculum_windows,
    )
    ids = cached_token_stream(read_texts(arguments.train_data), tokenizer, Path(arguments.output_dir))
    mix = WindowMix(ids, tokenizer, settings)
    return mix, {"data_sha256": hashlib.sha256(mix.stream.tobytes()).hexdigest(), "mix": asdict(settings)}


def settings_of(
    arguments: TrainArguments, model: nn.Module, tokenizer: PreTrainedTokenizerBase, data_identity: dict
) -> LoopSettings:
    """How to run the training, and what makes it this training and no other."""
    config = json.loads(model.config.to_json_string())
    config.pop("transformers_version", None)
    identity = {
        "config": config,
        **data_identity,
        "optimizer": [arguments.weight_decay, arguments.beta1, arguments.beta2, arguments.clip],
        "mixed_precision": arguments.mixed_precision,
        "inner_warmup_steps": arguments.inner_warmup_steps,
    }
    if arguments.init:
        identity["init_sha256"] = weights_hash(model)
    if arguments.reset_documents:
        identity["reset_documents"] = True
    return LoopSettings(
        folder=Path(arguments.output_dir),
        identity=identity,
        weight_decay=arguments.weight_decay,
        beta1=arguments.beta1,
        beta2=arguments.beta2,
        clip=arguments.clip,
        log_every=arguments.log_every,
        eval_every=arguments.eval_every,
        save_minutes=arguments.save_minutes,
        keep_every=arguments.keep_every,
        max_minutes=arguments.max_minutes,
        reading=StepOptions(
            micro_rows=arguments.micro_rows,
            document_start=tokenizer.bos_token_id if arguments.reset_documents else None,
            inner_warmup_steps=arguments.inner_warmup_steps,
        ),
    )


def new_model(arguments: TrainArguments, vocab_size: int) -> nn.Module:
    """A float32 model with fresh weights, or those of `--init`; a preset's vocabulary is that of the tokenizer.

    Raises ValueError unless the vocabulary holds the tokenizer's; warns when it leaves much of it unused.
    """
    overrides, model = _overrides(arguments), None
    if arguments.init:
        model = load_model(arguments.init, overrides=overrides, ttt_only=False)
        config = model.config
    elif arguments.preset:
        config = TTTConfig.preset(RECIPES[arguments.preset].size, **{"vocab_size": vocab_size, **overrides})
    else:
        config = AutoConfig.for_model(**{**_read_config(arguments.config), **overrides})
    if config.vocab_size < vocab_size:
        raise ValueError(f"vocab_size must be at least the {vocab_size} of the tokenizer, got {config.vocab_size}")
    if config.vocab_size > vocab_size:
        log.warning("the tokenizer has %d entries, the config's vocab_size is %d", vocab_size, config.vocab_size)
    torch.manual_seed(arguments.seed)
    if model is None:
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    if arguments.gradient_checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    return model


def _read_config(config: str) -> dict:
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    if not path.is_file():
        raise ValueError(f"config must be a config.json or a folder with one, got {config!r}")
    values = json.loads(path.read_text(encoding="utf-8"))
    if "model_type" not in values:
        raise ValueError(f"config {config!r} must name its model_type, got the keys {sorted(values)}")
    return values


def _overrides(arguments: TrainArguments) -> dict:
    try:
        values = json.loads(arguments.overrides or "{}")
    except json.JSONDecodeError as error:
        raise ValueError(f"overrides must be a json object, got {arguments.overrides!r}: {error}") from error
    if not isinstance(values, dict):
        raise ValueError(f"overrides must be a json object, got {arguments.overrides!r}")
    return values


if __name__ == "__main__":
    run(main)
