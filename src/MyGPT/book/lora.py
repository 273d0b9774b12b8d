"""Appendix E: LoRA with the book's initial weights and its scale, alpha alone.

With alpha / rank, as in the paper, it is in `MyGPT.finetuning.lora`; a saved adapter is PEFT's, there too.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """alpha * x A B with A (in_dim, rank) and B (rank, out_dim), which starts at zero."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        # The bound is that of kaiming_uniform_(a=√5), which takes the columns of a matrix for its inputs.
        self.A = nn.Parameter(torch.empty(in_dim, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A @ self.B)  # (..., out_dim)


class LinearWithLoRA(nn.Module):
    """A linear layer and a LoRALayer side by side."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Puts a LinearWithLoRA in the place of every nn.Linear, except those that are in one already."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, LinearWithLoRA(child, rank, alpha))
        elif not isinstance(child, LinearWithLoRA):
            replace_linear_with_lora(child, rank, alpha)
