"""The common model tests of Transformers pass for TTTModel and TTTForCausalLM with each inner net and backbone."""

import unittest

import pytest

from tests.transformers_suite.exclusions import EXCLUDED, entry
from tests.transformers_suite.fetch import sources_available

if not sources_available():
    pytest.skip("the test files of Transformers are not here: run `make suite`", allow_module_level=True)

from tests.transformers_suite.generation_mixin import GenerationTesterMixin
from tests.transformers_suite.strict import StrictTests, suite_tests, unaccounted_skips
from tests.transformers_suite.upstream.test_configuration_common import ConfigTester
from tests.transformers_suite.upstream.test_fsdp_mixin import FSDPTesterMixin
from tests.transformers_suite.upstream.test_modeling_common import ModelTesterMixin
from tests.transformers_suite.upstream.test_tensor_parallel_mixin import TensorParallelTesterMixin
from tests.transformers_suite.upstream.test_training_mixin import TrainingTesterMixin


class _ModelTests(StrictTests, ModelTesterMixin, GenerationTesterMixin):
    has_attentions = False
    # The library lets configuration files without a copyright line of 2023 or later off this test.
    test_can_init_all_missing_weights_before_2023 = True

    def test_config(self):
        values = self.model_tester.config_values()
        ConfigTester(self, config_class=self.model_tester.config_class, **values).run_common_tests()


class TestLinear(_ModelTests, unittest.TestCase):
    ttt_layer_type = "linear"


class TestMLP(_ModelTests, unittest.TestCase):
    ttt_layer_type = "mlp"


class TestMambaBackbone(_ModelTests, unittest.TestCase):
    ttt_layer_type = "linear"
    backbone = {"share_qk": True, "pre_conv": True, "use_gate": True}


@pytest.mark.slow
class TestTraining(StrictTests, TrainingTesterMixin, unittest.TestCase):
    pass


@pytest.mark.slow
class TestTensorParallel(StrictTests, TensorParallelTesterMixin, unittest.TestCase):
    pass


@pytest.mark.slow
class TestFSDP(StrictTests, FSDPTesterMixin, unittest.TestCase):
    def _skip_if_insufficient_devices(self, world_size):
        """Processes of the gloo backend may share a core."""


SUITES = (TestLinear, TestMLP, TestMambaBackbone, TestTraining, TestTensorParallel, TestFSDP)


@pytest.mark.parametrize("suite", SUITES)
def test_a_skip_by_decorator_is_due_to_the_machine_or_listed(suite):
    assert unaccounted_skips(suite) == {}


def test_every_exclusion_names_a_test_of_the_suite():
    assert set(EXCLUDED) == {entry(name) for suite in SUITES for name in suite_tests(suite)} - {None}
