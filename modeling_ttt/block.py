"""One block: short convolution (optional), TTT layer, feed-forward layer, each on a residual stream."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.activations import ACT2FN
from transformers.modeling_layers import GradientCheckpointingLayer

from .configuration_ttt import TTTConfig
from .projection import Projection
from .segments import is_hooked
from .short_conv import ShortConv
from .token_grid import TokenGrid
from .ttt_layer import TTTLayer
from .ttt_outputs import TTTStats

__all__ = ["TTTBlock", "TTTRMSNorm"]


class TTTRMSNorm(nn.Module):
    """Root-mean-square norm over the model width; half precision is normalised in float32."""

    def __init__(self, width: int, eps: float):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))
        self.eps = eps

    def forward(self, hidden_states: Tensor) -> Tensor:
        # torch.rms_norm on a CPU is several times slower than its parts.
        states = hidden_states.float() if hidden_states.dtype in (torch.float16, torch.bfloat16) else hidden_states
        scale = states.square().mean(-1, keepdim=True).add_(self.eps).rsqrt_()
        return self.weight * (states * scale).to(hidden_states.dtype)


class TTTMLP(nn.Module):
    """SwiGLU feed-forward layer."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        self.gate_proj = Projection(config.hidden_size, config.intermediate_size)
        self.up_proj = Projection(config.hidden_size, config.intermediate_size)
        self.down_proj = Projection(config.intermediate_size, config.hidden_size)
        self.act_fn = ACT2FN[config.hidden_act]

    def forward(self, hidden_states: Tensor) -> Tensor:
        gate, up = self.gate_proj(hidden_states), self.up_proj(hidden_states)
        if self._works_in_place(gate, up):
            return self.down_proj(F.silu(gate, inplace=True).mul_(up))
        return self.down_proj(self.act_fn(gate) * up)

    def _works_in_place(self, gate: Tensor, up: Tensor) -> bool:
        """Many tokens (these are the widest tensors of the model), and nobody but this layer sees them."""
        if torch.is_grad_enabled() or gate.shape[1] < 64 or gate.dtype != up.dtype:
            return False
        plain = type(self.gate_proj) is Projection and type(self.act_fn) in (nn.SiLU, type(ACT2FN["silu"]))
        # Tracers and offloading replace `forward` of an instance.
        modules = (self.gate_proj, self.act_fn)
        return plain and not any("forward" in vars(m) for m in modules) and not is_hooked(*modules)


class TTTPreConv(nn.Module):
    """Norm and short convolution before a TTT layer."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        self.norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.conv = ShortConv(config.hidden_size, config.conv_kernel)

    def forward(self, hidden_states: Tensor, tail: Tensor | None, grid: TokenGrid) -> tuple[Tensor, Tensor]:
        """Convolved states [B, T, C] and the tail to go on from."""
        padded = self.conv.padded(self.norm(hidden_states), tail)
        return self.conv(padded, grid), self.conv.next_tail(padded, grid)


class TTTBlock(GradientCheckpointingLayer):
    """A block of the model; it goes on from the named state tensors `past`, an empty dict or None for a new state."""

    def __init__(self, config: TTTConfig, layer_idx: int):
        super().__init__()
        self.layer_idx = layer_idx
        self.pre_conv = config.pre_conv
        if config.pre_conv:
            self.conv = TTTPreConv(config)
        self.seq_norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.seq_modeling_block = TTTLayer(config)
        self.ffn_norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = TTTMLP(config)

    def forward(
        self,
        hidden_states: Tensor,
        grid: TokenGrid,
        rotary: Tensor,
        past: dict[str, Tensor] | None = None,
        lr_mult: Tensor | None = None,
        output_plasticity: bool = True,
        output_ttt_stats: bool = False,
        output_state: bool = True,
    ) -> tuple[Tensor, Tensor | None, TTTStats | None, dict[str, Tensor] | None]:
        """[B, T, C] -> ([B, T, C], plasticity [B, H, T], statistics, named state tensors to go on from as `past`)."""
        grid = grid.to(hidden_states.device)
        tails = {}
        if self.pre_conv:
            convolved, tails["tail_pre"] = self.conv(hidden_states, (past or {}).get("tail_pre"), grid)
            hidden_states = hidden_states + convolved
        mixed, state, plasticity, stats = self.seq_modeling_block(
            self.seq_norm(hidden_states), grid, rotary, past, lr_mult, output_plasticity, output_ttt_stats
        )
        hidden_states = hidden_states + mixed
        hidden_states = hidden_states + self.mlp(self.ffn_norm(hidden_states))
        return hidden_states, plasticity, stats, state | tails if output_state else None
