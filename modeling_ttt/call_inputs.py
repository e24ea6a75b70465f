"""Checks and completes the arguments of one forward call: mask, document borders, cache, learning-rate multiplier."""

from collections.abc import Iterable

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicCache

from .configuration_ttt import TTTConfig
from .token_grid import TokenGrid
from .ttt_cache import check_state

__all__ = ["build_grid", "expand_lr_mult", "layer_lr_mults", "prepare_cache", "refuse_unknown"]


def prepare_cache(cache: Cache | None, config: TTTConfig, batch: int) -> Cache | None:
    """The cache to use, its layers made when it is still empty, checked against the model and the batch.

    Raises:
        TypeError: it is no `Cache`.
        ValueError: it belongs to another model or another batch size.
    """
    if cache is None:
        return None
    if not isinstance(cache, Cache):
        raise TypeError(f"past_key_values must be a transformers Cache, got {type(cache).__name__}")
    if not cache.layers:
        cache.layers = DynamicCache(config=config).layers
    if len(cache.layers) != config.num_hidden_layers:
        raise ValueError(f"past_key_values has {len(cache.layers)} layers, the model has {config.num_hidden_layers}")
    for i, layer in enumerate(cache.layers):
        if not hasattr(layer, "tensors"):
            raise ValueError(
                f"layer {i} of past_key_values is a {type(layer).__name__}, which holds no TTT state; build the cache "
                "with DynamicCache(config=model.config)"
            )
        if layer.tensors:
            check_state(layer.tensors, config, f"layer {i}", batch)
    if not torch.compiler.is_compiling():  # compiled code would be made anew for every length it compares
        lengths = {layer.get_seq_length() for layer in cache.layers}
        if len(lengths) > 1:
            raise ValueError(f"the layers of past_key_values have read different numbers of tokens: {sorted(lengths)}")
    return cache


def refuse_unknown(kwargs: dict) -> None:
    """Raise TypeError for misspelt arguments of this model, which would otherwise be ignored."""
    unknown = sorted(name for name in kwargs if name.startswith(("ttt_", "output_ttt", "output_plast", "reset")))
    if unknown:
        known = ["output_plasticity", "output_ttt_stats", "reset_at", "ttt_lr_mult"]
        raise TypeError(f"forward got unknown arguments {unknown}; the inner loop knows {known}")


def build_grid(
    config: TTTConfig,
    shape: tuple[int, int],
    device: torch.device,
    attention_mask: Tensor | None = None,
    position_ids: Tensor | None = None,
    reset_at: Tensor | int | Iterable[int] | None = None,
    input_ids: Tensor | None = None,
    cache: Cache | None = None,
) -> TokenGrid:
    """Place the tokens of a call among the mini-batches of their rows.

    Raises:
        ValueError: the shape of an argument does not fit the call.
    """
    past, start = (cache.layers[0].tensors, cache.layers[0].start) if cache is not None else ({}, 0)
    columns = cache.get_seq_length() if cache is not None else 0
    real = _real_tokens(attention_mask, shape, columns)
    border = _borders(reset_at, input_ids, shape)
    if position_ids is not None:
        _check_position_ids(position_ids, shape)
        if attention_mask is None:
            restart = _restarts(position_ids, columns).expand(shape).to(device)
            border = restart if border is None else border.to(device) | restart
    return TokenGrid(
        shape,
        config.mini_batch_size,
        device,
        None if real is None else real.to(device),
        None if border is None else border.to(device),
        past.get("position"),
        past.get("seen"),
        start,
    )


def expand_lr_mult(lr_mult: Tensor, shape: tuple[int, int, int, int]) -> Tensor:
    """The multiplier with four dimensions, broadcastable to shape [B, L, H, T].

    Raises:
        TypeError: it is no tensor.
        ValueError: it cannot be broadcast.
    """
    if not isinstance(lr_mult, Tensor):
        raise TypeError(f"ttt_lr_mult must be a tensor, got {type(lr_mult).__name__}")
    fits = lr_mult.dim() <= 4 and all(
        n in (1, m) for n, m in zip(reversed(lr_mult.shape), reversed(shape), strict=False)
    )
    if not fits:
        raise ValueError(
            f"ttt_lr_mult must be broadcastable to [batch, TTT layers, heads, tokens] = {list(shape)}, "
            f"got {list(lr_mult.shape)}"
        )
    return lr_mult.reshape([1] * (4 - lr_mult.dim()) + list(lr_mult.shape))


def layer_lr_mults(config: TTTConfig, lr_mult: Tensor | None, grid: TokenGrid) -> list[Tensor | None]:
    """Per layer the factor of the inner learning rate, broadcastable to [B, H, T], or None for 1.

    `frozen_layers`, `frozen_heads` and `frozen_from` of the configuration multiply what the caller passes.
    """
    config.validate_freezing()  # these fields are meant to be set on a live model
    layers, heads = config.num_hidden_layers, config.num_attention_heads
    mults: list[Tensor | None] = [None] * layers
    if lr_mult is not None:
        lr_mult = expand_lr_mult(lr_mult, (grid.batch, layers, heads, grid.length))
        mults = [lr_mult[:, min(i, lr_mult.shape[1] - 1)] for i in range(layers)]
    begins = (
        config.frozen_from
        if isinstance(config.frozen_from, dict)
        else dict.fromkeys(range(layers), config.frozen_from)
    )
    early = {
        begin: (grid.token_index < begin)[:, None].float()  # [B, 1, T]
        for begin in set(begins.values())
        if begin is not None
    }
    frozen_layers, frozen_heads = config.frozen_layers or [], config.frozen_heads or {}
    for i in range(layers):
        factors = [f for f in (mults[i], early.get(begins.get(i))) if f is not None]
        if i in frozen_layers or i in frozen_heads:
            keep = torch.ones(1, heads, 1, device=grid.device)
            keep[:, list(range(heads)) if i in frozen_layers else frozen_heads[i]] = 0
            factors.append(keep)
        if factors:
            mults[i] = factors[0]
            for factor in factors[1:]:
                mults[i] = mults[i] * factor.to(mults[i].device)
    return mults


def _real_tokens(attention_mask: Tensor | None, shape: tuple[int, int], columns: int) -> Tensor | None:
    """[B, T] bool of the call's own tokens from a mask over them or over all tokens with `columns` in the cache."""
    if attention_mask is None:
        return None
    got = list(attention_mask.shape) if isinstance(attention_mask, Tensor) else type(attention_mask).__name__
    lengths = (shape[1], columns + shape[1])
    if not isinstance(got, list) or len(got) != 2 or got[0] != shape[0] or got[1] not in lengths:
        cached = f" (or with the {columns} columns of the cache on the left)" if columns else ""
        raise ValueError(f"attention_mask must be a tensor [batch, tokens] = {list(shape)}{cached}, got {got}")
    return attention_mask[:, -shape[1] :] != 0


def _check_position_ids(position_ids: Tensor, shape: tuple[int, int]) -> None:
    if not isinstance(position_ids, Tensor) or tuple(position_ids.shape) not in (tuple(shape), (1, shape[1])):
        got = list(position_ids.shape) if isinstance(position_ids, Tensor) else type(position_ids).__name__
        raise ValueError(f"position_ids must be [batch or 1, tokens] = {list(shape)}, got {got}")


def _restarts(position_ids: Tensor, columns: int) -> Tensor:
    """[B or 1, T] bool of the first tokens of documents by their positions.

    A position that does not increase starts a document; so does position 0 at the start of a call that goes on from
    a cache of `columns` tokens.
    """
    restart = torch.zeros(position_ids.shape, dtype=torch.bool, device=position_ids.device)
    restart[:, 1:] = position_ids[:, 1:] <= position_ids[:, :-1]
    if columns:
        restart[:, 0] = position_ids[:, 0] == 0
    return restart


def _borders(reset_at, input_ids: Tensor | None, shape: tuple[int, int]) -> Tensor | None:
    """[B, T] bool, True where a new document starts."""
    if reset_at is None:
        return None
    if isinstance(reset_at, Tensor) and reset_at.dtype == torch.bool:
        if tuple(reset_at.shape) != tuple(shape):
            raise ValueError(f"reset_at as a mask must be [batch, tokens] = {list(shape)}, got {list(reset_at.shape)}")
        return reset_at
    if input_ids is None:
        raise ValueError("reset_at as token ids needs input_ids; with inputs_embeds pass a bool mask [batch, tokens]")
    if not isinstance(reset_at, int | list | tuple | Tensor):
        raise TypeError(f"reset_at must be token ids or a bool mask [batch, tokens], got {type(reset_at).__name__}")
    ids = torch.as_tensor([reset_at] if isinstance(reset_at, int) else reset_at, device=input_ids.device)
    if ids.is_floating_point() or ids.dtype == torch.bool or ids.dim() > 1:
        raise ValueError(f"reset_at must be token ids or a bool mask [batch, tokens], got {reset_at!r}")
    return torch.isin(input_ids, ids)
