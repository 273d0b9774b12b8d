"""Prepare a file of records for fine-tuning: read, split and encode the records, and form batches (B batch, T time)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from MyGPT.config import require_positive
from MyGPT.data.instructions import InstructionDataset, LengthGroupedSampler, collate_instructions, encode_prompt
from MyGPT.data.packing import PackedSampler
from MyGPT.data.records import kind_of, read_records, split_records
from MyGPT.data.templates import Template, load_template

Rows = Literal["padded", "packed"]


@dataclass(frozen=True)
class ExampleOptions:
    """Options for the records that a model is trained on. Raises ValueError for a value out of range."""

    data: str
    """JSON or JSONL file of records with the keys instruction, input, output (Alpaca); messages; prompt, completion; or text."""
    template: str = "alpaca"
    """Prompt template: alpaca, book, or a JSON file with your own. The template is saved with the model."""
    mask_prompt: bool = True
    """Compute the loss on the answers only, not on the prompts."""
    max_length: int | None = None
    """Leave out examples with more tokens than this; without it, the limit is the model's context length."""
    rows: Rows = "padded"
    """Pad examples of similar length to the longest (padded), or put several examples into each row (packed)."""
    train_fraction: float = 0.85
    """Fraction of the records for training."""
    test_fraction: float = 0.1
    """Fraction of the records for the final test; the remaining records are for validation."""
    split_seed: int | None = None
    """Seed for splitting the records at random; without it, they are split in the order of the file."""

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows):
            raise ValueError(f"rows must be {' or '.join(get_args(Rows))}, got {self.rows!r}")
        require_positive(optional=True, max_length=self.max_length)


class Examples:
    """The training, validation and test examples of a file, encoded for a model with this context length."""

    def __init__(self, options: ExampleOptions, tokenizer: Any, context_length: int) -> None:
        if tokenizer.eot_token is None:
            raise ValueError("the model's tokenizer has no <|endoftext|>, which marks the end of an answer")
        self.options, self.tokenizer = options, tokenizer
        self.max_length = min(options.max_length or context_length, context_length)
        self.records = read_records(options.data)
        self.template = self._template()
        self.split = split_records(len(self.records), options.train_fraction, options.test_fraction, options.split_seed)
        self.train = self._encode("training", self.split.train)
        self.val = self._encode("validation", self.split.val)
        self.test = self._encode("test", self.split.test)

    def describe(self) -> str:
        """Return one line for each part: the number of examples, of tokens and of examples that were too long."""
        parts = {"training": self.train, "validation": self.val, "test": self.test}
        return "\n".join(f"{name}: {part.describe()}" for name, part in parts.items() if part is not None)

    def sampler(self, batch_size: int, seed: int) -> LengthGroupedSampler | PackedSampler:
        """Return the sampler of the training batches; a batch depends only on the seed and the step."""
        assert self.train is not None  # `split_records` raises an error if no record is left for training
        if self.options.rows == "packed":
            return PackedSampler(self.train, self.max_length, batch_size, seed=seed, **self._targets())
        return LengthGroupedSampler(self.train, batch_size, seed=seed, **self._targets())

    def validation(self, dataset: InstructionDataset | None) -> ExampleValidation | None:
        """Return the evaluation batches of a part, or None if the part is empty."""
        return None if dataset is None else ExampleValidation(dataset, **self._targets())

    def prompts(self, n: int, n_new_tokens: int) -> list[list[int]]:
        """Return the encoded prompts of the first n records outside the training part that leave room for new tokens."""
        held_out = [*self.split.val, *self.split.test] or list(self.split.train)
        prompts = [encode_prompt(self.records[i], self.tokenizer, self.template) for i in held_out[:n]]
        return [ids for ids in prompts if 0 < len(ids) <= self.max_length - n_new_tokens]

    def _template(self) -> Template:
        """Return the chosen template with `asks` set to the most frequent kind of record."""
        kind = Counter(map(kind_of, self.records)).most_common(1)[0][0]
        return replace(load_template(self.options.template), asks="prompt" if kind == "text" else kind)

    def _encode(self, name: str, part: tuple[int, ...]) -> InstructionDataset | None:
        """Encode the records with these numbers; `name` is the name of the part in errors."""
        if not part:
            return None
        records, names = [self.records[i] for i in part], [f"record {i + 1}" for i in part]
        try:
            return InstructionDataset(records, self.tokenizer, self.template, self.max_length, names=names)
        except ValueError as error:
            raise ValueError(f"{self.options.data}, {name}: {error}") from None

    def _targets(self) -> dict[str, Any]:
        """Return the keyword arguments that all batches share."""
        return {"pad_token_id": self.tokenizer.eot_token, "mask_prompt": self.options.mask_prompt}


@dataclass(frozen=True)
class ExampleValidation:
    """The evaluation batches of a data set: all examples, sorted by length."""

    dataset: InstructionDataset
    pad_token_id: int
    mask_prompt: bool

    def batches(self, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets, each (B, T) int64, with at most about 4096 tokens per batch; `whole` is ignored."""
        batch: list[list[int]] = []
        for index in self.dataset.lengths.argsort(kind="stable"):
            example = self.dataset[int(index)]
            if batch and (len(batch) + 1) * len(example) > 4096:
                yield self._collate(batch)
                batch = []
            batch.append(example)
        yield self._collate(batch)

    def fingerprint(self) -> str:
        """Return a hash of the examples."""
        return self.dataset.fingerprint()

    def _collate(self, batch: list[list[int]]) -> tuple[Tensor, Tensor]:
        return collate_instructions(batch, self.pad_token_id, mask_prompt=self.mask_prompt)
