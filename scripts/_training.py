"""The outer loop: AdamW over a window mix, with exact resume and a record of every measured step."""

import json
import math
import os
import signal
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import FrameType
from typing import Protocol

import numpy as np
import torch
from _checkpoints import checkpoints, load_checkpoint, save_checkpoint
from _schedule import Plan, Stage
from _step import Reader, StepOptions
from accelerate import Accelerator
from filelock import FileLock, Timeout
from torch import nn
from tqdm import tqdm


class Windows(Protocol):
    """Where the windows of a training come from: `WindowMix` or `DocumentStream`."""

    def batch(
        self, first: int, rows: int, length: int, earlier: tuple[tuple[int, int], ...] = ()
    ) -> tuple[np.ndarray, np.ndarray]:
        """Ids int64 and loss weights float32, both [rows, length], of windows `first ..` of a stage."""

    def state_dict(self) -> dict:
        """Where the source stands, as plain values."""

    def load_state_dict(self, state: dict) -> None:
        """Go to where `state_dict` was called."""


@dataclass(frozen=True)
class LoopSettings:
    """How to run a plan; `identity` holds whatever must be equal for a resume to continue the same training."""

    folder: Path
    identity: dict
    weight_decay: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    clip: float = 1.0
    log_every: int = 10
    eval_every: int = 250
    save_minutes: float = 5.0
    keep_every: int | None = None
    max_minutes: float | None = None
    reading: StepOptions = field(default_factory=StepOptions)

    def __post_init__(self) -> None:
        if self.keep_every is not None and self.keep_every < 1:
            raise ValueError(f"keep_every must be at least 1, got {self.keep_every}")
        for name in ("log_every", "eval_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")


def train(
    model: nn.Module,
    windows: Windows,
    plan: Plan,
    settings: LoopSettings,
    accelerator: Accelerator,
    validate: Callable[[nn.Module], dict[str, float]],
) -> bool:
    """Train `model` in place and say whether the plan was finished.

    Continues from the newest checkpoint of `settings.folder`, if there is one: on a CPU bit for bit as if it had
    never stopped. A checkpoint is left at the end, every `save_minutes`, and on SIGTERM or SIGINT. Measured steps
    are lines of `metrics.jsonl`: losses and gradient norm in nats, plasticity as the mean over layers and tokens.
    Raises ValueError when the folder holds a different training or one that runs, and when a gradient is not finite:
    the weights are then those of the step before, and the newest checkpoint is whole.
    """
    optimizer = torch.optim.AdamW(
        model.parameters(),
        lr=plan.lr,
        betas=(settings.beta1, settings.beta2),
        eps=1e-8,
        weight_decay=settings.weight_decay,
    )
    model, optimizer = accelerator.prepare(model, optimizer)
    run = _Run(model, optimizer, windows, plan, settings, accelerator)
    with _only_writer(settings.folder, accelerator), _StopSignals() as stop:
        return _loop(run, stop, validate)


def _loop(run: "_Run", stop: "_StopSignals", validate: Callable[[nn.Module], dict[str, float]]) -> bool:
    plan, settings, accelerator = run.plan, run.settings, run.accelerator
    step = run.resume()
    started = saved = time.monotonic()
    bar = tqdm(
        total=plan.total_steps,
        initial=step,
        disable=not accelerator.is_main_process,
        mininterval=5.0,
        desc=f"training in {accelerator.num_processes} process(es)",
    )
    with bar:
        while step < plan.total_steps:
            row = run.step(step)
            step += 1
            if step % settings.eval_every == 0 or step == plan.total_steps:
                row |= validate(accelerator.unwrap_model(run.model))
            if step % settings.log_every == 0 or "validation_loss" in row:
                run.record(row)
                bar.set_postfix_str(_summary(row))
            bar.update()
            now = time.monotonic()
            out_of_time = settings.max_minutes is not None and now - started > settings.max_minutes * 60
            milestone = settings.keep_every is not None and step % settings.keep_every == 0
            wishes = (stop.asked or out_of_time, milestone or now - saved > settings.save_minutes * 60)
            stopping, saving = run.agree(*wishes)
            if stopping or saving or step == plan.total_steps:
                run.save(step)
                saved = time.monotonic()
            if stopping:
                break
    return step == plan.total_steps


class _Run:
    """The moving parts of one training."""

    def __init__(
        self,
        model: nn.Module,
        optimizer: torch.optim.Optimizer,
        windows: Windows,
        plan: Plan,
        settings: LoopSettings,
        accelerator: Accelerator,
    ):
        self.model, self.optimizer, self.windows = model, optimizer, windows
        self.plan, self.settings, self.accelerator = plan, settings, accelerator
        self.reader = Reader(model, settings.reading, accelerator)
        self.metrics = settings.folder / "metrics.jsonl"

    def resume(self) -> int:
        found = checkpoints(self.settings.folder)
        if not found:
            if self.accelerator.is_main_process:
                self.settings.folder.mkdir(parents=True, exist_ok=True)
                self.metrics.write_text("", encoding="utf-8")
            return 0
        inner = self.accelerator.unwrap_model(self.model)
        state = load_checkpoint(found[-1], inner, _plain(self.optimizer))
        past = Plan.from_json(state["plan"])
        if state["identity"] != self.settings.identity or not self.plan.same_past(past, state["step"]):
            raise ValueError(
                f"output_dir {str(self.settings.folder)!r} holds another training (its data, model, seed or the "
                f"schedule of its first {state['step']} steps differ); name another folder or its own arguments"
            )
        self.windows.load_state_dict(state.get("windows", {}))
        if self.accelerator.is_main_process:
            rows = [row for row in read_metrics(self.metrics) if row["step"] <= state["step"]]
            beside = self.metrics.with_suffix(".part")
            beside.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
            os.replace(beside, self.metrics)
        self.accelerator.wait_for_everyone()
        return state["step"]

    def step(self, step: int) -> dict:
        begun = time.monotonic()
        stage, first, earlier = self.plan.place(step)
        rate = self.plan.learning_rate(step)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        ids, weights, total = self._rows_of_step(stage, first, earlier)
        measured = (step + 1) % self.settings.log_every == 0
        self.model.train()
        losses, plasticity = self.reader.gradients(ids, weights, total, step, measured=measured)
        norm = float(self.accelerator.clip_grad_norm_(self.model.parameters(), self.settings.clip))
        if not math.isfinite(norm):
            raise ValueError(
                f"the gradient of step {step + 1} is not finite at the learning rate {rate:.3g}: with a lower lr or a "
                "longer warm-up name another output_dir; this one holds what was saved before"
            )
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        row = {"step": step + 1, "tokens": self.plan.tokens_before(step + 1), "length": stage.length, "lr": rate}
        if measured or (step + 1) % self.settings.eval_every == 0 or step + 1 == self.plan.total_steps:
            row |= self._losses(losses, weights[:, 1:])
            row |= {"grad_norm": norm, "plasticity": plasticity}
            row["tokens_per_second"] = stage.rows * stage.length / (time.monotonic() - begun)
        return row

    def _rows_of_step(self, stage: Stage, first: int, earlier: tuple) -> tuple[torch.Tensor, ...]:
        """Ids and loss weights of this process, and the weight of all processes together."""
        processes = self.accelerator.num_processes
        if stage.rows % processes:
            raise ValueError(f"stages must have rows that {processes} processes can share, got {stage.rows}")
        parts = self.windows.batch(first, stage.rows, stage.length, earlier)
        ids, weights = (torch.from_numpy(part) for part in parts)
        if self.settings.reading.document_start is not None:
            weights = weights.masked_fill(ids == self.settings.reading.document_start, 0.0)
        own = slice(self.accelerator.process_index, None, processes)
        device = self.accelerator.device
        return ids[own].to(device), weights[own].to(device), weights[:, 1:].sum().to(device)

    def _losses(self, losses: torch.Tensor, weights: torch.Tensor) -> dict[str, float | None]:
        """Mean loss over ordinary tokens and over needle answers, all processes together, in nats per token."""
        answers = weights > 1
        sums = torch.stack(
            [
                (losses * (weights == 1)).sum(),
                (weights == 1).sum().to(losses.dtype),
                (losses * answers).sum(),
                answers.sum().to(losses.dtype),
            ]
        )
        text, text_count, answer, answer_count = self.accelerator.reduce(sums, "sum").tolist()
        return {
            "loss": text / text_count if text_count else None,
            "answer_loss": answer / answer_count if answer_count else None,
        }

    def agree(self, *wishes: bool) -> list[bool]:
        """What any process wishes, so that all of them stop and save behind the same step."""
        if self.accelerator.num_processes == 1:
            return list(wishes)
        flags = torch.tensor([wishes], dtype=torch.int32, device=self.accelerator.device)
        return self.accelerator.gather(flags).amax(0).bool().tolist()

    def record(self, row: dict) -> None:
        if self.accelerator.is_main_process:
            with self.metrics.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")
        numbers = {name: value for name, value in row.items() if value is not None}
        self.accelerator.log(numbers, step=row["step"])

    def save(self, step: int) -> None:
        if self.accelerator.is_main_process:
            state = {
                "identity": self.settings.identity,
                "plan": self.plan.to_json(),
                "windows": self.windows.state_dict(),
                "processes": self.accelerator.num_processes,
            }
            inner = self.accelerator.unwrap_model(self.model)
            every = self.settings.keep_every
            save_checkpoint(self.settings.folder, step, inner, _plain(self.optimizer), state, keep_every=every)
        self.accelerator.wait_for_everyone()


@contextmanager
def _only_writer(folder: Path, accelerator: Accelerator) -> Iterator[None]:
    """Hold the folder's lock in the main process; a process that is killed lets go of it."""
    if not accelerator.is_main_process:
        yield
        return
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(folder / ".lock")
    try:
        lock.acquire(timeout=0)
    except Timeout as error:
        raise ValueError(f"another training runs in output_dir {str(folder)!r}") from error
    try:
        yield
    finally:
        lock.release()


def read_metrics(path: Path) -> list[dict]:
    """The rows of a `metrics.jsonl`, in order; a last line cut short by a kill is left out."""
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True) if path.is_file() else []
    return [json.loads(line) for line in lines if line.endswith("\n")]


def _plain(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)


def _summary(row: dict) -> str:
    parts = []
    for name, label in (("loss", "loss"), ("answer_loss", "answer"), ("plasticity", "plasticity")):
        if row.get(name) is not None:
            parts.append(f"{label} {row[name]:.3f}")
    if row.get("tokens_per_second"):
        parts.append(f"{row['tokens_per_second']:.0f} tok/s")
    if "validation_loss" in row:
        parts.append(f"validation {row['validation_loss']:.4f}")
    return ", ".join(parts)


class _StopSignals:
    """Notes SIGTERM and SIGINT, so that a step ends and a checkpoint is written; the old handlers come back."""

    def __enter__(self) -> "_StopSignals":
        self.asked = False
        self._old = {number: signal.signal(number, self._ask) for number in (signal.SIGTERM, signal.SIGINT)}
        return self

    def __exit__(self, *unused: object) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)

    def _ask(self, number: int, frame: FrameType | None) -> None:
        self.asked = True
