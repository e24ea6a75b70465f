"""Retrieved values that are right, as a metric for `evaluate`."""

import datasets
import evaluate
import numpy as np

from interp.resampling import Bootstrap, block_bootstrap_ci, share_interval

_DESCRIPTION = """\
Share of retrieval documents whose value a model gives wholly right, and share of characters that are right, place by
place.
"""
_INPUTS = """
Args:
    predictions: what the model wrote for every document, strings; what follows the value's length is left out, so that
        a model may go on writing.
    references: the values.
    n_boot, confidence, seed: of the intervals over documents.
Returns:
    "exact", with "_low" and "_high" (Wilson's interval), and "characters" with theirs (resampled documents; NaN for a
    single one); "documents", "confidence".
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class NeedleAccuracy(evaluate.Metric):
    """See the description."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
            ),
        )

    def _compute(self, predictions, references, n_boot=2000, confidence=0.95, seed=0):
        if not all(references):
            raise ValueError("references must be values of one character or more, got an empty one")
        answers = [answer[: len(value)] for answer, value in zip(predictions, references, strict=True)]
        exact = [float(answer == value) for answer, value in zip(answers, references, strict=True)]
        shares = [
            sum(a == b for a, b in zip(answer, value, strict=False)) / len(value)
            for answer, value in zip(answers, references, strict=True)
        ]
        # Documents are what varies, however few there are.
        boot = Bootstrap(n_boot=n_boot, confidence=confidence, seed=seed, min_documents=2)
        result = {}
        for name, values in (("exact", exact), ("characters", shares)):
            found = block_bootstrap_ci(values, np.arange(len(values)), boot=boot)
            result |= {name: found.value, f"{name}_low": found.low, f"{name}_high": found.high}
        low, high = share_interval(sum(exact), len(exact), confidence)
        result |= {"exact_low": float(low), "exact_high": float(high)}
        return result | {"documents": len(references), "confidence": confidence}
