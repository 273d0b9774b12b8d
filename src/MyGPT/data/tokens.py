"""Token ids in a compact array, in memory or in a memory-mapped file.

A prepared data set is a directory with one or more files of ids (little-endian uint16 or uint32), `tokens.json` (their
number, data type and hashes) and `tokenizer.json`. `prepare.py` writes the directory, `open_tokens` opens it.

`tokens.json` lists the files of ids, called shards, under the key `shards`: for each one `file` (its name), `n_tokens`,
`sha256` (of all bytes) and `sampled_sha256` (of some blocks). The data set is the concatenation of the shards. The
directories of early versions have one file, `tokens.bin`, whose hashes are keys of `tokens.json` itself.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from MyGPT.data.shards import ShardedTokens, map_ids
from MyGPT.files import present_directory, read_json, reading, sha256_of
from MyGPT.tokenizers.codec import TokenArray as TokenArray  # "import X as X" marks X as public for type checkers.
from MyGPT.tokenizers.codec import id_dtype as id_dtype

Tokens = TokenArray | ShardedTokens
"""Token ids in memory, in a memory-mapped file, or in several such files."""
_WHOLE_BYTES = 1 << 26
"""Data up to this size are hashed completely, larger data in blocks."""


class Blocks(NamedTuple):
    """The blocks of a large file that are hashed: their number and their size in bytes."""

    number: int
    size: int


FILE_BLOCKS = Blocks(64, 1 << 20)
"""Used for a data set in a single file, and for `fingerprint`."""
SHARD_BLOCKS = Blocks(16, 1 << 14)
"""Used for each shard of a data set, so that a thousand shards are checked in a second."""


def compact_ids(ids: Any) -> Tokens:
    """Return token ids (a list, array or tensor) as a uint16 or uint32 array. Arrays of these types are not copied.

    Ids in files (`ShardedTokens`) are returned unchanged.

    Raise ValueError unless `ids` is one-dimensional and contains only whole numbers from 0 to 2**32 - 1.
    """
    if isinstance(ids, ShardedTokens):
        return ids
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


def open_tokens(directory: str | os.PathLike[str]) -> tuple[Tokens, dict[str, Any]]:
    """Return the memory-mapped token ids of a data set that `prepare` wrote, and the content of its `tokens.json`.

    The ids are a numpy array if they are in one file, and otherwise a `ShardedTokens`.

    Raise ValueError if `tokens.json` is damaged, or if its sizes and hashes do not match the files of ids and
    `tokenizer.json`. Data up to 64 MiB are hashed completely. Of larger data, only blocks are hashed, which takes about 0.1
    seconds for one file and a millisecond for each of several shards. This check detects a different file, but perhaps not
    a single changed byte. Early versions of MyGPT stored no hash of blocks; for their files over 64 MiB, only the size is
    checked.
    """
    with reading(directory):
        return _open_tokens(present_directory(directory))


def describe_shard(path: str | os.PathLike[str], n_tokens: int, sha256: str) -> dict[str, Any]:
    """Return the description of a shard in `tokens.json`. `sha256` is the hash of the whole file at `path`."""
    return {
        "file": Path(path).name,
        "n_tokens": n_tokens,
        "sha256": sha256,
        "sampled_sha256": sampled_sha256(path, SHARD_BLOCKS),
    }


def _open_tokens(directory: Path) -> tuple[Tokens, dict[str, Any]]:
    """Open a data set as `open_tokens` does. No other process may replace the directory during the call."""
    json_path, tokenizer_path = directory / "tokens.json", directory / "tokenizer.json"
    description = read_json(json_path)
    try:
        n_tokens, dtype, tokenizer = description["n_tokens"], description["dtype"], description.get("tokenizer_sha256")
        is_sharded = "shards" in description
        shards = description["shards"] if is_sharded else [{**description, "file": "tokens.bin"}]
        names, sizes = [shard["file"] for shard in shards], [shard["n_tokens"] for shard in shards]
        hashes = [(shard["sha256"], shard.get("sampled_sha256")) for shard in shards]
    except (KeyError, TypeError, AttributeError) as error:
        raise ValueError(f"{json_path} is damaged: {type(error).__name__}: {error}") from None
    if dtype not in ("uint16", "uint32") or type(n_tokens) is not int or n_tokens < 1:
        raise ValueError(f"{json_path} describes {n_tokens!r} tokens of type {dtype!r}, which is not valid")
    for name, size in zip(names, sizes, strict=True):
        if type(name) is not str or Path(name).name != name or type(size) is not int or size < 1:
            raise ValueError(f"{json_path} describes {size!r} tokens in the file {name!r:.80}, which is not valid")
    if sum(sizes) != n_tokens or len(set(names)) < len(names):
        raise ValueError(f"{json_path} is damaged: its shards have {sum(sizes)} tokens together, not {n_tokens}")
    element = np.dtype(dtype).newbyteorder("<")
    paths = [directory / name for name in names]
    _check_shards(
        paths, [size * element.itemsize for size in sizes], hashes, SHARD_BLOCKS if is_sharded else FILE_BLOCKS
    )
    if tokenizer is not None and sha256_of(tokenizer_path) != tokenizer:
        raise ValueError(f"{tokenizer_path} is not the tokenizer of these tokens, {_DIFFERS}")
    ids = map_ids(paths[0], element) if len(paths) == 1 else ShardedTokens(paths, element)
    return ids, description


_DIFFERS = "its SHA-256 differs: run mygpt prepare again"


def _check_shards(
    paths: Sequence[Path], sizes: Sequence[int], hashes: Sequence[tuple[str, str | None]], blocks: Blocks
) -> None:
    """Raise ValueError unless files have the given sizes in bytes and the given hashes.

    `hashes` has the hash of each whole file, and the hash of its `blocks` or None if it is unknown.
    """
    for path, expected in zip(paths, sizes, strict=True):
        if not path.is_file():
            raise FileNotFoundError(f"{path} is missing, tokens.json requires it: run mygpt prepare again")
        if (n_bytes := path.stat().st_size) != expected:
            raise ValueError(f"{path} has {n_bytes} bytes, tokens.json requires {expected}: run mygpt prepare again")
    is_small = sum(sizes) <= _WHOLE_BYTES
    for path, (whole, sampled) in zip(paths, hashes, strict=True):
        known, found = (whole, sha256_of) if is_small else (sampled, lambda path: sampled_sha256(path, blocks))
        if known is not None and found(path) != known:
            raise ValueError(f"{path} is not the file that tokens.json describes, {_DIFFERS}")


def sampled_sha256(path: str | os.PathLike[str], blocks: Blocks = FILE_BLOCKS) -> str:
    """Return the SHA-256 of blocks at equal distances in a file, or of the whole file if it is not larger than they are.

    The first block starts with the file, and the last block ends with it. A shard is hashed in SHARD_BLOCKS.
    """
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        for start, n_bytes in _samples(os.stat(path).st_size, blocks):
            file.seek(start)
            digest.update(file.read(n_bytes))
    return digest.hexdigest()


def fingerprint(*arrays: npt.NDArray[Any] | ShardedTokens) -> str:
    """Return a SHA-256 of the types, sizes and bytes of arrays. Of an array over 64 MiB, only 64 blocks are hashed.

    Token ids have the same fingerprint in memory, in one file and in several files.
    """
    digest = hashlib.sha256()
    for array in arrays:
        flat = array if isinstance(array, ShardedTokens) else np.ascontiguousarray(array).reshape(-1)
        itemsize = flat.dtype.itemsize
        n_bytes = len(flat) * itemsize
        digest.update(f"{flat.dtype} {n_bytes} ".encode())
        for start, length in _samples(n_bytes, FILE_BLOCKS):
            first, rest = divmod(start, itemsize)
            part = np.asarray(flat[first : -(-(start + length) // itemsize)])
            digest.update(part.view(np.uint8)[rest : rest + length].data)
    return digest.hexdigest()


def _samples(size: int, blocks: Blocks) -> list[tuple[int, int]]:
    """Return the start and length of each block to hash in `size` bytes: one block if they are not more than `blocks`."""
    number, length = blocks
    if size <= number * length:
        return [(0, size)]
    return [(i * (size - length) // (number - 1), length) for i in range(number)]
