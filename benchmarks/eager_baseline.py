"""The baseline of the benchmarks: a TTT language model as one would first write it, a plain loop over mini-batches.

`EagerTTT` computes the function of `TTTForCausalLM` (plain backbone, TTT-Linear and TTT-MLP) from the same weights in
the dual form of the paper: per mini-batch a [K, K] tile of rates, the LayerNorm of the inner loss forward and backward
written out, rotary embedding as "rotate half" on permuted features, separate updates of W and b, and outputs joined at
the end. Autograd differentiates the loop. Decoding is the primal form: the cache holds the inner weights of the start
of the mini-batch and the sums of the writes since, of the same shapes. It returns no plasticity, and it reads several
tokens at once only in whole mini-batches: ragged tails, masks, document borders and the convolutions of the Mamba
backbone are not part of what is compared.
"""

import math
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from modeling_ttt import TTTConfig, TTTForCausalLM

__all__ = ["EagerCache", "EagerOutput", "EagerTTT"]

INNER_EPS = 1e-6


@dataclass
class EagerCache:
    """What decoding carries from call to call, per layer by parameter name: inner weights and sums of writes."""

    weights: list[dict[str, Tensor]] = field(default_factory=list)
    writes: list[dict[str, Tensor]] = field(default_factory=list)
    position: int = 0


@dataclass
class EagerOutput:
    """Logits [B, kept, V], the loss in nats if there were labels, the cache if it was asked for."""

    logits: Tensor
    loss: Tensor | None = None
    past_key_values: EagerCache | None = None


class EagerTTT(nn.Module):
    """A TTT language model with the parameters of `TTTForCausalLM` under the same names."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        if config.share_qk or config.pre_conv or config.use_gate:
            raise ValueError("share_qk, pre_conv and use_gate must be False: the baseline has the plain backbone only")
        self.config = config
        self.model = nn.Module()
        self.model.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.model.layers = nn.ModuleList([EagerBlock(config) for _ in range(config.num_hidden_layers)])
        self.model.norm = EagerRMSNorm(config)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    @classmethod
    def from_model(cls, model: TTTForCausalLM) -> "EagerTTT":
        """The baseline on the weights of `model`: storage is shared, gradients are not."""
        with torch.device("meta"):
            eager = cls(model.config)
        eager.load_state_dict(model.state_dict(), assign=True)
        if model.config.tie_word_embeddings:
            eager.lm_head.weight = eager.model.embed_tokens.weight
        return eager.requires_grad_(True).train(model.training)

    def forward(
        self,
        input_ids: Tensor,
        labels: Tensor | None = None,
        past_key_values: EagerCache | None = None,
        use_cache: bool = False,
        logits_to_keep: int = 0,
    ) -> EagerOutput:
        """Read token ids [B, T]: whole mini-batches at the start of a mini-batch, or one token.

        Raises:
            ValueError: T is neither 1 nor a multiple of the mini-batch size, or the cache stands inside a mini-batch.
        """
        length, size = input_ids.shape[1], self.config.mini_batch_size
        cache = EagerCache() if past_key_values is None and (use_cache or length == 1) else past_key_values
        slot = 0 if cache is None else cache.position % size
        if length != 1 and (length % size or slot):
            raise ValueError(
                f"input_ids must hold one token or whole mini-batches of {size}, got {length} tokens at slot {slot}"
            )
        hidden = self.model.embed_tokens(input_ids)
        if cache is not None and not cache.weights:
            cache.weights = [layer.seq_modeling_block.initial_weights(len(hidden)) for layer in self.model.layers]
            cache.writes = [{n: torch.zeros_like(w) for n, w in layer.items()} for layer in cache.weights]
        for index, layer in enumerate(self.model.layers):
            hidden = layer(hidden, cache, index)
        if cache is not None:
            cache.position += length
        logits = self.lm_head(self.model.norm(hidden)[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())
        return EagerOutput(logits, loss, cache if use_cache else None)


class EagerRMSNorm(nn.Module):
    def __init__(self, config: TTTConfig):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(config.hidden_size))
        self.eps = config.rms_norm_eps

    def forward(self, x: Tensor) -> Tensor:
        return self.weight * (x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + self.eps))


class EagerFeedForward(nn.Module):
    def __init__(self, config: TTTConfig):
        super().__init__()
        width, inner = config.hidden_size, config.intermediate_size
        self.gate_proj = nn.Linear(width, inner, bias=False)
        self.up_proj = nn.Linear(width, inner, bias=False)
        self.down_proj = nn.Linear(inner, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class EagerBlock(nn.Module):
    def __init__(self, config: TTTConfig):
        super().__init__()
        self.seq_norm = EagerRMSNorm(config)
        self.seq_modeling_block = EagerTTTLayer(config)
        self.ffn_norm = EagerRMSNorm(config)
        self.mlp = EagerFeedForward(config)

    def forward(self, x: Tensor, cache: EagerCache | None, index: int) -> Tensor:
        x = x + self.seq_modeling_block(self.seq_norm(x), cache, index)
        return x + self.mlp(self.ffn_norm(x))


class EagerTTTLayer(nn.Module):
    """Projections, rotary embedding, the inner loop, norm and output projection."""

    def __init__(self, config: TTTConfig):
        super().__init__()
        self.config = config
        width, heads, dim = config.hidden_size, config.num_attention_heads, config.head_dim
        for name in ("q_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(width, width, bias=False))
        self.post_norm = nn.LayerNorm(width, eps=1e-6)
        self.learnable_token_idx = nn.Parameter(torch.zeros(config.mini_batch_size))
        self.learnable_ttt_lr_weight = nn.Parameter(torch.zeros(heads, 1, width))
        self.learnable_ttt_lr_bias = nn.Parameter(torch.zeros(heads, 1))
        self.ttt_norm_weight = nn.Parameter(torch.ones(heads, dim))
        self.ttt_norm_bias = nn.Parameter(torch.zeros(heads, dim))
        self.is_mlp = config.ttt_layer_type == "mlp"
        shapes = {"W1": (dim, 4 * dim), "b1": (1, 4 * dim), "W2": (4 * dim, dim), "b2": (1, dim)}
        if not self.is_mlp:
            shapes = {"W1": (dim, dim), "b1": (1, dim)}
        self.inner_names = tuple(shapes)
        for name, shape in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.zeros(heads, *shape)))

    def initial_weights(self, batch: int) -> dict[str, Tensor]:
        """W_0 and b_0 for every row, each [B, H, ., .]."""
        return {name: getattr(self, name)[None].repeat(batch, 1, 1, 1) for name in self.inner_names}

    def forward(self, x: Tensor, cache: EagerCache | None, index: int) -> Tensor:
        batch, length, _ = x.shape
        size, heads, dim = self.config.mini_batch_size, self.config.num_attention_heads, self.config.head_dim
        q, k, v = (
            proj(x).view(batch, length, heads, dim).transpose(1, 2) for proj in (self.q_proj, self.k_proj, self.v_proj)
        )
        start = 0 if cache is None else cache.position
        slots = torch.arange(start, start + length, device=x.device) % size
        q, k = self.rotate(q, slots), self.rotate(k, slots)
        lr = torch.einsum("btc,hoc->bht", x, self.learnable_ttt_lr_weight) + self.learnable_ttt_lr_bias
        lr = torch.sigmoid(lr) * self.config.base_lr / dim  # [B, H, T]
        tau = 1.0 / torch.arange(1, size + 1, device=x.device, dtype=x.dtype) + self.learnable_token_idx
        tau = torch.clamp_min(tau, 0.0)
        if length == 1:
            weights, writes = cache.weights[index], cache.writes[index]
            out = self.decode(q, k, v, lr[..., None], tau, weights, writes, start % size)
        else:
            weights = self.initial_weights(batch) if cache is None else cache.weights[index]
            out, weights = self.loop(q, k, v, lr, tau, weights)
            if cache is not None:
                cache.weights[index] = weights
        out = out.transpose(1, 2).reshape(batch, length, heads * dim)
        return self.o_proj(self.post_norm(out))

    def rotate(self, x: Tensor, slots: Tensor) -> Tensor:
        """Rotate interleaved feature pairs of x [B, H, T, f]: even features in front, rotate half, put back."""
        dim = x.shape[-1]
        theta = self.config.rope_parameters["rope_theta"]
        pairs = torch.arange(0, dim, 2, device=x.device, dtype=x.dtype)
        angles = slots[:, None] * theta ** (-pairs / dim)
        angles = torch.cat([angles, angles], -1)  # [T, f]
        cos, sin = angles.cos(), angles.sin()
        permuted = x.unflatten(-1, (dim // 2, 2)).transpose(-1, -2).reshape(x.shape)
        first, second = permuted.chunk(2, -1)
        turned = permuted * cos + torch.cat([-second, first], -1) * sin
        return turned.unflatten(-1, (2, dim // 2)).transpose(-1, -2).reshape(x.shape)

    def loop(self, q, k, v, lr, tau, weights: dict[str, Tensor]) -> tuple[Tensor, dict[str, Tensor]]:
        """One mini-batch after another; read-outs [B, H, T, f] and the inner weights after the last."""
        size = self.config.mini_batch_size
        step = self.mlp_step if self.is_mlp else self.linear_step
        outputs = []
        for q_i, k_i, v_i, lr_i in zip(*(t.split(size, 2) for t in (q, k, v, lr)), strict=True):
            eta = torch.tril(tau[:, None] * lr_i[:, :, None, :])  # [B, H, K, K], rows read, columns write
            z, weights = step(q_i, k_i, v_i - k_i, eta, weights)
            outputs.append(q_i + self.inner_norm(z))
        return torch.cat(outputs, 2), weights

    def linear_step(self, q, k, target, eta, weights: dict[str, Tensor]):
        """f(q) of every reader at its own weights, and the weights after the mini-batch."""
        w1, b1 = weights["W1"], weights["b1"]
        grad = self.inner_gradient(k @ w1 + b1, target)
        scores = torch.tril(q @ k.transpose(-2, -1))
        z = q @ w1 - (eta * scores) @ grad + b1 - eta @ grad
        last = eta[:, :, -1, :, None]
        return z, {
            "W1": w1 - (last * k).transpose(-2, -1) @ grad,
            "b1": b1 - (last * grad).sum(2, keepdim=True),
        }

    def mlp_step(self, q, k, target, eta, weights: dict[str, Tensor]):
        """The same for two maps with a GELU between."""
        w1, b1, w2, b2 = (weights[name] for name in self.inner_names)
        z1 = k @ w1 + b1
        hidden = F.gelu(z1, approximate="tanh")
        grad2 = self.inner_gradient(hidden @ w2 + b2, target)
        grad1 = grad2 @ w2.transpose(-2, -1) * gelu_derivative(z1)
        scores1 = torch.tril(q @ k.transpose(-2, -1))
        read1 = F.gelu(q @ w1 - (eta * scores1) @ grad1 + b1 - eta @ grad1, approximate="tanh")
        scores2 = torch.tril(read1 @ hidden.transpose(-2, -1))
        z = read1 @ w2 - (eta * scores2) @ grad2 + b2 - eta @ grad2
        last = eta[:, :, -1, :, None]
        return z, {
            "W1": w1 - (last * k).transpose(-2, -1) @ grad1,
            "b1": b1 - (last * grad1).sum(2, keepdim=True),
            "W2": w2 - (last * hidden).transpose(-2, -1) @ grad2,
            "b2": b2 - (last * grad2).sum(2, keepdim=True),
        }

    def decode(self, q, k, v, lr, tau, weights: dict[str, Tensor], writes: dict[str, Tensor], slot: int) -> Tensor:
        """Write one token, [B, H, 1, f], into the sums of its mini-batch and read it; commits at the last slot."""
        z1 = k @ weights["W1"] + weights["b1"]
        if self.is_mlp:
            hidden = F.gelu(z1, approximate="tanh")
            grad2 = self.inner_gradient(hidden @ weights["W2"] + weights["b2"], v - k)
            grad1 = grad2 @ weights["W2"].transpose(-2, -1) * gelu_derivative(z1)
            writes["W2"] += (lr * hidden).transpose(-2, -1) @ grad2
            writes["b2"] += lr * grad2
        else:
            grad1 = self.inner_gradient(z1, v - k)
        writes["W1"] += (lr * k).transpose(-2, -1) @ grad1
        writes["b1"] += lr * grad1
        now = {name: weight - tau[slot] * writes[name] for name, weight in weights.items()}
        z = q @ now["W1"] + now["b1"]
        if self.is_mlp:
            z = F.gelu(z, approximate="tanh") @ now["W2"] + now["b2"]
        if slot == self.config.mini_batch_size - 1:
            weights.update(now)
            for total in writes.values():
                total.zero_()
        return q + self.inner_norm(z)

    def inner_norm(self, z: Tensor) -> Tensor:
        """The LayerNorm of the inner loss, per head."""
        normed = (z - z.mean(-1, keepdim=True)) / torch.sqrt(z.var(-1, keepdim=True, unbiased=False) + INNER_EPS)
        return self.ttt_norm_weight[:, None] * normed + self.ttt_norm_bias[:, None]

    def inner_gradient(self, z: Tensor, target: Tensor) -> Tensor:
        """Gradient at z of 1/2 ||LN(z) - target||^2, [B, H, n, f]."""
        dim, gamma, beta = z.shape[-1], self.ttt_norm_weight[:, None], self.ttt_norm_bias[:, None]
        std = torch.sqrt(z.var(-1, keepdim=True, unbiased=False) + INNER_EPS)
        normed = (z - z.mean(-1, keepdim=True)) / std
        upstream = (gamma * normed + beta - target) * gamma
        centred = dim * upstream - upstream.sum(-1, keepdim=True)
        return (centred - normed * (upstream * normed).sum(-1, keepdim=True)) / (dim * std)


def gelu_derivative(x: Tensor) -> Tensor:
    """Derivative of the tanh approximation of GELU."""
    scale, cubic = math.sqrt(2 / math.pi), 0.044715
    tanh = torch.tanh(scale * (x + cubic * x**3))
    return 0.5 * (1 + tanh) + 0.5 * x * (1 - tanh**2) * scale * (1 + 3 * cubic * x**2)
