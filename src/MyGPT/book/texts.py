"""Chapters 2, 4, 5 and 7: text to ids, ids to batches, and ids to more ids and back to text."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from MyGPT.data import instructions, templates
from MyGPT.data.records import Record
from MyGPT.data.windows import Batch, GPTDataset, create_dataloader
from MyGPT.generation import generate
from MyGPT.loss import IGNORED
from MyGPT.tokenizers import SimpleTokenizer, get_tokenizer
from MyGPT.tokenizers.base import encode_with_specials

# The two differ in what their vocabulary holds: with <|unk|> in it, an unknown word is that, without it an error.
SimpleTokenizerV1 = SimpleTokenizer
SimpleTokenizerV2 = SimpleTokenizer


class GPTDatasetV1(GPTDataset):
    """Windows of max_length ids, `stride` apart, and the same shifted by one, each (max_length,) int64."""

    def __init__(self, txt: str, tokenizer: Any, max_length: int, stride: int) -> None:
        super().__init__(txt, tokenizer, max_length, stride)


def create_dataloader_v1(
    txt: str,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int = 128,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
) -> DataLoader[Batch]:
    """Batches of GPT-2's ids and their targets, each (B, max_length). What is left over at the text's end makes no window."""
    if drop_last:
        return create_dataloader(txt, batch_size, max_length, stride, shuffle, num_workers=num_workers)
    dataset = GPTDatasetV1(txt, get_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, num_workers=num_workers)


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """The ids of a text as a batch of one, (1, T)."""
    return torch.tensor([encode_with_specials(tokenizer, text)], dtype=torch.int64)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """The text of ids (1, T) or (T,)."""
    return tokenizer.decode(token_ids.squeeze(0).tolist())


def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """The prompts idx (B, T) with max_new_tokens likeliest tokens each, one after the other: (B, T + max_new_tokens)."""
    return generate(model, idx, max_new_tokens, context_size)


def custom_collate_fn(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = IGNORED,
    allowed_max_length: int | None = None,
    device: str | torch.device = "cpu",
) -> Batch:
    """`collate_instructions` without a masked prompt: padded inputs and targets, each (B, T)."""
    return instructions.collate_instructions(batch, pad_token_id, ignore_index, allowed_max_length, device=device)


def format_input(entry: Record) -> str:
    """Alpaca's prompt for a record of instruction and input, up to where the response begins."""
    return templates.format_input(entry)


class InstructionDataset(instructions.InstructionDataset):
    """The records of `data` as ids, prompt and response together."""

    def __init__(self, data: Sequence[Record], tokenizer: Any) -> None:
        super().__init__(data, tokenizer)
        self.data = data
