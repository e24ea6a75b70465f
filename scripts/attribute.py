"""Ask a model about a text and get the writes that carried the answer: table, figures and the text in colour.

    python scripts/attribute.py --model model_cards/ttt-linear-tiny                                # a needle document
    python scripts/attribute.py --model model_cards/ttt-mlp-tiny --needle_length 4096 --needle_digit 2
    python scripts/attribute.py --model model_cards/ttt-linear-tiny --text my_book.txt --question " The name was"
    python scripts/attribute.py --model model_cards/ttt-linear-tiny --text notes.txt --question " Value=" \\
        --answer 7 --contrast 1 2 3

Leaves writes.csv (a row per token), writes_by_head.csv, parts.csv (the writes and everything else: they sum to the
target), knockouts.csv, top_writes.png, write_map.png and .csv, attribution.html and attribution.json in
EXP_DIR/EXP_NAME.
"""

import logging
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from _shared import option, parse, prepare, run, run_folder

from interp.ablation import write_knockout
from interp.attribution import block_groups, direct_logit_attribution, pooled_write_map
from interp.attribution_data import AttributedText, attributed_text
from interp.attribution_page import write_attribution_page
from interp.attribution_plots import plot_top_writes, plot_write_map
from interp.captum_targets import LogitTarget
from interp.files import read_text, to_json, write_text
from interp.inner_reads import GELU_RULES, INTERACTIONS
from interp.loading import DTYPES, load
from interp.needle import NeedleOptions, needle_documents
from interp.needle_question import needle_question
from interp.plots import save_figure
from interp.records import record_writes

log = logging.getLogger(__name__)

MAP_BLOCKS = 32


@dataclass
class AttributeArguments:
    """Tell which writes of a text carried the answer to a question."""

    model: str = option(help="folder, Hub id or JAX checkpoint of a TTT model")
    tokenizer_name: str | None = option(None, "folder or Hub id of the tokenizer, if not that of the model")
    revision: str | None = option(None, "branch, tag or commit of the model on the Hub")
    trust_remote_code: bool = option(False, "run model code that comes with the checkpoint")
    dtype: str = option("float32", f"dtype of the parameters, one of {', '.join(DTYPES)}")
    device: str | None = option(None, "torch device (default: cpu)")

    text: str | None = option(None, "UTF-8 file with the text; without it a needle document is made")
    question: str = option("", "text that is read behind it; its last token is where the answer is predicted")
    answer: str | None = option(None, "text whose first token is the answer (default: the most likely token)")
    contrast: list[str] = option([], "texts whose first tokens' mean logit is taken off (default: the 10 next likely)")
    seq_length: int = option(2048, "most tokens of the text; its end is kept")

    needle_length: int = option(1024, "tokens of the needle document")
    needle_depth: float = option(0.25, "share of the filler in front of the definition, 0 to 1")
    needle_value_length: int = option(4, "hexadecimal digits of the value, 1 to 8")
    needle_digit: int = option(0, "which digit is asked for")
    seed: int = option(0, "seed of the needle document")

    gelu_rule: str = option("rescale", f"convention for TTT-MLP, one of {', '.join(GELU_RULES)}")
    interaction: str = option("shapley", f"convention for TTT-MLP, one of {', '.join(INTERACTIONS)}")
    knockouts: int = option(10, "largest writes to knock out, for comparison; 0 for none")
    exp_dir: str = option("results", "folder of all results")
    exp_name: str | None = option(None, "name of this folder (default: attribution- and the model)")
    overwrite: bool = option(False, "replace the files of an earlier run of that name")


@dataclass(frozen=True)
class Asked:
    """A text with a question: ids [T], the target, what it is in words, and the columns that told the answer."""

    ids: torch.Tensor
    target: LogitTarget
    words: str
    source: tuple[int, ...] = ()


def main(argv: list[str] | None = None) -> None:
    """Attribute, write the files, print the largest writes."""
    arguments = parse(AttributeArguments, argv)
    prepare(arguments.seed)
    folder = _folder(arguments)
    model, tokenizer = load(
        arguments.model,
        tokenizer=arguments.tokenizer_name,
        revision=arguments.revision,
        trust_remote_code=arguments.trust_remote_code,
        dtype=arguments.dtype,
        device=arguments.device,
    )
    asked = _from_text(arguments, model, tokenizer) if arguments.text else _from_needle(arguments, model, tokenizer)
    started = time.perf_counter()
    found = direct_logit_attribution(
        model,
        asked.ids.to(model.device),
        asked.target,
        gelu_rule=arguments.gelu_rule,
        interaction=arguments.interaction,
        progress=True,
    )
    seconds = time.perf_counter() - started
    texts = [tokenizer.decode([token]) for token in asked.ids.tolist()]
    data = attributed_text(found, texts, asked.words, marked=asked.source)
    folder.mkdir(parents=True, exist_ok=True)
    tables = {"writes": data.to_pandas(), "writes_by_head": found.to_pandas(), "parts": found.summary()}
    if arguments.knockouts:
        tables["knockouts"] = _knockouts(model, asked, data, arguments.knockouts)
    else:  # one of an earlier run would be taken for this one's
        (folder / "knockouts.csv").unlink(missing_ok=True)
    for name, table in tables.items():
        write_text(folder / f"{name}.csv", table.to_csv(index=False))
    _draw(model, asked, data, folder)
    write_attribution_page(data, folder / "attribution.html", tables["parts"])
    about = {
        "arguments": asdict(arguments),
        "question": asked.words,
        "tokens": len(asked.ids),
        "value": data.value,
        "completeness_error": float(found.completeness_error[0]),
        "seconds": seconds,
    }
    write_text(folder / "attribution.json", to_json(about))
    print(summarise(data, tables, about))
    print(f"files in {folder}")


def summarise(data: AttributedText, tables: dict[str, pd.DataFrame], about: dict[str, Any]) -> str:
    """What is printed: the target, its parts, the largest writes."""
    lines = [
        f"{data.question} = {data.value:.4g} at token {data.position}; the parts sum to it up to "
        f"{abs(about['completeness_error']):.1e} ({about['seconds']:.1f} s for {about['tokens']:,} tokens)",
        ", ".join(f"{row.part} {row.contribution:+.3g}" for row in tables["parts"].itertuples()),
    ]
    effects = {} if "knockouts" not in tables else dict(tables["knockouts"][["column", "effect"]].to_numpy())
    for row in data.top(10).itertuples():
        effect = f", knocked out {-effects[row.column]:+.3g}" if row.column in effects else ""
        mark = "  <- told the answer" if row.column in data.marked else ""
        lines.append(f"{row.column:>7} {row.token!r:14} {row.contribution:+.3g}{effect}{mark}")
    return "\n".join(lines)


def _folder(arguments: AttributeArguments) -> Path:
    name = arguments.exp_name or f"attribution-{Path(arguments.model).name}"
    folder = run_folder(arguments.exp_dir, name)
    if folder.exists() and any(folder.iterdir()) and not arguments.overwrite:
        raise ValueError(f"{str(folder)!r} is there already: pass --overwrite or another --exp_name")
    if arguments.seq_length < 1:
        raise ValueError(f"seq_length must be at least 1, got {arguments.seq_length}")
    if arguments.knockouts < 0:
        raise ValueError(f"knockouts must not be negative, got {arguments.knockouts}")
    return folder


def _from_needle(arguments: AttributeArguments, model: Any, tokenizer: Any) -> Asked:
    if arguments.question or arguments.answer or arguments.contrast:
        raise ValueError("question, answer and contrast go with --text; a needle document has its own")
    options = NeedleOptions((arguments.needle_depth,), "text", arguments.needle_value_length)
    document = next(
        needle_documents(
            tokenizer, seq_length=arguments.needle_length, max_documents=1, seed=arguments.seed, options=options
        )
    )
    question = needle_question(document, tokenizer)
    count = len(question.answer)
    if not 0 <= arguments.needle_digit < count:
        raise ValueError(f"needle_digit must be in [0, {count}), got {arguments.needle_digit}")
    if not all(question.answered(model)):
        log.warning("the model does not answer this document")
    target = question.target(arguments.needle_digit)
    words = f"logit of {tokenizer.decode([target.target])!r} less the mean of the other digits"
    return Asked(question.input_ids, target, words, (question.source[arguments.needle_digit],))


def _from_text(arguments: AttributeArguments, model: Any, tokenizer: Any) -> Asked:
    ids = tokenizer(read_text(arguments.text) + arguments.question, return_tensors="pt", verbose=False)["input_ids"][0]
    if len(ids) > arguments.seq_length:
        log.warning("the last %d of %d tokens are read", arguments.seq_length, len(ids))
        ids = ids[-arguments.seq_length :]
    if len(ids) == 0:
        raise ValueError(f"text {arguments.text!r} has no token")
    with torch.no_grad():
        likely = model(ids[None].to(model.device), logits_to_keep=1).logits[0, -1].topk(11).indices.tolist()
    answer = likely[0] if arguments.answer is None else _first_token(tokenizer, "answer", arguments.answer)
    others = [_first_token(tokenizer, "contrast", text) for text in arguments.contrast]
    named = ", ".join(map(repr, arguments.contrast)) if others else "the 10 next likely tokens"
    others = others or [token for token in likely if token != answer][:10]
    words = f"logit of {tokenizer.decode([answer])!r} less the mean of {named}"
    return Asked(ids, LogitTarget(len(ids) - 1, answer, others), words)


def _first_token(tokenizer: Any, name: str, text: str) -> int:
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{name} must have a token, got {text!r}")
    return ids[0]


def _knockouts(model: Any, asked: Asked, data: AttributedText, count: int) -> pd.DataFrame:
    """What the target loses without each of the largest writes, the model run again."""
    top = data.top(count)
    top = top[top["column"] <= data.position]
    spans = [(column, column + 1) for column in top["column"].astype(int)]
    effects = write_knockout(model, asked.ids.to(model.device), spans, target=asked.target).total
    return top[["column", "token", "contribution"]].assign(effect=effects.double().numpy())


def _draw(model: Any, asked: Asked, data: AttributedText, folder: Path) -> None:
    """The writes along the text, and the map of the layer that matters most."""
    save_figure(plot_top_writes(data)[0], folder / "top_writes.png")
    layer = data.layers[int(abs(data.by_layer).sum(0).argmax())]
    records = record_writes(model, asked.ids.to(model.device), layers=[layer])
    groups = block_groups(len(asked.ids), MAP_BLOCKS)
    ends = groups.bincount().cumsum(0).tolist()
    names = [f"{first}-{end - 1}" for first, end in zip([0, *ends], ends, strict=False)]
    pooled = pooled_write_map(records, layer, groups, read_groups=groups, names=names, read_names=names)
    save_figure(plot_write_map(pooled)[0], folder / "write_map.png")
    write_text(folder / "write_map.csv", pooled.to_pandas().to_csv(index=False))


if __name__ == "__main__":
    run(main)
