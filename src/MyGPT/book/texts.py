"""The text functions of chapters 2, 4, 5 and 7: encode texts, form batches, generate and decode."""

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

# The book's versions differ for unknown words. Here these become <|unk|> if the vocabulary has it, or raise ValueError.
SimpleTokenizerV1 = SimpleTokenizerV2 = SimpleTokenizer


class GPTDatasetV1(GPTDataset):
    """Pairs of a window of ids and the same window shifted by one, each (max_length,) int64; windows start `stride` apart."""

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
    """Return a loader of batches of GPT-2 ids and targets, each (B, max_length); an incomplete last window is dropped."""
    if drop_last:
        return create_dataloader(txt, batch_size, max_length, stride, shuffle, num_workers=num_workers)
    dataset = GPTDatasetV1(txt, get_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, num_workers=num_workers)


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """Return the ids of a text as a batch with one row, (1, T) int64."""
    return torch.tensor([encode_with_specials(tokenizer, text)], dtype=torch.int64)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """Decode ids of shape (1, T) or (T,) to text."""
    return tokenizer.decode(token_ids.squeeze(0).tolist())


def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Continue prompts idx (B, T) greedily; return prompts and new tokens, (B, T + max_new_tokens)."""
    return generate(model, idx, max_new_tokens, context_size)


def custom_collate_fn(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = IGNORED,
    allowed_max_length: int | None = None,
    device: str | torch.device = "cpu",
) -> Batch:
    """Return padded inputs and targets, each (B, T). See `MyGPT.collate_instructions`."""
    return instructions.collate_instructions(batch, pad_token_id, ignore_index, allowed_max_length, device=device)


def format_input(entry: Record) -> str:
    """Return the Alpaca prompt of a record with instruction and input, without the heading of the response."""
    return templates.format_input(entry)


class InstructionDataset(instructions.InstructionDataset):
    """The records of `data` as ids of prompt and response."""

    def __init__(self, data: Sequence[Record], tokenizer: Any) -> None:
        super().__init__(data, tokenizer)
        self.data = data
