"""A GPTModel as a model of the transformers library, for its Trainer, TRL, `generate`, pipelines and all of PEFT."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import Cache, DynamicCache, GenerationConfig, GenerationMixin, GPT2Config, PreTrainedModel
from transformers.loss.loss_utils import ForCausalLMLoss
from transformers.modeling_outputs import BaseModelOutputWithPast, CausalLMOutputWithPast

from MyGPT.cache import check_inputs, positions_and_mask
from MyGPT.loss import one_tied_entry, untied
from MyGPT.model import GPTModel
from MyGPT.parts import refuse_parts
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
        refuse_parts(model, "the transformers library")
        self.gpt_config = model.config
        super().__init__(GPT2Config(**model.config.to_dict(), use_cache=True))
        # As for GPT2LMHeadModel. From another value, Trainer would conclude that it must count labels in another way.
        self.loss_type = None  # type: ignore[assignment]
        self.loss_function = ForCausalLMLoss
        self.name_or_path = self.config.name_or_path = model.name_or_path or ""
        self.transformer, self.lm_head = model.transformer, model.lm_head
        if model.config.tie_weights:
            # PEFT trains single tokens only if the output head is a linear layer.
            self.lm_head = nn.Linear(model.config.emb_dim, model.config.vocab_size, bias=False, device="meta")
            self.lm_head.weight = model.transformer.wte.weight
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
        check_inputs(self.gpt_config, input_ids, None, inputs_embeds, labels)
        base = self._hidden_states(
            input_ids, attention_mask, past_key_values, inputs_embeds, position_ids, use_cache, **kwargs
        )
        hidden: Any = base.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:])
        loss = None
        if labels is not None:
            loss = self.loss_function(logits, labels, vocab_size=self.config.vocab_size, **kwargs)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=base.past_key_values)

    def _hidden_states(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        position_ids: Tensor | None = None,
        use_cache: bool | None = None,
        **kwargs: Any,
    ) -> BaseModelOutputWithPast:
        """Return the hidden states after the last LayerNorm, (B, T, C). For the arguments, see `forward`."""
        for name in ("output_attentions", "output_hidden_states"):
            if kwargs.get(name):
                raise ValueError(f"{name} is not supported: leave it unset, and use MyGPT.inside.trace instead")
        if past_key_values is None and use_cache and not torch.is_grad_enabled():
            past_key_values = DynamicCache(config=self.config)
        n_past = 0 if past_key_values is None else int(past_key_values.get_seq_length())
        if attention_mask is None and position_ids is not None and n_past == 0:
            attention_mask = (position_ids == 0).cumsum(1)
        if position_ids is not None and attention_mask is not None and attention_mask.dim() == 2:
            _check_positions(position_ids, attention_mask)
        cache = None if past_key_values is None else _TransformersCache(past_key_values, position_ids)
        hidden = self.transformer(input_ids, attention_mask, inputs_embeds, cache)
        return BaseModelOutputWithPast(last_hidden_state=hidden, past_key_values=past_key_values)

    @property
    def base_model(self) -> Callable[..., BaseModelOutputWithPast]:  # type: ignore[override]
        """The model without its output head. TRL calls it with the arguments of `forward` except labels."""
        return self._hidden_states

    def save_pretrained(  # type: ignore[override]
        self,
        save_directory: str | os.PathLike[str],
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        **kwargs: Any,
    ) -> None:
        """Write a model directory as `GPTModel.save_pretrained` does, unless is_main_process is False.

        Other keywords of transformers have no effect, except that push_to_hub=True raises ValueError.
        """
        if kwargs.get("push_to_hub"):
            raise ValueError(
                "push_to_hub is not supported: save the directory, then call huggingface_hub.upload_folder"
            )
        if is_main_process:
            write_directory(save_directory, self.gpt_config, state_dict or self.state_dict(keep_vars=True))

    def _get_name(self) -> str:
        # By this name, Trainer knows that label_smoothing_factor must shift the labels.
        return "GPT2LMHeadModel"

    def get_input_embeddings(self) -> nn.Module:
        return self.transformer.wte

    def get_output_embeddings(self) -> nn.Module:
        return self.lm_head

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPTForCausalLM:
        with untied(self.transformer.wte, self.lm_head):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, *rest: Any) -> None:
        state_dict.update(in_our_layout(state_dict, prefix))  # Trainer loads the files that save_pretrained wrote.
        one_tied_entry(self.transformer.wte, self.lm_head, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, *rest)


class _TransformersCache:
    """A cache of the transformers library behind the interface of `KVCache`, as `Transformer.forward` uses it."""

    def __init__(self, cache: Cache, position_ids: Tensor | None) -> None:
        self.cache, self.position_ids = cache, position_ids

    def positions_and_mask(
        self, attention_mask: Tensor | None, T: int, device: torch.device
    ) -> tuple[Tensor, Tensor | None]:
        """Return the positions of the T new tokens, and a mask of the cache's entries that each may attend to.

        `generate` makes the mask (B, 1, T, n) itself if the cache has a fixed number n of entries.
        """
        if attention_mask is not None and attention_mask.dim() == 4 and self.position_ids is not None:
            return self.position_ids, attention_mask
        S = int(self.cache.get_seq_length()) + T
        positions, mask = positions_and_mask(attention_mask, T, S, device)
        n_unused = self.cache.get_mask_sizes(T, 0)[0] - S  # above 0 if the cache has a fixed number of entries
        if n_unused > 0:
            mask = torch.ones(1, 1, T, S, dtype=torch.bool, device=device).tril(S - T) if mask is None else mask
            mask = F.pad(mask, (0, n_unused))
        return positions, mask

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Append the keys and values of a layer's new tokens, and return those of all its tokens."""
        return self.cache.update(k, v, layer)

    def advance(self, T: int) -> None:
        """Do nothing, because `append` has counted the tokens."""


def _check_positions(position_ids: Tensor, attention_mask: Tensor) -> None:
    """Raise ValueError if positions (B or 1, T) differ from those that attention_mask (B, S) gives to its tokens.

    On a GPU nothing is checked, because the CPU would have to wait.
    """
    if position_ids.device.type != "cpu" or torch.compiler.is_compiling():
        return
    T, S = position_ids.shape[-1], attention_mask.shape[1]
    positions, _ = positions_and_mask(attention_mask, T, S, position_ids.device)
    wrong = (positions != position_ids) & (attention_mask[:, S - T :] != 0)
    if wrong.any():
        row, column = wrong.nonzero()[0].tolist()
        given = position_ids.expand_as(positions)[row, column]
        raise ValueError(
            f"position_ids must count the tokens of attention_mask: token {column} of row {row} has position "
            f"{int(positions[row, column])}, got {int(given)}"
        )
