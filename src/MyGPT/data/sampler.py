"""Batches for training and validation. A window is a sequence of max_length token ids, cut from a text.

Each training batch depends only on the seed and the step number, so a sampler has no state to save in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from MyGPT.data import Order
from MyGPT.data.permutation import draw_keys, permute
from MyGPT.data.tokens import Tokens, fingerprint
from MyGPT.data.windows import Batch, gather_windows

MAX_TABLE = 1 << 20
"""The largest number of windows in a shuffled epoch whose order is stored as a table, by numpy's `permutation`. A longer
epoch is shuffled by a keyed permutation, which needs no memory: the table for 100 GB of ids would have 390 MB."""
KEYED = " in the order of a keyed permutation"
"""Added to the fingerprint of a sampler whose epochs are too long for a table."""


@dataclass(eq=False)
class WindowSampler:
    """An endless series of batches, each with `batch_size` windows (sequences of max_length ids) cut from a text.

    The order "random" draws the start of each window uniformly, with replacement. "shuffled" goes through epochs: each
    epoch cuts the text into adjacent windows, from a new random offset, and visits the windows in random order, so each
    token is seen about once per epoch. "sequential" visits adjacent windows from first to last and then starts again.
    """

    ids: Tokens
    """Token ids of the text. Fewer than max_length + 1 ids raise ValueError."""
    max_length: int
    """Length of a window in tokens (T)."""
    batch_size: int
    """Number of windows per batch (B)."""
    order: Order = "shuffled"
    seed: int = 0

    def __post_init__(self) -> None:
        n, T = len(self.ids), self.max_length
        if n <= T:
            raise ValueError(f"the text has {n} tokens, a window of {T} tokens and its targets need {T + 1}")
        # A shuffled epoch has one window less, to leave room for its offset, unless there is only one window.
        self.windows_per_epoch = max(1, (n - 1) // T - (self.order == "shuffled"))
        self._epoch = lru_cache(maxsize=2)(self._shuffle)

    def batch(self, step: int) -> Batch:
        """Return the inputs and targets of a training step, each (B, T) int64."""
        starts = self.starts(step, step * self.batch_size, self.batch_size)
        return gather_windows(self.ids, starts, self.max_length)

    def fingerprint(self) -> str:
        """Return a hash of the token ids, with which a resumed training run detects changed data.

        It also says whether the order is that of a keyed permutation, which early versions of MyGPT did not have.
        """
        is_keyed = self.order == "shuffled" and self.windows_per_epoch > MAX_TABLE
        return fingerprint(self.ids) + (KEYED if is_keyed else "")

    def starts(self, step: int, first: int, count: int) -> npt.NDArray[np.int64]:
        """Return the positions in `ids` where `count` windows of a training step start: an integer array (count,).

        `first` is the number of windows that the earlier steps of the run have used. If the order is "random", the windows
        depend on `step` alone.
        """
        if self.order == "random":
            random = np.random.default_rng((self.seed, step))
            return random.integers(0, len(self.ids) - self.max_length, size=count)
        epochs, positions = np.divmod(np.arange(first, first + count), self.windows_per_epoch)
        if self.order == "sequential":
            return positions * self.max_length
        starts = np.empty(count, np.int64)
        for epoch in np.unique(epochs).tolist():
            offset, order = self._epoch(epoch)
            places = positions[epochs == epoch]
            n = self.windows_per_epoch
            windows = order[places] if n <= MAX_TABLE else permute(places, n, order)
            starts[epochs == epoch] = windows * self.max_length + offset
        return starts

    def _shuffle(self, epoch: int) -> tuple[int, npt.NDArray[Any]]:
        """Return the offset of the windows in epoch number `epoch`, and their order or the keys of their permutation."""
        random, n = np.random.default_rng((self.seed, epoch)), self.windows_per_epoch
        offset = int(random.integers(0, len(self.ids) - n * self.max_length))
        return offset, random.permutation(n) if n <= MAX_TABLE else draw_keys(random)


@dataclass(eq=False)
class WindowValidation:
    """Validation batches, which contain the whole text or `n_windows` fixed sequences of `max_length` ids from it.

    The fixed sequences start at equal distances in the text.
    """

    ids: Tokens
    max_length: int
    n_windows: int

    def __post_init__(self) -> None:
        self.batch_size = max(1, 4096 // self.max_length)
        """Number of windows per validation batch, chosen so that a batch has about 4,096 tokens. It does not depend on
        the batch size in training."""

    def batches(self, whole: bool) -> Iterator[Batch]:
        """Yield batches of inputs and targets, each (B, T) int64, from the same `n_windows` sequences in each call.

        If `whole` is True, or if the text is not longer than these sequences together, the batches cover the whole
        text.
        """
        if whole or len(self.ids) - 1 <= self.n_windows * self.max_length:
            yield from walk_windows(self.ids, self.max_length, self.batch_size)
            return
        starts = np.linspace(0, len(self.ids) - self.max_length - 1, self.n_windows).astype(np.int64)
        for part in np.array_split(starts, -(-len(starts) // self.batch_size)):
            yield gather_windows(self.ids, part, self.max_length)

    def fingerprint(self) -> str:
        """Return a hash of the token ids, with which a resumed training run detects changed data."""
        return fingerprint(self.ids)


def walk_windows(ids: Tokens, max_length: int, batch_size: int) -> Iterator[Batch]:
    """Cut `ids` into adjacent windows of T = max_length ids and yield batches of inputs and targets, each (B, T) int64.

    The last window is padded if it is incomplete. Every id except the first is a target exactly once.
    """
    stride, end = batch_size * max_length, len(ids) - 1
    for first in range(0, end, stride):
        yield gather_windows(ids, np.arange(first, min(first + stride, end), max_length), max_length)
