"""Attribution works by attributes: on classes that came with a Hub checkpoint, from disk, in bfloat16, padded."""

import pytest
import torch
from accelerate import disk_offload

from interp.ablation import write_knockout
from interp.attribution import direct_logit_attribution, pooled_write_map, span_groups
from interp.captum_inputs import input_attribution
from interp.captum_targets import LogitsFromEmbeddings, LogitTarget, PlasticityTarget
from interp.records import record_writes
from interp.write_gates import gate_gradient, gate_integrated_gradients
from modeling_ttt import TTTForCausalLM
from tests.interp.strong_models import VARIANTS, random_ids, strong_model

TARGET = LogitTarget(-1, 5, [6, 7])


@pytest.fixture
def model(layer_type):
    return strong_model(layer_type, **VARIANTS["mamba"])


def results(model):
    """A bit of everything, on one document."""
    ids = random_ids(1, 13)
    records = record_writes(model, ids)
    return [
        direct_logit_attribution(model, ids, TARGET).writes,
        pooled_write_map(records, 1, span_groups(13, [(0, 4), (6, 9)])).values,
        gate_gradient(model, ids, TARGET),
        gate_integrated_gradients(model, ids, TARGET, n_steps=2)[0],
        write_knockout(model, ids, [(3, 5)], mode="subtract").knocked,
        input_attribution(LogitsFromEmbeddings(model, TARGET), ids, "IntegratedGradients", n_steps=2).tokens,
        input_attribution(PlasticityTarget(model, 8), ids, "Saliency").tokens,
    ]


def assert_equal(found, expected):
    for one, other in zip(found, expected, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-12, equal_nan=True)


def test_classes_that_come_with_a_checkpoint_do(model, tmp_path, monkeypatch):
    from transformers.dynamic_module_utils import get_class_from_dynamic_module

    monkeypatch.setattr(TTTForCausalLM, "_auto_class", None)
    TTTForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    model.save_pretrained(tmp_path / "pushed")
    copied = get_class_from_dynamic_module("modeling_ttt.TTTForCausalLM", str(tmp_path / "pushed"))
    assert copied is not TTTForCausalLM and not issubclass(copied, TTTForCausalLM)
    other = copied.from_pretrained(tmp_path / "pushed", dtype=torch.float64).eval()
    assert_equal(results(other), results(model))


def test_a_model_on_the_disk_does(model, tmp_path):
    expected = results(model)
    disk_offload(model, tmp_path, execution_device=torch.device("cpu"))
    assert_equal(results(model), expected)


def test_a_device_map_does(model, tmp_path):
    model.save_pretrained(tmp_path / "saved")
    placed = TTTForCausalLM.from_pretrained(tmp_path / "saved", dtype=torch.float64, device_map={"": "cpu"}).eval()
    assert_equal(results(placed), results(model))


def test_half_precision_does(model):
    expected = results(model)
    for found, full in zip(results(model.bfloat16()), expected, strict=True):
        assert torch.equal(found.isfinite(), full.isfinite()) and (found[found.isfinite()] != 0).any()
