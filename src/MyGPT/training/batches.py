"""The training and validation batches of a Trainer: windows of token ids, or a user's own."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from MyGPT.data.sampler import WindowSampler, WindowValidation
from MyGPT.data.tokens import compact_ids
from MyGPT.training.config import TrainConfig


def make_batches(train: Any, val: Any, context_length: int, config: TrainConfig) -> tuple[Any, Any, list[list[int]]]:
    """Return the training batches, the validation batches or None, and the default prompts of live samples.

    Token ids become windows of context_length tokens; other sources are returned as they are (see `Trainer`). Fewer than
    two validation ids count as None. The default prompt is the beginning of the validation text, or of the training text.
    """
    text: Any = []
    if not hasattr(train, "batch"):
        text = compact_ids(train)
        train = WindowSampler(text, context_length, config.batch_size, config.order, config.seed)
    if val is not None and not hasattr(val, "batches"):
        if len(val) >= 2:
            text = compact_ids(val)
            val = WindowValidation(text, context_length, config.eval_windows)
        else:
            val = None
    return train, val, [[int(id_) for id_ in text[:8]]] if len(text) else []


def to_device(batch: tuple[Tensor, ...], device: torch.device) -> tuple[Tensor, ...]:
    """Return the batch on a device."""
    # On Apple's GPUs a non-blocking copy may read the source tensor after its memory has been freed.
    return tuple(tensor.to(device, non_blocking=device.type == "cuda") for tensor in batch)
