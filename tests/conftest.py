"""What all tests share: fixed seeds, no network, tiny models."""

import os

# Before anything imports huggingface_hub or datasets, which read these once.
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_DATASETS_OFFLINE"] = "1"
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import random

import numpy as np
import pytest
import torch

# Tiny models gain nothing from a second thread, and tests run beside each other.
torch.set_num_threads(1)

TINY = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "mini_batch_size": 4,
}


@pytest.fixture(autouse=True)
def fixed_seeds():
    """The same random numbers in every test, whatever ran before it."""
    random.seed(0)
    np.random.seed(0)
    torch.manual_seed(0)


@pytest.fixture(params=["linear", "mlp"])
def layer_type(request):
    """Both inner nets, one after the other."""
    return request.param


@pytest.fixture
def tiny_config(layer_type):
    """A configuration of two layers, C=32, H=2, K=4, for each inner net."""
    from modeling_ttt import TTTConfig

    return TTTConfig(**TINY, ttt_layer_type=layer_type)


@pytest.fixture
def tiny_model(tiny_config):
    """A TTTForCausalLM with random weights, in eval mode, for each inner net."""
    from modeling_ttt import TTTForCausalLM

    torch.manual_seed(0)
    return TTTForCausalLM(tiny_config).eval()
