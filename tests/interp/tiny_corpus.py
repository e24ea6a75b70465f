"""A tokenizer of words and bytes that is made in a moment, and a tiny model for it."""

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from modeling_ttt import TTTConfig, TTTForCausalLM

BOS, EOS = "<s>", "</s>"


def make_tokenizer(bos=True):
    """Byte-level, a token per byte and a few whole words; begins texts with BOS if asked to."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    words = ["th", "the", "Ġth", "Ġthe", "an", "and", "Ġan", "Ġand"]
    vocabulary = {token: i for i, token in enumerate([BOS, EOS, *alphabet, *words])}
    merges = [
        ("t", "h"),
        ("th", "e"),
        ("Ġ", "th"),
        ("Ġth", "e"),
        ("a", "n"),
        ("an", "d"),
        ("Ġ", "an"),
        ("Ġan", "d"),
    ]
    backend = Tokenizer(models.BPE(vocabulary, merges))
    backend.add_special_tokens([BOS, EOS])
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    if bos:
        backend.post_processor = processors.TemplateProcessing(single=f"{BOS} $A", special_tokens=[(BOS, 0)])
    return PreTrainedTokenizerFast(tokenizer_object=backend, bos_token=BOS, eos_token=EOS)


def make_model(tokenizer, dtype=None, **settings):
    """Two layers, C=32, H=2, K=4; random weights."""
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2}
    config = TTTConfig(**{"vocab_size": len(tokenizer), "mini_batch_size": 4, **sizes, **settings})
    return TTTForCausalLM(config).to(dtype)
