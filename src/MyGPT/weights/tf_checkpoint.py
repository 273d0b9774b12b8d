"""TensorFlow's checkpoints ("tensor bundles"), read with numpy and without TensorFlow.

A checkpoint `model.ckpt` is an index, `model.ckpt.index`, and shards, `model.ckpt.data-00000-of-00001`, which hold the raw
bytes of the tensors one after another. The index is a LevelDB table (leveldb.py). Under the empty key lies a
BundleHeaderProto, under the name of each tensor a BundleEntryProto: its type, shape, place and checksum. Both are protocol
buffers, described in TensorFlow's protobuf/tensor_bundle.proto.

Files may be damaged or made to harm: what the index claims is compared with the real lengths of the shards before anything
is allocated, and every checksum is verified.
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
from MyGPT.weights.leveldb import masked_crc, read_table, read_varint
from MyGPT.weights.mapped import MappedFile

_FORMAT_VERSION = 1
_MAX_INDEX_BYTES = 1 << 30  # some ten million tensors
_MAX_RANK = 32  # numpy 1's
_MAX_ELEMENTS = 1 << 48  # binds empty tensors only, (0, 2**60) say: the others are measured by their file
_BFLOAT16 = 14
_DTYPES = {  # of DataType in TensorFlow's types.proto what numpy has; bfloat16 becomes float32
    1: "<f4", 2: "<f8", 3: "<i4", 4: "|u1", 5: "<i2", 6: "|i1", 8: "<c8", 9: "<i8", 10: "|b1", _BFLOAT16: "<f4",
    17: "<u2", 18: "<c16", 19: "<f2", 22: "<u4", 23: "<u8",
}  # fmt: skip


class CheckpointError(ValueError):
    """A checkpoint that is damaged, incomplete or of a kind that we do not read; names the file and the tensor."""


@dataclass(frozen=True)
class _Entry:
    """What the index says of a tensor."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc: int
    is_partitioned: bool


class Checkpoint:
    """The tensors of a checkpoint by name, read when asked for. `read_checkpoint` makes it."""

    def __init__(self, prefix: str, n_shards: int, entries: dict[str, _Entry]) -> None:
        self._prefix = prefix
        self._n_shards = n_shards
        self._entries = entries
        self._shards: dict[int, MappedFile] = {}

    def names(self) -> list[str]:
        """All names, sorted by their UTF-8 bytes."""
        return list(self._entries)

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor, without reading it."""
        return self._entry(name).shape

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of what `read` returns: the tensor's own, but float32 for bfloat16, which numpy does not have."""
        number = self._entry(name).dtype
        if number not in _DTYPES:
            raise CheckpointError(
                f"{self._prefix}.index: tensor {name!r} has TensorFlow's type {number}, numpy has no such"
            )
        return np.dtype(_DTYPES[number])

    def read(self, name: str) -> NDArray[Any]:
        """A tensor as an array, its checksum verified.

        It is a view of the mapped file; a copy for bfloat16 and where the address is odd for the type. Writing to it changes
        memory only, never the file. Do not shorten a file while arrays of it live.
        """
        entry, dtype = self._entry(name), self.dtype(name)
        if entry.is_partitioned:
            raise CheckpointError(
                f"{self._prefix}.index: tensor {name!r} lies in slices (a partitioned variable); only whole tensors can be read"
            )
        raw = self._raw(name, entry)
        if masked_crc(raw) != entry.crc:
            raise CheckpointError(f"{self._shard(entry)}: tensor {name!r} is damaged: its checksum is wrong")
        if entry.dtype == _BFLOAT16:  # the upper half of a float32
            return (raw.view("<u2").astype("<u4") << 16).view(dtype).reshape(entry.shape)
        return np.require(raw.view(dtype).reshape(entry.shape), requirements=["ALIGNED"])

    def _entry(self, name: str) -> _Entry:
        if name not in self._entries:
            raise CheckpointError(f"{self._prefix}.index: there is no tensor {name!r}")
        return self._entries[name]

    def _shard(self, entry: _Entry) -> str:
        return f"{self._prefix}.data-{entry.shard:05d}-of-{self._n_shards:05d}"

    def _raw(self, name: str, entry: _Entry) -> NDArray[np.uint8]:
        """The bytes of a tensor."""
        shard = self._shards.setdefault(entry.shard, MappedFile(self._shard(entry)))
        try:
            return shard.read(entry.offset, entry.size)
        except ValueError as error:  # shorter than it was
            raise CheckpointError(f"{self._shard(entry)}: tensor {name!r} cannot be read: {error}") from None

    def _check_places(self) -> None:
        """A CheckpointError unless each tensor lies within its shard and is as long as its shape says."""
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
                    raise CheckpointError(f"{shard} is missing, tensor {name!r} is in it")
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


def read_checkpoint(prefix: str | os.PathLike[str]) -> Checkpoint:
    """The checkpoint `prefix`.index, `prefix`.data-…: its index is read and its shards are measured.

    Without an index it is a FileNotFoundError; anything else that is missing or wrong is a CheckpointError.
    """
    index = f"{os.fspath(prefix)}.index"
    try:
        with open(index, "rb") as file:
            if os.fstat(file.fileno()).st_size > _MAX_INDEX_BYTES:
                raise ValueError(f"longer than {_MAX_INDEX_BYTES} bytes, which no index is")
            records = read_table(file.read())
        n_shards = _read_header(records.pop(b"", None))
        # Keys with a leading zero byte are slices of partitioned tensors, which have an entry of their own as well.
        entries = {_name(key): _read_entry(key, value) for key, value in records.items() if key[0]}
    except ValueError as error:
        raise CheckpointError(f"{index}: {error}") from None
    checkpoint = Checkpoint(os.fspath(prefix), n_shards, entries)
    checkpoint._check_places()
    return checkpoint


def latest_checkpoint(directory: str | os.PathLike[str]) -> Path:
    """The prefix that the text file `directory`/checkpoint names: `directory`/model.ckpt for OpenAI's models.

    Without that file it is a FileNotFoundError. A path that leads out of the directory, or to nothing, is a CheckpointError.
    """
    state = Path(directory) / "checkpoint"
    try:
        found = re.findall(r'^model_checkpoint_path: "([^"\\\0\n]+)"\s*$', read_text(state), flags=re.MULTILINE)
    except ValueError as error:
        raise CheckpointError(str(error)) from None  # not text
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
    """The number of shards, from a BundleHeaderProto."""
    if value is None:
        raise ValueError("a LevelDB table, but not of a checkpoint: it has no header")
    header = _fields(value)
    if _number(header, 2) != 0:
        raise ValueError("the checkpoint is big-endian; only little-endian ones can be read")
    min_consumer = _number(_fields(_message(header, 3)), 2)
    if min_consumer > _FORMAT_VERSION:
        raise ValueError(f"the format's version is {min_consumer}; the newest that can be read is {_FORMAT_VERSION}")
    return _number(header, 1)


def _read_entry(key: bytes, value: bytes) -> _Entry:
    """What a BundleEntryProto says. A negative number comes out as a huge one, which no file is long enough for."""
    try:
        entry = _fields(value)
        sizes = _values(_fields(_message(entry, 2)), 2, bytes)
        if len(sizes) > _MAX_RANK:
            raise ValueError(f"{len(sizes)} dimensions, at most {_MAX_RANK} can be read")
        shape = tuple(_number(_fields(size), 1) for size in sizes)
        if math.prod(filter(None, shape)) > _MAX_ELEMENTS:
            raise ValueError(f"the shape {shape} is larger than any tensor")
        dtype, shard, offset, size, crc = (_number(entry, field) for field in (1, 3, 4, 5, 6))
        return _Entry(dtype, shape, shard, offset, size, crc, is_partitioned=7 in entry)
    except ValueError as error:
        raise ValueError(f"tensor {_name(key)!r}: {error}") from None


def _name(key: bytes) -> str:
    try:
        return key.decode("utf-8")
    except UnicodeDecodeError:
        raise ValueError(f"the name {key!r} of a tensor is not UTF-8") from None


_Fields = dict[int, list[int | bytes]]
_Value = TypeVar("_Value", int, bytes)


def _fields(message: bytes) -> _Fields:
    """The fields of a protocol buffer by number: numbers as int; text and messages, which have a length, as bytes."""
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
            raise ValueError(f"a protocol buffer has a field of the unknown kind {wire_type}")
        if at + n_bytes > len(message):
            raise ValueError("a protocol buffer is cut off")
        content = message[at : at + n_bytes]
        fields.setdefault(number, []).append(content if wire_type == 2 else int.from_bytes(content, "little"))
        at += n_bytes
    return fields


def _values(fields: _Fields, number: int, kind: type[_Value]) -> list[_Value]:
    values = [value for value in fields.get(number, []) if isinstance(value, kind)]
    if len(values) != len(fields.get(number, [])):
        raise ValueError(f"field {number} of a protocol buffer is of the wrong kind")
    return values


def _number(fields: _Fields, number: int) -> int:
    return (_values(fields, number, int) or [0])[-1]


def _message(fields: _Fields, number: int) -> bytes:
    return (_values(fields, number, bytes) or [b""])[-1]
