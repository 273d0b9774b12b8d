"""The GPT-2 transformer (Radford et al., 2019): token ids in, next-token logits out.

B batch size, T new tokens, S all tokens so far (cached and new), C embedding width, H heads, D = C // H, V vocabulary size.
The names of the layers are those of OpenAI's checkpoints. Caches, masks and input checks are in cache.py, initial weights in
initialisation.py, the losses in loss.py, the decoding loop in generation.py.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from MyGPT.cache import KVCache, Piece, SlotCache, check_inputs, positions_and_mask, slot_hidden_states
from MyGPT.config import GPTConfig, as_config
from MyGPT.costs import count_matrix_weights, flops_per_token
from MyGPT.initialisation import initialise
from MyGPT.loss import CausalLMOutput, TiedHead, head_loss, one_tied_entry, token_loss, untied
from MyGPT.notebooks import model_table
from MyGPT.parts import Parts, as_parts, check_parts
from MyGPT.weights.formats.huggingface import write_directory
from MyGPT.weights.pretrained import read_weights, stored_name


class CausalSelfAttention(nn.Module):
    """Multi-head attention in which every token gathers information from itself and the tokens before it."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        # One matrix for the queries, keys and values of all heads.
        self.c_attn = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=2)  # each (B, T, C)
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in (q, k, v))  # each (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        # Without a mask there are no earlier tokens, or one new token, which sees the whole cache.
        is_causal = mask is None and (cache is None or T > 1)
        y = self.attention(q, k, v, mask, is_causal).transpose(1, 2).reshape(B, T, C)  # the heads side by side
        return F.dropout(self.c_proj(y), self.drop_rate, self.training)

    def attention(self, q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None, is_causal: bool) -> Tensor:
        """Return softmax(QKᵀ/√D + mask)V, (B, H, T, D). If is_causal is True, a token sees itself and the tokens before it."""
        drop_rate = self.drop_rate if self.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=is_causal)


class MLP(nn.Module):
    """Two linear layers with GELU (Hendrycks & Gimpel, 2016) between them, applied to every token separately."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.drop_rate = config.drop_rate
        self.approximate = "tanh" if config.activation == "gelu_new" else "none"
        self.c_fc = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.c_proj = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4 * C)
        return F.dropout(self.c_proj(x), self.drop_rate, self.training)  # (B, T, C)


class Block(nn.Module):
    """Attention and MLP. Each reads a normalised copy of the residual stream and adds its output to the stream (pre-LN)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        return x + self.mlp(self.ln_2(x))


class Transformer(nn.Module):
    """The model without its output head: embeddings, blocks and the final LayerNorm."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.drop_rate = config.drop_rate
        # from_pretrained, because nn.Embedding(V, C) draws values, which takes over a second on the meta device.
        self.wte = nn.Embedding.from_pretrained(torch.empty(config.vocab_size, config.emb_dim), freeze=False)
        self.wpe = nn.Embedding.from_pretrained(torch.empty(config.context_length, config.emb_dim), freeze=False)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)
        self.gradient_checkpointing = False

    def forward(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """Return the hidden states after the last LayerNorm, (B, T, C). For the arguments, see GPTModel.forward."""
        x = self.wte(input_ids) if inputs_embeds is None else inputs_embeds  # (B, T, C)
        T = x.shape[1]
        if cache is None:
            positions, mask = positions_and_mask(attention_mask, T, T, x.device)
        else:
            positions, mask = cache.positions_and_mask(attention_mask, T, x.device)
        x = F.dropout(x + self.wpe(positions), self.drop_rate, self.training)
        for block in self.h:
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        if cache is not None:
            cache.advance(T)
        return self.ln_f(x)


class GPTModel(nn.Module):
    """A GPT-2 model with new random weights. `config`, a GPTConfig or a dict of its fields, sets sizes and options.

    `parts` names a Python file whose attention, MLP or block replaces GPT-2's (see parts.py), or is its module or a dict.
    """

    name_or_path: str | None = None
    """The name or path of the model's files. PEFT stores it with an adapter, as the adapter's base model."""

    def __init__(self, config: GPTConfig | Mapping[str, Any], parts: Any = None) -> None:
        super().__init__()
        self.config = config = as_config(config)
        self.parts: Parts | None = as_parts(parts)
        # Layers are built without memory, so that torch does not draw default weights which are then overwritten.
        with torch.device("meta"):
            self.transformer = Transformer(config)
            self.lm_head: nn.Linear | TiedHead = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        if torch.get_default_device().type != "meta":  # to_empty would load sympy, which takes half a second
            self.to_empty(device=torch.get_default_device())
        if config.tie_weights:
            self.lm_head = TiedHead(self.transformer.wte.weight)
        if self.parts is not None:
            gpt2 = {"CausalSelfAttention": CausalSelfAttention, "MLP": MLP, "Block": Block}
            self.parts = self.parts.install(self, gpt2)
        self.reset_parameters()

    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
        targets: Tensor | None = None,
        per_row: bool = False,
    ) -> Any:
        """Return the logits (B, T, V), a `CausalLMOutput` if labels are given, or the result of `token_loss` if targets are.

        Args:
            input_ids: token ids, (B, T) int64.
            attention_mask: (B, S), 1 for tokens and 0 for padding on either side. Padding is not counted in the positions. If
                a sequence packs several texts, number the tokens of the first text 1, of the second text 2, and so on; each
                text is then computed as if it were alone.
            inputs_embeds: token embeddings to use instead of input_ids, (B, T, C).
            labels: (B, T) int64, usually input_ids themselves; the model shifts them by one position, as in transformers.
                Labels of -100 are ignored. If a sequence packs several texts, give -100 to the first token of each text.
            output_attentions, output_hidden_states, return_dict: leave unset; they exist because PEFT passes them.
            cache: the keys and values of the S - T earlier tokens; the new tokens are appended.
            last_only: compute only the logits of the last position, (B, 1, V).
            targets: (B, T) int64, the token after each input; -100 is not counted. Wrappers such as DistributedDataParallel
                need this argument, because only calls of the wrapper itself average gradients: `ddp(ids, targets=targets)`.
            per_row: with targets, return the result of `row_losses`.

        Raises:
            ValueError: a wrong shape or dtype, a sequence longer than the context length, or arguments that exclude each
                other.
            IndexError: an id or a label outside the vocabulary.
        """
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not supported; leave them unset")
        if labels is not None and targets is not None:
            raise ValueError(
                "give either labels, which the model shifts by one position, or targets, which it does not"
            )
        wanted = labels if targets is None else targets
        if wanted is not None and last_only:
            raise ValueError("labels and targets need every position: leave out last_only")
        check_inputs(self.config, input_ids, attention_mask, inputs_embeds, wanted, cache)
        hidden = self.transformer(input_ids, attention_mask, inputs_embeds, cache)  # (B, T, C)
        if targets is not None and per_row:
            return torch.stack([head_loss(self.lm_head, *row)[0] for row in zip(hidden, targets, strict=True)])
        if targets is not None:
            return head_loss(self.lm_head, hidden, targets)
        logits = self.lm_head(hidden[:, -1:] if last_only else hidden)  # (B, T, V)
        if labels is None:
            return logits
        total, count = token_loss(logits[:, :-1], labels[:, 1:])
        return CausalLMOutput(loss=total / count, logits=logits)

    def token_loss(
        self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy in nats and the number of counted targets, without storing (B, T, V) logits.

        input_ids and targets are (B, T) int64. Each target is the token after the input at the same position; targets of -100
        are not counted. For attention_mask, see `forward`. If DistributedDataParallel wraps the model, call
        `ddp(input_ids, targets=targets)`: like every call of `ddp.module`, `ddp.module.token_loss` leaves the gradients of
        each rank as they are.
        """
        return self(input_ids, attention_mask, targets=targets)

    def row_losses(self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """Return the summed cross-entropy of each sequence in nats, (B,). For the arguments, see `GPTModel.token_loss`."""
        return self(input_ids, attention_mask, targets=targets, per_row=True)

    @property
    def gradient_checkpointing(self) -> bool:
        """True if training recomputes each block in the backward pass, which takes less memory but a third more computation."""
        return self.transformer.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.transformer.gradient_checkpointing = value

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """Return input_ids and attention_mask as the arguments for `forward` in Hugging Face's decoding loop.

        This library does not call the method, but PEFT requires that a model has it.
        """
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """Return an empty KV cache for batch_size sequences of up to `length` tokens (default: the model's context length)."""
        return KVCache(self.config, batch_size, length, like=self.transformer.wpe.weight.detach())

    def new_slot_cache(self, slots: int, length: int | None = None) -> SlotCache:
        """Return an empty cache with `slots` slots of up to `length` tokens each (default: the model's context length)."""
        return SlotCache(self.config, slots, length, like=self.transformer.wpe.weight.detach())

    @torch.no_grad()
    def forward_slots(self, pieces: Sequence[Piece], cache: SlotCache) -> Tensor:
        """Compute new tokens of several sequences, whose lengths may differ, and return the wanted logits.

        The result has the shape (sum of n_logits, V), in the order of the pieces. The logits of a piece do not depend on the
        other pieces, up to rounding. Keys and values are appended to the slots, and `cache.lengths` grows.

        Raises:
            ValueError: a piece that does not fit into its slot, or two pieces for one slot.
            VocabularyError: an id outside the vocabulary.
        """
        cache.check(pieces)
        logits: Tensor = self.lm_head(slot_hidden_states(self.transformer, pieces, cache))
        return logits

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Return the number of parameters, counting shared parameters once.

        If only_trainable is true, frozen parameters are not counted. If exclude_embeddings is true, the token and position
        embeddings are not counted.
        """
        counted = {parameter for parameter in self.parameters() if parameter.requires_grad or not only_trainable}
        if exclude_embeddings:
            counted -= {self.transformer.wte.weight, self.transformer.wpe.weight}
        return sum(parameter.numel() for parameter in counted)

    def estimate_flops(self, n_tokens: int | None = None, backward: bool = True) -> int:
        """Return the floating-point operations per token in a sequence of n_tokens (default: the model's context length).

        The backward pass is included unless backward=False. See `costs.flops_per_token`.
        """
        return flops_per_token(self.config, n_tokens, backward, count_matrix_weights(self))

    def _repr_html_(self) -> str:
        return model_table(self)

    def save_pretrained(
        self,
        directory: str | os.PathLike[str],
        tokenizer: Any = None,
        *,
        is_main_process: bool = True,
        state_dict: Mapping[str, Tensor] | None = None,
        save_function: Callable[..., Any] | None = None,
    ) -> None:
        """Write a model directory that transformers can load too. If writing fails, an existing directory is left unchanged.

        The directory gets config.json, model.safetensors (several files above 5 GB), generation_config.json, a model card,
        and the files of the tokenizer if one is given. If the weights are sharded (`fully_shard`), all ranks must call this
        method: they gather one weight at a time, rank 0 writes, and all ranks return, or raise the same error, afterwards.

        The keywords are those that scripts for Accelerate pass: if is_main_process is False, nothing is written; state_dict
        has the weights to write, by default those of the model; save_function is not used.
        """
        if is_main_process:
            weights = self.state_dict(keep_vars=True) if state_dict is None else state_dict
            write_directory(directory, self.config, weights, tokenizer, parts=self.parts)

    def train(self, mode: bool = True) -> GPTModel:
        """Set training mode if `mode` is True, otherwise evaluation mode, and return the model.

        Before training, trained weights that are not contiguous in memory are copied, because torch's fused AdamW needs this.
        Frozen weights stay as they are, so they can be memory-mapped.
        """
        if mode:
            self._copy_trained_weights()
        return super().train(mode)

    def requires_grad_(self, requires_grad: bool = True) -> GPTModel:
        """Train all weights if `requires_grad` is True, otherwise freeze them, and return the model."""
        super().requires_grad_(requires_grad)
        if self.training:
            self._copy_trained_weights()
        return self

    def _copy_trained_weights(self) -> None:
        """Copy all trained weights of an opened model to contiguous memory, so that they do not need its file any more."""
        # torch's fused AdamW gives wrong results when a parameter and its optimizer state have different strides.
        trained = [parameter for parameter in self.parameters() if parameter.requires_grad]
        if not all(parameter.is_contiguous() for parameter in trained):
            for parameter in trained:
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)

    def reset_parameters(self) -> None:
        """Set all weights to new random values in place, as in a new model. Sharded weights need equal seeds on all ranks."""
        initialise(self, self.config)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> GPTModel:
        with untied(self.transformer.wte, self.lm_head):
            return super()._apply(fn, recurse)

    def _load_from_state_dict(self, state_dict: dict[str, Tensor], prefix: str, metadata: Any, *rest: Any) -> None:
        if metadata.get("assign_to_params_buffers"):
            one_tied_entry(self.transformer.wte, self.lm_head, state_dict, prefix)
        super()._load_from_state_dict(state_dict, prefix, metadata, *rest)

    @classmethod
    def from_pretrained(
        cls, name_or_dir: str | os.PathLike[str], dtype: torch.dtype | None = None, parts: Any = None
    ) -> GPTModel:
        """Return a released model, or the model in a directory or file, in evaluation mode.

        Args:
            name_or_dir: a released model, which is downloaded once to $MYGPT_CACHE or the user's cache directory: "gpt2",
                "gpt2-medium", "gpt2-large" or "gpt2-xl" (OpenAI's files), or "openai-community/gpt2" and similar names
                (Hugging Face's files). Or a path: the directory of a saved model, of a training run or of OpenAI's files, or
                nanoGPT's ckpt.pt.
            dtype: dtype of the weights; None keeps the stored dtype. Weights that need no conversion are memory-mapped: their
                file may be replaced or deleted afterwards, but not truncated. Training never changes the file. On several
                ranks of torch.distributed, weights are contiguous instead, as `fully_shard` requires.
            parts: the Python file (or its module, or a dict) with the model's custom parts, which is run. A model that was
                trained with custom parts is never opened without them.
        """
        parts = as_parts(parts)
        model = model_of(*read_weights(name_or_dir, dtype, parts), parts)
        model.name_or_path = stored_name(name_or_dir)
        return model


def model_of(config: GPTConfig, state_dict: Mapping[str, Tensor], parts: Parts | None = None) -> GPTModel:
    """Return a model in evaluation mode whose parameters are the tensors in `state_dict` themselves, not copies.

    A model with custom parts has copies of the tensors, because it may compute buffers, or share weights, when it is made.
    """
    if parts is not None:
        with torch.random.fork_rng(devices=[]):
            model = GPTModel(config, parts).to(next(iter(state_dict.values())).dtype)
        load_own_weights(model, state_dict)
        check_parts(model.eval())
        return model
    with torch.device("meta"):
        model = GPTModel(config)
    model.load_state_dict(state_dict, assign=True)
    return model.eval()


def load_own_weights(model: GPTModel, state_dict: Mapping[str, Tensor]) -> None:
    """Copy the weights of a saved model into a model with custom parts. Raises ValueError with all mismatches."""
    tensors = model.state_dict(keep_vars=True)
    expected = {name: tensor for name, tensor in tensors.items() if tensor.is_floating_point()}
    first_names = {id(tensor): name for name, tensor in reversed(expected.items())}  # a shared weight is saved once
    required = [name for name, tensor in expected.items() if first_names[id(tensor)] == name]
    problems = [f"{name} is missing" for name in required if name not in state_dict]
    problems += [f"{name} is unknown" for name in state_dict if name not in expected]
    problems += [
        f"{name} is {tuple(state_dict[name].shape)}, expected {tuple(tensor.shape)}"
        for name, tensor in expected.items()
        if name in state_dict and state_dict[name].shape != tensor.shape
    ]
    if problems:
        more = f"; and {len(problems) - 5} more" if len(problems) > 5 else ""
        source = "the parts" if model.parts is None else model.parts.path
        raise ValueError(f"the weights do not fit {source}: {'; '.join(problems[:5])}{more}")
    model.load_state_dict(state_dict, strict=False)  # buffers that are not floating-point numbers are not saved
