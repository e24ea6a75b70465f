"""What Transformers asks of every model under `torch.export`, in short: one graph, the same numbers."""

import copy

import pytest
import torch
from transformers.testing_utils import torch_device


class ExportTesterMixin:
    """Exports each class; `ModelTesterMixin` inherits from it."""

    @pytest.mark.slow
    def test_torch_export_gives_the_same_outputs(self):
        config, inputs = self.model_tester.prepare_config_and_inputs_for_common()
        # Where the mask has zeros decides the grid of mini-batches, so a graph is for unpadded input.
        del inputs["attention_mask"]
        for model_class in self.all_model_classes:
            with self.subTest(model_class.__name__), torch.no_grad():
                model = model_class(copy.deepcopy(config)).to(torch_device).eval()
                expected = model(**inputs, use_cache=False)[0]
                program = torch.export.export(model, (), {**inputs, "use_cache": False}, strict=False)
                torch.testing.assert_close(program.module()(**inputs, use_cache=False)[0], expected)
