"""Values, none of them the default, that every configuration class must take."""

config_common_kwargs = {
    "architectures": ["TTTForCausalLM"],
    "chunk_size_feed_forward": 3,
    "dtype": "float16",
    "id2label": {0: "only"},
    "label2id": {"only": 0},
    "output_attentions": True,
    "output_hidden_states": True,
    "problem_type": "regression",
    "return_dict": False,
}
