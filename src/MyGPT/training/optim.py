"""Optimizers and learning-rate schedules: AdamW and Muon, with weight decay for matrices only."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

from MyGPT import ranks
from MyGPT.training.config import TrainConfig

_FUSED = ("cpu", "cuda", "mps", "xpu")  # devices for which torch has a fused AdamW


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters of `model` that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """Return the optimizers of the parameters that require gradients: [AdamW], or [Muon, AdamW].

    Muon updates the weight matrices of the transformer blocks, AdamW all other parameters. Weight decay (Loshchilov &
    Hutter, 2019) applies to matrices and embeddings, but not to biases and LayerNorms, because smaller values of these
    vectors do not regularize the model.
    """
    named = trained_parameters(model)
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        # Muon is meant for matrices that map activations to activations, not for embeddings or the head (Jordan, 2024).
        matrices = [named.pop(name) for name, p in list(named.items()) if ".h." in name and p.dim() == 2]
        optimizers.append(Muon(matrices, config.muon_learning_rate, config.weight_decay, config.muon_momentum))
    groups = [
        {"params": [p for p in named.values() if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in named.values() if p.dim() < 2], "weight_decay": 0.0},
    ]
    is_fused, betas = all(p.device.type in _FUSED for p in named.values()), (config.beta1, config.beta2)
    optimizers.append(torch.optim.AdamW(groups, lr=config.learning_rate, betas=betas, fused=is_fused))
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["peak_lr"] = group["lr"]
    return optimizers


# The division leaves 1% of headroom, because a singular value that rounding lifts above 1 would grow.
POLYNOMIALS = [
    (a / 1.01, b / 1.01**3, c / 1.01**5)
    for a, b, c in (
        (8.28721201814563, -23.595886519098837, 17.300387312530933),
        (4.107059111542203, -2.9478499167379106, 0.5448431082926601),
        (3.9486908534822946, -2.908902115962949, 0.5518191394370137),
    )
]
"""Coefficients (a, b, c) of the first three polynomials ax + bx³ + cx⁵ of Polar Express (Amsel et al., 2025)."""


class Muon(Optimizer):
    """Muon (Jordan et al., 2024): SGD with momentum whose update of each matrix is made nearly orthogonal.

    torch.optim.Muon orthogonalizes each matrix alone with five polynomials. This class uses three polynomials and
    orthogonalizes all matrices of the same shape together. On a CPU it computes in the dtype of the matrices, because
    bfloat16 products can take a hundred times as long on a CPU without bfloat16 instructions.
    """

    def __init__(self, matrices: Sequence[Tensor], lr: float, weight_decay: float, momentum: float = 0.95) -> None:
        super().__init__(matrices, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum})

    @torch.no_grad()
    def step(self, closure: None = None) -> None:  # type: ignore[override]
        """Update all matrices that have a gradient. `closure` is not used."""
        for group in self.param_groups:
            lr, momentum = group["lr"], group["momentum"]
            by_shape: dict[torch.Size, list[tuple[Tensor, Tensor]]] = {}
            for matrix in group["params"]:
                if matrix.grad is None:
                    continue
                state = self.state[matrix]
                if not state:
                    state["momentum_buffer"] = torch.zeros_like(matrix)
                mean = state["momentum_buffer"].lerp_(matrix.grad, 1 - momentum)
                update = matrix.grad.lerp(mean, momentum)  # Nesterov momentum
                by_shape.setdefault(matrix.shape, []).append((matrix, update))
            for (n_out, n_in), pairs in by_shape.items():
                updates = [update for _, update in pairs]
                is_sharded = ranks.is_sharded(updates[0])
                directions = _orthogonalized_shards(updates) if is_sharded else orthogonalized(torch.stack(updates))
                for (matrix, _), direction in zip(pairs, directions, strict=True):
                    local = matrix.to_local() if is_sharded else matrix  # type: ignore[attr-defined]
                    local.mul_(1 - lr * group["weight_decay"])
                    local.add_(direction, alpha=-lr * math.sqrt(max(1, n_out / n_in)))


def _orthogonalized_shards(updates: Sequence[Any]) -> Tensor:
    """Return this rank's rows of each orthogonalized matrix of `updates`, (n, rows of this rank, columns).

    `updates` are DTensors of one shape, divided by rows over S ranks, with R copies. Each matrix has one owner among the
    S * R ranks. The owner collects the rows, orthogonalizes the matrix, and sends the rows of the result back.
    """
    mesh, (n_rows, n_columns) = updates[0].device_mesh, updates[0].shape
    R, S = (1, mesh.size()) if mesh.ndim == 1 else mesh.shape
    groups = mesh.get_all_groups()
    local = [update.to_local() for update in updates]
    k, c = -(-len(local) // (R * S)), -(-n_rows // S)  # matrices of each owner, and rows of each rank but the last ones
    rows = local[0].new_zeros(R * S * k, c, n_columns)
    rows[: len(local), : len(local[0])] = torch.stack(local)
    mine = rows.view(R, S, k, c, n_columns)[mesh.get_coordinate()[0] if mesh.ndim == 2 else 0]
    whole = _exchange(mine, groups[-1]).transpose(0, 1).reshape(k, S * c, n_columns)[:, :n_rows]
    whole = F.pad(orthogonalized(whole), (0, 0, 0, S * c - n_rows))
    mine = _exchange(whole.view(k, S, c, n_columns).transpose(0, 1), groups[-1])
    if R > 1:
        dist.all_gather_into_tensor(rows.view(R, -1), mine.reshape(1, -1), group=groups[0])
        mine = rows
    return mine.reshape(R * S * k, c, n_columns)[: len(local), : len(local[0])]


def _exchange(parts: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Send parts[i] to rank i of `group`, and return the parts that this rank receives, in the order of the ranks."""
    parts = parts.contiguous()
    received = torch.empty_like(parts)
    dist.all_to_all_single(received, parts, group=group)
    return received


def orthogonalized(matrices: Tensor) -> Tensor:
    """Return a nearly orthogonal matrix for each matrix of `matrices`, a tensor (n, rows, columns).

    A matrix with the singular value decomposition UΣVᵀ becomes approximately UVᵀ. Singular values above 0.002 times
    the Frobenius norm of the matrix become numbers from 0.18 to 1.87 instead of exactly 1. Only three polynomials are
    used, because a closer approximation with twice as many did not improve the training loss.
    """
    has_bf16 = matrices.device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)
    x = matrices.bfloat16() if has_bf16 else matrices
    x = x / x.norm(dim=(1, 2), keepdim=True).clamp_min(1e-7)
    if is_tall := x.shape[1] > x.shape[2]:
        x = x.mT
    for a, b, c in POLYNOMIALS:
        square = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return (x.mT if is_tall else x).to(matrices.dtype)


def fitting_warmup(config: TrainConfig) -> int:
    """Return config.warmup_steps, or a tenth of the run if the warmup would not end before the run does."""
    return config.warmup_steps if config.warmup_steps < config.max_steps else config.max_steps // 10


def set_learning_rate(optimizers: list[Optimizer], config: TrainConfig, step: int) -> float:
    """Set the learning rate of all optimizers for `step` (counted from 0), and return AdamW's learning rate."""
    factor = schedule_factor(config, step)
    for group in (group for optimizer in optimizers for group in optimizer.param_groups):
        group["lr"] = group["peak_lr"] * factor
    return config.learning_rate * factor


def schedule_factor(config: TrainConfig, step: int) -> float:
    """Return the learning rate that `config` sets for `step` (counted from 0), divided by the peak learning rate."""
    if step < config.warmup_steps:
        return (step + 1) / (config.warmup_steps + 1)
    if config.schedule == "constant":
        return 1.0
    start, lowest = config.warmup_steps, config.min_learning_rate / config.learning_rate
    if config.schedule == "wsd":
        start = max(start, round(config.max_steps * (1 - config.decay_fraction)))
    done = min(1.0, max(0, step - start) / max(1, config.max_steps - start))
    if config.schedule == "cosine":
        return lowest + (1 - lowest) * (1 + math.cos(math.pi * done)) / 2
    return lowest + (1 - lowest) * (1 - done)
