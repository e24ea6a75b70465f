"""Long real text on the bundled checkpoint: flat memory, in many calls or one, and bfloat16 close to float32.

`pytest -m slow tests/modeling_ttt/test_long_streams.py -s` prints the figures.
"""

import pydoc_data.topics
import resource
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

import modeling_ttt  # noqa: F401 - registers the Auto classes

CHECKPOINT = Path(__file__).parents[2] / "model_cards" / "ttt-linear-tiny"

pytestmark = pytest.mark.slow


def real_tokens(count):
    """[1, count] ids of the language reference that comes with Python, repeated if it is too short."""
    tokenizer = AutoTokenizer.from_pretrained(CHECKPOINT)
    text = "\n".join(pydoc_data.topics.topics.values())
    ids = torch.tensor(tokenizer(text, add_special_tokens=False)["input_ids"])
    return ids.repeat(count // len(ids) + 1)[None, :count]


def cache_bytes(cache):
    return sum(t.numel() * t.element_size() for layer in cache.layers for t in layer.tensors.values())


@torch.no_grad()
def stream_loss(model, ids, segment=2048):
    """Mean next-token loss in nats over a stream read in segments through the cache."""
    cache, total = None, torch.zeros((), dtype=torch.float64)
    for start in range(0, ids.shape[1] - 1, segment):
        piece = ids[:, start : start + segment]
        out = model(piece, past_key_values=cache, use_cache=True)
        cache = out.past_key_values
        targets = ids[0, start + 1 : start + 1 + piece.shape[1]]
        logits = out.logits[0, : len(targets)].float()
        assert torch.isfinite(logits).all()
        total += torch.nn.functional.cross_entropy(logits, targets, reduction="sum").double()
    return float(total) / (ids.shape[1] - 1)


def test_bfloat16_stays_within_two_percent_of_float32_over_32k_tokens():
    ids = real_tokens(32_768)
    losses = {}
    for dtype in (torch.float32, torch.bfloat16):
        model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=dtype).eval()
        losses[dtype] = stream_loss(model, ids)
    print(
        f"\nloss over 32,768 tokens: float32 {losses[torch.float32]:.4f}, bfloat16 {losses[torch.bfloat16]:.4f} nats"
    )
    assert losses[torch.bfloat16] == pytest.approx(losses[torch.float32], rel=0.02)


@torch.no_grad()
def test_131072_tokens_stream_through_a_cache_of_constant_size():
    model = AutoModelForCausalLM.from_pretrained(CHECKPOINT, dtype=torch.float32).eval()
    ids = real_tokens(131_072)
    cache, sizes, peaks = None, [], []
    for start in range(0, ids.shape[1], 2048):
        cache = model(ids[:, start : start + 2048], past_key_values=cache, logits_to_keep=1).past_key_values
        sizes.append(cache_bytes(cache))
        peaks.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
    print(f"\ncache bytes after 2,048 tokens {sizes[0]:,}, after 131,072 tokens {sizes[-1]:,}")
    print(
        f"peak resident memory after 16,384 tokens {peaks[7] / 1024:.0f} MiB, after 131,072 {peaks[-1] / 1024:.0f} MiB"
    )
    assert len(set(sizes)) == 1
    assert peaks[-1] < 1.05 * peaks[7]


@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="reads Linux's memory counters")
def test_131072_tokens_in_one_call_need_less_than_a_gigabyte():
    """In a process of its own: what the call holds at its peak beyond what was resident before it."""
    script = f"""
import resource, torch, modeling_ttt
from pathlib import Path
from transformers import AutoModelForCausalLM
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained({str(CHECKPOINT)!r}, dtype=torch.float32).eval()
ids = torch.randint(3, model.config.vocab_size, (1, 131_072))
with torch.no_grad():
    model(ids[:, :64])
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * resource.getpagesize()
    out = model(ids, logits_to_keep=1)
assert torch.isfinite(out.logits).all() and out.plasticity[0].shape[-1] == 131_072
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 - resident)
"""
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True)
    needed = int(done.stdout.split()[-1])
    print(f"\npeak of one call of 131,072 tokens: {needed / 2**20:.0f} MiB beyond the loaded model")
    assert needed < 1e9
