"""Batches for training and validation. A window is a sequence of max_length token ids, cut from a text.

Each training batch depends only on the seed and the step number, so a sampler has no state to save in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from MyGPT.data import Order
from MyGPT.data.tokens import Tokens, fingerprint
from MyGPT.data.windows import Batch, gather_windows


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
        self._epoch = lru_cache(maxsize=2)(self._epoch_starts)

    def batch(self, step: int) -> Batch:
        """Return the inputs and targets of a training step, each (B, T) int64."""
        return gather_windows(self.ids, self._starts(step), self.max_length)

    def fingerprint(self) -> str:
        """Return a hash of the token ids, with which a resumed training run detects changed data."""
        return fingerprint(self.ids)

    def _starts(self, step: int) -> npt.NDArray[np.int64]:
        """Return the start of each window of a training step: an integer array (B,) of positions in `ids`."""
        if self.order == "random":
            random = np.random.default_rng((self.seed, step))
            return random.integers(0, len(self.ids) - self.max_length, size=self.batch_size)
        windows = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, positions = np.divmod(windows, self.windows_per_epoch)
        return np.array([self._epoch(int(epoch))[position] for epoch, position in zip(epochs, positions, strict=True)])

    def _epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the positions in `ids` where the windows of epoch number `epoch` start, in the order of their use."""
        starts = np.arange(self.windows_per_epoch) * self.max_length
        if self.order == "sequential":
            return starts
        random = np.random.default_rng((self.seed, epoch))
        offset = random.integers(0, len(self.ids) - starts[-1] - self.max_length)
        return random.permutation(starts) + int(offset)


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
    starts = np.arange(0, len(ids) - 1, max_length)
    for first in range(0, len(starts), batch_size):
        yield gather_windows(ids, starts[first : first + batch_size], max_length)
