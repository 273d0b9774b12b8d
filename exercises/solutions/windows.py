"""Solution of exercise 2: windows."""

from __future__ import annotations

import torch
from torch import Tensor


def make_windows(ids: Tensor, length: int, stride: int) -> tuple[Tensor, Tensor]:
    """Return the inputs and the targets of all W complete windows, each (W, length) int64."""
    last_start = len(ids) - length - 1  # a window and its last target are length + 1 ids
    if last_start < 0:
        raise ValueError(f"a window of {length} ids needs {length + 1} ids, but there are {len(ids)}")
    starts = range(0, last_start + 1, stride)
    inputs = torch.stack([ids[start : start + length] for start in starts])
    targets = torch.stack([ids[start + 1 : start + length + 1] for start in starts])
    return inputs, targets
