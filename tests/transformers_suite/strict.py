"""Makes the suite account for every test it does not run."""

import functools
import unittest
from typing import ClassVar
from unittest import mock

from transformers.models.auto import modeling_auto

from tests.transformers_suite.exclusions import EXCLUDED, MACHINE_REASONS, entry
from tests.transformers_suite.tester import TTTModelTester
from tests.transformers_suite.upstream import test_fsdp_mixin, test_tensor_parallel_mixin


class StrictTests:
    """Base of the test classes: a test that skips must be listed in EXCLUDED, one that is listed must not pass.

    Many tests look a class or its `model_type` up in tables of the library and do nothing for what they do not find
    there, so the names of TTT stand in those tables while a test runs.
    """

    ttt_layer_type = "linear"
    backbone: ClassVar[dict] = {}
    # The mixins of the suite declare it abstract.
    model_tester = None
    all_model_classes = TTTModelTester.all_model_classes

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        for name in suite_tests(cls):
            if entry(name) and not hasattr(getattr(cls, name), "excluded"):
                setattr(cls, name, _expected_not_to_pass(getattr(cls, name), EXCLUDED[entry(name)]))

    def setUp(self):
        super().setUp()
        self.skipped_a_part = False
        self.model_tester = TTTModelTester(self, self.ttt_layer_type, self.backbone)
        names = {"MODEL_MAPPING_NAMES": "TTTModel", "MODEL_FOR_CAUSAL_LM_MAPPING_NAMES": "TTTForCausalLM"}
        for table, name in names.items():
            self._patch(mock.patch.dict(getattr(modeling_auto, table), {TTTModelTester.config_class.model_type: name}))
        # None means every model type.
        self._patch(mock.patch.object(test_fsdp_mixin, "FSDP_DISTRIBUTED_TEST_MODEL_TYPES", None))
        self._patch(mock.patch.object(test_tensor_parallel_mixin, "TP_DISTRIBUTED_TEST_MODEL_TYPES", None))

    def _patch(self, patch):
        patch.start()
        self.addCleanup(patch.stop)

    def skipTest(self, reason):
        """Refuse a skip nobody has accounted for."""
        if entry(self._testMethodName) is None and not reason.startswith(MACHINE_REASONS):
            self.fail(f"skips with {reason!r} and is not listed in EXCLUDED")
        # In a subtest the exception does not reach the test.
        self.skipped_a_part = True
        super().skipTest(reason)


def suite_tests(cls):
    """The tests of a class."""
    return [name for name in dir(cls) if name.startswith("test_") and callable(getattr(cls, name))]


def unaccounted_skips(cls):
    """Tests of a class that a decorator skips for a reason that is no property of the machine, with the reason."""
    tests = {name: getattr(cls, name) for name in suite_tests(cls)}
    reasons = {n: test.__unittest_skip_why__ for n, test in tests.items() if getattr(test, "__unittest_skip__", False)}
    return {name: why for name, why in reasons.items() if not why.startswith(MACHINE_REASONS)}


def _expected_not_to_pass(test, reason):
    @functools.wraps(test)
    def run(self):
        try:
            test(self)
        except Exception:
            raise unittest.SkipTest(reason) from None
        if self.skipped_a_part:
            raise unittest.SkipTest(reason)
        self.fail(f"passes, so its entry in EXCLUDED is stale ({reason})")

    run.excluded = True
    # The skip mark of a decorator would hide that a test has begun to pass.
    run.__unittest_skip__ = False
    return run
