"""The step that is captured on a GPU, run without being captured: the same logits as the model's own."""

from __future__ import annotations

import torch

from MyGPT import GPTModel, generate
from MyGPT.acceleration.captured import CapturedModel


def test_it_continues_as_the_model_does(tiny_model64: GPTModel) -> None:
    ids = torch.arange(12).reshape(3, 4) * 5
    assert torch.equal(generate(CapturedModel(tiny_model64), ids, 10), generate(tiny_model64, ids, 10))


def test_it_continues_rows_of_unequal_length_as_the_model_does(tiny_model64: GPTModel) -> None:
    ids = torch.arange(12).reshape(3, 4) * 5
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    expected = generate(tiny_model64, ids, 10, attention_mask=mask)
    assert torch.equal(generate(CapturedModel(tiny_model64), ids, 10, attention_mask=mask), expected)


def test_its_logits_are_the_models(tiny_model64: GPTModel) -> None:
    """float64: sums over masked zeros are taken in another order, 1e-15 each."""
    captured, ids = CapturedModel(tiny_model64), torch.arange(14).reshape(2, 7) * 4
    cache = captured.new_cache(2, 9)
    with torch.no_grad():
        expected = tiny_model64(ids)
    assert (captured(ids[:, :3], cache=cache) - expected[:, :3]).abs().max() < 1e-12
    for t in range(3, 7):
        assert (captured(ids[:, t : t + 1], cache=cache) - expected[:, t : t + 1]).abs().max() < 1e-12
    assert cache.length == 7


def test_past_the_context_it_goes_on_as_the_model_does(tiny_model64: GPTModel) -> None:
    ids = torch.arange(6).reshape(1, 6)
    assert torch.equal(generate(CapturedModel(tiny_model64), ids, 20), generate(tiny_model64, ids, 20))
