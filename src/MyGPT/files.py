"""Files that survive us, and files that we did not write.

What stands under its final name is whole, whatever fails while it is written: everything is written beside its place,
flushed to the disk and renamed. What is read may be damaged or made to harm: it is a value, or one ValueError.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from pathlib import Path
from typing import IO, Any

MAX_TEXT_BYTES = 1 << 32
"""A file that is read whole may have so many; longer texts are read in pieces (data/sources.py)."""
MAX_JSON_BYTES = 1 << 28
"""Ten times the largest tokenizer.json that is in use."""
_MAX_NESTING = 100  # Python gives up at about a thousand, and then in whatever walks through a value next


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """A file object (UTF-8 text with `\\n`, or bytes with mode "wb") that becomes `path` when the block ends well.

    If the block fails, `path` stays as it was and nothing is left behind. An old file's permissions stay, and a link
    still points where it did.
    """
    path = _real(path)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    text_options = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        with os.fdopen(descriptor, mode, **text_options) as file:  # type: ignore[call-overload]
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.chmod(temporary, _mode(path, 0o666))
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
    _sync_directory(path.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], replaces: Sequence[str] = ()) -> Iterator[Path]:
    """A new, empty directory to fill, which takes the place of `path` when the block ends well.

    Files of the old directory that the new one does not have are carried over, since they may be the user's, but for
    those whose names match one of the patterns `replaces`. Its permissions stay, and a link still points where it did.
    There is one instant between two renames in which `path` is missing; `restore_directory` undoes a kill at that instant.
    The current directory cannot be replaced: a ValueError.
    """
    path = _real(path)
    if Path.cwd().is_relative_to(path):
        raise ValueError(
            f"{path} is replaced as a whole, and cannot be while it is the current directory: name another"
        )
    path.parent.mkdir(parents=True, exist_ok=True)
    restore_directory(path)
    temporary = Path(tempfile.mkdtemp(dir=path.parent, prefix=f".{path.name}."))
    try:
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                file.chmod(_default_mode(0o666))  # safetensors' are for their owner alone
                _sync_file(file)
        _sync_directory(temporary)
        if path.exists():
            _carry_over(path, temporary, replaces)
        os.chmod(temporary, _mode(path, 0o777))
        if path.exists():
            os.rename(path, _aside(path))
        os.rename(temporary, path)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        restore_directory(path)
        raise
    _sync_directory(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)  # what stays is cleared up by the next call


def restore_directory(path: str | os.PathLike[str]) -> None:
    """Brings `path` back if a kill struck while `atomic_directory` was replacing it."""
    path = _real(path)
    aside = _aside(path)
    if not aside.exists():
        return
    if path.exists():
        shutil.rmtree(aside, ignore_errors=True)  # The new directory had arrived; only the clearing up was missed.
    else:
        os.rename(aside, path)


def remove_leftovers(directory: str | os.PathLike[str], patterns: Sequence[str]) -> None:
    """Removes what `atomic_write` and `atomic_directory` of names like these left in a directory when they were killed.

    Only for a directory in which no other process writes. What a kill between two renames left is brought back.
    """
    for entry in Path(directory).iterdir():
        name, dot, suffix = entry.name.removeprefix(".").rpartition(".")
        if not entry.name.startswith(".") or not dot or not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if suffix == "previous":
            restore_directory(entry.parent / name)
        elif re.fullmatch(r"[a-z0-9_]{8}", suffix):  # as tempfile names them
            shutil.rmtree(entry) if entry.is_dir() else entry.unlink()


def sha256_of(path: str | os.PathLike[str]) -> str:
    """SHA-256 of the file's bytes, in hexadecimal, read in bounded memory."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """The text of a UTF-8 file, line ends as `\\n`; anything else is a ValueError that says at which byte.

    So is a file of more than max_bytes, before any of it is read.
    """
    size = os.stat(path).st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes, at most {max_bytes:,} are read")
    data = Path(path).read_bytes()
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from None
    refuse_binary(text, path)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def read_json(path: str | os.PathLike[str]) -> Any:
    """The value in a JSON file. No UTF-8, no JSON, too long, nested too deep: a ValueError that names the file."""
    if stat.S_ISFIFO(os.stat(path).st_mode):  # would wait for a writer for ever
        raise ValueError(f"{path} is a pipe, a JSON file must be an ordinary file")
    return parse_json(read_text(path, MAX_JSON_BYTES), path)


def parse_json(text: str | bytes, path: str | os.PathLike[str], line: int | None = None) -> Any:
    """The value in a JSON text, which is one line of the file `path` or all of it; else a ValueError that names the place."""
    try:
        value = json.loads(text)
        problem = f"nested more than {_MAX_NESTING} deep" if _is_deep(value) else None
    except json.JSONDecodeError as error:
        line, problem = line or error.lineno, f"not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number of thousands of digits; brackets in brackets
        problem = f"not JSON: {error}"
    if problem is not None:
        raise ValueError(f"{path}{'' if line is None else f', line {line}'}: {problem}")
    return value


def refuse_binary(text: str, path: str | os.PathLike[str], n_before: int = 0) -> None:
    """A ValueError if the text, n_before characters into the file, holds NUL, which few text files do and most others."""
    position = text.find("\0")
    if position >= 0:
        raise ValueError(f"{path} looks like a binary file: it holds a NUL character at position {n_before + position}")


def _is_deep(value: Any) -> bool:
    level = [value]
    for _ in range(_MAX_NESTING):
        level = [
            inner
            for outer in level
            if isinstance(outer, (dict, list))
            for inner in (outer.values() if isinstance(outer, dict) else outer)
        ]
        if not level:
            return False
    return True


def _aside(path: Path) -> Path:
    return path.parent / f".{path.name}.previous"


def _carry_over(old: Path, new: Path, replaces: Sequence[str]) -> None:
    for entry in old.iterdir():
        target = new / entry.name
        if target.exists() or any(fnmatch(entry.name, pattern) for pattern in replaces):
            continue
        if entry.is_dir() and not entry.is_symlink():
            shutil.copytree(entry, target, symlinks=True)
        else:
            shutil.copy2(entry, target, follow_symlinks=False)


def _real(path: str | os.PathLike[str]) -> Path:
    return Path(os.path.realpath(path))


def _mode(path: Path, default: int) -> int:
    """The permissions of `path`, or of a new one: mkstemp's and mkdtemp's are for secrets."""
    if path.exists():
        return stat.S_IMODE(path.stat().st_mode)
    return _default_mode(default)


def _default_mode(mode: int) -> int:
    """What the user's umask leaves of it."""
    mask = os.umask(0)
    os.umask(mask)
    return mode & ~mask


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _sync_directory(path: Path) -> None:
    if os.name == "nt":  # Windows cannot open a directory
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
