"""Direct logit attribution: parts sum to the logit, and a write's part is what the frozen path loses with it."""

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from interp.attribution import direct_logit_attribution, read_contributions, write_read_matrix
from interp.captum_targets import LogitTarget
from interp.records import record_writes
from interp.taps import mixers
from tests.interp.strong_models import VARIANTS, hooked_taps, random_ids, strong_model

CONTRAST = LogitTarget(-1, 5, [6, 7])


@pytest.fixture
def model(layer_type):
    return strong_model(layer_type, **VARIANTS["mamba"])


def value_of(model, ids, target, **options):
    with torch.no_grad():
        logits = model(ids, **options).logits
    return target.read(logits[torch.arange(len(ids)), target.columns(*ids.shape)])


def assert_complete(model, ids, target, **options):
    found = direct_logit_attribution(model, ids, target, **options)
    given = {name: options[name] for name in ("attention_mask", "reset_at", "ttt_lr_mult") if name in options}
    torch.testing.assert_close(found.value, value_of(model, ids, target, **given), rtol=0, atol=1e-12)
    assert found.completeness_error.abs().max() <= 1e-12
    return found


@pytest.mark.parametrize("variant", sorted(VARIANTS))
def test_the_parts_sum_to_the_logit(layer_type, variant):
    model = strong_model(layer_type, **VARIANTS[variant])
    for length in (1, 3, 4, 5, 23):
        found = assert_complete(model, random_ids(2, length), CONTRAST)
    assert found.writes.shape == (2, 2, 2, 23) and found.writes.abs().sum() > 0.1
    assert set(found.remainders) >= {"embedding", "initial", "query", "bias", "mlp"}
    assert ("conv" in found.remainders) == VARIANTS[variant].get("pre_conv", False)


def test_padding_borders_multipliers_and_freezing_keep_the_sum(model):
    ids, mask = random_ids(3, 23), torch.ones(3, 23, dtype=torch.long)
    mask[0, :5], mask[1, 17:], mask[2, 8:10] = 0, 0, 0
    target = LogitTarget([20, 16, 11], [3, 4, 5], [7, 8])
    found = assert_complete(model, ids, target, attention_mask=mask, reset_at=9, piece_tokens=15)
    assert found.writes[mask[:, None, None].expand(found.writes.shape) == 0].abs().max() == 0
    assert all((found.writes[row, ..., p + 1 :] == 0).all() for row, p in enumerate((20, 16, 11)))
    mixers(model)[1].learnable_token_idx.data[2] = -5.0  # a token rate clamped to 0
    mult = torch.rand(3, 2, 2, 23, dtype=torch.float64) * 2 - 0.5
    assert_complete(model, ids, target, attention_mask=mask, ttt_lr_mult=mult)
    model.config.frozen_layers = [0]
    found = assert_complete(model, ids, CONTRAST, ttt_lr_mult=mult[:, :, :, :1])
    assert found.writes[:, 0].abs().max() == 0 < found.writes[:, 1].abs().max()


@pytest.mark.parametrize("target", [LogitTarget(9, 5), LogitTarget(9, 5, 6), LogitTarget(9, [5, 7], [6, 8, 1])])
def test_a_logit_a_difference_and_a_mean_are_targets(model, target):
    found = assert_complete(model, random_ids(2, 12), target)
    if target.contrast is None:
        return
    others = [target.contrast] if isinstance(target.contrast, int) else target.contrast
    parts = [direct_logit_attribution(model, random_ids(2, 12), LogitTarget(9, i)).writes for i in others]
    raw = direct_logit_attribution(model, random_ids(2, 12), LogitTarget(9, target.target)).writes
    torch.testing.assert_close(found.writes, raw - sum(parts) / len(parts), rtol=0, atol=1e-12)


def frozen_norm(x, like, eps=1e-6):
    """LayerNorm of x with the scale it has at `like`."""
    return (x - x.mean(-1, keepdim=True)) / (like.var(-1, correction=0, keepdim=True) + eps).sqrt()


def test_a_write_adds_what_the_frozen_path_loses_without_it(model):
    """The last layer written out by hand: its read without one write, through norms that stay as they were."""
    ids = random_ids(1, 11)
    found = direct_logit_attribution(model, ids, CONTRAST)
    records, seen, layer, block = record_writes(model, ids), {}, mixers(model)[1], model.model.layers[1]
    modules = {"in": block.seq_norm, "out": layer, "mlp": block.mlp, "last": block}
    handles = [
        module.register_forward_hook(
            lambda m, args, out, name=name: seen.update({name: (out if torch.is_tensor(out) else out[0])[:, -1]})
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        model(ids)
        for handle in handles:
            handle.remove()
        record = records[1]
        read, q = record.reads()[:, :, -1], record.q[:, :, -1]
        readout = record.readout[:, :, -1].flatten(1)
        gate = F.gelu(layer.g_proj(seen["in"]), approximate="tanh")

        def logit(less):
            normed = layer.ttt_norm_weight * frozen_norm(read - less, read) + layer.ttt_norm_bias
            mixed = layer.post_norm.weight * frozen_norm((q + normed).flatten(1), readout) + layer.post_norm.bias
            stream = seen["last"] - seen["out"] + layer.o_proj(gate * mixed)
            scale = (seen["last"].square().mean(-1, keepdim=True) + model.config.rms_norm_eps).rsqrt()
            return CONTRAST.read(model.lm_head(model.model.norm.weight * stream * scale))

        torch.testing.assert_close(logit(0.0), found.value, rtol=0, atol=1e-12)

        shares = read_contributions(records, 1, -1).vectors  # [1, H, T, f]
        for head in range(2):
            for s in range(11):
                less = torch.zeros_like(read)
                less[:, head] = shares[:, head, s]
                torch.testing.assert_close(logit(0.0) - logit(less), found.writes[:, 1, head, s], rtol=0, atol=1e-12)
    assert found.writes[0, 1, :, :8].abs().min() > 1e-9  # writes of the mini-batches before


def test_shares_of_reads_match_the_dense_formula():
    """TTT-Linear: -rate (q . k + 1) g, the rate built from the definition of the inner loop."""
    model = strong_model("linear")
    records = record_writes(model, random_ids(1, 11))
    record, place = records[0], torch.arange(11)
    same = place[:, None] // 4 == place // 4
    rate = (
        torch.where(same, record.token_rate[place % 4][:, None], record.token_rate[3]).tril() * record.lr[:, :, None]
    )
    expected = -rate * (record.q @ record.k.mT + 1)
    torch.testing.assert_close(write_read_matrix(records, 0), expected, rtol=0, atol=1e-14)


@pytest.mark.parametrize("gelu_rule", ["rescale", "gradient"])
@pytest.mark.parametrize("interaction", ["shapley", "first", "second"])
def test_every_convention_is_complete_and_another(gelu_rule, interaction):
    model = strong_model("mlp")
    found = assert_complete(model, random_ids(1, 12), CONTRAST, gelu_rule=gelu_rule, interaction=interaction)
    assert ("curvature" in found.remainders) == (gelu_rule == "gradient")
    assert found.convention == (gelu_rule, interaction)
    default = direct_logit_attribution(model, random_ids(1, 12), CONTRAST)
    differs = (found.writes - default.writes).abs().max()
    assert differs == 0 if (gelu_rule, interaction) == ("rescale", "shapley") else differs > 1e-6


def test_layers_not_chosen_are_wholes(model):
    found = assert_complete(model, random_ids(1, 12), CONTRAST, layers=[1])
    whole = direct_logit_attribution(model, random_ids(1, 12), CONTRAST)
    torch.testing.assert_close(found.writes, whole.writes[:, 1:], rtol=0, atol=1e-12)
    assert found.layers == (1,) and found.remainders["layer"].shape == (1, 1)


def test_what_stands_behind_the_position_is_not_read(model):
    ids = random_ids(1, 12)
    one = direct_logit_attribution(model, ids, LogitTarget(7, 5))
    ids[:, 8:] = 0
    assert torch.equal(one.writes, direct_logit_attribution(model, ids, LogitTarget(7, 5)).writes)


def test_tables_hold_the_numbers(model):
    found = direct_logit_attribution(model, random_ids(1, 12), CONTRAST)
    table, summary = found.to_pandas(), found.summary()
    assert list(table) == ["token", "layer", "head", "contribution"] and len(table) == 2 * 2 * 12
    assert summary["contribution"].sum() == pytest.approx(found.value.item(), abs=1e-12)
    columns, values = found.top(3)
    per_token = table.groupby("token")["contribution"].sum()
    assert columns[0, 0] == per_token.idxmax() and values[0, 0].item() == pytest.approx(per_token.max())


def test_other_ways_to_hold_a_model_give_the_same(model):
    from accelerate import cpu_offload
    from peft import LoraConfig, get_peft_model

    ids = random_ids(2, 12)
    expected = direct_logit_attribution(model, ids, CONTRAST)
    cpu_offload(model, execution_device=torch.device("cpu"))
    found = assert_complete(model, ids, CONTRAST)
    torch.testing.assert_close(found.writes, expected.writes, rtol=0, atol=1e-12)

    adapted = strong_model(model.config.ttt_layer_type, **VARIANTS["mamba"])
    peft = get_peft_model(adapted, LoraConfig(r=2, target_modules=["o_proj", "q_proj"], init_lora_weights=False))
    peft = peft.double().eval()
    found = assert_complete(peft.get_base_model(), ids, CONTRAST)
    assert (found.writes - expected.writes).abs().max() > 1e-6


def test_a_bias_of_the_head_is_a_remainder(layer_type):
    model = strong_model(layer_type, tie_word_embeddings=False)
    model.lm_head.bias = torch.nn.Parameter(torch.randn(64, dtype=torch.float64))
    assert assert_complete(model, random_ids(1, 6), CONTRAST).remainders["head"].abs() > 0


def test_half_precision_is_complete_up_to_its_rounding(layer_type):
    model = strong_model(layer_type, std=0.1, **VARIANTS["mamba"])
    ids = random_ids(1, 23)
    single = direct_logit_attribution(model.float(), ids, CONTRAST)
    assert single.completeness_error.abs().max() < 1e-5
    half = direct_logit_attribution(model.bfloat16(), ids, CONTRAST)
    assert half.completeness_error.abs().max() < 0.1 * max(1.0, float(half.value.abs()))


def test_what_does_not_fit_is_refused_and_no_hook_stays(model):
    ids, mask = random_ids(1, 6), torch.ones(1, 6, dtype=torch.long)
    mask[:, 5] = 0
    with pytest.raises(ValueError, match="is a padded column"):
        direct_logit_attribution(model, ids, CONTRAST, attention_mask=mask)
    with pytest.raises(ValueError, match="gelu_rule must be one of"):
        direct_logit_attribution(model, ids, CONTRAST, gelu_rule="secant")
    with pytest.raises(ValueError, match="interaction must be one of"):
        direct_logit_attribution(model, ids, CONTRAST, interaction="half")
    with pytest.raises(ValueError, match="target and contrast must be token ids"):
        direct_logit_attribution(model, ids, LogitTarget(3, 64))
    handle = model.model.norm.register_forward_hook(lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        direct_logit_attribution(model, ids, CONTRAST)
    handle.remove()
    assert not hooked_taps(model)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())


def test_layers_may_be_named_in_any_order(model):
    ids = random_ids(1, 12)
    found, whole = (direct_logit_attribution(model, ids, CONTRAST, layers=layers) for layers in ([1, 0], None))
    assert found.layers == (0, 1) and torch.equal(found.writes, whole.writes)


def test_a_model_that_gives_no_cache_is_refused_where_one_is_needed(model):
    """Gradient checkpointing drops it in training: every piece would start from an empty state."""
    ids = random_ids(1, 12)
    expected = direct_logit_attribution(model, ids, CONTRAST)
    model.train().gradient_checkpointing_enable()
    with pytest.raises(ValueError, match="gave no cache to go on from"):
        direct_logit_attribution(model, ids, CONTRAST, piece_tokens=5)
    whole = direct_logit_attribution(model, ids, CONTRAST)
    torch.testing.assert_close(whole.writes, expected.writes, rtol=0, atol=1e-12)


@pytest.mark.parametrize(
    "options",
    [
        {"ttt_lr_mult": torch.ones(9)},
        {"ttt_lr_mult": torch.ones(6)},  # up to the position alone
        {"reset_at": torch.ones(2, 9, dtype=torch.bool)},
    ],
)
def test_what_has_another_length_than_the_text_is_refused(model, options):
    with pytest.raises(ValueError, match=f"{next(iter(options))}.* must be"):
        direct_logit_attribution(model, random_ids(2, 8), LogitTarget(5, 5), **options)


def test_targets_fit_the_documents_and_may_come_from_other_libraries(model):
    ids = random_ids(4, 8)
    with pytest.raises(ValueError, match="target must be one token id or 4 of them"):
        direct_logit_attribution(model, ids, LogitTarget(5, [5, 6]))
    target = LogitTarget(np.int64(5), torch.tensor([5, 6, 7, 8]), np.array([1, 2]))
    assert target == LogitTarget(5, (5, 6, 7, 8), (1, 2))
    assert_complete(model, ids, target)
    with pytest.raises(TypeError, match="position must be an integer"):
        LogitTarget(2.5, 5)
    with pytest.raises(ValueError, match="contrast must hold a token id"):
        direct_logit_attribution(model, ids, LogitTarget(5, 5, []))
