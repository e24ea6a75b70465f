"""The common model tests of Transformers, run on TTTModel and TTTForCausalLM.

Transformers carries these tests in its source distribution only, so `make suite` gets that one for the installed
version and keeps its test files out of the repository. Without them the tests here skip.
"""
