"""LoRA as in appendix E of Raschka's book, with the book's initial weights.

The update is scaled by alpha / rank, as in the LoRA paper (Hu et al., 2021, section 4.1) and, since September 2025, in the
book's repository. The printed book scales by alpha: `scale_by_rank=False` does the same.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn


class LoRALayer(nn.Module):
    """A low-rank update; maps x (..., in_dim) to (alpha / rank) * (x @ A @ B), of shape (..., out_dim).

    A is initialized randomly and B with zeros. With scale_by_rank=False, the factor is alpha, as in the printed book.
    """

    def __init__(self, in_dim: int, out_dim: int, rank: int, alpha: float, *, scale_by_rank: bool = True) -> None:
        super().__init__()
        if rank < 1:
            raise ValueError(f"rank must be at least 1, got {rank}")
        # This is kaiming_uniform_(a=√5), which takes the number of columns of A (the rank) for the number of inputs.
        self.A = nn.Parameter(torch.empty(in_dim, rank).uniform_(-(rank**-0.5), rank**-0.5))
        self.B = nn.Parameter(torch.zeros(rank, out_dim))
        self.alpha = alpha
        self.rank = rank
        self.scale_by_rank = scale_by_rank

    def forward(self, x: Tensor) -> Tensor:
        # The factor is computed here, because a reader may change alpha after the layer was made.
        scale = self.alpha / self.rank if self.scale_by_rank else self.alpha
        return scale * (x @ self.A @ self.B)  # (..., out_dim)


class LinearWithLoRA(nn.Module):
    """A linear layer with a LoRA update: the output is the sum of the outputs of `linear` and of a `LoRALayer`."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, *, scale_by_rank: bool = True) -> None:
        super().__init__()
        self.linear = linear
        lora = LoRALayer(linear.in_features, linear.out_features, rank, alpha, scale_by_rank=scale_by_rank)
        self.lora = lora.to(linear.weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x) + self.lora(x)


def replace_linear_with_lora(model: nn.Module, rank: int, alpha: float, *, scale_by_rank: bool = True) -> None:
    """Replace every nn.Linear of the model, in place, by a `LinearWithLoRA`. Existing `LinearWithLoRA` stay unchanged.

    For `alpha` and `scale_by_rank`, see `LoRALayer`.
    """
    for name, child in list(model.named_children()):
        if isinstance(child, nn.Linear):
            setattr(model, name, LinearWithLoRA(child, rank, alpha, scale_by_rank=scale_by_rank))
        elif not isinstance(child, LinearWithLoRA):
            replace_linear_with_lora(child, rank, alpha, scale_by_rank=scale_by_rank)
