"""The GPT-2 transformer (Radford et al., 2019): token ids in, next-token logits out.

B batch, T time (new tokens), S time seen so far, C embedding width, H heads, D = C // H, V vocabulary.
Names of layers are those of OpenAI's checkpoint. Sampling is in sampling.py, the decoding loop in generation.py.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from MyGPT.config import GPTConfig, as_config
from MyGPT.initialisation import look_back
from MyGPT.loss import IGNORED, linear_token_loss, token_loss
from MyGPT.weights.formats.huggingface import write_directory
from MyGPT.weights.pretrained import read_weights


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """softmax(QKᵀ/√D + mask)V (Vaswani et al., 2017), as it is written in the paper.

    q (..., T, D), k and v (..., S, D); mask (..., T, S) is True where a query may look. Without a mask a query sees the
    keys up to its own time, the T queries being the last of the S. `CausalSelfAttention` computes the same through
    torch's fused kernel.
    """
    T, S = q.shape[-2], k.shape[-2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    scores = scores.masked_fill(~mask, -math.inf)
    return scores.softmax(dim=-1) @ v  # (..., T, D)


class KVCache:
    """Keys and values of the tokens seen so far, in memory taken once. Each forward that gets it appends T tokens.

    It keeps no gradients, so it is for `torch.no_grad()` only.
    """

    def __init__(self, config: GPTConfig, batch_size: int, length: int, like: Tensor) -> None:
        D = config.emb_dim // config.n_heads
        self.storage = like.new_empty(config.n_layers, 2, batch_size, config.n_heads, length, D)
        self.length = 0

    @property
    def room(self) -> int:
        """How many tokens it can hold."""
        return self.storage.shape[4]

    def check(self, B: int, S: int) -> None:
        """A ValueError unless it can hold S tokens of B sequences, and no gradient is asked for."""
        _, _, batch_size, _, room, _ = self.storage.shape
        if batch_size != B:
            raise ValueError(f"the cache is for {batch_size} sequences, the input has {B}")
        if room < S:
            raise ValueError(f"the sequence has {S} tokens, the cache has room for {room}")
        if torch.is_grad_enabled():
            raise ValueError("a cache keeps no gradients: call the model under torch.no_grad()")

    def append(self, layer: int, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """All keys and values of a layer, (B, H, S, D), the new ones (B, H, T, D) included."""
        S = self.length + k.shape[2]
        keys, values = self.storage[layer]
        keys[:, :, self.length : S] = k
        values[:, :, self.length : S] = v
        return keys[:, :, :S], values[:, :, :S]


class CausalSelfAttention(nn.Module):
    """Every token gathers from itself and those before it, in H heads at once."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.layer = layer
        self.n_heads = config.n_heads
        self.drop_rate = config.drop_rate
        self.c_attn = nn.Linear(config.emb_dim, 3 * config.emb_dim, bias=config.qkv_bias)
        self.c_proj = nn.Linear(config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        B, T, C = x.shape
        q, k, v = self.c_attn(x).view(B, T, 3, self.n_heads, C // self.n_heads).permute(2, 0, 3, 1, 4)  # (B, H, T, D)
        if cache is not None:
            k, v = cache.append(self.layer, k, v)  # (B, H, S, D)
        # Without a mask there is either no past, or one new token that may see all of it.
        is_causal = mask is None and T > 1
        drop_rate = self.drop_rate if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=is_causal)
        y = y.transpose(1, 2).reshape(B, T, C)
        return F.dropout(self.c_proj(y), self.drop_rate, self.training)


class MLP(nn.Module):
    """Every token for itself: four times as wide, GELU (Hendrycks & Gimpel, 2016), and back."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.drop_rate = config.drop_rate
        self.approximate = "tanh" if config.activation == "gelu_new" else "none"
        self.c_fc = nn.Linear(config.emb_dim, 4 * config.emb_dim)
        self.c_proj = nn.Linear(4 * config.emb_dim, config.emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        x = F.gelu(self.c_fc(x), approximate=self.approximate)  # (B, T, 4 * C)
        x = self.c_proj(x)
        return F.dropout(x, self.drop_rate, self.training)


class Block(nn.Module):
    """Attention, then MLP, each reading a normalised copy of the residual stream and adding to it (pre-LN)."""

    def __init__(self, config: GPTConfig, layer: int) -> None:
        super().__init__()
        self.ln_1 = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)
        self.attn = CausalSelfAttention(config, layer)
        self.ln_2 = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x: Tensor, mask: Tensor | None, cache: KVCache | None) -> Tensor:
        x = x + self.attn(self.ln_1(x), mask, cache)
        x = x + self.mlp(self.ln_2(x))
        return x


class Transformer(nn.Module):
    """The parts of the model under the head, by the names of OpenAI's checkpoint; `GPTModel` puts them to work."""

    def __init__(self, config: GPTConfig) -> None:
        super().__init__()
        self.wte = _embedding(config.vocab_size, config.emb_dim)
        self.wpe = _embedding(config.context_length, config.emb_dim)
        self.h = nn.ModuleList(Block(config, layer) for layer in range(config.n_layers))
        self.ln_f = nn.LayerNorm(config.emb_dim, config.layer_norm_eps)


class TiedHead(nn.Module):
    """The output head that is the token embedding itself, read from the other side.

    No nn.Linear on purpose: what looks for linear layers to adapt (PEFT's "all-linear") or to quantise would change the
    embedding with them.
    """

    def __init__(self, weight: Tensor) -> None:
        super().__init__()
        self.weight = weight  # (V, C)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, self.weight)


@dataclass
class CausalLMOutput:
    """What the model returns when it is given labels."""

    loss: Tensor
    """Mean cross-entropy in nats over the labels that are not -100; nan if there is none."""
    logits: Tensor
    """(B, T, V)."""


class GPTModel(nn.Module):
    """GPT-2 of the size that `config` (a GPTConfig or a dict of its fields) describes, freshly initialised."""

    def __init__(self, config: GPTConfig | Mapping[str, Any]) -> None:
        super().__init__()
        config = as_config(config)
        self.config = config
        self.gradient_checkpointing = False
        """Whether training computes each block anew on the way back instead of keeping its activations: slower, smaller."""
        # Made without memory first, so that torch's default weights are not drawn only to be drawn over.
        with torch.device("meta"):
            self.transformer = Transformer(config)
            self.lm_head: nn.Linear | TiedHead = nn.Linear(config.emb_dim, config.vocab_size, bias=False)
        device = torch.get_default_device()
        if device.type != "meta":
            self.to_empty(device=device)
        if config.tie_weights:
            self.lm_head = TiedHead(self.transformer.wte.weight)
        if device.type != "meta":
            self._initialise()

    def _initialise(self) -> None:
        """GPT-2's: normal weights, zero biases, and residual projections smaller by the root of their number."""
        std = self.config.init_std
        if std is None:
            for module in self.modules():
                if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                    module.reset_parameters()
            return
        for name, parameter in self.named_parameters():
            if name.endswith("c_proj.weight"):
                nn.init.normal_(parameter, std=std / math.sqrt(2 * self.config.n_layers))
            elif parameter.dim() == 2:
                nn.init.normal_(parameter, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(parameter)
            else:
                nn.init.ones_(parameter)
        if self.config.init == "local":
            c_attn = [parameter for name, parameter in self.named_parameters() if name.endswith("c_attn.weight")]
            wte, wpe = self.transformer.wte.weight, self.transformer.wpe.weight
            look_back(wte, wpe, c_attn, self.config.n_heads, std)

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
    ) -> Any:
        """Logits (B, T, V), or with labels a `CausalLMOutput`.

        input_ids (B, T) int64, or inputs_embeds (B, T, C) in their place. attention_mask (B, S) is 1 for tokens and 0
        for padding on either side; positions count the tokens only. A row of several texts numbers them 1, 2, …: each is
        computed as if it were alone. labels (B, T) int64 are the ids themselves, shifted in here as in transformers (-100
        for the first of each of several texts). With a cache the T tokens follow the S - T that it holds. `last_only`
        computes the last position's logits alone, (B, 1, V).
        """
        if output_attentions or output_hidden_states:
            raise ValueError("output_attentions and output_hidden_states are not supported; leave them unset")
        if labels is not None and last_only:
            raise ValueError("labels need the logits of every position: leave out last_only")
        self._check(input_ids, attention_mask, inputs_embeds, labels, cache)
        hidden = self._hidden_states(input_ids, attention_mask, inputs_embeds, cache)
        logits = self.lm_head(hidden[:, -1:] if last_only else hidden)
        if labels is None:
            return logits
        total, count = token_loss(logits[:, :-1], labels[:, 1:])
        return CausalLMOutput(loss=total / count, logits=logits)

    def _hidden_states(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        cache: KVCache | None = None,
    ) -> Tensor:
        """What the output head reads, (B, T, C): everything of `forward` but the head."""
        x = self.transformer.wte(input_ids) if inputs_embeds is None else inputs_embeds
        B, T, _ = x.shape
        S = T + (cache.length if cache is not None else 0)
        positions, mask = _positions_and_mask(attention_mask, B, T, S, x.device)
        x = x + self.transformer.wpe(positions)
        x = F.dropout(x, self.config.drop_rate, self.training)
        for block in self.transformer.h:
            if self.gradient_checkpointing and self.training and cache is None:
                x = checkpoint(block, x, mask, cache, use_reentrant=False)
            else:
                x = block(x, mask, cache)
        if cache is not None:
            cache.length = S
        return self.transformer.ln_f(x)

    def token_loss(
        self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor]:
        """Summed cross-entropy of `targets` (B, T), already shifted, and how many count; no (B, T, V) logits are made."""
        self._check(input_ids, attention_mask, None, targets, None)
        return self._head_loss(self._hidden_states(input_ids, attention_mask), targets)

    def row_losses(self, input_ids: Tensor, targets: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """The summed cross-entropy of each row apart, (B,); otherwise as `token_loss`."""
        self._check(input_ids, attention_mask, None, targets, None)
        hidden = self._hidden_states(input_ids, attention_mask)
        return torch.stack([self._head_loss(of_row, row)[0] for of_row, row in zip(hidden, targets, strict=True)])

    def last_hidden(self, input_ids: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        """What the head would read at the last token of each row that is not padding, (B, C)."""
        self._check(input_ids, attention_mask, None, None, None)
        hidden = self._hidden_states(input_ids, attention_mask)
        if attention_mask is None:
            return hidden[:, -1]
        T = input_ids.shape[1]
        last = (attention_mask.ne(0) * torch.arange(T, device=hidden.device)).argmax(1)
        return hidden[torch.arange(len(hidden), device=hidden.device), last]

    def _head_loss(self, hidden: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        # With an adapter on it, or a bias, the head is more than its weight.
        if type(self.lm_head) not in (nn.Linear, TiedHead) or getattr(self.lm_head, "bias", None) is not None:
            return token_loss(self.lm_head(hidden), targets)
        return linear_token_loss(hidden, self.lm_head.weight, targets)

    def prepare_inputs_for_generation(self, input_ids: Tensor, **kwargs: Any) -> dict[str, Any]:
        """What a decoding loop of transformers would give to `forward`. PEFT wraps no language model without it."""
        return {"input_ids": input_ids, "attention_mask": kwargs.get("attention_mask")}

    def new_cache(self, batch_size: int, length: int | None = None) -> KVCache:
        """An empty cache for batch_size sequences of up to `length` tokens (default: the context)."""
        context = self.config.context_length
        length = context if length is None else length
        if type(length) is not int or not 1 <= length <= context:
            raise ValueError(
                f"a cache's length must be a whole number from 1 to {context}, the context, got {length!r}"
            )
        return KVCache(self.config, batch_size, length, like=self.transformer.wte.weight.detach())

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """How many numbers the model has; shared ones count once. The embeddings are tokens' and positions'."""
        embeddings = {id(self.transformer.wte.weight), id(self.transformer.wpe.weight)}
        return sum(
            parameter.numel()
            for parameter in self.parameters()
            if (parameter.requires_grad or not only_trainable)
            and not (exclude_embeddings and id(parameter) in embeddings)
        )

    def estimate_flops(self, n_tokens: int | None = None, backward: bool = True) -> int:
        """Floating-point operations a token at a sequence of n_tokens (default: the context), forward and backward.

        2 for each weight that multiplies and 4 C T for attention a layer, three times that with backward (Chowdhery et
        al., 2022, appendix B, counting attention in full).
        """
        T = self.config.context_length if n_tokens is None else n_tokens
        # The head multiplies whether or not it shares the token embedding, which itself is a look-up.
        multiplying = sum(
            module.weight.numel() for module in self.modules() if isinstance(module, (nn.Linear, TiedHead))
        )
        forward = 2 * multiplying + 4 * self.config.n_layers * self.config.emb_dim * T
        return 3 * forward if backward else forward

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes a model directory that transformers opens too: config.json, model.safetensors (several past 5 GB),
        generation_config.json, the tokenizer's files and a model card.

        A failure leaves a directory that was there before as it was.
        """
        write_directory(directory, self.config, self.state_dict(), tokenizer)

    def train(self, mode: bool = True) -> GPTModel:
        """As of every module. The weights of a model that was opened are copied first, so that it trains, to the last bit, as
        one that was made: mapped kernels lie the other way round, on which torch's fused AdamW is wrong where states do not.
        """
        if mode and not all(parameter.is_contiguous() for parameter in self.parameters()):
            for parameter in self.parameters():
                parameter.data = parameter.data.clone(memory_format=torch.contiguous_format)
        return super().train(mode)

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike[str], dtype: torch.dtype | None = None) -> GPTModel:
        """A released model by name, or the one in a directory or file, in evaluation mode.

        "gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl" are OpenAI's, "openai-community/gpt2" and the like Hugging Face's:
        downloaded once, to $MYGPT_CACHE or the user's cache directory. A directory is a saved model's, a run's, or OpenAI's;
        a file is nanoGPT's ckpt.pt. The weights have `dtype`, or the one in which they are stored.

        Weights in .safetensors or OpenAI's files that need no conversion are mapped: they are read when they are first used, and
        their file may be replaced or deleted meanwhile, but not shortened in its place. Nothing done to them reaches it.
        """
        config, state_dict = read_weights(name_or_dir, dtype)
        with torch.device("meta"):
            model = cls(config)
        model.load_state_dict(state_dict, assign=True)
        if config.tie_weights:
            model.lm_head.weight = model.transformer.wte.weight
        return model.eval()

    def _check(
        self,
        input_ids: Tensor | None,
        attention_mask: Tensor | None,
        inputs_embeds: Tensor | None,
        targets: Tensor | None,
        cache: KVCache | None,
    ) -> None:
        """Refuses what no layer could make sense of, before any has run and before the cache has changed."""
        if (input_ids is None) == (inputs_embeds is None):
            raise ValueError("give either input_ids or inputs_embeds")
        if input_ids is not None:
            B, T = self._check_ids(input_ids)
        else:
            assert inputs_embeds is not None
            B, T = self._check_embeddings(inputs_embeds)
        if targets is not None:
            self._check_targets(targets, B, T)
        S = T if cache is None else cache.length + T
        if self.config.context_length < S:
            raise ValueError(f"the sequence has {S} tokens, the model's context_length is {self.config.context_length}")
        if attention_mask is not None and attention_mask.shape != (B, S):
            raise ValueError(f"attention_mask must be (batch, time seen) = {(B, S)}, got {tuple(attention_mask.shape)}")
        if cache is not None:
            cache.check(B, S)

    def _check_ids(self, input_ids: Tensor) -> tuple[int, int]:
        if input_ids.dim() != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids must be (batch, time) with at least one token, got {tuple(input_ids.shape)}")
        if input_ids.dtype != torch.int64:
            raise ValueError(f"input_ids must be int64, got {input_ids.dtype}")
        if _can_look_at(input_ids):
            wrong = input_ids[(input_ids < 0) | (input_ids >= self.config.vocab_size)]
            if len(wrong):
                raise IndexError(
                    f"id {int(wrong[0])} is outside the vocabulary, ids are 0 to {self.config.vocab_size - 1}"
                )
        return input_ids.shape[0], input_ids.shape[1]

    def _check_embeddings(self, inputs_embeds: Tensor) -> tuple[int, int]:
        shape, C = tuple(inputs_embeds.shape), self.config.emb_dim
        if len(shape) != 3 or shape[1] == 0 or shape[2] != C:
            raise ValueError(f"inputs_embeds must be (batch, time, {C}) with at least one token, got {shape}")
        return shape[0], shape[1]

    def _check_targets(self, targets: Tensor, B: int, T: int) -> None:
        if targets.shape != (B, T):
            raise ValueError(f"labels have shape {tuple(targets.shape)}, the input is {(B, T)}")
        if targets.dtype != torch.int64:
            raise ValueError(f"labels must be int64, got {targets.dtype}")
        if _can_look_at(targets):
            wrong = targets[((targets < 0) & (targets != IGNORED)) | (targets >= self.config.vocab_size)]
            if len(wrong):
                raise IndexError(
                    f"label {int(wrong[0])} is outside the vocabulary, labels are 0 to {self.config.vocab_size - 1}, or "
                    f"{IGNORED} where there is none"
                )


def _embedding(n: int, C: int) -> nn.Embedding:
    """A table (n, C) to be filled. nn.Embedding(n, C) draws it at once, for which, without memory, torch takes over a second."""
    return nn.Embedding.from_pretrained(torch.empty(n, C), freeze=False)


def _can_look_at(ids: Tensor) -> bool:
    """On a GPU looking at the ids would make the host wait for it; while compiling there are none yet."""
    return ids.device.type == "cpu" and not torch.compiler.is_compiling()


def _positions_and_mask(
    attention_mask: Tensor | None, B: int, T: int, S: int, device: torch.device
) -> tuple[Tensor, Tensor | None]:
    """Positions (T,) or (B, T) of the new tokens, and where they may look, (1 or B, 1, T, S), None if the rule is plain.

    The rule is plain when nothing is padded and there is no past, or one new token.
    """
    if attention_mask is None:
        positions = torch.arange(S - T, S, device=device)
        if T in (1, S):
            return positions, None
        return positions, torch.ones(1, 1, T, S, dtype=torch.bool, device=device).tril(S - T)
    # A query looks at keys of its own number up to its own time: with 0 and 1 those are the tokens, else those of its text.
    same = attention_mask[:, S - T :, None] == attention_mask[:, None]  # (B, T, S)
    mask = same.tril(S - T) & (attention_mask != 0)[:, None]
    positions = (mask.sum(2) - 1).clamp_min(0)  # (B, T): a text begins where its first token looks at itself alone
    # A padding token sees itself: a query that sees nothing would be nan, which would spread.
    mask |= torch.eye(S, dtype=torch.bool, device=device)[S - T :]
    return positions, mask[:, None]
