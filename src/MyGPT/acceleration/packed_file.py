"""Files of packed weights, which `mygpt pack` writes beside a model, so that the weights need not be packed at each start.

A file has safetensors' format. Its metadata name the layout of the panels, the precision, and the files from which it was
made, with their sizes, times and SHA-256. A file is used only if all of this fits and its checksum is right. It is read
into memory, not mapped: large memory pages make generation faster, and nobody can change the memory of a running program.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Mapping
from io import FileIO
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from MyGPT.acceleration.storage import HugePages
from MyGPT.files import atomic_write, parse_json, read_json, refuse_pipe, sha256_of
from MyGPT.messages import error_message

FORMAT = "MyGPT's packed weights"
LAYOUT = "1"
"""The version of the layout of panels, and of the rounding. Change it when kernel.cpp reads or rounds weights differently."""
_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "I8": torch.int8, "U8": torch.uint8}
_MAX_HEADER_BYTES = 1 << 26
_CHUNK = 1 << 22
"""Number of bytes that are read at a time, so that they are still in the CPU's cache when their checksum is computed."""
_METADATA = "__metadata__"


def packed_path(weights: Path, precision: str, panel: int) -> Path:
    """Return the path of the file of packed weights for the weights at `weights`: it is beside them.

    `weights` is the path of a Checkpoint. The name contains the precision and the number of rows in a panel, so that
    CPUs of several kinds can share the directory.
    """
    return weights.with_name(f"{weights.name}.{precision}-{panel}.packed")


def find_packed(weights: Path, precision: str, panel: int) -> dict[str, Tensor] | None:
    """Return the packed arrays of the weights at `weights`, or None if there are none that can be used.

    If there is a file of packed weights that cannot be used, one line on stderr gives the reason.
    """
    path = packed_path(weights, precision, panel)
    try:
        return read_packed(path, weights, precision, panel)
    except FileNotFoundError:
        others = sorted(weights.parent.glob(f"{weights.name}.{precision}-*.packed"))
        if others:
            report_unused(others[0], "it is for another kind of CPU")
    except (OSError, ValueError) as error:
        report_unused(path, error)
    return None


def report_unused(path: Path, reason: object) -> None:
    """Print one line to stderr that says why the file of packed weights at `path` is not used."""
    text = error_message(reason) if isinstance(reason, Exception) else str(reason)
    print(f"{path} is not used: {text}; mygpt pack writes a new one", file=sys.stderr)


def write_packed(path: Path, arrays: Mapping[str, Tensor], precision: str, panel: int, source: Any) -> None:
    """Write packed arrays to a file. `source` is the `describe_source` of the weights, from before they were packed.

    Raises OSError if the file cannot be written.
    """
    names = {dtype: name for name, dtype in _DTYPES.items()}
    header: dict[str, Any] = {}
    end = 0
    for name, array in arrays.items():
        begin, end = end, end + array.nbytes
        header[name] = {"dtype": names[array.dtype], "shape": list(array.shape), "data_offsets": [begin, end]}
    header[_METADATA] = {
        "format": FORMAT,
        "layout": LAYOUT,
        "panel": str(panel),
        "precision": precision,
        "source": json.dumps(source),
    }
    checksum = _header_checksum(header)
    for array in arrays.values():
        checksum = google_crc32c.extend(checksum, _bytes_of(array))
    header[_METADATA]["crc32c"] = str(checksum)
    text = json.dumps(header).encode()
    text += b" " * (-(len(text) + 8) % 64)
    with atomic_write(path, "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for array in arrays.values():
            file.write(_bytes_of(array))


def read_packed(path: Path, weights: Path, precision: str, panel: int) -> dict[str, Tensor]:
    """Return the arrays in a file of packed weights.

    Raises ValueError if the file is damaged, was made from other weights than those at `weights`, or is for another
    precision or another kind of CPU.
    """
    refuse_pipe(path)
    with open(path, "rb", buffering=0) as file:
        header = _read_header(file, path)
        metadata = header.pop(_METADATA)
        if metadata.get("format") != FORMAT or metadata.get("layout") != LAYOUT:
            raise ValueError("another version of MyGPT wrote it")
        if metadata.get("precision") != precision or metadata.get("panel") != str(panel):
            raise ValueError("it is for another precision or another kind of CPU")
        if not _is_source(parse_json(metadata.get("source", ""), path), weights):
            raise ValueError(f"{weights.name} has changed since it was written")
        expected = metadata.pop("crc32c", None)
        checksum = _header_checksum({**header, _METADATA: metadata})
        memory = HugePages()
        arrays = {}
        for name, entry in header.items():
            array = memory.take(tuple(entry["shape"]), _DTYPES[entry["dtype"]])
            view = _bytes_of(array)
            for begin in range(0, len(view), _CHUNK):
                chunk = view[begin : begin + _CHUNK]
                if file.readinto(chunk.data) != len(chunk):
                    raise ValueError("it is damaged: it is too short")
                checksum = google_crc32c.extend(checksum, chunk)
            arrays[name] = array
    if str(checksum) != expected:
        raise ValueError("it is damaged: its checksum is wrong")
    return arrays


def _read_header(file: FileIO, path: Path) -> dict[str, Any]:
    """Read the header of an open file of packed weights. Raises ValueError unless it describes all bytes of the file."""
    size = os.fstat(file.fileno()).st_size
    n_bytes = int.from_bytes(file.read(8), "little")
    if not 0 < n_bytes <= min(_MAX_HEADER_BYTES, size - 8):
        raise ValueError("it is damaged: its header is missing")
    header = parse_json(file.read(n_bytes), path)
    end = 0
    try:
        for name, entry in header.items():
            if name != _METADATA:
                begin, stop = entry["data_offsets"]
                shape = entry["shape"]
                is_valid = all(type(n) is int and n > 0 for n in shape) and begin == end
                if not is_valid or stop - begin != math.prod(shape) * _DTYPES[entry["dtype"]].itemsize:
                    raise ValueError
                end = stop
        if 8 + n_bytes + end != size or not isinstance(header[_METADATA], dict):
            raise ValueError
    except (ValueError, TypeError, KeyError, AttributeError):
        raise ValueError("it is damaged: its header does not describe its content") from None
    return dict(header)


def _header_checksum(header: Mapping[str, Any]) -> int:
    """Return the CRC-32C of a header without its checksum. The checksum of the data continues it."""
    return int(google_crc32c.value(json.dumps(header, sort_keys=True).encode()))


def _bytes_of(array: Tensor) -> NDArray[np.uint8]:
    """Return the memory of a contiguous tensor as bytes."""
    view: NDArray[np.uint8] = array.view(-1).view(torch.uint8).numpy()
    return view


def describe_source(weights: Path) -> list[dict[str, Any]]:
    """Return the name, size, times and SHA-256 of each file that contains the weights at `weights`."""
    return [{**_quick_description(path), "sha256": sha256_of(path)} for path in _source_files(weights)]


def is_unchanged(source: list[dict[str, Any]], weights: Path) -> bool:
    """Return True if the files at `weights` are still those that `describe_source` described, without reading them.

    A file that is written gets a new time of change (ctime), which, unlike the time of modification, no program can set.
    """
    quick = [{key: value for key, value in entry.items() if key != "sha256"} for entry in source]
    return quick == list(map(_quick_description, _source_files(weights)))


def _is_source(source: Any, weights: Path) -> bool:
    """Return True if `source` describes the files at `weights`. Files that were copied or moved are read and hashed."""
    if not isinstance(source, list) or not all(isinstance(entry, dict) for entry in source):
        return False
    if is_unchanged(source, weights):
        return True
    files = _source_files(weights)
    if [(entry.get("name"), entry.get("bytes")) for entry in source] != [(p.name, p.stat().st_size) for p in files]:
        return False
    return [entry.get("sha256") for entry in source] == list(map(sha256_of, files))


def _quick_description(path: Path) -> dict[str, Any]:
    found = path.stat()
    times = {"mtime_ns": found.st_mtime_ns, "ctime_ns": found.st_ctime_ns}
    return {"name": path.name, "bytes": found.st_size, "inode": found.st_ino, **times}


def _source_files(weights: Path) -> list[Path]:
    """Return the files with the weights at `weights`: a file, an index with the files that it lists, or a prefix of files."""
    if not weights.is_file():
        return sorted(path for path in weights.parent.glob(f"{weights.name}.*") if path.suffix != ".packed")
    if not weights.name.endswith(".index.json"):
        return [weights]
    return [weights, *(weights.with_name(name) for name in sorted(set(read_json(weights)["weight_map"].values())))]
