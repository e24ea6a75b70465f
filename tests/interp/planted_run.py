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
    seed=0,
):
    """A run written to `path` and read back.

    Plasticity is multiplied by `bucket_factor[bucket]`, by `early_factor` over the first 100 tokens, and
    grows with surprisal to the power `surprisal_power`; freezing configuration j costs `frozen_cost / (j +
    1)` nats; the last `answers` tokens of each document are answers; `silent_layers` have plasticity 0.
    Surprisal does not depend on the bucket.
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
        )
        for index in range(documents)
    ]
    table = pa.concat_tables(tables)
    folder = RunFolder.create(path, overwrite=True)
    folder.write_shard(table)
    folder.finish(_meta(table, documents, tokens, layers, freezing))
    return read_run(path)


def _document(rng, index, tokens, layers, factor, early, power, costs, answers, silent_layers, noise):
    position = np.arange(tokens)
    bucket = rng.choice(4, tokens, p=[0.4, 0.25, 0.25, 0.1])
    bucket[0] = 2  # the first word of a document is new
    loss = rng.lognormal(1.0, 0.5, tokens).astype(np.float32)
    plasticity = factor[bucket] * np.where(position < 100, early, 1.0) * loss**power
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


def _meta(table, documents, tokens, layers, freezing):
    loss = table.column("loss").to_numpy()
    return {
        "arguments": {"min_lag": 0},
        "model": {
            "id": "planted",
            "revision": None,
            "ttt_layers": list(range(layers)),
            "num_heads": 2,
            "mini_batch_size": 16,
        },
        "tokenizer": {"id": "planted", "vocab_size": 50},
        "corpus": {"dataset_type": "planted"},
        "documents": [{"document": i, "name": f"document {i}", "tokens": tokens} for i in range(documents)],
        "bucketing": {},
        "freezing": list(freezing),
        "seed": 0,
        "versions": {},
        "definitions": {"plasticity": "Frobenius norm of what a token commits."},
        "totals": {
            "documents": documents,
            "tokens": documents * tokens,
            "mean_loss": float(np.nanmean(loss)),
            "seconds": 1.0,
            "tokens_per_second": float(documents * tokens),
        },
    }
