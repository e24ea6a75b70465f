"""Test-time-training language models for Hugging Face Transformers. Importing this registers the Auto classes."""

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

from .configuration_ttt import TTTConfig
from .modeling_ttt import TTTForCausalLM, TTTModel, TTTPreTrainedModel
from .ttt_cache import TTTCacheLayer, clone_cache, load_cache, save_cache
from .ttt_outputs import TTTCausalLMOutput, TTTModelOutput, TTTStats
from .version import __version__

__all__ = [
    "TTTCacheLayer",
    "TTTCausalLMOutput",
    "TTTConfig",
    "TTTForCausalLM",
    "TTTModel",
    "TTTModelOutput",
    "TTTPreTrainedModel",
    "TTTStats",
    "__version__",
    "clone_cache",
    "load_cache",
    "save_cache",
]

AutoConfig.register(TTTConfig.model_type, TTTConfig, exist_ok=True)
AutoModel.register(TTTConfig, TTTModel, exist_ok=True)
AutoModelForCausalLM.register(TTTConfig, TTTForCausalLM, exist_ok=True)
