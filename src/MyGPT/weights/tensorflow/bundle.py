"""TensorFlow's checkpoint format, the tensor bundle: an index file, and data files ("shards") with the tensors' bytes.

The index, such as `model.ckpt.index`, is a LevelDB table. It maps the empty key to a BundleHeaderProto and the name of
each tensor to a BundleEntryProto. Both are protocol buffers, defined in TensorFlow's protobuf/tensor_bundle.proto. The
files may be malicious, so the index is compared with the lengths of the shards before any memory is allocated.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from MyGPT.files import read_text
from MyGPT.weights.lazy import MappedFile
from MyGPT.weights.tensorflow.leveldb import masked_crc, read_table, read_varint

_FORMAT_VERSION = 1
_MAX_INDEX_BYTES = 1 << 30  # enough for about ten million tensors
_MAX_RANK = 32  # the limit of numpy 1
_MAX_ELEMENTS = 1 << 48  # for empty tensors such as (0, 2**60); the file length limits all others
_BFLOAT16 = 14
_DTYPES = {  # DataType numbers of TensorFlow's types.proto with numpy's equivalents; bfloat16 becomes float32
    1: "<f4", 2: "<f8", 3: "<i4", 4: "|u1", 5: "<i2", 6: "|i1", 8: "<c8", 9: "<i8", 10: "|b1", _BFLOAT16: "<f4",
    17: "<u2", 18: "<c16", 19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip


class CheckpointError(ValueError):
    """Error raised for a TensorFlow checkpoint that is damaged, incomplete or not supported."""


@dataclass(frozen=True)
class BundleTensor:
    """A tensor of a TensorFlow checkpoint. Its entry in the index is in memory, and `read` reads its values."""

    name: str
    label: str
    """The path of the index file and the tensor's name, as error messages show them."""
    type_number: int
    shape: tuple[int, ...]
    file: MappedFile
    """The data file with the values. (A partitioned tensor, in several files, cannot be read.)"""
    offset: int
    size: int
    crc: int
    is_partitioned: bool

    def dtype(self) -> np.dtype[Any]:
        """Return the dtype of `read`'s array: float32 for a bfloat16 tensor, otherwise the stored dtype."""
        if self.type_number not in _DTYPES:
            raise CheckpointError(f"{self.label} has TensorFlow's type number {self.type_number}, which numpy lacks")
        return np.dtype(_DTYPES[self.type_number])

    def read(self) -> NDArray[Any]:
        """Verify the checksum of the values and return them as an array.

        The array is a view of the memory-mapped file (see `MappedFile`), or a copy for bfloat16 or unaligned values.
        """
        if self.is_partitioned:
            raise CheckpointError(f"{self.label} is a partitioned variable, which is not supported")
        dtype, where = self.dtype(), f"{self.file.path}: tensor {self.name!r}"
        try:
            raw = self.file.read(self.offset, self.size)
        except ValueError as error:  # the file was truncated after the index was checked
            raise CheckpointError(f"{where} cannot be read: {error}") from None
        if masked_crc(raw) != self.crc:
            raise CheckpointError(f"{where} is damaged: its checksum is wrong")
        if self.type_number == _BFLOAT16:  # the upper two bytes of a float32
            return (raw.view("<u2").astype("<u4") << 16).view(dtype).reshape(self.shape)
        return np.require(raw.view(dtype).reshape(self.shape), requirements=["ALIGNED"])

    def check_position(self) -> None:
        """Raise CheckpointError if the tensor is not inside its data file or its byte count contradicts its shape."""
        path = self.file.path
        if not os.path.isfile(path):
            raise CheckpointError(f"{path} is missing, but it contains tensor {self.name!r}")
        n_bytes = os.path.getsize(path)
        if self.offset + self.size > n_bytes:
            needed = f"{self.size} at offset {self.offset}"
            raise CheckpointError(f"{path} has {n_bytes} bytes, too few for tensor {self.name!r}: {needed}")
        itemsize = 2 if self.type_number == _BFLOAT16 else np.dtype(_DTYPES.get(self.type_number, "V0")).itemsize
        if itemsize and math.prod(self.shape) * itemsize != self.size:
            raise CheckpointError(f"{self.label} of shape {self.shape} cannot be {self.size} bytes long")


def open_bundle(prefix: str | os.PathLike[str]) -> dict[str, BundleTensor]:
    """Return the tensors by name of the checkpoint whose files start with `prefix`, sorted by the names' UTF-8 bytes.

    Reads only the index file and the lengths of the data files. Raises FileNotFoundError if there is no index file, and
    CheckpointError for any other missing or damaged file.
    """
    index = f"{os.fspath(prefix)}.index"
    try:
        with open(index, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_INDEX_BYTES:
                raise ValueError(f"longer than {_MAX_INDEX_BYTES} bytes, which is too long for an index")
            records = read_table(file.read())
        n_shards = _read_header(records.pop(b"", None))

        @cache  # one MappedFile per shard
        def shard(number: int) -> MappedFile:
            if number >= n_shards:
                raise ValueError(f"it is in shard {number} of {n_shards}")
            return MappedFile(f"{os.fspath(prefix)}.data-{number:05d}-of-{n_shards:05d}")

        # Keys with a leading zero byte are slices of partitioned variables. The whole variable has its own entry as well.
        tensors = [_read_entry(index, key, value, shard) for key, value in records.items() if key[0]]
    except ValueError as error:
        raise CheckpointError(f"{index}: {error}") from None
    for tensor in tensors:
        if not tensor.is_partitioned:
            tensor.check_position()
    return {tensor.name: tensor for tensor in tensors}


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """Return the prefix of the latest checkpoint's files, which the text file `directory`/checkpoint names.

    The prefix is `directory`/model.ckpt for OpenAI's models. Raises FileNotFoundError if the text file is missing, and
    CheckpointError if the prefix is outside the directory or there is no index file.
    """
    state = Path(directory) / "checkpoint"
    try:
        found = re.findall(r'^model_checkpoint_path: "([^"\\\0\n]+)"\s*$', read_text(state), flags=re.MULTILINE)
    except ValueError as error:
        raise CheckpointError(str(error)) from None  # the file is not text
    if len(found) != 1:
        raise CheckpointError(
            f'{state} does not name a checkpoint: it needs one line model_checkpoint_path: "model.ckpt"'
        )
    prefix = Path(directory, found[0])
    if not prefix.resolve().is_relative_to(Path(directory).resolve()):
        raise CheckpointError(f"{state} names {found[0]!r}, which is outside its directory")
    if not os.path.isfile(f"{prefix}.index"):
        raise CheckpointError(f"{state} names {found[0]!r}, but {prefix}.index is missing")
    return prefix


def _read_header(value: bytes | None) -> int:
    """Return the number of data files. `value` is the serialized BundleHeaderProto, or None if there is none."""
    if value is None:
        raise ValueError("a LevelDB table without a checkpoint's header")
    header = _fields(value)
    if _last(header, 2, 0) != 0:
        raise ValueError("the checkpoint is big-endian, but only little-endian checkpoints are supported")
    version = _last(_fields(_last(header, 3, b"")), 2, 0)  # the oldest version of the format that a reader must know
    if version > _FORMAT_VERSION:
        raise ValueError(f"the format's version is {version}, but versions after {_FORMAT_VERSION} are not supported")
    return _last(header, 1, 0)


def _read_entry(index: str, key: bytes, value: bytes, shard: Callable[[int], MappedFile]) -> BundleTensor:
    """Return the tensor that an entry of the index describes. Values are not read.

    `index` is the path of the index for errors, `key` the tensor's name and `value` the serialized BundleEntryProto.
    `shard` returns the data file with a given number. Negative numbers decode as huge ones, which length checks reject.
    """
    try:
        name = key.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the tensor name {key!r} is not UTF-8") from None
    try:
        entry = _fields(value)
        sizes = _values(_fields(_last(entry, 2, b"")), 2, bytes)
        if len(sizes) > _MAX_RANK:
            raise ValueError(f"{len(sizes)} dimensions, but at most {_MAX_RANK} are supported")
        shape = tuple(_last(_fields(size), 1, 0) for size in sizes)
        if math.prod(filter(None, shape)) > _MAX_ELEMENTS:
            raise ValueError(f"the shape {shape} is too large for a tensor")
        dtype, number, offset, size, crc = (_last(entry, field, 0) for field in (1, 3, 4, 5, 6))
        label = f"{index}: tensor {name!r}"
        return BundleTensor(name, label, dtype, shape, shard(number), offset, size, crc, is_partitioned=7 in entry)
    except ValueError as error:
        raise ValueError(f"tensor {name!r}: {error}") from None


_Fields = dict[int, list[int | bytes]]
_Value = TypeVar("_Value", int, bytes)


def _fields(message: bytes) -> _Fields:
    """Return a dict from a protocol buffer's field numbers to their values: ints, or bytes for texts and messages."""
    fields: _Fields = {}
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        value: int | bytes
        if wire_type == 0:
            value, at = read_varint(message, at)
        elif wire_type in (1, 2, 5):
            n_bytes, at = read_varint(message, at) if wire_type == 2 else (8 if wire_type == 1 else 4, at)
            if at + n_bytes > len(message):
                raise ValueError("a protocol buffer is truncated")
            content, at = message[at : at + n_bytes], at + n_bytes
            value = content if wire_type == 2 else int.from_bytes(content, "little")
        else:
            raise ValueError(f"a protocol buffer has a field of the unknown wire type {wire_type}")
        fields.setdefault(number, []).append(value)
    return fields


def _values(fields: _Fields, number: int, kind: type[_Value]) -> list[_Value]:
    """Return all values of the protobuf field with this number. Raises ValueError if a value is not of type `kind`."""
    values = [value for value in fields.get(number, []) if isinstance(value, kind)]
    if len(values) != len(fields.get(number, [])):
        raise ValueError(f"field {number} of a protocol buffer has the wrong type")
    return values


def _last(fields: _Fields, number: int, default: _Value) -> _Value:
    """Return the last value of the protobuf field with this number, or `default` if there is none.

    Raises ValueError if a value does not have the type of `default`.
    """
    return (_values(fields, number, type(default)) or [default])[-1]
