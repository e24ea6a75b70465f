"""A card says what was measured and nothing else, and what is wrong with one is found without a network."""

import json
import re
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import LlamaConfig

from modeling_ttt import TTTConfig, TTTForCausalLM

ROOT = Path(__file__).parents[2]
CARDS = sorted((ROOT / "model_cards").iterdir())
EVALUATION = {
    "arguments": {"length": 777},
    "tokens": 31337,
    "bytes": 98765,
    "loss_nats_per_token": 4.16449,
    "nats_per_byte": {"model": 1.22367, "trigram": 1.24008},
    "loss_by_position": [{"from": 1, "to": 15, "loss": 4.59565}, {"from": 16, "to": 776, "loss": 4.31497}],
    "needles": [
        {"value_digits": 1, "distance": 32, "documents": 61, "exact": 0.98361, "digits": 0.98361},
        {"value_digits": 8, "distance": 512, "documents": 61, "exact": 0.03279, "digits": 0.41803},
    ],
}
CONTEXT = {"windows": 19, "tokens": 48}
FULL = {
    **EVALUATION,
    "parameters": 4321,
    "loss_by_context": [
        {"length": 97, "loss": 4.20124, "difference": -0.05312, "error": 0.00371, **CONTEXT},
        {"length": 776, "loss": 4.25436, "difference": 0.0, "error": 0.0, **CONTEXT},
    ],
    "test": {
        "tokens": 31999,
        "bytes": 99123,
        "loss_nats_per_token": 4.25049,
        "nats_per_byte": {"model": 1.31367, "trigram": 1.33008},
        "loss_by_position": [{"from": 1, "to": 15, "loss": 4.71565}, {"from": 16, "to": 776, "loss": 4.41497}],
        "loss_by_context": [
            {"length": 97, "loss": 4.30124, "difference": 0.01312, "error": None, **CONTEXT},
            {"length": 776, "loss": 4.28812, "difference": 0.0, "error": None, **CONTEXT},
        ],
    },
    "needles_by_depth": [
        {"length": length, "depth": depth, "value_digits": 4, "documents": 17, "exact": share, "digits": 0.875}
        for length, depth, share in ((1024, 0.0, 0.5), (1024, 1.0, 1.0), (2048, 0.0, 0.25), (2048, 1.0, 0.75))
    ],
}
SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}


@pytest.fixture(autouse=True)
def scripts_on_path(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "scripts")


def written(config=None, has_tokenizer=True, evaluation=EVALUATION, **facts):
    """A new card, everything given unless said otherwise."""
    from _card import CardFacts, write_card

    config = config or TTTConfig(vocab_size=301, **SIZES)
    told = {"license": "apache-2.0", "language": ["en"], "datasets": ["someone/books-2"], **facts}
    return write_card("someone/ttt-1b", config, 4321, has_tokenizer, CardFacts(evaluation=evaluation, **told))


def test_a_new_card_is_in_order_and_the_client_of_the_hub_reads_its_metrics_back():
    from _card_lint import lint_card

    text = written(evaluation_data="two novels", evaluation_split="validation")
    assert lint_card(text, EVALUATION) == []
    data = ModelCard(text).data
    assert (data.license, data.datasets, data.library_name) == ("apache-2.0", ["someone/books-2"], "transformers")
    metrics = {result.metric_name: (result.metric_type, result.metric_value) for result in data.eval_results}
    assert metrics == {
        "nats per byte": ("nats_per_byte", 1.2237),
        "nats per token": ("nats_per_token", 4.1645),
        "needles of 8 digits, 512 tokens away, answered wholly": ("accuracy", 0.0328),
    }
    assert {(r.dataset_name, r.dataset_split) for r in data.eval_results} == {("two novels", "validation")}


def test_every_measured_number_is_in_the_text_and_every_number_of_the_text_is_measured():
    from _card_lint import unmeasured_numbers

    text = written()
    for row in (
        "31,337 tokens, 98,765 bytes, read in windows of 777 tokens.\nLoss per token is 4.164 nats.",
        "| this model | 1.2237 |",
        "| trigram | 1.2401 |",
        "| 16 to 776 | 4.315 |",
        "| 8 | 512 | 0.033 | 0.418 |",
        "over 61 documents",
        "4,321 parameters",
        "| vocabulary | 301 |",
    ):
        assert row in text
    sources = [EVALUATION, 4321, TTTConfig(vocab_size=301, **SIZES).to_dict(), "someone/books-2"]
    assert unmeasured_numbers(text, sources) == []
    for number in ("1.2238", "1,234", "0.5 %", "-3", "1e-7"):
        assert unmeasured_numbers(f"{text}\nIt costs {number}.", sources) == [number.split()[0]]


def test_both_texts_depths_pictures_and_other_checkpoints_are_shown():
    other = {**FULL, "parameters": 5000, "nats_per_byte": {"model": 1.5}, "needles": []}
    facts = {"evaluation_data": "novels", "evaluation_split": "validation", "others": {"llama": other}}
    text = written(evaluation=FULL, pictures=("curve.png", "evaluation.png"), remarks="It beats 3 others.", **facts)
    for row in (
        "| tokens of the window | novels (validation) | novels (test) |\n|---|---|---|\n| 1 to 15 | 4.596 | 4.716 |",
        "| trigram | 1.3301 |",
        "the last 48 tokens of 19\nwindows, nats per token",
        "| 97 | 4.201 (-0.053 ± 0.004) | 4.301 |\n| 776 | 4.254 | 4.288 |",
        "values of 4 digits answered wholly right, over 17\ndocuments each",
        "| tokens of the document | 0.0 | 1.0 |\n|---|---|---|\n| 1024 | 0.500 | 1.000 |\n| 2048 | 0.250 | 0.750 |",
        "| **ttt-1b** | 4,321 | 1.2237 | 1.3137 | 0.033 |\n| llama | 5,000 | 1.5000 | 1.3137 | not measured |",
        "(curve.png)",
        "(evaluation.png)",
        "It beats 3 others.",
    ):
        assert row in text, row
    assert "png" not in written(evaluation=FULL) and "Beside other" not in written(evaluation=FULL)


def test_a_card_is_written_into_a_folder(tmp_path, capsys, monkeypatch):
    from write_card import main

    torch.manual_seed(0)
    monkeypatch.chdir(tmp_path)  # the lint refuses paths of one machine
    folder = Path("models") / "ttt-tiny"
    TTTForCausalLM(TTTConfig(vocab_size=301, **SIZES)).save_pretrained(folder)
    with pytest.raises(ValueError, match="the card would not be in order|metrics|evaluation"):
        (folder / "evaluation.json").write_text("[]")
        main(["--model", str(folder), "--license", "mit"])
    assert not (folder / "README.md").exists()
    (folder / "evaluation.json").write_text(json.dumps(FULL))
    with pytest.raises(ValueError, match="compare must be NAME=evaluation.json of a file that exists"):
        main(["--model", str(folder), "--license", "mit", "--compare", "x=nowhere.json"])
    main(["--model", str(folder), "--license", "mit", "--compare", f"twin={folder / 'evaluation.json'}"])
    text = (folder / "README.md").read_text()
    assert "import modeling_ttt  # registers the classes" in text and "trust_remote_code" not in text
    assert f'from_pretrained("{folder}")' in text and "| twin | 4,321 |" in text
    assert "wrote" in capsys.readouterr().out
    with pytest.raises(ValueError, match="model must be the folder of a checkpoint"):
        main(["--model", str(tmp_path), "--license", "mit"])


def test_a_template_with_a_number_of_its_own_is_refused(monkeypatch, tmp_path):
    import _card

    template = tmp_path / "template.md"
    template.write_text(_card.TEMPLATE.read_text().replace("## Limits", "It beats 93.5 % of all models.\n\n## Limits"))
    monkeypatch.setattr(_card, "TEMPLATE", template)
    with pytest.raises(ValueError, match=r"numbers that are not in its sources: 93\.5"):
        written()


def test_the_text_about_training_stands_in_the_card_with_its_own_numbers():
    assert "## Training\n\nIt took 1640 steps.\n\nThen 3 more.\n" in written(
        training="It took 1640 steps.\n\n\n\nThen 3 more.\n"
    )
    assert "## Training" not in written()


def test_a_card_says_what_the_repository_lacks_and_what_is_frozen():
    config = TTTConfig(vocab_size=301, frozen_layers=[1], ttt_layer_type="mlp", **SIZES)
    text = written(config, has_tokenizer=False, evaluation=None)
    assert "There is no tokenizer in this repository." in text and "AutoTokenizer" not in text
    assert "Nothing was measured." in text and "model-index" not in text
    assert "`frozen_layers=[1]`" in text and "TTT-MLP" in text
    assert "frozen" not in written() and "TTT-Linear" in written()


def test_the_card_of_a_control_asks_nobody_to_trust_code():
    text = written(LlamaConfig(vocab_size=301, **SIZES))
    assert "type `llama`" in text
    assert not re.search("trust_remote_code|plasticity|TTT", text)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"tokens": None}, "tokens of the evaluation must be a finite number"),
        ({"nats_per_byte": {"unigram": 1.0}}, "must hold nats_per_byte.model"),
        ({"nats_per_byte": {"model": float("nan")}}, "nats_per_byte.model of the evaluation must be a finite number"),
        ({"needles": [{"value_digits": 1, "distance": 3}]}, "must hold exact"),
        ({"arguments": {}}, "must hold arguments.length"),
    ],
)
def test_an_evaluation_without_its_numbers_is_refused(change, message):
    with pytest.raises(ValueError, match=message):
        written(evaluation={**EVALUATION, **change})


@pytest.mark.parametrize(
    ("old", "new", "problem"),
    [
        ("license: apache-2.0\n", "", "license must be given"),
        ("apache-2.0", "apache2", "license must be an identifier of the Hub, as apache-2.0 or mit, got 'apache2'"),
        ("apache-2.0", "other", "license other needs license_name and license_link"),
        ("- en\n", "- english\n", "language must be a code, as en, or multilingual, got 'english'"),
        ("- ttt\n", "- 7\n", "tags must be a list of words"),
        ("someone/books-2", "some one/books", "datasets must hold ids of the Hub, as user/name, got 'some one/books'"),
        ("pipeline_tag: text-generation\n", "", "pipeline_tag must be given"),
        ("value: 1.2237", "value: 1.2401", "metric nats_per_byte of model-index is 1.2401, which is not what the"),
        ("value: 0.0328", "value: high", "metric accuracy of model-index must be a finite number, got 'high'"),
        ("      type: text\n", "", "model-index must be one entry .* type is missing"),
        ("model-index:", "results:", "model-index must be given, there are measurements"),
        ("license: apache-2.0", "license: [apache-2.0", "the metadata is not valid yaml"),
        ("---\ndatasets", "datasets", "the card must begin with metadata"),
        ("## Limits", "[More Information Needed]", r"a placeholder .* is left: \[More Information Needed\]"),
        ("## Limits", "{{ limits }}", r"a placeholder .* is left: \{\{ limits \}\}"),
        ("## Limits", "<!-- Provide a summary -->", "a placeholder or comment of a template is left: <!--"),
        ("## Limits", "TODO", "a placeholder or comment of a template is left: TODO"),
        ("## Limits", "from /home/me/model", "a path of one machine is named: /home/me/model"),
        ("someone/ttt-1b", r"C:\models", r"a path of one machine is named: C:\\models"),
    ],
)
def test_what_is_wrong_with_a_card_is_named(old, new, problem):
    from _card_lint import lint_card

    text = written()
    assert old in text
    problems = lint_card(text.replace(old, new), EVALUATION)
    assert problems and re.search(problem, problems[0])


def test_code_may_hold_what_would_be_a_placeholder_in_prose():
    from _card_lint import lint_card

    text = written().replace("## Limits", "`{{ x }}`\n\n```\n{% if x %} <!-- --> TODO\n```\n## Limits")
    assert lint_card(text, EVALUATION) == []


def test_metadata_alone_is_no_card():
    from _card_lint import lint_card

    assert lint_card(written().split("\n# ")[0] + "\n") == ["the card says nothing below its metadata"]


@pytest.mark.parametrize("folder", CARDS, ids=[folder.name for folder in CARDS])
def test_the_cards_of_released_checkpoints_are_in_order(folder):
    from _card_lint import lint_card

    path = folder / "evaluation.json"
    evaluation = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else None
    assert lint_card((folder / "README.md").read_text(encoding="utf-8"), evaluation) == []
