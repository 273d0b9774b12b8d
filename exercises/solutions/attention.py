"""Solution of exercise 3: causal multi-head attention."""

from __future__ import annotations

import math

import torch
from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the attention output softmax(q kᵀ / √D) v, (B, H, T, D)."""
    T, S, D = q.shape[-2], k.shape[-2], q.shape[-1]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)  # query 0 is token S - T
    scores = q @ k.transpose(-2, -1) / math.sqrt(D)  # (B, H, T, S)
    weights = scores.masked_fill(~mask, -math.inf).softmax(dim=-1)
    return weights @ v  # (B, H, T, D)
