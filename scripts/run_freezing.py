"""Freeze layers and heads of a TTT model every way a question needs, and say what each costs.

    python scripts/run_freezing.py --model model_cards/ttt-linear-tiny --dataset_type pydoc --seq_length 1024
    python scripts/run_freezing.py --model model_cards/ttt-linear-tiny --dataset_type needle --needle_filler text \\
        --families single heads --seq_length 512 --max_steps 12
    python scripts/run_freezing.py --model MODEL --preset drift_retina --dataset_type repeated --config ttt_base_lr=0.5

Leaves a run folder whose tokens hold the loss under every freezing (`loss_frozen`), and beside it
`loss_change.parquet` (the same less the loss with nothing frozen, token by token, a column each), `freezing.csv`, for
needles also `answers.csv` and `answers_by_depth.csv`, with --skip_shares `skipping.csv`, and a figure of each.
All options of run_inference.py apply; `--freeze`, `--preset` and `--families` add up. Values of --config are read as
JSON or else as strings; nothing is evaluated.
"""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import pyarrow as pa
from _shared import option, parse, run
from run_inference import InferenceArguments, check_arguments, open_run

from interp import plots, study_captions, study_plots
from interp.collect import collect
from interp.corpora import load_corpus
from interp.files import write_parquet
from interp.freezing import Freezing, parse_freezing, ttt_layers
from interp.freezing_sweep import answer_table, depth_table, loss_change, sweep_table
from interp.presets import FAMILIES, ON_REPETITIVE_TEXT, PRESETS, THIRDS, freeze_preset, sweep_freezings
from interp.resampling import Bootstrap
from interp.run_folder import read_run
from interp.skipping import skip_small_updates
from interp.tables import save_tables

log = logging.getLogger("run_freezing")
DEFAULT_FAMILIES = ("single", "leave-one-in", "prefix", "suffix", "thirds", "random")


@dataclass
class FreezingArguments(InferenceArguments):
    """Read documents with many parts of a TTT model frozen in turn; leave a run folder and tables of what it costs."""

    families: list[str] = option([], f"what is frozen: {', '.join(FAMILIES)} (default: all but heads and presets)")
    preset: list[str] = option(
        [], f"choices of the earlier study, by relative depth: {', '.join([*PRESETS, *THIRDS])}, all"
    )
    random_subsets: int = option(8, "random subsets per number of layers, the null of the named ones")
    skip_shares: list[float] = option([], "also skip these shares of writes, those with the smallest gradients")
    n_boot: int = option(2000, "resamples behind every interval, 80 at least")


def main(argv: list[str] | None = None) -> int:
    arguments = parse(FreezingArguments, argv)
    check_arguments(arguments)
    opened = open_run(arguments)
    layers = ttt_layers(opened.model.config)
    freezings, labels = choose(arguments, layers, opened.model.config.num_attention_heads)
    collect(
        opened.model,
        opened.tokenizer,
        load_corpus(tokenizer=opened.tokenizer, **opened.corpus),
        opened.folder,
        freezing=freezings,
        **opened.options,
    )
    if opened.state.is_main_process:
        report(arguments, opened.folder, labels, skipped(arguments, opened))
    return 0


def choose(
    arguments: FreezingArguments, layers: list[int], heads: int
) -> tuple[list[Freezing], dict[str, dict[str, str]]]:
    """The freezings asked for, each once, and what every family calls them; ValueError for unknown names."""
    named = [*arguments.freeze, *arguments.preset]
    families = arguments.families or ([] if named else list(DEFAULT_FAMILIES))
    if len(layers) < 3 and "thirds" in families and not arguments.families:
        families = [family for family in families if family != "thirds"]
    freezings, labels = sweep_freezings(
        layers, heads, families, random_subsets=arguments.random_subsets, seed=arguments.seed
    )
    found = {entry.name: entry for entry in freezings}
    for text in arguments.freeze:
        entry = parse_freezing(text, layers)
        found.setdefault(entry.name, entry)
        labels.setdefault("asked for", {})[text] = entry.name
    for name in arguments.preset:
        chosen = freeze_preset(name, layers)
        log.info("preset %s freezes layers %s of %s", name, chosen, layers)
        if name in ON_REPETITIVE_TEXT and arguments.dataset_type != "repeated":
            log.warning("the earlier study used preset %s on repetitive text: --dataset_type repeated", name)
        if chosen:
            entry = Freezing(",".join(map(str, chosen)) if chosen != layers else "all", tuple(chosen))
            found.setdefault(entry.name, entry)
            labels.setdefault("presets", {})[name] = entry.name
    return list(found.values()), labels


def skipped(arguments: FreezingArguments, opened: Any) -> pd.DataFrame | None:
    """What skipping small updates costs, when asked for."""
    if not arguments.skip_shares:
        return None
    rows = [document.input_ids for document in load_corpus(tokenizer=opened.tokenizer, **opened.corpus)]
    boot = Bootstrap(n_boot=arguments.n_boot, seed=arguments.seed)
    return skip_small_updates(opened.model, rows, shares=arguments.skip_shares, boot=boot)


def report(
    arguments: FreezingArguments, folder: Path, labels: dict[str, dict[str, str]], skipping: pd.DataFrame | None
) -> None:
    """Write the tables and figures beside the run, and print what they say."""
    found = read_run(folder)
    boot = Bootstrap(n_boot=arguments.n_boot, seed=arguments.seed)
    seconds = dict(
        zip(
            ["nothing frozen", *(e["name"] for e in found.freezing)], found.meta["totals"]["pass_seconds"], strict=True
        )
    )
    tables = {"freezing": sweep_table(found, labels, boot=boot)}
    if found.tokens["is_answer"].any():
        tables["answers"] = answer_table(found, labels, boot=boot)
        tables["answers_by_depth"] = depth_table(found)
    for name in ("freezing", "answers"):
        if name in tables:
            tokens = found.meta["totals"]["tokens"]
            tables[name]["tokens_per_second"] = [tokens / seconds[c] for c in tables[name]["configuration"]]
    if skipping is not None:
        tables["skipping"] = skipping
    save_tables(tables, folder)
    changes = pa.Table.from_pandas(loss_change(found), preserve_index=False)
    write_parquet(folder / "loss_change.parquet", [changes])
    for name, plot, caption in (
        ("freezing", study_plots.plot_freezing, study_captions.freezing_caption),
        ("answers", study_plots.plot_freezing, study_captions.freezing_caption),
        ("skipping", study_plots.plot_skipping, study_captions.skipping_caption),
    ):
        if name in tables:
            table = tables[name].assign(corpus=arguments.dataset_type)
            plots.save_figure(plot(table)[0], folder / f"{name}.png")
            print(f"{name}.png: {caption(table).text}")
    print(f"{len(tables)} tables in {folder}")


if __name__ == "__main__":
    run(main)
