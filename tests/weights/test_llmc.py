"""llm.c's checkpoints, written by our own copy of its order, open as the model that was written."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest
import torch

from conftest import lively_model, same_weights
from MyGPT import GPTConfig, GPTModel, open_model
from oracles_layouts import write_llmc

CONFIG = GPTConfig(vocab_size=130, context_length=12, emb_dim=24, n_heads=3, n_layers=2, qkv_bias=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_checkpoint_opens_without_the_padding(dtype: torch.dtype, tmp_path: Path) -> None:
    model = lively_model(CONFIG)
    write_llmc(tmp_path / "model.bin", model, dtype)
    opened = GPTModel.from_pretrained(tmp_path / "model.bin")
    assert opened.config == CONFIG
    assert same_weights(opened, model.to(dtype))


def test_damaged_files_are_one_sentence(tmp_path: Path) -> None:
    path = tmp_path / "model.bin"
    write_llmc(path, lively_model(CONFIG), torch.float32)
    whole = path.read_bytes()
    for data, words in (
        (whole[:500], "it has 500 bytes, fewer than its header"),
        (whole[:-4], f"it has {len(whole) - 4:,} bytes, expected {len(whole):,}"),
        (whole[:4] + struct.pack("<i", 1) + whole[8:], "it has the version 1, MyGPT reads 3 and 5"),
        (whole[:12] + struct.pack("<i", -1) + whole[16:], "vocab_size must be a whole number of at least 1, got -1"),
        (whole[:28] + struct.pack("<i", 7) + whole[32:], "its token embedding has 7 rows for 130 tokens"),
    ):
        path.write_bytes(data)
        with pytest.raises(ValueError, match=f"model.bin is not a valid checkpoint of llm.c: {words}"):
            GPTModel.from_pretrained(path)


@pytest.mark.slow
def test_llm_cs_file_of_gpt2s_vocabulary_is_not_an_obstacle(tmp_path: Path) -> None:
    """llm.c writes GPT-2's vocabulary beside the model, without the merges."""
    config = GPTConfig(vocab_size=50257, context_length=8, emb_dim=8, n_heads=1, n_layers=1, qkv_bias=True)
    write_llmc(tmp_path / "gpt2_124M.bin", GPTModel(config), torch.bfloat16)
    (tmp_path / "gpt2_tokenizer.bin").write_bytes(struct.pack("<256i", 20240328, 2, 50257, 50256, *[0] * 252))
    tokenizer = open_model(tmp_path / "gpt2_124M.bin", device="cpu")[1]
    assert tokenizer.is_assumed
    assert tokenizer.encode(" the") == [262]
