"""Tests of windows, loaders and samplers, against the book's loader and simple counting."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from MyGPT import CharTokenizer, GPTDataset, create_dataloader, get_tokenizer
from MyGPT.data.sampler import WindowSampler, walk_windows
from MyGPT.data.tokens import compact_ids
from oracles import book_windows

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(n=st.integers(2, 60), max_length=st.integers(1, 12), stride=st.integers(1, 15))
def test_windows_equal_the_books_in_the_same_order(n: int, max_length: int, stride: int) -> None:
    ids = list(range(n))
    expected = book_windows(ids, max_length, stride)
    if not expected:
        with pytest.raises(ValueError, match=f"the text has {n} tokens, a window of max_length={max_length} needs"):
            GPTDataset(ids, None, max_length, stride)
        return
    dataset = GPTDataset(ids, None, max_length, stride)
    assert len(dataset) == len(expected)
    for i, (x, y) in enumerate(expected):
        assert torch.equal(dataset[i][0], x) and torch.equal(dataset[i][1], y)
        assert dataset[i][0].dtype == dataset[i][1].dtype == torch.int64
    assert torch.equal(dataset[-1][0], expected[-1][0])
    with pytest.raises(IndexError):
        dataset[len(expected)]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(n=st.integers(2, 60), max_length=st.integers(1, 12), stride=st.integers(1, 12))
def test_padding_the_last_window_loses_no_target(n: int, max_length: int, stride: int) -> None:
    stride = min(stride, max_length)
    dataset = GPTDataset(list(range(1, n + 1)), CharTokenizer("ab"), max_length, stride, pad_last=True)
    targets = torch.cat([dataset[i][1] for i in range(len(dataset))])
    assert set(targets.tolist()) - {-100} == set(range(2, n + 1))
    if stride == max_length:
        assert (targets != -100).sum() == n - 1
    for i in range(len(dataset)):
        x, y = dataset[i]
        assert torch.equal(y[y != -100], x[y != -100] + 1)
        assert (y[:-1] != -100).sum() >= (y[1:] != -100).sum()  # Only the last window is padded.
    if n > max_length:
        plain = GPTDataset(list(range(1, n + 1)), None, max_length, stride)
        assert len(plain) <= len(dataset) <= len(plain) + 1


def test_the_books_first_batch(alice: str) -> None:
    """The book's first example of its loader: max_length 4, stride 1, batch size 1, no shuffling, GPT-2's tokenizer."""
    ids = get_tokenizer("gpt2").encode(alice)
    batches = iter(create_dataloader(alice, batch_size=1, max_length=4, stride=1, shuffle=False))
    for i in range(3):
        x, y = next(batches)
        assert x.tolist() == [ids[i : i + 4]]
        assert y.tolist() == [ids[i + 1 : i + 5]]


def test_shuffled_batches_equal_those_of_a_torch_dataloader_over_the_books_windows() -> None:
    ids = list(range(200))
    torch.manual_seed(7)
    ours = [x for x, _ in create_dataloader(ids, batch_size=3, max_length=8, tokenizer=LETTERS)]
    torch.manual_seed(7)
    loader = torch.utils.data.DataLoader(book_windows(ids, 8, 8), batch_size=3, shuffle=True, drop_last=True)  # type: ignore[arg-type]
    theirs = [x for x, _ in loader]
    assert len(ours) == len(theirs) == 8
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_a_seed_makes_the_order_independent_of_torchs_global_state() -> None:
    def order(global_seed: int, seed: int | None) -> list[int]:
        torch.manual_seed(global_seed)
        loader = create_dataloader(list(range(100)), batch_size=1, max_length=5, tokenizer=LETTERS, seed=seed)
        return [int(x[0, 0]) for x, _ in loader]

    assert order(1, 3) == order(2, 3) != order(1, 4)
    assert order(1, None) != order(2, None)


def test_worker_processes_give_the_same_batches() -> None:
    options: dict[str, Any] = {"batch_size": 4, "max_length": 5, "tokenizer": LETTERS, "shuffle": False}
    alone = [x for x, _ in create_dataloader(list(range(100)), **options)]
    # Python 3.12 warns that forking a process with threads can hang. torch's DataLoader decides to fork.
    import warnings

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)
        helped = [x for x, _ in create_dataloader(list(range(100)), num_workers=1, **options)]
    assert all(torch.equal(a, b) for a, b in zip(alone, helped, strict=True))


def test_ids_are_stored_once_even_if_windows_overlap() -> None:
    ids = np.arange(50_000) % 50_257
    dataset = GPTDataset(ids, None, max_length=1024, stride=1)
    assert dataset.ids.nbytes == 2 * 50_000
    compact = compact_ids(ids)
    assert GPTDataset(compact, None, 1024, 1).ids is compact
    assert compact_ids([70_000]).dtype == np.uint32


def test_a_plain_tiktoken_encoding_can_be_the_tokenizer() -> None:
    import tiktoken

    ranks = {bytes([i]): i for i in range(256)}
    encoding = tiktoken.Encoding(
        "bytes", pat_str=r"\S+|\s+", mergeable_ranks=ranks, special_tokens={"<|endoftext|>": 256}
    )
    dataset = GPTDataset("ab<|endoftext|>cd", encoding, 2, 2)
    assert dataset.ids.tolist() == [97, 98, 256, 99, 100]


def test_drop_last_false_keeps_the_small_batch_and_pads_the_last_window() -> None:
    batches = list(create_dataloader(list(range(23)), 2, 5, shuffle=False, drop_last=False, tokenizer=LETTERS))
    assert [tuple(x.shape) for x, _ in batches] == [(2, 5), (2, 5), (1, 5)]
    assert batches[-1][1].tolist() == [[21, 22, -100, -100, -100]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"text": "abc", "max_length": 8}, "the text has 3 tokens, a window of max_length=8 needs 9"),
        ({"text": "", "max_length": 8}, "the text has 0 tokens"),
        ({"text": "a" * 30, "max_length": 8}, r"make 3 windows of max_length=8, fewer than one batch of 4"),
        ({"text": "a" * 99, "batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"text": "a" * 99, "max_length": 0}, "max_length must be a whole number of at least 1, got 0"),
        ({"text": "a" * 99, "max_length": 2, "stride": -1}, "stride must be a whole number of at least 1, got -1"),
        ({"text": [1, -5, 3]}, "from 0 to 4294967295, got -5"),
        ({"text": [1.5, 2.5]}, "whole numbers, got float64"),
        ({"text": [[1, 2], [3, 4]]}, r"one sequence, got an array of shape \(2, 2\)"),
    ],
)
def test_invalid_sizes_are_refused_with_the_numbers(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        create_dataloader(tokenizer=LETTERS, **options)


# --- samplers --------------------------------------------------------------------------------------------------------


@settings(max_examples=100, deadline=None)
@given(
    n=st.integers(3, 80),
    max_length=st.integers(1, 10),
    batch=st.integers(1, 7),
    order=st.sampled_from(["random", "shuffled", "sequential"]),
)
def test_every_sampled_window_is_inside_the_text(n: int, max_length: int, batch: int, order: Any) -> None:
    if n <= max_length:
        with pytest.raises(
            ValueError, match=f"has {n} tokens, a window of {max_length} tokens and its targets need {max_length + 1}"
        ):
            WindowSampler(compact_ids(range(n)), max_length, batch, order)
        return
    sampler = WindowSampler(compact_ids(range(n)), max_length, batch, order, seed=n)
    for step in (0, 1, 5, 1000):
        x, y = sampler.batch(step)
        assert x.shape == y.shape == (batch, max_length)
        assert torch.equal(y, x + 1)
        assert int(y.max()) < n
        again = WindowSampler(compact_ids(range(n)), max_length, batch, order, seed=n).batch(step)
        assert torch.equal(x, again[0])


def test_a_shuffled_epoch_visits_every_window_once_and_each_epoch_has_its_own_offset() -> None:
    sampler = WindowSampler(compact_ids(range(1003)), 10, 3, "shuffled", seed=1)
    assert sampler.windows_per_epoch == 99
    epochs = [torch.cat([sampler.batch(epoch * 33 + step)[0] for step in range(33)]) for epoch in range(5)]
    for epoch in epochs:
        assert len(epoch.unique()) == 990
    assert epochs[0].flatten().tolist() != sorted(epochs[0].flatten().tolist())
    assert len({int(epoch.min()) for epoch in epochs}) > 1  # The probability that all five are equal is 13**-4.


def test_random_windows_start_anywhere() -> None:
    """5,000 draws from 91 starts miss one of them with a probability of at most 91 * (90/91)**5000 < 1e-22."""
    sampler = WindowSampler(compact_ids(range(101)), 10, 50, "random", seed=1)
    starts = {int(start) for step in range(100) for start in sampler.batch(step)[0][:, 0]}
    assert starts == set(range(91))


def test_sequential_windows_are_adjacent_and_start_again_at_the_end() -> None:
    sampler = WindowSampler(compact_ids(range(31)), 10, 2, "sequential")
    assert [sampler.batch(step)[0][:, 0].tolist() for step in range(3)] == [[0, 10], [20, 0], [10, 20]]


@settings(max_examples=100, deadline=None)
@given(n=st.integers(2, 80), max_length=st.integers(1, 10), batch=st.integers(1, 7))
def test_walk_windows_yields_every_target_once(n: int, max_length: int, batch: int) -> None:
    targets = torch.cat([y.flatten() for _, y in walk_windows(compact_ids(range(n)), max_length, batch)])
    assert targets[targets != -100].tolist() == list(range(1, n))
