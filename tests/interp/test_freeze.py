"""`freeze`: nothing is written within the block, and the model is as it was afterwards, whatever happened."""

import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from interp.freezing import freeze
from interp.presets import PRESETS, freeze_preset, layer_thirds, sweep_freezings
from modeling_ttt import TTTConfig, TTTForCausalLM
from tests.conftest import TINY

NAMES = ("frozen_layers", "frozen_heads", "frozen_from")


def settings(model) -> list:
    return [getattr(model.config, name) for name in NAMES]


def ids(tokens: int = 13) -> torch.Tensor:
    return torch.randint(0, 64, (2, tokens), generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def test_a_frozen_layer_keeps_w_0_bit_for_bit_and_reports_no_plasticity(tiny_model):
    with freeze(tiny_model, layers=[0]) as model:
        out = model(ids())
    block = tiny_model.model.layers[0].seq_modeling_block
    for pair in tiny_model.config.inner_net.parameter_names:
        for name in pair:
            held = out.past_key_values.layers[0].tensors[name]
            assert torch.equal(held, getattr(block, name).expand_as(held))
    assert float(out.plasticity[0].abs().max()) == 0 and float(out.plasticity[1].min()) > 0
    assert settings(tiny_model) == [None, None, None]


def test_a_frozen_model_without_convolution_reads_every_token_by_itself(layer_type):
    torch.manual_seed(0)
    model = TTTForCausalLM(TTTConfig(**TINY, ttt_layer_type=layer_type)).double().eval()
    x = model.get_input_embeddings()(ids(7)[:1]).detach()

    def outputs(embeddings):
        return model(inputs_embeds=embeddings, use_cache=False).logits[0, :, :3]

    for frozen in (False, True):
        with freeze(model, layers=[0, 1] if frozen else []):
            jacobian = torch.autograd.functional.jacobian(outputs, x)[:, :, 0]  # [t, 3, s, C]
        reach = jacobian.abs().amax((1, 3))
        between = reach - torch.diag(reach.diagonal())
        assert float(reach.diagonal().min()) > 0
        assert (float(between.max()) == 0) == frozen


@torch.no_grad()
def test_freezing_equals_the_multiplier_and_holds_in_generate(tiny_model):
    mult = torch.ones(1, 2, 2, 1)
    mult[:, 0], mult[:, 1, 1] = 0, 0
    ask = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None}
    expected, written = tiny_model(ids(), ttt_lr_mult=mult).logits, tiny_model.generate(ids(), ttt_lr_mult=mult, **ask)
    with freeze(tiny_model, layers=[0], heads={1: [1]}):
        assert torch.equal(tiny_model(ids()).logits, expected)
        assert torch.equal(tiny_model.generate(ids(), **ask), written)


@torch.no_grad()
def test_blocks_nest_and_an_exception_restores(tiny_model):
    tiny_model.config.frozen_heads = {1: [0]}
    with pytest.raises(KeyError), freeze(tiny_model, layers=[0]):
        with freeze(tiny_model, heads={1: [1]}):
            assert settings(tiny_model) == [[0], {1: [0, 1]}, None]
            with freeze(tiny_model):
                assert settings(tiny_model)[0] == [0, 1]
        assert settings(tiny_model) == [[0], {1: [0]}, None]
        raise KeyError
    assert settings(tiny_model) == [None, {1: [0]}, None]


@torch.no_grad()
def test_from_a_token_on_nothing_is_written_by_the_layers_named(tiny_model):
    with freeze(tiny_model, from_token=6):
        assert settings(tiny_model)[2] == 6
        with freeze(tiny_model, layers=[1], from_token=3):
            assert settings(tiny_model)[2] == {0: 6, 1: 3}
            plasticity = tiny_model(ids()).plasticity
    for layer, begin in ((0, 6), (1, 3)):
        assert float(plasticity[layer][:, :, begin:].max()) == 0 and float(plasticity[layer][:, :, :begin].min()) > 0
    assert settings(tiny_model) == [None, None, None]


def test_layers_may_come_from_numpy_and_the_configuration_stays_plain(tiny_model):
    with freeze(tiny_model, layers=np.array([0, 1]), heads={np.int64(0): np.array([1])}):
        assert json.loads(tiny_model.config.to_json_string())["frozen_layers"] == [0, 1]
    assert settings(tiny_model) == [None, None, None]


@torch.no_grad()
def test_wrapped_models_are_looked_through(tiny_model):
    for wrapped in (torch.nn.DataParallel(tiny_model), torch.compile(tiny_model, backend="eager")):
        with freeze(wrapped, layers=[1]):
            assert tiny_model.config.frozen_layers == [1]
    assert tiny_model.config.frozen_layers is None


def test_reading_on_from_a_cache_keeps_what_it_has_learnt(tiny_model):
    with torch.no_grad():
        learnt = tiny_model(ids()).past_key_values
        before = learnt.layers[0].tensors["W1"].clone()
        with freeze(tiny_model):
            after = tiny_model(ids(9), past_key_values=learnt).past_key_values
    # The open mini-batch of 13 tokens had one real row: its own commit may still come, no write of the 9 may.
    with torch.no_grad():
        again = tiny_model(ids()).past_key_values
        mult = tiny_model(ids(9), past_key_values=again, ttt_lr_mult=torch.zeros(1)).past_key_values
    assert torch.equal(after.layers[0].tensors["W1"], mult.layers[0].tensors["W1"])
    assert not torch.equal(before, tiny_model.model.layers[0].seq_modeling_block.W1.expand_as(before))


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"layers": [2]}, ValueError, r"layers must be among \[0, 1\], got \[2\]"),
        ({"layers": [True]}, TypeError, "layers must be integers"),
        ({"layers": 1}, TypeError, "layers must be a sequence of integers, got 1"),
        ({"heads": {0: [5]}}, ValueError, r"heads of layer 0 must be among \[0, 1\], got \[5\]"),
        ({"heads": {4: [0]}}, ValueError, r"the layers of heads must be among \[0, 1\]"),
        ({"from_token": -1}, ValueError, "from_token must be the index"),
        ({"from_token": 3, "heads": {0: [0]}}, ValueError, "from_token freezes whole layers"),
    ],
)
def test_bad_choices_name_the_valid_ones_and_change_nothing(tiny_model, options, error, message):
    with pytest.raises(error, match=message), freeze(tiny_model, **options):
        raise AssertionError("not reached")
    assert settings(tiny_model) == [None, None, None]
    with pytest.raises(ValueError, match="not a TTT model"), freeze(SimpleNamespace(config=SimpleNamespace())):
        pass


def test_presets_are_those_of_the_earlier_study_at_24_layers():
    depth = range(24)
    assert {name: tuple(freeze_preset(name, depth)) for name in PRESETS} == PRESETS
    assert freeze_preset("cortex", depth) == [0, 1, 2, 3, 4] and freeze_preset("retina", depth) == [20, 21, 22, 23]
    assert freeze_preset("middle_light", depth) == [0, 1, 22, 23]
    assert freeze_preset("middle_strict", depth) == [0, 1, 2, 3, 20, 21, 22, 23]
    assert freeze_preset("wikitext", depth) == freeze_preset("drift_uniform", depth) == []
    thirds = layer_thirds(depth)
    assert [(t[0], t[-1]) for t in thirds.values()] == [(0, 7), (8, 15), (16, 23)]


def test_presets_keep_their_relative_depth_and_name_the_layers():
    assert freeze_preset("cortex", range(12)) == [0, 1] and freeze_preset("retina", range(12)) == [10, 11]
    assert freeze_preset("middle_strict", range(48)) == [*range(8), *range(40, 48)]
    assert freeze_preset("middle_light", range(4)) == [0, 3] and freeze_preset("retina", [1, 3, 5, 7]) == [7]
    assert layer_thirds(range(4)) == {"early": [0], "middle": [1, 2], "late": [3]}
    with pytest.raises(ValueError, match=r"preset must be one of \['wikitext', 'cortex'.*'late', 'all'\], got 'lobe'"):
        freeze_preset("lobe", range(24))
    with pytest.raises(ValueError, match="three TTT layers"):
        layer_thirds([0, 1])
    # Presets do not need thirds.
    assert freeze_preset("retina", [0, 1]) == [1] and freeze_preset("cortex", [4]) == [4]


def test_a_sweep_holds_every_freezing_once_and_names_all_of_each_family():
    freezings, named = sweep_freezings(range(4), 2, ("single", "leave-one-in", "prefix", "suffix", "thirds", "random"))
    names = [entry.name for entry in freezings]
    assert names[0] == "all" and len(set(names)) == len(names) == 15  # every subset of four layers but the empty one
    assert named["thirds"] == {"early": "0", "middle": "1,2", "late": "3"}
    assert named["single"]["layer 2"] == "2" and named["leave-one-in"]["all but layer 0"] == "1,2,3"
    assert named["prefix"]["first 2"] == "0,1" and named["suffix"]["last 4"] == "all"
    assert len(named["random"]) == 4 + 6 + 4
    heads, by_head = sweep_freezings([1, 5], 2, ("heads",))
    assert [entry.name for entry in heads] == ["all", *by_head["heads"]] and heads[1].heads == {1: (0,)}
    with pytest.raises(ValueError, match="families must be among"):
        sweep_freezings(range(4), 2, ("lobes",))


def test_random_subsets_are_distinct_and_of_the_sizes_that_occur():
    freezings, named = sweep_freezings(range(24), 4, ("presets", "thirds", "random"), random_subsets=5, seed=3)
    sizes = [len(next(f for f in freezings if f.name == name).layers) for name in named["random"].values()]
    assert sorted(set(sizes)) == [4, 5, 8] and len(sizes) == len(set(named["random"].values())) == 15


@pytest.mark.slow
def test_classes_that_came_with_a_checkpoint_are_frozen_as_well(tiny_model, tmp_path):
    # In a copy of the class, so that no other test sees it registered.
    kind = type("TTTForCausalLM", (TTTForCausalLM,), {"__module__": TTTForCausalLM.__module__})
    kind.register_for_auto_class("AutoModelForCausalLM")
    pushed = kind(tiny_model.config)
    pushed.load_state_dict(tiny_model.state_dict())
    pushed.save_pretrained(tmp_path / "hub")
    code = f"""
import torch
from transformers import AutoModelForCausalLM
from interp.freezing import freeze
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "hub")!r}, trust_remote_code=True).eval()
assert type(model).__module__.startswith("transformers_modules"), type(model).__module__
ids = torch.arange(3, 16)[None]
with torch.no_grad(), freeze(model, layers=[0]):
    plasticity = model(ids).plasticity
    text = model.generate(ids, max_new_tokens=3, do_sample=False)
assert float(plasticity[0].max()) == 0 and float(plasticity[1].min()) > 0 and model.config.frozen_layers is None
"""
    where = {"PYTHONPATH": str(Path(__file__).parents[2]), "HF_MODULES_CACHE": str(tmp_path / "modules")}
    environment = {**os.environ, **where}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
