"""LoRA as in appendix E of Raschka's book: the book's initial weights, and an update that is scaled by alpha.

`MyGPT.finetuning.lora` scales the update by alpha / rank, as the LoRA paper does, and saves adapters with PEFT.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """A low-rank update; maps x (..., in_dim) to alpha * (x @ A @ B). A is initialized randomly and B with zeros."""

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        # This is kaiming_uniform_(a=√5), which takes the number of columns of A (the rank) for the number of inputs.
        self.A = nn.Parameter(torch.empty(in_dim, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha

    def forward(self, x: Tensor) -> Tensor:
        return self.alpha * (x @ self.A @ self.B)  # (..., out_dim)


class LinearWithLoRA(nn.Module):
    """A linear layer with a LoRA update: the output is the sum of the outputs of `linear` and of a `LoRALayer`."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float) -> None:
        super().__init__()
        self.linear = linear
        self.lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha).to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float) -> None:
    """Replace every nn.Linear of the model, in place, by a `LinearWithLoRA`. Existing `LinearWithLoRA` stay unchanged."""
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, LinearWithLoRA(child, rank, alpha))
        elif not isinstance(child, LinearWithLoRA):
            replace_linear_with_lora(child, rank, alpha)
