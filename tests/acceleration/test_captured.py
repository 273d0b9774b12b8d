"""The step that CUDA graphs capture on a GPU, run on the CPU without capturing: it gives the model's logits."""

from __future__ import annotations

import dataclasses

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel, PromptLookup, generate
from MyGPT.acceleration.captured import CapturedModel
from MyGPT.generation import generate_stream

CONFIG = GPTConfig(
    vocab_size=67, context_length=16, emb_dim=24, n_heads=3, n_layers=3, drop_rate=0.0, tie_weights=False
)


def test_it_continues_as_the_model_does(tiny_model64: GPTModel) -> None:
    ids = torch.arange(12).reshape(3, 4) * 5
    assert torch.equal(generate(CapturedModel(tiny_model64), ids, 10), generate(tiny_model64, ids, 10))


def test_it_continues_rows_of_unequal_length_as_the_model_does(tiny_model64: GPTModel) -> None:
    ids = torch.arange(12).reshape(3, 4) * 5
    mask = torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    expected = generate(tiny_model64, ids, 10, attention_mask=mask)
    assert torch.equal(generate(CapturedModel(tiny_model64), ids, 10, attention_mask=mask), expected)


def test_its_logits_are_the_models(tiny_model64: GPTModel) -> None:
    """In float64, sums in another order differ by 1e-15 each."""
    captured, ids = CapturedModel(tiny_model64), torch.arange(14).reshape(2, 7) * 4
    cache = captured.new_cache(2, 9)
    with torch.no_grad():
        expected = tiny_model64(ids)
    assert (captured(ids[:, :3], cache=cache) - expected[:, :3]).abs().max() < 1e-12
    for t in range(3, 7):
        assert (captured(ids[:, t : t + 1], cache=cache) - expected[:, t : t + 1]).abs().max() < 1e-12
    assert cache.length == 7


@pytest.mark.slow
@settings(deadline=None, max_examples=40)
@given(st.lists(st.integers(1, 4), min_size=1, max_size=8).filter(lambda pieces: sum(pieces) <= 16), st.booleans())
@example([3, 1, 2, 1], False)
@example([1, 1, 1], False)
def test_any_pieces_give_the_logits_of_one_forward(pieces: list[int], is_padded: bool) -> None:
    model = lively_model(CONFIG).double()
    captured, n = CapturedModel(model), sum(pieces)
    ids, mask = torch.randint(67, (2, n)), torch.ones(2, n, dtype=torch.int64)
    if is_padded:
        mask[0, : n // 2] = 0
    with torch.no_grad():
        expected = model(ids, attention_mask=mask)
    cache, logits = captured.new_cache(2, n), []
    for piece in pieces:
        end = cache.length + piece
        seen = mask[:, :end] if is_padded else None
        logits.append(captured(ids[:, end - piece : end], attention_mask=seen, cache=cache))
    assert (torch.cat(logits, dim=1) - expected)[mask == 1].abs().max() < 1e-12


def test_tokens_that_are_taken_back_are_forgotten(tiny_model64: GPTModel) -> None:
    captured, ids = CapturedModel(tiny_model64), torch.arange(12).reshape(2, 6) * 5
    cache = captured.new_cache(2)
    for t in range(6):
        captured(ids[:, t : t + 1], cache=cache)
    cache.length = 2
    other = torch.cat([ids[:, :2], ids[:, :1]], dim=1)
    with torch.no_grad():
        expected = tiny_model64(other)[:, -1:]
    assert (captured(ids[:, :1], cache=cache) - expected).abs().max() < 1e-12


@pytest.mark.parametrize("n_match", [1, 2])
def test_prompt_lookup_over_it_generates_the_models_ids(n_match: int) -> None:
    """Texts of a small vocabulary repeat themselves, so that guesses are often accepted and often dropped."""
    model = lively_model(dataclasses.replace(CONFIG, vocab_size=4, context_length=40)).double()
    ids = torch.tensor([[0, 1, 2, 0, 1, 2]])
    lookup = PromptLookup(CapturedModel(model), n_match=n_match)
    for options in ({}, {"temperature": 1.0, "seed": 1}):
        assert torch.equal(generate(lookup, ids, 30, **options), generate(model, ids, 30, **options))


def test_wrong_input_is_refused_and_leaves_the_cache_as_it_was(tiny_model: GPTModel) -> None:
    captured = CapturedModel(tiny_model)
    cache = captured.new_cache(1, 3)
    captured(torch.tensor([[1, 2]]), cache=cache)
    with pytest.raises(IndexError, match="id 67 is outside the vocabulary"):
        captured(torch.tensor([[67]]), cache=cache)
    captured(torch.tensor([[3]]), cache=cache)
    with pytest.raises(ValueError, match="has 4 tokens, the cache has room for 3"):
        captured(torch.tensor([[4]]), cache=cache)
    assert cache.length == 3


def test_logits_are_not_overwritten_by_the_next_step(tiny_model: GPTModel) -> None:
    captured = CapturedModel(tiny_model)
    cache = captured.new_cache(1)
    captured(torch.tensor([[1, 2]]), cache=cache)
    logits = captured(torch.tensor([[3]]), cache=cache)
    before = logits.clone()
    captured(torch.tensor([[4]]), cache=cache)
    assert torch.equal(logits, before)


def test_past_the_context_it_goes_on_as_the_model_does(tiny_model64: GPTModel) -> None:
    ids = torch.arange(6).reshape(1, 6)
    assert torch.equal(generate(CapturedModel(tiny_model64), ids, 20), generate(tiny_model64, ids, 20))


@pytest.fixture
def short_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """Attend to a multiple of 4 cache entries, so that one generation needs several graphs."""
    monkeypatch.setattr("MyGPT.acceleration.captured.LENGTH_STEP", 4)


def test_a_cache_that_grows_in_steps_gives_the_models_ids(tiny_model64: GPTModel, short_steps: None) -> None:
    ids, mask = torch.arange(12).reshape(3, 4) * 5, torch.tensor([[0, 0, 0, 1], [0, 1, 1, 1], [1, 1, 1, 1]])
    for options in ({}, {"attention_mask": mask}):
        expected = generate(tiny_model64, ids, 12, **options)
        assert torch.equal(generate(CapturedModel(tiny_model64), ids, 12, **options), expected)


def test_it_attends_to_the_fewest_entries_that_hold_all_tokens(tiny_model: GPTModel, short_steps: None) -> None:
    captured, lengths = CapturedModel(tiny_model), []
    compute = captured._compute
    captured._compute = lambda cache, n: (lengths.append(n), compute(cache, n))  # type: ignore[method-assign,assignment]
    generate(captured, torch.tensor([[1, 2]]), 10)
    assert lengths == [4] * 2 + [8] * 4 + [12] * 3


def test_the_memory_of_a_generation_serves_the_next_one(tiny_model64: GPTModel) -> None:
    """The first generation has padding, which the second one must not inherit."""
    captured, ids, mask = CapturedModel(tiny_model64), torch.arange(8).reshape(2, 4), torch.ones(2, 4)
    mask[0, 0] = 0
    generate(captured, ids, 10, attention_mask=mask)
    memory = captured._idle
    assert memory is not None
    assert torch.equal(generate(captured, ids, 6), generate(tiny_model64, ids, 6))
    assert captured._idle is memory
    generate(captured, ids[:1], 6)
    assert captured._idle is not memory  # that was for two sequences


def test_two_generations_at_the_same_time_do_not_share_memory(tiny_model64: GPTModel) -> None:
    captured, one, other = CapturedModel(tiny_model64), torch.tensor([[1, 2]]), torch.tensor([[50, 60]])
    pairs = list(zip(generate_stream(captured, one, 9), generate_stream(captured, other, 9), strict=True))
    assert [int(first) for first, _ in pairs] == generate(tiny_model64, one, 9)[0, 2:].tolist()
    assert [int(second) for _, second in pairs] == generate(tiny_model64, other, 9)[0, 2:].tolist()


def test_a_generation_in_inference_mode_can_be_followed_by_one_outside_of_it(tiny_model64: GPTModel) -> None:
    captured, ids = CapturedModel(tiny_model64), torch.tensor([[1, 2]])
    expected = generate(tiny_model64, ids, 5)
    with torch.inference_mode():
        assert torch.equal(generate(captured, ids, 5), expected)
    assert torch.equal(generate(captured, ids, 5), expected)


def test_autocast_does_not_change_the_logits(tiny_model: GPTModel) -> None:
    captured, ids = CapturedModel(tiny_model), torch.tensor([[1, 2, 3]])
    logits = []
    for is_enabled in (False, True):
        cache = captured.new_cache(1)
        with torch.autocast("cpu", torch.bfloat16, enabled=is_enabled):
            captured(ids[:, :2], cache=cache)
            logits.append(captured(ids[:, 2:], cache=cache))
    assert torch.equal(*logits)


@pytest.mark.parametrize("assign", [False, True])
def test_new_weights_take_effect_in_the_next_generation(tiny_model64: GPTModel, assign: bool) -> None:
    other = lively_model(dataclasses.replace(CONFIG, qkv_bias=True)).double()
    with torch.no_grad():
        other.transformer.wte.weight.mul_(-1)
    captured, ids = CapturedModel(tiny_model64), torch.tensor([[1, 2]])
    generate(captured, ids, 5)
    memory = captured._idle
    tiny_model64.load_state_dict(other.state_dict(), assign=assign)
    assert torch.equal(generate(captured, ids, 9), generate(other, ids, 9))
    assert (captured._idle is memory) is not assign  # a graph would read the weights at their old addresses
