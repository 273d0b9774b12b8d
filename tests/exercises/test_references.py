"""The results that the checks expect are those of transformers and PEFT."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from MyGPT.exercises.checks import block, lora, sampling

TASKS_WITH_FILTERS = [
    {"temperature": 0.5}, {"top_k": 4}, {"top_p": 0.7}, {"temperature": 1.7, "top_k": 5, "top_p": 0.75}, {"top_p": 0.001},
]  # fmt: skip


@pytest.mark.slow
@torch.no_grad()
def test_the_expected_block_is_that_of_transformers() -> None:
    from transformers import GPT2Config
    from transformers.models.gpt2.modeling_gpt2 import GPT2Block

    config = GPT2Config(
        n_embd=block.C, n_head=block.H, n_inner=None, n_layer=1, n_positions=5, attn_implementation="sdpa"
    )
    theirs = GPT2Block(config, layer_idx=0).eval()
    weights = block.random_weights(block.OriginalBlock(block.C, block.H))
    state = {}
    for name, weight in weights.items():
        layer, _, part = name.partition(".")
        matrix = weight.T if weight.dim() == 2 else weight  # transformers stores the linear layers transposed
        state[f"{block.LIBRARY_NAMES.get(layer, layer)}.{part}"] = matrix
    theirs.load_state_dict(state)
    x = torch.randn(2, 5, block.C)
    mask = torch.zeros(5, 5).masked_fill(torch.ones(5, 5, dtype=torch.bool).triu(1), float("-inf"))
    output = theirs(x, attention_mask=mask[None, None])
    output = output[0] if isinstance(output, tuple) else output
    torch.testing.assert_close(block.expected_output(weights, x, block.C, block.H), output, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(block.block_output(weights, x, block.H), output, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("options", TASKS_WITH_FILTERS)
def test_the_expected_probabilities_are_those_of_transformers(options: dict[str, float]) -> None:
    from transformers import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

    logits = sampling.random_logits()
    filtered = logits
    for name, warper in (
        ("temperature", TemperatureLogitsWarper),
        ("top_k", TopKLogitsWarper),
        ("top_p", TopPLogitsWarper),
    ):
        if name in options:
            filtered = warper(options[name])(None, filtered)
    torch.testing.assert_close(sampling.expected_of(logits, **options), filtered.softmax(-1))  # type: ignore[arg-type]


@pytest.mark.slow
@torch.no_grad()
def test_the_expected_lora_layer_is_that_of_peft() -> None:
    from peft import LoraConfig, get_peft_model

    linear = lora.make_linear(5, 7)
    A, B, x = torch.randn(5, lora.RANK), torch.randn(lora.RANK, 7), torch.randn(4, 5)
    expected = lora.full_output(linear, A, B, x)
    theirs = get_peft_model(
        nn.Sequential(linear), LoraConfig(r=lora.RANK, lora_alpha=int(lora.ALPHA), target_modules=["0"])
    )
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.copy_((A if "lora_A" in name else B).T)
    torch.testing.assert_close(theirs(x), expected)
