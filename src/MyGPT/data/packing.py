"""Packing: several short fine-tuning examples share one sequence of a batch, which then needs almost no padding.

A packed batch includes segments: for each token, the number of its example. The model takes the segments as its
attention_mask. Each token then attends only to its own example, and positions start at 0 in each example, so the model
computes each example as if it were alone. B is the number of packed sequences in a batch.
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
    """Pack examples of the given lengths into sequences of at most `max_length` tokens.

    Return a list of example indices for each sequence. Each example goes into the first sequence with enough space. If
    `lengths` is sorted from long to short, the number of sequences is at most 11/9 * (smallest possible number) + 4
    (Johnson, 1973). A length outside 1 to max_length raises ValueError.
    """
    for index, length in enumerate(lengths):
        if not 1 <= length <= max_length:
            raise ValueError(f"example {index} has {length} tokens, a packed sequence can contain 1 to {max_length}")
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
    """Return the inputs, targets and segments of B packed sequences, each (B, max_length) int64.

    Inputs are the examples of a sequence, then padding. Targets are the next token ids within each example; the target
    of its last token is pad_token_id. Segments number the examples of a sequence from 1; padding has segment 0.

    Args:
        rows: the examples of each packed sequence, as lists of token ids. An empty example, or a sequence of more than
            max_length tokens, raises ValueError.
        max_length: length of each packed sequence
        pad_token_id: id of the end-of-text token, used as padding and as the last target of each example
        ignore_index: target at padded positions; the loss ignores positions with this target
        mask_prompt: True also sets the targets inside prompts to ignore_index. The examples must then be items of an
            `InstructionDataset`.
        device: the device of the returned tensors
    """
    inputs = torch.full((len(rows), max_length), pad_token_id)
    targets = torch.full((len(rows), max_length), ignore_index)
    segments = torch.zeros(len(rows), max_length, dtype=torch.int64)
    for row, examples in enumerate(rows):
        lengths = [len(item) for item in examples]
        if sum(lengths) > max_length or 0 in lengths:
            limits = f"each needs at least one token, all together at most {max_length}"
            raise ValueError(f"packed sequence {row} has examples of {lengths} tokens: {limits}")
        end = 0
        for segment, item in enumerate(examples, start=1):
            start, end = end, end + len(item)
            inputs[row, start:end] = torch.tensor(item)
            targets[row, start:end] = torch.tensor(item_targets(item, pad_token_id, ignore_index, mask_prompt))
            segments[row, start:end] = segment
    return inputs.to(device), targets.to(device), segments.to(device)


@dataclass(eq=False)
class PackedSampler:
    """An endless series of batches of packed sequences, each of which contains several examples.

    Each batch depends only on the seed and the step number. Each epoch uses every example once: it packs the examples
    from long to short, with equal lengths in random order, and shuffles the packed sequences. All epochs have the same
    number of sequences. The last batch of an epoch may be smaller, so no example occurs twice in a batch.
    `pad_token_id` and `mask_prompt` are passed to `collate_packed`.
    """

    dataset: InstructionDataset
    max_length: int
    """Length of a packed sequence in tokens. A longer example raises ValueError."""
    batch_size: int
    """Number of packed sequences per batch (B). The last batch of an epoch may have fewer."""
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
            raise ValueError(f"the longest example has {longest} tokens, a packed sequence has {limit}: {way_out}")
        self._epoch = lru_cache(maxsize=2)(self.epoch)
        # First-fit depends only on the sorted lengths, which are the same in every epoch.
        self.rows_per_epoch = len(self._epoch(0))
        self.batches_per_epoch = -(-self.rows_per_epoch // self.batch_size)

    def batch(self, step: int) -> PackedBatch:
        """Return the inputs, targets and segments of a step, each (B, max_length) int64, made by `collate_packed`."""
        rows = [[self.dataset[index] for index in row] for row in self.rows(step)]
        return collate_packed(rows, self.max_length, self.pad_token_id, mask_prompt=self.mask_prompt)

    def fingerprint(self) -> str:
        """Return a hash of all examples, with which a resumed training run detects changed data."""
        return self.dataset.fingerprint()

    def rows(self, step: int) -> list[list[int]]:
        """Return a list of example indices for each packed sequence in the batch of a training step."""
        epoch, position = divmod(step, self.batches_per_epoch)
        return self._epoch(epoch)[position * self.batch_size : (position + 1) * self.batch_size]

    def epoch(self, epoch: int) -> list[list[int]]:
        """Return a list of example indices for each packed sequence of epoch number `epoch`."""
        random = np.random.default_rng((self.seed, epoch))
        order = random.permutation(len(self.dataset))
        order = order[(-self.dataset.lengths[order]).argsort(kind="stable")]
        rows = pack_first_fit(self.dataset.lengths[order].tolist(), self.max_length)
        return [order[rows[number]].tolist() for number in random.permutation(len(rows))]

    def fill(self) -> float:
        """Return the fraction of all positions that contain tokens instead of padding, from 0 to 1."""
        return float(self.dataset.lengths.sum()) / (self.rows_per_epoch * self.max_length)
