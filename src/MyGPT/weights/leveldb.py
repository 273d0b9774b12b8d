"""A table of LevelDB: a sorted map from keys to values, in blocks with checksums. TensorFlow indexes its checkpoints so.

    table   data blocks, metaindex block, index block, footer
    block   entries, the restart points (offsets, uint32) and their number (uint32),
            then 1 byte compression and 4 bytes checksum: a masked CRC-32C
    entry   n_shared, n_own, n_value (varints), the key's own n_own bytes, the value's n_value bytes;
            the key begins with n_shared bytes of the key before it (0 at a restart point)
    footer  handles (offset and length, varints) of the metaindex and the index block, zeros, magic: 48 bytes

The values of the index block are handles of the data blocks. Numbers are little-endian. Source: LevelDB's
doc/table_format.md. The bytes may be damaged or made to harm: every length that they claim is compared with the real one
before it is used, all work is bounded by the table's length, and what is wrong is a ValueError.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from numpy.typing import NDArray

_FOOTER_BYTES = 48
_TRAILER_BYTES = 5
_MAGIC = 0xDB4775248B80FB57
_MAX_SHARING = 64  # all keys of a block to its length; one whole key in every 16, as is usual, gives 16 at most


def read_table(table: bytes) -> dict[bytes, bytes]:
    """All keys and values, in order."""
    if len(table) < _FOOTER_BYTES or int.from_bytes(table[-8:], "little") != _MAGIC:
        raise ValueError("cut off or no such file: it does not end in a table's magic number")
    footer = table[-_FOOTER_BYTES:-8]
    *metaindex, at = _handle(footer, 0)
    *index, at = _handle(footer, at)
    if any(footer[at:]):
        raise ValueError("the footer is damaged")
    _block(table, *metaindex)  # names filters, which we do not need: only its checksum is of interest
    records: dict[bytes, bytes] = {}
    last_key, end = None, 0
    for _, handle in _entries(_block(table, *index)):
        offset, size, _ = _handle(handle, 0)
        if offset < end:  # one block named many times would keep us busy for ever
            raise ValueError("blocks overlap")
        end = offset + size
        for key, value in _entries(_block(table, offset, size)):
            if last_key is not None and key <= last_key:
                raise ValueError("keys are not in order")
            records[key], last_key = value, key
    return records


def read_varint(data: bytes, at: int) -> tuple[int, int]:
    """An unsigned number and where it ends: seven bits a byte, low ones first, the eighth set on all but the last byte."""
    number = 0
    for i, byte in enumerate(data[at : at + 10]):
        number |= (byte & 127) << 7 * i
        if byte < 128:
            return number, at + i + 1
    raise ValueError("a number is damaged")


def masked_crc(data: bytes | NDArray[Any]) -> int:
    """CRC-32C, turned and shifted: the plain one of data that end in their own CRC would always be the same."""
    import google_crc32c

    crc = google_crc32c.value(data)
    return ((crc >> 15 | crc << 17) + 0xA282EAD8) % (1 << 32)


def _handle(data: bytes, at: int) -> tuple[int, int, int]:
    """The offset and length of a block, and where in `data` they end."""
    offset, at = read_varint(data, at)
    size, at = read_varint(data, at)
    return offset, size, at


def _block(table: bytes, offset: int, size: int) -> bytes:
    """The entries and restart points of a block, its checksum verified."""
    end = offset + size
    if end + _TRAILER_BYTES > len(table) - _FOOTER_BYTES:
        raise ValueError(
            f"a block of {size} bytes at offset {offset} does not fit into the {len(table)} bytes there are"
        )
    if masked_crc(table[offset : end + 1]) != int.from_bytes(table[end + 1 : end + _TRAILER_BYTES], "little"):
        raise ValueError(f"the block at offset {offset} is damaged: its checksum is wrong")
    compression = table[end]
    if compression:
        kind = "with Snappy" if compression == 1 else f"in the unknown way {compression}"
        raise ValueError(f"the block at offset {offset} is compressed {kind}; only uncompressed tables can be read")
    return table[offset:end]


def _entries(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block. Restart points are for binary search: reading from the front needs none."""
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
        if n_shared > len(key) or value_at + n_value > end or n_key_bytes > _MAX_SHARING * len(block):
            raise ValueError("an entry of a block is damaged")
        key = key[:n_shared] + block[at:value_at]
        at = value_at + n_value
        yield key, block[value_at:at]
