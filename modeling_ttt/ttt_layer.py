"""The TTT layer: projections, learning rate, inner loop, norm, gate and output (paper, section 2)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.utils.generic import maybe_autocast

from .configuration_ttt import TTTConfig
from .inner_stats import target_dispersion
from .objective import unit_layer_norm
from .projection import Projection
from .rotary import rotate
from .scan import scan
from .short_conv import ShortConv
from .token_grid import TokenGrid
from .ttt_outputs import TTTStats
from .ttt_state import ScanInputs, TTTState, scan_dtype

__all__ = ["TTTLayer"]


class TTTLayer(nn.Module):
    """Sequence mixer whose state is the weights of an inner net trained on every token it reads.

    Parameter names and shapes are those of the official PyTorch code. Quantities worth reading pass through the
    Identity modules `tap_q, tap_k, tap_lr, tap_inner_grad, tap_readout` once per call, [B, H, T, .]; the inner
    gradient (the gradients at the outputs of all inner maps side by side) is collected when its tap is hooked, for
    reading only.
    """

    def __init__(self, config: TTTConfig):
        super().__init__()
        self.config = config
        width, heads, head_dim = config.hidden_size, config.num_attention_heads, config.head_dim
        # Read often: attributes of a configuration are slow to look up.
        self.num_heads, self.head_dim, self.inner_net = heads, head_dim, config.inner_net
        self.q_proj = Projection(width, width)
        if config.share_qk:
            self.conv_q = ShortConv(width, config.conv_kernel)
            self.conv_k = ShortConv(width, config.conv_kernel)
        else:
            self.k_proj = Projection(width, width)
        self.v_proj = Projection(width, width)
        self.o_proj = Projection(width, width)
        if config.use_gate:
            self.g_proj = Projection(width, width)
        self.post_norm = nn.LayerNorm(width, eps=1e-6)
        self.learnable_token_idx = nn.Parameter(torch.zeros(config.mini_batch_size))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.zeros(heads, 1, width))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(heads, 1))
        self.ttt_norm_weight = nn.Parameter(torch.ones(heads, head_dim))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(heads, head_dim))
        net = self.inner_net
        for names, (width_in, width_out) in zip(net.parameter_names, net.shapes(head_dim), strict=True):
            self.register_parameter(names[0], nn.Parameter(torch.zeros(heads, width_in, width_out)))
            self.register_parameter(names[1], nn.Parameter(torch.zeros(heads, 1, width_out)))
        for tap in ("tap_q", "tap_k", "tap_lr", "tap_inner_grad", "tap_readout"):
            setattr(self, tap, nn.Identity())

    def forward(
        self,
        hidden_states: Tensor,
        grid: TokenGrid,
        rotary: Tensor,
        past: dict[str, Tensor] | None = None,
        lr_mult: Tensor | None = None,
        output_plasticity: bool = True,
        output_ttt_stats: bool = False,
    ) -> tuple[Tensor, dict[str, Tensor], Tensor | None, TTTStats | None]:
        """Mix the tokens of a call, [B, T, C], going on from the named state tensors `past`.

        `rotary` holds every token's turn (cos, sin), [B or 1, T, 1, f/2, 2]; `lr_mult`, broadcastable to [B, H, T],
        multiplies the inner learning rate. Returns the mixed states [B, T, C], the new state tensors, plasticity and
        statistics.
        """
        q, k, v, tails = self._project(hidden_states, grid, past)
        operand_dtype, dtype = v.dtype, scan_dtype(hidden_states.dtype)
        q, k, v = q.to(dtype), k.to(dtype), v.to(dtype)
        # Autocast would round the inner loop to half precision.
        with maybe_autocast(hidden_states.device.type, enabled=False):
            readout, output, stats = self._inner_loop(
                q, k, v, operand_dtype, hidden_states, grid, rotary, past, lr_mult, output_plasticity, output_ttt_stats
            )
        mixed = self._output(readout, hidden_states)
        return mixed, output.state.to_tensors() | tails, output.plasticity if output_plasticity else None, stats

    def _inner_loop(
        self, q, k, v, operand_dtype, hidden_states, grid, rotary, past, lr_mult, output_plasticity, output_ttt_stats
    ):
        """Write and read every token: the read-out [B, H, T, f], the scan's output and the statistics."""
        heads_first = [t.transpose(1, 2) for t in (rotate(q, rotary), rotate(k, rotary), v)]  # [B, H, T, f]
        dispersion = target_dispersion((v - k).transpose(1, 2), grid.real) if output_ttt_stats else None
        q, k, v = self.tap_q(heads_first[0]), self.tap_k(heads_first[1]), heads_first[2]
        lr = self.tap_lr(self._learning_rate(hidden_states, lr_mult, q.dtype)[..., None])[..., 0]  # [B, H, T]
        ln_weight, ln_bias = self.ttt_norm_weight.to(q.dtype), self.ttt_norm_bias.to(q.dtype)
        inputs = ScanInputs(
            net=self.inner_net,
            q=q,
            k=k,
            v=v,
            lr=lr,
            tau=self.token_rate(q.dtype),
            ln_weight=ln_weight,
            ln_bias=ln_bias,
            initial_weights=[
                tuple(getattr(self, name).to(q.dtype) for name in names) for names in self.inner_net.parameter_names
            ],
            state=self._past_state(past, q.dtype),
            grid=grid,
            want_plasticity=output_plasticity,
            want_stats=output_ttt_stats,
            want_gradients=bool(self.tap_inner_grad._forward_hooks or self.tap_inner_grad._forward_pre_hooks),
            operand_dtype=operand_dtype,
        )
        output = scan(inputs, self.config.ttt_backend)
        if inputs.want_gradients:
            gradients = output.gradients.detach()
            if self.tap_inner_grad(gradients) is not gradients:
                raise ValueError(
                    "tap_inner_grad is for reading: a hook returned something else; edit ttt_lr_mult instead"
                )
        # Token-major, where these tensors are contiguous.
        normed = unit_layer_norm(output.z.transpose(1, 2))
        readout = (q.transpose(1, 2) + ln_bias).addcmul_(ln_weight, normed)  # [B, T, H, f]
        readout = self.tap_readout(readout.transpose(1, 2))
        stats = None
        if output_ttt_stats:
            shown = lr.clone() if grid.real is None else lr.masked_fill(~grid.real[:, None], 0)
            found = output.stats | {"lr": shown, "target_dispersion": dispersion}
            stats = TTTStats(**{name: value.detach() for name, value in found.items()})
        return readout, output, stats

    def token_rate(self, dtype: torch.dtype) -> Tensor:
        """tau [K]: the factor of every position in the mini-batch, max(0, 1 / (j + 1) + learnable)."""
        learnable = self.learnable_token_idx.to(dtype)
        positions = torch.arange(1, learnable.shape[0] + 1, device=learnable.device, dtype=dtype)
        return (positions.reciprocal_() + learnable).clamp(min=0)

    def _learning_rate(self, hidden_states: Tensor, lr_mult: Tensor | None, dtype: torch.dtype) -> Tensor:
        """Inner learning rate of every token's own write, base_lr * sigmoid(w . x + b) / f, [B, H, T]."""
        weight = self.learnable_ttt_lr_weight.to(dtype).squeeze(1)
        bias = self.learnable_ttt_lr_bias.to(dtype).squeeze(1)
        gate = F.linear(hidden_states.to(dtype), weight, bias).sigmoid()
        lr = (gate * (self.config.base_lr / self.head_dim)).transpose(1, 2)
        return lr if lr_mult is None else lr * lr_mult.to(lr.device, dtype)

    def _project(self, hidden_states: Tensor, grid: TokenGrid, past: dict[str, Tensor] | None):
        """Queries and keys before rotation and values, each [B, T, H, f], and the new tails."""
        tails = {}
        q, v = self.q_proj(hidden_states), self.v_proj(hidden_states)
        if self.config.share_qk:
            padded = self.conv_q.padded(q, (past or {}).get("tail_qk"))
            tails["tail_qk"] = self.conv_q.next_tail(padded, grid)
            q, k = self.conv_q(padded, grid), self.conv_k(padded, grid)
        else:
            k = self.k_proj(hidden_states)
        shape = (*v.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (x.reshape(shape) for x in (q, k, v))
        return q, k, v, tails

    def _past_state(self, past: dict[str, Tensor] | None, dtype: torch.dtype) -> TTTState | None:
        if not past:
            return None
        depth = self.inner_net.depth
        return TTTState.from_tensors({name: past[name].to(dtype) for name in TTTState.tensor_names(depth)}, depth)

    def _output(self, readout: Tensor, hidden_states: Tensor) -> Tensor:
        """Norm over all heads, gate and output projection, [B, H, T, f] -> [B, T, C]."""
        mixed = self.post_norm(readout.transpose(1, 2).flatten(2).to(hidden_states.dtype))
        if self.config.use_gate:
            mixed = F.gelu(self.g_proj(hidden_states), approximate="tanh") * mixed
        return self.o_proj(mixed)
