"""Divide text files of any size and number into shards of similar size, which processes can encode independently.

The plan depends only on the files and the size of a shard, not on the number of processes. A finished shard is therefore
still valid when an interrupted `prepare` starts again.
"""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

from MyGPT.data.sources import Piece, cut_near, read_part, read_pieces
from MyGPT.files import json_text

MIN_SHARD_BYTES, MAX_SHARD_BYTES, N_SHARDS = 8_000_000, 256_000_000, 64
"""By default, a shard has the N_SHARDS-th part of the text, but not fewer bytes than the first number and not more than the
second."""


class Span(NamedTuple):
    """The bytes of a file from `start` to `stop`, and the size and modification time (in ns) that the whole file must have."""

    path: Path
    start: int
    stop: int
    size: int
    modified: int

    @property
    def is_whole(self) -> bool:
        """True if the span is a whole file. Only such a span can be an archive, a table or a JSON array."""
        return self.stop - self.start == self.size


Shard = Sequence[Span]
"""The texts of a shard, in order."""


def default_shard_bytes(paths: Iterable[Path]) -> int:
    """Return the size of a shard for these text files."""
    total = sum(path.stat().st_size for path in paths)
    return min(max(total // N_SHARDS, MIN_SHARD_BYTES), MAX_SHARD_BYTES)


def plan_shards(paths: Iterable[Path], shard_bytes: int) -> list[Shard]:
    """Divide files into shards of about `shard_bytes` bytes. Their texts, in this order, are the texts of the files.

    Long text files and files of JSON lines are cut where `cut_near` allows it. Other files are not divided, so the shard of
    a large archive is larger than `shard_bytes`.
    """
    shards: list[list[Span]] = [[]]
    room = shard_bytes
    for path in paths:
        status = path.stat()
        start, size = 0, status.st_size
        while start < size:
            stop = size
            if size - start > room + shard_bytes // 4:
                cut = cut_near(path, start + room)
                if cut is None and shards[-1]:  # The file gets a shard of its own.
                    shards.append([])
                    room = shard_bytes
                    continue
                stop = size if cut is None else cut
            shards[-1].append(Span(path, start, stop, size, status.st_mtime_ns))
            room -= stop - start
            start = stop
            if room <= shard_bytes // 8:
                shards.append([])
                room = shard_bytes
    return [shard for shard in shards if shard]


def read_shard(shard: Shard, text_key: str) -> Iterator[Piece]:
    """Yield the texts of a shard. A file that has changed since the plan was made raises ValueError."""
    for span in shard:
        if span.is_whole:
            yield from read_pieces(span.path, text_key)
        else:
            yield from read_part(span.path, span.start, span.stop, text_key)
        status = span.path.stat()
        if (status.st_size, status.st_mtime_ns) != (span.size, span.modified):
            raise ValueError(f"{span.path} was changed while it was read: repeat the command when it is complete")


def shard_key(shard: Shard, settings: Sequence[object]) -> str:
    """Return a hash of what a shard depends on: the parts of files, and `settings` such as the hash of the tokenizer."""
    spans = [[os.path.realpath(span.path), *span[1:]] for span in shard]
    return hashlib.sha256(json_text([settings, spans]).encode()).hexdigest()
