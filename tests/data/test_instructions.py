"""Tests of fine-tuning examples and their batches, against a naive collate function, transformers and simple counting."""

from __future__ import annotations

import pickle
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader

from MyGPT import CharTokenizer, get_tokenizer
from MyGPT.data.instructions import (
    Example,
    InstructionDataset,
    LengthGroupedSampler,
    collate_instructions,
    encode_prompt,
)
from MyGPT.data.templates import ALPACA, format_input
from MyGPT.model import GPTModel
from oracles_model import transformers_twin

LETTERS = CharTokenizer("abcdefghijklmnopqrstuvwxyz ")
END = 66

RECORDS = [
    {"instruction": "Name a colour.", "input": "", "output": "Green, for example."},
    {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"},
    {"instruction": "Say nothing.", "output": ""},
]


def naive_collate(batch: list[list[int]], pad: int, ignore: int, longest_allowed: int | None) -> tuple[Tensor, Tensor]:
    """Collate as the book describes: append one pad to each item, pad to the longest, shift by one, ignore later pads."""
    width = max(len(item) for item in batch) + 1
    inputs, targets = [], []
    for item in batch:
        row = list(item)
        while len(row) < width:
            row.append(pad)
        target, has_ended = row[1:], False
        for i, id_ in enumerate(target):
            if id_ == pad and has_ended:
                target[i] = ignore
            has_ended = has_ended or id_ == pad
        inputs.append(row[:-1][:longest_allowed])
        targets.append(target[:longest_allowed])
    return torch.tensor(inputs), torch.tensor(targets)


ITEMS = st.lists(st.lists(st.integers(0, 60), min_size=1, max_size=9), min_size=1, max_size=5)


@pytest.mark.slow
@settings(max_examples=300, deadline=None)
@given(batch=ITEMS, ignore=st.sampled_from([-100, -1]), longest_allowed=st.none() | st.integers(1, 12))
def test_batches_equal_the_books(batch: list[list[int]], ignore: int, longest_allowed: int | None) -> None:
    inputs, targets = collate_instructions(batch, END, ignore, longest_allowed)
    expected_inputs, expected_targets = naive_collate(batch, END, ignore, longest_allowed)
    assert torch.equal(inputs, expected_inputs) and torch.equal(targets, expected_targets)
    assert inputs.dtype == targets.dtype == torch.int64


def test_the_example_batch_of_the_book() -> None:
    inputs, targets = collate_instructions([[0, 1, 2, 3, 4], [5, 6], [7, 8, 9]])
    assert inputs.tolist() == [[0, 1, 2, 3, 4], [5, 6, 50256, 50256, 50256], [7, 8, 9, 50256, 50256]]
    assert targets.tolist() == [[1, 2, 3, 4, 50256], [6, 50256, -100, -100, -100], [8, 9, 50256, -100, -100]]


def test_an_end_of_text_inside_an_item_does_not_hide_the_last_target() -> None:
    """The book's function ignores every 50256 after the first, so a model would not learn to end a conversation."""
    _, targets = collate_instructions([[1, END, 2], [1, 2, 3, 4]], END)
    assert targets.tolist() == [[END, 2, END, -100], [2, 3, 4, END]]


@pytest.mark.slow
@settings(max_examples=200, deadline=None)
@given(prompts=ITEMS, answers=ITEMS)
def test_with_the_prompt_masked_exactly_the_answers_and_their_ends_are_targets(
    prompts: list[list[int]], answers: list[list[int]]
) -> None:
    pairs = list(zip(prompts, answers, strict=False))
    batch = [Example(p + a, [False] * len(p) + [True] * len(a)) for p, a in pairs]
    inputs, targets = collate_instructions(batch, END, mask_prompt=True)
    plain_inputs, plain_targets = collate_instructions(batch, END)
    assert torch.equal(inputs, plain_inputs)
    for (p, a), row, plain in zip(pairs, targets.tolist(), plain_targets.tolist(), strict=True):
        assert [id_ for id_ in row if id_ != -100] == [*a, END]
        assert row == [-100] * (len(p) - 1) + plain[len(p) - 1 :]


def test_items_are_ordinary_lists() -> None:
    example = InstructionDataset(RECORDS, get_tokenizer("gpt2"))[0]
    assert isinstance(example, list) and example == list(example)
    assert type(example.copy()) is list and torch.tensor(example).shape == (len(example),)
    again = pickle.loads(pickle.dumps(example))
    assert again == example and again.is_answer == example.is_answer


def test_a_torch_dataloader_batches_the_examples() -> None:
    dataset = InstructionDataset(RECORDS, get_tokenizer("gpt2"))
    collate = partial(collate_instructions, mask_prompt=True, allowed_max_length=1024)
    ((inputs, targets),) = DataLoader(dataset, batch_size=3, collate_fn=collate)
    expected = collate([dataset[i] for i in range(3)])
    assert torch.equal(inputs, expected[0]) and torch.equal(targets, expected[1])


def test_gpt2_ids_equal_those_of_the_whole_text_as_in_the_book() -> None:
    tokenizer = get_tokenizer("gpt2")
    dataset = InstructionDataset(RECORDS, tokenizer)
    for example, record in zip(dataset, RECORDS, strict=True):
        assert example == tokenizer.encode(f"{format_input(record)}\n\n### Response:\n{record['output']}")
        assert example.is_answer == [i >= len(tokenizer.encode(format_input(record))) for i in range(len(example))]


def test_a_plain_tiktoken_encoding_gives_the_same_examples() -> None:
    import tiktoken

    encoding = tiktoken.Encoding(
        "bytes",
        pat_str=r"\S+|\s+",
        mergeable_ranks={bytes([i]): i for i in range(256)},
        special_tokens={"<|endoftext|>": 256},
    )
    assert InstructionDataset([{"text": "ab<|endoftext|>c"}], encoding)[0] == [97, 98, 256, 99]


def test_no_token_joins_the_prompt_to_the_answer() -> None:
    """If both were encoded as one text, `:` and an opening quote would be one token, but no prompt ends with this token."""
    tokenizer = get_tokenizer("gpt2")
    record = {"instruction": "Quote.", "output": '"To be."'}
    example = InstructionDataset([record], tokenizer, ALPACA)[0]
    prompt = encode_prompt({"instruction": "Quote."}, tokenizer, ALPACA)
    assert prompt == tokenizer.encode(ALPACA.prompt(record)) == example[: len(prompt)]
    assert tokenizer.encode(ALPACA.prompt(record) + record["output"])[: len(prompt)] != prompt


def test_every_answer_of_a_conversation_and_its_end_are_targets() -> None:
    tokenizer = get_tokenizer("gpt2")
    talk = [("user", "Hi"), ("assistant", "Hello!"), ("user", "Bye"), ("assistant", "See you.")]
    record = {"messages": [{"role": role, "content": content} for role, content in talk]}
    example = InstructionDataset([record], tokenizer)[0]
    _, targets = collate_instructions([example], mask_prompt=True)
    learnt = targets[targets != -100].tolist()
    assert tokenizer.decode(learnt) == "Hello!<|endoftext|>See you.<|endoftext|>"
    prompt = encode_prompt(record, tokenizer)
    assert prompt == example[: len(prompt)] and tokenizer.decode(example[len(prompt) :]) == "See you."


def test_padding_changes_no_loss(tiny_model64: GPTModel) -> None:
    """Compare the summed loss of a padded batch with the losses from transformers' logits for each answer alone."""
    twin = transformers_twin(tiny_model64)
    pairs = [([1, 2, 3], [4, 5]), ([6], [7, 8, 9, 10, 11, 12]), ([13, 14], [])]
    batch = [Example(p + a, [False] * len(p) + [True] * len(a)) for p, a in pairs]
    total, count = tiny_model64.token_loss(*collate_instructions(batch, END, mask_prompt=True))
    expected, n_targets = torch.zeros((), dtype=torch.float64), 0
    for p, a in pairs:
        logits = twin(torch.tensor([[*p, *a]])).logits[0, len(p) - 1 :]  # (answer and end, V)
        expected += F.cross_entropy(logits, torch.tensor([*a, END]), reduction="sum")
        n_targets += len(a) + 1
    assert int(count) == n_targets
    torch.testing.assert_close(total, expected, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("array", [np.array, torch.tensor])
def test_a_batch_may_be_an_array(array: Any) -> None:
    """The truth value of an array of several numbers raises an error, and the function once used it."""
    x, y = collate_instructions(array([[1, 2], [3, 4]]))
    assert x.tolist() == [[1, 2], [3, 4]]
    assert y.tolist() == [[2, 50256], [4, 50256]]


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"batch": []}, r"items of at least one token, got lengths \[\]"),
        ({"batch": [[1], []]}, r"items of at least one token, got lengths \[1, 0\]"),
        ({"batch": [[1]], "allowed_max_length": 0}, "allowed_max_length must be None or .* at least 1, got 0"),
        (
            {"batch": [[1]], "pad_token_id": None},
            r"the id of the end-of-text token, .* whole number of at least 0, got None",
        ),
        ({"batch": [[1]], "pad_token_id": -1}, "whole number of at least 0, got -1"),
        ({"batch": [[1]], "mask_prompt": True}, "mask_prompt needs items of an InstructionDataset, .* got a list"),
    ],
)
def test_invalid_batches_are_refused(options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        collate_instructions(**options)


# --- the data set ----------------------------------------------------------------------------------------------------


def test_examples_longer_than_the_context_are_left_out_and_counted() -> None:
    records = [{"text": "a" * n} for n in (3, 9, 4, 12, 8)]
    dataset = InstructionDataset(records, LETTERS, max_length=8)
    assert [len(example) for example in dataset] == dataset.lengths.tolist() == [3, 4, 8]
    assert dataset.n_too_long == 2
    assert dataset.describe() == (
        "3 examples with 15 tokens, the longest has 8; 2 more left out because they are longer than 8 tokens, "
        "the longest has 12"
    )
    assert InstructionDataset(records, LETTERS).describe() == "5 examples with 36 tokens, the longest has 12"


def test_too_long_raise_refuses_examples_longer_than_the_context() -> None:
    with pytest.raises(ValueError, match="record 2 has 9 tokens, more than max_length=8"):
        InstructionDataset([{"text": "a"}, {"text": "a" * 9}], LETTERS, max_length=8, too_long="raise")


def test_negative_indices_count_from_the_end_and_others_raise_index_error() -> None:
    dataset = InstructionDataset([{"text": "a"}, {"text": "bc"}], LETTERS)
    assert dataset[-1] == dataset[1] and dataset[-2] == dataset[0]
    for index in (2, -3):
        with pytest.raises(IndexError, match=f"there is no example {index} in a data set with 2 examples"):
            dataset[index]


@pytest.mark.parametrize(
    ("records", "options", "words"),
    [
        ([], {}, "no examples to learn from: 0 records, 0 too long"),
        ([{"text": "aaa"}], {"max_length": 2}, "no examples to learn from: 1 records, 1 too long"),
        ([{"text": "a"}, {"txt": "a"}], {}, "record 2: a record needs the key"),
        ([{"text": "a"}, {"text": "A"}], {}, "record 2: .*'A'"),
        ([{"text": "a"}, {"text": ""}], {}, "record 2: there is nothing to learn from, 'text' is empty"),
        ([{"text": "a"}], {"max_length": 0}, "max_length must be None or a whole number of at least 1, got 0"),
        ([{"text": "a"}], {"too_long": "cut"}, "too_long must be 'drop' or 'raise', got 'cut'"),
    ],
)
def test_records_without_examples_are_refused(records: Any, options: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        InstructionDataset(records, LETTERS, **options)


# --- batches of similar length ---------------------------------------------------------------------------------------


def dataset_of(lengths: list[int]) -> InstructionDataset:
    return InstructionDataset([{"text": "a" * length} for length in lengths], LETTERS)


@pytest.mark.slow
@settings(max_examples=100, deadline=None)
@given(
    lengths=st.lists(st.integers(1, 20), min_size=1, max_size=40),
    batch_size=st.integers(1, 7),
    pool=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_example_is_seen_once_per_epoch(lengths: list[int], batch_size: int, pool: int, epoch: int) -> None:
    sampler = LengthGroupedSampler(dataset_of(lengths), batch_size, seed=5, pool_batches=pool)
    n = sampler.batches_per_epoch
    batches = [sampler.indices(step) for step in range(epoch * n, (epoch + 1) * n)]
    assert sorted(index for batch in batches for index in batch) == list(range(len(lengths)))
    assert sum(len(batch) < batch_size for batch in batches) <= 1
    assert batches == sampler.epoch(epoch)


def test_the_examples_of_a_step_do_not_depend_on_earlier_calls() -> None:
    dataset = dataset_of([1 + i % 17 for i in range(100)])
    forward = LengthGroupedSampler(dataset, 8, seed=1, pad_token_id=END)
    backward = LengthGroupedSampler(dataset, 8, seed=1, pad_token_id=END)
    there = [forward.batch(step) for step in range(40)]
    back = [backward.batch(step) for step in reversed(range(40))][::-1]
    assert all(
        torch.equal(a, b) for one, other in zip(there, back, strict=True) for a, b in zip(one, other, strict=True)
    )


def test_epochs_and_seeds_differ_in_order() -> None:
    dataset = dataset_of([1 + i % 17 for i in range(100)])
    orders = [LengthGroupedSampler(dataset, 8, seed=seed).epoch(epoch) for seed in (1, 2) for epoch in (0, 1)]
    assert all(a != b for i, a in enumerate(orders) for b in orders[:i])


def test_batches_have_little_padding_and_come_in_random_order() -> None:
    """Plain batches of 8 with uniform lengths from 1 to 100 have 56% tokens (mean 50.5, expected maximum 89)."""
    lengths = np.random.default_rng(0).integers(1, 101, 1000)
    dataset = dataset_of(lengths.tolist())

    def share_of_tokens(pool: int) -> float:
        batches = LengthGroupedSampler(dataset, 8, pool_batches=pool).epoch(0)
        return float(lengths.sum() / sum(len(batch) * lengths[batch].max() for batch in batches))

    assert share_of_tokens(1) < 0.65 < 0.95 < share_of_tokens(50)
    longest = [int(lengths[batch].max()) for batch in LengthGroupedSampler(dataset, 8).epoch(0)]
    # In sorted order, adjacent batches would differ by 100 / 125 tokens; in random order they differ by 33 on average.
    assert np.abs(np.diff(longest)).mean() > 20


def test_an_epoch_is_a_batch_sampler_for_a_torch_dataloader() -> None:
    sampler = LengthGroupedSampler(dataset_of([3, 1, 4, 1, 5]), 2, pad_token_id=END)
    collate = partial(collate_instructions, pad_token_id=END)
    loader = DataLoader(sampler.dataset, batch_sampler=sampler.epoch(0), collate_fn=collate)
    for step, (inputs, targets) in enumerate(loader):
        assert torch.equal(inputs, sampler.batch(step)[0]) and torch.equal(targets, sampler.batch(step)[1])


@pytest.mark.parametrize("name", ["batch_size", "pool_batches"])
def test_a_sampler_with_a_size_below_1_is_refused(name: str) -> None:
    with pytest.raises(ValueError, match=f"{name} must be a whole number of at least 1, got 0"):
        LengthGroupedSampler(dataset_of([1]), **{"batch_size": 1, name: 0})
