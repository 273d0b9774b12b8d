"""Where texts come from: built-in and well-known ones by name, files by path or pattern, read piece by piece.

A text file is one document; a `.jsonl` file has one a line, under a key. `.gz` is unpacked on the way.
"""

from __future__ import annotations

import codecs
import glob
import gzip
import io
import os
import re
import zlib
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import IO, Any, NamedTuple

from MyGPT.download import cache_directory, download
from MyGPT.files import parse_json, refuse_binary
from MyGPT.tokenizers.base import refuse_surrogates

BLOCK_BYTES = 1 << 22
MAX_STRETCH = 1 << 26
"""Most characters without a space, and bytes of a line of JSON: what has to be in memory at once."""
MAX_UNPACKING, FREE_BYTES = 200, 1 << 28
"""How many times an archive's length its text may have, and how much it may have in any case. Books have 3 times, logs 50, and
what is made to fill memory or disk a thousand."""


class Piece(NamedTuple):
    """A part of a document, cut where a token ends in any case."""

    text: str
    ends_document: bool


@dataclass(frozen=True)
class Download:
    """A text on the network: where, and the SHA-256 it must have."""

    url: str
    sha256: str


BUILT_IN = {"alice": "alice.txt"}
DOWNLOADS = {
    "tinyshakespeare": Download(
        "https://raw.githubusercontent.com/karpathy/char-rnn/master/data/tinyshakespeare/input.txt",
        "86c4e6aa9db7c042ec79f339dcb96d42b0075e16b8fc2e86bf0ca57e2dc565ed",
    )
}


def find_files(names: str | Iterable[str]) -> list[Path]:
    """The files that names, paths and patterns (`data/*.txt`, `**` for any depth) stand for, each pattern's in order.

    An unknown name, a directory, or a pattern without a file is a ValueError.
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
        elif Path(name).is_dir():
            raise ValueError(f"{name} is a directory: name its files, for example {os.path.join(name, '*.txt')!r}")
        elif glob.has_magic(name):
            found = sorted(path for path in glob.glob(name, recursive=True) if Path(path).is_file())
            if not found:
                raise ValueError(f"no file matches {name!r}")
            paths += map(Path, found)
        else:
            raise ValueError(f"no text {name!r}: it is neither a file nor one of {', '.join([*BUILT_IN, *DOWNLOADS])}")
    if not paths:
        raise ValueError("no text was named; give at least one file")
    return paths


def read_pieces(
    path: Path, text_key: str = "text", advance: Callable[[int], object] = lambda n_bytes: None
) -> Iterator[Piece]:
    """The documents of a file, long ones in pieces of some megabytes.

    `advance` is told how many bytes of the file have been read since. Text that is not UTF-8, a binary file, a damaged
    archive, a line that is no JSON object with a text: a ValueError that names the file and the place.
    """
    with open(path, "rb") as raw:
        inner: Any = gzip.GzipFile(fileobj=raw) if path.suffix == ".gz" else raw
        kind = path.with_suffix("").suffix if path.suffix == ".gz" else path.suffix
        position = 0
        try:
            for piece in _read_jsonl(inner, path, text_key) if kind == ".jsonl" else _read_text(inner, path):
                if inner.tell() > FREE_BYTES + MAX_UNPACKING * raw.tell():
                    raise ValueError(
                        f"{path} unpacks to more than {MAX_UNPACKING} times its length, which no text does"
                    )
                yield piece
                advance(raw.tell() - position)
                position = raw.tell()
            advance(raw.tell() - position)
        except (EOFError, gzip.BadGzipFile, zlib.error) as error:
            raise ValueError(f"{path} is a damaged archive: {error}") from None


def read_documents(paths: Iterable[Path], text_key: str = "text") -> Iterator[str]:
    """The text of each piece of the files, for learning a vocabulary."""
    for path in paths:
        for piece in read_pieces(path, text_key):
            yield piece.text


# Any tokenizer of ours ends a token before the white space behind a visible character.
TOKEN_END = re.compile(r"\S(?=[ \n])")


def _read_text(file: IO[bytes], path: Path) -> Iterator[Piece]:
    decoder = io.IncrementalNewlineDecoder(codecs.getincrementaldecoder("utf-8-sig")(), translate=True)
    pending, offset, n_characters = "", 0, 0
    while True:
        block = file.read(BLOCK_BYTES)
        try:
            text = decoder.decode(block, final=not block)
        except UnicodeDecodeError as error:
            place = offset + len(block) - len(error.object) + error.start
            raise ValueError(f"{path} is not UTF-8 text: byte {place} is 0x{error.object[error.start]:02x}") from None
        refuse_binary(text, path, n_characters)
        offset += len(block)
        pending += text
        n_characters += len(text)
        if not block:
            break
        ends = [match.end() for match in TOKEN_END.finditer(pending, max(0, len(pending) - 10_000))]
        if ends:
            yield Piece(pending[: ends[-1]], False)
            pending = pending[ends[-1] :]
        elif len(pending) > MAX_STRETCH:
            raise ValueError(f"{path} has more than {MAX_STRETCH:,} characters without a space, which no text has")
    if n_characters:
        yield Piece(pending, True)


def _read_jsonl(file: IO[bytes], path: Path, text_key: str) -> Iterator[Piece]:
    for number, line in enumerate(iter(lambda: file.readline(MAX_STRETCH), b""), start=1):
        if len(line) == MAX_STRETCH:
            raise ValueError(f"{path}, line {number} has at least {MAX_STRETCH:,} bytes, a line must have fewer")
        if not line.strip():
            continue
        record = parse_json(line, path, number)
        if not isinstance(record, dict) or not isinstance(record.get(text_key), str):
            raise ValueError(f"{path}, line {number}: no text under the key {text_key!r}")
        try:
            refuse_surrogates(record[text_key])
        except ValueError as error:
            raise ValueError(f"{path}, line {number}: {error}") from None
        if record[text_key]:
            yield Piece(record[text_key], True)
