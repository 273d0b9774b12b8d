"""Solution of exercise 8: LoRA."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained correction: linear(x) + alpha / rank * x A B."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear.requires_grad_(False)
        self.A = nn.Parameter(0.02 * torch.randn(linear.in_features, rank))
        self.B = nn.Parameter(torch.zeros(rank, linear.out_features))
        self.scale = alpha / rank

    def forward(self, x: Tensor) -> Tensor:
        """Return the output of the layer with its correction, (..., out_features)."""
        return self.linear(x) + self.scale * (x @ self.A @ self.B)

    @torch.no_grad()
    def merged(self) -> nn.Linear:
        """Return a new nn.Linear that computes the same as this layer."""
        merged = copy.deepcopy(self.linear)
        merged.weight += self.scale * (self.A @ self.B).T
        return merged
