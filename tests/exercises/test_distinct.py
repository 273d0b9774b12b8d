"""On the inputs of the checks, no two common mistakes with different causes give the same numbers."""

from __future__ import annotations

from itertools import combinations

import pytest
import torch
from torch import Tensor

from MyGPT.exercises.checks import attention, block, bpe, kv_cache, lora, loss, sampling, windows
from MyGPT.exercises.comparing import Mistakes
from MyGPT.tokenizers.learning import learn_merges


def lora_mistakes() -> Mistakes:
    linear = lora.make_linear(6, 6).requires_grad_(False)
    A, B = torch.randn(6, lora.RANK), torch.randn(lora.RANK, 6)
    return lora.mistakes(linear, A, B, torch.randn(2, 3, 6))


@torch.no_grad()
def block_mistakes() -> Mistakes:
    weights = block.random_weights(block.OriginalBlock(block.C, block.H))
    return block.mistakes(weights, torch.randn(2, 5, block.C), block.H)


@torch.no_grad()
def kv_cache_mistakes() -> Mistakes:
    model = kv_cache.make_model()
    return kv_cache.mistakes(model, torch.randint(kv_cache.VOCAB, (2, 8)).split([2, 3, 2, 1], dim=1), 1)


def sampling_of(**options: float | int) -> Mistakes:
    return sampling.mistakes(sampling.random_logits(), **options)  # type: ignore[arg-type]


TEXT = list(bpe.NEW_TEXT.encode())
MERGES = learn_merges({bpe.TEXT.encode(): 1}, 12)
FOUND = {
    "bpe learning": lambda: bpe.learning_mistakes(list(bpe.TEXT.encode()), 12),
    "bpe applying": lambda: bpe.applying_mistakes(TEXT, MERGES),
    "windows": lambda: windows.mistakes(torch.randperm(23), 5, 2, 1),
    "attention": lambda: attention.mistakes(*attention.tensors(2, 3, 5, 5, 4), None),
    "attention with a cache": lambda: attention.mistakes(*attention.tensors(2, 3, 3, 7, 4), None),
    "block": block_mistakes,
    "loss": lambda: loss.mistakes(*loss.example(3, 6, 5)),
    "temperature": lambda: sampling_of(temperature=0.5),
    "top-k": lambda: sampling_of(top_k=4),
    "top-p": lambda: sampling_of(top_p=0.7),
    "all filters": lambda: sampling_of(temperature=1.7, top_k=5, top_p=0.75),
    "kv_cache": kv_cache_mistakes,
    "lora": lora_mistakes,
}
RIGHT = {
    "bpe learning": learn_merges({bpe.TEXT.encode(): 1}, 12),
    "bpe applying": bpe.apply_with_tiktoken(TEXT, MERGES),
    "attention": attention.expected_of(*attention.tensors(2, 3, 5, 5, 4), None),
    "loss": loss.expected_of(*loss.example(3, 6, 5)),
    "top-k": sampling.expected_of(sampling.random_logits(), top_k=4),
    "top-p": sampling.expected_of(sampling.random_logits(), top_p=0.7),
    "all filters": sampling.expected_of(sampling.random_logits(), temperature=1.7, top_k=5, top_p=0.75),
}
SAME_HERE = {  # These need an input that another step has, such as overlapping pairs, or more keys than queries.
    "overlap", "aligned to the first key", "it stops when the best pair occurs only once", "√T", "√S",
}  # fmt: skip


def are_equal(one: object, other: object) -> bool:
    if isinstance(one, Tensor) and isinstance(other, Tensor):
        return one.shape == other.shape and torch.allclose(
            one.float(), other.float(), rtol=1e-4, atol=1e-4, equal_nan=True
        )
    return type(one) is type(other) and one == other


@pytest.mark.parametrize("name", FOUND)
def test_different_causes_give_different_results(name: str) -> None:
    found = [
        (sentence, result) for sentence, result in FOUND[name]() if not any(part in sentence for part in SAME_HERE)
    ]
    assert len(found) >= 6
    for (one, result), (other, second) in combinations(found, 2):
        assert one == other or not are_equal(result, second), (one, other)
    if name in RIGHT:
        for sentence, result in found:
            assert not are_equal(result, RIGHT[name]), sentence
