"""The model compiles as one graph, reading and training, and gives the numbers of eager mode."""

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
