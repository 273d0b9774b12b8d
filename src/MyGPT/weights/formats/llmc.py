"""Checkpoints of llm.c, such as gpt2_124M.bin: a header of 256 numbers, then all weights.

The matrices are stored as (out, in), all blocks of one weight after another. The rows of the token embedding are padded
with rows for ids that no token has.
"""

from __future__ import annotations

import math
import struct
from pathlib import Path

import torch
from torch import Tensor

from MyGPT.config import GPTConfig
from MyGPT.files import begins_with
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.layout import BLOCK, WPE, WTE, shapes
from MyGPT.weights.lazy import LazyTensor, MappedFile

GPT2_VOCABULARY = "gpt2_tokenizer.bin"
"""The file in which llm.c stores GPT-2's vocabulary, beside the models. It lacks the merges, so MyGPT uses its own copy."""
_MAGIC = 20240326
_DTYPES = {3: torch.float32, 5: torch.bfloat16}
"""Maps the version in the header to the dtype of all weights."""
_HEADER_BYTES = 4 * 256
_N_USED = 8


def matches(path: Path) -> bool:
    """Return whether `path` is a checkpoint of llm.c, by its first four bytes."""
    return begins_with(path, struct.pack("<i", _MAGIC))


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in a file of llm.c. Raises ValueError if the file is damaged or has an unknown version."""
    with open(path, "rb") as file:
        header = file.read(_HEADER_BYTES)
    n_bytes = path.stat().st_size
    try:
        if len(header) < _HEADER_BYTES:
            raise ValueError(f"it has {n_bytes} bytes, fewer than its header")
        _, version, context, vocab, layers, heads, width, n_rows = struct.unpack_from(f"<{_N_USED}i", header)
        if version not in _DTYPES:
            raise ValueError(f"it has the version {version}, MyGPT reads {' and '.join(map(str, _DTYPES))}")
        config = GPTConfig(vocab, context, width, heads, layers, qkv_bias=True)
        if n_rows < vocab:
            raise ValueError(f"its token embedding has {n_rows} rows for {vocab} tokens")
        tensors, end = _tensors(MappedFile(path), config, n_rows, _DTYPES[version])
        if end != n_bytes:
            raise ValueError(f"it has {n_bytes:,} bytes, expected {end:,}")
    except ValueError as error:
        raise ValueError(f"{path} is not a valid checkpoint of llm.c: {error}") from None
    return Checkpoint.of(path, tensors, config, "llm.c's checkpoint")


def _tensors(file: MappedFile, config: GPTConfig, n_rows: int, dtype: torch.dtype) -> tuple[dict[str, LazyTensor], int]:
    """Return the weights in a file under MyGPT's names, and the number of bytes that the file must have.

    `n_rows` is the number of rows of the token embedding, including those without a token.
    """
    blocks = [f"transformer.h.{i}.{name}" for name, *_ in BLOCK for i in range(config.n_layers)]
    sizes, tensors, offset = shapes(config), {}, _HEADER_BYTES
    for name in (WTE, WPE, *blocks, "transformer.ln_f.weight", "transformer.ln_f.bias"):
        tensors[name] = _lazy_tensor(file, name, offset, sizes[name], dtype)
        n_stored = n_rows * config.emb_dim if name == WTE else math.prod(sizes[name])
        offset += n_stored * dtype.itemsize
    return tensors, offset


def _lazy_tensor(file: MappedFile, name: str, offset: int, shape: tuple[int, ...], dtype: torch.dtype) -> LazyTensor:
    """Return the tensor called `name`, which begins at byte `offset`."""

    def load() -> Tensor:
        data = file.read_tensor(name, offset, math.prod(shape) * dtype.itemsize)
        # Training scripts overwrite their checkpoint in place, and a process that has it mapped would crash, so copy it.
        return torch.from_numpy(data).view(dtype).reshape(shape).clone()

    return LazyTensor(shape, dtype, load)
