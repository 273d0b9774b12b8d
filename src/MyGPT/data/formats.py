"""Detect the format of a data file from its name, and open files that are compressed as .gz."""

from __future__ import annotations

import gzip
import io
import os
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from MyGPT.files import MAX_TEXT_BYTES, decode_text, read_text

MAX_UNPACKING, FREE_BYTES = 200, 1 << 28
"""A text in a .gz file may have at most MAX_UNPACKING * (size of the .gz file) + FREE_BYTES bytes. Books compress by a
factor of 3, logs by 50, and malicious files, which are made to fill memory or disk, by 1,000. So only malicious files
exceed the limit."""

Format = Literal["text", "json", "lines", "table"]
"""The format of a data file: ordinary text, JSON (an array, or one value per line), lines of JSON, or a table."""

_FORMATS: dict[str, Format] = {".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".csv": "table", ".tsv": "table"}


def format_of(path: str | os.PathLike[str]) -> Format:
    """Return the format of a data file from the suffix of its name, in upper or lower case; .gz after it is ignored."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] == [".gz"]:
        suffixes.pop()
    return _FORMATS.get(suffixes[-1] if suffixes else "", "text")


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Return True if the name of a data file ends in .gz."""
    return os.fspath(path).lower().endswith(".gz")


@contextmanager
def open_data(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a data file for reading. Yield the file with the unpacked bytes, and the file on the disk.

    The two are the same file unless the name ends in .gz. A damaged archive, or one that unpacks to more than
    `MAX_UNPACKING` allows, raises ValueError when it is read.
    """
    with open(path, "rb") as raw:
        if not is_compressed(path):
            yield raw, raw
            return
        try:
            yield io.BufferedReader(_Unpacked(raw, path)), raw
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged archive: {error}") from None


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of a .gz file, limited by `MAX_UNPACKING`."""

    def __init__(self, raw: IO[bytes], path: str | os.PathLike[str]) -> None:
        self._raw, self._path = raw, path
        self._unpacked = gzip.GzipFile(fileobj=raw)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._unpacked.readinto(buffer)
        if self._unpacked.tell() > FREE_BYTES + MAX_UNPACKING * self._raw.tell():
            raise ValueError(
                f"{self._path} unpacks to more than {MAX_UNPACKING} times its size, which no text file does"
            )
        return n


def read_data(path: str | os.PathLike[str]) -> str:
    """Return the text of a whole file, which may be compressed as .gz, with `\\n` line ends.

    A file that is binary, damaged or larger than MAX_TEXT_BYTES raises ValueError.
    """
    if not is_compressed(path):
        return read_text(path)
    with open_data(path) as (file, _):
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} unpacks to more than {MAX_TEXT_BYTES:,} bytes, the limit")
    return decode_text(data, path)
