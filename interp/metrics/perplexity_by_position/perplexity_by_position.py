"""Perplexity against the number of tokens read, as a metric for `evaluate`."""

import datasets
import evaluate
import numpy as np

from interp.resampling import Bootstrap
from interp.time_course import perplexity_by_index

_DESCRIPTION = """\
Perplexity by token index: of every window of the documents, and of all tokens up to its end. A model that uses its
context has a perplexity that falls with the index.
"""
_INPUTS = """
Args:
    predictions: surprisal of every token given those before it (nats), one sequence per document; NaN where it is not
        defined, as at the first token.
    window: tokens per window (default 256).
    n_boot, confidence, seed: of the intervals (block bootstrap over documents, or over stretches of few documents).
Returns:
    lists with an entry per window: "position" (tokens read at its end), "count", "windowed" and "cumulative"
    perplexity, each with "_low" and "_high"; "unit", "confidence"; and "perplexity" of all tokens.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PerplexityByPosition(evaluate.Metric):
    """See the description."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features({"predictions": datasets.Sequence(datasets.Value("float32"))}),
        )

    def _compute(self, predictions, window=256, n_boot=2000, confidence=0.95, seed=0):
        rows = [np.array([np.nan if loss is None else loss for loss in row], dtype=np.float64) for row in predictions]
        losses = np.concatenate(rows)
        if (losses < 0).any():
            raise ValueError(f"predictions must be surprisals of 0 nats or more, got {losses[losses < 0][0]}")
        documents = np.repeat(np.arange(len(rows)), [len(row) for row in rows])
        positions = np.concatenate([np.arange(len(row)) for row in rows])
        boot = Bootstrap(n_boot=n_boot, confidence=confidence, seed=seed)
        table = perplexity_by_index({"model": losses}, documents, positions, window=window, boot=boot)
        names = [name + end for name in ("windowed", "cumulative") for end in ("", "_low", "_high")]
        result = {name: table[name].tolist() for name in ("position", "count", *names)}
        whole = float(table["cumulative"].iloc[-1])
        return result | {"unit": table["unit"].iloc[0], "confidence": confidence, "perplexity": whole}
