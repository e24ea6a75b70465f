"""Inner nets: the small models whose weights are the hidden state of a TTT layer.

An inner net is a chain of linear maps with tanh-GELU between them. Per token and linear map the gradient of the inner
loss is the outer product `x (x) g` of the map's input and the gradient at its output, so one set of functions serves
TTT-Linear (one map), TTT-MLP (two maps, four times wider inside) and deeper chains. Shapes: B batch, H heads,
n tokens, f head dim, m inner width; N stands for any leading dimensions shared by all arguments.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["INNER_NETS", "InnerNet", "Weights", "forward_chain", "generates_code", "multiply", "output_gradients"]

Weights = list[tuple[Tensor, Tensor]]
"""One (W [N, in, out], b [N, 1, out]) per linear map."""


@dataclass(frozen=True)
class InnerNet:
    """The shape of an inner net: `widths[i]` times the head dim is the width before map i, the last the output's."""

    name: str
    widths: tuple[int, ...]

    @property
    def depth(self) -> int:
        return len(self.widths) - 1

    @property
    def parameter_names(self) -> tuple[tuple[str, str], ...]:
        """Names of weight and bias per map, as in the official checkpoints: `W1, b1, W2, b2, ...`."""
        return tuple((f"W{i}", f"b{i}") for i in range(1, self.depth + 1))

    def shapes(self, head_dim: int) -> list[tuple[int, int]]:
        """(in, out) of every map."""
        return [(a * head_dim, b * head_dim) for a, b in zip(self.widths[:-1], self.widths[1:], strict=True)]


INNER_NETS = {"linear": InnerNet("linear", (1, 1)), "mlp": InnerNet("mlp", (1, 4, 1))}


def multiply(x: Tensor, matrix: Tensor) -> Tensor:
    """x [N, n, a] times matrix [N, a, b].

    For one token, compiled code on a CPU makes a single loop of the sum and what is around it; a batched product would
    be a call of its own for a handful of numbers.
    """
    if generates_code() and x.dim() == 3 and x.shape[1] == 1 and x.device.type == "cpu":
        return (x.mT * matrix).sum(1, keepdim=True)
    return x @ matrix


def generates_code() -> bool:
    """What runs is compiled here. An exported program is for other tools, which know products by their names."""
    return torch.compiler.is_compiling() and not torch.compiler.is_exporting()


def forward_chain(weights: Weights, x: Tensor) -> tuple[list[Tensor], list[Tensor]]:
    """Apply the net to `x` [N, n, f] and return the input and the output of every map, each [N, n, width]."""
    inputs, outputs = [], []
    for i, (weight, bias) in enumerate(weights):
        x = F.gelu(outputs[-1], approximate="tanh") if i else x
        inputs.append(x)
        fused = x.dim() == 3 and not torch.compiler.is_compiling()
        outputs.append(torch.baddbmm(bias, x, weight) if fused else multiply(x, weight) + bias)
    return inputs, outputs


def output_gradients(weights: Weights, outputs: list[Tensor], grad: Tensor) -> list[Tensor]:
    """Carry the inner loss's gradient at the last output, `grad` [N, n, f], back to the output of every map."""
    grads = [grad]
    for i in range(len(weights) - 1, 0, -1):
        grad_input = multiply(grads[0], weights[i][0].mT)
        grads.insert(0, torch.ops.aten.gelu_backward(grad_input, outputs[i - 1], approximate="tanh"))
    return grads
