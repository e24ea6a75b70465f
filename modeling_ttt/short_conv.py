"""Short causal convolution over the tokens of a row, one filter per channel, that can stop and resume anywhere."""

import torch
from torch import Tensor, nn

from .token_grid import TokenGrid

__all__ = ["ShortConv"]


class ShortConv(nn.Conv1d):
    """Causal depthwise convolution. Masked tokens are skipped, windows do not cross document borders.

    Parameters are those of `nn.Conv1d(C, C, kernel, groups=C)`: weight [C, 1, kernel], bias [C].
    """

    def __init__(self, channels: int, kernel: int):
        super().__init__(channels, channels, kernel, groups=channels, bias=True)

    def forward(self, padded: Tensor, grid: TokenGrid) -> Tensor:
        """Convolve the tokens of `padded`, see there; [B, T, C]."""
        kernel, length = self.kernel_size[0], padded.shape[1] - self.kernel_size[0]
        if grid.uniform:
            taps = [padded[:, j : j + length] for j in range(kernel)]
        else:
            window, _ = grid.windows(kernel)
            taps = [_rows(padded, window[..., j]) for j in range(kernel)]
        half = padded.dtype in (torch.float16, torch.bfloat16)  # summed in float32
        weight, bias = (t.float() if half else t for t in (self.weight[:, 0], self.bias))
        out = bias.expand_as(taps[0])
        for j, tap in enumerate(taps):
            out = torch.addcmul(out, tap.to(out.dtype), weight[:, j])
        out = out.to(padded.dtype)
        return out if grid.real is None else out * grid.real[..., None]

    def padded(self, x: Tensor, tail: Tensor | None) -> Tensor:
        """x [B, T, C] after `tail` [B, kernel - 1, C], the last inputs before it (zeros when None), and a zero row."""
        if tail is None:
            tail = x.new_zeros(x.shape[0], self.kernel_size[0] - 1, x.shape[2])
        return torch.cat([tail.to(x.dtype), x, x.new_zeros(x.shape[0], 1, x.shape[2])], 1)

    def next_tail(self, padded: Tensor, grid: TokenGrid) -> Tensor:
        """The tail [B, kernel - 1, C] with which the tokens after those of `padded` go on."""
        _, keep = grid.windows(self.kernel_size[0])
        return _rows(padded, keep)


def _rows(x: Tensor, index: Tensor) -> Tensor:
    """x [B, S, C] at index [B, n] -> [B, n, C]."""
    return x.gather(1, index[..., None].expand(-1, -1, x.shape[2]))
