"""Plasticity with known effects, drawn without any model: for the tests of statistics."""

import numpy as np

from interp.bucketing import Bucket


def grid(documents: int, tokens: int) -> tuple[np.ndarray, np.ndarray]:
    """Document and position of every token."""
    return np.repeat(np.arange(documents), tokens), np.tile(np.arange(tokens), documents)


def dependent_noise(generator, documents: int, tokens: int, memory: float = 0.7) -> np.ndarray:
    """Noise of variance 1 that a token shares in part with the one before, [documents * tokens]."""
    steps = generator.normal(size=(documents, tokens)) * np.sqrt(1 - memory**2)
    noise = np.empty_like(steps)
    noise[:, 0] = generator.normal(size=documents)
    for t in range(1, tokens):
        noise[:, t] = memory * noise[:, t - 1] + steps[:, t]
    return noise.reshape(-1)


def runs_of_labels(generator, documents: int, tokens: int, share: float = 0.4) -> np.ndarray:
    """SYNTAX and NOVELTY in runs, as the tokens of words: a label stays with probability 0.6."""
    labels = np.empty((documents, tokens), dtype=np.int64)
    fresh = np.where(generator.random((documents, tokens)) < share, Bucket.NOVELTY, Bucket.SYNTAX)
    stay = generator.random((documents, tokens)) < 0.6
    labels[:, 0] = fresh[:, 0]
    for t in range(1, tokens):
        labels[:, t] = np.where(stay[:, t], labels[:, t - 1], fresh[:, t])
    return labels.reshape(-1)


def null_sample(generator, documents: int = 20, tokens: int = 128):
    """Plasticity [N, 1] that differs by document and from token to token and knows nothing of the labels."""
    document, position = grid(documents, tokens)
    level = 0.4 * generator.normal(size=documents)[document]
    plasticity = np.exp(level + 0.5 * dependent_noise(generator, documents, tokens))[:, None]
    return plasticity, runs_of_labels(generator, documents, tokens), document, position
