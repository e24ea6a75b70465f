"""Let a TTT model read documents and leave a run folder: surprisal, bucket and plasticity of every token.

    python scripts/run_inference.py --model model_cards/ttt-linear-tiny --exp_name demo
    accelerate launch scripts/run_inference.py --model <Hub id> --dataset_type pg19 --seq_length 32768
    torchrun --nproc_per_node 2 scripts/run_inference.py --device cpu --model <folder>

Options of the earlier JAX script and what stands for them here:

- load_checkpoint: --model (or --load_checkpoint), a folder or Hub id, and --revision
- load_model_config: --load_model_config, a config.json instead of the model's own
- update_model_config: --config key=value ... (or --update_model_config); nothing is evaluated
- dataset_type: --dataset_type; `needle` is also known as `synthetic`
- dataset_path, dataset_split: --dataset_path, --dataset_split
- tokenizer_name: --tokenizer_name (default: the model's own)
- seq_length: --seq_length
- global_batch_size: --batch_size (or --global_batch_size)
- max_steps: --max_steps; max_steps x batch_size documents in all, however many processes read them
- exp_dir, exp_name: --exp_dir, --exp_name
- output_filename: none; the files of a run folder have fixed names, the folder is named
- mesh_dim: none; `accelerate config` and `accelerate launch` distribute the documents
- dtype, seed: --dtype, --seed
- loader_workers: none; documents are made as they are read
"""

import hashlib
import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from _shared import option, parse, prepare, repeated, run, run_folder
from accelerate import PartialState

from interp.bucketing import bundled_stop_lists
from interp.collect import collect
from interp.corpora import DATASET_TYPES, USED_OPTIONS, load_corpus
from interp.files import read_text
from interp.freezing import parse_freezing, ttt_layers
from interp.loading import load_model, load_tokenizer, parse_overrides
from interp.needle import FILLERS, NeedleOptions
from interp.reader import DEFAULT_SEGMENT_LENGTH
from interp.run_folder import read_run

log = logging.getLogger("run_inference")


@dataclass
class InferenceArguments:
    """Read documents with a TTT model; leave a run folder with surprisal, bucket and plasticity of every token."""

    model: str = option(help="folder or Hub id of the model", aliases=["--load_checkpoint"])
    revision: str | None = option(None, "branch, tag or commit of a Hub model")
    load_model_config: str | None = option(None, "config.json (or its folder) instead of the model's own")
    config: list[str] = repeated("key=value: replaces a configuration key", aliases=["--update_model_config"])
    trust_remote_code: bool = option(False, "run code that comes with a Hub model")
    tokenizer_name: str | None = option(None, "folder or Hub id of the tokenizer (default: the model)")
    dtype: Literal["float32", "bfloat16", "float64"] = option("float32", "dtype of the model")
    device: str | None = option(None, "device (default: an accelerator if there is one)")

    dataset_type: Literal[DATASET_TYPES] = option("pydoc", "kind of documents")
    dataset_path: list[str] = option([], "files, a folder, or a dataset id")
    dataset_config: str | None = option(None, "configuration name of a dataset")
    dataset_split: str | None = option(None, "split of a dataset (default: validation)")
    text_column: str | None = option(None, "column of a dataset that holds the text (default: text)")
    seq_length: int = option(2048, "most tokens per document")
    max_chars: int | None = option(None, "most characters read of each text (default: 200000 or what is needed)")
    pieces_per_text: int | None = option(None, "most documents cut from each text (default: 1 for datasets)")
    max_steps: int = option(10, "batches; max_steps x batch_size documents are read in all")
    batch_size: int = option(1, "documents read at a time", aliases=["--global_batch_size"])
    segment_length: int = option(DEFAULT_SEGMENT_LENGTH, "tokens per forward pass; changes memory, not results")

    needle_depth: list[float] = option([], "where the needle is, 0 to 1; documents take turns (default: 0)")
    needle_filler: Literal[FILLERS] | None = option(None, "filler of needle documents (default: random)")
    needle_value_length: int | None = option(None, "hex digits of the value, 1 to 8 (default: 8)")
    needle_filler_text: str | None = option(None, "text file for filler 'text' (default: Python's reference)")

    freeze: list[str] = repeated("another pass with these layers frozen: all, 2,3 or 0-1; may be repeated")
    stop_words: str = option("en", "bundled stop list, or a file with a word per line, # for comments")
    numbers: Literal["content", "other"] = option("content", "whether numbers are content words or OTHER")
    min_lag: int = option(0, "tokens back from which on an earlier occurrence counts as seen")
    stats: bool = option(False, "also keep inner learning rates, inner losses and drift of every token and layer")

    exp_dir: str = option("results", "folder of all results")
    exp_name: str | None = option(None, "name of this run's folder (default: model and dataset_type)")
    overwrite: bool = option(False, "replace a run of that name")
    resume: bool = option(False, "go on with an interrupted run of that name")
    seed: int = option(0, "seed of needle documents and of every random generator")
    quick_test: bool = option(False, "at most 2 documents of 256 tokens, to see that everything works")


# Options of the corpus by what they are called in `load_corpus`.
CORPUS_NAMES = {
    "dataset_path": "path",
    "dataset_config": "config_name",
    "dataset_split": "split",
    "text_column": "text_column",
    "max_chars": "max_chars",
    "pieces_per_text": "pieces_per_text",
    "needle_depth": "needle",
    "needle_filler": "needle",
    "needle_value_length": "needle",
    "needle_filler_text": "needle",
}


class OpenRun(NamedTuple):
    """What a run begins with; `options` are the arguments of `interp.collect.collect` that follow from the options."""

    model: Any
    tokenizer: Any
    corpus: dict[str, Any]
    folder: Path
    state: PartialState
    options: dict[str, Any]


def main(argv: list[str] | None = None) -> int:
    arguments = parse(InferenceArguments, argv)
    check_arguments(arguments)
    opened = open_run(arguments)
    layers = ttt_layers(opened.model.config)
    collect(
        opened.model,
        opened.tokenizer,
        load_corpus(tokenizer=opened.tokenizer, **opened.corpus),
        opened.folder,
        freezing=[parse_freezing(text, layers) for text in arguments.freeze],
        **opened.options,
    )
    if opened.state.is_main_process:
        summarise(opened.folder, arguments.dataset_type, arguments.max_steps * arguments.batch_size)
    return 0


def open_run(arguments: InferenceArguments) -> OpenRun:
    """Load model and tokenizer, and say where the run goes and how the documents are read."""
    if arguments.quick_test:
        arguments.seq_length = min(arguments.seq_length, 256)
        arguments.max_steps, arguments.batch_size = min(arguments.max_steps, 2), 1
    state = PartialState(cpu=arguments.device == "cpu")
    prepare(arguments.seed, state.is_main_process)
    name = _default_name(arguments) if arguments.exp_name is None else arguments.exp_name
    folder = run_folder(arguments.exp_dir, name)
    model = load_model(
        arguments.model,
        revision=arguments.revision,
        dtype=arguments.dtype,
        device=arguments.device or state.device,
        trust_remote_code=arguments.trust_remote_code,
        config=arguments.load_model_config,
        overrides=parse_overrides(arguments.config),
    )
    tokenizer = load_tokenizer(
        arguments.tokenizer_name or arguments.model,
        revision=None if arguments.tokenizer_name else arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
    )
    corpus = corpus_options(arguments)
    options = {
        "batch_size": arguments.batch_size,
        "segment_length": arguments.segment_length,
        "stop_words": _stop_words(arguments.stop_words),
        "numbers": arguments.numbers,
        "min_lag": arguments.min_lag,
        "stats": arguments.stats,
        "arguments": asdict(arguments),
        "corpus": describe_corpus(corpus),
        "seed": arguments.seed,
        "rank": state.process_index,
        "world_size": state.num_processes,
        "barrier": state.wait_for_everyone,
        "overwrite": arguments.overwrite,
        "resume": arguments.resume,
        "progress": state.is_main_process,
    }
    return OpenRun(model, tokenizer, corpus, folder, state, options)


def check_arguments(arguments: InferenceArguments) -> None:
    """Refuse, under the names of the options, numbers below 1 and options that the dataset type does not use."""
    for name in ("max_steps", "batch_size"):
        if getattr(arguments, name) < 1:
            raise ValueError(f"{name} must be at least 1, got {getattr(arguments, name)}")
    used = USED_OPTIONS[arguments.dataset_type]
    given = [name for name in CORPUS_NAMES if getattr(arguments, name) not in (None, [])]
    useless = [name for name in given if CORPUS_NAMES[name] not in used]
    if useless:
        raise ValueError(f"dataset_type {arguments.dataset_type!r} has no use for {', '.join(useless)}")
    if arguments.dataset_type in ("text", "tokens", "hub") and not arguments.dataset_path:
        raise ValueError(f"dataset_type {arguments.dataset_type!r} needs dataset_path")


def corpus_options(arguments: InferenceArguments) -> dict[str, Any]:
    """Give the arguments of `load_corpus`, apart from the tokenizer."""
    paths = arguments.dataset_path
    return {
        "dataset_type": arguments.dataset_type,
        "path": paths[0] if len(paths) == 1 else paths or None,
        "seq_length": arguments.seq_length,
        "max_documents": arguments.max_steps * arguments.batch_size,
        "max_chars": arguments.max_chars,
        "pieces_per_text": arguments.pieces_per_text,
        "split": arguments.dataset_split,
        "config_name": arguments.dataset_config,
        "text_column": arguments.text_column,
        "seed": arguments.seed,
        "needle": _needle_options(arguments),
    }


def describe_corpus(corpus: dict[str, Any]) -> dict[str, Any]:
    """Give the same for run.json, with the hash of a filler text instead of the text."""
    if corpus["needle"] is None:
        return corpus
    needle = asdict(corpus["needle"])
    if needle["filler_text"] is not None:
        needle["filler_text"] = "sha256:" + hashlib.sha256(needle["filler_text"].encode()).hexdigest()
    return {**corpus, "needle": needle}


def summarise(folder: Path, dataset_type: str, documents_wanted: int) -> None:
    """Print what the run holds."""
    run = read_run(folder)
    totals = run.meta["totals"]
    print(f"{folder}: {totals['documents']} documents, {totals['tokens']} tokens")
    if totals["documents"] < documents_wanted:
        limits = [name for name in ("max_chars", "pieces_per_text") if name in USED_OPTIONS[dataset_type]]
        hint = f"; more may come with a larger {' or '.join(limits)}" if limits else ""
        log.warning("the corpus has only %d of %d documents%s", totals["documents"], documents_wanted, hint)
    per_byte = totals["nats_per_byte"]
    print(f"loss {_number(totals['mean_loss'])} nats per token, {_number(per_byte)} nats per byte")
    for freezing, loss in zip(run.freezing, totals["mean_loss_frozen"], strict=True):
        print(f"loss {_number(loss)} nats per token with {_frozen(freezing)} frozen")
    if run.tokens["is_answer"].any():
        answers = run.tokens["is_answer"].to_numpy()
        print(f"loss {run.tokens['loss'][answers].mean():.4f} nats per answer token")
        for column, freezing in enumerate(run.freezing):
            loss = run.loss_frozen[answers, column].mean()
            print(f"loss {loss:.4f} nats per answer token with {_frozen(freezing)} frozen")
    means = zip(run.ttt_layers, run.plasticity.mean(0), strict=True)
    print("mean plasticity per layer " + ", ".join(f"{layer}: {mean:.3g}" for layer, mean in means))
    print(f"{totals['seconds']:.1f} s, {totals['tokens_per_second']:.0f} tokens per second")


def _default_name(arguments: InferenceArguments) -> str:
    return f"{Path(arguments.model).name}-{arguments.dataset_type}"


def _needle_options(arguments: InferenceArguments) -> NeedleOptions | None:
    given = {
        "depths": tuple(arguments.needle_depth) or None,
        "filler": arguments.needle_filler,
        "value_length": arguments.needle_value_length,
    }
    if arguments.needle_filler_text:
        given["filler_text"] = read_text(arguments.needle_filler_text)
    given = {name: value for name, value in given.items() if value is not None}
    return NeedleOptions(**given) if given else None


def _stop_words(name: str) -> str | Path:
    return name if name in bundled_stop_lists() or not Path(name).is_file() else Path(name)


def _frozen(freezing: dict[str, Any]) -> str:
    if freezing["name"] == "all":
        return "all layers"
    return f"layer{'s' if len(freezing['layers']) > 1 else ''} {freezing['name']}"


def _number(value: float | None) -> str:
    return "undefined" if value is None else f"{value:.4f}"


if __name__ == "__main__":
    run(main)
