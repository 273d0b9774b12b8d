"""A GPTModel as a model of the transformers library, for its Trainer, TRL, `generate`, pipelines and all of PEFT."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, GPT2Config, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import CausalLMOutputWithPast

from MyGPT.cache import check_inputs, positions_and_mask
from MyGPT.loss import untied
from MyGPT.model import GPTModel
from MyGPT.weights.formats.huggingface import write_directory
from MyGPT.weights.layout import in_our_layout


class GPTForCausalLM(GenerationMixin, PreTrainedModel):
    """The layers of a GPTModel behind the interface of `transformers.GPT2LMHeadModel`. `gpt_config` is the GPTModel's config.

    The layers have the names of `GPT2LMHeadModel`. Matrices have the shape (out, in) in memory, and (in, out) in the files
    that `save_pretrained` writes.
    """

    config_class = GPT2Config
    base_model_prefix = "transformer"
    main_input_name = "input_ids"
    supports_gradient_checkpointing = True
    _supports_sdpa = True
    _no_split_modules = ["Block"]  # noqa: RUF012

    def __init__(self, model: GPTModel) -> None:
        self.gpt_config = model.config
        super().__init__(GPT2Config(**model.config.to_dict(), use_cache=True))
        # As for GPT2LMHeadModel. From another value, Trainer would conclude that it must count labels in another way.
        self.loss_type, self.loss_function = None, ForCausalLMLoss
        self.transformer, self.lm_head = model.transformer, model.lm_head
        if model.config.tie_weights:
            self._tied_weights_keys = {"lm_head.weight": "transformer.wte.weight"}
        for parameter in self.parameters():
            parameter._is_hf_initialized = True  # type: ignore[attr-defined]  # post_init must not draw new values
        self.post_init()
        if model.config.generation_config:
            self.generation_config = GenerationConfig(**model.config.generation_config)
        self.train(model.training)

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        logits_to_keep: int = 0,
        **kwargs: Any,
    ) -> CausalLMOutputWithPast:
        """Return the logits (B, T, V), and the loss if labels are given. For the arguments, see `GPTModel.forward`.

        Args:
            past_key_values: the keys and values of earlier tokens, to which those of the new tokens are appended.
            position_ids: positions within each text, (B or 1, T). Without attention_mask, a position 0 begins a new text.
            use_cache: return a new cache if past_key_values is None.
            logits_to_keep: number of last positions whose logits are computed; 0 means all.
        """
        if past_key_values is None and use_cache and not torch.is_grad_enabled():
            past_key_values = DynamicCache(config=self.config)
        if attention_mask is None and position_ids is not None and past_key_values is None:
            attention_mask = (position_ids == 0).cumsum(1)
        cache = None if past_key_values is None else _TransformersCache(past_key_values)
        check_inputs(self.gpt_config, input_ids, None, inputs_embeds, labels)
        hidden = self.transformer(input_ids, attention_mask, inputs_embeds, cache)  # (B, T, C)
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=past_key_values)

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a model directory as `GPTModel.save_pretrained` does, unless is_main_process is False."""
        if is_main_process:
            write_directory(save_directory, self.gpt_config, state_dict or self.state_dict(keep_vars=True))

    def get_input_embeddings(self) -> torch.nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> torch.nn.Module:
        return self.lm_head

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPTForCausalLM:
        with untied(self.transformer.wte, self.lm_head):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state_dict.update(in_our_layout(state_dict, prefix))  # Trainer loads the files that save_pretrained wrote.
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _TransformersCache:
    """A cache of the transformers library behind the interface of `KVCache`, as `Transformer.forward` uses it."""

    def __init__(self, cache: Cache) -> None:
        self.cache = cache

    def positions_and_mask(
        self, attention_mask: Tensor | None, T: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        return positions_and_mask(attention_mask, T, int(self.cache.get_seq_length()) + T, device)

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        return self.cache.update(k, v, layer)

    def advance(self, T: int) -> None:
        """Do nothing: `append` has counted the tokens."""
