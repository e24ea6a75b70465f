"""What a TTT model returns besides the usual outputs of Transformers."""

from dataclasses import dataclass

import torch
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast
from transformers.utils import ModelOutput

__all__ = ["TTTCausalLMOutput", "TTTModelOutput", "TTTStats"]


@dataclass
class TTTStats(ModelOutput):
    """Diagnostics of the inner loop of one layer, each float32 [batch, heads, tokens], 0 at masked tokens.

    Five of them are easily confused. *Plasticity* (in the model's output) is the norm of what a token commits to the
    weights. *inner_grad_norm* is the norm of its gradient before any learning rate. *lr* is the learning rate of its
    write, multiplier included. *step_norm* is the distance between the weights that consecutive tokens read: it also
    rescales the earlier writes of the mini-batch. *state_drift* is the distance of the committed weights the gradient
    was taken at from W_0.

    Args:
        inner_grad_norm: Frobenius norm of the inner gradient, biases included, before any learning rate.
        lr: Inner learning rate of the token, after `ttt_lr_mult` and freezing, before the token rate tau.
        step_norm: Norm of theta_t - theta_(t-1).
        target_dispersion: Mean over the head dim of the squared distance of the target v - k (before rotation) to its
            mean over the real tokens of this call.
        loss_init: Inner loss 1/2 ||LN(f(k)) - (v - k)||^2 at W_0.
        loss_before: The same at the weights of the mini-batch start.
        loss_after: The same at the weights the token itself reads, its own write included.
        state_drift: ||W - W_0|| of the committed weights, biases included.
    """

    inner_grad_norm: torch.FloatTensor | None = None
    lr: torch.FloatTensor | None = None
    step_norm: torch.FloatTensor | None = None
    target_dispersion: torch.FloatTensor | None = None
    loss_init: torch.FloatTensor | None = None
    loss_before: torch.FloatTensor | None = None
    loss_after: torch.FloatTensor | None = None
    state_drift: torch.FloatTensor | None = None


@dataclass
class TTTModelOutput(BaseModelOutputWithPast):
    """Output of `TTTModel`.

    Args:
        plasticity: One float32 tensor [batch, heads, tokens] per TTT layer: the Frobenius norm of what each token
            commits to the inner weights, biases included; heads combine as the root of the sum of squares. 0 at masked
            tokens. (float64 in a float64 model.)
        ttt_stats: One `TTTStats` per TTT layer, when `output_ttt_stats=True`.
    """

    plasticity: tuple[torch.FloatTensor, ...] | None = None
    ttt_stats: tuple[TTTStats, ...] | None = None


@dataclass
class TTTCausalLMOutput(CausalLMOutputWithPast):
    """Output of `TTTForCausalLM`; `plasticity` and `ttt_stats` as in `TTTModelOutput`."""

    plasticity: tuple[torch.FloatTensor, ...] | None = None
    ttt_stats: tuple[TTTStats, ...] | None = None
