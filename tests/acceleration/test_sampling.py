"""The choice of tokens in C++, compared with MyGPT.sampling and torch.multinomial: equal tokens and equal generator states."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch

from conftest import lively_model
from MyGPT import GPTConfig, SamplingConfig, accelerate, generate
from MyGPT.acceleration import kernel as c
from MyGPT.acceleration.sampling import pick_next
from MyGPT.sampling import pick_next as expected_next
from MyGPT.sampling import seeded_generators

OPTIONS = [
    SamplingConfig(),
    SamplingConfig(repetition_penalty=1.5),
    SamplingConfig(1.0),
    SamplingConfig(0.7, top_k=5),
    SamplingConfig(1.0, top_k=700),
    SamplingConfig(1.0, top_p=0.9),
    SamplingConfig(1.3, top_p=1e-9),
    SamplingConfig(1.0, min_p=0.1),
    SamplingConfig(0.9, 40, 0.8, 0.05, 1.2),
    SamplingConfig(1.0, top_k=1, top_p=0.5),
    SamplingConfig(1e30, top_p=0.5),
    SamplingConfig(1e-30),
]


@pytest.fixture(scope="module")
def kernel() -> c.Kernel:
    kernel = c.Build().wait()
    assert kernel.draws_as_torch  # otherwise every test here would compare MyGPT.sampling with itself
    return kernel


@pytest.mark.parametrize("config", OPTIONS, ids=str)
@pytest.mark.parametrize("V", [1, 12, 313, 3000])
def test_the_tokens_and_the_generators_are_those_of_the_python_filters(
    V: int, config: SamplingConfig, kernel: c.Kernel
) -> None:
    """Sums of float32 differ by rounding, so a token may differ about once in a million draws. Here are 192 draws."""
    source = torch.Generator().manual_seed(3)
    for draw in range(2):
        logits = torch.randn(2, V, generator=source) * 3
        if draw == 1:
            logits = logits.round()  # ties
            logits[:, 1::3] = -math.inf
        seen = torch.rand(2, V, generator=source) < 0.2
        for generators in (lambda: torch.Generator().manual_seed(9), lambda: seeded_generators(9, 2)):
            ours, theirs = generators(), generators()
            assert torch.equal(
                pick_next(kernel, logits, config, ours, seen), expected_next(logits, config, theirs, seen)
            )
            for one, other in zip(_as_list(ours), _as_list(theirs), strict=True):
                assert torch.equal(one.get_state(), other.get_state())


def _as_list(generators: Any) -> list[torch.Generator]:
    return [generators] if isinstance(generators, torch.Generator) else generators


def test_the_draws_are_those_of_torchs_multinomial(kernel: c.Kernel) -> None:
    logits = torch.randn(3, 500, generator=torch.Generator().manual_seed(1))
    torch.manual_seed(5)
    expected = [torch.multinomial(logits.softmax(-1), 1)[:, 0] for _ in range(10)]
    torch.manual_seed(5)
    assert torch.equal(
        torch.stack([pick_next(kernel, logits, SamplingConfig(1.0)) for _ in range(10)]), torch.stack(expected)
    )


@pytest.mark.parametrize("config", [SamplingConfig(), SamplingConfig(1.0, top_p=0.5)])
@pytest.mark.parametrize("wrong", [math.nan, math.inf])
def test_logits_that_are_not_finite_raise_an_error_and_draw_nothing(
    wrong: float, config: SamplingConfig, kernel: c.Kernel
) -> None:
    logits = torch.zeros(2, 40)
    logits[1, 17] = wrong
    generator = torch.Generator().manual_seed(1)
    with pytest.raises(FloatingPointError, match=f"a logit of the model is {wrong}"):
        pick_next(kernel, logits, config, generator)
    assert torch.equal(generator.get_state(), torch.Generator().manual_seed(1).get_state())


def test_other_logits_and_repeated_generators_are_left_to_the_python_filters(kernel: c.Kernel) -> None:
    config = SamplingConfig(1.0)

    def repeated() -> list[torch.Generator]:
        return [torch.Generator().manual_seed(1)] * 3

    for logits in (torch.zeros(9, 3).T, torch.zeros(3, 9), torch.zeros(3, 9, dtype=torch.float64)):
        assert torch.equal(pick_next(kernel, logits, config, repeated()), expected_next(logits, config, repeated()))


def test_an_accelerated_model_samples_the_text_that_it_samples_without_a_compiler() -> None:
    model = lively_model(GPTConfig(vocab_size=61, context_length=32, emb_dim=24, n_heads=2, n_layers=2))
    ids = torch.randint(0, 61, (2, 5), generator=torch.Generator().manual_seed(1))
    options: dict[str, Any] = {"temperature": 0.9, "top_k": 20, "top_p": 0.95, "repetition_penalty": 1.2, "seed": 3}
    texts = [generate(accelerate(model, compiled=compiled), ids, 20, **options) for compiled in (True, False)]
    assert torch.equal(*texts)
