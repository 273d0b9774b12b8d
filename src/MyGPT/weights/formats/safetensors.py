"""Reading and writing safetensors files, and opening a model that consists of one such file."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MyGPT.config import config_beside
from MyGPT.files import parse_json
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.lazy import LazyTensor, MappedFile

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_POSITIONS, _POSITION = "DCP_SHARDING_INFO", "saved_offsets"
"""Keys of the metadata in which torch.distributed.checkpoint stores where in its tensor each part begins."""


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in one or more files, each of which holds some of its rows."""

    parts: tuple[tuple[int, LazyTensor], ...]
    """The parts in order, each with the number of its first row."""

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the whole tensor."""
        first_row, last = self.parts[-1]
        return (first_row + last.shape[0], *last.shape[1:]) if last.shape else ()

    @property
    def dtype(self) -> torch.dtype | None:
        """The floating-point dtype, or None if the values are not floating-point numbers."""
        return self.parts[0][1].dtype

    def load(self) -> Tensor:
        """Return a copy of the whole tensor."""
        parts = [part.load() for _, part in self.parts]
        return torch.cat(parts) if parts[1:] else parts[0].clone()


def matches(path: Path) -> bool:
    """Return whether `path` is a file whose name ends in .safetensors."""
    return path.suffix == ".safetensors" and path.is_file()


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in one safetensors file.

    The config comes from config.json in the same directory. Without that file the config is None.
    """
    return Checkpoint.of(path, read_safetensors(path), config_beside(path))


def read_safetensors(path: Path) -> dict[str, LazyTensor]:
    """Return the lazy tensors in a file by name. Loaded tensors are views of the memory-mapped file.

    Raises ValueError if the file is damaged.
    """
    return _read(path)[0]


def read_parts(paths: Iterable[Path]) -> dict[str, StoredTensor]:
    """Return the tensors in files that together hold each tensor once, whole or divided into groups of rows.

    torch.distributed.checkpoint calls such files shards. A file without this library's metadata holds whole tensors.

    Raises ValueError if a file is damaged, or if the parts of a tensor overlap or leave a gap.
    """
    found: dict[str, list[tuple[int, LazyTensor, Path]]] = {}
    for path in paths:
        tensors, metadata = _read(path)
        positions = parse_json(metadata[_POSITIONS], path) if _POSITIONS in metadata else None
        for name, tensor in tensors.items():
            found.setdefault(name, []).append((_first_row(path, name, tensor, positions), tensor, path))
    for name, parts in found.items():
        parts.sort(key=lambda part: part[0])
        n_rows, first = 0, parts[0][1]
        for row, tensor, path in parts:
            has_rows = bool(tensor.shape) and tensor.shape[0] > 0
            is_next = row == n_rows and (has_rows or len(parts) == 1)
            if not is_next or tensor.shape[1:] != first.shape[1:] or tensor.dtype != first.dtype:
                raise ValueError(f"{path} is damaged: its part of {name} does not continue the part before it")
            n_rows += tensor.shape[0] if tensor.shape else 0
    return {name: StoredTensor(tuple((row, tensor) for row, tensor, _ in parts)) for name, parts in found.items()}


def write_safetensors(
    path: Path,
    tensors: Mapping[str, Tensor],
    shown_as: Path | None = None,
    positions: Mapping[str, Sequence[int]] | None = None,
) -> None:
    """Write contiguous CPU tensors to a safetensors file.

    Args:
        path: the file to write.
        tensors: the tensors by name.
        shown_as: the file to which a temporary file at `path` will be renamed later, for errors. Default: `path`.
        positions: for tensors that are parts of larger tensors, the index of the first element of each in the whole
            tensor. It is stored as torch.distributed.checkpoint stores it, for `read_parts`.

    Raises OSError if writing fails.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    metadata = {"format": "pt"}
    if positions is not None:
        info = {name: {_POSITION: list(position)} for name, position in positions.items()}
        metadata |= {_POSITIONS: json.dumps(info), "DCP_VERSION": "1.0"}
    try:
        save_file(dict(tensors), path, metadata=metadata)
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"cannot write {shown_as or path}: {error}") from error


def _read(path: Path) -> tuple[dict[str, LazyTensor], dict[str, str]]:
    """Return the lazy tensors and the metadata of a file. Raises ValueError if the file is damaged."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # checks that the header is valid and agrees with the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    with open(path, "rb") as file:
        n_header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_header_bytes))
    metadata = header.pop("__metadata__", None) or {}
    mapped = MappedFile(path)
    return {name: _lazy_tensor(mapped, 8 + n_header_bytes, name, entry) for name, entry in header.items()}, metadata


def _first_row(path: Path, name: str, tensor: LazyTensor, positions: Any) -> int:
    """Return the number of the first row of a part of the tensor `name`. Raises ValueError unless it has whole rows."""
    if positions is None:
        return 0
    entry = positions.get(name) if isinstance(positions, dict) else None
    position = entry.get(_POSITION) if isinstance(entry, dict) else None
    row = position[0] if isinstance(position, list) and position else 0
    if type(row) is not int or row < 0 or position != [row, *[0] * (len(tensor.shape) - 1)][: len(tensor.shape)]:
        raise ValueError(f"{path} is damaged: {position!r:.80} is not the position of a group of rows of {name}")
    return row


def _lazy_tensor(file: MappedFile, start: int, name: str, entry: Mapping[str, Any]) -> LazyTensor:
    """Return the tensor called `name`, as `entry` in the file's header describes it: dtype, shape and offsets.

    The offsets are counted from byte `start` of the file. Errors contain `name`.
    """
    shape, dtype, (begin, end) = tuple(entry["shape"]), _DTYPES.get(entry["dtype"]), entry["data_offsets"]

    def load() -> Tensor:
        if dtype is None:
            raise ValueError(f"{file.path}: {name} does not hold floating-point numbers")
        return torch.from_numpy(file.read_tensor(name, start + begin, end - begin)).view(dtype).reshape(shape)

    return LazyTensor(shape, dtype, load)
