"""What every optimiser step of a training sees: window length, rows and learning rate."""

import math
import re
from bisect import bisect_right
from dataclasses import dataclass
from itertools import accumulate


@dataclass(frozen=True)
class Stage:
    """`steps` optimiser steps on `rows` windows of `length` tokens."""

    length: int
    rows: int
    steps: int

    @classmethod
    def parse(cls, text: str, tokens_per_step: int | None = None) -> "Stage":
        """Read `LENGTHxROWS:STEPS`, e.g. `512x8:2000`, or `LENGTH:STEPS` with the rows of `tokens_per_step`."""
        match = re.fullmatch(r"(\d+)(?:x(\d+))?:(\d+)", text)
        if not match or not all(int(part) > 0 for part in match.groups("1")) or int(match[1]) < 2:
            raise ValueError(f"stages must look like LENGTHxROWS:STEPS with positive numbers, got {text!r}")
        length, rows, steps = int(match[1]), match[2], int(match[3])
        if rows is None:
            if tokens_per_step is None:
                raise ValueError(f"stages must name their rows where tokens_per_step is not given, got {text!r}")
            if tokens_per_step < 1 or tokens_per_step % length:
                raise ValueError(
                    f"tokens_per_step must be a multiple of the length in {text!r}, got {tokens_per_step}"
                )
            rows = tokens_per_step // length
        return cls(length, int(rows), steps)


@dataclass(frozen=True)
class Plan:
    """The schedule of a training.

    The learning rate rises linearly over `warmup_steps`, stays at `lr`, and falls along a half cosine to `min_lr`
    over the last `decay_steps` (None: everything after the warm-up, the usual cosine). A plan whose last stage
    grows later is the same plan up to the start of the decay, so a training can be made longer while it runs.
    """

    stages: tuple[Stage, ...]
    lr: float
    min_lr: float
    warmup_steps: int
    decay_steps: int | None = None

    def __post_init__(self) -> None:
        if not self.stages:
            raise ValueError("stages must name at least one stage, got none")
        if not 0 <= self.min_lr <= self.lr or self.lr == 0:
            raise ValueError(f"lr must be positive and min_lr between 0 and lr, got {self.lr} and {self.min_lr}")
        if not 0 <= self.warmup_steps <= self.total_steps:
            raise ValueError(f"warmup_steps must lie between 0 and {self.total_steps}, got {self.warmup_steps}")
        if self.decay_steps is not None and not 0 <= self.decay_steps <= self.total_steps - self.warmup_steps:
            raise ValueError(
                f"decay_steps must lie between 0 and {self.total_steps - self.warmup_steps}, got {self.decay_steps}"
            )

    @property
    def total_steps(self) -> int:
        """Optimiser steps of all stages."""
        return sum(stage.steps for stage in self.stages)

    def learning_rate(self, step: int) -> float:
        """The learning rate of step `step` (0-based)."""
        if step < self.warmup_steps:
            return self.lr * (step + 1) / self.warmup_steps
        decay = self.total_steps - self.warmup_steps if self.decay_steps is None else self.decay_steps
        done = step + 1 - (self.total_steps - decay)
        if decay == 0 or done <= 0:
            return self.lr
        return self.min_lr + (self.lr - self.min_lr) * 0.5 * (1.0 + math.cos(math.pi * min(1.0, done / decay)))

    def place(self, step: int) -> tuple[Stage, int, tuple[tuple[int, int], ...]]:
        """The stage of a step, the number of its first window within the stage, and `(length, windows)` of each
        stage before it."""
        if not 0 <= step < self.total_steps:
            raise ValueError(f"step must lie between 0 and {self.total_steps - 1}, got {step}")
        ends = list(accumulate(stage.steps for stage in self.stages))
        number = bisect_right(ends, step)
        stage = self.stages[number]
        earlier = tuple((stage.length, stage.steps * stage.rows) for stage in self.stages[:number])
        return stage, (step - (ends[number] - stage.steps)) * stage.rows, earlier

    def tokens_before(self, step: int) -> int:
        """Tokens read by the steps before `step`."""
        total = 0
        for stage in self.stages:
            taken = min(step, stage.steps)
            total += taken * stage.rows * stage.length
            step -= taken
        return total

    def to_json(self) -> dict:
        """The plan as plain values; `from_json` reads it back."""
        return {
            "stages": [f"{stage.length}x{stage.rows}:{stage.steps}" for stage in self.stages],
            "lr": self.lr,
            "min_lr": self.min_lr,
            "warmup_steps": self.warmup_steps,
            "decay_steps": self.decay_steps,
        }

    @classmethod
    def from_json(cls, values: dict) -> "Plan":
        """Inverse of `to_json`."""
        return cls(**{**values, "stages": tuple(Stage.parse(stage) for stage in values["stages"])})

    def same_past(self, other: "Plan", steps: int) -> bool:
        """Whether both plans prescribe the same first `steps` steps."""
        if steps > min(self.total_steps, other.total_steps):
            return False
        return all(
            self.learning_rate(step) == other.learning_rate(step)
            and self.place(step)[1:] == other.place(step)[1:]
            and (self.place(step)[0].length, self.place(step)[0].rows)
            == (other.place(step)[0].length, other.place(step)[0].rows)
            for step in range(steps)
        )
