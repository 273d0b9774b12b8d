"""Instruction fine-tuning: records as token ids, padded batches, and a sampler that groups examples by length.

Each example ends with the end-of-text id as its last target, so the model learns to stop. A record that already ends with
this token does not get a second one. packing.py puts several
examples into one sequence instead of padding. B batch size, T sequence length.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache
from typing import Any, Literal

import numpy as np
import numpy.typing as npt
import torch
from torch.nn.utils.rnn import pad_sequence
from torch.utils.data import Dataset

from MyGPT.config import require_positive
from MyGPT.data.records import Record, check_record
from MyGPT.data.templates import BOOK, Part, Template
from MyGPT.data.tokens import fingerprint
from MyGPT.data.windows import Batch
from MyGPT.loss import IGNORED
from MyGPT.notebooks import Described
from MyGPT.tokenizers.base import encode_with_specials, encode_without_end


class Example(list[int]):
    """The token ids of one fine-tuning example: a list of int with the additional attribute `is_answer`."""

    def __init__(self, ids: Iterable[int], is_answer: Iterable[bool]) -> None:
        super().__init__(ids)
        self.is_answer = list(is_answer)
        """One bool per token id: True if the model must produce the token, False if the token belongs to the prompt."""

    def add(self, ids: Sequence[int], is_answer: bool) -> None:
        """Append the token ids of a part of the prompt, or of the answer."""
        self.extend(ids)
        self.is_answer += [is_answer] * len(ids)


class InstructionDataset(Described, Dataset[Example]):
    """Fine-tuning examples as token ids: each item is an `Example` with the prompt and the answer of one record.

    Prompt and answer are encoded separately, so that a prompt has the same ids in training and in generation.
    Examples are never truncated. An invalid or empty record, or a data set without examples, raises ValueError.

    Args:
        records: instruction records, conversations, prompts with completions, or texts, see records.py
        tokenizer: a tokenizer of MyGPT or a tiktoken.Encoding
        template: the prompt template, which adds text around the fields of each record
        max_length: maximum number of tokens per example; None for no limit
        too_long: "drop" leaves out examples of more than max_length tokens and counts them in `n_too_long`; "raise"
            raises ValueError
        names: the name of each record in error messages. Default: "record 1", "record 2" and so on
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
        require_positive(optional=True, max_length=max_length)
        if too_long not in ("drop", "raise"):
            raise ValueError(f"too_long must be 'drop' or 'raise', got {too_long!r}")
        self.max_length = max_length
        self.n_too_long = 0
        self.longest = 0
        """Number of tokens in the longest example, including the examples that are left out as too long."""
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
            limit = f" for max_length={max_length} (the longest has {self.longest} tokens)" if len(records) else ""
            counts = f"{len(records)} records, {self.n_too_long} too long{limit}"
            raise ValueError(f"there are no examples to learn from: {counts}")
        self.lengths = np.array([len(part) for part in ids])
        """Number of tokens in each example: an integer array (n_examples,)."""
        self._ends = self.lengths.cumsum()
        self._ids, self._is_answer = np.concatenate(ids), np.concatenate(is_answer)

    def fingerprint(self) -> str:
        """Return a hash of all examples, with which a resumed training run detects changed data."""
        return fingerprint(self._ids, self._ends, self._is_answer)

    def __len__(self) -> int:
        return len(self.lengths)

    def __getitem__(self, index: int) -> Example:
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no example {index} in a data set with {len(self)} examples")
        end, length = self._ends[index], self.lengths[index]
        return Example(self._ids[end - length : end].tolist(), self._is_answer[end - length : end].tolist())

    def summary(self) -> dict[str, object]:
        """Return the numbers of examples, their tokens, and records that were left out as too long."""
        n_tokens, longest = len(self._ids), int(self.lengths.max())
        return {"examples": len(self), "tokens": n_tokens, "longest": longest, "too_long": self.n_too_long}

    def describe(self) -> str:
        """Return a one-line summary: the numbers of examples, tokens, and records that were left out as too long."""
        text = f"{len(self):,} examples with {len(self._ids):,} tokens, the longest has {self.lengths.max():,}"
        if self.n_too_long:
            text += f"; {self.n_too_long:,} more left out because they are longer than {self.max_length:,} tokens"
            text += f", the longest has {self.longest:,}"
        return text


def encode_prompt(record: Record, tokenizer: Any, template: Template = BOOK) -> list[int]:
    """Return the token ids of a record's prompt, which are the same as in training.

    `template` adds text around the fields of the record. The record needs no answer.
    """
    return list(_encode_parts(template.for_tokenizer(tokenizer).parts(record, with_answer=False), tokenizer))


def encode_question(record: Record, tokenizer: Any, template: Template) -> list[int]:
    """Return the token ids after which the model writes its answer: the prompt, and the text that starts every answer.

    The model need not generate the text that the template puts before the output of an instruction record.
    """
    begun = template.response.partition("{output}")[0] if "instruction" in record else ""
    return encode_prompt(record, tokenizer, template) + list(tokenizer.encode(begun))


def _encode_record(record: Record, where: str, tokenizer: Any, template: Template) -> Example:
    """Return the token ids of a record's prompt and answer, with the text that `template` adds.

    An invalid record raises ValueError with a message that starts with `where`, the name of the record.
    """
    record = check_record(record, where)
    try:
        parts = template.for_tokenizer(tokenizer).parts(record)
        has_answer = bool(parts) and parts[-1].is_answer
        example = _encode_parts(parts[:-1] if has_answer else parts, tokenizer)
        # The targets end with the end-of-text token, so the answer itself must not.
        example.add(encode_without_end(tokenizer, parts[-1].text) if has_answer else [], True)
    except ValueError as error:  # The tokenizer does not know a character.
        raise ValueError(f"{where}: {error}") from None
    if not example:
        raise ValueError(f"{where} has no tokens: an example needs at least one")
    return example


def _encode_parts(parts: list[Part], tokenizer: Any) -> Example:
    """Encode the prompt and answer parts of a text, each separately, and return their token ids as one Example."""
    example = Example([], [])
    for part in parts:
        example.add(encode_with_specials(tokenizer, part.text), part.is_answer and part.is_learned)
    return example


def collate_instructions(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = IGNORED,
    allowed_max_length: int | None = None,
    mask_prompt: bool = False,
    device: str | torch.device = "cpu",
) -> Batch:
    """Return the inputs and targets of B examples, each (B, T) int64, padded to the length T of the longest example.

    Inputs are the ids of an example, then pad_token_id. Targets are the same ids without the first, then one
    pad_token_id as the end of the text, then ignore_index.

    This is the `custom_collate_fn` of "Build a Large Language Model (From Scratch)", chapter 7, with one correction: if
    an example contains pad_token_id, the function of Raschka's book also ignores targets that belong to the example.

    Args:
        batch: the examples, as lists of token ids with at least one id each
        pad_token_id: id of the end-of-text token, used as padding and as the last target
        ignore_index: target at padded positions; the loss ignores positions with this target
        allowed_max_length: maximum of T; the end of longer examples is cut off. Default: no limit.
        mask_prompt: True also sets the targets inside prompts to ignore_index. The examples must then be items of an
            `InstructionDataset`.
        device: the device of the returned tensors
    """
    if len(batch) == 0 or not all(len(item) for item in batch):
        raise ValueError(f"a batch needs items of at least one token, got lengths {[len(item) for item in batch]}")
    require_positive(optional=True, allowed_max_length=allowed_max_length)
    items = [torch.tensor([*item]) for item in batch]
    answers = [torch.tensor(item_targets(item, pad_token_id, ignore_index, mask_prompt)) for item in batch]
    inputs = pad_sequence(items, batch_first=True, padding_value=pad_token_id)  # (B, T)
    targets = pad_sequence(answers, batch_first=True, padding_value=ignore_index)  # (B, T)
    return inputs[:, :allowed_max_length].to(device), targets[:, :allowed_max_length].to(device)


def item_targets(item: Sequence[int], end_id: int, ignore_index: int, mask_prompt: bool) -> list[int]:
    """Return the target of each token id in `item`: the next id, and `end_id` for the last token.

    If mask_prompt is True, targets that belong to a prompt become ignore_index; `item` must then be an `Example`.
    """
    if type(end_id) is not int or end_id < 0:
        allowed = "a whole number of at least 0"
        raise ValueError(f"the id of the end-of-text token, the last target, must be {allowed}, got {end_id!r}")
    targets = [*item[1:], end_id]
    if not mask_prompt:
        return targets
    if not isinstance(item, Example):
        kind = type(item).__name__
        raise ValueError(f"mask_prompt needs items of an InstructionDataset, which mark their answers, got a {kind}")
    is_answer = [*item.is_answer[1:], True]
    return [target if counts else ignore_index for target, counts in zip(targets, is_answer, strict=True)]


@dataclass(eq=False)
class LengthGroupedSampler:
    """An endless series of batches that group examples of similar length, so that little padding is needed.

    Each batch depends only on the seed and the step number. Each epoch shuffles the examples, sorts each group of
    pool_batches * batch_size examples by length, cuts the groups into batches, and visits all batches in random order.
    Each example is used once per epoch; one batch per epoch may be smaller. `pad_token_id` and `mask_prompt` are passed
    to `collate_instructions`.
    """

    dataset: InstructionDataset
    batch_size: int
    """Number of examples per batch (B). One batch per epoch may have fewer."""
    _: KW_ONLY
    pad_token_id: int = 50256
    mask_prompt: bool = False
    seed: int = 0
    pool_batches: int = 50
    """Number of batches whose examples are sorted by length together. More batches mean less padding and less
    randomness. With 1, each batch is a random choice of examples."""

    def __post_init__(self) -> None:
        require_positive(batch_size=self.batch_size, pool_batches=self.pool_batches)
        self.batches_per_epoch = -(-len(self.dataset) // self.batch_size)
        self._epoch = lru_cache(maxsize=2)(self.epoch)

    def batch(self, step: int) -> Batch:
        """Return the inputs and targets of a training step, each (B, T) int64, padded by `collate_instructions`."""
        examples = [self.dataset[index] for index in self.indices(step)]
        return collate_instructions(examples, self.pad_token_id, mask_prompt=self.mask_prompt)

    def fingerprint(self) -> str:
        """Return a hash of all examples, with which a resumed training run detects changed data."""
        return self.dataset.fingerprint()

    def indices(self, step: int) -> list[int]:
        """Return the indices (in `dataset`) of the examples in the batch of a training step."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[position]

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return a list of example indices for each batch of an epoch, usable as the batch_sampler of a DataLoader."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        pool, batches = self.pool_batches * self.batch_size, []
        for start in range(0, len(order), pool):
            examples = order[start : start + pool]
            examples = examples[self.dataset.lengths[examples].argsort(kind="stable")]
            batches += [examples[i : i + self.batch_size].tolist() for i in range(0, len(examples), self.batch_size)]
        return [batches[position] for position in random.permutation(len(batches))]
