"""The filters, compared with the logits processors of transformers, and the choice of tokens, compared with the probabilities."""

from __future__ import annotations

import math
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import example, given, settings
from torch import Tensor
from transformers import GenerationConfig
from transformers.generation.logits_process import (
    MinPLogitsWarper,
    RepetitionPenaltyLogitsProcessor,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from conftest import lively_model
from MyGPT import GPTConfig, SamplingConfig
from MyGPT.sampling import filter_logits, keep_min_p, keep_top_k, keep_top_p, penalize_repetition, pick_next
from oracles_model import chi_square_odds, naive_distribution, transformers_twin

V = 12
one_logit = st.one_of(
    st.sampled_from([-2.0, -1.0, 0.0, 1.0, 2.0]),  # ties
    st.floats(-40, 40, width=32),
    st.just(-math.inf),
)
rows = st.lists(
    st.lists(one_logit, min_size=V, max_size=V).filter(lambda row: max(row) > -math.inf), min_size=1, max_size=3
)
logits_of_any_kind = rows.map(torch.tensor)
NO_IDS = torch.zeros(1, 0, dtype=torch.int64)
bounded = settings(deadline=None, max_examples=60)


# The float32 results must be equal, because the filters compute the same steps in the same order as transformers.
@pytest.mark.slow
@given(logits_of_any_kind, st.integers(1, V + 3))
@bounded
def test_top_k_keeps_what_transformers_keeps(logits: Tensor, k: int) -> None:
    assert torch.equal(keep_top_k(logits, k), TopKLogitsWarper(k)(NO_IDS, logits))


@pytest.mark.slow
@given(logits_of_any_kind, st.floats(0, 1, exclude_min=True))
@example(torch.zeros(1, 4), 0.5)  # exactly on the boundary: two of four equal tokens
@bounded
def test_top_p_keeps_what_transformers_keeps(logits: Tensor, p: float) -> None:
    assert torch.equal(keep_top_p(logits, p), TopPLogitsWarper(p)(NO_IDS, logits))


@pytest.mark.slow
@given(logits_of_any_kind, st.floats(0, 1))
@bounded
def test_min_p_keeps_what_transformers_keeps(logits: Tensor, p: float) -> None:
    assert torch.equal(keep_min_p(logits, p), MinPLogitsWarper(p)(NO_IDS, logits))


@pytest.mark.slow
@given(logits_of_any_kind, st.floats(0.01, 10), st.data())
@bounded
def test_the_repetition_penalty_is_that_of_transformers(logits: Tensor, penalty: float, data: st.DataObject) -> None:
    length = data.draw(st.integers(1, 5))
    ids = torch.tensor([data.draw(st.lists(st.integers(0, V - 1), min_size=length, max_size=length)) for _ in logits])
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, ids, True)
    expected = RepetitionPenaltyLogitsProcessor(penalty)(ids, logits)
    assert torch.equal(penalize_repetition(logits, seen, penalty), expected)


@pytest.mark.slow
@given(logits_of_any_kind, st.floats(0.01, 100))
@bounded
def test_temperature_is_that_of_transformers(logits: Tensor, temperature: float) -> None:
    ours = filter_logits(logits, SamplingConfig(temperature))
    assert torch.equal(ours, TemperatureLogitsWarper(temperature)(NO_IDS, logits))


options = {
    "temperature": st.floats(0.1, 5),
    "top_k": st.none() | st.integers(1, V),
    "top_p": st.none() | st.floats(0.05, 0.99),
    "min_p": st.none() | st.floats(0, 1),
    "repetition_penalty": st.none() | st.floats(0.5, 2),
}
TWIN = transformers_twin(lively_model(GPTConfig(vocab_size=V, context_length=8, emb_dim=4, n_heads=1, n_layers=1)))


@pytest.mark.slow
@given(logits_of_any_kind, st.fixed_dictionaries(options), st.integers(0, V - 1))
@bounded
def test_all_filters_together_are_those_of_transformers_in_its_order(
    logits: Tensor, chosen: dict[str, Any], id_: int
) -> None:
    ids = torch.full((len(logits), 1), id_)
    theirs = GenerationConfig(do_sample=True, **{"top_k": 0, **{k: v for k, v in chosen.items() if v is not None}})
    expected = TWIN._get_logits_processor(theirs, input_ids_seq_length=1)(ids, logits)
    seen = torch.zeros(logits.shape, dtype=torch.bool).scatter(1, ids, True)
    assert torch.equal(filter_logits(logits, SamplingConfig(**chosen), seen), expected)


@pytest.mark.slow
@given(st.integers(0, 10_000), st.fixed_dictionaries(options), st.sets(st.integers(0, V - 1)))
@bounded
def test_what_is_left_has_the_probabilities_that_the_papers_say(
    seed: int, chosen: dict[str, Any], seen_ids: set[int]
) -> None:
    logits = torch.randn(1, V, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)) * 3
    seen = torch.tensor([[i in seen_ids for i in range(V)]])
    ours = filter_logits(logits, SamplingConfig(**chosen), seen).softmax(-1)[0]
    expected = naive_distribution(logits[0].tolist(), seen_ids, **chosen)
    assert ours.tolist() == pytest.approx(expected, abs=1e-12)


@pytest.mark.slow
@pytest.mark.parametrize("by_row", [False, True])
@pytest.mark.parametrize(
    "chosen",
    [
        {"temperature": 1.0},
        {"temperature": 0.5},
        {"temperature": 2.0, "top_k": 5},
        {"temperature": 1.0, "top_p": 0.8},
        {"temperature": 1.3, "top_k": 9, "min_p": 0.1},
    ],
)
def test_tokens_are_picked_as_often_as_they_are_probable(chosen: dict[str, Any], by_row: bool) -> None:
    """With the right probabilities, the statistic of 40,000 draws is this large once in a million runs."""
    n = 40_000
    logits = torch.randn(V, generator=torch.Generator().manual_seed(5)) * 1.5
    generator = torch.Generator().manual_seed(6)
    picked = pick_next(logits.expand(n, V), SamplingConfig(**chosen), [generator] * n if by_row else generator)
    everything = {"top_k": None, "top_p": None, "min_p": None, "repetition_penalty": None, **chosen}
    expected = torch.tensor(naive_distribution(logits.tolist(), set(), **everything), dtype=torch.float64)
    counts = picked.bincount(minlength=V)
    assert not counts[expected == 0].any()
    assert chi_square_odds(counts, expected) > 1e-6


def test_rows_are_picked_independently() -> None:
    """Fair draws of two equal rows agree in half of 4,000 cases, within 6 standard deviations of 32."""
    pairs = torch.zeros(8000, 2)
    picked = pick_next(pairs, SamplingConfig(1.0), torch.Generator().manual_seed(1)).view(4000, 2)
    agree = int((picked[:, 0] == picked[:, 1]).sum())
    assert abs(agree - 2000) < 6 * 32


@given(logits_of_any_kind, st.floats(0, exclude_min=True, allow_infinity=False))
@bounded
def test_any_temperature_above_zero_picks_a_possible_token(logits: Tensor, temperature: float) -> None:
    """Temperatures outside the range of float32, such as 1e-40 and 1e39, once gave infinite or NaN quotients."""
    picked = pick_next(logits, SamplingConfig(temperature))
    assert logits.gather(1, picked[:, None]).isfinite().all()


@pytest.mark.parametrize("temperature", [1e-4, 1e-40, 5e-324])
def test_a_temperature_near_zero_is_greedy(temperature: float) -> None:
    logits = torch.arange(V).float().roll(5).expand(100, V)
    assert torch.equal(pick_next(logits, SamplingConfig(temperature)), logits.argmax(-1))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_a_pick_is_int64_whatever_the_logits_are(dtype: torch.dtype, temperature: float) -> None:
    picked = pick_next(torch.randn(3, V).to(dtype), SamplingConfig(temperature, top_k=4, top_p=0.9))
    assert picked.dtype == torch.int64 and picked.shape == (3,)


def test_greedy_heeds_the_repetition_penalty_and_nothing_else() -> None:
    logits = torch.tensor([[3.0, 2.0, -1.0]])
    config = SamplingConfig(0.0, top_k=1, top_p=0.1, repetition_penalty=2.0)
    assert pick_next(logits, config).item() == 0
    assert pick_next(logits, config, seen=torch.tensor([[True, False, False]])).item() == 1


def test_filters_leave_their_input_as_it_was() -> None:
    logits = torch.randn(2, V)
    before = logits.clone()
    filter_logits(logits, SamplingConfig(0.5, 3, 0.5, 0.5, 1.5), torch.ones(2, V, dtype=torch.bool))
    assert torch.equal(logits, before)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("temperature", value) for value in (-0.1, math.nan, math.inf, -math.inf, "hot", None, True)),
        *(("top_k", value) for value in (0, -1, 2.5, 2.0, True, "3")),
        *(("top_p", value) for value in (0, 0.0, -0.1, 1.1, math.nan, "0.9", True)),
        *(("min_p", value) for value in (-0.1, 1.1, math.nan, "0.9", False)),
        *(("repetition_penalty", value) for value in (0, 0.0, -1.0, math.nan, math.inf, "2", True)),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_name_and_itself(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be .*got {value!r}"):
        SamplingConfig(**{name: value})


@pytest.mark.parametrize(
    ("name", "value"),
    [("temperature", 0), ("temperature", 3), ("top_k", 1), ("top_p", 1), ("min_p", 0), ("repetition_penalty", 1)],
)
def test_the_ends_of_the_ranges_and_whole_numbers_are_allowed(name: str, value: Any) -> None:
    assert getattr(SamplingConfig(**{name: value}), name) == value


@pytest.mark.parametrize("penalty", [1e-300, 1e-30, 1e30, 1e300])
@pytest.mark.parametrize("temperature", [1e-300, 1.0, 1e300])
def test_an_extreme_penalty_leaves_probabilities_finite(penalty: float, temperature: float) -> None:
    logits, seen = torch.tensor([[0.0, 3.0, -2.0, -torch.inf]]), torch.tensor([[True, True, True, True]])
    config = SamplingConfig(temperature=temperature, repetition_penalty=penalty)
    probabilities = filter_logits(logits, config, seen).softmax(-1)
    assert probabilities.isfinite().all() and probabilities[0, 3] == 0
