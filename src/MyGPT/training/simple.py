"""The training loop of "Build a Large Language Model (From Scratch)" (Raschka, 2024), chapter 5, on one screen.

The loop trains any model that returns logits (batch, time, vocabulary). For long runs, use trainer.py.
"""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from MyGPT.generation import evaluation_mode, generate
from MyGPT.loss import token_loss
from MyGPT.tokenizers import get_tokenizer
from MyGPT.tokenizers.base import encode_with_specials

Device = torch.device | str


def train_model_simple(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    optimizer: Optimizer,
    device: Device,
    num_epochs: int,
    eval_freq: int = 5,
    eval_iter: int = 5,
    start_context: str | None = None,
    tokenizer: Any = None,
) -> tuple[list[float], list[float], list[int]]:
    """Train a model. Return three lists, one value per evaluation: training losses, validation losses, tokens seen.

    Args:
        model: a model that maps token ids (batch, time) to logits (batch, time, vocabulary).
        train_loader: a DataLoader of pairs (input ids, target ids), each (batch, time) int64.
        val_loader: a DataLoader of validation pairs; None measures no validation losses.
        optimizer: the optimizer of the model's parameters.
        device: the device to which the model and the batches are moved.
        num_epochs: number of passes over the training data.
        eval_freq: number of steps between evaluations.
        eval_iter: number of batches of each loader that an evaluation uses.
        start_context: the beginning of the sample text printed after every epoch; None prints no sample.
        tokenizer: encodes start_context. Default: the GPT-2 tokenizer.

    Raises:
        ValueError: the training loader is empty.
        FloatingPointError: the loss of a step is not finite. This step does not change the weights.
    """
    if len(train_loader) == 0:
        raise ValueError("the training loader has no batch: lower its batch_size or max_length, or use a longer text")
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, global_step = 0, -1
    model.to(device)
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            if not torch.isfinite(loss):
                problem = f"the loss is {loss.item()} at step {global_step + 1}"
                raise FloatingPointError(f"{problem}: lower the learning rate (the weights are those before this step)")
            loss.backward()
            optimizer.step()
            tokens_seen += input_batch.numel()
            global_step += 1
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                track_tokens_seen.append(tokens_seen)
                text = f"Ep {epoch + 1} (Step {global_step:06d}): Train loss {train_loss:.3f}"
                if val_loader is not None:
                    val_losses.append(val_loss)
                    text += f", Val loss {val_loss:.3f}"
                print(text)
        if start_context is not None:
            tokenizer = get_tokenizer("gpt2") if tokenizer is None else tokenizer
            generate_and_print_sample(model, tokenizer, device, start_context)
    return train_losses, val_losses, track_tokens_seen


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: Device) -> Tensor:
    """Return the mean cross-entropy of one batch in nats per token, as a scalar tensor with a gradient."""
    total, count = _loss_sum(input_batch.to(device), target_batch.to(device), model)
    return total / count


@torch.no_grad()
def calc_loss_loader(loader: Any, model: nn.Module, device: Device, num_batches: int | None = None) -> float:
    """Return the mean cross-entropy in nats per token over the first num_batches batches (default: all).

    The result is NaN if there is no target token or `loader` is None. The model's mode is not changed, so dropout is
    active if the model is in training mode.
    """
    total, count = 0.0, 0
    for i, (input_batch, target_batch) in enumerate(() if loader is None else loader):
        if num_batches is not None and i >= num_batches:
            break
        batch_total, batch_count = _loss_sum(input_batch.to(device), target_batch.to(device), model)
        total, count = total + batch_total.item(), count + int(batch_count)
    return total / count if count else math.nan


def evaluate_model(
    model: nn.Module, train_loader: Any, val_loader: Any, device: Device, eval_iter: int
) -> tuple[float, float]:
    """Return the mean loss over eval_iter batches of each loader, without dropout. A loader that is None gives NaN."""
    with evaluation_mode(model):
        train_loss = calc_loss_loader(train_loader, model, device, eval_iter)
        return train_loss, calc_loss_loader(val_loader, model, device, eval_iter)


def generate_and_print_sample(model: nn.Module, tokenizer: Any, device: Device, start_context: str) -> None:
    """Continue the text start_context by 50 tokens, each the most likely one, and print everything on one line.

    If the logits of the model are not finite, the reason is printed instead.
    """
    ids = torch.tensor([encode_with_specials(tokenizer, start_context)], device=device)
    positions = getattr(model, "pos_emb", None)  # The book's model has no config.
    context_size = None if positions is None else positions.weight.shape[0]
    try:
        text = tokenizer.decode(generate(model, ids, 50, context_size, tokenizer=tokenizer)[0].tolist())
    except FloatingPointError as error:  # A training loop prints this sample, and no sample is worth its results.
        text = f"no sample text: {error}"
    print(text.replace("\n", " "))


def _loss_sum(inputs: Tensor, targets: Tensor, model: Any) -> tuple[Tensor, Tensor]:
    """Return the summed cross-entropy of a batch and the number of targets in the batch.

    Targets of shape (batch, tokens) are next tokens. Targets of shape (batch,) are class labels; they are compared with
    the logits at the last position.
    """
    if targets.dim() == 1:
        return token_loss(model(inputs)[:, -1], targets)
    if hasattr(model, "token_loss"):
        return model.token_loss(inputs, targets)
    return token_loss(model(inputs), targets)
