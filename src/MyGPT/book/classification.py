"""Spam detection (chapter 6): the logits at the last position, which attends to the whole text, give the class."""

from __future__ import annotations

import csv
import io
import os
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from MyGPT.book.pretraining import train_step
from MyGPT.data.windows import Batch
from MyGPT.files import read_text
from MyGPT.generation import evaluation_mode
from MyGPT.tokenizers.base import encode_with_specials
from MyGPT.training.simple import Device, evaluate_model


class SpamDataset(Dataset[Batch]):
    """The messages of a CSV file as pairs of token ids, (max_length,) int64, and a label, a scalar int64 tensor.

    The file has the columns Label (0, or 1 for spam) and Text. Messages are cut, or padded with pad_token_id, to max_length
    tokens. Default for max_length: the number of tokens of the longest message.
    """

    def __init__(
        self, csv_file: str | os.PathLike[str], tokenizer: Any, max_length: int | None = None, pad_token_id: int = 50256
    ) -> None:
        self.data = _read_examples(csv_file)
        encoded = [encode_with_specials(tokenizer, text) for _, text in self.data]
        self.max_length = max(map(len, encoded)) if max_length is None else max_length
        self.encoded_texts = [ids[: self.max_length] + [pad_token_id] * (self.max_length - len(ids)) for ids in encoded]

    def __len__(self) -> int:
        return len(self.data)

    def __getitem__(self, index: int) -> tuple[Tensor, Tensor]:
        return torch.tensor(self.encoded_texts[index]), torch.tensor(self.data[index][0])


def _read_examples(csv_file: str | os.PathLike[str]) -> list[tuple[int, str]]:
    """Return the label and the text of each row of a CSV file; raise ValueError if a row or the file is invalid."""
    rows = csv.DictReader(io.StringIO(read_text(csv_file), newline=""))
    examples = []
    try:
        missing = [column for column in ("Label", "Text") if column not in (rows.fieldnames or [])]
        if missing:
            raise ValueError(f"{csv_file} has no column {' and '.join(missing)}, only {rows.fieldnames}")
        for number, row in enumerate(rows, start=1):
            label, text = row["Label"], row["Text"]
            if label is None or text is None or not label.isdecimal() or len(label) > 9:
                raise ValueError(
                    f"row {number} of {csv_file} has the label {label!r} and the text {text!r}; "
                    "labels are class numbers such as 0 and 1"
                )
            examples.append((int(label), text))
    except csv.Error as error:
        raise ValueError(f"{csv_file} is not valid CSV: {error}") from None
    if not examples:
        raise ValueError(f"{csv_file} has no examples below its header")
    return examples


@torch.no_grad()
def calc_accuracy_loader(data_loader: Any, model: nn.Module, device: Device, num_batches: int | None = None) -> float:
    """Return the accuracy, from 0 to 1, on the first num_batches batches (default: all), or NaN if there are no examples."""
    correct, n_examples = 0, 0
    with evaluation_mode(model):
        for input_batch, target_batch in islice(data_loader, num_batches):
            predicted = model(input_batch.to(device))[:, -1].argmax(-1)  # (B,)
            correct += int((predicted == target_batch.to(device)).sum())
            n_examples += len(target_batch)
    return correct / n_examples if n_examples else float("nan")


def train_classifier_simple(
    model: nn.Module,
    train_loader: Any,
    val_loader: Any,
    optimizer: Optimizer,
    device: Device,
    num_epochs: int,
    eval_freq: int,
    eval_iter: int,
) -> tuple[list[float], list[float], list[float], list[float], int]:
    """Train a classifier for num_epochs epochs. Each evaluation uses the first eval_iter batches of both loaders.

    Returns:
        The training losses and the validation losses, measured every eval_freq steps; the training accuracies and the
        validation accuracies, measured after each epoch; and the number of training examples seen in all epochs.
    """
    train_losses, val_losses, train_accs, val_accs = [], [], [], []
    examples_seen, global_step = 0, -1
    for epoch in range(num_epochs):
        model.train()
        for input_batch, target_batch in train_loader:
            train_step(model, input_batch, target_batch, optimizer, device)
            examples_seen += len(input_batch)
            global_step += 1
            if global_step % eval_freq == 0:
                train_loss, val_loss = evaluate_model(model, train_loader, val_loader, device, eval_iter)
                train_losses.append(train_loss)
                val_losses.append(val_loss)
                print(f"Ep {epoch + 1} (Step {global_step:06d}): Train loss {train_loss:.3f}, Val loss {val_loss:.3f}")
        train_accs.append(calc_accuracy_loader(train_loader, model, device, eval_iter))
        val_accs.append(calc_accuracy_loader(val_loader, model, device, eval_iter))
        print(f"Training accuracy: {train_accs[-1]:.2%} | Validation accuracy: {val_accs[-1]:.2%}")
    return train_losses, val_losses, train_accs, val_accs, examples_seen


def classify_review(
    text: str,
    model: nn.Module,
    tokenizer: Any,
    device: Device,
    max_length: int | None = None,
    pad_token_id: int = 50256,
) -> str:
    """Return "spam" or "not spam" for a text.

    max_length should be the length used in training: the text is cut, or padded with pad_token_id, to this number of
    tokens. Default: no padding; the text is cut to the model's context length.
    """
    positions: Any = model.pos_emb
    context: int = positions.weight.shape[0]
    ids = encode_with_specials(tokenizer, text)[:context]
    if max_length is not None:
        length = min(max_length, context)
        ids = ids[:length] + [pad_token_id] * (length - len(ids))
    with torch.no_grad(), evaluation_mode(model):
        logits = model(torch.tensor([ids], device=device))[0, -1]
    return "spam" if logits.argmax() == 1 else "not spam"
