"""Captum's text attribution agrees with forward passes, keeps repeated tokens apart, refuses what would be wrong."""

import pytest
import torch
from captum.attr import (
    DeepLift,
    FeatureAblation,
    LayerIntegratedGradients,
    LLMAttribution,
    LLMAttributionResult,
    TextTokenInput,
)
from transformers import PreTrainedTokenizerFast

from interp.captum_llm import text_attribution
from tests.interp.tiny_tokenizers import byte_level

TEXT, TARGET = " the river the house", " the cold"


@pytest.fixture(scope="module")
def tokenizer():
    return PreTrainedTokenizerFast(tokenizer_object=byte_level(), eos_token="</s>")


@pytest.fixture
def model(layer_type, tokenizer):
    from modeling_ttt import TTTConfig, TTTForCausalLM
    from tests.conftest import TINY

    model = TTTForCausalLM(TTTConfig(**TINY | {"vocab_size": len(tokenizer)}, ttt_layer_type=layer_type)).eval()
    torch.manual_seed(1)
    for parameter in model.parameters():
        if parameter.dim() > 1:
            torch.nn.init.normal_(parameter, std=0.2)
    return model


def log_probs(model, prompt, told):
    with torch.no_grad():
        logits = model(torch.cat([prompt, told])[None]).logits[0].log_softmax(-1)
    return logits[len(prompt) - 1 : -1].gather(1, told[:, None])[:, 0]


def test_ablations_are_forward_passes_and_repeated_tokens_stay_apart(model, tokenizer):
    inputs = TextTokenInput(TEXT, tokenizer)
    found = text_attribution(FeatureAblation(model), tokenizer).attribute(inputs, TARGET)
    prompt, told = tokenizer.encode(TEXT, return_tensors="pt")[0], torch.tensor(tokenizer.encode(TARGET))
    full = log_probs(model, prompt, told)
    for i in range(len(prompt)):
        other = prompt.clone()
        other[i] = 0
        expected = full - log_probs(model, other, told)
        torch.testing.assert_close(found.token_attr[:, i], expected, rtol=1e-4, atol=1e-5)
    assert isinstance(found, LLMAttributionResult)
    assert len(found.seq_attr_dict) == len(prompt) > len(set(found.input_tokens))


def test_token_by_token_agrees_and_the_cached_path_is_refused(model, tokenizer):
    inputs = TextTokenInput(TEXT, tokenizer)
    ours = text_attribution(FeatureAblation(model), tokenizer)
    whole, tokens = (ours.attribute(inputs, TARGET, forward_in_tokens=x) for x in (False, True))
    torch.testing.assert_close(whole.token_attr, tokens.token_attr, rtol=1e-4, atol=1e-5)
    with pytest.raises(ValueError, match="would learn it twice"):
        ours.attribute(inputs, TARGET, use_cached_outputs=True)
    with pytest.raises(ValueError, match="perturbations_per_eval must be 1"):
        ours.attribute(inputs, TARGET, perturbations_per_eval=2)


def test_the_cached_path_of_captum_is_wrong_as_the_refusal_says(model, tokenizer):
    inputs = TextTokenInput(TEXT, tokenizer)
    right = text_attribution(FeatureAblation(model), tokenizer).attribute(inputs, TARGET)
    try:
        theirs = LLMAttribution(FeatureAblation(model), tokenizer).attribute(inputs, TARGET)
    except Exception:
        return  # an error is no silent mistake
    assert (theirs.token_attr - right.token_attr).abs().max() > 1e-4, "mended upstream: the cached path can be allowed"


def test_gradients_sum_to_the_difference(model, tokenizer):
    method = LayerIntegratedGradients(model, model.get_input_embeddings())
    found = text_attribution(method, tokenizer).attribute(TextTokenInput(TEXT, tokenizer), TARGET, n_steps=64)
    prompt, told = tokenizer.encode(TEXT, return_tensors="pt")[0], torch.tensor(tokenizer.encode(TARGET))
    assert found.token_attr.shape == (len(told), len(prompt))
    first = told[:1]
    difference = log_probs(model, prompt, first) - log_probs(model, torch.zeros_like(prompt), first)
    torch.testing.assert_close(found.token_attr[0].sum(), difference[0], rtol=1e-2, atol=1e-2)
    assert all(p.grad is None and p.requires_grad for p in model.parameters())
    assert not model.get_input_embeddings()._forward_hooks


def test_what_does_not_fit_is_refused(model, tokenizer):
    with pytest.raises(ValueError, match="method must be one of"):
        text_attribution(DeepLift(model), tokenizer)
    with pytest.raises(ValueError, match="made with the model itself"):
        text_attribution(FeatureAblation(lambda x: x), tokenizer)
    with pytest.raises(ValueError, match="attr_target must be"):
        text_attribution(FeatureAblation(model), tokenizer, "logit")
    with pytest.raises(ValueError, match="must not be empty"):
        text_attribution(FeatureAblation(model), tokenizer).attribute(TextTokenInput(TEXT, tokenizer), "")
