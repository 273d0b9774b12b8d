"""Batches of windows for training and validation.

A training batch is a pure function of (seed, step), so a sampler has no state to save in a checkpoint.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from MyGPT.data import Order
from MyGPT.data.tokens import TokenArray, fingerprint
from MyGPT.data.windows import Batch, gather_windows


@dataclass(eq=False)
class WindowSampler:
    """An endless sequence of batches, each with `batch_size` windows of a token array.

    The order "random" draws each window's start uniformly, with replacement. "shuffled" goes through epochs: each epoch
    cuts the ids into adjacent windows, from a new random offset, and visits them in random order, so each token is seen
    once per epoch. "sequential" visits adjacent windows in order and then starts again.
    """

    ids: TokenArray
    """At least max_length + 1 token ids; fewer raise ValueError."""
    max_length: int
    """Length T of a window."""
    batch_size: int
    """Windows per batch, B."""
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
        """Return the inputs and targets of a step, each (B, T) int64."""
        return gather_windows(self.ids, self._starts(step), self.max_length)

    def fingerprint(self) -> str:
        """Return a hash that identifies the text, see `tokens.fingerprint`."""
        return fingerprint(self.ids)

    def _starts(self, step: int) -> npt.NDArray[np.int64]:
        """Return the positions in `ids` where the windows of a step start, (B,)."""
        if self.order == "random":
            random = np.random.default_rng((self.seed, step))
            return random.integers(0, len(self.ids) - self.max_length, size=self.batch_size)
        windows = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, positions = np.divmod(windows, self.windows_per_epoch)
        return np.array([self._epoch(int(epoch))[position] for epoch, position in zip(epochs, positions, strict=True)])

    def _epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        """Return the starts of all windows of an epoch, in the order in which they are visited."""
        starts = np.arange(self.windows_per_epoch) * self.max_length
        if self.order == "sequential":
            return starts
        random = np.random.default_rng((self.seed, epoch))
        offset = random.integers(0, len(self.ids) - starts[-1] - self.max_length)
        return random.permutation(starts) + int(offset)


@dataclass(eq=False)
class WindowValidation:
    """Validation batches: the whole text, or `n_windows` fixed windows of length `max_length` at equal distances."""

    ids: TokenArray
    max_length: int
    n_windows: int

    def __post_init__(self) -> None:
        self.batch_size = max(1, 4096 // self.max_length)
        """Windows per validation batch, about 4,096 tokens. It does not depend on the training batch."""

    def batches(self, whole: bool) -> Iterator[Batch]:
        """Yield inputs and targets, each (B, T) int64, for the same `n_windows` windows in each call.

        With `whole`, or if the text is short, the batches cover the whole text.
        """
        if whole or len(self.ids) - 1 <= self.n_windows * self.max_length:
            yield from walk_windows(self.ids, self.max_length, self.batch_size)
            return
        starts = np.linspace(0, len(self.ids) - self.max_length - 1, self.n_windows).astype(np.int64)
        for part in np.array_split(starts, -(-len(starts) // self.batch_size)):
            yield gather_windows(self.ids, part, self.max_length)

    def fingerprint(self) -> str:
        """Return a hash that identifies the text, see `tokens.fingerprint`."""
        return fingerprint(self.ids)


def walk_windows(ids: TokenArray, max_length: int, batch_size: int) -> Iterator[Batch]:
    """Yield batches of adjacent windows, (B, T) int64, the last padded. Every id except the first is a target once."""
    starts = np.arange(0, len(ids) - 1, max_length)
    for first in range(0, len(starts), batch_size):
        yield gather_windows(ids, starts[first : first + batch_size], max_length)
