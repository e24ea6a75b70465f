"""What a model does at one position of every document: its residual stream, gates, queries, read-outs and logits."""

from typing import Any

import torch
from accelerate.utils import align_module_device
from torch import Tensor, nn

from interp.captum_targets import LogitTarget
from interp.taps import mixers

__all__ = ["Frame"]


class Frame:
    """Keeps the outputs of modules at the columns `positions` [B] while a text on `device` is read piece by piece.

    `frame[name]` is [B, ...] on the CPU, float32 or float64: "embedding", "logits", "normed" (behind the last norm),
    and per block i "i.block", for a TTT block "i.mixer", "i.mlp", "i.conv", "i.gate" [B, C], "i.q" and "i.readout"
    [B, H, f]. Modules are known by their names as attributes; parameters of linear modules are not read but met by
    calling the module, so that offloaded, quantised and LoRA modules do.

    Raises:
        ValueError: the model is built in another way.
    """

    def __init__(self, model: Any, positions: Tensor, device: torch.device):
        self.model, self.positions, self.device = model, positions, device
        self.decoder = _decoder(model)
        self.blocks = list(self.decoder.layers)[: model.config.num_hidden_layers]
        self.mixers = {}
        for i, block in enumerate(self.blocks):
            self.mixers.update((i, module) for module in block.modules() if hasattr(module, "tap_readout"))
        if len(self.mixers) != len(mixers(model)):
            raise ValueError(f"{type(model).__name__} must have one TTT layer in each TTT block of its decoder")
        self._piece = slice(0, 0)
        self._kept: dict[str, Tensor] = {}
        self._like: dict[str, Tensor] = {}

    def __getitem__(self, name: str) -> Tensor:
        return self._kept[name]

    def wanted(self) -> list:
        """(module, function) pairs for `interp.taps.hooks`."""
        named = {"embedding": self.model.get_input_embeddings(), "normed": self.decoder.norm}
        for i, block in enumerate(self.blocks):
            named[f"{i}.block"] = block
            mixer = self.mixers.get(i)
            if mixer is None:
                continue
            named |= {f"{i}.mixer": mixer, f"{i}.mlp": block.mlp}
            named |= {f"{i}.q": mixer.tap_q, f"{i}.readout": mixer.tap_readout}
            named |= {f"{i}.conv": block.conv} if hasattr(block, "conv") else {}
            named |= {f"{i}.gate": mixer.g_proj} if hasattr(mixer, "g_proj") else {}
        return [(module, self._keep(name)) for name, module in named.items()]

    def options(self, piece: slice) -> dict[str, Tensor]:
        """Arguments of a call on some columns: which logits it gives, any for rows whose position is elsewhere."""
        self._piece = piece
        local = (self.positions - piece.start).clamp(0, piece.stop - piece.start - 1)
        return {"logits_to_keep": local[:, None].to(self.device)}

    def see_outputs(self, piece: slice, outputs: Any) -> None:
        """Keep the logits of a call."""
        inside = self._inside()
        self._store("logits", outputs.logits[inside.to(outputs.logits.device), 0], inside)

    def added(self, i: int, whole: bool) -> dict[str, Tensor]:
        """What block i adds to the residual stream, [B, C] each: "conv", "mlp" and, if `whole`, its "layer".

        A block of another kind is a "layer" altogether.
        """
        if i not in self.mixers:
            before = self["embedding"] if i == 0 else self[f"{i - 1}.block"]
            return {"layer": self[f"{i}.block"] - before}
        found = {name: self[f"{i}.{name}"] for name in ("conv", "mlp") if f"{i}.{name}" in self._kept}
        return found | ({"layer": self[f"{i}.mixer"]} if whole else {})

    def unembedding(self, target: LogitTarget) -> tuple[Tensor, Tensor, Tensor | None]:
        """The target's direction in the residual stream [B, C], its value [B], and the part of the head's bias [B]."""
        head, norm = self.model.get_output_embeddings(), self.decoder.norm
        with torch.enable_grad():
            logits = self["logits"].clone().requires_grad_()
            value = target.read(logits)
            upstream = torch.autograd.grad(value.sum(), logits)[0]
        behind = self.before(head, "normed", upstream)
        last = self[f"{len(self.blocks) - 1}.block"]
        scale = (last.square().mean(-1, keepdim=True) + norm.eps).rsqrt()
        with align_module_device(norm):
            direction = norm.weight.detach().to(behind) * behind * scale
        bias = (head(torch.zeros_like(self._like["normed"])).to(upstream) * upstream).sum(-1)
        return direction, value.detach(), bias if bool(bias.any()) else None

    def before(self, linear: nn.Module, like: str, upstream: Tensor) -> Tensor:
        """A direction behind a linear module [B, out] carried before it; `like` names a thing of its input's shape."""
        with torch.enable_grad():
            x = torch.zeros_like(self._like[like]).requires_grad_()
            out = linear(x)
            found = torch.autograd.grad(out, x, upstream.to(out.device, out.dtype))[0]
        return found.to(upstream)

    def _keep(self, name: str):
        dim = 2 if name.endswith((".q", ".readout")) else 1

        def keep(output: Tensor) -> None:
            inside = self._inside()
            rows = inside.nonzero()[:, 0].to(output.device)
            local = (self.positions[inside] - self._piece.start).to(output.device)
            self._store(name, output[rows, local] if dim == 1 else output[rows, :, local], inside)

        return keep

    def _inside(self) -> Tensor:
        """[B] bool, whose position lies in the present call."""
        return (self.positions >= self._piece.start) & (self.positions < self._piece.stop)

    def _store(self, name: str, part: Tensor, inside: Tensor) -> None:
        if name not in self._kept:
            # A template of what the modules take: the dtype and the device of the model there.
            self._like[name] = part.new_empty(len(self.positions), *part.shape[1:])
            dtype = torch.float64 if part.dtype == torch.float64 else torch.float32
            self._kept[name] = torch.zeros(self._like[name].shape, dtype=dtype)
        self._kept[name][inside] = part.detach().to("cpu", self._kept[name].dtype)


def _decoder(model: nn.Module) -> Any:
    """The module with the blocks and the last norm."""
    for module in model.modules():
        if hasattr(module, "layers") and hasattr(module, "norm"):
            return module
    raise ValueError(f"{type(model).__name__} has no module with layers and norm: not a TTT language model")
