"""The model compiles and exports as one graph and gives the numbers of eager mode."""

import pytest
import torch

from .helpers import distance, tiny, tokens


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_compiled_model_reads_and_trains_as_one_graph(kind):
    torch._dynamo.reset()
    model, ids = tiny(ttt_layer_type=kind, num_hidden_layers=1, use_cache=False), tokens(2, 10)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        got, want = compiled(ids), model(ids)
    assert distance(got.logits, want.logits) < 1e-12
    assert distance(got.plasticity, want.plasticity) < 1e-12
    model.zero_grad()
    compiled(ids, labels=ids).loss.backward()
    got = [p.grad.clone() for p in model.parameters()]
    model.zero_grad()
    model(ids, labels=ids).loss.backward()
    assert distance(got, [p.grad for p in model.parameters()]) < 1e-10


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_exported_model_gives_the_same_logits(kind):
    """With gradients on, as `torch.export` is called by default."""
    model, ids = tiny(ttt_layer_type=kind, num_hidden_layers=1, use_cache=False), tokens(2, 10)
    exported = torch.export.export(model, (ids,))
    assert distance(exported.module()(ids).logits, model(ids).logits) < 1e-12
