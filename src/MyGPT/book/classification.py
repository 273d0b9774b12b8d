"""Spam detection (chapter 6): the logits at the last position, which attends to the whole text, give the class."""

from __future__ import annotations

import csv
import io
import os
import zipfile
import zlib
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import Dataset

from MyGPT.book.pretraining import train_step
from MyGPT.data.windows import Batch
from MyGPT.download import download
from MyGPT.files import read_text
from MyGPT.generation import evaluation_mode
from MyGPT.sampling import require_finite
from MyGPT.tokenizers.base import encode_with_specials
from MyGPT.training.simple import Device, evaluate_model

if TYPE_CHECKING:
    import pandas


def download_and_unzip_spam_data(
    url: str,
    zip_path: str | os.PathLike[str],
    extracted_path: str | os.PathLike[str],
    data_file_path: str | os.PathLike[str],
) -> None:
    """Download the SMS Spam Collection and store its messages in data_file_path, unless this file exists.

    Args:
        url: the address of the zip archive, which contains the file SMSSpamCollection.
        zip_path: where the archive is stored. An interrupted download is resumed.
        extracted_path: the directory into which the archive is unpacked.
        data_file_path: the new path of SMSSpamCollection, such as extracted_path/SMSSpamCollection.tsv.

    Raises:
        DownloadError: the server did not provide the archive.
        ValueError: the archive is damaged or has no file SMSSpamCollection.
    """
    data_file_path = Path(data_file_path)
    if data_file_path.exists():
        print(f"{data_file_path} already exists. Skipping download and extraction.")
        return
    download(url, zip_path)
    try:
        with zipfile.ZipFile(zip_path) as archive:
            archive.extractall(extracted_path)
        os.replace(Path(extracted_path) / "SMSSpamCollection", data_file_path)
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise ValueError(f"{zip_path} is damaged ({error}): delete it and download it again") from None
    except FileNotFoundError:
        raise ValueError(f"{zip_path} is not the SMS Spam Collection: it has no file SMSSpamCollection") from None
    print(f"File downloaded and saved as {data_file_path}")


def create_balanced_dataset(df: pandas.DataFrame) -> pandas.DataFrame:
    """Return all rows with the label "spam", and equally many random rows with the label "ham" before them.

    The random state is 123, as in the book, so the rows are the same as the book's.
    """
    import pandas

    spam = df[df["Label"] == "spam"]
    ham = df[df["Label"] == "ham"].sample(len(spam), random_state=123)
    return pandas.concat([ham, spam])


def random_split(
    df: pandas.DataFrame, train_frac: float, validation_frac: float
) -> tuple[pandas.DataFrame, pandas.DataFrame, pandas.DataFrame]:
    """Return the rows for training, validation and testing, shuffled as in the book (random state 123).

    `train_frac` and `validation_frac` are fractions of all rows. The test set gets the rest.
    """
    shuffled = df.sample(frac=1, random_state=123).reset_index(drop=True)
    train_end = int(len(df) * train_frac)
    validation_end = train_end + int(len(df) * validation_frac)
    return shuffled[:train_end], shuffled[train_end:validation_end], shuffled[validation_end:]


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
            logits = model(input_batch.to(device))[:, -1]
            require_finite("a logit of the model", logits)
            predicted = logits.argmax(-1)  # (B,)
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
    require_finite("a logit of the model", logits)
    return "spam" if logits.argmax() == 1 else "not spam"
