"""GPT-2 as a classifier: a linear layer on what the last token of a text has gathered.

As in "Build a Large Language Model (From Scratch)", chapter 6, and as transformers' GPT2ForSequenceClassification, which opens
the same directory. B batch, T time, C embedding width.
"""

from __future__ import annotations

import csv
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT.files import parse_json, read_json, read_text
from MyGPT.generation import evaluation_mode
from MyGPT.model import GPTModel
from MyGPT.tokenizers.base import encode_with_specials
from MyGPT.weights.directory import read_config, read_safetensors, write_directory
from MyGPT.weights.layout import drop_zero_biases, fit, to_ours

Trained = Literal["head", "last_block", "all"]


class GPTForClassification(nn.Module):
    """A GPT with one score for each label. `train_only` freezes the rest: the head; also the last block and LayerNorm; nothing.

    LoRA: `get_peft_model` with modules_to_save=["score"].
    """

    def __init__(self, gpt: GPTModel, labels: Sequence[str], train_only: Trained = "all") -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"a classifier needs at least two labels, all different, got {list(labels)}")
        if train_only not in ("head", "last_block", "all"):
            raise ValueError(f"train_only must be head, last_block or all, got {train_only!r}")
        self.gpt = gpt
        self.labels = list(labels)
        self.config = gpt.config
        weight = gpt.transformer.wte.weight
        self.score = nn.Linear(gpt.config.emb_dim, len(labels), bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.score.weight, std=gpt.config.init_std or 0.02)
        gpt.requires_grad_(train_only == "all")
        if train_only == "last_block":
            gpt.transformer.h[-1].requires_grad_(True)
            gpt.transformer.ln_f.requires_grad_(True)

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, labels: Tensor | None = None) -> Any:
        """Scores (B, n_labels); with labels (B,) int64 their mean cross-entropy in nats and the scores.

        input_ids (B, T) int64; attention_mask (B, T) is 0 for padding, on either side.
        """
        scores = self.score(self.gpt.last_hidden(input_ids, attention_mask))
        return scores if labels is None else (F.cross_entropy(scores, labels), scores)

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Writes a model directory that transformers' AutoModelForSequenceClassification opens too."""
        names = dict(enumerate(self.labels))
        described = {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": names,
            "label2id": {label: i for i, label in names.items()},
            "pad_token_id": getattr(tokenizer, "eot_token", None),
        }
        write_directory(
            directory, self.config, self.gpt.state_dict(), tokenizer,
            more_config=described, more_tensors={"score.weight": self.score.weight},
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, directory: str | os.PathLike[str]) -> GPTForClassification:
        """Opens what `save_pretrained` wrote, in evaluation mode."""
        path, config = Path(directory), read_config(directory)
        tensors = dict(read_safetensors(path / "model.safetensors"))
        names = read_json(path / "config.json").get("id2label")
        if "score.weight" not in tensors or not isinstance(names, dict):
            raise ValueError(f"{path} holds no classifier: it has no score.weight, or config.json no id2label")
        labels: list[Any] = [names.get(str(i)) for i in range(len(names))]
        if not all(isinstance(label, str) for label in labels):
            raise ValueError(
                f"{path / 'config.json'} must have a text for each label 0 to {len(labels) - 1} in id2label"
            )
        score = tensors.pop("score.weight")
        try:
            if score.dtype is None or score.shape != (len(labels), config.emb_dim):
                raise ValueError(f"score.weight is {score.shape}, expected floats of {(len(labels), config.emb_dim)}")
            fitted = fit(drop_zero_biases(to_ours(tensors)[0], config), config)
            gpt = GPTModel(config).to(score.dtype)  # after its sizes are known to be those of the weights
            gpt.load_state_dict({name: tensor.load() for name, tensor in fitted.items()})
            model = cls(gpt, labels)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        model.score.load_state_dict({"weight": score.load()})
        return model.eval()


def read_labelled(path: str | os.PathLike[str]) -> list[tuple[str, str]]:
    """Texts and labels: a CSV file whose first line names the columns, or JSON lines, with `text` and `label`.

    A missing column or key, or one that is empty, is a ValueError with file, line and key.
    """
    text = read_text(path)
    if Path(path).suffix == ".csv":
        reader = csv.DictReader(text.splitlines(keepends=True))
        try:
            rows: list[tuple[int, Any]] = [(reader.line_num, row) for row in reader]
        except csv.Error as error:
            raise ValueError(f"{path} is not CSV: {error}") from None
    else:
        rows = []
        for number, line in enumerate(text.split("\n"), start=1):
            if line.strip():
                rows.append((number, parse_json(line, path, number)))
    for number, row in rows:
        for key in ("text", "label"):
            if not isinstance(row, dict) or row.get(key) in (None, ""):
                raise ValueError(f"{path}, line {number}: the key {key!r} is missing or empty")
    if not rows:
        raise ValueError(f"{path} has no records: each needs a text and a label")
    return [(str(row["text"]), str(row["label"])) for _, row in rows]


def collate_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, each (B, T) int64, padded on the right; of a text too long its first max_length tokens."""
    rows = [encode_with_specials(tokenizer, text)[:max_length] for text in texts]
    if not all(rows):
        raise ValueError(
            f"a text to classify needs at least one token, text {[bool(row) for row in rows].index(False)} has none"
        )
    T, pad = max(map(len, rows)), tokenizer.eot_token or 0
    ids = torch.tensor([row + [pad] * (T - len(row)) for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (T - len(row)) for row in rows])
    return ids, mask


def confusion_table(
    model: GPTForClassification, examples: Sequence[tuple[str, str]], tokenizer: Any, batch_size: int = 16
) -> Tensor:
    """How often each label (row) was called what (column), (n_labels, n_labels) int64. Accuracy is its diagonal's share."""
    table = torch.zeros(len(model.labels), len(model.labels), dtype=torch.int64)
    device = model.score.weight.device
    unknown = {label for _, label in examples} - set(model.labels)
    if unknown:
        raise ValueError(f"the model has no label {min(unknown)!r}; its labels are {', '.join(model.labels)}")
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(examples), batch_size):
            part = examples[start : start + batch_size]
            ids, mask = collate_texts([text for text, _ in part], tokenizer, model.config.context_length)
            called = model(ids.to(device), mask.to(device)).argmax(1).tolist()
            for (_, label), column in zip(part, called, strict=True):
                table[model.labels.index(label), column] += 1
    return table


def accuracy(table: Tensor) -> float:
    """The share of a confusion table's texts that were called what they are."""
    return float(table.diagonal().sum() / table.sum())
