"""The model as Transformers sees it: outputs, labels, checkpointing, dtypes, and errors that name the culprit."""

import pytest
import torch
from accelerate import cpu_offload, disk_offload
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from modeling_ttt import TTTConfig, TTTForCausalLM, TTTModel
from modeling_ttt.block import TTTRMSNorm

from .helpers import BACKBONES, cache_distance, distance, tiny, tokens


@pytest.fixture(params=["linear", "mlp"])
def model(request):
    return tiny(ttt_layer_type=request.param, **BACKBONES["mamba"])


def test_auto_classes_know_the_model():
    config = TTTConfig(hidden_size=32, num_attention_heads=2, num_hidden_layers=1, vocab_size=10)
    assert isinstance(AutoConfig.for_model("ttt"), TTTConfig)
    assert isinstance(AutoModel.from_config(config), TTTModel)
    assert isinstance(AutoModelForCausalLM.from_config(config), TTTForCausalLM)


@torch.no_grad()
def test_outputs_follow_the_conventions(model):
    ids = tokens(2, 9)
    out = model(ids, output_hidden_states=True)
    assert len(out.hidden_states) == 3
    assert torch.equal(out.hidden_states[0], model.model.embed_tokens(ids))
    assert torch.equal(model.lm_head(out.hidden_states[-1]), out.logits)
    assert out.past_key_values.get_seq_length() == 9
    assert model(ids, use_cache=False).past_key_values is None
    parts = model(ids, return_dict=False)
    assert torch.equal(parts[0], out.logits) and len(parts) == 3
    assert torch.equal(model(inputs_embeds=model.model.embed_tokens(ids)).logits, out.logits)


@torch.no_grad()
def test_hidden_states_of_a_padded_batch_stay_in_the_callers_layout(model):
    ids = tokens(1, 8)
    left = torch.cat([torch.zeros(1, 3, dtype=torch.long), ids], 1)
    mask = torch.cat([torch.zeros(1, 3), torch.ones(1, 8)], 1)
    padded = model(left, attention_mask=mask, output_hidden_states=True).hidden_states
    plain = model(ids, output_hidden_states=True).hidden_states
    assert distance([h[:, 3:] for h in padded], plain) < 1e-10


@torch.no_grad()
def test_logits_to_keep_takes_a_number_positions_or_a_mask(model):
    ids = tokens(2, 9)
    full = model(ids).logits
    assert distance(model(ids, logits_to_keep=3).logits, full[:, -3:]) < 1e-12
    assert distance(model(ids, logits_to_keep=torch.tensor([0, 5])).logits, full[:, [0, 5]]) < 1e-12
    picked = model(ids, logits_to_keep=torch.tensor([[0, 5], [8, 1]])).logits
    assert distance(picked, torch.stack([full[0, [0, 5]], full[1, [8, 1]]])) < 1e-12
    mask = torch.rand(2, 9) > 0.5
    assert distance(model(ids, logits_to_keep=mask).logits, full[mask]) < 1e-12


@torch.no_grad()
def test_loss_shifts_labels_and_ignores_minus_100(model):
    ids = tokens(2, 9)
    labels = ids.clone()
    labels[0, :4] = -100
    out = model(ids, labels=labels)
    kept = labels[:, 1:] != -100
    expected = torch.nn.functional.cross_entropy(out.logits[:, :-1][kept], ids[:, 1:][kept])
    assert distance(out.loss, expected) < 1e-12
    shifted = torch.nn.functional.pad(labels, (0, 1), value=-100)[:, 1:]
    again = model(ids, labels=labels, shift_labels=shifted, num_items_in_batch=kept.sum())
    assert distance(again.loss, expected) < 1e-12
    float32 = model.float()(ids, labels=labels, num_items_in_batch=torch.tensor(7)).loss
    assert distance(float32.double(), expected * int(kept.sum()) / 7) < 1e-5


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing_changes_no_gradient(model, reentrant):
    ids = tokens(2, 13)
    model.train()
    model(ids, labels=ids).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    out = model(ids, labels=ids, attention_mask=torch.ones_like(ids))
    assert out.past_key_values is None
    out.loss.backward()
    assert distance([p.grad for p in model.parameters()], expected) < 1e-12
    with torch.no_grad():
        cache = model.eval()(ids, use_cache=True).past_key_values
    with pytest.raises(ValueError, match="cannot go on from past_key_values"):
        model.train()(ids, past_key_values=cache)


def test_gradients_of_both_backends_agree_with_padding(model):
    ids, mask = tokens(2, 11), torch.ones(2, 11)
    mask[1, :4] = 0
    labels = ids.masked_fill(mask == 0, -100)
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    expected = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model.config.ttt_backend = "reference"
    model(ids, attention_mask=mask, labels=labels).loss.backward()
    assert distance([p.grad for p in model.parameters()], expected) < 1e-10


@torch.no_grad()
def test_half_precision_keeps_the_inner_loop_in_float32(model):
    ids = tokens(2, 40)
    exact = model(ids).logits
    half = model.to(torch.bfloat16)
    plain = half(ids)
    assert torch.isfinite(plain.logits).all()
    # Weights rounded to bfloat16, everything else exact: what the rounding of the weights alone costs.
    rounded = tiny(dtype=torch.float64, ttt_layer_type=model.config.ttt_layer_type, **BACKBONES["mamba"])
    rounded.load_state_dict(half.state_dict())
    reference = rounded(ids).logits
    scale = exact.std()
    assert (plain.logits.double() - reference).pow(2).mean().sqrt() < 0.05 * scale
    single = rounded.float()
    seen = []
    single.model.layers[0].seq_modeling_block.tap_lr.register_forward_hook(lambda m, args, out: seen.append(out.dtype))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        out = single(ids, output_ttt_stats=True)
    assert seen == [torch.float32]
    assert {value.dtype for value in out.ttt_stats[0].values()} == {torch.float32}
    state = out.past_key_values.layers[0].tensors
    assert {t.dtype for name, t in state.items() if name[0] in "Wbxg"} == {torch.float32}
    assert (out.logits.double() - reference).pow(2).mean().sqrt() < 0.05 * scale


def test_training_lowers_the_loss(model):
    model = model.float().train()
    ids = tokens(4, 24)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-2)
    losses = []
    for _ in range(15):
        loss = model(ids, labels=ids).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.7 * losses[0]


@pytest.mark.parametrize(
    ("kwargs", "error", "message"),
    [
        (
            {"attention_mask": torch.ones(2, 5)},
            ValueError,
            r"must be a tensor \[batch, tokens\] = \[2, 9\], got",
        ),
        ({"attention_mask": torch.ones(3, 9)}, ValueError, r"got \[3, 9\]"),
        ({"attention_mask": torch.ones(2, 1, 9, 9)}, ValueError, "attention_mask must be a tensor"),
        ({"ttt_lr_mult": torch.ones(3, 1, 1, 9)}, ValueError, r"ttt_lr_mult must be broadcastable .* \[2, 2, 2, 9\]"),
        ({"ttt_lr_mult": torch.ones(1, 1, 1, 1, 9)}, ValueError, "broadcastable"),
        ({"ttt_lr_mult": 0.5}, TypeError, "ttt_lr_mult must be a tensor, got float"),
        ({"labels": torch.ones(2, 8, dtype=torch.long)}, ValueError, r"labels must be .* got \[2, 8\]"),
        ({"attention_mask": torch.ones(2, 12)}, ValueError, r"attention_mask must be .* got \[2, 12\]"),
        ({"position_ids": torch.arange(8)[None]}, ValueError, r"position_ids must be .* got \[1, 8\]"),
        ({"position_ids": torch.zeros(3, 2, 9)}, ValueError, "position_ids must be"),
        ({"ttt_lr_mul": torch.ones(1)}, TypeError, r"unknown arguments \['ttt_lr_mul'\]"),
        ({"reset_at": "x"}, TypeError, "reset_at must be token ids .* got str"),
        ({"reset_at": True}, ValueError, "reset_at must be token ids or a bool mask"),
        ({"reset_at": torch.ones(2, 3, dtype=torch.bool)}, ValueError, "reset_at as a mask"),
        ({"reset_at": torch.ones(2, 9)}, ValueError, "reset_at must be token ids or a bool mask"),
        ({"inputs_embeds": torch.ones(2, 9, 32)}, ValueError, "exactly one of input_ids and inputs_embeds"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(kwargs, error, message):
    with pytest.raises(error, match=message):
        tiny()(tokens(2, 9), **kwargs)


def test_no_tokens_and_token_ids_without_input_ids_are_refused():
    with pytest.raises(ValueError, match="at least one token"):
        tiny()(torch.zeros(2, 0, dtype=torch.long))
    with pytest.raises(ValueError, match="reset_at as token ids needs input_ids"):
        tiny()(inputs_embeds=torch.ones(2, 9, 32, dtype=torch.float64), reset_at=1)


@pytest.mark.parametrize("backend", ["chunked", "reference"])
def test_diagnostics_carry_no_gradient(backend):
    model, shown = tiny(ttt_backend=backend), []
    tap = model.model.layers[0].seq_modeling_block.tap_inner_grad
    tap.register_forward_hook(lambda m, i, o: shown.append(o))
    out = model(tokens(1, 9), output_ttt_stats=True)
    values = [value for layer in out.ttt_stats for value in layer.values()]
    assert len(values) == 2 * 8 and not any(value.requires_grad for value in [*values, *shown])
    assert out.plasticity[0].requires_grad
    out.logits.sum().backward()


def test_rms_norm_of_a_zero_row_has_a_second_derivative():
    norm, x = TTTRMSNorm(6, 1e-2).double(), torch.randn(3, 6, dtype=torch.float64)
    x[1] = 0
    assert torch.autograd.gradgradcheck(norm, x.requires_grad_())


@torch.no_grad()
def test_what_stands_at_masked_positions_never_matters():
    model = tiny(**BACKBONES["mamba"])
    embeds = model.model.embed_tokens(tokens(1, 9))
    mask = torch.ones(1, 9)
    mask[0, :3] = 0
    expected = model(inputs_embeds=embeds, attention_mask=mask)
    embeds[0, :3] = float("nan")
    out = model(inputs_embeds=embeds, attention_mask=mask)
    assert torch.equal(out.logits[0, 3:], expected.logits[0, 3:])
    assert all(torch.equal(a, b) for a, b in zip(out.plasticity, expected.plasticity, strict=True))


def test_meta_device_and_generated_docs():
    with torch.device("meta"):
        model = TTTForCausalLM(tiny().config)
        assert model(torch.zeros(2, 9, dtype=torch.long)).logits.shape == (2, 9, 64)
    for documented in (TTTModel, TTTForCausalLM):
        assert "bare None" not in documented.__doc__ and "The None" not in documented.__doc__


def test_nothing_is_left_behind_on_the_module(model):
    before = {name: t.clone() for name, t in model.state_dict().items()}
    attributes = {name: set(vars(module)) for name, module in model.named_modules()}
    with torch.no_grad():
        first = model(tokens(2, 9))
        model(tokens(2, 5, seed=8))
        second = model(tokens(2, 9))
    assert torch.equal(first.logits, second.logits)
    assert cache_distance(first.past_key_values, second.past_key_values) == 0
    assert all(torch.equal(before[n], t) for n, t in model.state_dict().items())
    assert attributes == {name: set(vars(module)) for name, module in model.named_modules()}


def test_offloaded_weights_give_the_same_outputs(tmp_path):
    ids = tokens(2, 9)
    with torch.no_grad():
        expected = tiny(**BACKBONES["mamba"])(ids)
        for offload in (
            lambda m: cpu_offload(m, execution_device=torch.device("cpu")),
            lambda m: disk_offload(m, tmp_path),
        ):
            model = tiny(**BACKBONES["mamba"])
            offload(model)
            assert model.model.layers[0].seq_modeling_block.W1.device.type == "meta"
            out = model(ids)
            assert torch.equal(out.logits, expected.logits)
            assert cache_distance(out.past_key_values, expected.past_key_values) == 0
