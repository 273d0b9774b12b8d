"""TensorFlow's checkpoint format, the tensor bundle.

A bundle `model.ckpt` consists of an index, `model.ckpt.index`, and of shards such as `model.ckpt.data-00000-of-00001`, which
contain the raw bytes of the tensors. The index is a LevelDB table (leveldb.py). It maps the empty key to a BundleHeaderProto and
each tensor's name to a BundleEntryProto with its type, shape, position and checksum. Both are protocol buffers, defined in
TensorFlow's protobuf/tensor_bundle.proto.

The files may be damaged or malicious. So the index is compared with the real lengths of the shards before any memory is
allocated, and every checksum is verified.
"""

from __future__ import annotations

import math
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from MyGPT.files import read_text
from MyGPT.weights.mapped import MappedFile
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
    """A checkpoint that is damaged, incomplete or not supported. The message names the file and the tensor."""


@dataclass(frozen=True)
class _Entry:
    """The index entry of a tensor."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    is_partitioned: bool


class Bundle:
    """The tensors of a TensorFlow checkpoint by name, read on request. `open_bundle` returns one."""

    def __init__(self, prefix: str, n_shards: int, entries: dict[str, _Entry]) -> None:
        self._prefix = prefix
        self._n_shards = n_shards
        self._entries = entries
        self._shards: dict[int, MappedFile] = {}

    def names(self) -> list[str]:
        """Return all tensor names, sorted by their UTF-8 bytes."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """Return the shape of a tensor without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """Return the dtype of the array that `read` returns: float32 for bfloat16, otherwise the tensor's own."""
        number = self._entry(name).dtype
        if number not in _DTYPES:
            raise CheckpointError(
                f"{self._prefix}.index: tensor {name!r} has TensorFlow's type number {number}, which numpy does not have"
            )
        return np.dtype(_DTYPES[number])

    def read(self, name: str) -> NDArray[Any]:
        """Return a tensor as an array, after its checksum was verified.

        The array is a view of the mapped file, or a copy for bfloat16 and for unaligned data. Writing to it changes memory
        only, never the file. Do not truncate a file while arrays of it exist.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        if entry.is_partitioned:
            raise CheckpointError(
                f"{self._prefix}.index: tensor {name!r} is a partitioned variable, which is not supported"
            )
        raw = self._raw(name, entry)
        if masked_crc(raw) != entry.crc:
            raise CheckpointError(f"{self._shard(entry)}: tensor {name!r} is damaged: its checksum is wrong")
        if entry.dtype == _BFLOAT16:  # the upper two bytes of a float32
            return (raw.view("<u2").astype("<u4") << 16).view(dtype).reshape(entry.shape)
        return np.require(raw.view(dtype).reshape(entry.shape), requirements=["ALIGNED"])

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self._prefix}.index: there is no tensor {name!r}")
        return self._entries[name]

    def _shard(self, entry: _Entry) -> str:
        """Return the path of the file that contains a tensor."""
        return f"{self._prefix}.data-{entry.shard:05d}-of-{self._n_shards:05d}"

    def _raw(self, name: str, entry: _Entry) -> NDArray[np.uint8]:
        """Return the bytes of a tensor."""
        shard = self._shards.setdefault(entry.shard, MappedFile(self._shard(entry)))
        try:
            return shard.read(entry.offset, entry.size)
        except ValueError as error:  # the file was truncated after the index was checked
            raise CheckpointError(f"{self._shard(entry)}: tensor {name!r} cannot be read: {error}") from None

    def _check_positions(self) -> None:
        """Raise CheckpointError unless each tensor is inside its shard and has the length that its shape requires."""
        lengths: dict[str, int] = {}
        for name, entry in self._entries.items():
            if entry.is_partitioned:
                continue
            if entry.shard >= self._n_shards:
                raise CheckpointError(
                    f"{self._prefix}.index: tensor {name!r} is in shard {entry.shard} of {self._n_shards}"
                )
            shard = self._shard(entry)
            if shard not in lengths:
                if not os.path.isfile(shard):
                    raise CheckpointError(f"{shard} is missing, but it contains tensor {name!r}")
                lengths[shard] = os.path.getsize(shard)
            if entry.offset + entry.size > lengths[shard]:
                raise CheckpointError(
                    f"{shard} has {lengths[shard]} bytes, too few for tensor {name!r}: {entry.size} at offset {entry.offset}"
                )
            itemsize = 2 if entry.dtype == _BFLOAT16 else np.dtype(_DTYPES.get(entry.dtype, "V0")).itemsize
            if itemsize and math.prod(entry.shape) * itemsize != entry.size:
                raise CheckpointError(
                    f"{self._prefix}.index: tensor {name!r} of shape {entry.shape} cannot be {entry.size} bytes long"
                )


def open_bundle(prefix: str | os.PathLike[str]) -> Bundle:
    """Return the bundle whose files start with `prefix`, after reading its index and checking the lengths of its shards.

    Raises FileNotFoundError if there is no index, and CheckpointError for any other missing or damaged file.
    """
    index = f"{os.fspath(prefix)}.index"
    try:
        with open(index, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_INDEX_BYTES:
                raise ValueError(f"longer than {_MAX_INDEX_BYTES} bytes, which is too long for an index")
            records = read_table(file.read())
        n_shards = _read_header(records.pop(b"", None))
        # Keys with a leading zero byte are slices of partitioned variables. The whole variable has its own entry as well.
        entries = {_name(key): _read_entry(key, value) for key, value in records.items() if key[0]}
    except ValueError as error:
        raise CheckpointError(f"{index}: {error}") from None
    bundle = Bundle(os.fspath(prefix), n_shards, entries)
    bundle._check_positions()
    return bundle


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """Return the prefix in the text file `directory`/checkpoint: `directory`/model.ckpt for OpenAI's models.

    Raises FileNotFoundError without that file, and CheckpointError if the prefix is outside the directory or has no index.
    """
    state = Path(directory) / "checkpoint"
    try:
        found = re.findall(r'^model_checkpoint_path: "([^"\\\0\n]+)"\s*$', read_text(state), flags=re.MULTILINE)
    except ValueError as error:
        raise CheckpointError(str(error)) from None  # the file is not text
    if len(found) != 1:
        raise CheckpointError(
            f'{state} does not name a checkpoint: it needs one line such as model_checkpoint_path: "model.ckpt"'
        )
    prefix = Path(directory, found[0])
    if not prefix.resolve().is_relative_to(Path(directory).resolve()):
        raise CheckpointError(f"{state} names {found[0]!r}, which is outside its directory")
    if not os.path.isfile(f"{prefix}.index"):
        raise CheckpointError(f"{state} names {found[0]!r}, but {prefix}.index is missing")
    return prefix


def _read_header(value: bytes | None) -> int:
    """Return the number of shards from a BundleHeaderProto."""
    if value is None:
        raise ValueError("a LevelDB table without a checkpoint's header")
    header = _fields(value)
    if _number(header, 2) != 0:
        raise ValueError("the checkpoint is big-endian, but only little-endian checkpoints are supported")
    min_consumer = _number(_fields(_message(header, 3)), 2)
    if min_consumer > _FORMAT_VERSION:
        raise ValueError(
            f"the format's version is {min_consumer}, but versions after {_FORMAT_VERSION} are not supported"
        )
    return _number(header, 1)


def _read_entry(key: bytes, value: bytes) -> _Entry:
    """Return the entry in a BundleEntryProto. Negative numbers decode as huge ones, which the length checks refuse."""
    try:
        entry = _fields(value)
        sizes = _values(_fields(_message(entry, 2)), 2, bytes)
        if len(sizes) > _MAX_RANK:
            raise ValueError(f"{len(sizes)} dimensions, but at most {_MAX_RANK} are supported")
        shape = tuple(_number(_fields(size), 1) for size in sizes)
        if math.prod(filter(None, shape)) > _MAX_ELEMENTS:
            raise ValueError(f"the shape {shape} is too large for a tensor")
        dtype, shard, offset, size, crc = (_number(entry, field) for field in (1, 3, 4, 5, 6))
        return _Entry(dtype, shape, shard, offset, size, crc, is_partitioned=7 in entry)
    except ValueError as error:
        raise ValueError(f"tensor {_name(key)!r}: {error}") from None


def _name(key: bytes) -> str:
    """Return the tensor name in a key of the table."""
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the tensor name {key!r} is not UTF-8") from None


_Fields = dict[int, list[int | bytes]]
_Value = TypeVar("_Value", int, bytes)


def _fields(message: bytes) -> _Fields:
    """Return the fields of a protocol buffer by field number: numbers as int, texts and nested messages as bytes."""
    fields: _Fields = {}
    at = 0
    while at < len(message):
        tag, at = read_varint(message, at)
        number, wire_type = tag >> 3, tag & 7
        if wire_type == 0:
            value, at = read_varint(message, at)
            fields.setdefault(number, []).append(value)
            continue
        if wire_type == 2:
            n_bytes, at = read_varint(message, at)
        elif wire_type in (1, 5):
            n_bytes = 8 if wire_type == 1 else 4
        else:
            raise ValueError(f"a protocol buffer has a field of the unknown wire type {wire_type}")
        if at + n_bytes > len(message):
            raise ValueError("a protocol buffer is truncated")
        content = message[at : at + n_bytes]
        fields.setdefault(number, []).append(content if wire_type == 2 else int.from_bytes(content, "little"))
        at += n_bytes
    return fields


def _values(fields: _Fields, number: int, kind: type[_Value]) -> list[_Value]:
    """Return all values of a field. Raises ValueError if one has another type."""
    values = [value for value in fields.get(number, []) if isinstance(value, kind)]
    if len(values) != len(fields.get(number, [])):
        raise ValueError(f"field {number} of a protocol buffer has the wrong type")
    return values


def _number(fields: _Fields, number: int) -> int:
    """Return the last value of a numeric field, or its default 0."""
    return (_values(fields, number, int) or [0])[-1]


def _message(fields: _Fields, number: int) -> bytes:
    """Return the last value of a field with a nested message, or its default, the empty message."""
    return (_values(fields, number, bytes) or [b""])[-1]
