"""The official outer-loop recipes: what a training of each published size is told unless it says otherwise."""

from dataclasses import dataclass
from typing import Any

TOKENS_PER_STEP = 2**19
"""Tokens of an optimiser step in every official recipe: 256 windows of 2048."""


@dataclass(frozen=True)
class Recipe:
    """Size of the model as `TTTConfig.preset` knows it, peak learning rate, warm-up and number of steps."""

    size: str
    lr: float
    warmup_steps: int
    steps: int

    def values(self) -> dict[str, Any]:
        """The arguments of `scripts/train.py` that follow."""
        return {
            "lr": self.lr,
            "warmup_steps": self.warmup_steps,
            "stages": [f"2048:{self.steps}"],
            "tokens_per_step": TOKENS_PER_STEP,
        }


RECIPES = {
    "125m": Recipe("125m", lr=3e-3, warmup_steps=480, steps=4_800),
    "350m": Recipe("350m", lr=1.5e-3, warmup_steps=1_350, steps=13_500),
    "760m": Recipe("760m", lr=1.25e-3, warmup_steps=2_900, steps=29_000),
    "1.3b": Recipe("1b", lr=1e-3, warmup_steps=5_000, steps=50_000),
}
"""By the names of the paper; the official code calls the largest one 1b."""

PLAIN = {"lr": 3e-3, "warmup_steps": 100, "stages": ["512x8:2000", "2048x4:400"], "tokens_per_step": None}
"""The same arguments where no preset is named."""
