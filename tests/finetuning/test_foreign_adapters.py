"""Adapters that PEFT saved with embeddings of another size: tokens were added to the vocabulary in training."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from MyGPT import BPETokenizer, GPTConfig, GPTModel, open_model
from MyGPT.cli import main
from MyGPT.generation import end_ids

pytestmark = [
    pytest.mark.filterwarnings("ignore:.is_gradient_checkpointing. is deprecated:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model has .tie_word_embeddings=True.:UserWarning"),
    pytest.mark.filterwarnings("ignore:Setting .save_embedding_layers. to .True.:UserWarning"),
]
IDS = torch.arange(24).reshape(2, 12)


def train_elsewhere(directory: Path, tie_weights: bool = True, rows: int | None = None, **options: Any) -> torch.Tensor:
    """Save a base model, and an adapter for it that transformers and PEFT made, with a new token that ends texts.

    The embedding gets `rows` rows; by default as many as the tokenizer has tokens. Return the logits of IDS.
    """
    torch.manual_seed(0)
    tokenizer = BPETokenizer.train("the cat sat by the fire", 260, progress=False)
    config = GPTConfig(tokenizer.n_vocab, 16, 16, 2, 1, tie_weights=tie_weights, drop_rate=0.0, qkv_bias=True)
    GPTModel(config).save_pretrained(directory / "base", tokenizer)
    model, foreign = (kind.from_pretrained(directory / "base") for kind in (AutoModelForCausalLM, AutoTokenizer))
    foreign.add_special_tokens({"eos_token": "<|im_end|>"})
    model.resize_token_embeddings(rows or len(foreign), mean_resizing=False)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True, **options)).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1 * torch.randn_like(parameter))
    adapted.save_pretrained(directory / "adapter")
    foreign.save_pretrained(directory / "adapter")
    with torch.no_grad():
        logits: torch.Tensor = adapted(IDS).logits
    return logits


@pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(
    "options",
    [{}, {"rows": 320}, {"modules_to_save": ["wte", "lm_head"]}],
    ids=["one more", "rounded up", "trained"],
)
def test_an_adapter_with_added_tokens_brings_its_vocabulary(
    options: dict[str, Any], tie_weights: bool, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = train_elsewhere(tmp_path, tie_weights, **options)
    model, tokenizer = open_model(tmp_path / "adapter", "cpu")
    torch.testing.assert_close(model(IDS), expected)
    end = tokenizer.encode("<|im_end|>")[0]
    assert end_ids(model, tokenizer)[0] == tokenizer.eot_token == end
    assert model.config.vocab_size == expected.shape[-1]

    model.save_pretrained(tmp_path / "merged", tokenizer)
    reopened = AutoModelForCausalLM.from_pretrained(tmp_path / "merged").eval()
    with torch.no_grad():
        torch.testing.assert_close(reopened(IDS).logits, expected)
    assert AutoTokenizer.from_pretrained(tmp_path / "merged").eos_token == "<|im_end|>"

    for command in (["generate", "--max_new_tokens", "2", "--prompt", "the", "--model"], ["info"]):
        assert main([*command, str(tmp_path / "adapter")]) == 0
    assert f"tokenizer.json in {tmp_path / 'adapter'}" in capsys.readouterr().out


@pytest.mark.parametrize("tie_weights", [True, False], ids=["tied", "untied"])
def test_an_adapter_with_half_of_the_embeddings_is_refused(tie_weights: bool, tmp_path: Path) -> None:
    from safetensors.torch import load_file, save_file

    train_elsewhere(tmp_path, tie_weights)
    weights = tmp_path / "adapter/adapter_model.safetensors"
    save_file({name: w for name, w in load_file(weights).items() if "lm_head" not in name}, weights)
    with pytest.raises(ValueError, match=r"transformer.wte.weight is \(261, 16\), but the model needs \(260, 16\)"):
        open_model(tmp_path / "adapter", "cpu")


def test_an_unsupported_option_is_refused_with_a_way_out(tmp_path: Path) -> None:
    train_elsewhere(tmp_path, rows=260, trainable_token_indices=[5])
    with pytest.raises(ValueError, match="the option trainable_token_indices is not supported: merge the adapter with"):
        open_model(tmp_path / "adapter", "cpu")
