"""Reads what a TTT model learns from text: buckets, statistics, corpora, run folders, checks and figures.

Works by the attributes of a model's outputs and configuration, so it serves classes loaded from the Hub as well.
`model, tokenizer = interp.load(name)` is the way in.
"""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from interp.loading import load

__all__ = ["load"]


def __getattr__(name: str):
    # Loading brings Transformers and the model package, which figures and statistics do without.
    if name == "load":
        from interp.loading import load

        return load
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
