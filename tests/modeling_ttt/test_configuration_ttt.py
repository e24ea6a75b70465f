"""The configuration: official keys and sizes, typed and checked fields, round trips."""

import json

import pytest

from modeling_ttt import TTTConfig
from modeling_ttt.configuration_ttt import PRESETS

# The official configuration file of a Mamba-backbone TTT-Linear, key for key.
OFFICIAL = {
    "vocab_size": 32000,
    "hidden_size": 768,
    "intermediate_size": 2048,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 2048,
    "initializer_range": 0.02,
    "rms_norm_eps": 1e-6,
    "use_cache": False,
    "pad_token_id": None,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pretraining_tp": 1,
    "tie_word_embeddings": True,
    "rope_theta": 10000.0,
    "use_gate": True,
    "share_qk": True,
    "ttt_layer_type": "linear",
    "ttt_base_lr": 1.0,
    "mini_batch_size": 16,
    "pre_conv": True,
    "conv_kernel": 4,
    "scan_checkpoint_group_size": 0,
}


def test_official_configuration_is_accepted_key_for_key():
    config = TTTConfig(**OFFICIAL)
    for key, value in OFFICIAL.items():
        if key not in ("rope_theta", "scan_checkpoint_group_size"):
            assert getattr(config, key) == value
    assert config.rope_parameters["rope_theta"] == 10000.0
    assert TTTConfig(**{**OFFICIAL, "rope_theta": 500.0}).rope_parameters["rope_theta"] == 500.0


@pytest.mark.parametrize(
    ("size", "width", "ffn", "layers", "heads"),
    [
        ("125m", 768, 2048, 12, 12),
        ("350m", 1024, 2736, 24, 16),
        ("760m", 1536, 4096, 24, 16),
        ("1b", 2048, 5504, 24, 32),
    ],
)
def test_presets_have_the_official_sizes(size, width, ffn, layers, heads):
    config = TTTConfig.preset(size, ttt_layer_type="mlp")
    assert (config.hidden_size, config.intermediate_size) == (width, ffn)
    assert (config.num_hidden_layers, config.num_attention_heads) == (layers, heads)
    assert config.ttt_layer_type == "mlp" and config.mini_batch_size == 16 and config.vocab_size == 32000


def test_unknown_preset_names_the_known_ones():
    with pytest.raises(ValueError, match=r"size must be one of \['125m', '1b', '350m', '760m'\], got '7b'"):
        TTTConfig.preset("7b")
    assert set(PRESETS) == {"125m", "350m", "760m", "1b"}


def test_base_learning_rate_follows_the_inner_net():
    assert TTTConfig().base_lr == 1.0
    assert TTTConfig(ttt_layer_type="mlp").base_lr == 0.1
    assert TTTConfig(ttt_layer_type="mlp", ttt_base_lr=0.5).base_lr == 0.5
    assert TTTConfig(ttt_base_lr=1).base_lr == 1


def test_configuration_round_trips_through_json(tmp_path):
    config = TTTConfig(**OFFICIAL, frozen_layers=[3], frozen_heads={0: [1, 2]}, frozen_from=100)
    config.save_pretrained(tmp_path)
    loaded = TTTConfig.from_pretrained(tmp_path)
    assert loaded.to_dict() == config.to_dict()
    assert "inner_net" not in json.loads((tmp_path / "config.json").read_text())


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ({"ttt_inner_step": 3}, r"unknown configuration keys \['ttt_inner_step'\]"),
        ({"frozen_layer": [1]}, "unknown configuration keys"),
        ({"hidden_size": "big"}, "hidden_size"),
        ({"hidden_size": 100, "num_attention_heads": 3}, "multiple of num_attention_heads, got 100 and 3"),
        ({"hidden_size": 9, "num_attention_heads": 3}, "must be even, got 3"),
        ({"ttt_layer_type": "cubic"}, r"ttt_layer_type must be one of \['linear', 'mlp'\], got 'cubic'"),
        ({"hidden_act": "swish9"}, "hidden_act must be one of"),
        ({"rms_norm_eps": 0.0}, "rms_norm_eps must be positive"),
        ({"ttt_backend": "cuda"}, "ttt_backend must be"),
        ({"mini_batch_size": 0}, "mini_batch_size must be at least 1, got 0"),
        ({"ttt_base_lr": -1.0}, "ttt_base_lr must be finite and not negative"),
        ({"ttt_base_lr": float("nan")}, "ttt_base_lr must be finite"),
        ({"initializer_range": -1.0}, "initializer_range must not be negative"),
        ({"rope_theta": 0.0}, "rope_theta must be positive"),
        ({"pad_token_id": 32000}, r"pad_token_id must lie in 0\.\.31999, got 32000"),
        ({"frozen_heads": {0: 1}}, "frozen_heads must be"),
        ({"frozen_heads": {"a": [1]}}, "frozen_heads must be"),
        ({"rope_parameters": {"rope_type": "linear", "factor": 2.0}}, "rope_type"),
    ],
    ids=str,
)
def test_bad_values_are_refused_by_name(bad, message):
    with pytest.raises(Exception, match=message):
        TTTConfig(**bad)
