"""Token ids in a compact array, in memory or in a memory-mapped file.

A prepared data set is a directory with three files: `tokens.bin` (ids as little-endian uint16 or uint32), `tokens.json`
(their number, data type and hashes) and `tokenizer.json`. `prepare.py` writes the directory, `open_tokens` opens it.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from MyGPT.files import present_directory, read_json, reading, sha256_of
from MyGPT.tokenizers.codec import TokenArray as TokenArray  # "import X as X" marks X as public for type checkers.
from MyGPT.tokenizers.codec import id_dtype as id_dtype

_N_SAMPLES, _SAMPLE_BYTES = 64, 1 << 20


def compact_ids(ids: Any) -> TokenArray:
    """Return token ids (a list, array or tensor) as a uint16 or uint32 array. Arrays of these types are not copied.

    Raise ValueError unless `ids` is one-dimensional and contains only whole numbers from 0 to 2**32 - 1.
    """
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


def is_prepared(directory: str | os.PathLike[str]) -> bool:
    """Return True if a directory contains a data set that `prepare` wrote."""
    return (present_directory(directory) / "tokens.json").is_file()


def open_tokens(directory: str | os.PathLike[str]) -> tuple[TokenArray, dict[str, Any]]:
    """Return the memory-mapped token ids of a data set that `prepare` wrote, and the content of its `tokens.json`.

    Raise ValueError if `tokens.json` is damaged, or if its hashes do not match `tokens.bin` and `tokenizer.json`. The
    check takes about 0.1 seconds for any size, because only 64 blocks of a `tokens.bin` over 64 MiB are hashed. It detects
    a different file, but perhaps not a single changed byte. The key `sha256` of `tokens.json` is the hash of the whole
    `tokens.bin`. Early versions of MyGPT stored no hash of blocks; for their files over 64 MiB, only the size is
    checked.
    """
    with reading(directory):
        return _open_tokens(present_directory(directory))


def _open_tokens(directory: Path) -> tuple[TokenArray, dict[str, Any]]:
    """Open a data set as `open_tokens` does. No other process may replace the directory during the call."""
    path, json_path, tokenizer_path = (directory / name for name in ("tokens.bin", "tokens.json", "tokenizer.json"))
    description = read_json(json_path)
    try:
        n_tokens, dtype, whole = description["n_tokens"], description["dtype"], description["sha256"]
        sampled, tokenizer = description.get("sampled_sha256"), description.get("tokenizer_sha256")
    except (KeyError, TypeError) as error:
        raise ValueError(f"{json_path} is damaged: {type(error).__name__}: {error}") from None
    if dtype not in ("uint16", "uint32") or type(n_tokens) is not int or n_tokens < 1:
        raise ValueError(f"{json_path} describes {n_tokens!r} tokens of type {dtype!r}, which is not valid")
    expected, n_bytes = n_tokens * np.dtype(dtype).itemsize, path.stat().st_size
    if n_bytes != expected:
        raise ValueError(f"{path} has {n_bytes} bytes, tokens.json requires {expected}: run mygpt prepare again")
    known = whole if n_bytes <= _N_SAMPLES * _SAMPLE_BYTES else sampled
    differs = "its SHA-256 differs: run mygpt prepare again"
    if known is not None and sampled_sha256(path) != known:
        raise ValueError(f"{path} is not the file that tokens.json describes, {differs}")
    if tokenizer is not None and sha256_of(tokenizer_path) != tokenizer:
        raise ValueError(f"{tokenizer_path} is not the tokenizer of these tokens, {differs}")
    return np.memmap(path, dtype=np.dtype(dtype).newbyteorder("<"), mode="r"), description


def sampled_sha256(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of 64 blocks of 1 MiB at equal distances in a file, or of the whole file up to 64 MiB."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start, n_bytes in _samples(os.stat(path).st_size):
            file.seek(start)
            digest.update(file.read(n_bytes))
    return digest.hexdigest()


def fingerprint(*arrays: npt.NDArray[Any]) -> str:
    """Return a SHA-256 of the types, sizes and bytes of arrays. Of an array over 64 MiB, only 64 blocks are hashed."""
    digest = hashlib.sha256()
    for array in arrays:
        data = np.ascontiguousarray(array).view(np.uint8).data
        digest.update(f"{array.dtype} {len(data)} ".encode())
        for start, n_bytes in _samples(len(data)):
            digest.update(data[start : start + n_bytes])
    return digest.hexdigest()


def _samples(size: int) -> list[tuple[int, int]]:
    """Return the start and length of each block to hash in `size` bytes: one block up to 64 MiB, else 64 blocks."""
    if size <= _N_SAMPLES * _SAMPLE_BYTES:
        return [(0, size)]
    return [(i * (size - _SAMPLE_BYTES) // (_N_SAMPLES - 1), _SAMPLE_BYTES) for i in range(_N_SAMPLES)]
