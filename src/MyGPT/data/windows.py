"""Windows: sequences that are cut from the token ids of a text, to train a language model.

A window has max_length input ids. Its targets are the ids one position later. B batch size, T = max_length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from MyGPT.config import require_positive
from MyGPT.data.shards import ShardedTokens
from MyGPT.data.tokens import Tokens, compact_ids
from MyGPT.loss import IGNORED
from MyGPT.notebooks import Described
from MyGPT.tokenizers import get_tokenizer
from MyGPT.tokenizers.base import encode_with_specials

Batch = tuple[Tensor, Tensor]


def gather_windows(ids: Tokens, starts: npt.NDArray[np.int64], max_length: int, pad_id: int = 0) -> Batch:
    """Return the inputs and targets of B windows, each (B, T) int64, that start at the positions `starts` (B,) in `ids`.

    Inputs are T = max_length ids from each start; targets are the ids one position later. After the end of `ids`, the
    inputs are `pad_id` and the targets are -100, which every loss ignores.
    """
    inputs = np.full((len(starts), max_length), pad_id, np.int64)
    targets = np.full((len(starts), max_length), IGNORED, np.int64)
    # A slice of a plain array takes a tenth of the time of a slice of a memmap.
    source = ids if isinstance(ids, ShardedTokens) else np.asarray(ids)
    for row, start in enumerate(starts.tolist()):
        window = np.asarray(source[start : start + max_length + 1])
        inputs[row, : len(window)] = window[:max_length]
        targets[row, : max(0, len(window) - 1)] = window[1:]
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class GPTDataset(Described, Dataset[Batch]):
    """Windows (sequences of T = max_length ids) of a text: each item is a pair of inputs and targets, each (T,) int64.

    The token ids are stored once, so overlapping windows need no more memory. Too few ids for one window raise
    ValueError.

    Args:
        text_or_ids: a text, or token ids as a list, array, tensor, memory map or ShardedTokens
        tokenizer: a tokenizer of MyGPT or a tiktoken.Encoding
        max_length: length of a window in tokens
        stride: distance in tokens between the starts of consecutive windows
        pad_last: True adds a padded window if the last full window does not reach the end of the text
    """

    def __init__(
        self, text_or_ids: str | Any, tokenizer: Any, max_length: int, stride: int, *, pad_last: bool = False
    ) -> None:
        require_positive(max_length=max_length, stride=stride)
        is_text = isinstance(text_or_ids, str)
        self.ids = compact_ids(encode_with_specials(tokenizer, text_or_ids) if is_text else text_or_ids)
        self.max_length = max_length
        self.stride = stride
        self.pad_id = getattr(tokenizer, "eot_token", None) or 0
        n, needed = len(self.ids), 2 if pad_last else max_length + 1
        if n < needed:
            raise ValueError(f"the text has {n} tokens, a window of max_length={max_length} needs {needed}")
        n_whole = max(0, -(-(n - max_length) // stride))
        covered = (n_whole - 1) * stride + max_length + 1 if n_whole else 0
        self._length = n_whole + (pad_last and covered < n and n_whole * stride < n - 1)

    def summary(self) -> dict[str, object]:
        """Return the numbers of windows and tokens, and the length and stride of a window."""
        return {
            "windows": len(self), "tokens": len(self.ids), "max_length": self.max_length, "stride": self.stride
        }  # fmt: skip

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if not -self._length <= index < self._length:
            raise IndexError(f"there is no window {index} in a data set with {self._length} windows")
        start = index % self._length * self.stride
        inputs, targets = gather_windows(self.ids, np.array([start]), self.max_length, self.pad_id)
        return inputs[0], targets[0]


def create_dataloader(
    text: str | Any,
    batch_size: int = 4,
    max_length: int = 256,
    stride: int | None = None,
    shuffle: bool = True,
    drop_last: bool = True,
    num_workers: int = 0,
    tokenizer: Any = None,
    seed: int | None = None,
) -> DataLoader[Batch]:
    """Return a DataLoader that yields inputs and targets from a text, each (batch_size, max_length) int64.

    Args:
        text: a text, or token ids as a list, array, tensor, memory map or ShardedTokens
        batch_size: number of windows (sequences cut from the text) per batch
        max_length: length of a window in tokens
        stride: distance in tokens between the starts of consecutive windows. Default: max_length.
        shuffle: visit the windows in a new random order in each epoch
        drop_last: True leaves out an incomplete last batch. False keeps it, and also adds a padded window (with targets
            -100) if the last full window does not reach the end of the text.
        num_workers: number of processes that load batches; 0 loads them in this process
        tokenizer: a tokenizer of MyGPT or a tiktoken.Encoding. Default: GPT-2's tokenizer.
        seed: seed for shuffling. Default: torch's global random state.

    Raises:
        ValueError: the text is too short for one window or, with drop_last, for one batch.
    """
    require_positive(batch_size=batch_size)
    tokenizer = get_tokenizer("gpt2") if tokenizer is None else tokenizer
    stride = max_length if stride is None else stride
    dataset = GPTDataset(text, tokenizer, max_length, stride, pad_last=not drop_last)
    if drop_last and len(dataset) < batch_size:
        windows = f"{len(dataset.ids)} tokens, which make {len(dataset)} windows of max_length={max_length}"
        way_out = "lower batch_size, max_length or stride, or set drop_last=False"
        raise ValueError(f"the text has {windows}, fewer than one batch of {batch_size}: {way_out}")
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle, num_workers=num_workers, drop_last=drop_last, generator=generator)
