"""Plasticity per bucket, as a metric for `evaluate`."""

import datasets
import evaluate
import numpy as np

from interp.bucketing import BUCKET_NAMES, Bucket
from interp.resampling import Bootstrap
from interp.statistics import adjusted_contrast, bucket_stats

_DESCRIPTION = """\
How much each functional bucket of tokens (SYNTAX, RETRIEVAL, NOVELTY, OTHER) changes the inner weights, and the ratio
of every bucket to SYNTAX at like positions in document and mini-batch, with block-bootstrap intervals.
"""
_INPUTS = """
Args:
    predictions: plasticity of every token, one sequence of numbers per document.
    references: bucket of every token (0 SYNTAX, 1 RETRIEVAL, 2 NOVELTY, 3 OTHER, as of interp.bucketing), likewise.
    mini_batch_size: of the inner loop; tokens are compared within a place in the mini-batch (default 16).
    n_boot, confidence, seed: of the intervals.
Returns:
    {bucket: {"count", "mean", "mean_low", "mean_high", "median"}} for every bucket, and for the others than SYNTAX
    "ratio", "ratio_low", "ratio_high" (over SYNTAX, at like positions); "unit", "documents", "confidence". What has no
    tokens is NaN.
"""


@evaluate.utils.file_utils.add_start_docstrings(_DESCRIPTION, _INPUTS)
class PlasticityBuckets(evaluate.Metric):
    """See the description."""

    def _info(self):
        return evaluate.MetricInfo(
            description=_DESCRIPTION,
            citation="",
            inputs_description=_INPUTS,
            features=datasets.Features(
                {
                    "predictions": datasets.Sequence(datasets.Value("float32")),
                    "references": datasets.Sequence(datasets.Value("int32")),
                }
            ),
        )

    def _compute(self, predictions, references, mini_batch_size=16, n_boot=2000, confidence=0.95, seed=0):
        lengths = [len(row) for row in predictions]
        if lengths != [len(row) for row in references]:
            raise ValueError(
                f"predictions and references must be as long as each other: got {lengths[:5]} and "
                f"{[len(row) for row in references][:5]} tokens per document"
            )
        plasticity = np.concatenate([np.asarray(row, dtype=np.float64) for row in predictions])[:, None]
        buckets = np.concatenate([np.asarray(row, dtype=np.int64) for row in references])
        documents = np.repeat(np.arange(len(lengths)), lengths)
        positions = np.concatenate([np.arange(length) for length in lengths])
        boot = Bootstrap(n_boot=n_boot, confidence=confidence, seed=seed)
        levels = bucket_stats(plasticity, buckets, documents, layers=[0], boot=boot)
        levels = levels[levels["layer"] == 0].set_index("bucket")
        pairs = [(bucket, Bucket.SYNTAX) for bucket in Bucket if bucket != Bucket.SYNTAX]
        options = {"mini_batch_size": mini_batch_size, "pairs": pairs, "layers": [0], "boot": boot}
        ratios = adjusted_contrast(plasticity, buckets, documents, positions, **options)
        ratios = ratios[ratios["layer"] == 0].set_index("bucket_a")
        result = {}
        for name in BUCKET_NAMES:
            row = levels.loc[name]
            result[name] = {"count": int(row["count"])}
            result[name] |= {key: float(row[key]) for key in ("mean", "mean_low", "mean_high", "median")}
            if name in ratios.index:
                result[name] |= {key: float(ratios.loc[name, key]) for key in ("ratio", "ratio_low", "ratio_high")}
        first = levels.iloc[0]
        return result | {"unit": first["unit"], "documents": int(first["documents"]), "confidence": confidence}
