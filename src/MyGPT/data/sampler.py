"""Which windows a training step sees: a pure function of (seed, step), so that its state is those two numbers."""

from __future__ import annotations

from collections.abc import Iterator
from functools import lru_cache

import numpy as np
import numpy.typing as npt

from MyGPT.data import Order
from MyGPT.data.tokens import TokenArray, fingerprint
from MyGPT.data.windows import Batch, gather_windows


class WindowSampler:
    """Batches of batch_size windows for each step, for ever.

    "random" draws every start anywhere, with replacement. "shuffled" walks epochs: each cuts the ids into adjacent
    windows from another offset and shuffles them, so that a token is seen once an epoch. "sequential" walks the windows
    in order and begins again.
    """

    def __init__(
        self, ids: TokenArray, max_length: int, batch_size: int, order: Order = "shuffled", seed: int = 0
    ) -> None:
        if len(ids) <= max_length:
            raise ValueError(f"the text has {len(ids)} tokens, a window of context {max_length} needs {max_length + 1}")
        self.ids = ids
        self.max_length = max_length
        self.batch_size = batch_size
        self.order = order
        self.seed = seed
        # One window is given up to leave room for an epoch's offset, unless it is the only one.
        self.windows_per_epoch = max(1, (len(ids) - 1) // max_length - (order == "shuffled"))
        self._epoch = lru_cache(maxsize=2)(self._epoch_starts)

    def batch(self, step: int) -> Batch:
        """Inputs and targets of a step, each (B, T) int64."""
        return gather_windows(self.ids, self._starts(step), self.max_length)

    def fingerprint(self) -> str:
        """What tells the text from another."""
        return fingerprint(self.ids)

    def _starts(self, step: int) -> npt.NDArray[np.int64]:
        if self.order == "random":
            random = np.random.default_rng((self.seed, step))
            return random.integers(0, len(self.ids) - self.max_length, size=self.batch_size)
        windows = np.arange(step * self.batch_size, (step + 1) * self.batch_size)
        epochs, places = np.divmod(windows, self.windows_per_epoch)
        return np.array([self._epoch(int(epoch))[place] for epoch, place in zip(epochs, places, strict=True)])

    def _epoch_starts(self, epoch: int) -> npt.NDArray[np.int64]:
        starts = np.arange(self.windows_per_epoch) * self.max_length
        if self.order == "sequential":
            return starts
        random = np.random.default_rng((self.seed, epoch))
        offset = random.integers(0, len(self.ids) - starts[-1] - self.max_length)
        return random.permutation(starts) + int(offset)


class WindowValidation:
    """What a model is evaluated on: a text, by `n_windows` fixed windows spread evenly over it, or as a whole."""

    def __init__(self, ids: TokenArray, max_length: int, n_windows: int) -> None:
        self.ids = ids
        self.max_length = max_length
        self.n_windows = n_windows
        self.batch_size = max(1, 4096 // max_length)
        """Windows at a time: a few thousand tokens, whatever the training batch."""

    def batches(self, whole: bool) -> Iterator[Batch]:
        """Inputs and targets, each (B, T) int64: the same fixed windows every time (all, if there are fewer), or all."""
        if whole or len(self.ids) - 1 <= self.n_windows * self.max_length:
            yield from walk_windows(self.ids, self.max_length, self.batch_size)
            return
        starts = np.linspace(0, len(self.ids) - self.max_length - 1, self.n_windows).astype(np.int64)
        for part in np.array_split(starts, -(-len(starts) // self.batch_size)):
            yield gather_windows(self.ids, part, self.max_length)

    def fingerprint(self) -> str:
        """What tells the text from another."""
        return fingerprint(self.ids)


def walk_windows(ids: TokenArray, max_length: int, batch_size: int) -> Iterator[Batch]:
    """All of `ids` once, in adjacent windows, the last one padded: every id but the first is a target exactly once."""
    starts = np.arange(0, len(ids) - 1, max_length)
    for first in range(0, len(starts), batch_size):
        yield gather_windows(ids, starts[first : first + batch_size], max_length)
