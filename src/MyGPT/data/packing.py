"""Packing: several short fine-tuning examples in one row, with almost no padding.

A packed batch includes segments: for each token, the number of its example. Passed to the model as attention_mask,
segments restrict attention to each example and start its positions at 0, so the model computes each example as if it
were alone. B rows, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import KW_ONLY, dataclass
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from MyGPT.config import require_positive
from MyGPT.data.instructions import InstructionDataset, item_targets
from MyGPT.loss import IGNORED

PackedBatch = tuple[Tensor, Tensor, Tensor]


def pack_first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Distribute examples over rows of at most `max_length` tokens; return the indices of the examples in each row.

    Each example goes into the first row with enough space. If lengths decrease, the number of rows is at most
    11/9 * optimum + 4 (Johnson, 1973). A length outside 1 to max_length raises ValueError.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(f"example {index} has {length} tokens, a row can contain 1 to {max_length}")
    # A binary tree of maxima over the free space of all rows finds the first row with enough space in log2(n) steps.
    n_leaves = 1 << max(0, len(lengths) - 1).bit_length()
    room = [max_length] * (2 * n_leaves)
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        node = 1
        while node < n_leaves:
            node = 2 * node + (room[2 * node] < length)
        if node - n_leaves == len(rows):
            rows.append([])
        rows[node - n_leaves].append(index)
        room[node] -= length
        while node > 1:
            node //= 2
            room[node] = max(room[2 * node], room[2 * node + 1])
    return rows


def collate_packed(
    rows: Sequence[Sequence[Sequence[int]]],
    max_length: int,
    pad_token_id: int = 50256,
    ignore_index: int = IGNORED,
    mask_prompt: bool = False,
    device: str | torch.device = "cpu",
) -> PackedBatch:
    """Return inputs, targets and segments, each (B, max_length) int64. `rows` has the examples of each row.

    Inputs are the examples of a row, then padding. Targets are the next tokens within each example; the target of its
    last token is pad_token_id. Segments number the examples of a row from 1, with 0 for padding. The other arguments
    are those of `collate_instructions`. An empty example, or a row of more than max_length tokens, raises ValueError.
    """
    inputs = torch.full((len(rows), max_length), pad_token_id)
    targets = torch.full((len(rows), max_length), ignore_index)
    segments = torch.zeros(len(rows), max_length, dtype=torch.int64)
    for row, examples in enumerate(rows):
        lengths = [len(item) for item in examples]
        if sum(lengths) > max_length or 0 in lengths:
            limits = f"each needs at least one token, all together at most {max_length}"
            raise ValueError(f"row {row} has examples of {lengths} tokens: {limits}")
        end = 0
        for segment, item in enumerate(examples, start=1):
            start, end = end, end + len(item)
            inputs[row, start:end] = torch.tensor(item)
            targets[row, start:end] = torch.tensor(item_targets(item, pad_token_id, ignore_index, mask_prompt))
            segments[row, start:end] = segment
    return inputs.to(device), targets.to(device), segments.to(device)


@dataclass(eq=False)
class PackedSampler:
    """An endless sequence of batches of packed rows.

    A batch is a pure function of (seed, step). Each epoch uses every example once: it packs the examples from long to
    short, with equal lengths in random order, and shuffles the rows. All epochs have the same number of rows. A batch
    may contain the last rows of one epoch and the first rows of the next. `pad_token_id` and `mask_prompt` are passed
    to `collate_packed`.
    """

    dataset: InstructionDataset
    max_length: int
    """Length of a row. A longer example raises ValueError."""
    batch_size: int
    """Rows per batch, B."""
    _: KW_ONLY
    pad_token_id: int = 50256
    mask_prompt: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        require_positive(batch_size=self.batch_size)
        longest = self.dataset.lengths.max()
        if longest > self.max_length:
            limit = f"max_length={self.max_length}"
            way_out = f"create the InstructionDataset with {limit}, which leaves longer examples out"
            raise ValueError(f"the longest example has {longest} tokens, a row has {limit}: {way_out}")
        self._epoch = lru_cache(maxsize=2)(self.epoch)
        # First-fit depends only on the sorted lengths, which are the same in every epoch.
        self.rows_per_epoch = len(self._epoch(0))
        self.batches_per_epoch = -(-self.rows_per_epoch // self.batch_size)

    def batch(self, step: int) -> PackedBatch:
        """Return the inputs, targets and segments of a step, each (B, max_length) int64, see `collate_packed`."""
        rows = [[self.dataset[index] for index in row] for row in self.rows(step)]
        return collate_packed(rows, self.max_length, self.pad_token_id, mask_prompt=self.mask_prompt)

    def fingerprint(self) -> str:
        """Return a hash that identifies the examples, see `tokens.fingerprint`."""
        return self.dataset.fingerprint()

    def rows(self, step: int) -> list[list[int]]:
        """Return the indices of the examples in each row of a step."""
        numbers = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._epoch(number // self.rows_per_epoch)[number % self.rows_per_epoch] for number in numbers]

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return the indices of the examples in each row of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        order = order[(-self.dataset.lengths[order]).argsort(kind="stable")]
        rows = pack_first_fit(self.dataset.lengths[order].tolist(), self.max_length)
        return [order[rows[number]].tolist() for number in random.permutation(len(rows))]

    def fill(self) -> float:
        """Return the fraction of positions that contain tokens and not padding, from 0 to 1."""
        return float(self.dataset.lengths.sum()) / (self.rows_per_epoch * self.max_length)
