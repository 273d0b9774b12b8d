"""Solution of exercise 4: a transformer block."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn


class Block(nn.Module):
    """A block of GPT-2. B batch size, T tokens, C embedding width, H heads, D = C // H."""

    def __init__(self, emb_dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.ln_1 = nn.LayerNorm(emb_dim)
        self.c_attn = nn.Linear(emb_dim, 3 * emb_dim)
        self.attn_proj = nn.Linear(emb_dim, emb_dim)
        self.ln_2 = nn.LayerNorm(emb_dim)
        self.c_fc = nn.Linear(emb_dim, 4 * emb_dim)
        self.mlp_proj = nn.Linear(4 * emb_dim, emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this block, (B, T, C), given the stream x before it, (B, T, C)."""
        x = x + self.attention(self.ln_1(x))
        return x + self.mlp(self.ln_2(x))

    def attention(self, x: Tensor) -> Tensor:
        """Return the output of all heads, (B, T, C)."""
        B, T, C = x.shape
        q, k, v = self.c_attn(x).chunk(3, dim=-1)  # each (B, T, C)
        q, k, v = (part.view(B, T, self.n_heads, -1).transpose(1, 2) for part in (q, k, v))  # each (B, H, T, D)
        y = F.scaled_dot_product_attention(q, k, v, is_causal=True)  # (B, H, T, D)
        return self.attn_proj(y.transpose(1, 2).reshape(B, T, C))  # the heads side by side

    def mlp(self, x: Tensor) -> Tensor:
        """Return the output of the MLP, (B, T, C)."""
        return self.mlp_proj(F.gelu(self.c_fc(x), approximate="tanh"))
