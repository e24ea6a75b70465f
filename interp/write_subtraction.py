"""Reads of a TTT layer without some of its writes while all inner gradients stay as they were: no write reacts.

The factors of every write are recorded in an undisturbed run; in a second one the read-out of the chosen layers is
replaced by a read of the weights less the writes left out. Layers behind go on from there as they are.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from interp.taps import mixers

__all__ = ["subtracted_writes"]


@contextmanager
def subtracted_writes(
    model: nn.Module, input_ids: Tensor, layers: Sequence[int], keep: Tensor, ttt_lr_mult: Tensor | None = None
) -> Iterator[None]:
    """While it lasts, `model` run on `input_ids` [1, T] repeated to N rows reads without the writes where `keep` is 0.

    `layers` are places among the TTT layers, `keep` is [N, H, T]. Records first, with one forward pass. All hooks are
    removed in the end, also after an exception.
    """
    chosen = [mixers(model)[i] for i in layers]
    records: list[dict[str, Tensor]] = [{} for _ in chosen]
    handles = []
    try:
        for layer, record in zip(chosen, records, strict=True):
            for name in ("tap_k", "tap_lr", "tap_inner_grad"):
                handles.append(getattr(layer, name).register_forward_hook(_keeper(record, name)))
        with torch.no_grad():
            model(input_ids=input_ids, ttt_lr_mult=ttt_lr_mult, use_cache=False, logits_to_keep=1)
        _remove(handles)
        for layer, record in zip(chosen, records, strict=True):
            handles.append(layer.tap_q.register_forward_hook(_keeper(record, "tap_q")))
            handles.append(layer.tap_readout.register_forward_hook(_replacer(layer, record, keep)))
        yield
    finally:
        _remove(handles)


def _keeper(record: dict[str, Tensor], name: str):
    def hook(module, args, output):
        record[name] = output.detach()

    return hook


def _replacer(layer: Any, record: dict[str, Tensor], keep: Tensor):
    def hook(module, args, output):
        return _read_without(layer, record, keep.to(output.device, output.dtype)).to(output)

    return hook


def _remove(handles: list) -> None:
    while handles:
        handles.pop().remove()


def _read_without(layer: Any, record: dict[str, Tensor], keep: Tensor) -> Tensor:
    """The read-out [N, H, T, f]; called inside the layer's forward, where its parameters are at hand."""
    q, k, lr, g = (record[name] for name in ("tap_q", "tap_k", "tap_lr", "tap_inner_grad"))
    tau = layer.token_rate(q.dtype)
    names = layer.inner_net.parameter_names
    clean = [tuple(getattr(layer, name).to(q.dtype)[None] for name in pair) for pair in names]
    less, lr = list(clean), lr[..., 0]
    gradients = g.split([bias.shape[-1] for _, bias in clean], -1)
    read = []
    for start in range(0, q.shape[2], len(tau)):
        at = slice(start, start + len(tau))
        xs, rate = [k[:, :, at]], lr[:, :, at]
        for weight, bias in clean[:-1]:
            xs.append(F.gelu(xs[-1] @ weight + bias, approximate="tanh"))
        gs, kept = [x[:, :, at] for x in gradients], rate * keep[:, :, at]
        read.append(_read(less, q[:, :, at], xs, gs, kept, tau))
        clean, less = (_commit(weights, xs, gs, tau[-1] * r) for weights, r in ((clean, rate), (less, kept)))
    z = torch.cat(read, 2)
    weight, bias = (p.to(q.dtype)[:, None] for p in (layer.ttt_norm_weight, layer.ttt_norm_bias))
    # The norm of the inner loss; its epsilon is no setting.
    return q + bias + weight * F.layer_norm(z, z.shape[-1:], eps=1e-6)


def _read(weights: list, a: Tensor, xs: list[Tensor], gs: list[Tensor], rate: Tensor, tau: Tensor) -> Tensor:
    """The net's output for the queries of one mini-batch, each after the writes up to its own."""
    for i, ((weight, bias), x, g) in enumerate(zip(weights, xs, gs, strict=True)):
        a = F.gelu(a, approximate="tanh") if i else a
        coefficients = (a @ x.mT + 1).tril() * rate[:, :, None] * tau[: a.shape[2], None]
        a = a @ weight + bias - coefficients @ g
    return a


def _commit(weights: list, xs: list[Tensor], gs: list[Tensor], rate: Tensor) -> list:
    scaled = [g * rate[..., None] for g in gs]
    return [
        (weight - x.mT @ g, bias - g.sum(2, keepdim=True))
        for (weight, bias), x, g in zip(weights, xs, scaled, strict=True)
    ]
