"""Detect the format of a data file from its name, and open files that are compressed as .gz or .zst, and Parquet files."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from MyGPT.files import MAX_TEXT_BYTES, decode_text, read_text

MAX_UNPACKING, FREE_BYTES = 200, 1 << 28
"""A text in an archive may have at most MAX_UNPACKING * (size of the archive) + FREE_BYTES bytes. Books compress by a
factor of 3, logs by 50, and malicious files, which are made to fill memory or disk, by 1,000. So only malicious files
exceed the limit."""

Format = Literal["text", "json", "lines", "table", "parquet"]
"""The format of a data file: text, JSON (an array, or one value per line), lines of JSON, a table, or Apache Parquet."""

_FORMATS: dict[str, Format] = {
    ".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".csv": "table", ".tsv": "table", ".parquet": "parquet",
}  # fmt: skip
_ARCHIVES = (".gz", ".zst")
_ZSTD_BLOCK, _ZSTD_WINDOW = 1 << 11, 1 << 31
"""Bytes of a .zst file that are unpacked at a time, to at most 64 MiB; and the largest window, that of `zstd --long=31`."""
_PARQUET_ROWS, _PARQUET_BUFFER = 32, 1 << 16
"""Rows of a Parquet file that are in memory at a time, and the bytes that are read from it at a time."""


def format_of(path: str | os.PathLike[str]) -> Format:
    """Return the format of a data file from the suffix of its name, in upper or lower case; .gz or .zst after it is ignored."""
    suffixes = [suffix.lower() for suffix in Path(path).suffixes]
    if suffixes[-1:] in ([suffix] for suffix in _ARCHIVES):
        suffixes.pop()
    return _FORMATS.get(suffixes[-1] if suffixes else "", "text")


def is_compressed(path: str | os.PathLike[str]) -> bool:
    """Return True if the name of a data file ends in .gz or .zst."""
    return os.fspath(path).lower().endswith(_ARCHIVES)


@contextmanager
def open_data(path: str | os.PathLike[str]) -> Iterator[tuple[IO[bytes], IO[bytes]]]:
    """Open a data file for reading. Yield the file with the unpacked bytes, and the file on the disk.

    The two are the same file unless the name ends in .gz or .zst. A damaged archive, or one that unpacks to more than
    `MAX_UNPACKING` allows, raises ValueError when it is read. For .zst, the package zstandard must be installed.
    """
    with open(path, "rb") as raw:
        if not is_compressed(path):
            yield raw, raw
            return
        is_zstd = os.fspath(path).lower().endswith(".zst")
        try:
            yield (
                io.BufferedReader(
                    _Unpacked(raw, _ZstdFile(raw, path) if is_zstd else gzip.GzipFile(fileobj=raw), path)
                ),
                raw,
            )
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged archive: {error}") from None


class _Unpacked(io.RawIOBase):
    """The unpacked bytes of an archive, limited by `MAX_UNPACKING`."""

    def __init__(
        self, raw: IO[bytes], unpacked: io.BufferedIOBase | io.RawIOBase, path: str | os.PathLike[str]
    ) -> None:
        self._raw, self._unpacked, self._path, self._n_bytes = raw, unpacked, path, 0

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        n = self._unpacked.readinto(buffer)
        self._n_bytes += n
        check_unpacking(self._n_bytes, self._raw.tell(), self._path)
        return n


def check_unpacking(n_bytes: int, n_packed: int, path: str | os.PathLike[str]) -> None:
    """Raise ValueError if `n_packed` bytes of the file `path` unpacked to more bytes than `MAX_UNPACKING` allows."""
    if n_bytes > FREE_BYTES + MAX_UNPACKING * n_packed:
        raise ValueError(f"{path} unpacks to more than {MAX_UNPACKING} times its size, which no text file does")


class _ZstdFile(io.RawIOBase):
    """The unpacked bytes of a .zst file, which may consist of several frames.

    zstandard's own reader returns the beginning of a truncated frame without an error. This class raises EOFError instead.
    """

    def __init__(self, raw: IO[bytes], path: str | os.PathLike[str]) -> None:
        zstandard = _import("zstandard", path)
        self._raw, self._path, self._error = raw, path, zstandard.ZstdError
        self._decompressor = zstandard.ZstdDecompressor(max_window_size=_ZSTD_WINDOW)
        self._frame: Any = None
        self._unpacked = memoryview(b"")

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._unpacked:
            packed = self._raw.read(_ZSTD_BLOCK)
            if not packed:
                if self._frame is not None:
                    raise EOFError("Compressed file ended before the end-of-stream marker was reached")
                return 0
            if self._frame is None:
                self._frame = self._decompressor.decompressobj()
            try:
                self._unpacked = memoryview(self._frame.decompress(packed))
            except self._error as error:
                raise ValueError(f"{self._path} is a damaged archive: {error}") from None
            if self._frame.eof:  # The next frame follows.
                self._raw.seek(-len(self._frame.unused_data), os.SEEK_CUR)
                self._frame = None
        n = min(len(buffer), len(self._unpacked))
        buffer[:n] = self._unpacked[:n]
        self._unpacked = self._unpacked[n:]
        return n


def read_parquet(
    path: str | os.PathLike[str], column: str | None = None, advance: Callable[[int], object] = lambda n_bytes: None
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) for each row of a Parquet file, with limited memory; `where` names the file and row.

    A record is a dict with the value of `column`, if the file has this column, or of all columns if it is None. `advance`
    is called with a number of bytes after each row group; the numbers add up to the size of the file. A damaged file, or one
    that unpacks to more than `MAX_UNPACKING` allows, raises ValueError. The package pyarrow must be installed.
    """
    parquet = _import("pyarrow.parquet", path)
    arrow_error = _import("pyarrow", path).ArrowException
    size, position, n_bytes, row = os.stat(path).st_size, 0, 0, 0
    try:
        with parquet.ParquetFile(path, pre_buffer=False, buffer_size=_PARQUET_BUFFER) as file:
            columns = None if column is None else [column] if column in file.schema_arrow.names else []
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_PARQUET_ROWS, [group], columns, use_threads=False):
                    n_bytes += batch.nbytes
                    check_unpacking(n_bytes, size, path)
                    for record in batch.to_pylist():
                        row += 1
                        yield f"{path}, row {row}", record
                end = size * (group + 1) // file.num_row_groups
                advance(end - position)
                position = end
        advance(size - position)
    except (arrow_error, OSError, MemoryError, UnicodeDecodeError, OverflowError, NotImplementedError) as error:
        if isinstance(error, OSError) and error.errno is not None:
            raise
        raise ValueError(
            f"{path} is a damaged Parquet file, or one that MyGPT cannot read: {_one_line(error)}"
        ) from None


def refuse_archive(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if a Parquet file is compressed once more, because it can only be read from its end."""
    if is_compressed(path):
        raise ValueError(f"{path} is a compressed Parquet file: unpack it, its columns are compressed already")


def _one_line(error: BaseException) -> str:
    """Return the message of an error in one line of at most 200 characters."""
    return f"{' '.join(str(error).split()):.200}" or type(error).__name__


def _import(module: str, path: str | os.PathLike[str]) -> Any:
    """Return the module that reads the file `path`. If it is not installed, raise ValueError with the way to install it."""
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ValueError(f"to read {path}, install {package}, for example with pip install {package}") from None


def read_data(path: str | os.PathLike[str]) -> str:
    """Return the text of a whole file, which may be compressed as .gz or .zst, with `\\n` line ends.

    A file that is binary, damaged or larger than MAX_TEXT_BYTES raises ValueError.
    """
    if not is_compressed(path):
        return read_text(path)
    with open_data(path) as (file, _):
        data = file.read(MAX_TEXT_BYTES + 1)
    if len(data) > MAX_TEXT_BYTES:
        raise ValueError(f"{path} unpacks to more than {MAX_TEXT_BYTES:,} bytes, the limit")
    return decode_text(data, path)
