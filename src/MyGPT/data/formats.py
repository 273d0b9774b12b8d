"""Detect the format of a data file from its name, and open compressed files (.gz or .zst), Parquet files and Arrow files."""

from __future__ import annotations

import gzip
import importlib
import io
import os
import zlib
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any, Literal

from MyGPT.files import MAX_TEXT_BYTES, decode_text, parse_json, read_json, read_text

MAX_UNPACKING, FREE_BYTES = 200, 1 << 28
"""A text in an archive may have at most MAX_UNPACKING * (size of the archive) + FREE_BYTES bytes. Books compress by a
factor of 3, logs by 50, and malicious files, which are made to fill memory or disk, by 1,000. So only malicious files
exceed the limit."""

Format = Literal["text", "json", "lines", "table", "parquet", "arrow"]
"""The format of a data file: text, JSON (an array, or one value per line), lines of JSON, a table, Apache Parquet or Arrow."""

_FORMATS: dict[str, Format] = {
    ".json": "json", ".jsonl": "lines", ".ndjson": "lines", ".csv": "table", ".tsv": "table", ".parquet": "parquet",
    ".arrow": "arrow",
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


def find_arrow_files(path: str | os.PathLike[str]) -> list[Path]:
    """Return the files of a data set that `save_to_disk` of the library datasets wrote, or [path] for a .arrow file.

    The list is empty if `path` is neither. Raises ValueError for a directory with several splits, such as train and test,
    and for a damaged one.
    """
    path = Path(path)
    if path.is_file():
        return [path] if format_of(path) == "arrow" else []
    if (path / "dataset_dict.json").is_file():
        splits = _names(read_json(path / "dataset_dict.json"), "splits", path / "dataset_dict.json")
        if len(splits) == 1:
            return find_arrow_files(path / splits[0])
        example = f", for example {path / splits[0]}" if splits else ""
        raise ValueError(
            f"{path} has the splits {', '.join(splits) or 'none'}: name the directory of one of them{example}"
        )
    state = path / "state.json"
    if not state.is_file():
        return []
    content = read_json(state)
    entries = content.get("_data_files") if isinstance(content, dict) else None
    names = [entry.get("filename") if isinstance(entry, dict) else None for entry in entries or []]
    if content.get("_indices_data_files"):
        raise ValueError(
            f"{path} was saved with indices, by an old version of datasets: open it there and save it again"
        )
    return [path / name for name in _names({"files": names}, "files", state)]


def _names(content: Any, key: str, path: Path) -> list[str]:
    """Return the list of names of files under a key of a JSON object, which was read from `path`."""
    names = content.get(key) if isinstance(content, dict) else None
    if not isinstance(names, list) or not all(isinstance(name, str) and Path(name).name == name for name in names):
        raise ValueError(
            f"{path} does not describe a data set as save_to_disk writes it: {key} must be a list of names"
        )
    return names


def read_arrow(
    files: Iterable[Path],
    path: str | os.PathLike[str],
    column: str | None = None,
    advance: Callable[[int], object] = lambda n_bytes: None,
) -> Iterator[tuple[str, dict[str, Any]]]:
    """Yield (where, record) for each row of a data set in Arrow files, with limited memory; `where` names `path` and the row.

    The arguments `column` and `advance`, and the errors, are those of `read_parquet`. A class label of the library datasets
    becomes the name of the class.
    """
    arrow = _import("pyarrow", path)
    row = 0
    for file in files:
        position, n_bytes, size = 0, 0, os.stat(file).st_size
        try:
            with arrow.OSFile(os.fspath(file)) as source:
                is_file = source.read(6) == b"ARROW1"
                source.seek(0)
                reader = arrow.ipc.open_file(source) if is_file else arrow.ipc.open_stream(source)
                labels = _class_labels(reader.schema, file)
                names = [name for name in reader.schema.names if column in (None, name)]
                stored = (reader.get_batch(i) for i in range(reader.num_record_batches)) if is_file else reader
                for stored_batch in stored:
                    n_bytes += stored_batch.nbytes
                    check_unpacking(n_bytes, size, file)
                    batch = stored_batch.select(names)
                    for start in range(0, stored_batch.num_rows, _PARQUET_ROWS):
                        for record in batch.slice(start, _PARQUET_ROWS).to_pylist():
                            row += 1
                            yield (
                                f"{path}, row {row}",
                                {key: _label(value, labels.get(key)) for key, value in record.items()},
                            )
                    advance(source.tell() - position)
                    position = source.tell()
            advance(size - position)
        except (
            arrow.ArrowException,
            OSError,
            MemoryError,
            UnicodeDecodeError,
            OverflowError,
            NotImplementedError,
        ) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise
            raise ValueError(
                f"{file} is a damaged Arrow file, or one that MyGPT cannot read: {_one_line(error)}"
            ) from None


def _class_labels(schema: Any, path: Path) -> dict[str, list[str]]:
    """Return the names of the classes of each column with class labels, as the library datasets writes them to a schema."""
    described = (schema.metadata or {}).get(b"huggingface")
    content = parse_json(described.decode("utf-8", "replace"), path) if described else {}
    features = content.get("info", {}).get("features", {}) if isinstance(content, dict) else {}
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and isinstance(feature.get("names"), list)
    }


def _label(value: Any, names: list[str] | None) -> Any:
    """Return the name of a class if `names` are given; -1, which stands for no label, becomes None."""
    if names is None or type(value) is not int or value >= len(names):
        return value
    return names[value] if value >= 0 else None


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
