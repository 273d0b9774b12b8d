"""LevelDB tables: sorted maps from keys to values, in blocks with checksums. TensorFlow's index files have this format.

    table   data blocks, metaindex block, index block, footer
    block   entries, the restart points (offsets, uint32) and their number (uint32),
            then 1 byte compression and 4 bytes checksum: a masked CRC-32C
    entry   n_shared, n_own, n_value (varints), the last n_own bytes of the key, the value's n_value bytes;
            the key's first n_shared bytes are those of the previous key (0 at a restart point)
    footer  handles (offset and length, varints) of the metaindex and the index block, zeros, magic: 48 bytes

The values of the index block are handles of the data blocks. Numbers are little-endian (LevelDB's doc/table_format.md).
The bytes may be malicious: every length is checked before it is used, and the table's length bounds the running time.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_MAGIC = 0xDB4775248B80FB57
_MAX_KEY_RATIO = 64  # total key bytes per byte of a block; at most 16 with the usual restart point every 16 keys


def read_table(table: bytes) -> dict[bytes, bytes]:
    """Return the keys and values of a LevelDB table, in the order of the keys. Raises ValueError if it is damaged."""
    if len(table) < _FOOTER_BYTES or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise ValueError("truncated or not a LevelDB table: it does not end with the magic number")
    footer = table[-_FOOTER_BYTES:-8]
    *metaindex, at = _handle(footer, 0)
    *index, at = _handle(footer, at)
    if any(footer[at:]):
        raise ValueError("the footer is damaged")
    _block(table, *metaindex)  # lists filters, which are not needed: only verify the checksum
    records: dict[bytes, bytes] = {}
    last_key, end = None, 0
    for _, handle in _entries(_block(table, *index)):
        offset, size, _ = _handle(handle, 0)
        if offset < end:  # otherwise a table could list one block many times and keep us busy forever
            raise ValueError("blocks overlap")
        end = offset + size
        for key, value in _entries(_block(table, offset, size)):
            if last_key is not None and key <= last_key:
                raise ValueError("keys are not in order")
            records[key], last_key = value, key
    return records


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """Return the varint that starts at byte `at` of `data`, and the position of the byte after it.

    A varint is an unsigned number, stored with seven bits per byte, low bits first. The eighth bit is 0 only in the
    last byte.
    """
    number = 0
    for i, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, at + i + 1
    raise ValueError("a varint is damaged")


def masked_crc(data: bytes | NDArray[Any]) -> int:
    """Return LevelDB's checksum of `data`: the CRC-32C, rotated right by 15 bits, plus a constant."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """Read a block's handle at byte `at`. Return the block's offset and length, and the position after the handle."""
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return offset, size, at


def _block(table: bytes, offset: int, size: int) -> bytes:
    """Verify the checksum of the block of `size` bytes at `offset`. Return the block's entries and restart points."""
    end = offset + size
    if end + _TRAILER_BYTES > len(table) - _FOOTER_BYTES:
        raise ValueError(f"a block of {size} bytes at offset {offset} does not fit in a table of {len(table)} bytes")
    if masked_crc(table[offset : end + 1]) != int.from_bytes(table[end + 1 : end + _TRAILER_BYTES], "little"):
        raise ValueError(f"the block at offset {offset} is damaged: its checksum is wrong")
    compression = table[end]
    if compression:
        kind = "with Snappy" if compression == 1 else f"with the unknown method {compression}"
        raise ValueError(f"the block at offset {offset} is compressed {kind}, but only uncompressed blocks can be read")
    return table[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """Yield the keys and values of a block in order. The restart points are for binary search and are ignored."""
    end = len(block) - 4 - 4 * int.from_bytes(block[-4:], "little")
    if len(block) < 4 or end < 0:
        raise ValueError("the restart points of a block are damaged")
    at, key, n_key_bytes = 0, b"", 0
    while at < end:
        n_shared, at = read_varint(block, at)
        n_own, at = read_varint(block, at)
        n_value, at = read_varint(block, at)
        value_at = at + n_own
        n_key_bytes += n_shared + n_own
        if n_shared > len(key) or value_at + n_value > end or n_key_bytes > _MAX_KEY_RATIO * len(block):
            raise ValueError("an entry of a block is damaged")
        key = key[:n_shared] + block[at:value_at]
        at = value_at + n_value
        yield key, block[value_at:at]
