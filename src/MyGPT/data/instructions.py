"""Examples to fine-tune on: records as token ids, batches padded to their longest, examples of similar length together.

B batch, T time. An example is learnt up to the end-of-text id that follows it, which the batch appends. Rows that hold
several examples are made in packing.py.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.utils.data import Dataset

from MyGPT.data.records import Record, check_record
from MyGPT.data.templates import BOOK, Part, Template
from MyGPT.data.tokens import fingerprint
from MyGPT.data.windows import Batch
from MyGPT.loss import IGNORED
from MyGPT.tokenizers.base import encode_with_specials


class Example(list[int]):
    """The ids of an example: a plain list, so that any code for lists of ids takes it, which knows where it answers."""

    def __init__(self, ids: Iterable[int], is_answer: Iterable[bool]) -> None:
        super().__init__(ids)
        self.is_answer = list(is_answer)
        """For each id, whether the model is to say it, or is given it."""


class InstructionDataset(Dataset[Example]):
    """Records (records.py) as examples, each the ids of prompt and answer, encoded once and kept compactly.

    Prompt and answer are encoded apart, so that the model learns to go on from the very ids it will be given. Examples of
    more than max_length tokens are never cut: they are left out and counted in `n_too_long`, or with too_long="raise" a
    ValueError. So is a record that is none, or has no tokens, and that nothing is left; an error calls a record by its name,
    which is by default record 1, record 2 and so on.
    """

    def __init__(
        self,
        records: Sequence[Record],
        tokenizer: Any,
        template: Template = BOOK,
        max_length: int | None = None,
        too_long: Literal["drop", "raise"] = "drop",
        names: Sequence[str] | None = None,
    ) -> None:
        if max_length is not None and (type(max_length) is not int or max_length < 1):
            raise ValueError(f"max_length must be None or a whole number of at least 1, got {max_length!r}")
        if too_long not in ("drop", "raise"):
            raise ValueError(f"too_long must be 'drop' or 'raise', got {too_long!r}")
        self.max_length = max_length
        self.n_too_long = 0
        """How many records are left out because they are longer than max_length."""
        self.longest = 0
        """Tokens of the longest record, left out or not."""
        ids: list[npt.NDArray[np.uint32]] = []
        is_answer: list[npt.NDArray[np.bool_]] = []
        if names is None:
            names = [f"record {number}" for number in range(1, len(records) + 1)]
        for name, record in zip(names, records, strict=True):
            example = _encode_record(record, name, tokenizer, template)
            self.longest = max(self.longest, len(example))
            if max_length is not None and len(example) > max_length:
                if too_long == "raise":
                    raise ValueError(f"{name} has {len(example)} tokens, more than max_length={max_length}")
                self.n_too_long += 1
                continue
            ids.append(np.array(example, np.uint32))
            is_answer.append(np.array(example.is_answer))
        if not ids:
            raise ValueError(
                f"there are no examples to learn from: {len(records)} records, {self.n_too_long} too long"
                + (f" for max_length={max_length} (the longest has {self.longest} tokens)" if records else "")
            )
        self.lengths = np.array([len(part) for part in ids])
        """Tokens of each example, which is also the room it takes in a batch: its last id is only a target."""
        self._ends = self.lengths.cumsum()
        self._ids, self._is_answer = np.concatenate(ids), np.concatenate(is_answer)

    def fingerprint(self) -> str:
        """What tells these examples from others."""
        return fingerprint(self._ids, self._ends, self._is_answer)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"example {index} of a data set with {len(self)} examples")
        end, length = self._ends[index], self.lengths[index]
        return Example(self._ids[end - length : end].tolist(), self._is_answer[end - length : end].tolist())

    def describe(self) -> str:
        """One line: how many examples and tokens there are, and how many were left out."""
        text = f"{len(self):,} examples with {len(self._ids):,} tokens, the longest has {self.lengths.max():,}"
        if self.n_too_long:
            text += (
                f"; {self.n_too_long:,} more left out because they are longer than {self.max_length:,} tokens, "
                f"the longest has {self.longest:,}"
            )
        return text


def encode_prompt(record: Record, tokenizer: Any, template: Template = BOOK) -> list[int]:
    """The ids to give the model for this record: those that `InstructionDataset` puts before the answer."""
    return list(_encode_parts(template.parts(record, with_answer=False), tokenizer))


def _encode_record(record: Record, where: str, tokenizer: Any, template: Template) -> Example:
    check_record(record, where)
    try:
        example = _encode_parts(template.parts(record), tokenizer)
    except ValueError as error:  # a character that the tokenizer does not know
        raise ValueError(f"{where}: {error}") from None
    if not example:
        raise ValueError(f"{where} has no tokens: an example needs at least one")
    return example


def _encode_parts(parts: list[Part], tokenizer: Any) -> Example:
    ids: list[int] = []
    is_answer: list[bool] = []
    for part in parts:
        ids += encode_with_specials(tokenizer, part.text)
        is_answer += [part.is_answer] * (len(ids) - len(is_answer))
    return Example(ids, is_answer)


def collate_instructions(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = IGNORED,
    allowed_max_length: int | None = None,
    mask_prompt: bool = False,
    device: str | torch.device = "cpu",
) -> Batch:
    """Inputs and targets, each (B, T) int64 on `device`, T the length of the longest item.

    Items are lists of ids. Inputs are padded with pad_token_id. Targets are the ids one further, then one pad_token_id,
    by which the model learns to end, then ignore_index, which no loss counts. With mask_prompt only answers are targets;
    that needs items of an `InstructionDataset`. allowed_max_length cuts T, and whatever is beyond it.

    These are the batches of the `custom_collate_fn` in "Build a Large Language Model (From Scratch)", chapter 7, but for
    items that themselves hold pad_token_id, after the first of which the book's function ignores even the item's end.
    """
    if not batch or not all(len(item) for item in batch):
        raise ValueError(f"a batch needs items of at least one token, got lengths {[len(item) for item in batch]}")
    if allowed_max_length is not None and (type(allowed_max_length) is not int or allowed_max_length < 1):
        raise ValueError(f"allowed_max_length must be None or a whole number of at least 1, got {allowed_max_length!r}")
    T = max(len(item) for item in batch)
    inputs, targets = [], []
    for item in batch:
        padding = T - len(item)
        inputs.append([*item] + [pad_token_id] * padding)
        targets.append(item_targets(item, pad_token_id, ignore_index, mask_prompt) + [ignore_index] * padding)
    x, y = torch.tensor(inputs, device=device), torch.tensor(targets, device=device)  # each (B, T)
    return x[:, :allowed_max_length], y[:, :allowed_max_length]


def item_targets(item: Sequence[int], end_id: int, ignore_index: int, mask_prompt: bool) -> list[int]:
    """What each token of an item is to predict: the next one, the last the end; in the prompt nothing if it is masked."""
    if type(end_id) is not int or end_id < 0:
        raise ValueError(f"an example ends with the id of <|endoftext|>, which must be a whole number, got {end_id!r}")
    targets = [*item[1:], end_id]
    if not mask_prompt:
        return targets
    if not isinstance(item, Example):
        raise ValueError(
            f"mask_prompt needs items of an InstructionDataset, which know where they answer, got a {type(item).__name__}"
        )
    is_answer = [*item.is_answer[1:], True]
    return [target if counts else ignore_index for target, counts in zip(targets, is_answer, strict=True)]


class LengthGroupedSampler:
    """Batches of examples of similar length, so that little of them is padding; what a step sees is a function of (seed, step).

    An epoch sees every example once, its batches in random order; the last that there were examples for may be smaller.
    The examples are shuffled and, pool_batches batches at a time, sorted by length: 1 is plain shuffling, more is less
    padding and less chance.
    """

    def __init__(
        self,
        dataset: InstructionDataset,
        batch_size: int,
        *,
        pad_token_id: int = 50256,
        mask_prompt: bool = False,
        seed: int = 0,
        pool_batches: int = 50,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("pool_batches", pool_batches)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
        self.dataset = dataset
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.mask_prompt = mask_prompt
        self.seed = seed
        self.pool_batches = pool_batches
        self.batches_per_epoch = -(-len(dataset) // batch_size)
        self._epoch = lru_cache(maxsize=2)(self.epoch)

    def batch(self, step: int) -> Batch:
        """Inputs and targets of a step, each (B, T) int64; see `collate_instructions`."""
        examples = [self.dataset[index] for index in self.indices(step)]
        return collate_instructions(examples, self.pad_token_id, mask_prompt=self.mask_prompt)

    def fingerprint(self) -> str:
        """What tells the examples from others."""
        return self.dataset.fingerprint()

    def indices(self, step: int) -> list[int]:
        """Which examples a step sees."""
        epoch, place = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[place]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The examples of each batch of an epoch. A torch DataLoader takes it as its batch_sampler."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        pool, batches = self.pool_batches * self.batch_size, []
        for start in range(0, len(order), pool):
            examples = order[start : start + pool]
            examples = examples[self.dataset.lengths[examples].argsort(kind="stable")]
            batches += [examples[i : i + self.batch_size].tolist() for i in range(0, len(examples), self.batch_size)]
        return [batches[place] for place in random.permutation(len(batches))]
