"""What is wrong with a model card, found without a network."""

import math
import re
from collections.abc import Iterator
from typing import Any

import yaml
from _staging import ABSOLUTE_PATH
from huggingface_hub.repocard import REGEX_YAML_BLOCK
from huggingface_hub.utils import HFValidationError, validate_repo_id

# The identifiers that the Hub lists for `license`.
LICENSES = """
    apache-2.0 mit openrail bigscience-openrail-m creativeml-openrail-m bigscience-bloom-rail-1.0
    bigcode-openrail-m afl-3.0 artistic-2.0 bsl-1.0 bsd bsd-2-clause bsd-3-clause bsd-3-clause-clear c-uda cc cc0-1.0
    cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc-by-nc-2.0 cc-by-nc-3.0 cc-by-nc-4.0
    cc-by-nd-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0 cc-by-nc-sa-4.0 cdla-sharing-1.0
    cdla-permissive-1.0 cdla-permissive-2.0 wtfpl ecl-2.0 epl-1.0 epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 agpl-3.0 gfdl
    gpl gpl-2.0 gpl-3.0 lgpl lgpl-2.1 lgpl-3.0 isc intel-research lppl-1.3c ms-pl apple-ascl apple-amlr mpl-2.0 odc-by
    odbl openmdw-1.0 openrail++ osl-3.0 postgresql ofl-1.1 ncsa unlicense zlib pddl lgpl-lr deepfloyd-if-license
    fair-noncommercial-research-license llama2 llama3 llama3.1 llama3.2 llama3.3 llama4 grok2-community gemma unknown
    other
"""
REQUIRED = ("license", "library_name", "pipeline_tag", "tags")
# Metrics of which the evaluation holds exactly one number; others need only be somewhere in it.
METRICS = {"nats_per_byte": ("nats_per_byte", "model"), "nats_per_token": ("loss_nats_per_token",)}
CODE = re.compile(r"```.*?```|`[^`\n]*`", flags=re.DOTALL)
NUMBER = re.compile(r"(?<![\w.-])-?\d[\d,]*(?:\.\d+)?(?:e[+-]?\d+)?(?![\w-]*[A-Za-z])")
LEFT_OVER = (
    r"(?i:\[?more information needed\]?)",
    r"\{\{.*?\}\}",
    r"\{%.*?%\}",
    r"\b(?:TODO|TBD|FIXME|XXX)\b",
    r"<!--",
)


def lint_card(text: str, evaluation: dict[str, Any] | None = None) -> list[str]:
    """What the Hub would refuse or a reader stumble over, as sentences; none when the card is in order.

    With `evaluation` (what evaluate_checkpoint.py wrote) the metrics of the model-index must be there and be in it.
    """
    match = REGEX_YAML_BLOCK.match(text)
    if not match:
        return ["the card must begin with metadata between two lines of ---"]
    try:
        data = yaml.safe_load(match.group(2))
    except yaml.YAMLError as error:
        return [f"the metadata is not valid yaml: {' '.join(str(error).split())}"]
    if not isinstance(data, dict):
        return ["the metadata must be a mapping of yaml"]
    problems = [*_lint_fields(data), *_lint_model_index(data.get("model-index"), evaluation)]
    return [*problems, *_lint_text(text[match.end() :], match.group(2))]


def unmeasured_numbers(text: str, sources: Any) -> list[str]:
    """The numbers of a card, code and links apart, that no number in `sources` (nested values, texts) rounds to."""
    known = [*_numbers(sources)]
    prose = re.sub(r"\(?https?://\S+", " ", CODE.sub(" ", text))
    return [token for token in NUMBER.findall(prose) if not any(_rounds_to(value, token) for value in known)]


def _rounds_to(value: float, written: str) -> bool:
    digits = written.rstrip(",").replace(",", "")
    mantissa, _, exponent = digits.partition("e")
    half = 0.5 * 10.0 ** (int(exponent or 0) - len(mantissa.partition(".")[2])) if "." in mantissa else 0.0
    return abs(float(digits) - value) <= half * (1 + 1e-9)


def _lint_fields(data: dict[str, Any]) -> list[str]:
    problems = [f"{name} must be given" for name in REQUIRED if not data.get(name)]
    licence = data.get("license")
    if licence and licence not in LICENSES.split():
        problems.append(f"license must be an identifier of the Hub, as apache-2.0 or mit, got {licence!r}")
    if licence == "other" and not (data.get("license_name") and data.get("license_link")):
        problems.append("license other needs license_name and license_link")
    for name in ("tags", "datasets", "language"):
        values = data.get(name) or []
        values = [values] if isinstance(values, str) and name != "tags" else values
        if not isinstance(values, list) or not all(isinstance(value, str) and value for value in values):
            problems.append(f"{name} must be a list of words, got {values!r}")
        else:
            problems += [_UNFIT[name].format(value) for value in values if not _fits(name, value)]
    return problems


_UNFIT = {
    "language": "language must be a code, as en, or multilingual, got {!r}",
    "datasets": "datasets must hold ids of the Hub, as user/name, got {!r}",
}


def _fits(name: str, value: str) -> bool:
    if name == "language":
        return bool(re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|multilingual|code", value))
    if name == "datasets":
        try:
            validate_repo_id(value)
        except HFValidationError:
            return False
    return True


def _lint_model_index(index: Any, evaluation: dict[str, Any] | None) -> list[str]:
    if index is None:
        return ["model-index must be given, there are measurements"] if evaluation else []
    problems = []
    try:
        (entry,) = index
        if not (isinstance(entry["name"], str) and entry["name"] and entry["results"]):
            problems.append("model-index must hold a name and results")
        for result in entry["results"]:
            for part, key in (("task", "type"), ("dataset", "type"), ("dataset", "name")):
                value = result[part][key]
                if not (isinstance(value, str) and value):
                    problems.append(f"{part}.{key} of model-index must be a word, got {value!r}")
            for metric in result["metrics"]:
                problems += _lint_metric(metric["type"], metric["value"], evaluation)
    except (TypeError, KeyError, ValueError, AttributeError) as error:
        missing = f"; {error.args[0]} is missing" if isinstance(error, KeyError) else ""
        problems.append(
            "model-index must be one entry of name and results, each with task.type, dataset.type, dataset.name and "
            f"metrics of type and value{missing}"
        )
    return problems


def _lint_metric(kind: Any, value: Any, evaluation: dict[str, Any] | None) -> list[str]:
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        return [f"metric {kind} of model-index must be a finite number, got {value!r}"]
    if not evaluation:
        return []
    measured: Any = evaluation
    for key in METRICS.get(kind, ()):
        measured = measured.get(key) if isinstance(measured, dict) else None
    if unmeasured_numbers(str(value), evaluation if measured is None else measured):
        return [f"metric {kind} of model-index is {value}, which is not what the evaluation holds"]
    return []


def _lint_text(body: str, metadata: str) -> list[str]:
    if not body.strip():
        return ["the card says nothing below its metadata"]
    prose = f"{CODE.sub(' ', body)}\n{metadata}"
    found = [re.search(pattern, prose) for pattern in LEFT_OVER]
    problems = [f"a placeholder or comment of a template is left: {match.group()}" for match in found if match]
    path = ABSOLUTE_PATH.search(f"{body}\n{metadata}")
    return [*problems, f"a path of one machine is named: {path.group()}"] if path else problems


def _numbers(value: Any) -> Iterator[float]:
    if isinstance(value, dict):
        for key, item in value.items():
            yield from _numbers(key)
            yield from _numbers(item)
    elif isinstance(value, list | tuple):
        for item in value:
            yield from _numbers(item)
    elif isinstance(value, int | float):
        yield float(value)
    elif isinstance(value, str):
        yield from (float(number) for number in re.findall(r"\d+(?:\.\d+)?", value))
