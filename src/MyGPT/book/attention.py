"""The attention layers of chapter 3 of Raschka's book, from one head without a mask to multi-head attention.

torch's fused attention kernel replaces the book's softmax. On a CPU, the kernel draws the same random numbers for dropout
as the book's code, in the same order, so a seed gives the same dropout.

Shapes: B sequences, T new tokens, S tokens so far (new and cached), H heads, D = d_out // H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.cache import KVCache


class SelfAttention_v1(nn.Module):
    """One attention head without a mask, with plain weight matrices; maps (..., tokens, d_in) to (..., tokens, d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ self.W_query, x @ self.W_key, x @ self.W_value)


class SelfAttention_v2(nn.Module):
    """One attention head without a mask, with linear layers; maps (..., tokens, d_in) to (..., tokens, d_out)."""

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.W_query(x), self.W_key(x), self.W_value(x))


class CausalAttention(SelfAttention_v2):
    """One attention head with a causal mask and dropout; maps (batch, tokens, d_in) to (batch, tokens, d_out)."""

    mask: Tensor

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, qkv_bias: bool = False) -> None:
        super().__init__(d_in, d_out, qkv_bias)
        self.d_out = d_out
        self.dropout = nn.Dropout(dropout)
        # The attention kernel does not need this mask, but the checkpoints of the book's code contain it.
        self.register_buffer("mask", torch.ones(context_length, context_length).triu(1))

    def forward(self, x: Tensor) -> Tensor:
        return self._attend(self.W_query(x), self.W_key(x), self.W_value(x))

    def _attend(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Return the output of causal attention, (..., T, width): one vector for each of the newest T tokens.

        The queries q belong to the newest T tokens. The keys k and values v belong to all S tokens so far.
        """
        T, S = q.shape[-2], k.shape[-2]
        if len(self.mask) < T:
            raise ValueError(f"the sequence has {T} tokens, the context_length is {len(self.mask)}")
        mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
        drop_rate = self.dropout.p if self.dropout.training else 0.0
        return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=1 < T == S)


class MultiHeadAttentionWrapper(nn.Module):
    """`CausalAttention` heads with concatenated outputs; maps (batch, tokens, d_in) to (batch, tokens, num_heads * d_out)."""

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            CausalAttention(d_in, d_out, context_length, dropout, qkv_bias) for _ in range(num_heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)


class MultiHeadAttention(CausalAttention):
    """Causal multi-head attention with heads of width d_out // num_heads; maps (B, tokens, d_in) to (B, tokens, d_out)."""

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        if d_out % num_heads:
            raise ValueError(f"d_out must be divisible by num_heads, got {d_out} and {num_heads}")
        super().__init__(d_in, d_out, context_length, dropout, qkv_bias)
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.out_proj = nn.Linear(d_out, d_out)

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, _ = x.shape
        heads = (B, T, self.num_heads, self.head_dim)
        q = self.W_query(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        k = self.W_key(x).view(heads).transpose(1, 2)
        v = self.W_value(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        return self.out_proj(self._attend(q, k, v).transpose(1, 2).reshape(B, T, self.d_out))
