"""Turn a GPT into a text classifier: a linear layer maps the hidden state of the last token to one score per label.

The design follows "Build a Large Language Model (From Scratch)", chapter 6, and GPT2ForSequenceClassification of
transformers, which can open the saved model directories. Shapes: B sequences, T tokens.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from MyGPT.cache import check_inputs
from MyGPT.config import GPTConfig
from MyGPT.data.formats import find_arrow_files, format_of, read_data
from MyGPT.data.records import is_missing, read_items
from MyGPT.data.tokens import fingerprint
from MyGPT.files import read_json, reading
from MyGPT.finetuning.lora import merge
from MyGPT.finetuning.splits import ExampleBatches
from MyGPT.generation import evaluation_mode
from MyGPT.messages import did_you_mean
from MyGPT.model import GPTModel, model_of
from MyGPT.notebooks import Described
from MyGPT.parts import refuse_parts
from MyGPT.sampling import require_finite
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
        refuse_parts(gpt, "a classifier")
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

    @property
    def transformer(self) -> nn.Module:
        """The transformer without an output head."""
        return self.gpt.transformer

    @property
    def gradient_checkpointing(self) -> bool:
        """True if training recomputes each block in the backward pass, which saves memory but takes more computation."""
        return self.gpt.gradient_checkpointing

    @gradient_checkpointing.setter
    def gradient_checkpointing(self, value: bool) -> None:
        self.gpt.gradient_checkpointing = value

    def save_pretrained(self, directory: str | os.PathLike[str], tokenizer: Any = None) -> None:
        """Save the model, and the tokenizer if there is one, to a directory.

        `from_pretrained` and transformers' AutoModelForSequenceClassification can open the directory.
        """
        names = dict(enumerate(self.labels))
        more_config = {
            "architectures": ["GPT2ForSequenceClassification"],
            "id2label": names,
            "label2id": {label: i for i, label in names.items()},
            "pad_token_id": _pad_id(self.config, tokenizer),
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
        with reading(name_or_dir):
            return cls._open(find_model(name_or_dir))

    @classmethod
    def _open(cls, path: Path) -> GPTForClassification:
        """Open a classifier as `from_pretrained` does. No other process may replace the directory during the call."""
        checkpoint = open_checkpoint(path)
        score = checkpoint.tensors.pop("score.weight", None)
        if score is None:
            raise ValueError(f"{path} does not contain a classifier: its weights have no score.weight")
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


def _pad_id(config: GPTConfig | None, tokenizer: Any) -> int | None:
    """Return the id of the padding token: that of the config, or else of the tokenizer, or else its end-of-text token."""
    named = [
        getattr(config, "pad_token_id", None),
        *(getattr(tokenizer, name, None) for name in ("pad_token", "eot_token")),
    ]
    return next((id_ for id_ in named if id_ is not None), None)


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
        text_key: the column or JSON key of the text. If text_key and label_key are numbers, such as "2" and "1", the file is a
            table without a header, and the numbers are the positions of its columns, counted from 1.
        label_key: the column or JSON key of the label. An integer label is converted to a string.

    Raises:
        ValueError: a value is missing, empty or of another type, or a line of a table has more values than columns. The
            message names the file, the line and the key.
    """
    pairs = []
    for where, record in read_items(path, has_header=not (text_key.isdecimal() and label_key.isdecimal())):
        _check_values(record, where, {text_key: (str,), label_key: (str, int)})
        pairs.append((record[text_key], str(record[label_key])))
    return pairs


def read_unlabelled(path: str | os.PathLike[str], text_key: str = "text") -> list[str]:
    """Read texts to classify from a file: one per line, or those in a table or JSON file under `text_key`.

    If text_key is a number, the file is a table without a header, as for `read_labelled`. Empty lines are skipped. Raises
    ValueError if there are no texts.
    """
    if format_of(path) == "text" and not text_key.isdecimal() and not find_arrow_files(path):
        texts = [line for line in read_data(path).split("\n") if line.strip()]
        if not texts:
            raise ValueError(f"{path} has no texts: each line must be a text")
        return texts
    texts = []
    for where, record in read_items(path, has_header=not text_key.isdecimal()):
        _check_values(record, where, {text_key: (str,)})
        texts.append(record[text_key])
    return texts


def _check_values(record: Any, where: str, kinds: dict[str, tuple[type, ...]]) -> None:
    """Raise ValueError unless the record has a value of one of the types in `kinds` under each key of `kinds`."""
    if not isinstance(record, dict):
        raise ValueError(f"{where}: a record must be a JSON object, got {record!r:.80}")
    for key, allowed in kinds.items():
        if is_missing(record.get(key)) or record[key] == "":
            hint = "" if key in record else did_you_mean(key, record)
            raise ValueError(f"{where}: the key {key!r} is missing or empty, there are {', '.join(record)}{hint}")
        if not isinstance(record[key], allowed) or isinstance(record[key], bool):
            raise ValueError(f"{where}: {key!r} must be a text, got {record[key]!r:.80}")


def collate_texts(texts: Sequence[str], tokenizer: Any, max_length: int) -> tuple[Tensor, Tensor]:
    """Return the token ids of the texts and their attention mask (1 for tokens, 0 for padding), each (texts, tokens) int64.

    Texts are cut to max_length tokens and padded on the right.
    """
    rows = [torch.tensor(encode_with_specials(tokenizer, text)[:max_length]) for text in texts]
    for number, row in enumerate(rows):
        if not len(row):
            raise ValueError(f"a text to classify needs at least one token, text {number + 1} has none")
    return _pad(rows, _pad_id(None, tokenizer) or 0)


def _pad(rows: list[Tensor], pad_id: int) -> tuple[Tensor, Tensor]:
    """Return the rows of token ids padded on the right to one length, and their attention mask, each (rows, tokens)."""
    ids = pad_sequence(rows, batch_first=True, padding_value=pad_id)
    return ids, pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


class LabelledTexts(Described):
    """A data set of texts and their labels as token ids.

    Args:
        examples: pairs of a text and its label.
        labels: the labels of the classifier, in the order of its scores.
        tokenizer: a tokenizer of MyGPT or a tiktoken.Encoding.
        max_length: maximum number of tokens of a text. Longer texts are cut, and counted in `n_cut`.
        names: the name of each example in error messages. Default: "text 1", "text 2" and so on.

    Raises:
        ValueError: a text has no tokens or cannot be encoded, a label is unknown, or there are no examples.
    """

    def __init__(
        self,
        examples: Sequence[Example],
        labels: Sequence[str],
        tokenizer: Any,
        max_length: int,
        names: Sequence[str] | None = None,
    ) -> None:
        if not examples:
            raise ValueError("there are no examples: give at least one pair of a text and its label")
        self.n_cut, self._rows = 0, []
        self._padding: int = _pad_id(None, tokenizer) or 0
        index = {label: i for i, label in enumerate(labels)}
        for number, (text, label) in enumerate(examples):
            where = f"text {number + 1}" if names is None else names[number]
            if label not in index:
                raise ValueError(f"{where}: the model has no label {label!r}; its labels are {', '.join(labels)}")
            try:
                ids = encode_with_specials(tokenizer, text)
            except ValueError as error:  # The tokenizer does not know a character.
                raise ValueError(f"{where}: {error}") from None
            if not ids:
                raise ValueError(f"{where}: the text has no tokens; it needs at least one to be classified")
            self.n_cut += len(ids) > max_length
            self._rows.append(torch.tensor(ids[:max_length]))
        self.targets = torch.tensor([index[label] for _, label in examples])
        """The index of each label in `labels`, (n_examples,) int64."""
        self.lengths = np.array([len(row) for row in self._rows])
        """The number of tokens of each text, (n_examples,)."""
        self._labels = tuple(labels)

    def summary(self) -> dict[str, object]:
        """Return the numbers of texts, of texts of each label, of tokens in the longest text, and of texts that were cut."""
        counts = self.targets.bincount(minlength=len(self._labels)).tolist()
        labels = ", ".join(f"{n:,} {label}" for label, n in zip(self._labels[:10], counts, strict=False))
        return {"texts": len(self), "labels": labels, "longest": int(self.lengths.max()), "cut": self.n_cut}

    def __len__(self) -> int:
        return len(self._rows)

    def examples(self, indices: Sequence[int]) -> tuple[Tensor, Tensor, Tensor]:
        """Return the token ids (B, T), label indices (B,) and attention masks (B, T) of the B texts with these indices."""
        ids, mask = _pad([self._rows[index] for index in indices], self._padding)
        return ids, self.targets[list(indices)], mask

    def fingerprint(self) -> str:
        """Return a hash of all examples, with which a resumed training run detects changed data."""
        return fingerprint(self.lengths, self.targets.numpy(), torch.cat(self._rows).numpy())


class LabelLoss:
    """The cross-entropy of the labels as the objective of a Trainer. Its terms are texts, and its score is the accuracy.

    A batch has the token ids, label indices and attention masks from `LabelledTexts.examples`.
    """

    scores = ("accuracy",)

    def __init__(self, model: GPTForClassification) -> None:
        self.model = model

    def count(self, *batch: Tensor) -> int:
        """Return the number of texts."""
        return len(batch[0])

    def __call__(self, *batch: Tensor) -> tuple[Tensor, int]:
        """Return the summed cross-entropy in nats and the number of correct predictions, (2,), and the number of texts."""
        ids, targets, mask = batch
        scores = self.model(ids, mask).float()
        loss = F.cross_entropy(scores, targets, reduction="sum")
        return torch.stack([loss, (scores.argmax(1) == targets).sum().float()]), len(targets)


class KeptClassifier:
    """Saves the best classifier of a training run in the directory `model/` of the run, with its tokenizer.

    If the classifier is trained with LoRA, `peft_model` is the PeftModel of its GPT. The saved classifier is a copy with
    the adapter merged into its weights.
    """

    def __init__(self, model: GPTForClassification, tokenizer: Any, peft_model: Any = None) -> None:
        self.model, self.tokenizer, self.peft_model = model, tokenizer, peft_model

    def place(self, run_dir: Path) -> Path:
        return run_dir / "model"

    def save(self, run_dir: Path) -> Path:
        self.save_to(self.place(run_dir))
        return self.place(run_dir)

    def save_to(self, directory: Path) -> None:
        model = self.model
        if self.peft_model is not None:
            # Merging and unmerging again would change the last digits of the weights that are being trained.
            model, peft_model = copy.deepcopy((self.model, self.peft_model))
            model.gpt = merge(peft_model)
        model.save_pretrained(directory, self.tokenizer)

    def restore(self, run_dir: Path) -> None:
        if self.peft_model is not None:
            self.peft_model.base_model.unload()  # the saved weights contain the adapter
            self.peft_model = None
        self.model.load_state_dict(GPTForClassification.from_pretrained(self.place(run_dir)).state_dict())


def count_predictions(model: GPTForClassification, dataset: LabelledTexts) -> Tensor:
    """Return a table (n_labels, n_labels) int64: entry (i, j) counts the texts with label i that are classified as j."""
    n, device = len(model.labels), model.score.weight.device
    table = torch.zeros(n, n, dtype=torch.int64)
    with torch.no_grad(), evaluation_mode(model):
        for ids, targets, mask in ExampleBatches(dataset).batches():
            predicted = model(ids.to(device), mask.to(device)).argmax(1).cpu()
            table += torch.bincount(n * targets + predicted, minlength=n * n).view(n, n)
    return table


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
    examples once, batch_size per step, in a random order that depends on the seed. A loss that is NaN or infinite raises
    FloatingPointError before its update, so it does not change the weights.
    """
    targets = _targets(model, examples)
    generator = torch.Generator().manual_seed(seed)
    losses: list[float] = []
    model.train()
    for _ in range(epochs):
        for part in torch.randperm(len(examples), generator=generator).split(batch_size):
            ids, mask = _batch(model, [examples[i][0] for i in part], tokenizer)
            loss = model(ids, mask, labels=targets[part].to(ids.device)).loss
            require_finite(f"the loss of step {len(losses)}", loss.detach())
            loss.backward()
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            losses.append(loss.item())
    return losses


def classify(model: nn.Module, texts: Sequence[str], tokenizer: Any, batch_size: int = 16) -> list[str]:
    """Return the predicted label of each text. `model` is a GPTForClassification, or a PeftModel that contains one.

    Raises FloatingPointError if a score is NaN or infinite.
    """
    names = _classifier(model).labels
    return [names[i] for i in _scores(model, texts, tokenizer, batch_size).argmax(1)]


def label_probabilities(model: nn.Module, texts: Sequence[str], tokenizer: Any, batch_size: int = 16) -> Tensor:
    """Return the probability of each label for each text, (texts, labels) float32 on the CPU.

    `model` is a GPTForClassification, or a PeftModel that contains one.
    """
    return _scores(model, texts, tokenizer, batch_size).float().softmax(1)


def _scores(model: nn.Module, texts: Sequence[str], tokenizer: Any, batch_size: int) -> Tensor:
    """Return the scores of the labels for each text before the softmax, (texts, labels) on the CPU."""
    parts = [torch.empty(0, len(_classifier(model).labels))]
    with torch.no_grad(), evaluation_mode(model):
        for start in range(0, len(texts), batch_size):
            parts.append(model(*_batch(model, texts[start : start + batch_size], tokenizer)).cpu())
            require_finite("a score of the classifier", parts[-1])
    return torch.cat(parts)


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
