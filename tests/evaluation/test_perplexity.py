"""Test losses of whole texts against one forward pass per target, the loop of transformers, and results by hand."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel
from MyGPT.data.tokens import compact_ids
from MyGPT.evaluation.perplexity import Result, continuation_logits, documents_loss, strided_loss
from oracles_model import transformers_twin

L = 16  # the context of the tiny model


def some_ids(n: int, vocab_size: int = 67) -> list[int]:
    return torch.randint(vocab_size, (n,), generator=torch.Generator().manual_seed(n)).tolist()


def nats_of(model: GPTModel, context: list[int], target: int) -> float:
    with torch.no_grad():
        return -model(torch.tensor([context]))[0, -1].log_softmax(0)[target].item()


def naive_loss(model: GPTModel, ids: list[int], length: int, stride: int) -> float:
    """Sum the loss over one forward pass per target, whose context begins with the window of the target."""
    total = 0.0
    last = len(ids) - 1
    for t in range(1, last + 1):
        n_strides = max(0, math.ceil((t - length) / stride))  # windows after the first one
        end = min(length + n_strides * stride, last)
        total += nats_of(model, ids[max(0, end - length) : t], ids[t])
    return total


@pytest.mark.parametrize("stride", [1, 3, 8, 15, 16, None])
@pytest.mark.parametrize("n", [2, 9, 16, 17, 18, 50])
def test_every_target_is_scored_once_with_the_context_of_its_window(
    n: int, stride: int | None, tiny_model64: Any
) -> None:
    ids = some_ids(n)
    result = strided_loss(tiny_model64, ids, stride)
    assert result.n_tokens == n - 1
    assert result.total_nats == pytest.approx(naive_loss(tiny_model64, ids, L, stride or L), rel=1e-12)


@pytest.mark.parametrize("max_length", [1, 5, 16])
def test_windows_can_be_shorter_than_the_context(max_length: int, tiny_model64: Any) -> None:
    ids = some_ids(40)
    expected = naive_loss(tiny_model64, ids, max_length, max_length)
    assert strided_loss(tiny_model64, ids, max_length=max_length).total_nats == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("n", [1, 15, 16, 40])
def test_a_bos_token_makes_the_first_token_a_target(n: int, tiny_model64: Any) -> None:
    ids = some_ids(n)
    result = strided_loss(tiny_model64, ids, 5, bos_id=66)
    assert result.n_tokens == n
    assert result.total_nats == pytest.approx(naive_loss(tiny_model64, [66, *ids], L, 5), rel=1e-12)


@pytest.mark.parametrize("batch_size", [2, 3, 8, 1000])
@pytest.mark.parametrize("stride", [4, 16])
def test_the_batch_size_does_not_change_the_loss(stride: int, batch_size: int, tiny_model64: Any) -> None:
    ids = some_ids(61)
    alone = strided_loss(tiny_model64, ids, stride, batch_size=1)
    together = strided_loss(tiny_model64, ids, stride, batch_size=batch_size)
    assert together.n_tokens == alone.n_tokens
    assert together.total_nats == pytest.approx(alone.total_nats, rel=1e-12)


def guide_loss(twin: Any, ids: list[int], max_length: int, stride: int) -> tuple[float, int]:
    """Run the loop of transformers' guide "Perplexity of fixed-length models", in which the model shifts the labels."""
    total, count, previous_end = 0.0, 0, 0
    for begin in range(0, len(ids), stride):
        end = min(begin + max_length, len(ids))
        input_ids = torch.tensor([ids[begin:end]])
        labels = input_ids.clone()
        labels[:, : previous_end - end if begin else 0] = -100
        with torch.no_grad():
            logits = twin(input_ids).logits  # the loss of transformers would be in float32
        total += F.cross_entropy(logits[0, :-1], labels[0, 1:], reduction="sum").item()
        count, previous_end = count + int((labels[:, 1:] != -100).sum()), end
        if end == len(ids):
            break
    return total, count


@pytest.mark.parametrize(("max_length", "stride"), [(16, 1), (16, 5), (16, 15), (9, 4)])
def test_loss_equals_the_guide_of_transformers_with_one_more_token_per_window(
    max_length: int, stride: int, tiny_model64: Any
) -> None:
    """The windows of the guide include their last target. The text length fits the windows, because the guide's last window
    would otherwise have less context than ours."""
    ids = some_ids(max_length + 4 * stride)
    total, count = guide_loss(transformers_twin(tiny_model64), ids, max_length, stride)
    result = strided_loss(tiny_model64, ids, stride, max_length=max_length - 1)
    assert result.n_tokens == count == len(ids) - 1
    assert result.total_nats == pytest.approx(total, rel=1e-12)


def test_texts_are_not_context_of_each_other(tiny_model64: Any) -> None:
    texts = [some_ids(n) for n in (40, 1, 7, 16, 2)]
    together = documents_loss(tiny_model64, texts, 6, bos_id=3, batch_size=4)
    alone = [strided_loss(tiny_model64, ids, 6, bos_id=3) for ids in texts]
    assert together.n_tokens == sum(result.n_tokens for result in alone) == 66
    assert together.total_nats == pytest.approx(math.fsum(result.total_nats for result in alone), rel=1e-12)


@pytest.mark.parametrize("kind", ["list", "array", "tensor", "memory map"])
def test_ids_can_be_any_sequence(kind: str, tiny_model64: Any, tmp_path: Path) -> None:
    ids = some_ids(30)
    np.array(ids, dtype="<u2").tofile(tmp_path / "tokens.bin")
    given: Any = {
        "list": ids,
        "array": compact_ids(ids),
        "tensor": torch.tensor(ids),
        "memory map": np.memmap(tmp_path / "tokens.bin", dtype="<u2", mode="r"),
    }[kind]
    assert strided_loss(tiny_model64, given) == strided_loss(tiny_model64, ids)


def test_evaluation_disables_dropout_and_keeps_the_mode_and_gradients() -> None:
    config = GPTConfig(vocab_size=11, context_length=8, emb_dim=8, n_heads=2, n_layers=2, drop_rate=0.5)
    model = lively_model(config).train()
    model.transformer.h[0].eval()
    ids = some_ids(20, 11)
    assert strided_loss(model, ids) == strided_loss(model, ids)
    assert model.training and not model.transformer.h[0].training
    assert all(parameter.grad is None for parameter in model.parameters())


def test_batch_sums_are_added_in_float64(tiny_model: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Above 2^25 float32 has only even numbers, so adding 1 repeatedly would change nothing."""
    sums = iter([2.0**25, *[1.0] * 9])
    monkeypatch.setattr(
        tiny_model, "token_loss", lambda _, targets: (torch.tensor(next(sums)), (targets != -100).sum())
    )
    assert strided_loss(tiny_model, some_ids(161), batch_size=1) == Result(2.0**25 + 9, 160)


def test_results_equal_a_calculation_by_hand() -> None:
    """Four tokens of probability 1/8 cost 12 bits; the text has 6 bytes and 2 words."""
    result = Result(4 * math.log(8), 4)
    assert result.loss == pytest.approx(math.log(8))
    assert result.perplexity == pytest.approx(8)
    assert result.bits_per_byte(6) == pytest.approx(2)
    assert result.word_perplexity(2) == pytest.approx(64)
    assert Result(1e6, 4).word_perplexity(1) == math.inf


def test_the_perplexity_of_a_uniform_model_is_its_vocabulary_size() -> None:
    model = GPTModel(GPTConfig(vocab_size=32, context_length=8, emb_dim=8, n_heads=2, n_layers=1))
    torch.nn.init.zeros_(model.lm_head.weight)
    result = strided_loss(model, some_ids(100, 32), 3)
    assert result.perplexity == pytest.approx(32, rel=1e-6)
    assert result.bits_per_byte(99) == pytest.approx(5, rel=1e-6)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"stride": 0}, "stride must be a whole number from 1 to 16, the length of a window, got 0"),
        ({"stride": 17}, "from 1 to 16, the length of a window, got 17"),
        ({"stride": 6, "max_length": 5}, "from 1 to 5, the length of a window, got 6"),
        ({"stride": 1.5}, "got 1.5"),
        ({"max_length": 17}, "max_length must be a whole number from 1 to 16, the model's context, got 17"),
        ({"max_length": 0}, "got 0"),
        ({"batch_size": 0}, "batch_size must be a whole number of at least 1, got 0"),
        ({"bos_id": 67}, "bos_id must be an id of the vocabulary, 0 to 66, got 67"),
        ({"ids": []}, "a text needs at least 2 tokens, or 1 after a bos_id, got 0"),
        ({"ids": [5]}, "a text needs at least 2 tokens, or 1 after a bos_id, got 1"),
        ({"ids": [], "bos_id": 1}, "a text needs at least 1 token, got 0"),
        ({"ids": [1, 67]}, "the text has the id 67, the model's ids are 0 to 66"),
        ({"ids": [1, -1]}, "token ids must be from 0"),
    ],
)
def test_invalid_arguments_raise_an_error(options: dict[str, Any], message: str, tiny_model: Any) -> None:
    with pytest.raises(ValueError, match=message):
        strided_loss(tiny_model, **{"ids": some_ids(30), **options})


@pytest.mark.parametrize("batch_size", [1, 3])
def test_continuation_logits_equal_those_of_each_pair_alone(batch_size: int, tiny_model64: Any) -> None:
    pairs = [(some_ids(n), some_ids(m)) for n, m in ((3, 1), (10, 4), (16, 2), (40, 16), (1, 1))]
    for (context, rest), logits in zip(pairs, continuation_logits(tiny_model64, pairs, batch_size), strict=True):
        seen = [*context, *rest][-L - 1 :]
        for i, target in enumerate(rest):
            expected = nats_of(tiny_model64, seen[: len(seen) - len(rest) + i], target)
            assert -logits[i].log_softmax(0)[target].item() == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("pair", [([], [1]), ([1], []), ([1], [1] * 17)])
def test_empty_or_too_long_continuations_raise_an_error(pair: Any, tiny_model: Any) -> None:
    with pytest.raises(ValueError, match="a context needs at least 1 token and a continuation 1 to 16"):
        list(continuation_logits(tiny_model, [pair]))


def test_the_caller_keeps_its_gradient_mode_and_train_mode_between_two_results(tiny_model: Any) -> None:
    """A caller that trains on each result must not find gradients off and dropout disabled."""
    tiny_model.train()
    results = continuation_logits(tiny_model, [([1, 2], [3]), ([4], [5, 6])], batch_size=1)
    for n_targets, logits in zip((1, 2), results, strict=True):
        assert torch.is_grad_enabled()
        assert all(module.training for module in tiny_model.modules())
        assert logits.shape == (n_targets, 67) and not logits.requires_grad
