"""Trains a small language model on books and needles; the same command again goes on where it stopped.

python scripts/train.py --config scripts/configs/ttt-linear-tiny.json --tokenizer model_cards/ttt-linear-tiny \\
    --train_data <folder> --validation_data <folder> --output_dir <folder> --export <folder>
accelerate launch scripts/train.py ...        several processes share the rows of every step
"""

import hashlib
import json
import logging
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import torch
from _evaluation import Validation
from _mix import MixSettings, WindowMix, token_stream
from _release import export, write_curve
from _schedule import Plan, Stage
from _shared import option, parse, run
from _tokenizer import read_texts
from _training import LoopSettings, train
from accelerate import Accelerator
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerBase

import modeling_ttt  # noqa: F401  (registers "model_type": "ttt")

log = logging.getLogger("train")


@dataclass
class TrainArguments:
    """Train a causal language model from scratch on text files and needle documents; run again to resume."""

    config: str = option(help="config.json with a model_type, or the folder of one")
    tokenizer: str = option(help="folder or Hub id of the tokenizer")
    train_data: str = option(help="text file, or folder of *.txt files, each one document")
    validation_data: str = option(help="the same for validation")
    output_dir: str = option(help="folder for checkpoints, metrics.jsonl, curve.csv and curve.png")
    stages: list[str] = option(
        ["512x8:2000", "2048x4:400"], "LENGTHxROWS:STEPS one after the other; rows of all processes together"
    )
    lr: float = option(3e-3, "peak learning rate")
    min_lr: float = option(1e-5, "learning rate at the end of the decay")
    warmup_steps: int = option(100, "steps of linear warm-up")
    decay_steps: int | None = option(None, "last steps, in which the rate falls; default: all after the warm-up")
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
    mixed_precision: Literal["no", "bf16", "fp16"] = option("no", "autocast of accelerate")
    num_threads: int | None = option(None, "CPU threads; default: as torch decides")
    log_every: int = option(10, "steps between lines of metrics.jsonl")
    eval_every: int = option(250, "steps between validations")
    eval_tokens: int = option(65_536, "tokens of the validation text read each time")
    save_minutes: float = option(5.0, "minutes between checkpoints")
    max_minutes: float | None = option(None, "stop with a checkpoint after this long")
    export: str | None = option(None, "folder that receives the finished model, laid out for the Hub")
    export_dtype: Literal["bfloat16", "float16", "float32"] = option("bfloat16", "dtype of the exported weights")


def main(argv: Sequence[str] | None = None) -> None:
    """Parse, train, draw the curve, export when the plan is finished."""
    arguments = parse(TrainArguments, argv)
    if arguments.num_threads:
        torch.set_num_threads(arguments.num_threads)
    plan, mix_settings = plan_of(arguments), mix_of(arguments)
    accelerator = Accelerator(mixed_precision=arguments.mixed_precision)
    tokenizer = AutoTokenizer.from_pretrained(arguments.tokenizer)
    model = new_model(arguments.config, arguments.seed)
    check_tokenizer(tokenizer, model.config.vocab_size)
    mix = WindowMix(token_stream(read_texts(arguments.train_data), tokenizer), tokenizer, mix_settings)
    held_out = token_stream(read_texts(arguments.validation_data), tokenizer)
    validate = Validation(tokenizer, held_out[: arguments.eval_tokens], plan.stages[-1].length)
    settings = settings_of(arguments, model, mix)
    finished = train(model, mix, plan, settings, accelerator, validate)
    if not accelerator.is_main_process:
        return
    write_curve(settings.folder / "metrics.jsonl", settings.folder)
    if not finished:
        print("stopped before the end; run the same command again to go on")
    elif arguments.export:
        export(model, tokenizer, arguments.export, arguments.export_dtype)
        print(f"exported to {arguments.export}")


def check_tokenizer(tokenizer: PreTrainedTokenizerBase, vocab_size: int) -> None:
    """Raise ValueError unless the tokenizer fits the model; warn when it leaves much of the vocabulary unused."""
    for name in ("bos_token_id", "eos_token_id"):
        if getattr(tokenizer, name) is None:
            raise ValueError(f"tokenizer must have a {name}, which marks the borders of documents, got None")
    if len(tokenizer) > vocab_size:
        raise ValueError(f"vocab_size must be at least the {len(tokenizer)} of the tokenizer, got {vocab_size}")
    if len(tokenizer) < vocab_size:
        log.warning("the tokenizer has %d entries, the config's vocab_size is %d", len(tokenizer), vocab_size)


def plan_of(arguments: TrainArguments) -> Plan:
    """The schedule that the arguments describe."""
    return Plan(
        stages=tuple(Stage.parse(stage) for stage in arguments.stages),
        lr=arguments.lr,
        min_lr=arguments.min_lr,
        warmup_steps=arguments.warmup_steps,
        decay_steps=arguments.decay_steps,
    )


def mix_of(arguments: TrainArguments) -> MixSettings:
    """The mixture that the arguments describe."""
    return MixSettings(
        seed=arguments.seed,
        needle_fraction=arguments.needle_fraction,
        random_filler=arguments.random_filler,
        answer_weight=arguments.answer_weight,
        recall_windows=arguments.recall_windows,
        curriculum_windows=arguments.curriculum_windows,
    )


def settings_of(arguments: TrainArguments, model: nn.Module, mix: WindowMix) -> LoopSettings:
    """How to run the training, and what makes it this training and no other."""
    return LoopSettings(
        folder=Path(arguments.output_dir),
        identity={
            "config": json.loads(model.config.to_json_string()),
            "data_sha256": hashlib.sha256(mix.stream.tobytes()).hexdigest(),
            "mix": asdict(mix.settings),
            "optimizer": [arguments.weight_decay, arguments.beta1, arguments.beta2, arguments.clip],
            "mixed_precision": arguments.mixed_precision,
        },
        weight_decay=arguments.weight_decay,
        beta1=arguments.beta1,
        beta2=arguments.beta2,
        clip=arguments.clip,
        log_every=arguments.log_every,
        eval_every=arguments.eval_every,
        save_minutes=arguments.save_minutes,
        max_minutes=arguments.max_minutes,
    )


def new_model(config: str, seed: int) -> nn.Module:
    """A float32 model with fresh weights for a config file."""
    path = Path(config) / "config.json" if Path(config).is_dir() else Path(config)
    if not path.is_file():
        raise ValueError(f"config must be a config.json or a folder with one, got {config!r}")
    values = json.loads(path.read_text(encoding="utf-8"))
    if "model_type" not in values:
        raise ValueError(f"config {config!r} must name its model_type, got the keys {sorted(values)}")
    torch.manual_seed(seed)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(**values), dtype=torch.float32)


if __name__ == "__main__":
    run(main)
