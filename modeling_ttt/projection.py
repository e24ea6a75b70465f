"""The linear layers of the model."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .inner_net import generates_code

__all__ = ["Projection"]


class Projection(nn.Linear):
    """`nn.Linear` without bias that compiled code applies to a single token on a CPU as a plain weighted sum.

    The product of a matrix and one vector is bound by reading the matrix, and the BLAS that PyTorch calls for it reads
    weights that come from beyond the caches at a third of the speed of the loop a compiler makes of the sum.
    """

    def __init__(self, in_features: int, out_features: int):
        super().__init__(in_features, out_features, bias=False)

    def forward(self, input: Tensor) -> Tensor:
        if generates_code() and self._is_one_row(input):
            return (self.weight * input.reshape(-1)).sum(-1).view(*input.shape[:-1], -1)
        return F.linear(input, self.weight, self.bias)

    def _is_one_row(self, input: Tensor) -> bool:
        """One token, and weights as they are: quantised and distributed ones know their own product."""
        plain = type(self.weight) is nn.Parameter and self.bias is None and input.dtype == self.weight.dtype
        plain = plain and input.device.type == "cpu" and not torch.is_autocast_enabled("cpu")  # which rounds products
        return plain and input.dtype.is_floating_point and input[..., 0].numel() == 1
