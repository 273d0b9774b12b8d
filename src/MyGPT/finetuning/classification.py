"""Turn a GPT into a text classifier: a linear layer maps the hidden state of the last token to one score per label.

The design follows "Build a Large Language Model (From Scratch)", chapter 6, and GPT2ForSequenceClassification of
transformers, which can open the saved model directories. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from MyGPT.cache import check_inputs
from MyGPT.data.records import is_missing, read_items
from MyGPT.files import read_json
from MyGPT.generation import evaluation_mode
from MyGPT.model import GPTModel, model_of
from MyGPT.tokenizers.base import encode_with_specials
from MyGPT.weights.formats import open_checkpoint
from MyGPT.weights.formats.huggingface import write_directory
from MyGPT.weights.pretrained import find_model

Trained = Literal["head", "last_block", "all"]
Example = tuple[str, str]
"""A pair of a text and its label."""


class ClassifierOutput(NamedTuple):
    """The result of `GPTForClassification.forward` if labels are given."""

    loss: Tensor
    """Mean cross-entropy of the batch in nats, a scalar."""
    logits: Tensor
    """The scores of the labels before the softmax, (sequences, n_labels)."""


class GPTForClassification(nn.Module):
    """A GPT with a linear layer, `score`, which maps the hidden state of the last token to one score per label.

    To train a classifier with LoRA, use PEFT's `get_peft_model` with task_type="SEQ_CLS". PEFT then also trains and saves
    `score`.

    Args:
        gpt: the model to extend; it is not copied.
        labels: the names of the labels, at least two.
        train_only: the parameters to train: "head" (only `score`), "last_block" (`score`, the last transformer block and
            the final LayerNorm) or "all".
    """

    def __init__(self, gpt: GPTModel, labels: Sequence[str], train_only: Trained = "all") -> None:
        super().__init__()
        if len(labels) < 2 or len(set(labels)) < len(labels):
            raise ValueError(f"a classifier needs at least two labels, all different, got {list(labels)}")
        if train_only not in ("head", "last_block", "all"):
            raise ValueError(f"train_only must be head, last_block or all, got {train_only!r}")
        self.gpt, self.config, self.labels = gpt, gpt.config, list(labels)
        weight = gpt.transformer.wte.weight
        self.score = nn.Linear(gpt.config.emb_dim, len(labels), bias=False, device=weight.device, dtype=weight.dtype)
        nn.init.normal_(self.score.weight, std=gpt.config.init_std or 0.02)
        gpt.requires_grad_(train_only == "all")
        if train_only == "last_block":
            gpt.transformer.h[-1].requires_grad_(True)
            gpt.transformer.ln_f.requires_grad_(True)

    def forward(
        self,
        input_ids: Tensor,
        attention_mask: Tensor | None = None,
        labels: Tensor | None = None,
        inputs_embeds: Tensor | None = None,
        output_attentions: bool | None = None,
        output_hidden_states: bool | None = None,
        return_dict: bool | None = None,
    ) -> Any:
        """Return the scores (B, n_labels), or a `ClassifierOutput` with scores and loss if labels are given.

        Args:
            input_ids: token ids of B sequences of T tokens, (B, T) int64.
            attention_mask: a tensor (B, T) that is 1 for tokens and 0 for padding. The padding may be on the left or on
                the right. Default: no padding.
            labels: the index of the correct label of each sequence in `self.labels`, (B,) int64.
            inputs_embeds, output_attentions, output_hidden_states: not supported; they exist because PEFT passes them.
            return_dict: ignored; it exists because PEFT passes it.
        """
        if inputs_embeds is not None or output_attentions or output_hidden_states:
            raise ValueError(
                "inputs_embeds, output_attentions and output_hidden_states are not supported; leave them unset"
            )
        check_inputs(self.config, input_ids, attention_mask)
        hidden = self.gpt.transformer(input_ids, attention_mask)  # (B, T, C)
        scores = self.score(_last_tokens(hidden, attention_mask))
        return scores if labels is None else ClassifierOutput(F.cross_entropy(scores, labels), scores)

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Save the model, and the tokenizer if there is one, to a directory.

        `from_pretrained` and transformers' AutoModelForSequenceClassification can open the directory.
        """
        names = dict(enumerate(self.labels))
        more_config = {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": names,
            "label2id": {label: i for i, label in names.items()},
            "pad_token_id": getattr(tokenizer, "eot_token", None),
        }
        write_directory(
            directory, self.config, self.gpt.state_dict(), tokenizer,
            more_config=more_config, more_tensors={"score.weight": self.score.weight},
        )  # fmt: skip

    @classmethod
    def from_pretrained(cls, name_or_dir: str | os.PathLike[str]) -> GPTForClassification:
        """Return the classifier that `save_pretrained` or transformers saved, in evaluation mode.

        The directory or name of the model may be any that GPTModel.from_pretrained accepts.
        """
        checkpoint = open_checkpoint(find_model(name_or_dir))
        score = checkpoint.tensors.pop("score.weight", None)
        if score is None:
            raise ValueError(f"{name_or_dir} does not contain a classifier: its weights have no score.weight")
        config, state_dict = checkpoint.read(score.dtype)
        if score.dtype is None or len(score.shape) != 2 or score.shape[1] != config.emb_dim:
            expected = f"expected floats of (labels, {config.emb_dim})"
            raise ValueError(f"{checkpoint.path}: score.weight is {score.shape}, {expected}")
        numbered = {str(i): f"LABEL_{i}" for i in range(score.shape[0])}  # transformers omits its default names
        path = checkpoint.path.parent / "config.json"
        names = read_json(path).get("id2label", numbered)
        is_complete = isinstance(names, dict) and names.keys() == numbered.keys()
        if not is_complete or not all(isinstance(name, str) for name in names.values()):
            what = f"id2label must have a text for each of the {len(numbered)} labels 0 to {len(numbered) - 1}"
            raise ValueError(f"{path}: {what}")
        try:
            model = cls(model_of(config, state_dict), [names[str(i)] for i in range(len(names))])
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from None
        model.score.load_state_dict({"weight": score.load()})
        return model.eval()


def _last_tokens(hidden: Tensor, attention_mask: Tensor | None) -> Tensor:
    """Return, from hidden states (B, T, C), the states (B, C) of the last token of each sequence that is not padding."""
    if attention_mask is None:
        return hidden[:, -1]
    B, T, _ = hidden.shape
    last = (attention_mask.ne(0) * torch.arange(T, device=hidden.device)).argmax(1)  # (B,)
    return hidden[torch.arange(B, device=hidden.device), last]


def read_labelled(path: str | os.PathLike[str], text_key: str = "text", label_key: str = "label") -> list[Example]:
    """Read pairs of a text and its label from a file.

    Args:
        path: a table (.csv or .tsv) whose first line names the columns, or a JSON or JSON Lines file of objects.
        text_key: the column or JSON key of the text.
        label_key: the column or JSON key of the label. An integer label is converted to a string.

    Raises:
        ValueError: a value is missing, empty or of another type, or a line of a table has more values than columns. The
            message names the file, the line and the key.
    """
    pairs = []
    for where, record in read_items(path):
        if not isinstance(record, dict):
            raise ValueError(f"{where}: a record must be a JSON object, got {record!r:.80}")
        for key, kinds in ((text_key, str), (label_key, (str, int))):
            if is_missing(record.get(key)) or record[key] == "":
                raise ValueError(f"{where}: the key {key!r} is missing or empty, there are {', '.join(record)}")
            if not isinstance(record[key], kinds) or isinstance(record[key], bool):
                raise ValueError(f"{where}: {key!r} must be a text, got {record[key]!r:.80}")
        pairs.append((record[text_key], str(record[label_key])))
    return pairs


def collate_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """Return the token ids of the texts and their attention mask (1 for tokens, 0 for padding), each (texts, tokens) int64.

    Texts are cut to max_length tokens and padded on the right.
    """
    rows = [torch.tensor(encode_with_specials(tokenizer, text)[:max_length]) for text in texts]
    for number, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"a text to classify needs at least one token, text {number} has none")
    ids = pad_sequence(rows, batch_first=True, padding_value=tokenizer.eot_token or 0)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def train_classifier(
    model: nn.Module,
    examples: Sequence[Example],
    tokenizer: Any,
    optimizer: torch.optim.Optimizer,
    epochs: int = 1,
    batch_size: int = 8,
    seed: int = 0,
) -> list[float]:
    """Train a classifier and return the loss of each step, computed before its update.

    The model is a GPTForClassification, or a PeftModel that contains one, and stays in training mode. Each epoch uses all
    examples once, batch_size per step, in a random order that depends on the seed.
    """
    targets = _targets(model, examples)
    generator = torch.Generator().manual_seed(seed)
    losses = []
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(examples), generator=generator).split(batch_size):
            ids, mask = _batch(model, [examples[i][0] for i in part], tokenizer)
            loss = model(ids, mask, labels=targets[part].to(ids.device)).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    return losses


def classify(model: nn.Module, texts: Sequence[str], tokenizer: Any, batch_size: int = 16) -> list[str]:
    """Return the predicted label of each text. `model` is a GPTForClassification, or a PeftModel that contains one."""
    predicted: list[str] = []
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(texts), batch_size):
            scores = model(*_batch(model, texts[start : start + batch_size], tokenizer))
            predicted += [_classifier(model).labels[i] for i in scores.argmax(1)]
    return predicted


def confusion_table(model: nn.Module, examples: Sequence[Example], tokenizer: Any, batch_size: int = 16) -> Tensor:
    """Return a table (n_labels, n_labels) int64: entry (i, j) counts the examples with label i that are classified as j."""
    rows, labels = _targets(model, examples), _classifier(model).labels
    predicted = classify(model, [text for text, _ in examples], tokenizer, batch_size)
    table = torch.zeros(len(labels), len(labels), dtype=torch.int64)
    for row, label in zip(rows, predicted, strict=True):
        table[row, labels.index(label)] += 1
    return table


def accuracy(table: Tensor) -> float:
    """Return the fraction of correct predictions, from 0 to 1, in a table from `confusion_table`."""
    return float(table.diagonal().sum() / table.sum())


def _classifier(model: nn.Module) -> GPTForClassification:
    """Return `model`, or the model inside a PeftModel; raise ValueError if the result is not a GPTForClassification."""
    base: Any = model
    base = base.get_base_model() if hasattr(base, "get_base_model") else base
    if not isinstance(base, GPTForClassification):
        raise ValueError(f"the model must be a GPTForClassification or a PeftModel of one, got {type(base).__name__}")
    return base


def _targets(model: nn.Module, examples: Sequence[Example]) -> Tensor:
    """Return the index of each example's label in the model's labels, (n,) int64; raise ValueError for an unknown label."""
    if not examples:
        raise ValueError("there are no examples: give at least one pair of a text and its label")
    labels = _classifier(model).labels
    unknown = {label for _, label in examples} - set(labels)
    if unknown:
        raise ValueError(f"the model has no label {min(unknown)!r}; its labels are {', '.join(labels)}")
    return torch.tensor([labels.index(label) for _, label in examples])


def _batch(model: nn.Module, texts: Sequence[str], tokenizer: Any) -> tuple[Tensor, Tensor]:
    """Return the token ids and the attention mask of the texts (see `collate_texts`) on the device of the model."""
    device = next(model.parameters()).device
    ids, mask = collate_texts(texts, tokenizer, _classifier(model).config.context_length)
    return ids.to(device), mask.to(device)
