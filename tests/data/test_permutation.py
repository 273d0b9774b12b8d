"""Tests of the keyed permutation: every number once, and no difference from numpy's permutations that a test can see."""

from __future__ import annotations

import itertools

import numpy as np
import numpy.typing as npt
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT.data import sampler
from MyGPT.data.permutation import N_ROUNDS, draw_keys, permute
from MyGPT.data.sampler import KEYED, WindowSampler
from MyGPT.data.tokens import compact_ids, fingerprint

Ints = npt.NDArray[np.int64]


def permutation(n: int, seed: int) -> Ints:
    return permute(np.arange(n), n, draw_keys(np.random.default_rng(seed)))


def excess(counts: npt.NDArray[np.int64]) -> float:
    """Return how many standard deviations the chi-square of equally probable counts is above its mean."""
    expected, n_free = counts.sum() / counts.size, counts.size - 1
    return float((((counts - expected) ** 2 / expected).sum() - n_free) / np.sqrt(2 * n_free))


def joint(a: Ints, b: Ints, n: int, bins: int = 32) -> Ints:
    """Return how many pairs (a, b) of numbers below n fall into each cell of a square grid."""
    return np.bincount(a * bins // n * bins + b * bins // n, minlength=bins**2)


@pytest.mark.parametrize("n", [1, 2, 3, 4, 5, 7, 8, 9, 100, 1000, 1023, 1024, 1025, 2**16 + 1])
def test_every_number_occurs_once(n: int) -> None:
    assert np.array_equal(np.sort(permutation(n, n)), np.arange(n))


@settings(max_examples=50, deadline=None)
@given(n=st.integers(1, 2**40), seed=st.integers(0, 2**32), share=st.floats(0, 1, exclude_max=True))
def test_a_value_does_not_depend_on_the_other_numbers(n: int, seed: int, share: float) -> None:
    keys, number = draw_keys(np.random.default_rng(seed)), int(n * share)
    several = permute(np.array([0, number, n - 1]), n, keys)
    assert np.array_equal(permute(np.array([number]), n, keys), several[1:2])
    assert several.min() >= 0 and several.max() < n and len(set(several)) == len({0, number, n - 1})
    assert len(permute(np.empty(0, np.int64), n, keys)) == 0


@pytest.mark.parametrize("n", [2**17 + 1, 2**18 - 1])  # almost half of all values are permuted again, and almost none
def test_one_permutation_looks_random(n: int) -> None:
    """Each statistic is approximately normal. One of 78 exceeds 5 by chance in 1 of 40,000 such permutations."""
    p, numbers = permutation(n, 1), np.arange(n)
    statistics = {
        "position": excess(joint(numbers, p, n)),
        "low bits": excess(np.bincount(numbers % 32 * 32 + p % 32)),
        "next epoch": excess(joint(p, permutation(n, 2), n)),
        "descents": abs((p[1:] < p[:-1]).sum() - (n - 1) / 2) / np.sqrt((n + 1) / 12),
    }
    for lag in [1, 3, *(1 << bit for bit in range(1, 17))]:  # powers of two change one bit of the network's input
        statistics[f"pairs at {lag}"] = excess(joint(p[:-lag], p[lag:], n))
        statistics[f"differences at {lag}"] = excess(np.bincount((p[lag:] - p[:-lag]) % n * 512 // n))
    assert max(statistics.values()) < 5, statistics


def test_few_rounds_would_be_noticed() -> None:
    """The statistics above are able to fail: with two or four rounds, differences are far from uniform."""
    n = 2**18 - 1
    for n_rounds, least in ((2, 1000), (4, 6)):
        p = permute(np.arange(n), n, draw_keys(np.random.default_rng(1))[:n_rounds])
        lags = (1 << bit for bit in range(1, 18))
        assert max(excess(np.bincount((p[lag:] - p[:-lag]) % n * 512 // n)) for lag in lags) > least
    assert N_ROUNDS >= 6


def test_all_orders_of_a_few_numbers_are_equally_frequent_over_the_keys() -> None:
    """4 of 1,000 numbers, 2,400 keys: each of the 24 orders is expected 100 times. The limit fails once in 10**5 runs."""
    orders = {order: i for i, order in enumerate(itertools.permutations(range(4)))}
    some, counts = np.array([0, 1, 500, 999]), np.zeros(24, np.int64)
    first = np.zeros(20, np.int64)
    random = np.random.default_rng(7)
    for _ in range(2400):
        values = permute(some, 1000, draw_keys(random))
        counts[orders[tuple(values.argsort().tolist())]] += 1
        first[values[0] // 50] += 1
    assert excess(counts) < 6 and excess(first) < 6


# --- its use in WindowSampler ----------------------------------------------------------------------------------------


def test_short_epochs_keep_the_order_of_numpys_permutation() -> None:
    """Runs of earlier versions must see the same batches. This is the code that they used."""
    ids = compact_ids(range(1003))
    found = WindowSampler(ids, 10, 33, "shuffled", seed=5)
    assert found.fingerprint() == fingerprint(ids)
    for epoch in (0, 1, 7):
        random, starts = np.random.default_rng((5, epoch)), np.arange(99) * 10
        offset = random.integers(0, 1003 - starts[-1] - 10)
        expected = random.permutation(starts) + int(offset)
        batches = [found.batch(3 * epoch + step)[0][:, 0] for step in range(3)]
        assert torch.cat(batches).tolist() == expected.tolist()


def test_a_long_epoch_visits_every_window_once_without_a_table(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sampler, "MAX_TABLE", 98)
    keyed = WindowSampler(compact_ids(range(1003)), 10, 20, "shuffled", seed=1)
    starts = torch.cat([keyed.batch(step)[0][:, 0] for step in range(25)])[: 5 * 99].view(5, 99)
    assert all(len((epoch // 10).unique()) == 99 and len((epoch % 10).unique()) == 1 for epoch in starts)
    assert len({tuple((epoch // 10).tolist()) for epoch in starts}) == 5
    assert starts[0].tolist() != sorted(starts[0].tolist())
    assert keyed.fingerprint() == fingerprint(keyed.ids) + KEYED
    assert WindowSampler(keyed.ids, 10, 20, "random").fingerprint() == fingerprint(keyed.ids)
