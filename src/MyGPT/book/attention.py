"""Chapter 3: attention, from one head without a mask to many heads at once.

The softmax is torch's fused kernel. It takes the same numbers for dropout, in the same order, as the book's own on a CPU.
B batch, T time (new tokens), S time seen so far, H heads, D = d_out // H.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.cache import KVCache


class SelfAttention_v1(nn.Module):
    """One head that sees everything, with bare matrices (d_in, d_out): x (..., T, d_in) to (..., T, d_out)."""

    def __init__(self, d_in: int, d_out: int) -> None:
        super().__init__()
        self.W_query = nn.Parameter(torch.rand(d_in, d_out))
        self.W_key = nn.Parameter(torch.rand(d_in, d_out))
        self.W_value = nn.Parameter(torch.rand(d_in, d_out))

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(x @ self.W_query, x @ self.W_key, x @ self.W_value)


class SelfAttention_v2(nn.Module):
    """The same with linear layers, whose initial weights are better."""

    def __init__(self, d_in: int, d_out: int, qkv_bias: bool = False) -> None:
        super().__init__()
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)

    def forward(self, x: Tensor) -> Tensor:
        return F.scaled_dot_product_attention(self.W_query(x), self.W_key(x), self.W_value(x))


class CausalAttention(nn.Module):
    """One head that sees no later token, with dropout on its weights: x (B, T, d_in) to (B, T, d_out)."""

    mask: Tensor

    def __init__(self, d_in: int, d_out: int, context_length: int, dropout: float, qkv_bias: bool = False) -> None:
        super().__init__()
        self.d_out = d_out
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", _later_tokens(context_length))

    def forward(self, x: Tensor) -> Tensor:
        _check_length(x.shape[1], self.mask)
        return _attend(self.W_query(x), self.W_key(x), self.W_value(x), self.dropout)


class MultiHeadAttentionWrapper(nn.Module):
    """num_heads of them side by side: (B, T, num_heads * d_out)."""

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        self.heads = nn.ModuleList(
            CausalAttention(d_in, d_out, context_length, dropout, qkv_bias) for _ in range(num_heads)
        )

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([head(x) for head in self.heads], dim=-1)


class MultiHeadAttention(nn.Module):
    """All heads in one product, each d_out // num_heads wide, and a last layer over them: x (B, T, d_in) to (B, T, d_out)."""

    mask: Tensor

    def __init__(
        self, d_in: int, d_out: int, context_length: int, dropout: float, num_heads: int, qkv_bias: bool = False
    ) -> None:
        super().__init__()
        if d_out % num_heads:
            raise ValueError(f"d_out must be divisible by num_heads, got {d_out} and {num_heads}")
        self.d_out = d_out
        self.num_heads = num_heads
        self.head_dim = d_out // num_heads
        self.W_query = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_key = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.W_value = nn.Linear(d_in, d_out, bias=qkv_bias)
        self.out_proj = nn.Linear(d_out, d_out)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("mask", _later_tokens(context_length))

    def forward(self, x: Tensor, cache: KVCache | None = None, layer: int = 0) -> Tensor:
        B, T, _ = x.shape
        _check_length(T, self.mask)
        heads = (B, T, self.num_heads, self.head_dim)
        q = self.W_query(x).view(heads).transpose(1, 2)  # (B, H, T, D)
        k = self.W_key(x).view(heads).transpose(1, 2)
        v = self.W_value(x).view(heads).transpose(1, 2)
        if cache is not None:
            k, v = cache.append(layer, k, v)  # (B, H, S, D)
        y = _attend(q, k, v, self.dropout)
        return self.out_proj(y.transpose(1, 2).reshape(B, T, self.d_out))


def _attend(q: Tensor, k: Tensor, v: Tensor, dropout: nn.Dropout) -> Tensor:
    """The T queries are the last of the S tokens, and each sees those up to its own."""
    T, S = q.shape[-2], k.shape[-2]
    mask = None if T in (1, S) else torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    drop_rate = dropout.p if dropout.training else 0.0
    return F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=drop_rate, is_causal=1 < T == S)


def _later_tokens(context_length: int) -> Tensor:
    """1 where a token would look ahead. Not needed for attending: it is in the checkpoints that the book's code writes."""
    return torch.ones(context_length, context_length).triu(1)


def _check_length(T: int, mask: Tensor) -> None:
    if len(mask) < T:
        raise ValueError(f"the sequence has {T} tokens, the context_length is {len(mask)}")
