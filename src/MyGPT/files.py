"""Write files so that a failed write leaves no incomplete file, and read files of unknown origin safely.

Writing: content goes to a temporary file beside the target, is flushed to the disk, and is then renamed. A reader never
sees half a file. A temporary file is locked while it is written, so the next writer of the same target recognises and
removes those that a killed process left. Reading: a damaged or hostile file raises ValueError with the file's name, and
never exhausts memory.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import math
import os
import re
import secrets
import shutil
import stat
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import IO, Any

try:
    import fcntl
except ImportError:  # Windows, which refuses to rename a directory while one of its files is open
    fcntl = None  # type: ignore[assignment]
_HAS_LOCKS = fcntl is not None

MAX_TEXT_BYTES = 1 << 32
"""Size in bytes of the largest file that `read_text` accepts by default. data/sources.py reads larger files in pieces."""
MAX_JSON_BYTES = 1 << 28
"""Size in bytes of the largest file that `read_json` accepts: ten times the largest tokenizer.json in use."""
_MAX_WAIT_FOR_READERS = 10.0
"""Seconds after which `atomic_directory` replaces a directory although another process is still reading it."""
_MAX_NESTING = 100  # Recursive code that walks through a deeper value could exceed Python's recursion limit of 1,000.


def check_output_file(path: str | os.PathLike[str]) -> None:
    """Raise OSError, with a message that names the directory, if no file can be written at `path`."""
    path = Path(path)
    if path.is_dir():
        raise IsADirectoryError(f"cannot write the file {path}: it is a directory")
    if not path.parent.exists():
        raise FileNotFoundError(f"cannot write {path}: there is no directory {path.parent}")
    _check_directory(path.parent, f"cannot write {path}")


def check_output_directory(path: str | os.PathLike[str]) -> None:
    """Raise OSError, with a message that names the directory, if no directory can be created or written at `path`."""
    path = Path(path)
    existing = next(place for place in (path, *path.parents) if os.path.lexists(place))
    _check_directory(existing, f"cannot write the directory {path}")


def _check_directory(directory: Path, problem: str) -> None:
    """Raise OSError if no file can be created in `directory`. The message begins with `problem`."""
    if not directory.is_dir():
        raise NotADirectoryError(f"{problem}: {directory} is not a directory")
    if not os.access(directory, os.W_OK | os.X_OK):
        raise PermissionError(f"{problem}: you have no permission to write in {directory}")


@contextmanager
def atomic_write(path: str | os.PathLike[str], mode: str = "w") -> Iterator[IO[Any]]:
    """Open a temporary file for writing, and rename it to `path` when the `with` block succeeds.

    `mode` is "w" for UTF-8 text with `\\n` line ends, or "wb" for bytes. If the block raises an exception, an existing
    file at `path` stays unchanged and the temporary file is removed. The new file has the permissions of the file that
    it replaces. If `path` is a symbolic link, the file to which it points is replaced.
    """
    shown, path = Path(path), _real(path)
    check_output_file(path if shown.is_symlink() else shown)
    is_new = not path.exists()
    # The kernel applies the user's umask to these permissions. A private file stays private while it is written.
    permissions = 0o666 if is_new else stat.S_IMODE(path.stat().st_mode)
    _remove_abandoned(path)
    temporary = _temporary(path)
    text_options: dict[str, Any] = {} if "b" in mode else {"encoding": "utf-8", "newline": "\n"}
    try:
        opener = partial(_open_locked, mode=permissions)
        with open(temporary, mode.replace("w", "x"), opener=opener, **text_options) as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        if not is_new:
            os.chmod(temporary, permissions)
        os.replace(temporary, path)
    except BaseException as error:
        temporary.unlink(missing_ok=True)
        _rename_in(error, temporary, shown)
        raise
    _sync_directory(path.parent)


@contextmanager
def atomic_directory(path: str | os.PathLike[str], replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a new, empty directory, and rename it to `path` when the `with` block succeeds.

    Files in the old directory at `path` that the new directory lacks are copied, because they may belong to the user.
    Old files whose names match one of the patterns in `replaces`, such as "*.safetensors", are not copied. The new
    directory has the permissions of the old one. If `path` is a symbolic link, the directory to which it points is
    replaced. A `path` that contains the current directory raises ValueError.

    For an instant, the old directory is already renamed and the new one is not, so `path` does not exist. Readers use
    `present_directory` and `reading`, and the next writer puts the old directory back if this process is killed then.
    """
    shown, path = Path(path), _real(path)
    _check_replaceable(shown)
    _remove_abandoned(path)
    temporary = _temporary(path)
    lock = None
    try:
        lock = _make_locked_directory(temporary)
        mode = stat.S_IMODE(temporary.stat().st_mode)
        if path.exists():
            os.chmod(temporary, stat.S_IMODE(path.stat().st_mode) | 0o700)
        yield temporary
        _replace_directory(path, temporary, replaces, mode)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        restore_directory(path)
        _rename_in(error, temporary, shown)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _finish_replacement(path)


@contextmanager
def resumable_directory(path: str | os.PathLike[str], replaces: Sequence[str] = ()) -> Iterator[Path]:
    """Yield a directory for unfinished work, and rename its subdirectory `data` to `path` when the `with` block succeeds.

    The directory has the name that `unfinished_directory` returns. Unlike the directory of `atomic_directory`, it stays if
    the block raises an exception or the process is killed, and the next call yields it with its content. After
    success it is removed with everything that is in it besides `data`. `replaces` has the same meaning as in
    `atomic_directory`.

    Only one process at a time can be within the block. Another one raises BlockingIOError, except on Windows and on file
    systems without locks.
    """
    shown, path = Path(path), _real(path)
    _check_replaceable(shown)
    _remove_abandoned(path)
    work = unfinished_directory(path)
    lock = _lock_directory(work, shown)
    try:
        if path.exists():
            os.chmod(work, stat.S_IMODE(path.stat().st_mode) | 0o700)
        (work / "data").mkdir(exist_ok=True)
        yield work
        _replace_directory(path, work / "data", replaces, stat.S_IMODE((work / "data").stat().st_mode))
        shutil.rmtree(work, ignore_errors=True)  # The next call removes what could not be removed now.
    except BaseException as error:
        restore_directory(path)
        _rename_in(error, work, shown)
        raise
    finally:
        if lock is not None:
            os.close(lock)
    _finish_replacement(path)


def unfinished_directory(path: str | os.PathLike[str]) -> Path:
    """Return the path of the directory that `resumable_directory` yields for `path`. It is beside `path`."""
    path = _real(path)
    return path.parent / f".{path.name}.unfinished"


def _check_replaceable(path: Path) -> None:
    """Raise an error if the directory `path` cannot be replaced or created, and create its parent.

    An old directory that a killed process has moved aside is put back.
    """
    real = _real(path)
    if Path.cwd().is_relative_to(real):
        raise ValueError(f"{real} cannot be replaced while it contains the current directory: choose another path")
    check_output_directory(real if path.is_symlink() else path)
    real.parent.mkdir(parents=True, exist_ok=True)
    restore_directory(real)


def _replace_directory(path: Path, new: Path, replaces: Sequence[str], mode: int) -> None:
    """Flush the directory `new` to the disk, and rename it to `path`. See `atomic_directory`.

    `mode` are the permissions that the user's umask gives to a new directory. The old directory is moved aside, and
    `_finish_replacement` removes it.
    """
    for file in new.rglob("*"):
        if file.is_file():
            file.chmod(mode & 0o666)  # safetensors creates files that only their owner can read.
            with file.open("rb") as content:
                os.fsync(content.fileno())
    _sync_directory(new)
    if path.exists():
        _copy_missing(path, new, replaces)
        os.chmod(new, stat.S_IMODE(path.stat().st_mode))
    with _without_readers(path):
        if path.exists():
            os.rename(path, _aside(path))
        os.rename(new, path)


def _finish_replacement(path: Path) -> None:
    """Remove the old directory after `_replace_directory`."""
    _sync_directory(path.parent)
    shutil.rmtree(_aside(path), ignore_errors=True)  # The next call removes what could not be removed now.


def restore_directory(path: str | os.PathLike[str]) -> None:
    """Put the old directory back at `path` if a process was killed while `atomic_directory` was replacing it.

    Only a process that may write to `path` may call this function. Readers call `present_directory`.
    """
    path = _real(path)
    if path.exists():
        shutil.rmtree(_aside(path), ignore_errors=True)  # An old directory that was replaced but not yet removed.
    elif _aside(path).exists():
        with _without_readers(_aside(path)):
            os.rename(_aside(path), path)


def present_directory(path: str | os.PathLike[str]) -> Path:
    """Return where the directory `path` is now: at `path`, or beside it while `atomic_directory` is replacing it.

    Nothing is changed, so the function also works for readers without write permission. If there is neither directory,
    the result is `path`.
    """
    given, path = Path(path), _real(path)
    # The third look finds a new directory whose old one disappeared between the first two.
    return next((place for place in (given, _aside(path), given) if place.exists()), given)


@contextmanager
def reading(path: str | os.PathLike[str]) -> Iterator[None]:
    """Keep `atomic_directory` from replacing a model while its files are opened within the `with` block.

    The block covers the directory `path`, or the directory of the file `path`, and its subdirectories `model` and
    `adapter`. The writer waits for the end of the block, at most ten seconds. Without this lock, a reader could open the
    config of the old model and the weights of the new one.
    """
    with contextlib.ExitStack() as locks:
        top = Path(path).parent if Path(path).is_file() else Path(path)
        for directory in (top, top / "model", top / "adapter"):
            locks.enter_context(_shared_lock(directory))
        yield


@contextmanager
def _shared_lock(path: Path) -> Iterator[None]:
    """Hold a shared lock of the directory that is now at `path`, if there is one and the file system has locks."""
    descriptor = None
    while fcntl is not None and descriptor is None:
        try:
            descriptor = os.open(present_directory(path), os.O_RDONLY | os.O_DIRECTORY)
            fcntl.flock(descriptor, fcntl.LOCK_SH)
            if not os.path.samestat(os.fstat(descriptor), present_directory(path).stat()):
                os.close(descriptor)  # It was replaced before it was locked.
                descriptor = None
        except OSError:  # no such directory, or a file system without locks
            break
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


@contextmanager
def _without_readers(path: Path) -> Iterator[None]:
    """Wait until no process is within `reading(path)`, and make new readers wait for the end of the `with` block."""
    descriptor = None
    with contextlib.suppress(OSError):  # no such directory, or a file system without locks
        if fcntl is not None:
            descriptor = os.open(path, os.O_RDONLY)
            deadline = time.monotonic() + _MAX_WAIT_FOR_READERS
            while time.monotonic() < deadline:
                try:
                    fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    time.sleep(0.002)
    try:
        yield
    finally:
        if descriptor is not None:
            os.close(descriptor)


def remove_leftovers(directory: str | os.PathLike[str], patterns: Sequence[str]) -> None:
    """Remove the temporary files of `atomic_write` and `atomic_directory` that killed processes left in `directory`.

    Temporary files are removed only if the name of the file that they were meant for matches one of the patterns, such
    as "step-*". If the replacement of a directory was interrupted, the old directory is restored. No other process may
    write to `directory` during the call.
    """
    for entry in Path(directory).iterdir():
        name = target_of(entry.name)
        if name is None or not any(fnmatch(name, pattern) for pattern in patterns):
            continue
        if entry.name.endswith(".previous"):
            restore_directory(entry.parent / name)
        else:
            _remove(entry)


def target_of(name: str) -> str | None:
    """Return the name of the file that is being written under the temporary name `name`, or None for any other name."""
    # Earlier versions used tempfile, whose names have other letters than hexadecimal digits.
    temporary = re.fullmatch(r"\.(.+)\.([a-z0-9_]{8}|previous)", name)
    return temporary[1] if temporary else None


def sha256_of(path: str | os.PathLike[str]) -> str:
    """Return the SHA-256 of a file as a hexadecimal string. A pipe raises ValueError.

    The file is read in pieces, so it may be larger than the memory.
    """
    refuse_pipe(path)
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def read_text(path: str | os.PathLike[str], max_bytes: int = MAX_TEXT_BYTES) -> str:
    """Return the text of a UTF-8 file, with `\\n` line ends. Binary files and files above `max_bytes` raise ValueError."""
    size = os.stat(path).st_size
    if size > max_bytes:
        raise ValueError(f"{path} has {size:,} bytes, the limit is {max_bytes:,}")
    return decode_text(Path(path).read_bytes(), path)


def decode_text(data: bytes, path: str | os.PathLike[str]) -> str:
    """Return UTF-8 bytes, which were read from the file `path`, as text with `\\n` line ends.

    Bytes that are not UTF-8, or contain a NUL character, raise ValueError with the path.
    """
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path} is not UTF-8 text: byte {error.start} is 0x{data[error.start]:02x}") from None
    refuse_binary(text, path)
    return text.replace("\r\n", "\n").replace("\r", "\n")


def begins_with(path: Path, magic: bytes) -> bool:
    """Return whether `path` is a file whose first bytes are `magic`."""
    if not path.is_file():
        return False
    with open(path, "rb") as file:
        return file.read(len(magic)) == magic


def read_json(path: str | os.PathLike[str]) -> Any:
    """Return the value in a JSON file. Raises ValueError if the file is damaged, too large, too deeply nested, or a pipe."""
    refuse_pipe(path)
    return parse_json(read_text(path, MAX_JSON_BYTES), path)


def refuse_pipe(path: str | os.PathLike[str]) -> None:
    """Raise ValueError if `path` is a pipe, because a read would wait, perhaps forever, for another process to write."""
    if stat.S_ISFIFO(os.stat(path).st_mode):
        raise ValueError(f"{path} is a pipe: it must be an ordinary file")


def json_text(value: Any, **options: Any) -> str:
    """Return `value` as JSON that every program can read. `options` are those of `json.dumps`, such as indent.

    JSON has no infinity and no NaN. They become the strings "inf", "-inf" and "nan", which Python's `float` reads.
    """
    return json.dumps(_finite(value), allow_nan=False, **options)


def _finite(value: Any) -> Any:
    """Return `value` with the text of each float that is not finite in place of the float, in all lists and dicts."""
    if isinstance(value, float) and not math.isfinite(value):
        return str(float(value))
    if isinstance(value, dict):
        return {key: _finite(item) for key, item in value.items()}
    return [_finite(item) for item in value] if isinstance(value, (list, tuple)) else value


def parse_json(text: str | bytes, path: str | os.PathLike[str], line: int | None = None) -> Any:
    """Return the value of a JSON text that was read from the file `path`.

    Text that is not JSON, or is nested more than 100 levels deep, raises ValueError with the path and a line number. If
    `text` is a single line of the file, `line` is the number of this line.
    """
    try:
        value = json.loads(text)
        problem = f"nested more than {_MAX_NESTING} levels deep" if _is_deep(value) else None
    except json.JSONDecodeError as error:
        line, problem = line or error.lineno, f"not JSON: {error.msg}"
    except (ValueError, RecursionError) as error:  # a number with thousands of digits, or thousands of brackets
        problem = f"not JSON: {error}"
    if problem is not None:
        raise ValueError(f"{path}{'' if line is None else f', line {line}'}: {problem}")
    return value


def refuse_binary(text: str | bytes, path: str | os.PathLike[str], offset: int = 0) -> None:
    """Raise ValueError if `text` has a NUL character, as binary files do.

    The error message names the file `path` and the position in it. `text` starts at position `offset` in the file.
    """
    position = text.find("\0") if isinstance(text, str) else text.find(b"\0")
    if position >= 0:
        raise ValueError(f"{path} looks like a binary file: it has a NUL character at position {offset + position}")


def _is_deep(value: Any) -> bool:
    """Return True if lists and dicts are nested more than _MAX_NESTING levels deep."""
    level = [value]
    for _ in range(_MAX_NESTING):
        containers = [item for item in level if isinstance(item, (dict, list))]
        level = [item for outer in containers for item in (outer.values() if isinstance(outer, dict) else outer)]
        if not level:
            return False
    return True


def _temporary(path: Path) -> Path:
    """Return an unused path for a temporary file beside `path`, with a hidden name that `remove_leftovers` recognises."""
    return path.parent / f".{path.name}.{secrets.token_hex(4)}"


def _open_locked(path: str, flags: int, mode: int = 0o777) -> int:
    """Open a new temporary file as os.open does, and lock it against `_remove_abandoned`."""
    while True:
        descriptor = os.open(path, flags, mode)
        if _lock(descriptor, path):
            return descriptor
        os.close(descriptor)
        Path(path).unlink(missing_ok=True)


def _make_locked_directory(path: Path) -> int | None:
    """Create a temporary directory, lock it against `_remove_abandoned`, and return the descriptor that holds the lock."""
    while True:
        path.mkdir()
        if not _HAS_LOCKS:
            return None
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if _lock(descriptor, path):
                return descriptor
            os.close(descriptor)
            shutil.rmtree(path, ignore_errors=True)


def _lock_directory(path: Path, shown: Path) -> int | None:
    """Create the directory `path` if it is missing, lock it, and return the descriptor that holds the lock.

    Raises BlockingIOError, which names the directory `shown`, if another process or thread holds the lock.
    """
    while True:
        path.mkdir(exist_ok=True)
        if not _HAS_LOCKS:
            return None
        with contextlib.suppress(FileNotFoundError):
            descriptor = os.open(path, os.O_RDONLY)
            if _lock(descriptor, path):
                return descriptor
            os.close(descriptor)
            if path.exists():
                raise BlockingIOError(
                    f"another process is writing {shown}: wait until it ends, or choose another directory"
                )


def _lock(descriptor: int, path: str | Path) -> bool:
    """Lock a new temporary file or directory. Return False if another process has just taken it for abandoned."""
    if not _HAS_LOCKS:
        return True
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except (BlockingIOError, FileNotFoundError):
        return False
    except OSError:  # a file system without locks, where nothing is taken for abandoned
        return True


def _remove_abandoned(path: Path) -> None:
    """Remove the temporary files and directories for `path` that killed processes left. Processes that live lock theirs."""
    for entry in path.parent.iterdir() if _HAS_LOCKS else ():
        if not re.fullmatch(rf"\.{re.escape(path.name)}\.[0-9a-f]{{8}}", entry.name) or entry.is_symlink():
            continue
        with contextlib.suppress(OSError):  # It is locked, or another process removes it.
            descriptor = os.open(entry, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                _remove(entry)
            finally:
                os.close(descriptor)


def _remove(path: Path) -> None:
    """Remove a file, a symbolic link (but not its target) or a directory with its content."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()


def _rename_in(error: BaseException, temporary: Path, path: Path) -> None:
    """Replace the name of a temporary file or directory in an OSError by `path`, for which users look.

    The error of a full disk names no file at all, so it also gets `path`.
    """
    if not isinstance(error, OSError):
        return
    if isinstance(error.filename, str) and Path(error.filename).is_relative_to(temporary):
        error.filename, error.filename2 = str(path / Path(error.filename).relative_to(temporary)), None
    elif error.filename is None and error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        error.filename = str(path)


def _aside(path: Path) -> Path:
    """Return the path to which `atomic_directory` moves the old directory while it replaces `path`."""
    return path.parent / f".{path.name}.previous"


def _copy_missing(old: Path, new: Path, replaces: Sequence[str]) -> None:
    """Copy the files and directories in `old` that `new` lacks, except names that match a pattern in `replaces`."""
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


def _sync_directory(path: Path) -> None:
    """Flush a directory's entries to the disk, so that a rename survives a power failure."""
    if os.name == "nt":  # Windows cannot open a directory.
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
