"""Helpers shared by the commands that run a model. Opening a model is in opening.py."""

from __future__ import annotations

import contextlib
import shutil
import sys
from typing import TYPE_CHECKING

from MyGPT.config import Precision

if TYPE_CHECKING:
    import torch
    from torch import nn

    from MyGPT.acceleration.kernel import Build
    from MyGPT.model import GPTModel
    from MyGPT.tokenizers import Tokenizer


def start_build(device: str) -> Build | None:
    """Start compiling the CPU kernel in the background if it will be used, so that torch is imported meanwhile."""
    from MyGPT.acceleration.kernel import Build

    may_use_gpu = device == "auto" and (sys.platform == "darwin" or shutil.which("nvidia-smi") is not None)
    if device in ("auto", "cpu") and not may_use_gpu:
        with contextlib.suppress(OSError):  # make_fast tries again and reports the error
            return Build()
    return None


def make_fast(model: GPTModel, precision: Precision, lookup: bool, build: Build | None) -> nn.Module:
    """Return the fastest form of an opened model for generation on its device.

    The precision "auto" keeps the stored precision of the weights. `lookup` wraps the result in PromptLookup. `build`
    is the compilation that `start_build` started.
    """
    import torch

    from MyGPT.acceleration.lookup import PromptLookup
    from MyGPT.acceleration.step import accelerate

    weight = model.transformer.wte.weight
    fast: nn.Module = model
    if weight.device.type == "cpu":
        fast = accelerate(model, precision, build=build)
    elif precision == "int8":
        raise ValueError(f"precision int8 needs the CPU; {weight.device.type} supports fp32 and bf16")
    elif precision != "auto":
        fast = model.to(torch.bfloat16 if precision == "bf16" else torch.float32)
    return PromptLookup(fast) if lookup else fast


def encode_for(model: GPTModel, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the ids of a text, (1, T), on the model's device. Raises ValueError if it is empty or exceeds the context."""
    import torch

    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty; give at least one token")
    if len(ids) > model.config.context_length:
        raise ValueError(f"the text has {len(ids)} tokens, the model's context is {model.config.context_length}")
    return torch.tensor([ids], device=model.transformer.wte.weight.device)
