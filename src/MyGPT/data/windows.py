"""Windows over a sequence of token ids: what a language model is trained on.

A window is max_length ids and, as its targets, the ids one further. B batch, T = max_length.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

from MyGPT.data.tokens import TokenArray, compact_ids
from MyGPT.loss import IGNORED
from MyGPT.tokenizers import get_tokenizer
from MyGPT.tokenizers.base import encode_with_specials

Batch = tuple[Tensor, Tensor]


def gather_windows(ids: TokenArray, starts: npt.NDArray[np.int64], max_length: int, pad_id: int = 0) -> Batch:
    """The windows that begin at `starts` (B,): inputs and targets, each (B, T) int64.

    Past the end of `ids`, inputs are pad_id and targets -100, which no loss counts.
    """
    positions = starts[:, None] + np.arange(max_length + 1)  # (B, T + 1)
    outside = positions >= len(ids)
    window = ids[np.minimum(positions, len(ids) - 1)].astype(np.int64)
    inputs, targets = window[:, :-1].copy(), window[:, 1:].copy()
    inputs[outside[:, :-1]] = pad_id
    targets[outside[:, 1:]] = IGNORED
    return torch.from_numpy(inputs), torch.from_numpy(targets)


class GPTDataset(Dataset[Batch]):
    """Windows of max_length ids, `stride` apart, and the same shifted by one, each (T,) int64.

    Takes a text or ids (list, array, memory map), which are kept once, in a compact array: memory is two or four bytes a
    token however the windows overlap. With `pad_last`, targets that the whole windows leave over at the end get one
    more window, padded. Fewer tokens than one window needs is a ValueError.
    """

    def __init__(
        self, text_or_ids: str | Any, tokenizer: Any, max_length: int, stride: int, *, pad_last: bool = False
    ) -> None:
        for name, value in (("max_length", max_length), ("stride", stride)):
            if type(value) is not int or value < 1:
                raise ValueError(f"{name} must be a whole number of at least 1, got {value!r}")
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

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, index: int) -> Batch:
        if not -self._length <= index < self._length:
            raise IndexError(f"window {index} of a data set with {self._length} windows")
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
    """Batches of windows over a text (or ids): inputs and targets, each (B, T) int64.

    `stride` defaults to max_length, `tokenizer` to GPT-2's. With drop_last=False the last batch may be smaller, and a
    last partial window is padded (targets -100). `seed` makes the shuffling independent of torch's global state. A text
    too short for one window, or with drop_last for one batch, is a ValueError with the numbers.
    """
    if type(batch_size) is not int or batch_size < 1:
        raise ValueError(f"batch_size must be a whole number of at least 1, got {batch_size!r}")
    tokenizer = get_tokenizer("gpt2") if tokenizer is None else tokenizer
    stride = max_length if stride is None else stride
    dataset = GPTDataset(text, tokenizer, max_length, stride, pad_last=not drop_last)
    if drop_last and len(dataset) < batch_size:
        raise ValueError(
            f"the text has {len(dataset.ids)} tokens, which make {len(dataset)} windows of max_length={max_length}, fewer "
            f"than one batch of {batch_size}: lower batch_size, max_length or stride, or set drop_last=False"
        )
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return DataLoader(dataset, batch_size, shuffle, num_workers=num_workers, drop_last=drop_last, generator=generator)
