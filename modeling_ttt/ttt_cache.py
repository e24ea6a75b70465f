"""The inner state in the cache classes of Transformers, and keeping, forking and shipping a learnt state.

Importing this file registers the layer type "ttt", so `DynamicCache(config=...)`, which `generate` and others build
themselves, holds one `TTTCacheLayer` per TTT layer.
"""

import copy
import functools
import json
import os
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

# The first is what Transformers asks of any layer with a state of constant size.
from transformers.cache_utils import (
    STATIC_LAYER_TYPE_MAPPING,
    Cache,
    CacheLayerMixin,
    DynamicCache,
    LinearAttentionCacheLayerMixin,
)

from .inner_net import INNER_NETS
from .token_grid import common_value

__all__ = ["TTTCacheLayer", "clone_cache", "load_cache", "save_cache"]

FORMAT_VERSION = "1"


class TTTCacheLayer(LinearAttentionCacheLayerMixin, CacheLayerMixin):
    """The state of one TTT layer: a bag of named tensors, batch first, and the number of columns fed so far.

    `tensors` holds the inner weights at the start of the open mini-batch (`W1 b1 W2 b2`), the writes of the open
    mini-batch (`x1 g1 ...`), the tails of the short convolutions (`tail_*`), and per row `position` (real tokens of
    the current document) and `seen` (all real tokens), both int64 on the CPU. It is empty before the first token.
    `start` is `position` as a number where it is one for all rows, else None.
    Tensors are replaced, never changed in place, and successive states share those that did not change: copy one
    (`clone`) before writing to it.
    """

    _layer_type = "ttt"
    is_compileable = False
    is_sliding = False
    is_croppable = False

    def __init__(self, **kwargs):
        CacheLayerMixin.__init__(self)
        LinearAttentionCacheLayerMixin.__init__(self, number_of_states=1)
        self.tensors: dict[str, Tensor] = {}
        self.length = 0
        self.start: int | None = 0

    def store(self, tensors: dict[str, Tensor], columns: int, start: int | None) -> None:
        """Replace the state by the one after `columns` more columns (masked ones included)."""
        self.tensors, self.start = tensors, start
        self.length += columns
        self.is_initialized = True
        self.has_previous_state[0] = True
        self.device, self.dtype = tensors["W1"].device, tensors["W1"].dtype

    def clone(self) -> "TTTCacheLayer":
        """A detached copy that shares no storage."""
        twin = type(self)()
        twin.length = self.length
        if self.tensors:
            twin.store({name: t.detach().clone() for name, t in self.tensors.items()}, 0, self.start)
        return twin

    @property
    def batch_size(self) -> int:
        """Number of rows, -1 before the first token."""
        return self.tensors["W1"].shape[0] if self.tensors else -1

    def get_seq_length(self) -> int:
        return self.length

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return query_length + self.length, 0

    def get_max_length(self) -> int:
        return -1

    def reset(self) -> None:
        self.tensors, self.length, self.start, self.is_initialized = {}, 0, 0, False
        self.has_previous_state[0] = False

    def reorder_cache(self, beam_idx: Tensor) -> None:
        self.batch_select_indices(beam_idx)

    def batch_select_indices(self, indices: Tensor) -> None:
        self._map(lambda t: t[indices.to(t.device)])
        if self.start is None:
            self.start = common_value(self.tensors["position"])

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._map(lambda t: t.repeat_interleave(repeats, 0))

    def offload(self) -> None:
        self._map(lambda t: t.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        # The counters stay on the CPU.
        self._map(lambda t: t.to(self.device, non_blocking=True) if t.is_floating_point() else t)

    def crop(self, tokens_to_remove: int) -> None:
        if tokens_to_remove != 0:
            raise ValueError(
                f"a TTT state cannot be cropped by {tokens_to_remove} tokens: what was written is summed into the "
                "weights. Keep a clone (clone_cache) of the state to go back to."
            )

    def lazy_initialization(self, *args, **kwargs) -> None:
        """Nothing to do: the first `store` brings the tensors."""

    def update(self, *args, **kwargs):
        raise TypeError("a TTT layer keeps no keys and values; its state is replaced by `store`")

    def update_conv_state(self, *args, **kwargs):
        raise TypeError("the convolution tails of a TTT layer are part of its state, see `store`")

    def update_recurrent_state(self, *args, **kwargs):
        raise TypeError("the state of a TTT layer is replaced by `store`")

    def _map(self, function) -> None:
        self.tensors = {name: function(t) for name, t in self.tensors.items()}


STATIC_LAYER_TYPE_MAPPING["ttt"] = TTTCacheLayer


def clone_cache(cache: Cache) -> Cache:
    """A deep, detached copy of a cache: go on from either, the other stays as it is."""
    _check_cache(cache)
    twin = copy.copy(cache)
    twin.layers = []
    for layer in cache.layers:
        if hasattr(layer, "clone"):
            twin.layers.append(layer.clone())
            continue
        other = copy.copy(layer)
        vars(other).update({name: _detached(value) for name, value in vars(layer).items()})
        twin.layers.append(other)
    return twin


def save_cache(cache: Cache, path: str | os.PathLike) -> None:
    """Write a learnt state to a safetensors file (TTT layers only), whole or not at all.

    Raises:
        ValueError: the cache holds no TTT state yet, or layers of another kind.
    """
    _check_cache(cache)
    path, tensors, lengths = Path(path), {}, []
    for i, layer in enumerate(cache.layers):
        if not getattr(layer, "tensors", None):
            raise ValueError(f"layer {i} of the cache ({type(layer).__name__}) holds no TTT state to save")
        lengths.append(layer.length)
        for name, tensor in layer.tensors.items():
            tensors[f"layers.{i}.{name}"] = tensor.detach().contiguous().cpu().clone()
    if not lengths:
        raise ValueError("the cache has no layers to save")
    metadata = {"format": "ttt_cache", "version": FORMAT_VERSION, "lengths": json.dumps(lengths)}
    beside = path.with_name(path.name + ".tmp")
    try:
        save_file(tensors, beside, metadata=metadata)
        os.replace(beside, path)
    finally:
        beside.unlink(missing_ok=True)


def load_cache(path: str | os.PathLike, config, device: torch.device | str = "cpu") -> DynamicCache:
    """Read a state written by `save_cache` for a model with this configuration.

    Raises:
        ValueError: the file is no TTT cache, of another version, or of a model of another shape.
    """
    try:
        with safe_open(path, "pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - not a dict
    except SafetensorError as error:
        raise ValueError(f"{path} is not a safetensors file: {error}") from error
    if metadata.get("format") != "ttt_cache" or metadata.get("version") != FORMAT_VERSION:
        raise ValueError(f"{path} is not a TTT cache of format version {FORMAT_VERSION}, its header says {metadata}")
    cache, lengths = DynamicCache(config=config), json.loads(metadata["lengths"])
    if len(lengths) != len(cache.layers):
        raise ValueError(f"{path} holds {len(lengths)} layers, the configuration has {len(cache.layers)}")
    for i, (layer, length) in enumerate(zip(cache.layers, lengths, strict=True)):
        prefix = f"layers.{i}."
        named = {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}
        check_state(named, config, f"layer {i} of {path}")
        start = common_value(named["position"])
        layer.store({n: t.to(device) if t.is_floating_point() else t for n, t in named.items()}, length, start)
    return cache


def check_state(tensors: dict[str, Tensor], config, where: str, batch: int | None = None) -> None:
    """Raise ValueError unless the tensors are the state of a layer of a model with this configuration."""
    rows = tensors["W1"].shape[0] if "W1" in tensors else None
    if batch is not None and rows != batch:
        raise ValueError(f"past_key_values holds {rows} rows, the batch has {batch} ({where})")
    tails = tuple(n for n, needed in (("tail_pre", config.pre_conv), ("tail_qk", config.share_qk)) if needed)
    sizes = (config.num_attention_heads, config.mini_batch_size, config.conv_kernel, config.hidden_size)
    expected = _state_shapes(config.ttt_layer_type, *sizes, tails, rows)
    found = {name: tuple(t.shape) for name, t in tensors.items()}
    if found != expected:
        wrong = sorted(name for name in found.keys() | expected.keys() if found.get(name) != expected.get(name))
        shown = {name: (found.get(name), expected.get(name)) for name in wrong}
        raise ValueError(f"past_key_values is the state of another model ({where}); (found, expected): {shown}")


@functools.lru_cache  # asked for every layer and call, also of one token
def _state_shapes(layer_type: str, heads: int, slots: int, kernel: int, width: int, tails: tuple, rows: int) -> dict:
    """Shapes of the tensors of a layer's state by name."""
    shapes = {"position": (rows,), "seen": (rows,)}
    for i, (width_in, width_out) in enumerate(INNER_NETS[layer_type].shapes(width // heads), start=1):
        shapes |= {f"W{i}": (rows, heads, width_in, width_out), f"b{i}": (rows, heads, 1, width_out)}
        shapes |= {f"x{i}": (rows, heads, slots, width_in), f"g{i}": (rows, heads, slots, width_out)}
    return shapes | {name: (rows, kernel - 1, width) for name in tails}


def _detached(value):
    """A copy of tensors, also inside dictionaries and lists; everything else as it is."""
    if isinstance(value, Tensor):
        return value.detach().clone()
    if isinstance(value, dict):
        return {key: _detached(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return type(value)(_detached(item) for item in value)
    return value


def _check_cache(cache: Cache) -> None:
    if not hasattr(cache, "layers"):
        raise TypeError(f"cache must be a transformers Cache, got {type(cache).__name__}")
