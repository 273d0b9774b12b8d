"""Weights from which every head looks a few tokens back at the first step, where GPT-2's must first find out what "back" is.

Random positions tell nothing of near and far, so a model begins with tables of which token follows which, and only then
learns to look at the token before. Here positions are sinusoids (Vaswani et al., 2017), whose pairs turn by the same angle
with every token, and the keys of head h are its queries turned by h tokens. So a query at t meets itself in the key at
t - h. Keys that begin as their queries are Trockman and Kolter's (2023, "Mimetic initialization"); the turn is ours.
The architecture is the same and everything is trained. C embedding width, T context.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

SHARPNESS = 2.0
"""How many times larger queries and keys are than random ones: the looking must be seen among all other tokens."""


@torch.no_grad()
def look_back(wte: Tensor, wpe: Tensor, c_attn: Sequence[Tensor], n_heads: int, std: float) -> None:
    """Changes weights drawn with `std` in place: wte (V, C), wpe (T, C), and of each block c_attn (3 C, C). C is even."""
    T, C = wpe.shape
    # Waves from two tokens long to twice the context.
    angles = torch.pi * T ** -torch.linspace(0, 1, C // 2, device=wpe.device)  # a token, (C / 2,)
    turned = torch.arange(T, device=wpe.device)[:, None] * angles  # (T, C / 2)
    wpe.copy_(4 * std * torch.cat([turned.sin(), turned.cos()], dim=1))
    wte.mul_(2)  # a token is heard beside its position
    for weight in c_attn:
        queries, keys, _ = weight.view(3, n_heads, C // n_heads, C)
        queries.mul_(SHARPNESS)
        turns = torch.arange(n_heads, device=weight.device)[:, None, None] * angles  # (H, 1, C / 2)
        sines, cosines = queries.chunk(2, dim=2)  # each (H, D, C / 2)
        keys[..., : C // 2] = sines * turns.cos() - cosines * turns.sin()
        keys[..., C // 2 :] = sines * turns.sin() + cosines * turns.cos()
