"""Use token files that datatrove's DocumentTokenizer wrote, without a copy.

A file NAME.ds has the ids of all documents as little-endian uint16, or uint32 for vocabularies of more than 65,536 tokens.
NAME.ds.metadata names the tokenizer, the size of an id and the number of ids. NAME.ds.index has the end of each document.
"""

from __future__ import annotations

import glob
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from MyGPT.data.shards import ShardedTokens
from MyGPT.files import read_text
from MyGPT.tokenizers import Tokenizer, get_tokenizer
from MyGPT.tokenizers.directory import find_directory

_SUFFIX = ".ds"
_MAX_METADATA_BYTES = 1 << 16
_N_CHECKED = 1 << 18  # ids at the start and end of each file that are compared with the size of the vocabulary


def find_token_files(data: Any) -> list[Path]:
    """Return the .ds files that `data` names, or an empty list if it names anything else.

    `data` is a .ds file, a directory with such files, a pattern such as 'data/*.ds', or a list of these.
    """
    paths: list[Path] = []
    for name in [data] if isinstance(data, (str, os.PathLike)) else data:
        name = os.fspath(name)
        pattern = os.path.join(glob.escape(name), f"*{_SUFFIX}") if os.path.isdir(name) else name
        found = (
            [Path(name)]
            if os.path.isfile(name)
            else [Path(path) for path in sorted(glob.glob(pattern, recursive=True))]
        )
        if not found or any(path.suffix != _SUFFIX for path in found):
            return []
        paths += found
    return paths


def open_token_files(paths: Sequence[Path], tokenizer: str) -> tuple[ShardedTokens, Tokenizer]:
    """Return the memory-mapped ids of .ds files, in the order of `paths`, and their tokenizer.

    The tokenizer is that of GPT-2 if the metadata of the files name it, unless `tokenizer` is the directory of another one.
    For all other files, `tokenizer` must be a directory or a name of GPT-2.

    Raises:
        ValueError: a file is damaged or was made with another tokenizer, or the tokenizer is not known.
    """
    described = [_read_metadata(path) for path in paths]
    names = sorted({name for name, _, _ in described})
    if len(names) > 1:
        raise ValueError(f"{paths[0].parent} has token files of different tokenizers: {', '.join(names)}")
    if find_directory(tokenizer) is not None or _is_gpt2(tokenizer):
        coder = get_tokenizer(tokenizer)
    elif _is_gpt2(names[0]):
        coder = get_tokenizer("gpt2")
    else:
        known = f"were made with the tokenizer {names[0]}" if names[0] else "do not name their tokenizer"
        raise ValueError(f"{paths[0]} and the files with it {known}: give its directory with --tokenizer DIR")
    sizes = {size for _, size, _ in described if size is not None} or {2 if coder.n_vocab <= 2**16 else 4}
    if len(sizes) > 1:
        raise ValueError(
            f"{paths[0].parent} has token files with ids of 2 and of 4 bytes, which have different tokenizers"
        )
    dtype = np.dtype(f"<u{sizes.pop()}")
    for path, (_, _, n_tokens) in zip(paths, described, strict=True):
        _check_file(path, dtype, n_tokens, coder.n_vocab)
    return ShardedTokens(paths, dtype), coder


def _is_gpt2(name: str) -> bool:
    """Return True if a name, such as "openai-community/gpt2", is one of GPT-2's on the Hugging Face hub."""
    return name.removeprefix("openai-community/") in ("gpt2", "gpt2-medium", "gpt2-large", "gpt2-xl")


def _read_metadata(path: Path) -> tuple[str, int | None, int | None]:
    """Return the name of the tokenizer ("" if unknown), the bytes of an id and the number of ids of a .ds file.

    The numbers are None if datatrove wrote no metadata.
    """
    metadata = Path(f"{path}.metadata")
    if not metadata.is_file():
        return "", None, None
    first, _, rest = read_text(metadata, _MAX_METADATA_BYTES).partition("\n")
    name, _, size = first.rpartition("|")
    number = rest.partition("\n")[0]
    if size not in ("2", "4") or not (number.isascii() and number.isdecimal() and len(number) < 20):
        raise ValueError(f"{metadata} is damaged: it must name the tokenizer, the bytes of an id and the number of ids")
    return ("" if name.startswith("Unknown Tokenizer") else name), int(size), int(number)


def _check_file(path: Path, dtype: np.dtype[Any], n_tokens: int | None, n_vocab: int) -> None:
    """Raise ValueError if the size of a .ds file, its index or its first and last ids are not those that are expected."""
    n_bytes = path.stat().st_size
    if n_bytes == 0 or n_bytes % dtype.itemsize or n_tokens not in (None, n_bytes // dtype.itemsize):
        expected = "whole ids, at least one" if n_tokens is None else f"{n_tokens} ids of {dtype.itemsize} bytes"
        raise ValueError(f"{path} has {n_bytes} bytes, but must have {expected}: write it again with datatrove")
    index = Path(f"{path}.index")
    if index.is_file():
        with open(index, "rb") as file:
            size = file.seek(0, os.SEEK_END)
            file.seek(max(size - 8, 0))
            end = int.from_bytes(file.read(8), "little")
        if size % 8 or end * dtype.itemsize != n_bytes:
            raise ValueError(f"{index} does not belong to {path}: its last document must end at the end of the file")
    ids = np.memmap(path, dtype, mode="r")
    largest = max(int(part.max()) for part in (ids[:_N_CHECKED], ids[-_N_CHECKED:]))
    if largest >= n_vocab:
        raise ValueError(
            f"{path} has the id {largest}, but the tokenizer has only {n_vocab} tokens: it is another tokenizer"
        )
