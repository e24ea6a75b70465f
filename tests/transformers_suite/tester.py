"""The tiny models the suite runs on."""

import torch
from transformers.testing_utils import torch_device

from modeling_ttt import TTTConfig, TTTForCausalLM, TTTModel


class TTTModelTester:
    """A configuration and inputs, in the form `ModelTesterMixin` and its relatives read.

    Sizes are those that the FSDP tests set by hand (C=64, H=4), so that nothing derived from them goes stale; the
    sequence ends inside a mini-batch.
    """

    config_class = TTTConfig
    base_model_class = TTTModel
    causal_lm_class = TTTForCausalLM
    all_model_classes = (TTTModel, TTTForCausalLM)

    batch_size = 3
    seq_length = 10
    is_training = True
    vocab_size = 99
    hidden_size = 64
    intermediate_size = 128
    num_hidden_layers = 2
    num_attention_heads = 4
    mini_batch_size = 4

    def __init__(self, parent, ttt_layer_type, backbone=None):
        self.parent = parent
        self.ttt_layer_type = ttt_layer_type
        self.backbone = backbone or {}

    def config_values(self):
        """The fields that differ from the defaults."""
        return {
            "ttt_layer_type": self.ttt_layer_type,
            "vocab_size": self.vocab_size,
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "num_hidden_layers": self.num_hidden_layers,
            "num_attention_heads": self.num_attention_heads,
            "mini_batch_size": self.mini_batch_size,
            "max_position_embeddings": 64,
            "pad_token_id": 0,
            "bos_token_id": 1,
            "eos_token_id": 2,
            **self.backbone,
        }

    def get_config(self):
        return TTTConfig(**self.config_values())

    def prepare_config_and_inputs_for_common(self):
        """A configuration and a batch whose second row is padded on the left."""
        input_ids = torch.randint(3, self.vocab_size, (self.batch_size, self.seq_length), device=torch_device)
        mask = torch.ones_like(input_ids)
        mask[1, :3] = 0
        return self.get_config(), {"input_ids": input_ids, "attention_mask": mask}
