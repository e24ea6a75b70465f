"""Estimators give a number per token, agreement is what it says, a needle document knows where its answer stood."""

import numpy as np
import pytest
import torch

from interp.captum_targets import LogitTarget
from interp.documents import Document
from interp.faithfulness import ESTIMATORS, agreement, knockout_effects, normalised_aucs
from interp.loading import load_tokenizer
from interp.needle import NeedleOptions, needle_documents
from interp.needle_question import needle_question
from interp.write_gates import span_gates
from tests.interp.strong_models import random_ids, strong_model

TARGET = LogitTarget(7, 5, [6, 7])


@pytest.fixture
def model(layer_type):
    return strong_model(layer_type)


@pytest.mark.parametrize("name", sorted(ESTIMATORS))
def test_every_estimator_gives_a_number_per_token(model, name):
    scores = ESTIMATORS[name](model, random_ids(1, 10)[0], TARGET)
    assert scores.shape == (10,) and scores.isfinite().all()
    assert scores[8:].abs().max() == 0 < scores[:8].abs().max()


def test_the_truth_is_a_model_without_the_write(model):
    ids = random_ids(1, 10)
    found = knockout_effects(model, ids[0], TARGET)
    with torch.no_grad():
        full, less = (TARGET.read(model(ids, ttt_lr_mult=m).logits[:, 7]) for m in (None, span_gates(10, [(2, 3)])))
    assert found[2].item() == pytest.approx((full - less).item(), abs=1e-10) and found[8:].abs().max() == 0


def test_agreement_compares_up_to_the_position():
    truth = torch.tensor([0.0, 3.0, 1.0, 2.0, 9.0])
    same = agreement(truth, truth, 3, [0])
    assert same.rank == same.linear == 1.0 and same.top == 1 and same.found and same.same_top
    other = agreement(-truth, truth, 3, [1])
    assert other.rank == -1.0 and other.top == 0 and not other.found and not other.same_top
    assert agreement(torch.zeros(5), truth, 3, [1]).rank == 0.0


def test_areas_are_in_units_of_all_and_no_writes(model):
    scores = {"order": torch.arange(10.0), "other": torch.rand(10)}
    found = normalised_aucs(model, random_ids(1, 10)[0], scores, TARGET, steps=4, random_orders=2)
    assert set(found) == {"order", "other", "random"} and len(found["random"]["deletion"]) == 2
    assert all(np.isfinite(found["order"][kind]) for kind in ("deletion", "insertion"))


@pytest.fixture(scope="module")
def tokenizer():
    return load_tokenizer("model_cards/ttt-linear-tiny")


def test_a_needle_document_tells_where_its_answer_stood(tokenizer):
    options = NeedleOptions((0.5,), "text", 4)
    document = next(needle_documents(tokenizer, seq_length=128, max_documents=1, options=options))
    question = needle_question(document, tokenizer)
    told = tokenizer.decode(question.input_ids[list(question.source)])
    assert told == tokenizer.decode(question.input_ids[list(question.answer)]) and len(told) == 4
    target = question.target(2)
    assert target.position == question.answer[2] - 1 and tokenizer.decode([target.target]) == told[2]
    assert len(target.contrast) == 15 and target.target not in target.contrast
    with pytest.raises(ValueError, match="has no answer"):
        needle_question(Document("plain", document.input_ids), tokenizer)
    with pytest.raises(ValueError, match="was not told before"):
        needle_question(Document("cut", document.input_ids[80:], document.answer_mask[80:]), tokenizer)
