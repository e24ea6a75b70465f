"""Run folders with known effects, for the tests of tables, figures, checks and the text page."""

import numpy as np
import pyarrow as pa

from interp.run_folder import RunFolder, read_run, token_table

FREEZING = [{"name": "all", "layers": [0, 1]}, {"name": "first", "layers": [0]}]


def planted_run(
    path,
    *,
    documents=4,
    tokens=512,
    layers=2,
    bucket_factor=(1.0, 1.0, 1.0, 1.0),
    early_factor=1.0,
    surprisal_power=0.0,
    freezing=FREEZING,
    frozen_cost=0.5,
    answers=0,
    silent_layers=(),
    noise=0.2,
    position_only=False,
    seed=0,
):
    """Write a run to `path` and read it back.

    Plasticity is multiplied by `bucket_factor[bucket]`, by `early_factor` over the first 100 tokens, and
    grows with surprisal to the power `surprisal_power`; freezing configuration j costs `frozen_cost / (j +
    1)` nats; the last `answers` tokens of each document are answers; `silent_layers` have plasticity 0.
    Surprisal does not depend on the bucket. With `position_only`, NOVELTY and plasticity both fall over the
    document, and neither knows of the other.
    """
    rng = np.random.default_rng(seed)
    tables = [
        _document(
            rng,
            index,
            tokens,
            layers,
            np.asarray(bucket_factor),
            early_factor,
            surprisal_power,
            frozen_cost / np.arange(1, len(freezing) + 1),
            answers,
            silent_layers,
            noise,
            position_only,
        )
        for index in range(documents)
    ]
    table = pa.concat_tables(tables)
    folder = RunFolder.create(path, overwrite=True)
    folder.write_part(table, 0)
    folder.merge_parts()
    folder.finish(run_meta(table, freezing))
    return read_run(path)


def run_meta(table, freezing, **model):
    """A complete run.json content for a token table; `model` replaces entries of its model."""
    tokens = table.select(["document", "loss"]).to_pandas()
    sizes = tokens.groupby("document").size()
    frozen = np.array(table.column("loss_frozen").to_pylist()).T if freezing else []
    # Four bytes per token that has a loss.
    size = 4 * (len(tokens) - len(sizes))
    return {
        "arguments": {"min_lag": 0},
        "model": {
            "id": "planted",
            "revision": None,
            "config_hash": "0" * 64,
            "weights_fingerprint": "0" * 64,
            "num_parameters": 1000,
            "ttt_layers": list(range(table.schema.field("plasticity").type.list_size)),
            "frozen_layers": [],
            "frozen_heads": {},
            "frozen_from": None,
            "num_heads": 2,
            "mini_batch_size": 16,
            "dtype": "float32",
            **model,
        },
        "tokenizer": {"id": "planted", "vocab_size": 50},
        "corpus": {"dataset_type": "planted"},
        "documents": [
            {"document": int(i), "name": f"document {i}", "tokens": int(size), "bytes": 4 * (int(size) - 1)}
            for i, size in sizes.items()
        ],
        "bucketing": {"stop_list": "en"},
        "freezing": list(freezing),
        "seed": 0,
        "versions": {"python": "3.11"},
        "definitions": {"plasticity": "Frobenius norm of what a token commits."},
        "totals": {
            "documents": len(sizes),
            "tokens": len(tokens),
            "mean_loss": _mean(tokens["loss"]),
            "mean_loss_frozen": [_mean(losses) for losses in frozen],
            "nats_per_byte": float(np.nansum(tokens["loss"], dtype=np.float64)) / size,
            "seconds": 1.0,
            "tokens_per_second": float(len(tokens)),
        },
    }


def _mean(losses):
    losses = np.asarray(losses, dtype=np.float64)
    return float(np.nanmean(losses)) if np.isfinite(losses).any() else None


def _document(rng, index, tokens, layers, factor, early, power, costs, answers, silent_layers, noise, position_only):
    position = np.arange(tokens)
    bucket = rng.choice(4, tokens, p=[0.4, 0.25, 0.25, 0.1])
    if position_only:
        bucket[rng.random(tokens) < 0.6 * np.exp(-position / 150)] = 2
    bucket[0] = 2  # the first word of a document is new
    loss = rng.lognormal(1.0, 0.5, tokens).astype(np.float32)
    plasticity = factor[bucket] * np.where(position < 100, early, 1.0) * loss**power
    if position_only:
        plasticity = plasticity * np.exp(np.exp(-position / 300))
    plasticity = plasticity[:, None] * 10.0 ** -np.arange(layers) * rng.lognormal(0, noise, (tokens, layers))
    plasticity[:, list(silent_layers)] = 0
    loss[0] = np.nan
    columns = {
        "document": np.full(tokens, index),
        "position": position,
        "token_id": rng.integers(0, 50, tokens),
        "token": [f" w{i % 7}" for i in range(tokens)],
        "bucket": bucket,
        "word_id": np.where(bucket == 3, -1, position),
        "is_word_start": bucket != 3,
        "is_answer": position >= tokens - answers,
        "loss": loss,
    }
    frozen = loss[:, None] + costs + rng.normal(0, 0.01, (tokens, len(costs)))
    return token_table(columns, plasticity, frozen if len(costs) else None)
