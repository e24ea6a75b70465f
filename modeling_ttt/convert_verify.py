"""What was written is read again: shapes, finite numbers, and the logits of a fixed text, one leaf in memory."""

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from accelerate import cpu_offload
from safetensors import safe_open
from torch import Tensor

from .configuration_ttt import TTTConfig
from .convert_leaves import BLOCK_BYTES, check_finite
from .modeling_ttt import TTTModel

__all__ = ["logits_fingerprint", "verify_folder"]

Shapes = Mapping[str, tuple[int, ...]]
SHOWN = 8


def verify_folder(folder: Path, config: TTTConfig, shapes: Shapes, dtype: torch.dtype) -> dict[str, Any]:
    """Check what lies in a folder and give the fingerprint of its logits.

    ValueError when a tensor is missing, has another shape or dtype, or holds an infinity or NaN, and when the logits
    do.
    """
    stored = StoredTensors(folder)
    if set(stored) != set(shapes):
        raise ValueError(f"{folder}: wrote {sorted(set(stored) ^ set(shapes))} wrongly or not at all")
    for name, shape in shapes.items():
        parts = stored.parts(name)
        first = next(parts, torch.empty(0, dtype=dtype))
        if stored.shape(name) != shape or first.dtype != dtype:
            raise ValueError(f"{folder}: {name!r} has shape {stored.shape(name)} and {first.dtype}")
        check_finite(name, (part for some in ([first], parts) for part in some), str(folder))
    logits = _streamed_logits(stored, config)
    check_finite("logits", [logits], str(folder))
    return _summary(logits)


@torch.no_grad()
def logits_fingerprint(model: Any) -> dict[str, Any]:
    """Logits of a fixed text, to compare with the `fingerprint` in a conversion.json; best with a float32 model."""
    tokens = _fixed_text(model.config).to(model.device)
    return _summary(model(tokens, use_cache=False).logits.float())


def _fixed_text(config: TTTConfig) -> Tensor:
    """Two mini-batches and a half, [1, T]."""
    length = 2 * config.mini_batch_size + config.mini_batch_size // 2 + 1
    return (torch.arange(length) * 7919 + 1)[None] % config.vocab_size


def _summary(logits: Tensor) -> dict[str, Any]:
    """Logits [1, T, V] as a few numbers."""
    return {
        "tokens": logits.shape[1],
        "mean": float(logits.double().mean()),
        "deviation": float(logits.double().std(correction=0)),
        "last_position": [float(value) for value in logits[0, -1, :SHOWN]],
        "argmax": logits[0].argmax(-1).tolist(),
    }


class StoredTensors(Mapping[str, Tensor]):
    """The tensors in the safetensors files of a folder, read anew, as float32, each time one is asked for."""

    def __init__(self, folder: Path):
        self.places: dict[str, Path] = {}
        for file in sorted(folder.glob("*.safetensors")):
            with safe_open(file, framework="pt") as tensors:
                self.places |= dict.fromkeys(tensors.keys(), file)

    def __getitem__(self, name: str) -> Tensor:
        with safe_open(self.places[name], framework="pt") as tensors:
            return tensors.get_tensor(name).float()

    def __iter__(self) -> Iterator[str]:
        return iter(self.places)

    def __len__(self) -> int:
        return len(self.places)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of one tensor."""
        with safe_open(self.places[name], framework="pt") as tensors:
            return tuple(tensors.get_slice(name).get_shape())

    def rows(self, name: str, start: int, stop: int) -> Tensor:
        """Part of one tensor along its first dimension, in its own dtype."""
        with safe_open(self.places[name], framework="pt") as tensors:
            return tensors.get_slice(name)[start:stop]

    def parts(self, name: str) -> Iterator[Tensor]:
        """One tensor in pieces of about 16 MiB."""
        shape = self.shape(name)
        step = max(1, BLOCK_BYTES // (8 * max(1, torch.Size(shape[1:]).numel())))
        for start in range(0, shape[0], step):
            yield self.rows(name, start, start + step)


@torch.no_grad()
def _streamed_logits(stored: StoredTensors, config: TTTConfig) -> Tensor:
    """Logits [1, T, V] in float32, with no more of the model in memory than the layer that runs.

    Embedding and head, the largest leaves, are read by rows.
    """
    tokens = _fixed_text(config)[0].tolist()
    table = "model.embed_tokens.weight"
    embedded = torch.cat([stored.rows(table, token, token + 1) for token in tokens])[None].float()
    with torch.device("meta"):
        model = TTTModel(config).eval()
    cpu_offload(model, torch.device("cpu"), state_dict=_Prefixed(stored))
    hidden = model(inputs_embeds=embedded, use_cache=False, output_plasticity=False).last_hidden_state
    head = table if config.tie_word_embeddings else "lm_head.weight"
    return torch.cat([hidden @ part.float().T for part in stored.parts(head)], -1)


class _Prefixed(Mapping[str, Tensor]):
    """The base model's parameters under the names that they have in it."""

    def __init__(self, stored: StoredTensors):
        self.stored = stored

    def __getitem__(self, name: str) -> Tensor:
        return self.stored[f"model.{name}"]

    def __iter__(self) -> Iterator[str]:
        return (name.removeprefix("model.") for name in self.stored if name.startswith("model."))

    def __len__(self) -> int:
        return sum(1 for _ in self)
