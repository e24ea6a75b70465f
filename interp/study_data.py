"""The cells of a study read back: the samples of every model and part pooled into one."""

import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd

from interp.files import read_json, read_parquet
from interp.run_folder import Run, read_run
from interp.study_cells import CELL_FILE, TABLE_FILE
from interp.study_plan import Cell, StudyModel

__all__ = ["Part", "StudyData", "pool_runs", "read_study"]


@dataclass(frozen=True)
class Part:
    """One part of a study (text, sweep, long-iid, ...) for one model, all samples together.

    run: of parts that were read with plasticity, else None. table: of the others, else None. labels: {family: {label:
    configuration}} of its freezings. length: tokens per document that count. known: what the cells noted besides.
    """

    model: StudyModel
    name: str
    run: Run | None
    table: pd.DataFrame | None
    labels: dict[str, dict[str, str]]
    length: int
    known: dict[str, Any]


@dataclass(frozen=True)
class StudyData:
    """The parts of a study by model and name, in the order of the models."""

    parts: dict[tuple[str, str], Part]

    @property
    def models(self) -> list[str]:
        """Names of the models."""
        return list(dict.fromkeys(model for model, _ in self.parts))

    def of_model(self, model: str) -> dict[str, Part]:
        """The parts of one model by name."""
        return {name: part for (owner, name), part in self.parts.items() if owner == model}


def read_study(cells: Sequence[Cell], folder: str | os.PathLike) -> StudyData:
    """Read all cells of a study back; ValueError when one is missing or damaged."""
    grouped: dict[tuple[str, str], list[Cell]] = {}
    for cell in cells:
        grouped.setdefault((cell.model.name, cell.part), []).append(cell)
    return StudyData({key: _read_part(group, Path(folder)) for key, group in grouped.items()})


def pool_runs(runs: Sequence[Run], context: int = 0) -> Run:
    """Join runs of one model with the same freezings into one, documents renumbered.

    The first `context` tokens of every document, which only prepared the state, are dropped. ValueError when the runs
    do not belong together.
    """
    first = runs[0]
    tables, documents, offset = [], [], 0
    for run in runs:
        if [e["name"] for e in run.freezing] != [e["name"] for e in first.freezing]:
            raise ValueError(f"runs {str(first.path)!r} and {str(run.path)!r} have different freezings")
        if run.meta["model"]["weights_fingerprint"] != first.meta["model"]["weights_fingerprint"]:
            raise ValueError(f"runs {str(first.path)!r} and {str(run.path)!r} are of different models")
        kept = (run.tokens["position"] >= context).to_numpy()
        tokens = run.tokens[kept].assign(
            document=run.tokens["document"][kept] + offset, position=run.tokens["position"][kept] - context
        )
        extras = {name: values[kept] for name, values in run.extras.items()}
        tables.append((tokens, run.plasticity[kept], run.loss_frozen[kept], extras))
        for entry in run.meta["documents"]:
            documents.append({**entry, "document": entry["document"] + offset, "tokens": entry["tokens"] - context})
        offset += max(entry["document"] for entry in run.meta["documents"]) + 1
    seconds = np.sum([run.meta["totals"]["pass_seconds"] for run in runs], axis=0).tolist()
    tokens = pd.concat([table[0] for table in tables], ignore_index=True)
    totals = {"documents": len(documents), "tokens": len(tokens), "pass_seconds": seconds}
    return replace(
        first,
        meta={**first.meta, "documents": documents, "totals": totals},
        tokens=tokens,
        plasticity=np.concatenate([table[1] for table in tables]),
        loss_frozen=np.concatenate([table[2] for table in tables]),
        extras={name: np.concatenate([table[3][name] for table in tables]) for name in first.extras},
    )


def _read_part(cells: Sequence[Cell], folder: Path) -> Part:
    first = cells[0]
    known = [read_json(folder / cell.folder / CELL_FILE) for cell in cells]
    common = {"labels": known[0]["labels"], "length": first.corpus["length"], "known": known[0]}
    if first.kind == "run":
        runs = [read_run(folder / cell.folder) for cell in cells]
        return Part(first.model, first.part, pool_runs(runs, known[0]["context"]), None, **common)
    tables, offset = [], 0
    for cell in cells:
        table = read_parquet(folder / cell.folder / TABLE_FILE).to_pandas()
        tables.append(table.assign(document=table["document"] + offset))
        offset = int(tables[-1]["document"].max()) + 1
    return Part(first.model, first.part, None, pd.concat(tables, ignore_index=True), **common)
