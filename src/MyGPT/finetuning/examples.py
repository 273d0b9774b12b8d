"""Prepare a file of records for fine-tuning: read the records, split them, encode them and form batches."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any, Literal, get_args

from torch import Tensor

from MyGPT.config import require_positive
from MyGPT.data.instructions import InstructionDataset, LengthGroupedSampler, collate_instructions, encode_prompt
from MyGPT.data.packing import PackedSampler
from MyGPT.data.records import check_split, kind_of, read_records, split_records
from MyGPT.data.templates import Template, load_template
from MyGPT.finetuning.splits import require_file
from MyGPT.tokenizers.base import require_end_token

Rows = Literal["padded", "packed"]


@dataclass(frozen=True)
class ExampleOptions:
    """The options for fine-tuning data: file, template, split and batches. Raises ValueError for a value out of range."""

    data: str
    """File of records, or data set saved by datasets. Keys: instruction, input, output (Alpaca); prompt, completion;
    messages; conversations (ShareGPT); or text."""
    template: str = "alpaca"
    """Prompt template: alpaca, book (Raschka's book) or a JSON file with your own. It is saved with the model."""
    mask_prompt: bool = True
    """Compute the loss on the answers only, not on the prompts."""
    max_length: int | None = None
    """Maximum number of tokens of an example; longer examples are left out. Default: the model's context length."""
    rows: Rows = "padded"
    """The content of a sequence: one example and padding (padded), or several examples (packed)."""
    train_fraction: float = 0.85
    """Fraction of the records for training."""
    test_fraction: float = 0.1
    """Fraction of the records for the final test. Those in neither train_fraction nor test_fraction are for validation."""
    split_seed: int | None = None
    """Seed for splitting the records at random. Default: split the records in the order of the file."""

    def __post_init__(self) -> None:
        if self.rows not in get_args(Rows):
            raise ValueError(f"rows must be {' or '.join(get_args(Rows))}, got {self.rows!r}")
        if self.max_length is not None:
            require_positive(max_length=self.max_length)
        check_split(self.train_fraction, self.test_fraction, self.split_seed)

    def check_files(self) -> None:
        """Raise an error if the data file does not exist, or if there is no such template."""
        require_file(self.data)
        load_template(self.template)


class Examples:
    """The training, validation and test examples of a file of records, as token ids."""

    def __init__(self, options: ExampleOptions, tokenizer: Any, context_length: int) -> None:
        require_end_token(tokenizer, "fine-tuning")
        self.options, self.tokenizer = options, tokenizer
        self.max_length = min(options.max_length or context_length, context_length)
        self.records = read_records(options.data)
        self.template = self._template()
        self.split = split_records(len(self.records), options.train_fraction, options.test_fraction, options.split_seed)
        self.train = self._encode("training", self.split.train)
        self.val = self._encode("validation", self.split.val)
        self.test = self._encode("test", self.split.test)

    def describe(self) -> str:
        """Return one line for each data set: how many examples and tokens it has, and how many records were too long."""
        parts = {"training": self.train, "validation": self.val, "test": self.test}
        return "\n".join(f"{name}: {part.describe()}" for name, part in parts.items() if part is not None)

    def sampler(self, batch_size: int, seed: int) -> LengthGroupedSampler | PackedSampler:
        """Return a sampler of training batches of batch_size sequences.

        A batch depends only on the seed and the step, so a resumed run gets the same batches.
        """
        assert self.train is not None  # `split_records` raises an error if no record is left for training
        if self.options.rows == "packed":
            return PackedSampler(self.train, self.max_length, batch_size, seed=seed, **self._targets())
        return LengthGroupedSampler(self.train, batch_size, seed=seed, **self._targets())

    def validation(self, dataset: InstructionDataset | None) -> ExampleValidation | None:
        """Return the evaluation batches of a data set (`self.val` or `self.test`), or None if the data set is None."""
        return None if dataset is None else ExampleValidation(dataset, **self._targets())

    def prompts(self, n: int, n_new_tokens: int) -> list[list[int]]:
        """Return the token ids of the prompts of at most n records, for which the model can generate sample answers.

        The first n records for validation and test are used or, if there are none, the first n for training. A prompt is
        left out if it is empty, or if the prompt and n_new_tokens new tokens would exceed `self.max_length`.
        """
        held_out = [*self.split.val, *self.split.test] or list(self.split.train)
        prompts = [encode_prompt(self.records[i], self.tokenizer, self.template) for i in held_out[:n]]
        return [ids for ids in prompts if 0 < len(ids) <= self.max_length - n_new_tokens]

    def _template(self) -> Template:
        """Return the chosen template. Its field `asks` is set to the most frequent record type in the file.

        `mygpt chat` later turns questions into records of this type. If the most frequent type is "text", which has no
        prompt, `asks` is "prompt" instead.
        """
        kind = Counter(map(kind_of, self.records)).most_common(1)[0][0]
        return replace(load_template(self.options.template), asks="prompt" if kind == "text" else kind)

    def _encode(self, name: str, part: tuple[int, ...]) -> InstructionDataset | None:
        """Return the examples of the records with the indices `part`, or None if `part` is empty.

        Error messages contain `name`, such as "training".
        """
        if not part:
            return None
        records, names = [self.records[i] for i in part], [f"record {i + 1}" for i in part]
        try:
            return InstructionDataset(records, self.tokenizer, self.template, self.max_length, names=names)
        except ValueError as error:
            raise ValueError(f"{self.options.data}, {name}: {error}") from None

    def _targets(self) -> dict[str, Any]:
        """Return pad_token_id and mask_prompt, the keyword arguments with which all samplers form their targets."""
        return {"pad_token_id": self.tokenizer.eot_token, "mask_prompt": self.options.mask_prompt}


@dataclass(frozen=True)
class ExampleValidation:
    """The batches for evaluating a model on all examples of a data set, sorted by length to reduce padding."""

    dataset: InstructionDataset
    pad_token_id: int
    mask_prompt: bool

    def batches(self, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
        """Yield inputs and targets, each (batch, tokens) int64, for all examples. `whole` is ignored.

        A batch has at most 4096 tokens including padding, unless a single example is longer.
        """
        batch: list[list[int]] = []
        for index in self.dataset.lengths.argsort(kind="stable"):
            example = self.dataset[int(index)]
            if batch and (len(batch) + 1) * len(example) > 4096:
                yield self._collate(batch)
                batch = []
            batch.append(example)
        yield self._collate(batch)

    def fingerprint(self) -> str:
        """Return a hash that identifies the examples."""
        return self.dataset.fingerprint()

    def _collate(self, batch: list[list[int]]) -> tuple[Tensor, Tensor]:
        return collate_instructions(batch, self.pad_token_id, mask_prompt=self.mask_prompt)
