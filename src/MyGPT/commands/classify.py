"""`mygpt classify`: train a text classifier on labelled texts, or classify texts with a trained one."""

from __future__ import annotations

import dataclasses
import math
import random
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, get_args

from torch import Tensor

from MyGPT.commands import _tuning
from MyGPT.commands._run import RunOptions, with_options_of_run
from MyGPT.commands._tuning import count_steps, open_base, report_training, require_epochs, run_and_draw
from MyGPT.config import GPT2_CONFIGS, require_positive
from MyGPT.devices import pick_device
from MyGPT.files import reading
from MyGPT.finetuning.classification import (
    Example,
    GPTForClassification,
    KeptClassifier,
    LabelledTexts,
    LabelLoss,
    accuracy,
    count_predictions,
    label_probabilities,
    read_labelled,
    read_unlabelled,
)
from MyGPT.finetuning.lora import LoraOptions, add_lora
from MyGPT.finetuning.splits import ExampleBatches, ExampleSampler, Part, SplitOptions, read_parts, require_file
from MyGPT.messages import quote, read_standard_input
from MyGPT.opening import find_model_files
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.config import TrainConfig
from MyGPT.training.trainer import Trainer
from MyGPT.weights.formats.huggingface import find_directory

DEFAULTS = {
    **_tuning.DEFAULTS,
    "learning_rate": 5e-5,
    "weight_decay": 0.1,
    "train_fraction": 0.7,
    "test_fraction": 0.2,
    "split_seed": 0,
}
HIDDEN = (*_tuning.HIDDEN, *_tuning.SAMPLE_DEFAULTS, "sample_prompt")
NESTED = ("lora",)
COMMON = (
    "model text file data text_column label_column balance out resume train_only epochs learning_rate device"
).split()
EXPAND = with_options_of_run
MAX_TRAINING_TEXTS = 1000
"""The number of training texts on which the accuracy is measured at the end of a run."""

TrainOnly = Literal["head", "last_block", "all", "lora"]


@dataclass(frozen=True)
class LabelledOptions(SplitOptions):
    """The options of `mygpt classify` for the data. Raises ValueError for a value out of range."""

    data: str | None = None  # type: ignore[assignment]
    """File of labelled texts for training (CSV, tabs (.tsv), JSON, JSON Lines or Parquet), or the directory of a data set
    saved by datasets."""
    text_column: str = "text"
    """Column or key of the texts. In a table without a header, its number, counted from 1."""
    label_column: str = "label"
    """Column or key of the labels. In a table without a header, its number, counted from 1."""
    balance: bool = False
    """Use equally many texts of each label, by leaving out texts of the more frequent labels at random."""
    max_length: int | None = None
    """Maximum number of tokens of a text; longer texts are cut. Default: the model's context length."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_length is not None:
            require_positive(max_length=self.max_length)


@dataclass(frozen=True)
class ClassifierOptions:
    """Options that say which weights are trained and for how long. Raises ValueError for a value out of range."""

    train_only: TrainOnly = "last_block"
    """The weights to train: the new layer (head), also the last block, all weights, or a LoRA adapter (lora)."""
    epochs: float = 5.0
    """Number of passes over the training texts."""

    def __post_init__(self) -> None:
        require_epochs(self.epochs)
        if self.train_only not in get_args(TrainOnly):
            raise ValueError(f"train_only must be one of {', '.join(get_args(TrainOnly))}, got {self.train_only!r}")


def classify(
    model: str,
    labelled: LabelledOptions,
    training: TrainConfig,
    lora: LoraOptions,
    tuning: ClassifierOptions,
    run: RunOptions,
    text: str | None = None,
    file: str | None = None,
) -> None:
    """Train a text classifier on labelled texts (--data), or classify texts with a trained classifier (--text, --file).

    Training writes model/, which transformers opens as a sequence classifier, and other files to the run directory. With
    --text or --file, the label of each text is printed with its probability.

    Examples:
        mygpt classify --model gpt2 --data spam.csv --out runs/spam
        mygpt classify --model gpt2 --data SMSSpamCollection.tsv --text_column 2 --label_column 1
        mygpt classify --model runs/spam --text "You won a prize."

    Args:
        text: A text to classify; - reads it from standard input.
        file: A file of texts to classify: a text per line, or a table or JSON Lines file with the column --text_column.
    """
    ways = {"--data": labelled.data, "--text": text, "--file": file}
    given = [name for name, value in ways.items() if value is not None]
    if run.resume is not None and len(given) > 1:
        raise ValueError(f"--resume continues a training: leave out {given[1]}")
    if len(given) != 1:
        needed = "--data to train a classifier, or --text or --file to classify texts with a trained one"
        raise ValueError(f"give {needed}, got {' and '.join(given) or 'none of them'}")
    if labelled.data is not None:
        train_classifier(model, labelled, training, lora, tuning, run)
        return
    device = pick_device(run.device)
    if text == "":
        raise ValueError("the text is empty; give at least one token")
    if file is not None:
        require_file(file)
    if model in GPT2_CONFIGS and not Path(model).exists():  # before it is downloaded
        raise ValueError(
            f"{model} is not a classifier: train one with mygpt classify --model {quote(model)} --data FILE"
        )
    classifier, tokenizer = open_classifier(model)
    if file is not None:
        texts = read_unlabelled(file, labelled.text_column)
    else:
        texts = [read_standard_input() if text == "-" else text or ""]
    print_predictions(classifier.to(device), tokenizer, texts)


def open_classifier(model: str) -> tuple[GPTForClassification, Tokenizer]:
    """Return the classifier in a run or a model directory, and its tokenizer."""
    files = find_model_files(model)
    if files.path.is_file():
        raise ValueError(f"{files.path} is a file; give the directory of a classifier")
    with reading(files.path):
        classifier = GPTForClassification.from_pretrained(find_directory(files.path) or files.path)
        return classifier, files.tokenizer(classifier.config.vocab_size)


def print_predictions(classifier: GPTForClassification, tokenizer: Tokenizer, texts: Sequence[str]) -> None:
    """Print a line for each text: the most probable label, a tab, and its probability."""
    context = classifier.config.context_length
    if n_cut := sum(len(tokenizer.encode(text)) > context for text in texts):
        print(f"{n_cut:,} of {len(texts):,} texts were cut to the model's context of {context} tokens", file=sys.stderr)
    for start in range(0, len(texts), 64):
        for probabilities in label_probabilities(classifier, texts[start : start + 64], tokenizer):
            best = int(probabilities.argmax())
            print(f"{classifier.labels[best]}\t{float(probabilities[best]):.4f}")


def train_classifier(
    model: str,
    labelled: LabelledOptions,
    training: TrainConfig,
    lora: LoraOptions,
    tuning: ClassifierOptions,
    run: RunOptions,
) -> None:
    """Train a classifier and print its accuracy. For the arguments, see `classify`."""
    run_options = run.for_trainer(training)
    labelled.check_files()
    directory = run_options["run_dir"]
    gpt, tokenizer, _ = open_base(model, training.seed, "classify", needs_end_token=False)
    context = gpt.config.context_length
    max_length = min(labelled.max_length or context, context)

    def read(path: str) -> list[Example]:
        examples = read_labelled(path, labelled.text_column, labelled.label_column)
        return balanced(examples) if labelled.balance and path == labelled.data else examples

    parts = read_parts(labelled, read)
    sets = {"training": parts.train, "validation": parts.val, "test": parts.test}
    labels = sorted_labels(parts.train, *sets.values())
    data = {
        name: LabelledTexts(part.records, labels, tokenizer, max_length, part.names)
        for name, part in sets.items()
        if part is not None
    }
    for name, texts in data.items():
        print(f"{name}: {describe(texts, labels, max_length)}")
    train_only = "all" if tuning.train_only == "lora" else tuning.train_only
    classifier = GPTForClassification(gpt, labels, train_only)
    peft_model: Any = add_lora(gpt, **lora.for_peft()) if tuning.train_only == "lora" else None
    sampler = ExampleSampler(data["training"], training.batch_size, training.seed)
    max_steps = count_steps(tuning.epochs, sampler)
    shown = {name: value for name, value in vars(training).items() if name not in HIDDEN}
    trainer = Trainer(
        classifier,
        dataclasses.replace(training, max_steps=max_steps, sample_every=0),
        sampler,
        ExampleBatches(data["validation"]) if "validation" in data else None,
        best_model=KeptClassifier(classifier, tokenizer, peft_model),
        recipe={"model": model, **vars(labelled), "lora": vars(lora), **vars(tuning), **shown, "device": run.device},
        objective=LabelLoss(classifier),
        **run_options,
    )
    report_training(classifier, max_steps, training.batch_size, "texts")
    loss = run_and_draw(trainer, parts.split, directory)
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats per text (step {trainer.best_step})")
    if len(data["training"]) > MAX_TRAINING_TEXTS:
        some = slice(MAX_TRAINING_TEXTS)
        data["training"] = LabelledTexts(
            parts.train.records[some], labels, tokenizer, max_length, parts.train.names[some]
        )
    tables = {name: count_predictions(classifier, texts) for name, texts in data.items()}
    for name, table in tables.items():
        print(accuracy_line(name, table))
    last = list(tables)[-1]
    print(confusion_text(last, labels, tables[last]))
    print(f'classifier saved in {directory}; try: mygpt classify --model {quote(directory)} --text "..."')


def balanced(examples: Sequence[Example]) -> list[Example]:
    """Return as many examples of each label as the rarest label has, in their order. The others are chosen at random.

    The choice is the same in every run.
    """
    counts = Counter(label for _, label in examples)
    n, kept = min(counts.values()), set()
    for label in sorted(counts):
        indices = [i for i, example in enumerate(examples) if example[1] == label]
        kept.update(random.Random(0).sample(indices, n))
    return [example for i, example in enumerate(examples) if i in kept]


def sorted_labels(train: Part, *parts: Part | None) -> list[str]:
    """Return the labels of all parts in order: whole numbers by size, other labels by the alphabet.

    A label without a training text is reported on stderr.
    """
    counts = Counter(label for _, label in train.records)
    labels = {label for part in parts if part is not None for _, label in part.records}
    for label in sorted(labels - counts.keys()):
        print(f"warning: no training text has the label {label!r}, so it cannot be learned", file=sys.stderr)
    if all(label.removeprefix("-").isdecimal() for label in labels):
        return sorted(labels, key=lambda label: (int(label), label))
    return sorted(labels)


def describe(texts: LabelledTexts, labels: Sequence[str], max_length: int) -> str:
    """Return a one-line summary of a data set: the numbers of texts, of each label, and of texts that are cut."""
    counts = texts.targets.bincount(minlength=len(labels)).tolist()
    shown = ", ".join(f"{n:,} {label}" for label, n in list(zip(labels, counts, strict=True))[:10])
    more = f" and {len(labels) - 10} more labels" if len(labels) > 10 else ""
    text = f"{len(texts):,} texts ({shown}{more}), the longest has {texts.lengths.max():,} tokens"
    return text + (f"; {texts.n_cut:,} texts are cut to {max_length:,} tokens" if texts.n_cut else "")


def accuracy_line(name: str, table: Tensor) -> str:
    """Return a line with the accuracy on a data set, beside that of always predicting its most frequent label."""
    n, largest = int(table.sum()), int(table.sum(1).max())
    right = int(table.diagonal().sum())
    always = f"the most frequent label alone: {largest / n:.1%}"
    return f"{name + ' accuracy':<20} {accuracy(table):6.1%}  ({right:,} of {n:,} texts; {always})"


def confusion_text(name: str, labels: Sequence[str], table: Tensor) -> str:
    """Return a table of predictions as text, for at most ten labels: rows are true labels, columns are predictions."""
    if len(labels) > 10:
        return f"{len(labels)} labels are too many for a table of predictions"
    shown = [label if len(label) <= 16 else f"{label[:15]}…" for label in labels]
    rows = [["", *shown], *([label, *map(str, row)] for label, row in zip(shown, table.tolist(), strict=True))]
    width = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = ["  ".join(cell.rjust(size) for cell, size in zip(row, width, strict=True)) for row in rows]
    return "\n".join([f"predictions for the {name} texts (rows: true labels, columns: predicted labels)", *lines])
