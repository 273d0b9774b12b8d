"""Helpers shared by the commands that run a model. The functions that open a model are in opening.py."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from MyGPT.config import Precision, check_seed
from MyGPT.files import check_output_file

if TYPE_CHECKING:
    import torch
    from torch import nn

    from MyGPT.acceleration.kernel import Build
    from MyGPT.model import GPTModel
    from MyGPT.tokenizers import Tokenizer
    from MyGPT.weights.checkpoint import Checkpoint


def start_build(device: str, precision: Precision = "auto") -> Build | None:
    """Start compiling the CPU kernel in a separate process, so that the caller can open the model at the same time.

    The caller passes the result to `make_fast`. Return None if `device` (such as "auto" or "cpu") selects a GPU, or if the
    compilation cannot start. Raise ValueError if the device does not support the precision.
    """
    from MyGPT.acceleration.kernel import Build
    from MyGPT.devices import pick_device

    kind = pick_device(device).type
    _require_cpu(precision, kind)
    if kind == "cpu":
        with contextlib.suppress(OSError):  # make_fast tries again and reports the error
            return Build()
    return None


def _require_cpu(precision: Precision, kind: str) -> None:
    """Raise ValueError for a precision that only a CPU supports on another kind of device."""
    if precision in ("int8", "int4") and kind != "cpu":
        raise ValueError(f"precision {precision} needs the CPU; {kind} supports fp32 and bf16")


def make_fast(model: GPTModel | Checkpoint, precision: Precision, lookup: bool, build: Build | None) -> nn.Module:
    """Prepare an opened model for fast generation, and return the model to generate with.

    On a CPU, the result is an accelerated copy with weights in the given precision. On a GPU, and for a model with custom parts,
    it is `model` itself, converted to this precision.

    Args:
        model: the opened model, on the device that will compute, or the result of `open_lazily`.
        precision: the precision of the weights. "auto" keeps the precision in which they are stored.
        lookup: wrap the result in PromptLookup, which guesses the next tokens from earlier repetitions in the text.
        build: the compilation of the CPU kernel that `start_build` started, or None.
    """
    from MyGPT.acceleration.lookup import PromptLookup
    from MyGPT.acceleration.step import accelerate
    from MyGPT.model import GPTModel
    from MyGPT.parts import refuse_parts
    from MyGPT.weights.checkpoint import Checkpoint

    kind = "cpu" if isinstance(model, Checkpoint) else model.transformer.wte.weight.device.type
    if isinstance(model, GPTModel) and model.parts is not None:
        if precision in ("int8", "int4"):
            refuse_parts(model, f"precision {precision}")
        fast: nn.Module = _in_precision(model, precision)
    elif isinstance(model, Checkpoint) or kind == "cpu":
        fast = accelerate(model, precision, build=build)
    else:
        _require_cpu(precision, kind)
        fast = _in_precision(model, precision)
    return PromptLookup(fast) if lookup else fast


def _in_precision(model: GPTModel, precision: Precision) -> GPTModel:
    """Return the model itself, with weights in the precision fp32, bf16 or auto (unchanged)."""
    import torch

    return model if precision == "auto" else model.to(torch.bfloat16 if precision == "bf16" else torch.float32)


def check_html_path(out: str) -> None:
    """Raise an error if `out` does not end in .html, or if no file can be written there."""
    if Path(out).suffix not in (".html", ".htm"):
        raise ValueError(f"out must end in .html, got {out}")
    check_output_file(out)


def check_generation(max_new_tokens: int | None = None, seed: int | None = None, stop: list[str] | None = None) -> None:
    """Raise ValueError if an option of `mygpt generate` or `mygpt chat` is out of range. None means the default value.

    The options are checked before a model is opened, which can take minutes.
    """
    if max_new_tokens is not None and max_new_tokens < 0:
        raise ValueError(f"max_new_tokens must be a whole number of at least 0, got {max_new_tokens}")
    check_seed(seed)
    if "" in (stop or []):
        raise ValueError(f"a stop text must have at least one character, got {stop!r}")


def report_tokenizer(tokenizer: Tokenizer) -> None:
    """Print one line to stderr if GPT-2's tokenizer is used because the model's directory has no tokenizer."""
    if tokenizer.is_assumed:
        print(f"tokenizer: {tokenizer.source}", file=sys.stderr)


def encode_for(model: GPTModel, tokenizer: Tokenizer, text: str) -> torch.Tensor:
    """Return the token ids of a text as a tensor (1, T) on the model's device.

    Raises ValueError if the text is empty or has more tokens than the model's context.
    """
    import torch

    ids = tokenizer.encode(text)
    if not ids:
        raise ValueError("the text is empty; give at least one token")
    if len(ids) > model.config.context_length:
        raise ValueError(f"the text has {len(ids)} tokens, the model's context is {model.config.context_length}")
    return torch.tensor([ids], device=model.transformer.wte.weight.device)
