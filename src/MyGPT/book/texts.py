"""Functions of Raschka's book, chapters 2, 4, 5 and 7, that encode text, form batches, generate text and decode token ids."""

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

# The book's two versions differ for unknown words. Here, an unknown word becomes <|unk|> or raises ValueError, depending on
# whether the vocabulary has <|unk|>.
SimpleTokenizerV1 = SimpleTokenizerV2 = SimpleTokenizer


class GPTDatasetV1(GPTDataset):
    """Training examples from a text: item i is a pair of inputs and targets, each (max_length,) int64.

    The inputs are the token ids from position i * stride on, and the targets are the next token after each input.
    """

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
    """Return a DataLoader of inputs and targets from a text in GPT-2 token ids, each (batch_size, max_length) int64.

    Targets are the inputs shifted by one token. Sequences start `stride` tokens apart. The last tokens of the text are left
    out if they do not fill a sequence. If drop_last is true, a last batch of fewer than batch_size sequences is left out.
    """
    if drop_last:
        return create_dataloader(txt, batch_size, max_length, stride, shuffle, num_workers=num_workers)
    dataset = GPTDatasetV1(txt, get_tokenizer("gpt2"), max_length, stride)
    return DataLoader(dataset, batch_size, shuffle, num_workers=num_workers)


def text_to_token_ids(text: str, tokenizer: Any) -> Tensor:
    """Return the token ids of a text as a batch of one sequence, (1, tokens) int64."""
    return torch.tensor([encode_with_specials(tokenizer, text)], dtype=torch.int64)


def token_ids_to_text(token_ids: Tensor, tokenizer: Any) -> str:
    """Decode token ids of shape (1, tokens) or (tokens,) to a text."""
    return tokenizer.decode(token_ids.squeeze(0).tolist())


def generate_text_simple(model: nn.Module, idx: Tensor, max_new_tokens: int, context_size: int) -> Tensor:
    """Extend each prompt in `idx` (B, T) by max_new_tokens tokens, always with the most likely token.

    Return each prompt followed by its new tokens, (B, T + max_new_tokens). For each new token, the model reads at most the
    last context_size tokens.
    """
    return generate(model, idx, max_new_tokens, context_size)


def custom_collate_fn(
    batch: Sequence[Sequence[int]],
    pad_token_id: int = 50256,
    ignore_index: int = IGNORED,
    allowed_max_length: int | None = None,
    device: str | torch.device = "cpu",
) -> Batch:
    """Return the inputs and targets of a batch of token id lists, each (batch, length of the longest list) int64.

    Inputs are padded with pad_token_id. Targets are the inputs shifted by one token, followed by one pad_token_id and then
    by ignore_index. Inputs and targets are cut to allowed_max_length (default: no limit). See `MyGPT.collate_instructions`.
    """
    return instructions.collate_instructions(batch, pad_token_id, ignore_index, allowed_max_length, device=device)


def format_input(entry: Record) -> str:
    """Return the Alpaca prompt for the instruction and input of a record, without the line "### Response:"."""
    return templates.format_input(entry)


class InstructionDataset(instructions.InstructionDataset):
    """Instruction records as token ids: item i is the ids of the prompt and the response of data[i]."""

    def __init__(self, data: Sequence[Record], tokenizer: Any) -> None:
        super().__init__(data, tokenizer)
        self.data = data
