"""Weighted mixtures: training batches whose rows come from several sources, such as 80% from the web and 20% code.

All rows of a run are numbered 0, 1, 2, …, and `Shares` deals these rows to the sources. Which source a row belongs to, and
which window of the source it contains, depends only on the seed and the number of the row. So a mixture has no state to
save, and any number of ranks sees the same batches.
"""

from __future__ import annotations

import hashlib
import heapq
import math
from collections.abc import Iterator, Mapping
from fractions import Fraction
from itertools import count
from typing import Any

import numpy as np
import torch

from MyGPT.data import Order
from MyGPT.data.sampler import WindowSampler, WindowValidation
from MyGPT.data.tokens import Tokens, fingerprint
from MyGPT.data.windows import Batch, gather_windows

_MIN_WINDOWS = 4
"""Number of windows that a short evaluation reads of each source, even if its share is smaller."""


def check_weights(weights: Mapping[Any, Any]) -> dict[str, Fraction]:
    """Return the share of each source, which add up to 1. `weights` maps names to positive numbers in this proportion.

    A weight counts as the decimal number that is printed for it: 0.8 and 0.2 give exactly 4/5 and 1/5. Raises ValueError
    for weights that are not positive numbers, and for names that are not texts.
    """
    if not weights:
        raise ValueError("a mixture needs at least one source, such as {web: 0.8, code: 0.2}, got {}")
    for name, weight in weights.items():
        if not isinstance(name, str) or not name:
            raise ValueError(f"the name of a source must be a text, got {name!r}: put it in quotation marks")
        is_number = isinstance(weight, (int, float)) and not isinstance(weight, bool)
        if not is_number or not 0 < weight < math.inf:
            way_out = "leave the source out to use none of it" if is_number and weight == 0 else "give its share"
            raise ValueError(f"the weight of the source {name!r} must be a number above 0, got {weight!r}: {way_out}")
    exact = {name: Fraction(str(weight)) for name, weight in weights.items()}
    total = sum(exact.values())
    return {name: weight / total for name, weight in exact.items()}


class Shares:
    """Deals numbered rows to sources, so that each source has its share of the first n rows, for every n.

    Two sources: the share of n rows is rounded to a whole number, so it is at most 1/2 row from its exact value. Several
    sources form a binary tree, in which the two smallest shares are joined first, as in a Huffman code. Each inner node
    divides its rows between its two branches as if they were two sources. A rounded share grows by 0 or 1 from n to n + 1,
    so every row is dealt to exactly one source.

    A source is at most 1.68 rows from its exact share, for any number of sources: its error is at most half the sum of
    (share of the source / share of the branch) over the branches on the way to the source. In a Huffman tree, the shares of
    these branches grow at least as fast as the Fibonacci numbers, whose reciprocals add up to 3.36.

    Args:
        shares: the share of each source; they add up to 1
    """

    def __init__(self, shares: Mapping[str, Fraction]) -> None:
        order = count()  # decides between equal shares
        heap: list[tuple[Fraction, int, Any]] = [(share, next(order), name) for name, share in shares.items()]
        heapq.heapify(heap)
        while len(heap) > 1:
            smaller, _, right = heapq.heappop(heap)
            larger, _, left = heapq.heappop(heap)
            node = (larger / (larger + smaller), left, right)
            heapq.heappush(heap, (larger + smaller, next(order), node))
        self._root = heap[0][2]

    def count(self, n_rows: Any) -> dict[str, Any]:
        """Return how many of the first `n_rows` rows each source has. `n_rows` is an int or an array of Python ints."""
        counts: dict[str, Any] = {}

        def deal(node: Any, n: Any) -> None:
            if isinstance(node, str):
                counts[node] = n
                return
            share, left, right = node
            to_left = (2 * n * share.numerator + share.denominator) // (2 * share.denominator)
            deal(left, to_left)
            deal(right, n - to_left)

        deal(self._root, n_rows)
        return counts


class MixtureSampler:
    """An endless series of batches of windows from several sources, in proportion to their weights.

    Every source has its own epochs and its own order (see WindowSampler). The order of the sources in `sources`, and their
    names, do not change the batches.

    Args:
        sources: the token ids of each source, by name
        weights: for each name, the weight of the source; only the proportions matter
        max_length: length of a window in tokens (T)
        batch_size: number of windows per batch (B)
        order: the order of the windows of each source
        seed: seed of all random choices

    Raises:
        ValueError: a source is too short for one window, or a weight is not a positive number.
    """

    def __init__(
        self,
        sources: Mapping[str, Tokens],
        weights: Mapping[str, float],
        max_length: int,
        batch_size: int,
        order: Order = "shuffled",
        seed: int = 0,
    ) -> None:
        self.max_length, self.batch_size = max_length, batch_size
        self.shares = {name: check_weights(weights)[name] for name in sources}
        # Sources are ordered by their content, so that files may be renamed and listed in another order.
        known = {name: (fingerprint(ids), self.shares[name]) for name, ids in sources.items()}
        self.samplers = {}
        for number, name in enumerate(sorted(sources, key=known.__getitem__)):
            own_seed = int(np.random.SeedSequence((seed, number)).generate_state(1, np.uint64)[0])
            try:
                self.samplers[name] = WindowSampler(sources[name], max_length, batch_size, order, own_seed)
            except ValueError as error:
                raise ValueError(f"the source {name!r}: {error}") from None
        self._dealer = Shares({name: self.shares[name] for name in self.samplers})

    def batch(self, step: int) -> Batch:
        """Return the inputs and targets of a training step, each (B, T) int64."""
        first = step * self.batch_size
        # Python's integers are exact for a run of any length.
        counts = self._dealer.count(np.array(range(first, first + self.batch_size + 1), dtype=object))
        inputs = torch.empty(self.batch_size, self.max_length, dtype=torch.int64)
        targets = torch.empty_like(inputs)
        for name, sampler in self.samplers.items():
            rows = np.flatnonzero(np.diff(counts[name]))
            starts = sampler.starts(step, counts[name][0], len(rows))
            inputs[rows], targets[rows] = gather_windows(sampler.ids, starts, self.max_length)
        return inputs, targets

    def tokens(self, step: int) -> dict[str, int]:
        """Return how many input tokens of each source the first `step` steps use, by name."""
        counts = self._dealer.count(step * self.batch_size)
        return {name: counts[name] * self.max_length for name in self.shares}

    def metrics(self, step: int) -> dict[str, float]:
        """Return the values of `tokens` under names such as "tokens/web", for metrics.jsonl."""
        return {f"tokens/{name}": n_tokens for name, n_tokens in self.tokens(step).items()}

    def fingerprint(self) -> str:
        """Return a hash of the shares and token ids, with which a resumed training run detects changed data."""
        return _fingerprint({name: sampler.fingerprint() for name, sampler in self.samplers.items()}, self.shares)


class MixtureValidation:
    """Validation batches of several sources. The loss of the mixture is the mean of their losses, weighted by the shares.

    A source with fewer than two tokens has no loss and is left out.

    Args:
        sources: the token ids of each source, by name. At least one has two tokens or more.
        weights: for each name, the weight of the source
        max_length: length of a window in tokens
        n_windows: number of windows of a short evaluation, which are divided between the sources by their shares
    """

    def __init__(
        self, sources: Mapping[str, Tokens], weights: Mapping[str, float], max_length: int, n_windows: int
    ) -> None:
        used = [name for name, ids in sources.items() if len(ids) > 1]
        self.shares = check_weights({name: weights[name] for name in used})
        """The share of each source in the loss."""
        numbers = {name: max(_MIN_WINDOWS, round(n_windows * share)) for name, share in self.shares.items()}
        self.parts = {name: WindowValidation(sources[name], max_length, numbers[name]) for name in used}
        """The validation batches of each source."""

    def batches(self, whole: bool) -> Iterator[Batch]:
        """Yield the batches of all sources, one source after the other."""
        for part in self.parts.values():
            yield from part.batches(whole)

    def fingerprint(self) -> str:
        """Return a hash of the shares and token ids, with which a resumed training run detects changed data."""
        return _fingerprint({name: part.fingerprint() for name, part in self.parts.items()}, self.shares)


def _fingerprint(known: Mapping[str, str], shares: Mapping[str, Fraction]) -> str:
    """Return a hash of the fingerprints `known` and the shares of all sources. Their names and order have no influence."""
    lines = sorted(f"{known[name]} {shares[name]}\n" for name in known)
    return hashlib.sha256("".join(lines).encode()).hexdigest()
