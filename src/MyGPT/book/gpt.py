"""The GPT model of chapter 4 of Raschka's book. The layers have the book's names and order, so a seed gives the same weights.

Shapes: B sequences, T tokens (without the cached ones), C embedding width, V vocabulary size.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.book.attention import MultiHeadAttention
from MyGPT.cache import KVCache
from MyGPT.config import GPTConfig, as_config
from MyGPT.loss import head_loss

Config = GPTConfig | Mapping[str, Any]

_BLOCK_KEYS = ("context_length", "emb_dim", "n_heads", "drop_rate", "qkv_bias")
_MODEL_KEYS = ("vocab_size", "n_layers", *_BLOCK_KEYS)


def _read_config(cfg: Config, keys: Sequence[str]) -> GPTConfig:
    """Return a GPTConfig with the values that the dict `cfg` has for `keys`. Other keys in the dict are ignored.

    Readers of the book add keys of their own, such as drop_rate_emb in exercise 4.3. drop_rate and qkv_bias may be missing,
    but not from a dict with an unknown key, because that key is then probably a misspelling. Raises ValueError for a
    missing key or an invalid value.
    """
    if not isinstance(cfg, Mapping):
        return as_config(cfg)
    missing = [key for key in keys if key not in cfg]
    unknown = [key for key in cfg if key not in {field.name for field in dataclasses.fields(GPTConfig)}]
    if missing and unknown:
        raise ValueError(f"the model config lacks {', '.join(missing)}, but has the unknown key {unknown[0]!r}")
    unused_sizes = {key: 1 for key in ("vocab_size", "context_length", "n_heads", "n_layers") if key not in keys}
    return as_config({**unused_sizes, **{key: cfg[key] for key in keys if key in cfg}})


class LayerNorm(nn.Module):
    """Layer normalization over the last axis, with a learned scale and shift."""

    def __init__(self, emb_dim: int) -> None:
        super().__init__()
        self.eps = 1e-5
        self.scale = nn.Parameter(torch.ones(emb_dim))
        self.shift = nn.Parameter(torch.zeros(emb_dim))

    def forward(self, x: Tensor) -> Tensor:
        return F.layer_norm(x, self.scale.shape, self.scale, self.shift, self.eps)


class GELU(nn.Module):
    """The GELU activation in the tanh approximation that GPT-2 uses."""

    def forward(self, x: Tensor) -> Tensor:
        return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """The MLP of a transformer block: a linear layer to four times the embedding width, GELU, and a linear layer back."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        C = _read_config(cfg, ("emb_dim",)).emb_dim
        self.layers = nn.Sequential(nn.Linear(C, 4 * C), GELU(), nn.Linear(4 * C, C))

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x)


class TransformerBlock(nn.Module):
    """A transformer block: x = x + attention(norm1(x)), then x = x + MLP(norm2(x)), with dropout on both added terms."""

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        config = _read_config(cfg, _BLOCK_KEYS)
        C = config.emb_dim
        self.att: nn.Module = MultiHeadAttention(
            C, C, config.context_length, config.drop_rate, config.n_heads, config.qkv_bias
        )
        self.ff: nn.Module = FeedForward(config)
        self.norm1: nn.Module = LayerNorm(C)
        self.norm2: nn.Module = LayerNorm(C)
        self.drop_shortcut = nn.Dropout(config.drop_rate)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        h = self.norm1(x)
        h = self.att(h) if cache is None else self.att(h, cache, layer)
        x = x + self.drop_shortcut(h)
        return x + self.drop_shortcut(self.ff(self.norm2(x)))


class GPTModel(nn.Module):
    """The GPT model of Raschka's book; maps token ids (batch, tokens) to logits (batch, tokens, vocabulary size).

    `cfg` is a GPTConfig, or a dict with the book's seven keys, such as "vocab_size" and "emb_dim". Other keys are ignored.
    The output head never shares the weights of the token embedding. Every layer can be replaced, for example `out_head` by
    a classifier.
    """

    def __init__(self, cfg: Config) -> None:
        super().__init__()
        config = dataclasses.replace(_read_config(cfg, _MODEL_KEYS), tie_weights=False, init_std=None)
        self.config = config
        self.tok_emb = nn.Embedding(config.vocab_size, config.emb_dim)
        self.pos_emb = nn.Embedding(config.context_length, config.emb_dim)
        self.drop_emb = nn.Dropout(config.drop_rate)
        self.trf_blocks = nn.Sequential(*(TransformerBlock(config) for _ in range(config.n_layers)))
        self.final_norm: nn.Module = LayerNorm(config.emb_dim)
        self.out_head: nn.Module = nn.Linear(config.emb_dim, config.vocab_size, bias=False)

    def forward(
        self,
        in_idx: Tensor,
        attention_mask: Tensor | None = None,
        *,
        cache: KVCache | None = None,
        last_only: bool = False,
    ) -> Tensor:
        """Return the next-token logits (B, T, V): B sequences, T tokens, V vocabulary size.

        Args:
            in_idx: token ids, (B, T) int64. With a cache, these are only the tokens that follow the cached tokens.
            attention_mask: must be None, because the book's model does not support padding.
            cache: a KV cache from `new_cache`, to which the keys and values of these tokens are added.
            last_only: return only the logits of the last position, (B, 1, V).
        """
        if attention_mask is not None:
            raise ValueError("the book's model does not support padding: omit attention_mask, or use MyGPT.GPTModel")
        hidden = self._hidden_states(in_idx, cache)
        return self.out_head(hidden[:, -1:] if last_only else hidden)

    def token_loss(self, in_idx: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Return the summed cross-entropy in nats, and the number of targets. Targets equal to -100 count in neither."""
        return head_loss(self.out_head, self._hidden_states(in_idx), targets)

    def new_cache(self, batch_size: int, length: int) -> KVCache | None:
        """Return an empty KV cache for batch_size sequences of up to `length` tokens.

        Return None if a transformer block or its attention was replaced, because the new class may not support a cache.
        """
        blocks: Any = self.trf_blocks
        if not all(type(block) is TransformerBlock and type(block.att) is MultiHeadAttention for block in blocks):
            return None
        config = dataclasses.replace(self.config, n_layers=len(blocks))
        return KVCache(config, batch_size, length, like=self.tok_emb.weight.detach())

    def _hidden_states(self, in_idx: Tensor, cache: KVCache | None = None) -> Tensor:
        """Return the hidden states (B, T, C) after the final LayerNorm.

        If a cache is given, the keys and values of these tokens are added to it.
        """
        B, T = in_idx.shape
        past = 0 if cache is None else cache.length
        context = len(self.pos_emb.weight)
        if past + T > context:
            raise ValueError(f"the sequence has {past + T} tokens, the model's context_length is {context}")
        x = self.tok_emb(in_idx) + self.pos_emb(torch.arange(past, past + T, device=in_idx.device))
        x = self.drop_emb(x)
        if cache is None:
            return self.final_norm(self.trf_blocks(x))
        cache.check(B, past + T)
        for layer, block in enumerate(self.trf_blocks):
            x = block(x, cache, layer)
        cache.length = past + T
        return self.final_norm(x)
