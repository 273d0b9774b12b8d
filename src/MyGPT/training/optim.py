"""What turns gradients into steps: decay groups, AdamW and Muon, and how the learning rate moves."""

from __future__ import annotations

import math

import torch
from torch import nn
from torch.optim import Optimizer

from MyGPT.training.config import TrainConfig


def make_optimizers(model: nn.Module, config: TrainConfig) -> list[Optimizer]:
    """AdamW over all that trains (Loshchilov & Hutter, 2019), or Muon over the blocks' matrices and AdamW over the rest.

    Matrices and embeddings are decayed, vectors are not: shrinking a bias or a LayerNorm regularises nothing.
    """
    named = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizers: list[Optimizer] = []
    if config.optimizer == "muon":
        if not hasattr(torch.optim, "Muon"):
            raise ValueError(f"optimizer=muon needs torch 2.9 or newer, this is {torch.__version__}")
        # Muon is for matrices that map activations to activations; embeddings and head stay with AdamW (Jordan, 2024).
        matrices = {name: parameter for name, parameter in named.items() if ".h." in name and parameter.dim() == 2}
        named = {name: parameter for name, parameter in named.items() if name not in matrices}
        optimizers.append(
            torch.optim.Muon(
                matrices.values(), lr=config.muon_learning_rate, weight_decay=config.weight_decay, momentum=0.95
            )
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
