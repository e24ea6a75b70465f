"""Both backends reproduce the official PyTorch implementation: outputs, gradients, inner norms, states, generation."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from modeling_ttt import TTTConfig, TTTForCausalLM

from .helpers import NATIVE

GOLDENS = Path(__file__).parent / "goldens"
FORWARD = sorted(path.stem for path in GOLDENS.glob("*_L*.json"))
GENERATION = sorted(path.stem for path in GOLDENS.glob("gen_*.json"))
BACKENDS = ("chunked", "reference")


def load_golden(name, dtype=torch.float64, backend="chunked"):
    tensors = load_file(GOLDENS / f"{name}.safetensors")
    meta = json.loads((GOLDENS / f"{name}.json").read_text())
    # The official code has one base learning rate, 1.0, for both inner nets unless told otherwise.
    config = TTTConfig(**{"ttt_base_lr": 1.0, "bos_token_id": 1, **meta["config"]}, ttt_backend=backend)
    model = TTTForCausalLM(config).to(dtype).eval()
    state = {key.removeprefix("param."): t.to(dtype) for key, t in tensors.items() if key.startswith("param.")}
    missing, unexpected = model.load_state_dict(state, strict=False)
    assert not unexpected
    assert missing == (["lm_head.weight"] if config.tie_word_embeddings else [])
    if config.tie_word_embeddings:
        model.tie_weights()
    return model, tensors, meta


def relative(got, expected):
    got, expected = got.double(), expected.double()
    return float(((got - expected).norm() / expected.norm().clamp(min=1e-30)).detach())


@pytest.mark.parametrize("backend", [*BACKENDS, NATIVE])
@pytest.mark.parametrize("name", FORWARD)
def test_forward_and_gradients_equal_the_official_code(name, backend):
    model, golden, meta = load_golden(name, backend=backend)
    out = model(golden["input_ids"], labels=golden["labels"], output_hidden_states=True)
    assert (out.logits[:, -4:] - golden["logits_last4_exactconst_f64"]).abs().max() < 1e-9
    assert abs(float(out.loss.detach()) - meta["loss_exactconst_f64"]) < 1e-9
    assert relative(out.logits, golden["logits"]) < 2e-6
    # The official code records the output of every block and the final norm; ours puts the embeddings in front.
    for i in range(model.config.num_hidden_layers):
        block = out.hidden_states[i + 1]
        if i == model.config.num_hidden_layers - 1:
            continue  # the last entry is after the final norm, as everywhere in Transformers
        assert relative(block[:1], golden[f"hidden.{i}"]) < 2e-6
    assert relative(out.hidden_states[-1], golden[f"hidden.{model.config.num_hidden_layers}"]) < 2e-6
    out.loss.backward()
    check_gradients(model, golden)


def check_gradients(model, golden):
    checked = 0
    for name, parameter in model.named_parameters():
        if f"grad.{name}" in golden:
            assert relative(parameter.grad, golden[f"grad.{name}"]) < 2e-6, name
            checked += 1
        if f"gradnorm.{name}" in golden:
            left, right = golden[f"gradproj_u.{name}"], golden[f"gradproj_v.{name}"]
            grad = parameter.grad.flatten(0, -2)  # heads and rows together
            assert relative(grad.norm(), golden[f"gradnorm.{name}"]) < 2e-6, name
            assert relative(grad @ left, golden[f"gradproj_r.{name}"]) < 2e-6, name
            assert relative(right @ grad, golden[f"gradproj_l.{name}"]) < 2e-6, name
            checked += 1
    assert checked == len(list(model.parameters()))


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORWARD)
def test_inner_norms_and_final_states_equal_the_official_code(name, backend):
    model, golden, _ = load_golden(name, backend=backend)
    with torch.no_grad():
        out = model(golden["input_ids"], output_ttt_stats=True)
    tau = model.model.layers[0].seq_modeling_block.token_rate(torch.float64)
    for i, stats in enumerate(out.ttt_stats):
        inner = {k.split(f"inner.layers.{i}.")[1]: t for k, t in golden.items() if k.startswith(f"inner.layers.{i}.")}
        squares = sum(t.double().square() for key, t in inner.items() if key.startswith("gradnorm."))
        assert relative(stats.inner_grad_norm, squares.sqrt()) < 2e-6
        assert relative(stats.lr, inner["ttt_lr_eta"]) < 2e-6
        slots = torch.arange(stats.lr.shape[-1]) % len(tau)
        rate = model.model.layers[i].seq_modeling_block.token_rate(torch.float64)
        assert relative(rate[slots], inner["token_eta"]) < 2e-6
        expected = rate[-1] * inner["ttt_lr_eta"].double() * squares.sqrt()
        assert relative(out.plasticity[i], expected) < 2e-6
        check_state(out.past_key_values.layers[i].tensors, golden, i, len(tau))


def check_state(tensors, golden, layer, mini_batch_size):
    """`W1` is the committed weight, `W1_grad` the sum of lr * gradient of the open mini-batch."""
    checked = 0
    for key, expected in golden.items():
        if not key.startswith(f"state.layers.{layer}."):
            continue
        name = key.rsplit(".", 1)[1]
        if name.endswith("_grad"):
            x, g = tensors[f"x{name[1]}"], tensors[f"g{name[1]}"]
            got = x.transpose(-1, -2) @ g if name[0] == "W" else g.sum(-2, keepdim=True)
        else:
            got = tensors[name]
        assert relative(got[: expected.shape[0]], expected) < 2e-6, key
        checked += 1
    return checked


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("name", FORWARD)
def test_float32_run_is_within_1e_5(name, backend):
    model, golden, _ = load_golden(name, torch.float32, backend)
    with torch.no_grad():
        out = model(golden["input_ids"])
    assert relative(out.logits[:, -4:], golden["logits_last4_f64"]) < 1e-5
    assert out.plasticity[0].dtype == torch.float32


@pytest.mark.parametrize("backend", [*BACKENDS, NATIVE])
@pytest.mark.parametrize("name", GENERATION)
def test_greedy_generation_equals_the_official_code(name, backend):
    model, golden, meta = load_golden(name, backend=backend)
    new = meta["new_tokens"]
    out = model.generate(
        golden["input_ids"],
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
        eos_token_id=None,
        output_logits=True,
        return_dict_in_generate=True,
    )
    assert torch.equal(out.sequences, golden["sequence"])
    assert relative(torch.stack(out.logits, 1), golden["step_logits"]) < 2e-6
    with torch.no_grad():
        full = model(golden["sequence"], use_cache=True)
    for i in range(model.config.num_hidden_layers):
        assert check_state(full.past_key_values.layers[i].tensors, golden, i, model.config.mini_batch_size) > 0
