"""Training in one screen: the loop of "Build a Large Language Model (From Scratch)" (Raschka, 2024), chapter 5.

Works with our model and with any that returns logits (B, T, V). The loop for long runs is in trainer.py.
"""

from __future__ import annotations

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
    """Trains, and returns the training losses, the validation losses and the tokens seen at each evaluation.

    Evaluates on eval_iter batches of each loader every eval_freq steps; val_loader may be None. With start_context a
    sample is printed after every epoch (tokenizer: default GPT-2's). A loss that is not finite is a FloatingPointError,
    before it has touched the weights.
    """
    if len(train_loader) == 0:
        raise ValueError("the training loader has no batch: the text is too short for its batch_size and max_length")
    train_losses, val_losses, track_tokens_seen = [], [], []
    tokens_seen, global_step = 0, -1
    model.to(device)
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            optimizer.zero_grad()
            loss = calc_loss_batch(input_batch, target_batch, model, device)
            if not torch.isfinite(loss):
                raise FloatingPointError(
                    f"the loss is {loss.item()} at step {global_step + 1}; the weights are as before"
                )
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
            generate_and_print_sample(model, tokenizer or get_tokenizer("gpt2"), device, start_context)
    return train_losses, val_losses, track_tokens_seen


def calc_loss_batch(input_batch: Tensor, target_batch: Tensor, model: nn.Module, device: Device) -> Tensor:
    """Mean cross-entropy in nats of a batch, ready for backward."""
    total, count = _loss_sum(input_batch.to(device), target_batch.to(device), model)
    return total / count


@torch.no_grad()
def calc_loss_loader(loader: Any, model: nn.Module, device: Device, num_batches: int | None = None) -> float:
    """Mean cross-entropy in nats over the tokens of the first num_batches batches (default: all); nan without any.

    Leaves the model's mode alone, so dropout acts if it is on.
    """
    total, count = 0.0, 0
    for i, (input_batch, target_batch) in enumerate(loader):
        if num_batches is not None and i >= num_batches:
            break
        batch_total, batch_count = _loss_sum(input_batch.to(device), target_batch.to(device), model)
        total, count = total + batch_total.item(), count + int(batch_count)
    return total / count if count else float("nan")


def evaluate_model(
    model: nn.Module, train_loader: Any, val_loader: Any, device: Device, eval_iter: int
) -> tuple[float, float]:
    """Training and validation loss over eval_iter batches, without dropout; nan for a loader that is None."""
    with evaluation_mode(model):
        losses = [
            calc_loss_loader(loader, model, device, eval_iter) if loader is not None else float("nan")
            for loader in (train_loader, val_loader)
        ]
    return losses[0], losses[1]


def generate_and_print_sample(model: nn.Module, tokenizer: Any, device: Device, start_context: str) -> None:
    """Prints 50 greedy tokens after start_context, on one line."""
    ids = torch.tensor([encode_with_specials(tokenizer, start_context)], device=device)
    positions = getattr(model, "pos_emb", None)  # the book's model has no config
    context_size = None if positions is None else positions.weight.shape[0]
    text = tokenizer.decode(generate(model, ids, 50, context_size)[0].tolist())
    print(text.replace("\n", " "))


def _loss_sum(inputs: Tensor, targets: Tensor, model: Any) -> tuple[Tensor, Tensor]:
    if targets.dim() == 1:  # classes (B,), which the last token predicts
        return token_loss(model(inputs)[:, -1], targets)
    if hasattr(model, "token_loss"):
        return model.token_loss(inputs, targets)
    return token_loss(model(inputs), targets)
