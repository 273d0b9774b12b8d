"""Prompt lookup gives the model's own logits, with fewer forward passes where text repeats itself."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from conftest import lively_model
from MyGPT.acceleration.compiler import find_compiler
from MyGPT.acceleration.lookup import PromptLookup
from MyGPT.acceleration.step import accelerate
from MyGPT.config import GPTConfig
from MyGPT.generation import generate
from MyGPT.model import GPTModel


def make_model(vocab_size: int = 5) -> GPTModel:
    """Return a model with a small vocabulary, so that pairs of ids repeat often and continue in different ways."""
    return lively_model(
        GPTConfig(vocab_size=vocab_size, context_length=40, emb_dim=12, n_heads=2, n_layers=2, tie_weights=False)
    )


@pytest.mark.slow
@settings(deadline=None, max_examples=50)
@given(st.lists(st.integers(0, 2), min_size=1, max_size=6), st.lists(st.integers(0, 2), max_size=30), st.integers(1, 4))
def test_whatever_is_chosen_the_logits_are_the_models(prompt: list[int], chosen: list[int], n_match: int) -> None:
    model = make_model(3).double()
    lookup = PromptLookup(model, n_guesses=5, n_match=n_match)
    cache = lookup.new_cache(1, len(prompt) + len(chosen) + 1)
    ids = list(prompt)
    with torch.no_grad():
        logits = lookup(torch.tensor([ids]), cache=cache, last_only=True)
        for id_ in chosen:
            # In float64, rounding changes the logits by 1e-14; another text changes them by 1e-1.
            torch.testing.assert_close(logits, model(torch.tensor([ids]), last_only=True), atol=1e-11, rtol=0)
            ids.append(id_)
            logits = lookup(torch.tensor([[id_]]), cache=cache, last_only=True)
            assert cache.length == len(ids)


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"repetition_penalty": 1.3},
        {"temperature": 1.0, "seed": 1},
        {"temperature": 0.7, "top_k": 3, "top_p": 0.9, "seed": 2},
        {"eos_id": 3},
        {"stop": [1, 2]},
        {"context_size": 10},
        {"attention_mask": torch.tensor([[0, 0, 1, 1, 1, 1]])},
    ],
    ids=str,
)
def test_generated_ids_are_those_without_it(options: dict[str, Any]) -> None:
    # Sampled ids are equal draw by draw, so their distribution is the model's. 60 tokens exceed the context.
    model = make_model().double()
    ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for n_match in (1, 2, 3):
        lookup = PromptLookup(model, n_match=n_match)
        assert torch.equal(generate(lookup, ids, 60, **options), generate(model, ids, 60, **options))


@pytest.mark.slow
@pytest.mark.skipif(find_compiler() is None, reason="no C++ compiler")
@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_an_accelerated_model_gives_the_same_ids_to_the_last_bit(precision: Any) -> None:
    fast = accelerate(make_model(), precision, compiled=True)
    ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    for options in ({}, {"temperature": 1.0, "seed": 4}):
        assert torch.equal(
            generate(PromptLookup(fast, n_match=1), ids, 30, **options), generate(fast, ids, 30, **options)
        )


class Counting(torch.nn.Module):
    """A model that always predicts the next number and counts its forward passes."""

    def __init__(self, model: GPTModel) -> None:
        super().__init__()
        self.model, self.config, self.n_calls = model, model.config, 0

    def new_cache(self, *arguments: Any) -> Any:
        return self.model.new_cache(*arguments)

    def forward(self, input_ids: torch.Tensor, **keywords: Any) -> torch.Tensor:
        self.n_calls += 1
        logits = self.model(input_ids, **keywords)
        ids = input_ids[:, -logits.shape[1] :]
        return torch.nn.functional.one_hot((ids + 1) % self.config.vocab_size, self.config.vocab_size).float()


def test_repeated_text_takes_a_pass_for_every_eight_tokens() -> None:
    model = Counting(make_model())
    ids = torch.tensor([[0, 1, 2, 3, 4, 0, 1, 2]])
    out = generate(PromptLookup(model), ids, 32)
    assert out[0].tolist() == [i % 5 for i in range(40)]
    # The prompt gives one token, and each further pass gives eight.
    assert model.n_calls == 1 + -(-31 // 8)


def test_text_that_does_not_repeat_takes_a_pass_for_every_token() -> None:
    model = Counting(make_model(40))
    generate(PromptLookup(model), torch.tensor([[0]]), 30)
    assert model.n_calls == 30


def test_a_batch_goes_to_the_model_as_it_is() -> None:
    model = make_model().double()
    ids = torch.tensor([[0, 1, 2, 0, 1, 2], [3, 3, 3, 3, 3, 3]])
    assert torch.equal(generate(PromptLookup(model), ids, 20), generate(model, ids, 20))
    assert torch.equal(generate(PromptLookup(model), ids[:1], 20, use_cache=False), generate(model, ids[:1], 20))


@pytest.mark.parametrize("wrong", [{"n_guesses": 0}, {"n_match": 0}, {"n_match": 1.5}])
def test_wrong_numbers_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"{next(iter(wrong))} must be a whole number of at least 1"):
        PromptLookup(make_model(), **wrong)
