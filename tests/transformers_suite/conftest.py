"""The marks that the test files of Transformers use."""

MARKS = """
accelerate_tests flash_attn_3_test flash_attn_4_test flash_attn_test is_expert_parallel_test is_fsdp_test
is_tensor_parallel_test is_training_test torch_compile_test
"""


def pytest_configure(config):
    for name in MARKS.split():
        config.addinivalue_line("markers", f"{name}: set by the test files of Transformers")
