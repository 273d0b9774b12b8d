"""What turns gradients into steps: decay groups, AdamW and Muon, and how the learning rate moves."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from MyGPT.training.config import TrainConfig


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW over all that trains (Loshchilov & Hutter, 2019), or Muon over the blocks' matrices and AdamW over the rest.

    Matrices and embeddings are decayed, vectors are not: shrinking a bias or a LayerNorm regularises nothing.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        # Muon is for matrices that map activations to activations; embeddings and head stay with AdamW (Jordan, 2024).
        matrices = {name: parameter for name, parameter in named.items() if ".h." in name and parameter.dim() == 2}
        named = {name: parameter for name, parameter in named.items() if name not in matrices}
        optimizers.append(
            Muon(list(matrices.values()), config.muon_learning_rate, config.weight_decay, config.muon_momentum)
        )
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizers.append(
        torch.optim.AdamW(groups, lr=config.learning_rate, betas=(config.beta1, config.beta2), fused=True)
    )
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["peak_lr"] = group["lr"]
    return optimizers


POLYNOMIALS = [
    (a / 1.01, b / 1.01**3, c / 1.01**5)  # a hundredth of room, since what rounding brings above 1 grows
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    )
]
"""Polar Express (Amsel et al., 2025), its first three: a, b, c of ax + bx³ + cx⁵, each the best after those before it."""


class Muon(Optimizer):
    """Momentum whose matrices are orthogonalised before they are added (Jordan et al., 2024): all directions get the same length.

    Equal to torch.optim.Muon but for how it orthogonalises: by three polynomials in place of five, and matrices of one shape
    together, on a processor in their own precision. torch does it one by one in bf16, which processors without such
    products take a hundred times as long for.
    """

    def __init__(self, matrices: list[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """One step; matrices without a gradient stay as they are."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            of_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                of_shape.setdefault(matrix.shape, []).append((matrix, matrix.grad.lerp(mean, momentum)))  # Nesterov's
            for (n_out, n_in), pairs in of_shape.items():
                directions = orthogonalised(torch.stack([update for _, update in pairs]))
                for (matrix, _), direction in zip(pairs, directions, strict=True):
                    matrix.mul_(1 - lr * group["weight_decay"])
                    matrix.add_(direction, alpha=-lr * math.sqrt(max(1, n_out / n_in)))


def orthogonalised(matrices: Tensor) -> Tensor:
    """UVᵀ of each UΣVᵀ in a stack (n, out, in), roughly: singular values above 0.002 of the norm come to 0.18 to 1.87.

    That is as good a step as a closer result: twice as many polynomials made no difference to the loss.
    """
    x = matrices.bfloat16() if matrices.device.type == "cuda" else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if is_tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def set_learning_rate(optimizers: list[Optimizer], config: TrainConfig, step: int) -> float:
    """Gives every group its peak rate times the schedule's factor; returns AdamW's rate."""
    factor = schedule_factor(config, step)
    for optimizer in optimizers:
        for group in optimizer.param_groups:
            group["lr"] = group["peak_lr"] * factor
    return config.learning_rate * factor


def schedule_factor(config: TrainConfig, step: int) -> float:
    """The learning rate of a step (from 0) as a part of its peak: a linear rise, then the schedule down to the minimum."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    lowest = config.min_learning_rate / config.learning_rate
    if config.schedule == "constant":
        return 1.0
    start = config.warmup_steps
    if config.schedule == "wsd":
        start = max(start, round(config.max_steps * (1 - config.decay_fraction)))
    done = min(1.0, max(0, step - start) / max(1, config.max_steps - start))
    if config.schedule == "cosine":
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2
    return lowest + (1 - lowest) * (1 - done)
