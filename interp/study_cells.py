"""Reading the cells of a study, one by one, each into a folder that is whole or can be taken up again."""

import os
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import torch
from tqdm.auto import tqdm
from transformers import AutoConfig, AutoModelForCausalLM

from interp.collect import collect
from interp.controls import CONTROLS, control_documents, sample_documents
from interp.corpora import load_corpus
from interp.documents import Document
from interp.files import read_json, to_json, write_parquet, write_text
from interp.freezing import Freezing, ttt_layers
from interp.loading import load_model, load_tokenizer
from interp.needle import NeedleOptions
from interp.presets import sweep_freezings
from interp.reader import evaluation_mode, read_batch
from interp.run_folder import META_FILE
from interp.skipping import read_skipping, write_cost
from interp.study_plan import NEEDLE_DEPTHS, Cell, Setting, Shape, StudyModel

__all__ = ["CELL_FILE", "freezings_of", "is_done", "model_shape", "read_cell", "read_cells", "study_documents"]

CELL_FILE = "cell.json"
TABLE_FILE = "table.parquet"


def model_shape(model: StudyModel) -> tuple[StudyModel, Shape]:
    """Give a model with its shape, from its configuration; ValueError when there is none."""
    try:
        config = AutoConfig.from_pretrained(model.path)
    except (OSError, ValueError) as error:
        raise ValueError(f"the configuration of model {model.path!r} could not be read: {error}") from error
    kinds = getattr(config, "layer_types", None) or ()
    layers = sum(kind == "ttt" for kind in kinds)
    return model, Shape(layers, config.num_attention_heads, config.max_position_embeddings)


def freezings_of(
    layers: Sequence[int], heads: int, families: Sequence[str], setting: Setting
) -> tuple[list[Freezing], dict[str, dict[str, str]]]:
    """Give the freezings of some families, "all" among them, and their labels; nothing for no family."""
    if not families:
        return [], {}
    if tuple(families) == ("all",):
        return [Freezing("all", tuple(layers))], {}
    if len(layers) < 3:
        families = [family for family in families if family != "thirds"]
    return sweep_freezings(layers, heads, families, random_subsets=setting.random_subsets)


def read_cells(
    cells: Sequence[Cell],
    folder: str | os.PathLike,
    setting: Setting,
    *,
    texts: Sequence[str] = (),
    device: Any = "cpu",
    progress: bool = False,
) -> None:
    """Read the cells that are not done, keeping one model at a time; an interrupted cell is taken up where it was."""
    open_cells = [cell for cell in cells if not is_done(cell, folder, setting, texts)]
    done = sum(cell.cost for cell in cells) - sum(cell.cost for cell in open_cells)
    held: tuple[StudyModel, Any, Any] | None = None
    bar_options = {"unit": "tok", "unit_scale": True, "disable": not progress}
    with tqdm(total=round(sum(cell.cost for cell in cells)), initial=round(done), **bar_options) as bar:
        for cell in sorted(open_cells, key=lambda cell: (cell.model.name, -cell.cost)):
            if held is None or held[0] != cell.model:
                held = (cell.model, *_load(cell.model, device))
            bar.set_postfix_str(cell.folder)
            read_cell(cell, held[1], held[2], folder, setting, texts=texts)
            bar.update(round(cell.cost))


def read_cell(
    cell: Cell,
    model: Any,
    tokenizer: Any,
    folder: str | os.PathLike,
    setting: Setting,
    *,
    texts: Sequence[str] = (),
) -> None:
    """Read one cell into its folder; `cell.json`, written last, says that it is whole."""
    target = Path(folder) / cell.folder
    documents, context = study_documents(cell.corpus, tokenizer, texts=texts)
    depends = _depends(cell, setting, texts)
    if cell.kind == "run":
        freezings, labels = freezings_of(
            ttt_layers(model.config), model.config.num_attention_heads, cell.families, setting
        )
        # A folder of other arguments is made anew; of these, gone on with.
        same = (target / "arguments.json").exists() and read_json(target / "arguments.json") == depends
        if not same and target.exists():
            # Before the new arguments are told: what was read with others must not be taken for theirs after a kill.
            shutil.rmtree(target)
        target.mkdir(parents=True, exist_ok=True)
        write_text(target / "arguments.json", to_json(depends))
        if not (same and (target / META_FILE).exists()):
            collect(
                model,
                tokenizer,
                documents,
                target,
                batch_size=_rows(cell.corpus["length"]),
                freezing=freezings,
                stats=cell.stats,
                corpus={"dataset_type": cell.corpus["kind"], **cell.corpus},
                seed=cell.corpus["sample"],
                overwrite=not same,
                resume=same,
            )
        write_text(target / CELL_FILE, to_json({**depends, "context": context, "labels": labels}))
        return
    target.mkdir(parents=True, exist_ok=True)
    known: dict[str, Any] = {"context": context, "labels": {}}
    if cell.kind == "skip":
        rows = [document.input_ids for document in documents]
        table = read_skipping(model, rows, shares=setting.skip_shares, rounds=setting.skip_rounds)
        known["cost"] = write_cost(model)
    else:
        table = _plain_losses(model, documents)
    write_parquet(target / TABLE_FILE, [pa.Table.from_pandas(table, preserve_index=False)])
    write_text(target / CELL_FILE, to_json({**depends, **known}))


def is_done(cell: Cell, folder: str | os.PathLike, setting: Setting, texts: Sequence[str] = ()) -> bool:
    """Whether the folder of a cell is whole and was read with the same arguments."""
    file = Path(folder) / cell.folder / CELL_FILE
    if not file.exists():
        return False
    depends = _depends(cell, setting, texts)
    kept = read_json(file)
    return all(kept.get(key) == value for key, value in depends.items())


def study_documents(
    corpus: Mapping[str, Any], tokenizer: Any, *, texts: Sequence[str] = ()
) -> tuple[list[Document], int]:
    """Give the documents of a cell, and how many of their first tokens only prepare the state."""
    length, number, sample, control = (corpus[key] for key in ("length", "number", "sample", "control"))
    if corpus["kind"] == "needle":
        options = {"seed": sample, "needle": NeedleOptions(depths=NEEDLE_DEPTHS, filler="text")}
        return list(load_corpus("needle", tokenizer, seq_length=length, max_documents=number, **options)), 0
    longest = int(length * (CONTROLS[control][1] if control else 1))
    kind, path = ("text", list(texts)) if texts else ("pydoc", None)
    whole = list(load_corpus(kind, tokenizer, path=path, seq_length=longest))
    chosen = sample_documents(whole, number, sample, length=longest)
    if control is None:
        return chosen, 0
    return control_documents(control, chosen, length=length, seed=sample, bos=tokenizer.bos_token_id)


class _Encoded:
    """A tokenizer that keeps the last long texts it has encoded: all cells of a model read the same ones."""

    def __init__(self, tokenizer: Any):
        self._tokenizer = tokenizer
        self._kept: dict[Any, Any] = {}

    def __getattr__(self, name: str) -> Any:
        return getattr(self._tokenizer, name)

    def __len__(self) -> int:
        return len(self._tokenizer)

    def __call__(self, text: str, **options: Any) -> Any:
        key = (text, tuple(sorted(options.items())))
        if key not in self._kept:
            self._kept[key] = self._tokenizer(text, **options)
        return self._kept[key]


def _load(model: StudyModel, device: Any) -> tuple[Any, Any]:
    tokenizer = _Encoded(load_tokenizer(model.path))
    if model.untrained is None:
        return load_model(model.path, ttt_only=False, device=device), tokenizer
    config = AutoConfig.from_pretrained(model.path)
    with torch.random.fork_rng():
        torch.manual_seed(model.untrained)
        return AutoModelForCausalLM.from_config(config).float().to(device).eval(), tokenizer


def _depends(cell: Cell, setting: Setting, texts: Sequence[str]) -> dict[str, Any]:
    """What a cell's content follows from; texts by name and size, so that the folder may move."""
    files = [[Path(text).name, Path(text).stat().st_size if Path(text).is_file() else None] for text in texts]
    options = {"random_subsets": setting.random_subsets} if cell.families else {}
    if cell.kind == "skip":
        options = {"skip_shares": list(setting.skip_shares), "skip_rounds": setting.skip_rounds}
    arguments = cell.arguments()
    arguments["families"] = list(arguments["families"])
    return {"cell": arguments, "options": options, "texts": files}


def _rows(length: int) -> int:
    """Documents per batch: short ones are read side by side."""
    return max(1, min(8, 4096 // length))


def _plain_losses(model: Any, documents: Sequence[Document]) -> pd.DataFrame:
    """Document, position, loss, greedy and is_answer of every token, from a model without an inner loop."""
    parts = []
    with evaluation_mode(model):
        for index, document in enumerate(documents):
            (reading,) = read_batch(model, [document.input_ids], plasticity=False)
            size = len(document.input_ids)
            answer = np.zeros(size, bool) if document.answer_mask is None else document.answer_mask
            place = {"document": index, "name": document.name, "position": np.arange(size)}
            found = {"loss": reading.loss, "greedy": reading.greedy, "is_answer": answer}
            parts.append(pd.DataFrame({**place, **found}))
    return pd.concat(parts, ignore_index=True)
