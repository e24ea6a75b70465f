"""Which tests of the suite do not hold for TTT models, and why.

A name stands for all parameters of a test. Every entry is checked: excluded tests still run, and one that passes
makes its entry stale, which fails.
"""

import re

_NO_ATTENTION = "a TTT layer has no attention: no weights to return and no implementation to choose"
_ONE_CONFIG = "a text model with one configuration, no sub-configurations"
_NO_EXPERTS = "a dense model without experts"
_NO_CONVERSION = "checkpoints load under the names they were saved with, nothing is renamed or converted"
_ROPE_IN_MINI_BATCH = "rotary positions repeat every mini-batch, so there is no long context to scale the angles for"
_DECODER_ONLY = "a decoder-only model"
_NOTHING_IN_FLOAT32 = "no parameter is kept in float32: W_0 follows the model dtype, the state is float32"

EXCLUDED: dict[str, str] = {
    "test_attention_outputs": _NO_ATTENTION,
    "test_attn_implementation_composite_models": _NO_ATTENTION,
    "test_can_set_attention_dynamically": _NO_ATTENTION,
    "test_can_set_attention_dynamically_composite_model": _NO_ATTENTION,
    "test_eager_matches_sdpa_inference": _NO_ATTENTION,
    "test_sdpa_can_dispatch_composite_models": _NO_ATTENTION,
    "test_sdpa_can_dispatch_non_composite_models": _NO_ATTENTION,
    "test_sliding_window_mask": _NO_ATTENTION,
    "test_internal_model_config_and_subconfig_are_same": _ONE_CONFIG,
    "test_eager_matches_batched_and_grouped_inference": _NO_EXPERTS,
    "test_moe_models_record_router_logits": _NO_EXPERTS,
    "test_output_router_logits_from_config": _NO_EXPERTS,
    "test_fsdp2_expert_parallel_2d_vs_ddp": _NO_EXPERTS,
    "test_fsdp2_expert_parallel_bf16_grads": _NO_EXPERTS,
    "test_hsdp_grad_accumulation_vs_single_device_2_expert_parallel": _NO_EXPERTS,
    "test_moe_parallel_plans_shard_experts": _NO_EXPERTS,
    "test_can_load_from_already_mapped_keys": _NO_CONVERSION,
    "test_reverse_loading_mapping": _NO_CONVERSION,
    "test_model_rope_scaling_frequencies": _ROPE_IN_MINI_BATCH,
    "test_model_rope_scaling_from_config": _ROPE_IN_MINI_BATCH,
    "test_model_rope_with_partial_rotation": "every dimension of a head is rotated, as in the official code",
    "test_vision_axial_rope": "a text model",
    "test_encoder_decoder_loss_no_double_shift": _DECODER_ONLY,
    "test_resize_position_vector_embeddings": "no table of position embeddings",
    "test_tp_generation_quantized": "free-running tokens of two float8 models that round differently drift apart",
    "test_keep_in_fp32_modules": _NOTHING_IN_FLOAT32,
    "test_keep_in_fp32_modules_exist": _NOTHING_IN_FLOAT32,
}

# How the reasons of skips begin that say something of the machine and not of the model.
MACHINE_REASONS = (
    "test requires",
    "test is slow",
    "Tensor parallel tests require",
    "Tensor parallel mixin tests are CPU-only",
)


def entry(test_name: str) -> str | None:
    """The name under which a test is excluded, or None; `parameterized.expand` adds `_<number>_<parameter>`."""
    return next((name for name in (test_name, re.sub(r"_\d+(_\w+)?$", "", test_name)) if name in EXCLUDED), None)
