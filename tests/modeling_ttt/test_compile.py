"""The model compiles and exports as one graph and gives the numbers of eager mode."""

import pytest
import torch
from torch._dynamo.testing import CompileCounterWithBackend

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


@pytest.mark.parametrize("kind", ["linear", "mlp"])
def test_compiled_decoding_does_not_compile_anew_for_every_token(kind):
    torch._dynamo.reset()
    counter = CompileCounterWithBackend("aot_eager")
    model, ids = tiny(ttt_layer_type=kind, num_hidden_layers=2), tokens(1, 40)
    compiled = torch.compile(model, fullgraph=True, backend=counter)
    with torch.no_grad():
        want = model(ids)
        cache = model(ids[:, :8], use_cache=True).past_key_values
        got, graphs = [], []
        for t in range(8, 40):
            got.append(compiled(ids[:, t : t + 1], past_key_values=cache))
            graphs.append(counter.frame_count)
    assert distance(torch.cat([out.logits for out in got], 1), want.logits[:, 8:]) < 1e-12
    # One for the first token, one for any, and both again for the slot that commits.
    assert graphs[-1] <= 4
    assert graphs[15] == graphs[-1], "a second pair of mini-batches needs nothing new"
