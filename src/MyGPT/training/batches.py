"""The training and validation batches of a Trainer: windows of token ids, or a user's own. B batch, T time."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from MyGPT.data.sampler import WindowSampler, WindowValidation
from MyGPT.data.tokens import compact_ids
from MyGPT.training.config import TrainConfig


class Batches(Protocol):
    """A source of training batches. With a method `fingerprint()`, a resumed run notices changed data."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return inputs and targets, each (B, T) int64, and optionally an attention mask (B, T)."""
        ...


class Validation(Protocol):
    """A source of validation batches."""

    def batches(self, whole: bool) -> Iterator[tuple[Tensor, ...]]:
        """Yield batches like those of training: all of them if `whole`, else the same few every time."""
        ...


def make_batches(
    train: Any, val: Any, context_length: int, config: TrainConfig
) -> tuple[Batches, Validation | None, list[list[int]]]:
    """Return the training batches, the validation batches or None, and the default prompts of live samples.

    The default prompt is the beginning of the validation text, or of the training text if there is no other.

    Args:
        train: token ids, or an object with a method `batch`, which is returned as it is.
        val: token ids, an object with a method `batches`, or None. Fewer than two ids count as None.
        context_length: the length of a window of token ids.
        config: the batch size, the order of the windows, the seed and the number of validation windows.
    """
    text: Any = []
    if hasattr(train, "batch"):
        batches = train
    else:
        text = compact_ids(train)
        batches = WindowSampler(text, context_length, config.batch_size, config.order, config.seed)
    validation: Validation | None = None
    if hasattr(val, "batches"):
        validation = val
    elif val is not None and len(val) >= 2:
        text = compact_ids(val)
        validation = WindowValidation(text, context_length, config.eval_windows)
    return batches, validation, [[int(id_) for id_ in text[:8]]] if len(text) else []


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return the batch on a device."""
    # On Apple's GPUs a non-blocking copy may read the source tensor after its memory has been freed.
    return tuple(tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)
