"""The card of a model, written from a template and from what was measured."""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
from _card_lint import unmeasured_numbers
from huggingface_hub import EvalResult, ModelCardData
from transformers import PreTrainedConfig

TEMPLATE = Path(__file__).with_name("card_template.md")
FROZEN = ("frozen_layers", "frozen_heads", "frozen_from")


@dataclass
class CardFacts:
    """What a card says beside what can be read off the model: all optional but the license."""

    license: str
    language: list[str] = field(default_factory=list)
    datasets: list[str] = field(default_factory=list)
    base_model: str | None = None
    training: str | None = None
    evaluation: dict[str, Any] | None = None
    evaluation_file: str = "evaluation.json"
    evaluation_data: str = "held-out text"
    evaluation_split: str | None = None
    test_split: str = "test"
    others: dict[str, dict[str, Any]] = field(default_factory=dict)
    remarks: str | None = None
    pictures: tuple[str, ...] = ()


def write_card(
    repo_id: str,
    config: PreTrainedConfig,
    parameters: int,
    has_tokenizer: bool,
    facts: CardFacts,
    *,
    local: bool = False,
) -> str:
    """Fill the template; ValueError when `facts.evaluation` lacks a number or one in the text is not measured.

    `local` says that `repo_id` is a folder without code, which needs the package.
    """
    name, is_ttt = repo_id.split("/")[-1], config.model_type == "ttt"
    training, remarks = (re.sub(r"\n{3,}", "\n\n", told or "").strip() for told in (facts.training, facts.remarks))
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    text = environment.from_string(TEMPLATE.read_text(encoding="utf-8")).render(
        metadata=_metadata(name, is_ttt, facts).to_yaml(),
        name=name,
        repo_id=repo_id,
        model_type=config.model_type,
        parameters=f"{parameters:,}",
        tokenizer=has_tokenizer,
        ttt=_inner_net(config) if is_ttt else None,
        frozen=", ".join(f"`{key}={value}`" for key, value in frozen_settings(config).items()),
        shape=_shape(config),
        training=training,
        measured=_measured(facts) if facts.evaluation else None,
        others=_others(name, parameters, facts) if facts.evaluation and facts.others else None,
        remarks=remarks,
        curve="curve.png" in facts.pictures,
        picture="evaluation.png" in facts.pictures,
        local=local,
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    given = [
        repo_id,
        facts.datasets,
        facts.base_model,
        facts.evaluation_data,
        facts.evaluation_split,
        facts.test_split,
    ]
    own_words = text
    for told in (training, remarks):
        own_words = own_words.replace(told, "") if told else own_words
    strange = unmeasured_numbers(own_words, [facts.evaluation, facts.others, config.to_dict(), parameters, given])
    if strange:
        raise ValueError(f"the card would hold numbers that are not in its sources: {', '.join(strange)}")
    return text


def frozen_settings(config: PreTrainedConfig) -> dict[str, Any]:
    """The settings of a configuration that keep inner weights from learning."""
    return {name: getattr(config, name) for name in FROZEN if getattr(config, name, None) not in (None, [], {})}


def read_evaluation(path: str | Path) -> dict[str, Any]:
    """Read what evaluate_checkpoint.py wrote; ValueError when it is no json object."""
    try:
        found = json.loads(Path(path).read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"evaluation {str(path)!r} is not valid json: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f"evaluation {str(path)!r} must be a json object")
    return found


def _metadata(name: str, is_ttt: bool, facts: CardFacts) -> ModelCardData:
    results = _eval_results(facts)
    return ModelCardData(
        license=facts.license,
        language=facts.language or None,
        datasets=facts.datasets or None,
        base_model=facts.base_model,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["ttt", "test-time-training", "plasticity"] if is_ttt else ["control"],
        model_name=name if results else None,
        eval_results=results or None,
    )


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    if not facts.evaluation:
        return []
    where = {
        "task_type": "text-generation",
        "task_name": "Language modelling",
        "dataset_type": "text",
        "dataset_name": facts.evaluation_data,
        "dataset_split": facts.evaluation_split,
    }
    found = facts.evaluation
    values = [
        ("nats_per_byte", "nats per byte", _take(found, "nats_per_byte", "model")),
        ("nats_per_token", "nats per token", _take(found, "loss_nats_per_token")),
    ]
    # The hardest of them: the card's table holds all.
    longest = max((_take(row, "value_digits") for row in found.get("needles", [])), default=0)
    for row in found.get("needles", []):
        if row["value_digits"] == longest:
            label = f"needles of {longest} digits, {_take(row, 'distance')} tokens away, answered wholly"
            values.append(("accuracy", label, _take(row, "exact")))
    return [
        EvalResult(metric_type=kind, metric_name=label, metric_value=round(value, 4), **where)
        for kind, label, value in values
    ]


def _inner_net(config: PreTrainedConfig) -> dict[str, str]:
    if config.ttt_layer_type == "mlp":
        return {"kind": "TTT-MLP", "inner_net": "a small two-layer network"}
    return {"kind": "TTT-Linear", "inner_net": "a weight matrix"}


def _shape(config: PreTrainedConfig) -> list[tuple[str, Any]]:
    labels = {
        "num_hidden_layers": "layers",
        "hidden_size": "width",
        "num_attention_heads": "heads",
        "intermediate_size": "feed-forward width",
        "vocab_size": "vocabulary",
        "mini_batch_size": "tokens per mini-batch",
        "ttt_base_lr": "base learning rate of the inner loop",
        "dtype": "stored as",
    }
    shape = [(label, getattr(config, key, None)) for key, label in labels.items()]
    return [(label, str(value).removeprefix("torch.")) for label, value in shape if value is not None]


def _measured(facts: CardFacts) -> dict[str, Any]:
    found = facts.evaluation or {}
    needles, depths = found.get("needles", []), found.get("needles_by_depth", [])
    texts = _texts(found, facts)
    positions = [part.get("loss_by_position", []) for part in texts.values()]
    contexts = [part.get("loss_by_context", []) for part in texts.values()]
    first = [rows[0] for rows in contexts if rows]
    columns = sorted({_take(row, "depth") for row in depths})
    return {
        "file": facts.evaluation_file,
        "length": _take(found, "arguments", "length"),
        "texts": [_text(data, part) for data, part in texts.items()],
        "positions": [
            (f"{_take(rows[0], 'from')} to {_take(rows[0], 'to')}", *(f"{_take(row, 'loss'):.3f}" for row in rows))
            for rows in zip(*positions, strict=False)
        ],
        "context_tokens": " and ".join(dict.fromkeys(str(_take(row, "tokens")) for row in first)),
        "context_windows": " and ".join(dict.fromkeys(str(_take(row, "windows")) for row in first)),
        "contexts": [(_take(rows[0], "length"), *map(_context, rows)) for rows in zip(*contexts, strict=False)],
        "documents": _take(needles[0], "documents") if needles else 0,
        "needles": [
            (row["value_digits"], row["distance"], f"{_take(row, 'exact'):.3f}", f"{_take(row, 'digits'):.3f}")
            for row in needles
        ],
        "depth_digits": _take(depths[0], "value_digits") if depths else 0,
        "depth_documents": _take(depths[0], "documents") if depths else 0,
        "depth_columns": columns,
        "depths": [
            (length, *(f"{_take(row, 'exact'):.3f}" for row in depths if row["length"] == length))
            for length in sorted({_take(row, "length") for row in depths})
        ],
    }


def _texts(found: dict[str, Any], facts: CardFacts) -> dict[str, dict[str, Any]]:
    """What was read, by its name in the card, with what it cost."""
    split = f" ({facts.evaluation_split})" if facts.evaluation_split else ""
    texts = {facts.evaluation_data + split: found}
    return texts | ({f"{facts.evaluation_data} ({facts.test_split})": found["test"]} if "test" in found else {})


def _text(data: str, found: dict[str, Any]) -> dict[str, Any]:
    names = {name: "this model" if name == "model" else name for name in found["nats_per_byte"]}
    return {
        "data": data,
        "tokens": f"{_take(found, 'tokens'):,}",
        "bytes": f"{_take(found, 'bytes'):,}",
        "loss": f"{_take(found, 'loss_nats_per_token'):.3f}",
        "nats_per_byte": [(label, f"{_take(found, 'nats_per_byte', name):.4f}") for name, label in names.items()],
    }


def _context(row: dict[str, Any]) -> str:
    loss, error = f"{_take(row, 'loss'):.3f}", row.get("error")
    if not error:
        return loss
    return f"{loss} ({_take(row, 'difference'):.3f} ± {_take(row, 'error'):.3f})"


def _others(name: str, parameters: int, facts: CardFacts) -> dict[str, Any]:
    """This checkpoint and others in one table: nats per byte of each text, and the hardest needles of this one."""
    own = facts.evaluation or {}
    hardest = max(own.get("needles", []), key=lambda row: (row["value_digits"], row["distance"]), default=None)
    place = (hardest["value_digits"], hardest["distance"]) if hardest else None
    rows = []
    for label, found in {f"**{name}**": own, **facts.others}.items():
        same = [row for row in found.get("needles", []) if (row["value_digits"], row["distance"]) == place]
        size = parameters if found is own else _take(found, "parameters")
        costs = [f"{_take(part, 'nats_per_byte', 'model'):.4f}" for part in _texts(found, facts).values()]
        rows.append((label, f"{size:,}", *costs, f"{_take(same[0], 'exact'):.3f}" if same else "not measured"))
    needle = f"needles of {place[0]} digits, {place[1]} tokens away" if place else "needles"
    return {"needle": needle, "rows": rows}


def _take(found: dict[str, Any], *keys: str) -> Any:
    """A number of the measurements; ValueError naming it when it is absent or not finite."""
    value: Any = found
    for key in keys:
        if not isinstance(value, dict) or key not in value:
            raise ValueError(f"the evaluation must hold {'.'.join(keys)}; evaluate_checkpoint.py writes it")
        value = value[key]
    if not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(f"{'.'.join(keys)} of the evaluation must be a finite number, got {value!r}")
    return value
