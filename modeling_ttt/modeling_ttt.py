"""TTT language models for Transformers (arXiv 2407.04620): the base model and the causal language model."""

from functools import wraps

import torch
from torch import Tensor, nn
from transformers import initialization as init
from transformers.cache_utils import Cache, DynamicCache
from transformers.generation import GenerationMixin
from transformers.loss.loss_utils import ForCausalLMLoss, fixed_cross_entropy
from transformers.modeling_utils import PreTrainedModel
from transformers.processing_utils import Unpack
from transformers.utils import TransformersKwargs, auto_docstring, can_return_tuple, logging
from transformers.utils.generic import merge_with_config_defaults
from transformers.utils.output_capturing import capture_outputs

from .block import TTTBlock, TTTRMSNorm
from .call_inputs import build_grid, expand_lr_mult, layer_lr_mults, prepare_cache, refuse_unknown
from .configuration_ttt import TTTConfig
from .projection import Projection
from .rotary import rotary_table
from .segments import columns_of, cut_into_segments
from .short_conv import ShortConv
from .token_grid import TokenGrid
from .ttt_cache import clone_cache, load_cache, save_cache
from .ttt_layer import TTTLayer
from .ttt_outputs import TTTCausalLMOutput, TTTModelOutput
from .ttt_state import scan_dtype

__all__ = ["TTTForCausalLM", "TTTModel", "TTTPreTrainedModel"]

logger = logging.get_logger(__name__)

AUTO_MAP = {
    "AutoConfig": "configuration_ttt.TTTConfig",
    "AutoModel": "modeling_ttt.TTTModel",
    "AutoModelForCausalLM": "modeling_ttt.TTTForCausalLM",
}


class TTTPreTrainedModel(PreTrainedModel):
    """Weight initialisation and what the library needs to know about the architecture."""

    config: TTTConfig
    base_model_prefix = "model"
    supports_gradient_checkpointing = True
    _no_split_modules = ["TTTBlock"]
    _skip_keys_device_placement = ["past_key_values"]
    _is_stateful = True
    # Constants that some versions of the official code saved with the parameters.
    _keys_to_ignore_on_load_unexpected = [r"seq_modeling_block\.(rotary_emb\.inv_freq|token_idx)$"]
    # At hand on the class for users of a checkpoint's own code, who have no package to import them from.
    clone_cache = staticmethod(clone_cache)
    save_cache = staticmethod(save_cache)
    load_cache = staticmethod(load_cache)
    _can_record_outputs = {"hidden_states": TTTBlock}

    @torch.no_grad()
    def _init_weights(self, module: nn.Module) -> None:
        super()._init_weights(module)
        if isinstance(module, ShortConv):
            # Variance-preserving, as the official code trains: the library's default would all but silence q and k.
            init.normal_(module.weight, mean=0.0, std=module.kernel_size[0] ** -0.5)
        elif isinstance(module, TTTLayer):
            std = self.config.initializer_range
            init.zeros_(module.learnable_token_idx)
            init.normal_(module.learnable_ttt_lr_weight, mean=0.0, std=std)
            init.zeros_(module.learnable_ttt_lr_bias)
            init.ones_(module.ttt_norm_weight)
            init.zeros_(module.ttt_norm_bias)
            for weight, bias in self.config.inner_net.parameter_names:
                init.normal_(getattr(module, weight), mean=0.0, std=std)
                init.zeros_(getattr(module, bias))

    def save_pretrained(self, save_directory, *args, **kwargs):
        """Save as usual; with the code when asked, and a warning when the configuration keeps the model from learning.

        After `TTTForCausalLM.register_for_auto_class("AutoModelForCausalLM")` the code is written beside the weights,
        as Transformers does for any custom model, and every Auto class finds its own class in it.
        """
        frozen = {
            name: getattr(self.config, name)
            for name in ("frozen_layers", "frozen_heads", "frozen_from")
            if getattr(self.config, name) not in (None, [], {})
        }
        if frozen:
            logger.warning(
                f"the saved configuration freezes inner weights: {frozen}; every user of it will load it so"
            )
        if self._auto_class is not None:
            self.config.auto_map = dict(AUTO_MAP)
        return super().save_pretrained(save_directory, *args, **kwargs)


@auto_docstring(custom_intro="The TTT model without a head: from token ids to hidden states and plasticity.")
class TTTModel(TTTPreTrainedModel):
    def __init__(self, config: TTTConfig):
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size, config.pad_token_id)
        self.layers = nn.ModuleList([TTTBlock(config, i) for i in range(config.num_hidden_layers)])
        self.norm = TTTRMSNorm(config.hidden_size, config.rms_norm_eps)
        self.gradient_checkpointing = False
        self.post_init()

    @merge_with_config_defaults
    @capture_outputs
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        use_cache: bool | None = None,
        ttt_lr_mult: Tensor | None = None,
        output_plasticity: bool | None = None,
        output_ttt_stats: bool | None = None,
        reset_at: Tensor | int | list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TTTModelOutput:
        r"""
        Read tokens; the inner weights learn from every one of them.

        Args:
            input_ids: Token ids, [B, T]; or `inputs_embeds` [B, T, C].
            attention_mask: [B, T] or with the tokens of the cache on the left. A masked token never writes and never
                counts: a left-padded, a right-padded and an unpadded row give the same results.
            position_ids: [B, T] or [1, T]; without an attention_mask, a position that does not increase (and 0 at the
                start of a call) marks the first token of a new document, which starts from W_0. Otherwise it changes
                nothing.
            past_key_values: The state to go on from; any split of a sequence into calls gives the same results. It is
                advanced whatever `use_cache` says, and left as it was when the call fails.
            use_cache: Whether to return the state, making one if none was passed (default: the configuration).
            ttt_lr_mult: Factor of the inner learning rate, broadcastable to [B, L, H, T]; differentiable (under
                gradient checkpointing with `use_reentrant=False`). 0 keeps a token from writing, 1 changes nothing.
                Negative values ascend the inner loss; values are not checked.
            output_plasticity: Whether to return the plasticity of every token (default: the configuration, True).
            output_ttt_stats: Whether to return the diagnostics of the inner loop (default: the configuration, False).
            reset_at: The first tokens of new documents, as token ids or as a bool mask [B, T]: state, mini-batch and
                convolution windows start anew there.

        Raises:
            ValueError: an argument does not fit the call or the model; the message names it.
        """
        refuse_unknown(kwargs)
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("pass exactly one of input_ids and inputs_embeds")
        if inputs_embeds is None:
            inputs_embeds = self.embed_tokens(input_ids)
        batch, length = inputs_embeds.shape[:2]
        if length == 0:
            raise ValueError("input_ids must hold at least one token per row, got none")
        config = self.config
        if output_plasticity is None:
            output_plasticity = config.output_plasticity
        if output_ttt_stats is None:
            output_ttt_stats = config.output_ttt_stats
        past_key_values, use_cache = self._prepare_cache(past_key_values, use_cache, batch)
        device = inputs_embeds.device
        grid = build_grid(
            config,
            (batch, length),
            device,
            attention_mask,
            position_ids,
            reset_at,
            input_ids,
            past_key_values,
        )
        lr_mults = layer_lr_mults(config, ttt_lr_mult, grid)
        wanted = [
            kwargs.get(f"output_{name}", getattr(config, f"output_{name}", None)) for name in self._can_record_outputs
        ]
        recorded = any(value is not None and value is not False for value in wanted)
        segments = cut_into_segments(self, grid, capturing=output_ttt_stats or recorded)
        states: list[dict[str, Tensor]] = [{}] * config.num_hidden_layers
        if past_key_values is not None:
            states = [layer.tensors for layer in past_key_values.layers]
        options = {
            "output_plasticity": output_plasticity,
            "output_ttt_stats": output_ttt_stats,
            "output_state": past_key_values is not None or len(segments) > 1,
        }
        hidden_states, plasticity, stats, states = self._run(inputs_embeds, segments, states, lr_mults, options)
        if past_key_values is not None:
            # Only now, so that a call that fails leaves the cache as it was.
            position, seen, start = segments[-1][1].advanced()
            for cache_layer, state in zip(past_key_values.layers, states, strict=True):
                cache_layer.store(state | {"position": position, "seen": seen}, length, start)
        return TTTModelOutput(
            last_hidden_state=hidden_states,
            past_key_values=past_key_values if use_cache else None,
            plasticity=tuple(plasticity) if output_plasticity else None,
            ttt_stats=tuple(stats) if output_ttt_stats else None,
        )

    def _run(self, inputs_embeds: Tensor, segments: list, states: list, lr_mults: list, options: dict):
        """All segments through all layers: hidden states [B, T, C] and per layer plasticity, statistics and state."""
        if len(segments) == 1:
            return self._run_segment(inputs_embeds, segments[0][1], states, lr_mults, options)
        hidden_states, plasticity = None, []
        for columns, grid in segments:
            mults = [columns_of(lr_mult, columns) for lr_mult in lr_mults]
            read, written, stats, states = self._run_segment(inputs_embeds[:, columns], grid, states, mults, options)
            plasticity.append(written)
            if hidden_states is None:
                hidden_states = read.new_empty(*inputs_embeds.shape[:2], read.shape[-1])
            hidden_states[:, columns] = read
        if options["output_plasticity"]:
            plasticity = [torch.cat(parts, 2) for parts in zip(*plasticity, strict=True)]
        return hidden_states, plasticity, stats, states

    def _run_segment(self, hidden_states: Tensor, grid: TokenGrid, states: list, lr_mults: list, options: dict):
        config, dtype = self.config, scan_dtype(hidden_states.dtype)
        theta = float(config.rope_parameters["rope_theta"])
        table = rotary_table(config.mini_batch_size, config.head_dim, theta, dtype, hidden_states.device)
        rotary = table[grid.slot][:, :, None]  # [B or 1, T, 1, f/2, 2]
        found = []
        for layer, past, lr_mult in zip(self.layers[: config.num_hidden_layers], states, lr_mults, strict=True):
            hidden_states, *more = layer(
                hidden_states, grid=grid, rotary=rotary, past=past, lr_mult=lr_mult, **options
            )
            found.append(more)
        return self.norm(hidden_states), *zip(*found, strict=True)

    def _prepare_cache(self, cache: Cache | None, use_cache: bool | None, batch: int) -> tuple[Cache | None, bool]:
        cache = prepare_cache(cache, self.config, batch)
        if self.gradient_checkpointing and self.training:
            if cache is not None and cache.get_seq_length() > 0:
                raise ValueError("gradient checkpointing cannot go on from past_key_values: its layers run twice")
            if use_cache:
                logger.warning_once("use_cache=True is incompatible with gradient checkpointing, setting it to False")
            return None, False
        if use_cache and cache is None:
            cache = DynamicCache(config=self.config)
        return cache, bool(use_cache)


@auto_docstring(custom_intro="The TTT model with a language-model head: next-token logits and per-token plasticity.")
class TTTForCausalLM(TTTPreTrainedModel, GenerationMixin):
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}
    _tp_plan = {"lm_head": "colwise_gather_output"}
    _fsdp_plan = {"lm_head": "keep_full_weight"}

    def __init__(self, config: TTTConfig):
        super().__init__(config)
        self.model = TTTModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = Projection(config.hidden_size, config.vocab_size)
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: torch.LongTensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: torch.LongTensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: torch.FloatTensor | None = None,
        labels: torch.LongTensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        ttt_lr_mult: Tensor | None = None,
        output_plasticity: bool | None = None,
        output_ttt_stats: bool | None = None,
        reset_at: Tensor | int | list[int] | None = None,
        **kwargs: Unpack[TransformersKwargs],
    ) -> TTTCausalLMOutput:
        r"""
        Next-token logits, [B, T, V]; the other arguments are those of [`TTTModel.forward`].

        Args:
            labels: Token ids [B, T] for the loss (mean over predicted tokens, nats), shifted inside; -100 is ignored.
            logits_to_keep: Number of last positions to compute logits for (0: all), or the positions as a tensor.

        Example:

        ```python
        >>> import modeling_ttt
        >>> from transformers import AutoModelForCausalLM, AutoTokenizer
        >>> model = AutoModelForCausalLM.from_pretrained("model_cards/ttt-linear-tiny")
        >>> tokenizer = AutoTokenizer.from_pretrained("model_cards/ttt-linear-tiny")
        >>> outputs = model(**tokenizer("It was the best of times", return_tensors="pt"))
        >>> outputs.plasticity[0].shape  # batch, heads, tokens, of the first layer
        ```
        """
        if labels is not None:
            shape = tuple((input_ids if input_ids is not None else inputs_embeds).shape[:2])
            if tuple(labels.shape) != shape:
                raise ValueError(f"labels must be [batch, tokens] = {list(shape)}, got {list(labels.shape)}")
        outputs: TTTModelOutput = self.model(
            input_ids=input_ids,
            attention_mask=attention_mask,
            position_ids=position_ids,
            past_key_values=past_key_values,
            inputs_embeds=inputs_embeds,
            use_cache=use_cache,
            ttt_lr_mult=ttt_lr_mult,
            output_plasticity=output_plasticity,
            output_ttt_stats=output_ttt_stats,
            reset_at=reset_at,
            **kwargs,
        )
        logits = self.lm_head(_kept_positions(outputs.last_hidden_state, logits_to_keep))
        loss = None
        if labels is not None:
            loss_function = self.loss_function
            if logits.dtype == torch.float64 and loss_function is ForCausalLMLoss:
                loss_function = _float64_causal_loss  # the library's own rounds the logits to float32
            loss = loss_function(logits=logits, labels=labels, vocab_size=self.config.vocab_size, **kwargs)
        return TTTCausalLMOutput(
            loss=loss,
            logits=logits,
            past_key_values=outputs.past_key_values,
            hidden_states=outputs.hidden_states,
            attentions=outputs.attentions,
            plasticity=outputs.plasticity,
            ttt_stats=outputs.ttt_stats,
        )

    @wraps(GenerationMixin.generate)
    def generate(self, inputs=None, *args, ttt_lr_mult: Tensor | None = None, **kwargs):
        """`GenerationMixin.generate`; `ttt_lr_mult` must not depend on the token: its last dimension is 1.

        A row that ends before its neighbours is fed pad tokens until they end, as in any model, and here it learns
        from them: go on from the returned state of a batch only with rows that ended together, or generate one by one.

        Raises:
            ValueError: `ttt_lr_mult` has a token axis, which cannot hold for tokens not generated yet.
        """
        if ttt_lr_mult is not None:
            prompt = next(
                (x for x in (inputs, kwargs.get("input_ids"), kwargs.get("inputs_embeds")) if isinstance(x, Tensor)),
                None,
            )
            batch = 1 if prompt is None else prompt.shape[0]
            heads, layers = self.config.num_attention_heads, self.config.num_hidden_layers
            if not isinstance(ttt_lr_mult, Tensor):
                raise TypeError(f"ttt_lr_mult must be a tensor, got {type(ttt_lr_mult).__name__}")
            if ttt_lr_mult.dim() > 0 and ttt_lr_mult.shape[-1] != 1:
                raise ValueError(
                    "in generate, ttt_lr_mult holds for every token: its last dimension must be 1, got "
                    f"{list(ttt_lr_mult.shape)}; to knock out tokens of the prompt, read all but its last token with "
                    "a forward pass and pass the past_key_values it returns"
                )
            expanded = expand_lr_mult(ttt_lr_mult, (batch, layers, heads, 1))
            # One per row, so that beams and returned sequences repeat it like the other inputs.
            kwargs["ttt_lr_mult"] = expanded.expand(batch, *expanded.shape[1:])
        return super().generate(inputs, *args, **kwargs)


def _float64_causal_loss(
    logits: Tensor,
    labels: Tensor,
    vocab_size: int,
    num_items_in_batch: Tensor | int | None = None,
    ignore_index: int = -100,
    shift_labels: Tensor | None = None,
    **kwargs,
) -> Tensor:
    """The causal language-model loss of Transformers without its cast to float32."""
    if shift_labels is None:
        shift_labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[:, 1:]
    targets = shift_labels.reshape(-1).to(logits.device)
    return fixed_cross_entropy(logits.reshape(-1, vocab_size), targets, num_items_in_batch, ignore_index, **kwargs)


def _kept_positions(hidden_states: Tensor, logits_to_keep: int | Tensor) -> Tensor:
    """Hidden states [B, T, C] of the positions to compute logits for (newer versions of Transformers have the same).

    An int keeps that many last positions (0: all); a 1-D tensor positions of every row; a 2-D tensor positions per
    row, or as a bool mask [B, T] the marked ones, flattened.
    """
    if isinstance(logits_to_keep, int):
        return hidden_states[:, -logits_to_keep:] if logits_to_keep else hidden_states
    if logits_to_keep.dim() == 2 and logits_to_keep.dtype == torch.bool:
        return hidden_states[logits_to_keep]
    if logits_to_keep.dim() == 2:
        return torch.take_along_dim(hidden_states, logits_to_keep[..., None], dim=1)
    return hidden_states[:, logits_to_keep]
