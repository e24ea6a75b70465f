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


def write_card(repo_id: str, config: PreTrainedConfig, parameters: int, has_tokenizer: bool, facts: CardFacts) -> str:
    """Fill the template; ValueError when `facts.evaluation` lacks a number or one in the text is not measured."""
    name, is_ttt = repo_id.split("/")[-1], config.model_type == "ttt"
    training = re.sub(r"\n{3,}", "\n\n", facts.training or "").strip()
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
    )
    text = re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"
    given = [repo_id, facts.datasets, facts.base_model, facts.evaluation_data, facts.evaluation_split]
    own_words = text.replace(training, "") if training else text
    strange = unmeasured_numbers(own_words, [facts.evaluation, config.to_dict(), parameters, given])
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
    names = {name: "this model" if name == "model" else name for name in found["nats_per_byte"]}
    needles = found.get("needles", [])
    split = f" ({facts.evaluation_split})" if facts.evaluation_split else ""
    return {
        "data": facts.evaluation_data + split,
        "file": facts.evaluation_file,
        "tokens": f"{_take(found, 'tokens'):,}",
        "bytes": f"{_take(found, 'bytes'):,}",
        "length": _take(found, "arguments", "length"),
        "loss": f"{_take(found, 'loss_nats_per_token'):.3f}",
        "nats_per_byte": [(label, f"{_take(found, 'nats_per_byte', name):.4f}") for name, label in names.items()],
        "positions": [
            (f"{_take(row, 'from')} to {_take(row, 'to')}", f"{_take(row, 'loss'):.3f}")
            for row in found.get("loss_by_position", [])
        ],
        "documents": _take(needles[0], "documents") if needles else 0,
        "needles": [
            (row["value_digits"], row["distance"], f"{_take(row, 'exact'):.3f}", f"{_take(row, 'digits'):.3f}")
            for row in needles
        ],
    }


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
