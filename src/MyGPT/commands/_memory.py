"""Estimate the memory of a training step, recognise that memory has run out, and advise how each command needs less."""

from __future__ import annotations

import os
import re
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from MyGPT.config import GPTConfig
    from MyGPT.costs import TrainingMemory
    from MyGPT.training.config import TrainConfig

_TRAINING = "lower micro_batch_size (the sequences per forward pass), or use a smaller context_length or model"
ADVICE = {
    "train": _TRAINING,
    "finetune": "lower micro_batch_size (the sequences per forward pass), or use a smaller max_length or model",
    "dpo": "lower micro_batch_size or batch_size, or use a smaller model",
    "classify": "lower micro_batch_size or batch_size, or use a smaller model",
    "evaluate": "lower batch_size, or use a smaller model",
    "generate": "use --precision int8 or int4, a shorter prompt, or a smaller model",
    "chat": "use --precision int8 or int4, or a smaller model",
    "serve": "lower --slots, use --precision int8 or int4, or a smaller model",
    "prepare": "lower workers",
    "explain": "use a shorter text or a smaller model",
    "bench": "use a smaller model",
}
"""Advice that reduces the memory that a command needs, by the name of the command."""


def step_memory(config: GPTConfig, training: TrainConfig, bf16: bool, device: str, n_ranks: int = 1) -> TrainingMemory:
    """Return the memory of a training step on `device` ("cuda" or "cpu"), in bytes, with bfloat16 arithmetic if `bf16`.

    Of n_ranks ranks, the result counts the one with most sequences. Raises ValueError if `training` does not fit n_ranks.
    """
    from MyGPT.costs import training_memory

    n_rows, n_sequences = rows_per_rank(training, n_ranks)
    return training_memory(
        config,
        n_sequences,
        bf16=bf16,
        optimizer=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        accumulates=n_sequences < n_rows,
        device=device,
        shard_size=training.shard_size_on(n_ranks),
    )


def least_step_memory(n_parameters: int, training: TrainConfig, n_ranks: int) -> int:
    """Return the bytes for the weights of any model on one rank, their gradients and the optimizer's moments in float32.

    Muon stores one moment per weight of a matrix in a block, and two per other weight. One per weight is counted.
    """
    numbers = 3 if training.optimizer == "muon" else 4
    return 4 * numbers * n_parameters // (training.shard_size_on(n_ranks) or 1)


def rows_per_rank(training: TrainConfig, n_ranks: int) -> tuple[int, int]:
    """Return the sequences of the rank with most of them: per step, and per forward pass."""
    n_rows = -(-training.batch_size // n_ranks)
    return n_rows, min(training.micro_batch_size or n_rows, n_rows)


def require_memory(n_bytes: int) -> None:
    """Raise MemoryError if the machine has less memory than `n_bytes`.

    Linux may grant more memory than there is, and then kill the process.
    """
    try:
        installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):  # Windows, which grants only the memory that there is
        return
    if n_bytes > installed:
        raise MemoryError(f"{n_bytes / 1e9:,.4g} GB are needed, and the machine has {installed / 1e9:,.3g} GB")


def memory_advice(command: str, error: Exception) -> str | None:
    """Return the message for an `error` of the command that means too little memory, or None for any other error."""
    text = str(error)
    is_known = re.search(
        r"out of memory|can't allocate memory|cannot allocate memory|bad_alloc|ALLOC_FAILED", text, re.I
    )
    if not isinstance(error, MemoryError) and not is_known:
        return None
    size = re.search(r"(\d+) bytes|allocate ([\d.]+ [KMGT]iB)", text)
    wanted = "" if size is None else f" ({size[2] or f'{int(size[1]) / 1e9:.3g} GB'} more were needed)"
    if "are needed" in text:  # from require_memory
        wanted = f" ({text})"
    return f"there is not enough memory{wanted}: {ADVICE.get(command, 'use a smaller model')}"
