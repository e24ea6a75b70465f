"""The linear layers: a subclass of `nn.Linear`, a plain sum for one token in compiled code."""

import pytest
import torch
from torch import nn

from modeling_ttt.projection import Projection

from .helpers import distance, tiny, tokens


def one_row_products(layer, *inputs):
    """How many of the calls a compiler traces use a sum in place of a matrix product."""
    graphs = []

    def backend(graph, _):
        graphs.append(graph)
        return graph.forward

    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend=backend, dynamic=False)
    with torch.no_grad():
        for x in inputs:
            assert torch.allclose(compiled(x), nn.functional.linear(x, layer.weight), atol=1e-6)
    return sum("linear" not in graph.code for graph in graphs)


def test_compiled_code_multiplies_one_token_by_a_sum_and_no_other():
    layer = Projection(8, 5)
    assert one_row_products(layer, torch.randn(1, 1, 8)) == 1
    assert one_row_products(layer, torch.randn(1, 2, 8), torch.randn(2, 1, 8)) == 0


def test_compiled_code_rounds_as_autocast_does():
    """Or a decoding step would go on in another dtype than the prompt."""
    layer, x = Projection(8, 5), torch.randn(1, 1, 8)
    torch._dynamo.reset()
    compiled = torch.compile(layer, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        assert compiled(x).dtype == torch.float32
        with torch.autocast("cpu", torch.bfloat16):
            assert compiled(x).dtype == layer(x).dtype == torch.bfloat16


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_program_keeps_its_products(strict):
    torch._dynamo.reset()
    model = tiny(num_hidden_layers=1, use_cache=False)
    with torch.no_grad():
        program = torch.export.export(model, (tokens(1, 1),), strict=strict)
    names = [str(node.target) for node in program.graph.nodes]
    layers = [m for m in model.modules() if isinstance(m, nn.Linear)]
    assert sum("aten.linear" in name for name in names) == len(layers) + 1  # and that of the learning rate


class Packed(torch.Tensor):
    """Stands for weights with a product of their own, as those of quantised models."""


def test_weights_with_a_product_of_their_own_keep_it():
    layer = Projection(8, 5)
    assert layer._is_one_row(torch.randn(1, 1, 8))
    assert not layer._is_one_row(torch.randn(1, 1, 8, dtype=torch.float64))
    layer.weight = nn.Parameter(layer.weight.detach().as_subclass(Packed))
    assert type(layer.weight) is not nn.Parameter and not layer._is_one_row(torch.randn(1, 1, 8))


def test_it_has_the_parameters_of_a_linear_layer():
    assert isinstance(Projection(8, 5), nn.Linear)
    assert list(Projection(8, 5).state_dict()) == ["weight"]


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_generated_code_decodes_as_eager_mode_does(kind):
    torch._dynamo.reset()
    model, ids = tiny(torch.float32, ttt_layer_type=kind), tokens(1, 24)
    compiled = torch.compile(model, fullgraph=True)
    with torch.no_grad():
        want = model(ids).logits
        cache = model(ids[:, :8], use_cache=True).past_key_values
        got = [compiled(ids[:, t : t + 1], past_key_values=cache).logits for t in range(8, 24)]
    assert distance(torch.cat(got, 1), want[:, 8:]) < 1e-4 * want.abs().max()
