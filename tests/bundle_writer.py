"""A small writer of TensorFlow checkpoints for tests, written from the description of the format alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
from numpy.typing import NDArray

DTYPE_NUMBERS = {
    "float32": 1, "float64": 2, "int32": 3, "uint8": 4, "int16": 5, "int8": 6, "complex64": 8, "int64": 9, "bool": 10,
    "bfloat16": 14, "uint16": 17, "complex128": 18, "float16": 19, "uint32": 22, "uint64": 23,
}  # fmt: skip


@dataclass
class Stored:
    """A tensor as it is stored in a shard."""

    dtype: int
    shape: tuple[int, ...]
    raw: NDArray[np.uint8]


def stored(array: NDArray[Any]) -> Stored:
    return Stored(DTYPE_NUMBERS[array.dtype.name], array.shape, np.ascontiguousarray(array).reshape(-1).view(np.uint8))


def stored_bfloat16(array: NDArray[np.float32]) -> Stored:
    """Store float32 numbers as bfloat16, their upper two bytes."""
    upper = (array.reshape(-1).view("<u4") >> 16).astype("<u2")
    return Stored(DTYPE_NUMBERS["bfloat16"], array.shape, upper.view(np.uint8))


def write_bundle(
    prefix: Path,
    tensors: Mapping[str, Stored],
    *,
    n_shards: int = 1,
    **table_options: int,
) -> None:
    """Write a checkpoint; tensor i is stored in shard i modulo the number of shards."""
    records = {b"": header(n_shards)}
    shards = [bytearray() for _ in range(n_shards)]
    for i, (name, tensor) in enumerate(tensors.items()):
        shard = shards[i % n_shards]
        place = (i % n_shards, len(shard), len(tensor.raw))
        records[name.encode()] = entry(tensor.dtype, tensor.shape, *place, masked_crc(tensor.raw))
        shard += tensor.raw.data
    for i, shard in enumerate(shards):
        Path(f"{prefix}.data-{i:05d}-of-{n_shards:05d}").write_bytes(shard)
    Path(f"{prefix}.index").write_bytes(table(records, **table_options))


def header(n_shards: int, endianness: int = 0, min_consumer: int = 0) -> bytes:
    return number(1, n_shards) + number(2, endianness) + submessage(3, number(1, 1) + number(2, min_consumer))


def entry(dtype: int, shape: Iterable[int], shard: int, offset: int, size: int, crc: int, more: bytes = b"") -> bytes:
    sizes = b"".join(submessage(2, number(1, size)) for size in shape)
    place = number(3, shard) + number(4, offset) + number(5, size)
    return number(1, dtype) + submessage(2, sizes) + place + varint(6 << 3 | 5) + crc.to_bytes(4, "little") + more


def table(
    records: Mapping[bytes, bytes], *, block_bytes: int = 4096, restart_interval: int = 16, compression: int = 0
) -> bytes:
    """Return a LevelDB table. `compression` is only written to the trailers; the blocks are not compressed."""
    out, handles = b"", {}
    pending: dict[bytes, bytes] = {}

    def finish(content: bytes) -> bytes:
        nonlocal out
        handle = varint(len(out)) + varint(len(content))
        content += bytes([compression])
        out += content + masked_crc(content).to_bytes(4, "little")
        return handle

    for key in sorted(records):
        pending[key] = records[key]
        if sum(len(key) + len(value) for key, value in pending.items()) >= block_bytes:
            handles[key] = finish(block(pending, restart_interval))
            pending = {}
    if pending:
        handles[max(pending)] = finish(block(pending, restart_interval))
    footer = finish(block({}, 1)) + finish(block(handles, 1))
    return out + footer.ljust(40, b"\0") + bytes.fromhex("57fb808b247547db")


def block(records: Mapping[bytes, bytes], restart_interval: int) -> bytes:
    out, previous = b"", b""
    restarts = [0]
    for i, (key, value) in enumerate(records.items()):
        n_shared = 0
        if i % restart_interval:
            while n_shared < min(len(key), len(previous)) and key[n_shared] == previous[n_shared]:
                n_shared += 1
        elif i:
            restarts.append(len(out))
        out += varint(n_shared) + varint(len(key) - n_shared) + varint(len(value)) + key[n_shared:] + value
        previous = key
    return out + b"".join(n.to_bytes(4, "little") for n in [*restarts, len(restarts)])


def varint(n: int) -> bytes:
    out = []
    while n > 127:
        out.append(n & 127 | 128)
        n >>= 7
    return bytes([*out, n])


def number(field: int, value: int) -> bytes:
    """Return a number field of a protocol buffer. 0 is left out, and negative numbers have 64 bits."""
    return varint(field << 3) + varint(value % (1 << 64)) if value else b""


def submessage(field: int, content: bytes) -> bytes:
    return varint(field << 3 | 2) + varint(len(content)) + content


def masked_crc(data: bytes | NDArray[np.uint8]) -> int:
    crc = google_crc32c.value(data)
    rotated = crc >> 15 | crc << 17 & 0xFFFFFFFF
    return (rotated + 0xA282EAD8) & 0xFFFFFFFF
