import numpy as np
import pytest

from interp.controls import CONTROLS, PERIOD, control_documents, sample_documents
from interp.documents import Document

BOS = 0


def documents(number=4, length=300):
    rng = np.random.default_rng(0)
    bodies = [rng.integers(1, 50, length - 1) + 50 * i for i in range(number)]
    return [Document(f"d{i}", np.concatenate([[BOS], body])) for i, body in enumerate(bodies)]


def make(kind, length=200, **options):
    return control_documents(kind, documents(), length=length, bos=BOS, **options)


@pytest.mark.parametrize("kind", CONTROLS)
def test_every_control_has_the_length_asked_for_and_keeps_bos_in_front(kind):
    made, context = make(kind)
    assert len(made) == 4 and context == (200 if kind == "carried" else 0)
    for document in made:
        assert len(document.input_ids) == 200 + context
        assert document.input_ids[0] == BOS and (document.input_ids == BOS).sum() == 1 + (context > 0)


def test_controls_take_away_one_thing_each():
    whole = [document.input_ids for document in documents()]
    shuffled = make("shuffled")[0]
    assert sorted(shuffled[1].input_ids) == sorted(whole[1][:200]) and (shuffled[1].input_ids != whole[1][:200]).any()
    drawn = np.concatenate([document.input_ids[1:] for document in make("iid")[0]])
    assert set(drawn) <= set(np.concatenate(whole)) and len(set(drawn // 50)) == 4
    repeated = make("repeated")[0][2].input_ids[1:]
    assert (repeated[PERIOD:] == repeated[: 199 - PERIOD]).all()
    assert (repeated[:PERIOD] == whole[2][1 : PERIOD + 1]).all()
    assert (make("middle")[0][0].input_ids[1:] == whole[0][101:300]).all()
    carried = make("carried")[0][3].input_ids
    assert (carried[200:] == whole[3][:200]).all() and (carried[:200] == whole[0][:200]).all()


def test_controls_follow_their_seed():
    for kind in ("shuffled", "iid"):
        one, again, other = (make(kind, seed=seed)[0][0].input_ids.tolist() for seed in (1, 1, 2))
        assert one == again and one != other


def test_samples_do_not_overlap_and_leave_short_documents_out():
    corpus = [*documents(6), Document("short", np.arange(5))]
    samples = [sample_documents(corpus, 3, sample, length=300) for sample in (0, 1)]
    names = [document.name for sample in samples for document in sample]
    assert sorted(names) == [f"d{i}" for i in range(6)]
    with pytest.raises(ValueError, match="sample 2 of 3 documents of 300 tokens: the corpus has only 6"):
        sample_documents(corpus, 3, 2, length=300)


def test_what_cannot_be_made_is_refused():
    with pytest.raises(ValueError, match="control must be one of .*'iid'.*, got 'reversed'"):
        make("reversed")
    with pytest.raises(ValueError, match="needs documents of 375 tokens"):
        make("middle", length=250)
    with pytest.raises(ValueError, match="two at least"):
        control_documents("carried", documents(1), length=100)
