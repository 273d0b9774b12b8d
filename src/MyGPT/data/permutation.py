"""A pseudo-random permutation of range(n) that is computed for single numbers, without a table of all n.

The permutation is a Feistel network (Luby and Rackoff, 1988) on the bits of n - 1. Its numbers may be n or larger; such a
number is permuted again until the result is below n ("cycle walking", Black and Rogaway, 2002), which is again a
permutation, and takes less than two attempts on average. The same construction shuffles data in Grain and in
`tf.random.experimental.index_shuffle`.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

N_ROUNDS = 8
"""Number of rounds of the network. With four, the default of TensorFlow, a chi-square test of one permutation of a million
numbers notices that numbers at a distance of a power of two are related. With six, 1,080 tests noticed nothing."""


def permute(numbers: npt.NDArray[np.int64], n: int, keys: npt.NDArray[np.uint64]) -> npt.NDArray[np.int64]:
    """Return the values of a permutation of range(n) at some numbers from 0 to n - 1.

    The permutation is determined by n and the random `keys`, one for each round.
    """
    low_bits = np.uint64((n - 1).bit_length() // 2)
    high_bits = np.uint64((n - 1).bit_length()) - low_bits
    values = np.array(numbers, np.uint64)
    pending = np.arange(len(values))
    while len(pending):
        low, high = values[pending] & _ones(low_bits), values[pending] >> low_bits
        for first, second in zip(keys[::2], keys[1::2], strict=True):
            high ^= _hash(low + first) & _ones(high_bits)
            low ^= _hash(high + second) & _ones(low_bits)
        values[pending] = high << low_bits | low
        pending = pending[values[pending] >= n]
    return values.astype(np.int64)


def draw_keys(random: np.random.Generator) -> npt.NDArray[np.uint64]:
    """Return the keys of a permutation, drawn from `random`."""
    return random.integers(0, 2**64, size=N_ROUNDS, dtype=np.uint64)


def _ones(n_bits: np.uint64) -> np.uint64:
    return (np.uint64(1) << n_bits) - np.uint64(1)


def _hash(x: npt.NDArray[np.uint64]) -> npt.NDArray[np.uint64]:
    """Return 64-bit hashes: the finalizer of SplitMix64 (Steele, Lea and Flood, 2014)."""
    x = (x ^ x >> np.uint64(30)) * np.uint64(0xBF58476D1CE4E5B9)
    x = (x ^ x >> np.uint64(27)) * np.uint64(0x94D049BB133111EB)
    return x ^ x >> np.uint64(31)
