"""Reading and writing safetensors files, and opening a model that consists of one such file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MyGPT.config import config_beside
from MyGPT.weights.checkpoint import Checkpoint
from MyGPT.weights.lazy import LazyTensor, MappedFile

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}


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
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, "pt"):  # checks that the header is valid and agrees with the length of the file
            pass
    except SafetensorError as error:
        raise ValueError(f"{path} is damaged: {error}") from None
    with open(path, "rb") as file:
        n_header_bytes = int.from_bytes(file.read(8), "little")
        header = json.loads(file.read(n_header_bytes))
    header.pop("__metadata__", None)
    mapped = MappedFile(path)
    return {name: _lazy_tensor(mapped, 8 + n_header_bytes, name, entry) for name, entry in header.items()}


def write_safetensors(path: Path, tensors: Mapping[str, Tensor], shown_as: Path | None = None) -> None:
    """Write contiguous CPU tensors to a safetensors file.

    Raises OSError if writing fails. Its message names the file `shown_as`, to which a temporary file will be renamed
    later. Default: `path`.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        save_file(dict(tensors), path, metadata={"format": "pt"})
    except SafetensorError as error:  # safetensors reports a full disk this way
        raise OSError(f"cannot write {shown_as or path}: {error}") from error


def _lazy_tensor(file: MappedFile, start: int, name: str, entry: Mapping[str, Any]) -> LazyTensor:
    """Return the tensor called `name`, as `entry` in the file's header describes it: dtype, shape and offsets.

    The offsets are counted from byte `start` of the file. Errors contain `name`.
    """
    shape, dtype, (begin, end) = tuple(entry["shape"]), _DTYPES.get(entry["dtype"]), entry["data_offsets"]

    def load() -> Tensor:
        if dtype is None:
            raise ValueError(f"{file.path}: {name} does not hold floating-point numbers")
        try:
            return torch.from_numpy(file.read(start + begin, end - begin)).view(dtype).reshape(shape)
        except ValueError as error:  # the file was truncated after its header was checked
            raise ValueError(f"{file.path} is damaged: {name} cannot be read: {error}") from None

    return LazyTensor(shape, dtype, load)
