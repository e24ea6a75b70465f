"""Captum's input methods explain logits and plasticity, completely, and leave nothing on the model."""

import pytest
import torch

from interp.captum_inputs import METHODS, baseline_embedding, input_attribution
from interp.captum_targets import LogitsFromEmbeddings, LogitTarget, LossFromEmbeddings, PlasticityTarget

LENGTH = 9


@pytest.fixture
def model(tiny_model):
    torch.manual_seed(1)
    for parameter in tiny_model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return tiny_model.double()


@pytest.fixture
def ids():
    return torch.randint(0, 64, (1, LENGTH), generator=torch.Generator().manual_seed(2))


def target_of(model, kind):
    if kind == "logit":
        return LogitsFromEmbeddings(model, LogitTarget(6, 5, [6, 7]))
    return PlasticityTarget(model, 6, layers=[1])


def traces(model):
    hooks = {
        name: len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._backward_hooks)
        for name, m in model.named_modules()
    }
    return hooks, [(p.grad is None, p.requires_grad) for p in model.parameters()], model.training


@pytest.mark.parametrize("kind", ["logit", "plasticity"])
@pytest.mark.parametrize("method", sorted(METHODS))
def test_every_method_explains_both_and_leaves_nothing(model, ids, kind, method):
    target = target_of(model, kind)
    with torch.no_grad():
        model(ids)
    before = traces(model)
    found = input_attribution(target, ids, method)
    assert found.tokens.shape == (1, LENGTH) and found.values.shape == (1, LENGTH, 32)
    assert found.tokens[:, 7:].abs().max() < 1e-12 < found.tokens[:, :7].abs().min()
    assert traces(model) == before and not found.values.requires_grad


@pytest.mark.parametrize("kind", ["logit", "plasticity"])
@pytest.mark.parametrize(("method", "baseline"), [("IntegratedGradients", "mean"), ("LayerIntegratedGradients", 3)])
def test_integrated_gradients_are_complete(model, ids, kind, method, baseline):
    target = target_of(model, kind)
    found = input_attribution(target, ids, method, baseline=baseline, n_steps=128)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        _, absent = baseline_embedding(model, baseline)
        inputs = embed(ids)
        difference = target(inputs) - target(absent.expand_as(inputs))
    torch.testing.assert_close(found.tokens.sum(1), difference, rtol=1e-3, atol=1e-5)
    torch.testing.assert_close(found.tokens.sum(1) - difference, found.delta, rtol=0, atol=1e-9)


def test_saliency_is_the_norm_of_the_gradient(model, ids):
    target = target_of(model, "logit")
    inputs = model.get_input_embeddings()(ids).detach().requires_grad_()
    gradient = torch.autograd.grad(target(inputs).sum(), inputs)[0]
    found = input_attribution(target, ids, "Saliency")
    torch.testing.assert_close(found.tokens, gradient.norm(dim=-1))
    columns, values = found.top(3)
    assert values[0].tolist() == sorted(found.tokens[0].tolist(), reverse=True)[:3] and columns.shape == (1, 3)


def test_the_influence_of_a_token_on_the_loss_is_the_norm_of_the_gradient(model, ids):
    embed = model.get_input_embeddings()
    inputs = embed(ids).detach().requires_grad_()
    loss = model(inputs_embeds=inputs, labels=ids).loss
    target = LossFromEmbeddings(model, ids)
    torch.testing.assert_close(target(inputs)[0], loss)
    found = input_attribution(target, ids, "Saliency")
    torch.testing.assert_close(found.tokens, torch.autograd.grad(loss, inputs)[0].norm(dim=-1))
    columns, values = found.top(10)
    assert columns.shape == (1, LENGTH) and (values.diff() <= 0).all() and values.isfinite().all()


def test_the_loss_of_a_padded_text_is_that_of_the_text_alone(model):
    ids, mask = torch.randint(0, 64, (2, LENGTH)), torch.ones(2, LENGTH, dtype=torch.long)
    mask[1, :4] = 0
    embed = model.get_input_embeddings()
    both = LossFromEmbeddings(model, ids, attention_mask=mask)(embed(ids))
    alone = LossFromEmbeddings(model, ids[1, 4:])(embed(ids[1:, 4:]))
    torch.testing.assert_close(both[1:], alone)
    with pytest.raises(ValueError, match="labels must hold a token that counts"):
        LossFromEmbeddings(model, torch.tensor([[3, -100]]))


def test_ablation_is_a_run_with_the_baseline_in_place_of_a_token(model, ids):
    target = target_of(model, "plasticity")
    found = input_attribution(target, ids, "FeatureAblation", baseline=3, perturbations_per_eval=4)
    embed = model.get_input_embeddings()
    with torch.no_grad():
        other = ids.clone()
        other[0, 2] = 3
        difference = target(embed(ids)) - target(embed(other))
    torch.testing.assert_close(found.tokens[:, 2], difference, rtol=0, atol=1e-10)
    assert found.baseline == "token 3"


def test_plasticity_is_that_of_the_outputs(model, ids):
    target = PlasticityTarget(model, [5], heads=[1])
    with torch.no_grad():
        value = target(model.get_input_embeddings()(ids))
        layers = model(ids).plasticity
    expected = sum(p[:, 1, 5] ** 2 for p in layers).sqrt()
    torch.testing.assert_close(value, expected)


def test_nothing_stays_after_an_exception(model, ids):
    with torch.no_grad():
        model(ids)
    before = traces(model)
    target = LogitsFromEmbeddings(model, LogitTarget(6, 64))
    for method in METHODS:
        with pytest.raises(ValueError, match="target and contrast must be token ids"):
            input_attribution(target, ids, method)
        assert traces(model) == before


def test_what_does_not_fit_is_refused(model, ids):
    target = target_of(model, "logit")
    with pytest.raises(ValueError, match="method must be one of"):
        input_attribution(target, ids, "DeepLift")
    with pytest.raises(ValueError, match="compares with no baseline"):
        input_attribution(target, ids, "Saliency", baseline="mean")
    with pytest.raises(ValueError, match="takes a token id as baseline"):
        input_attribution(target, ids, "LayerIntegratedGradients", baseline="mean")
    with pytest.raises(ValueError, match="baseline must be 'mean'"):
        input_attribution(target, ids, baseline="zeros")
    with pytest.raises(ValueError, match="the number to explain is the module"):
        input_attribution(target, ids, additional_forward_args=3)
