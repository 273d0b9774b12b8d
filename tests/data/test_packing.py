"""Tests of packing, against a naive first-fit, the unpacked examples, and transformers with a block-diagonal mask."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from MyGPT import CharTokenizer
from MyGPT.data.instructions import Example, InstructionDataset, collate_instructions
from MyGPT.data.packing import PackedSampler, collate_packed, pack_first_fit
from MyGPT.model import GPTModel
from oracles_model import transformers_twin

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
END = 66
ROWS = [[[1, 2, 3], [4], [5, 6, 7, 8, 9, 10]], [[11, 12, 13, 14], [15, 16]], [[17]]]
ALONE = [item for row in ROWS for item in row]


def naive_first_fit(lengths: list[int], max_length: int) -> list[list[int]]:
    rows: list[list[int]] = []
    for index, length in enumerate(lengths):
        fitting = [row for row in rows if sum(lengths[i] for i in row) + length <= max_length]
        if fitting:
            fitting[0].append(index)
        else:
            rows.append([index])
    return rows


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(lengths=st.lists(st.integers(1, 20), max_size=60), more=st.integers(0, 30))
def test_each_example_goes_to_the_first_row_with_enough_space(lengths: list[int], more: int) -> None:
    max_length = max(lengths, default=1) + more
    assert pack_first_fit(lengths, max_length) == naive_first_fit(lengths, max_length)


@pytest.mark.parametrize("length", [0, 11])
def test_an_example_that_fits_into_no_row_is_refused(length: int) -> None:
    with pytest.raises(ValueError, match=f"example 1 has {length} tokens, a packed sequence can contain 1 to 10"):
        pack_first_fit([3, length], 10)


def test_a_packed_batch_by_hand() -> None:
    inputs, targets, segments = collate_packed([[[1, 2, 3], [4, 5]], [[6]]], 7, END)
    assert inputs.tolist() == [[1, 2, 3, 4, 5, END, END], [6, END, END, END, END, END, END]]
    assert targets.tolist() == [[2, 3, END, 5, END, -100, -100], [END, -100, -100, -100, -100, -100, -100]]
    assert segments.tolist() == [[1, 1, 1, 2, 2, 0, 0], [1, 0, 0, 0, 0, 0, 0]]
    assert inputs.dtype == targets.dtype == segments.dtype == torch.int64


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.tuples(st.integers(1, 6), st.integers(0, 6)), min_size=1, max_size=12),
    mask_prompt=st.booleans(),
)
def test_packing_keeps_every_input_with_its_target(lengths: list[tuple[int, int]], mask_prompt: bool) -> None:
    items = [Example(range(10 * i, 10 * i + p + a), [False] * p + [True] * a) for i, (p, a) in enumerate(lengths)]
    rows = [[items[i] for i in row] for row in pack_first_fit([len(item) for item in items], 15)]
    inputs, targets, segments = collate_packed(rows, 15, 999, mask_prompt=mask_prompt)
    alone = Counter[tuple[int, int]]()
    for item in items:
        x, y = collate_instructions([item], 999, mask_prompt=mask_prompt)
        alone.update(zip(x[0].tolist(), y[0].tolist(), strict=True))
    there = segments > 0
    assert Counter(zip(inputs[there].tolist(), targets[there].tolist(), strict=True)) == alone
    assert (inputs[~there] == 999).all() and (targets[~there] == -100).all()


# --- the model with packed rows --------------------------------------------------------------------------------------


def test_packed_losses_equal_those_of_single_examples(tiny_model64: GPTModel) -> None:
    inputs, targets, segments = collate_packed(ROWS, 12, END)
    total, count = tiny_model64.token_loss(inputs, targets, segments)
    unpacked_total, unpacked_count = tiny_model64.token_loss(*collate_instructions(ALONE, END))
    assert int(count) == int(unpacked_count) == sum(map(len, ALONE))
    torch.testing.assert_close(total, unpacked_total, rtol=1e-12, atol=1e-12)


def test_packed_gradients_equal_those_of_single_examples(tiny_model64: GPTModel) -> None:
    def gradients(loss: Tensor) -> list[Tensor]:
        return list(torch.autograd.grad(loss, list(tiny_model64.parameters())))

    inputs, targets, segments = collate_packed(ROWS, 12, END)
    packed = gradients(tiny_model64.token_loss(inputs, targets, segments)[0])
    alone = gradients(tiny_model64.token_loss(*collate_instructions(ALONE, END))[0])
    for ours, theirs in zip(packed, alone, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-10, atol=1e-11)


def test_packed_logits_equal_those_of_transformers_with_a_block_diagonal_mask(tiny_model64: GPTModel) -> None:
    inputs, _, segments = collate_packed(ROWS, 12, END)
    B, T = inputs.shape
    visible = torch.zeros(B, 1, T, T, dtype=torch.bool)
    positions = torch.zeros(B, T, dtype=torch.int64)
    for b, row in enumerate(ROWS):
        start = 0
        for item in row:
            for t in range(len(item)):
                visible[b, 0, start + t, start : start + t + 1] = True
                positions[b, start + t] = t
            start += len(item)
    visible |= torch.eye(T, dtype=torch.bool)  # A row of the mask without any visible token would give nan.
    mask = torch.zeros(B, 1, T, T, dtype=torch.float64).masked_fill(~visible, torch.finfo(torch.float64).min)
    with torch.no_grad():
        ours = tiny_model64(inputs, attention_mask=segments)
        theirs = transformers_twin(tiny_model64)(inputs, attention_mask=mask, position_ids=positions).logits
    torch.testing.assert_close(ours[segments > 0], theirs[segments > 0], rtol=1e-11, atol=1e-11)


def test_another_example_in_the_same_row_changes_nothing(tiny_model64: GPTModel) -> None:
    first, _, segments = collate_packed([[[1, 2, 3], [4, 5, 6], [7, 8]]], 12, END)
    second, _, _ = collate_packed([[[9, 9, 9], [4, 5, 6], [10, 11]]], 12, END)
    with torch.no_grad():
        a, b = tiny_model64(first, attention_mask=segments), tiny_model64(second, attention_mask=segments)
    torch.testing.assert_close(a[:, 3:6], b[:, 3:6], rtol=1e-12, atol=1e-12)
    assert (
        a[:, 6:8] - b[:, 6:8]
    ).abs().min() > 1e-6  # The logits of the changed example differ, so the comparison above can fail.


# --- the sampler -----------------------------------------------------------------------------------------------------


def dataset_of(lengths: list[int], max_length: int | None = None) -> InstructionDataset:
    return InstructionDataset([{"text": "a" * length} for length in lengths], LETTERS, max_length=max_length)


@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    more=st.integers(0, 30),
    batch_size=st.integers(1, 50),
)
def test_every_example_is_seen_once_per_epoch_and_no_row_is_too_long(
    lengths: list[int], more: int, batch_size: int
) -> None:
    max_length = max(lengths) + more
    sampler = PackedSampler(dataset_of(lengths), max_length, batch_size, seed=3)
    n_epochs = 3
    batches = [sampler.rows(step) for step in range(n_epochs * sampler.batches_per_epoch)]
    for batch in batches:
        assert 0 < len(batch) <= batch_size
        assert max(Counter(index for row in batch for index in row).values()) == 1
    rows = [row for batch in batches for row in batch]
    assert len(rows) == n_epochs * sampler.rows_per_epoch
    assert Counter(index for row in rows for index in row) == dict.fromkeys(range(len(lengths)), n_epochs)
    assert all(0 < sum(lengths[index] for index in row) <= max_length for row in rows)
    assert sampler.fill() == pytest.approx(sum(lengths) / (sampler.rows_per_epoch * max_length))


def test_no_token_is_lost_in_an_epochs_batches() -> None:
    records = [{"text": "abcdefghij"[: 1 + i % 10]} for i in range(40)]
    dataset = InstructionDataset(records, LETTERS)
    sampler = PackedSampler(dataset, 16, 1, pad_token_id=END)
    seen = Counter[int]()
    for step in range(sampler.rows_per_epoch):
        inputs, _, segments = sampler.batch(step)
        assert inputs.shape == (1, 16)
        seen.update(inputs[segments > 0].tolist())
    assert seen == Counter(id_ for example in dataset for id_ in example)


def test_the_rows_of_a_step_do_not_depend_on_earlier_calls() -> None:
    dataset = dataset_of([1 + i % 17 for i in range(100)])
    there = [PackedSampler(dataset, 32, 3, seed=1, pad_token_id=END).batch(step) for step in range(30)]
    sampler = PackedSampler(dataset, 32, 3, seed=1, pad_token_id=END)
    back = [sampler.batch(step) for step in reversed(range(30))][::-1]
    assert all(
        torch.equal(a, b) for one, other in zip(there, back, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_epochs_and_seeds_pack_differently() -> None:
    """100 examples have 17 different lengths. Two random orders of equal lengths agree with a probability below 1e-70."""
    dataset = dataset_of([1 + i % 17 for i in range(100)])
    epochs = [PackedSampler(dataset, 32, 3, seed=seed).epoch(epoch) for seed in (1, 2) for epoch in (0, 1)]
    together = [{frozenset(row) for row in rows} for rows in epochs]
    assert all(a != b for i, a in enumerate(together) for b in together[:i])


def test_short_examples_fill_the_rows() -> None:
    sampler = PackedSampler(dataset_of([1 + i % 50 for i in range(500)]), 256, 4)
    assert sampler.rows_per_epoch == -(
        -sum(1 + i % 50 for i in range(500)) // 256
    )  # the smallest possible number of rows


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_length": 8, "batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        (
            {"max_length": 4, "batch_size": 1},
            "the longest example has 5 tokens, a packed sequence has max_length=4: create the",
        ),
    ],
)
def test_invalid_sampler_options_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        PackedSampler(dataset_of([3, 5]), **options)


def test_a_row_with_too_many_tokens_is_refused() -> None:
    with pytest.raises(
        ValueError, match=r"packed sequence 1 has examples of \[3, 2\] tokens: .* all together at most 4"
    ):
        collate_packed([[[1]], [[1, 2, 3], [4, 5]]], 4)
    with pytest.raises(ValueError, match=r"packed sequence 0 has examples of \[0\] tokens: each needs at least one"):
        collate_packed([[[]]], 4)
