"""Find text files by name, path or pattern, and read them in pieces, so that files may be larger than the memory.

A text file is one document. A `.jsonl`, `.ndjson` or `.json` file has one JSON object per line, with the text of a
document under a given key. A `.json` file may also be an array of such objects. In a table (`.csv` or `.tsv`), the key names
a column. An array or table must fit into the memory. All files may be compressed as `.gz` or `.zst`. A `.parquet` file has
the text of a document in each row of a column, and so has a directory that `save_to_disk` of the library datasets wrote.
"""

from __future__ import annotations

import codecs
import glob
import io
import os
import re
from collections.abc import Callable, Iterable, Iterator
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

from MyGPT.data.formats import (
    find_arrow_files,
    format_of,
    is_compressed,
    open_data,
    read_arrow,
    read_parquet,
    refuse_archive,
)
from MyGPT.data.records import ANSWER_KEYS, json_items, table_items
from MyGPT.data.tokens import is_prepared
from MyGPT.download import cache_directory, download
from MyGPT.files import decode_text, parse_json, refuse_binary
from MyGPT.messages import did_you_mean, near_path, quote
from MyGPT.tokenizers.base import refuse_surrogates

BLOCK_BYTES = 1 << 16
"""Number of bytes of a text file that are read at a time."""
MAX_STRETCH = 1 << 26
"""Maximum number of characters between two spaces of a text file, and of bytes in a line of JSON. Such a
stretch of text is held in memory as a whole, so a longer one raises ValueError."""


class Piece(NamedTuple):
    """A part of a document, or a whole one. It ends where a token ends, so pieces can be encoded one by one.

    `ends_document` is True for the last piece of each document.
    """

    text: str
    ends_document: bool


class Download(NamedTuple):
    """The URL of a text file, and the SHA-256 that the downloaded file must have."""

    url: str
    sha256: str


BUILT_IN = {"alice": "alice.txt"}
DOWNLOADS = {
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}

_SYNONYMS = {"alice": "alice_in_wonderland wonderland", "tinyshakespeare": "shakespeare shakespeare_char tiny"}


def find_files(names: str | Iterable[str], report: Callable[[str], object] = lambda message: None) -> list[Path]:
    """Return the paths of the text files that are given by one or several names, paths or patterns.

    A name is "alice", a book that is part of MyGPT, or "tinyshakespeare", a text that is downloaded once. A pattern may
    contain `*`, and `**` for any number of directories; its files are sorted. A file that is named more than once, also
    under another path, occurs once in the result, and `report` is called with a message. An unknown name, a directory, or
    a pattern without files raises ValueError.
    """
    paths: list[Path] = []
    for name in [names] if isinstance(names, (str, os.PathLike)) else names:
        name = os.fspath(name)
        if Path(name).is_file():
            paths.append(Path(name))
        elif name in BUILT_IN:
            paths.append(Path(str(resources.files("MyGPT") / "assets" / BUILT_IN[name])))
        elif name in DOWNLOADS:
            source = DOWNLOADS[name]
            paths.append(download(source.url, cache_directory() / f"{name}.txt", sha256=source.sha256))
        elif is_prepared(name):
            raise ValueError(
                f"{name} is a directory made by mygpt prepare, which mygpt train reads: name text files here"
            )
        elif files := find_arrow_files(name):
            paths += files
        elif Path(name).is_dir():
            raise ValueError(f"{name} is a directory: name its files, for example {quote(os.path.join(name, '*.txt'))}")
        elif glob.has_magic(name):
            found = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
            if not found:
                raise ValueError(f"no file matches {name!r}")
            paths += map(Path, found)
        else:
            names = [*BUILT_IN, *DOWNLOADS]
            hint = did_you_mean(name, names, _SYNONYMS) or near_path(name)
            raise ValueError(f"no text {name!r}: it is neither a file nor one of {', '.join(names)}{hint}")
    if not paths:
        raise ValueError("no text was given: name at least one file")
    return _without_repeats(paths, report)


def _without_repeats(paths: Iterable[Path], report: Callable[[str], object]) -> list[Path]:
    """Return the paths without those that lead to the same file as an earlier path. Each of these is reported."""
    first_path: dict[tuple[int, int], Path] = {}
    for path in paths:
        status = path.stat()
        first = first_path.setdefault((status.st_dev, status.st_ino), path)
        if first is not path:
            also = "" if first == path else f" (also named {first})"
            report(f"{path}{also} is named more than once and is read once")
    return list(first_path.values())


def read_pieces(
    path: Path, text_key: str = "text", advance: Callable[[int], object] = lambda n_bytes: None
) -> Iterator[Piece]:
    """Yield the documents of a text file, JSON file or table, which may be compressed as .gz or .zst, or of a Parquet file.

    A long text file is yielded in several pieces. Each record of the other files has its text under the key `text_key`.
    After each piece, `advance` is called with the number of bytes that were read since its last call. A damaged or
    binary file raises ValueError with the path and the position.
    """
    if format_of(path) == "parquet":
        refuse_archive(path)
        yield from _text_of_records(read_parquet(path, text_key, advance), path, text_key)
        return
    if format_of(path) == "arrow":
        yield from _text_of_records(read_arrow([path], path, text_key, advance), path, text_key)
        return
    with open_data(path) as (file, raw):
        position = 0
        is_text = format_of(path) == "text"
        for piece in _read_text(file, path) if is_text else _read_records(file, path, text_key):
            yield piece
            advance(raw.tell() - position)
            position = raw.tell()
        advance(raw.tell() - position)


def read_part(path: Path, start: int, stop: int, text_key: str = "text") -> Iterator[Piece]:
    """Yield the pieces of the bytes from `start` to `stop` of a text file or a file of JSON lines, as `read_pieces` does.

    The part must begin and end where `cut_near` allows it. Error messages give positions and lines in the whole file.
    """
    with open(path, "rb") as whole:
        file = io.BufferedReader(_Part(whole, start, stop))
        if format_of(path) == "text":
            yield from _read_text(file, path, start, ends_document=stop == os.fstat(whole.fileno()).st_size)
            return
        try:
            yield from _read_records(file, path, text_key, may_be_array=False)
        except ValueError as error:
            place = re.match(rf"{re.escape(f'{path}, line ')}(\d+)", str(error))
            if place is None:
                raise
            line = int(place[1]) + _count_lines(path, start)
            raise ValueError(f"{path}, line {line}{str(error)[place.end() :]}") from None


class _Part(io.RawIOBase):
    """The bytes from `start` to `stop` of a file, as a file of their own."""

    def __init__(self, whole: IO[bytes], start: int, stop: int) -> None:
        self._whole, self._left = whole, stop - start
        whole.seek(start)

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        view = memoryview(buffer)[: self._left]
        n_bytes: int = self._whole.readinto(view)  # type: ignore[attr-defined]
        self._left -= n_bytes
        return n_bytes


def _count_lines(path: Path, n_bytes: int) -> int:
    """Return the number of line ends in the first `n_bytes` bytes of a file."""
    with open(path, "rb") as whole:
        part = _Part(whole, 0, n_bytes)
        return sum(block.count(b"\n") for block in iter(lambda: part.read(BLOCK_BYTES), b""))


def cut_near(path: Path, position: int) -> int | None:
    """Return the first byte from `position` on where the file can be cut into parts for `read_part`.

    Return None if the file cannot be cut there: it is an archive, a table or a JSON array; or it has no suitable place up
    to its end or in the next `MAX_STRETCH` characters, which no valid file has.
    """
    kind = format_of(path)
    if kind not in ("text", "lines", "json") or is_compressed(path):
        return None
    with open(path, "rb") as file:
        if kind == "json" and not file.read(4096).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"{"):
            return None
        return _text_end(file, position) if kind == "text" else _line_end(file, position)


_TOKEN_END_BYTES = re.compile(rb"[!-~\x80-\xff](?=[ \n\r])")
"""Finds the bytes for which `TOKEN_END` may match after they are decoded and `\r` is replaced."""
_SEARCH_BYTES = 1 << 16


def _token_ends(data: bytes, start: int = 0) -> Iterator[int]:
    """Yield the positions after `start` in UTF-8 bytes where a token ends."""
    for match in _TOKEN_END_BYTES.finditer(data, start):
        end = match.end()
        character = data[max(end - 4, 0) : end].decode("utf-8", "ignore")[-1:]  # It has at most four bytes.
        if character and not character.isspace():
            yield end


def _text_end(file: IO[bytes], position: int) -> int | None:
    """Return the first end of a token in a text file at the byte `position` or later, or None.

    Visible text follows the result, because the last piece of a document must show whether it ends with the end-of-text
    token, which white space may follow.
    """
    start = max(position - 4, 0)  # A character has at most four bytes.
    file.seek(start)
    block = file.read(_SEARCH_BYTES)
    while block and start < position + 4 * MAX_STRETCH:
        for end in _token_ends(block):
            if start + end >= position:
                return start + end if _has_visible_text(file, start + end) else None
        if len(block) <= 4:
            break
        start += len(block) - 4
        file.seek(start)
        block = file.read(_SEARCH_BYTES)
    return None


def _has_visible_text(file: IO[bytes], start: int) -> bool:
    """Return True if a text file has characters other than white space after the byte `start`."""
    file.seek(start)
    return any(block.decode("utf-8", "ignore").strip() for block in iter(lambda: file.read(_SEARCH_BYTES), b""))


def _line_end(file: IO[bytes], position: int) -> int | None:
    """Return the first start of a line at the byte `position` or later, or None. There is a line after the result."""
    file.seek(position - 1)
    start = position - 1 + len(file.readline(MAX_STRETCH))
    file.seek(start - 1)
    return start if file.read(1) == b"\n" and file.read(1) else None


def read_documents(paths: Iterable[Path], text_key: str = "text") -> Iterator[str]:
    """Return an iterator over the texts in files, to train a tokenizer. Long documents are split into several texts.

    `text_key` is the key of the text in each record of a JSON file.
    """
    return (piece.text for path in paths for piece in read_pieces(path, text_key))


# In every tokenizer of MyGPT, a token ends between a visible character and the space or line end after it.
TOKEN_END = re.compile(r"\S(?=[ \n])")


def _read_text(file: IO[bytes], path: Path, start: int = 0, ends_document: bool = True) -> Iterator[Piece]:
    """Yield a text file, which is one document, in pieces. Line ends become `\\n`; `path` is for error messages.

    `file` may also be a part of the text that begins at byte `start`. Unless it is the last part, `ends_document` is False.
    """
    # Text is cut before it is decoded, because characters above U+FFFF make a whole string four times as large.
    pending = file.read(len(codecs.BOM_UTF8))
    if start == 0 and pending == codecs.BOM_UTF8:  # Only the first character of a file is a byte order mark.
        start, pending = len(pending), b""
    while block := file.read(
        max(BLOCK_BYTES, len(pending))
    ):  # A long stretch without spaces is copied only a few times.
        pending += block
        if end := _last_cut(pending):
            yield Piece(_decoded(pending[:end], path, start), False)
            start, pending = start + end, pending[end:]
        elif len(pending) > MAX_STRETCH and len(_decoded(pending, path, start, is_complete=False)) > MAX_STRETCH:
            raise ValueError(f"{path} has more than {MAX_STRETCH:,} characters without a space, which no text file has")
    if pending:
        yield Piece(_decoded(pending, path, start), ends_document)


def _last_cut(data: bytes) -> int | None:
    """Return the last position in UTF-8 bytes where a token ends and visible text follows, or None.

    The last piece of a document must have visible text, because it shows whether the document ends with `<|endoftext|>`.
    """
    for reach in (100, 10_000, 1_000_000):
        for end in reversed(list(_token_ends(data, max(0, len(data) - reach)))):
            if data[end:].decode("utf-8", "ignore").strip():
                return end
    return None


def _decoded(data: bytes, path: Path, start: int, is_complete: bool = True) -> str:
    """Return UTF-8 bytes, which begin at byte `start` of a file, as text with `\\n` line ends.

    With is_complete=False, a part of a character at the end is ignored. Raises ValueError for a binary file.
    """
    try:
        text = codecs.utf_8_decode(data, "strict", is_complete)[0]
    except UnicodeDecodeError as error:
        position, byte = start + error.start, data[error.start]
        raise ValueError(f"{path} is not UTF-8 text: byte {position} is 0x{byte:02x}") from None
    refuse_binary(data, path, start)
    return text.replace("\r\n", "\n").replace("\r", "\n") if b"\r" in data else text


def _read_records(file: Any, path: Path, text_key: str, may_be_array: bool = True) -> Iterator[Piece]:
    """Yield the text under `text_key` of each record in a JSON file or table; skip empty texts.

    `path` is for error messages. With may_be_array=False, a `.json` file must have one object per line.
    """
    is_array = (
        may_be_array and format_of(path) == "json" and file.peek(1).lstrip(b"\xef\xbb\xbf \t\r\n").startswith(b"[")
    )
    items: Iterator[tuple[str, Any]]  # each with the place of the record, for error messages
    if format_of(path) == "table":
        items = table_items(decode_text(file.read(), path), path)
    else:
        items = json_items(decode_text(file.read(), path), path) if is_array else _json_lines(file, path)
    yield from _text_of_records(items, path, text_key)


def _text_of_records(items: Iterable[tuple[str, Any]], path: Path, text_key: str) -> Iterator[Piece]:
    """Yield the text under `text_key` of each record in `items`, pairs of a place for error messages and a record."""
    for where, record in items:
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            is_table = format_of(path) in ("table", "parquet", "arrow")
            key = f"in the column {text_key!r}" if is_table else f"under the key {text_key!r}"
            raise ValueError(f"{where}: no text {key}{_hint(record, text_key)}")
        refuse_surrogates(record[text_key], f"{where}: ")
        if record[text_key]:
            yield Piece(record[text_key], True)


def _hint(record: Any, text_key: str) -> str:
    """Return the end of an error message about a record that has no text: what to do with such a file, if it is known."""
    if isinstance(record, dict) and any(key in record for key in ANSWER_KEYS if key != "text"):
        return ": mygpt finetune reads such records"
    if isinstance(record, dict) and text_key not in record:
        return f", only {', '.join(map(repr, record))[:80]}: mygpt prepare --text_key names another" if record else ""
    return ": give an array of records a name that ends in .json" if isinstance(record, list) else ""


def _json_lines(file: IO[bytes], path: Path) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for each line of JSON in a file of any size; `where` names the file and line of the value."""
    for number, line in enumerate(iter(lambda: file.readline(MAX_STRETCH), b""), start=1):
        if len(line) == MAX_STRETCH:
            raise ValueError(f"{path}, line {number} has {MAX_STRETCH:,} bytes or more, a line must have fewer")
        if not line.strip():
            continue
        try:
            record = parse_json(line, path, number)
        except ValueError as error:
            raise ValueError(f"{error} (only a .json file may be an array; others need one object per line)") from None
        yield f"{path}, line {number}", record
