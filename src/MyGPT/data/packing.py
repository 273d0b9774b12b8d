"""Several short examples in one row, so that hardly any of it is padding, and none of them sees another.

A batch comes with the number of the example that each token belongs to. Given to the model as its attention_mask, it
keeps attention within an example and begins its positions at 0: each is computed as if it were alone. B rows, T time.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import lru_cache

import numpy as np
import torch
from torch import Tensor

from MyGPT.data.instructions import InstructionDataset, item_targets
from MyGPT.loss import IGNORED

PackedBatch = tuple[Tensor, Tensor, Tensor]


def pack_first_fit(lengths: Sequence[int], max_length: int) -> list[list[int]]:
    """Rows of indices whose lengths add up to max_length at most: each in turn goes to the first row with room for it.

    With lengths in decreasing order it takes at most 11/9 of the fewest rows possible and four (Johnson, 1973). A length
    outside 1 to max_length is a ValueError.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(f"example {index} has {length} tokens, a row takes 1 to {max_length}")
    # A tree of maxima over the room in rows, in which the first row with enough of it is found in log2(n) looks.
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
    """Inputs, targets and segments, each (B, max_length) int64, of rows of examples.

    Inputs are the examples one after another, then pad_token_id. Targets are each example's as `collate_instructions`
    makes them, the last token's being pad_token_id and not the next example's first. Segments number the examples of a
    row from 1; padding is 0. A row of more than max_length tokens, or an empty example, is a ValueError.
    """
    inputs = torch.full((len(rows), max_length), pad_token_id)
    targets = torch.full((len(rows), max_length), ignore_index)
    segments = torch.zeros(len(rows), max_length, dtype=torch.int64)
    for row, examples in enumerate(rows):
        n_tokens = sum(len(item) for item in examples)
        if n_tokens > max_length or not all(len(item) for item in examples):
            raise ValueError(
                f"row {row} has examples of {[len(item) for item in examples]} tokens, each must have at least one and "
                f"together at most {max_length}"
            )
        end = 0
        for segment, item in enumerate(examples, start=1):
            start, end = end, end + len(item)
            inputs[row, start:end] = torch.tensor(item)
            targets[row, start:end] = torch.tensor(item_targets(item, pad_token_id, ignore_index, mask_prompt))
            segments[row, start:end] = segment
    return inputs.to(device), targets.to(device), segments.to(device)


class PackedSampler:
    """Batches of batch_size packed rows for each step, for ever; what a step sees is a function of (seed, step).

    An epoch sees every example once. Its rows are filled first-fit-decreasing, examples of equal length in random order,
    and shuffled; their number is the same in every epoch, and a batch may hold the end of one and the beginning of the next.
    """

    def __init__(
        self,
        dataset: InstructionDataset,
        max_length: int,
        batch_size: int,
        *,
        pad_token_id: int = 50256,
        mask_prompt: bool = False,
        seed: int = 0,
    ) -> None:
        if type(batch_size) is not int or batch_size < 1:
            raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
        if dataset.lengths.max() > max_length:
            raise ValueError(
                f"the longest example has {dataset.lengths.max()} tokens, a row takes max_length={max_length}: make the "
                f"InstructionDataset with max_length={max_length}, which leaves out what is longer"
            )
        self.dataset = dataset
        self.max_length = max_length
        self.batch_size = batch_size
        self.pad_token_id = pad_token_id
        self.mask_prompt = mask_prompt
        self.seed = seed
        self._epoch = lru_cache(maxsize=2)(self.epoch)
        # First-fit sees only the lengths in decreasing order, and those are the same in every epoch.
        self.rows_per_epoch = len(self._epoch(0))
        self.batches_per_epoch = -(-self.rows_per_epoch // batch_size)

    def batch(self, step: int) -> PackedBatch:
        """Inputs, targets and segments of a step, each (B, T) int64 with T = max_length; see `collate_packed`."""
        rows = [[self.dataset[index] for index in row] for row in self.rows(step)]
        return collate_packed(rows, self.max_length, self.pad_token_id, mask_prompt=self.mask_prompt)

    def fingerprint(self) -> str:
        """What tells the examples from others."""
        return self.dataset.fingerprint()

    def rows(self, step: int) -> list[list[int]]:
        """Which examples each row of a step holds."""
        places = range(step * self.batch_size, (step + 1) * self.batch_size)
        return [self._epoch(place // self.rows_per_epoch)[place % self.rows_per_epoch] for place in places]

    def epoch(self, epoch: int) -> list[list[int]]:
        """The examples of each row of an epoch."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        order = order[(-self.dataset.lengths[order]).argsort(kind="stable")]
        rows = pack_first_fit(self.dataset.lengths[order].tolist(), self.max_length)
        return [order[rows[place]].tolist() for place in random.permutation(len(rows))]

    def fill(self) -> float:
        """The share of an epoch's rows that is tokens and not padding."""
        return float(self.dataset.lengths.sum()) / (self.rows_per_epoch * self.max_length)
