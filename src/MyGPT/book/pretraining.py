"""Losses, evaluation and training (Raschka's book, chapters 5 and 6 and appendix D).

Chapters 5 and 6 of the book use the same function names for two losses. Here, the shape of the targets selects the loss:
targets (batch, tokens) are next tokens (chapter 5), targets (batch,) are classes that the last token predicts (chapter 6).
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from MyGPT.training import simple
from MyGPT.training.simple import Device, calc_loss_batch, evaluate_model, generate_and_print_sample


def calc_loss_loader(data_loader: Any, model: nn.Module, device: Device, num_batches: int | None = None) -> float:
    """Return the mean cross-entropy in nats over the first num_batches batches (default: all), or NaN without targets."""
    return simple.calc_loss_loader(data_loader, model, device, num_batches)


def train_model(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    optimizer: Optimizer,
    device: Device,
    n_epochs: int,
    eval_freq: int,
    eval_iter: int,
    start_context: str,
    tokenizer: Any,
    warmup_steps: int,
    initial_lr: float = 3e-05,
    min_lr: float = 1e-6,
) -> tuple[list[float], list[float], list[int], list[float]]:
    """Train a model with learning-rate warmup, cosine decay and gradient clipping (appendix D).

    The learning rate rises linearly from initial_lr to the optimizer's rate in warmup_steps steps, and then falls along
    a cosine to min_lr. After the warmup, gradients are clipped to the norm 1. Every eval_freq steps, both losses are
    computed on eval_iter batches of each loader. After each epoch, a continuation of start_context is printed.

    Returns:
        The training losses, the validation losses and the number of tokens seen, each at every evaluation, and the
        learning rate of every step.
    """
    train_losses, val_losses, track_tokens_seen, track_lrs = [], [], [], []
    tokens_seen, global_step = 0, -1
    peak_lr, total_steps = optimizer.param_groups[0]["lr"], len(train_loader) * n_epochs
    if warmup_steps >= total_steps:
        print(f"the warmup of {warmup_steps} steps does not end before the training, which has {total_steps} steps")
    for epoch in range(n_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            global_step += 1
            lr = _rate(global_step, warmup_steps, total_steps, initial_lr, peak_lr, min_lr)
            for group in optimizer.param_groups:
                group["lr"] = lr
            track_lrs.append(lr)
            max_norm = 1.0 if global_step >= warmup_steps else None
            train_step(model, input_batch, target_batch, optimizer, device, max_norm)
            tokens_seen += input_batch.numel()
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                track_tokens_seen.append(tokens_seen)
                print(f"Ep {epoch + 1} (Iter {global_step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen, track_lrs


def train_step(
    model: nn.Module,
    inputs: Tensor,
    targets: Tensor,
    optimizer: Optimizer,
    device: Device,
    max_norm: float | None = None,
) -> None:
    """Take one optimizer step on a batch, with gradients clipped to the norm max_norm (default: no clipping).

    If the loss is not finite, FloatingPointError is raised before the step, so the weights stay unchanged.
    """
    optimizer.zero_grad()
    loss = calc_loss_batch(inputs, targets, model, device)
    if not torch.isfinite(loss):
        raise FloatingPointError(f"the loss is {loss.item()}; the weights are unchanged")
    loss.backward()
    if max_norm is not None:
        nn.utils.clip_grad_norm_(model.parameters(), max_norm)
    optimizer.step()


def _rate(step: int, warmup_steps: int, total_steps: int, initial: float, peak: float, lowest: float) -> float:
    """Return the learning rate at a step: a linear warmup from `initial` to `peak`, then a cosine down to `lowest`."""
    if step < warmup_steps:
        return initial + step * (peak - initial) / warmup_steps
    done = (step - warmup_steps) / (total_steps - warmup_steps)
    return lowest + (peak - lowest) * (1 + math.cos(math.pi * done)) / 2
