"""Token ids in a compact array, in memory or in a memory-mapped file.

A prepared data set is a directory: `tokens.bin` (ids, little-endian uint16 or uint32), `tokens.json` (what they are) and
`tokenizer.json`. `prepare.py` writes it, `open_tokens` opens it.
"""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from MyGPT.files import restore_directory

TokenArray = npt.NDArray[np.uint16] | npt.NDArray[np.uint32]


_BLOCK = 1 << 16


def id_dtype(n_vocab: int) -> np.dtype[Any]:
    """The smallest of uint16 and uint32 that holds every id below n_vocab."""
    return np.dtype("<u2" if n_vocab <= 2**16 else "<u4")


def compact_ids(ids: Any) -> TokenArray:
    """`ids` (a list, array or tensor of natural numbers) as one uint16 or uint32 array; such an array is not copied."""
    array = np.asarray(ids)
    if array.ndim != 1:
        raise ValueError(f"token ids must be one sequence, got an array of shape {array.shape}")
    if array.dtype in (np.uint16, np.uint32):
        return array
    if array.size == 0:
        return array.astype(np.uint16)
    if array.dtype.kind not in "iu":
        raise ValueError(f"token ids must be whole numbers, got {array.dtype}")
    smallest, largest = int(array.min()), int(array.max())
    if smallest < 0 or largest >= 2**32:
        raise ValueError(f"token ids must be from 0 to {2**32 - 1}, got {smallest if smallest < 0 else largest}")
    return array.astype(id_dtype(largest + 1))


def fingerprint(*arrays: npt.NDArray[Any]) -> str:
    """SHA-256 that tells data from others: of the lengths and every byte, beyond 64 MB an array of 1,024 blocks of it."""
    digest = hashlib.sha256()
    for array in arrays:
        data = np.ascontiguousarray(array).view(np.uint8).data
        digest.update(f"{array.dtype} {len(data)} ".encode())
        if len(data) <= 1024 * _BLOCK:
            digest.update(data)
            continue
        for start in np.linspace(0, len(data) - _BLOCK, 1024).astype(np.int64):
            digest.update(data[start : start + _BLOCK])
    return digest.hexdigest()


def is_prepared(directory: str | os.PathLike[str]) -> bool:
    """Whether `mygpt prepare` wrote this directory. One that a kill left between two names is brought back first."""
    restore_directory(directory)
    return (Path(directory) / "tokens.json").is_file()


def open_tokens(directory: str | os.PathLike[str]) -> tuple[TokenArray, dict[str, Any]]:
    """The memory-mapped ids of a prepared data set and the content of its `tokens.json`.

    A file that is not as long as `tokens.json` says is a ValueError.
    """
    directory = Path(directory)
    restore_directory(directory)
    try:
        description = json.loads((directory / "tokens.json").read_text(encoding="utf-8"))
        n_tokens, dtype = description["n_tokens"], description["dtype"]
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise ValueError(f"{directory / 'tokens.json'} is damaged: {type(error).__name__}: {error}") from None
    if dtype not in ("uint16", "uint32") or type(n_tokens) is not int or n_tokens < 1:
        raise ValueError(f"{directory / 'tokens.json'} describes {n_tokens!r} tokens of type {dtype!r}")
    path = directory / "tokens.bin"
    expected = n_tokens * np.dtype(dtype).itemsize
    if path.stat().st_size != expected:
        raise ValueError(f"{path} has {path.stat().st_size} bytes, tokens.json says {expected}: prepare it again")
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r"), description
