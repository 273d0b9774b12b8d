"""Compile the C++ files of this package once per machine with the user's C++ compiler, and store the libraries in the cache.

A compiled file is stored with its length and SHA-256. It is loaded only if both match, and if no other user could have written
it. The C++ files include only the standard library, so each compiles in a few seconds, and ctypes calls their functions. A
torch extension would need ninja and torch's headers, and half a minute. Every user of a library has a fallback without it.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import platform
import shutil
import signal
import stat
import subprocess
import sys
import time
import weakref
from collections.abc import Callable, Sequence
from ctypes import CDLL
from pathlib import Path
from typing import Any, Generic, TypeVar

from MyGPT.download import cache_directory
from MyGPT.files import atomic_write, read_json, sha256_of
from MyGPT.messages import error_message

COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 120
"""A compiler that takes longer is stopped. Usually a compilation takes 3 seconds."""
FLAGS = (
    "-O3",
    "-mcpu=native" if platform.machine() in ("arm64", "aarch64") else "-march=native",
    "-std=c++17",
    "-fno-math-errno",  # so that a square root and a rounding are one instruction each
    "-fno-trapping-math",
    *(() if sys.platform == "darwin" else ("-fopenmp",)),  # Apple's compiler lacks OpenMP: one thread there
    "-shared",
    "-fPIC",
)
LIBRARIES = ("-lstdc++",) if sys.platform == "linux" else ()
"""Needed if $CXX is gcc or cc, which compile C++ but do not link its library."""


T = TypeVar("T")


class Build(Generic[T]):
    """A compilation of a C++ file in a separate process, so that the caller can load a model at the same time.

    If the cache already contains the compiled file, undamaged, no compilation is started.

    Args:
        source: the C++ file. It may include headers of its own directory.
        functions: the names of the C functions that the library must have.
        wrap: a function that returns the object that `wait` returns, given the loaded library.

    Raises:
        OSError: the cache cannot be written, or other users can write to it.
    """

    def __init__(self, source: Path, functions: Sequence[str], wrap: Callable[[CDLL], T]) -> None:
        self.source, self.functions, self.wrap = source, functions, wrap
        self.library = cache_directory() / "kernels" / f"{source.stem}-{_cache_key(source)}.so"
        self.unfinished = self.library.with_name(f"{self.library.name}.{os.getpid()}")
        self.compiler: subprocess.Popen[str] | None = None
        self._result: T | None = None
        self._failure: str | None = None
        program = find_compiler()
        if not _is_intact(self.library) and program is not None:
            _make_private_directory(self.library.parent)
            _remove_abandoned(self.library.parent)
            command = [program, *FLAGS, str(source), *LIBRARIES, "-o", str(self.unfinished)]
            self.compiler = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that `_abandon` also ends the programs that the compiler starts
            )
            weakref.finalize(self, _abandon, self.compiler, self.unfinished)

    def wait(self) -> T:
        """Wait for the compiler and return the library, wrapped. Raises OSError if there is no compiler, or it fails."""
        if self._result is None and self._failure is None:
            try:
                self._result = self._load() if self.compiler is None else self._finish(self.compiler)
            except OSError as error:
                self._failure = str(error)
        if self._result is None:
            raise OSError(self._failure)
        return self._result

    def _load(self) -> T:
        """Return the library in the cache. Raises OSError if there is none, which is so without a compiler."""
        if not _is_intact(self.library):
            raise OSError(f"there is no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)})")
        return self._open(self.library)

    def _finish(self, compiler: subprocess.Popen[str]) -> T:
        """Wait for the compiler, and return the library that it made after storing it in the cache."""
        if compiler.poll() is None:
            print("compiling a fast kernel for this CPU, once (3 s) …", file=sys.stderr)
        try:
            errors = compiler.communicate(timeout=COMPILE_SECONDS)[1]
        except subprocess.TimeoutExpired:
            _abandon(compiler, self.unfinished)
            limit = f"{COMPILE_SECONDS} seconds"
            raise OSError(f"{find_compiler()} did not compile the kernel within {limit}") from None
        if compiler.returncode != 0:
            first = next((line for line in errors.splitlines() if "error" in line), errors.strip())
            reason = first or f"exit status {compiler.returncode}"
            raise OSError(f"{find_compiler()} could not compile the kernel: {reason}")
        try:
            # A file that is no kernel never gets into the cache. An open library survives its new name.
            result = self._open(self.unfinished)
            _store(self.unfinished, self.library)
        finally:
            self.unfinished.unlink(missing_ok=True)
        return result

    def _open(self, path: Path) -> T:
        """Return the library in the compiled file `path`, wrapped. Raises OSError if the file is another library."""
        loaded = CDLL(str(path))
        if missing := [name for name in self.functions if not hasattr(loaded, name)]:
            raise OSError(f"{path} is not the compiled kernel: it lacks {missing[0]}")
        return self.wrap(loaded)


def _store(unfinished: Path, library: Path) -> None:
    """Move a compiled file to its place in the cache, and store its length and SHA-256 beside it."""
    unfinished.chmod(0o600)
    with open(unfinished, "rb") as file:
        os.fsync(file.fileno())
    _record(library).unlink(missing_ok=True)
    os.replace(unfinished, library)
    with atomic_write(_record(library)) as record:
        Path(record.name).chmod(0o600)  # also where the user's umask lets the group write
        json.dump(_length_and_hash(library), record)


def _is_intact(library: Path) -> bool:
    """Return True if the compiled file has its recorded length and SHA-256, and only this user could have written it.

    Raises OSError if other users can write to its directory, because they could replace the file at any time.
    """
    if not library.parent.is_dir():
        return False
    _refuse_shared(library.parent)
    try:
        return read_json(_record(library)) == _length_and_hash(library) and not any(
            _is_shared(path) for path in (library, _record(library))
        )
    except (OSError, ValueError):  # missing, damaged, or a pipe
        return False


def _length_and_hash(library: Path) -> dict[str, Any]:
    return {"bytes": library.stat().st_size, "sha256": sha256_of(library)}


def _record(library: Path) -> Path:
    return library.with_suffix(".json")


def _make_private_directory(directory: Path) -> None:
    """Create a directory to which only this user can write. Raises OSError if it exists and others can write to it."""
    try:
        directory.parent.mkdir(parents=True, exist_ok=True)
        directory.mkdir(mode=0o700, exist_ok=True)
    except OSError as error:
        raise OSError(f"the cache for the compiled kernel cannot be created: {error_message(error)}") from None
    _refuse_shared(directory)


def _refuse_shared(directory: Path) -> None:
    """Raise OSError if another user owns `directory` or can write to it, and could thus run code as this user.

    A symbolic link is refused too.
    """
    if _is_shared(directory):
        reason = "it is a symbolic link" if directory.is_symlink() else "another user owns it or can write to it"
        raise OSError(f"no compiled code is loaded from {directory}, because {reason}: remove it")


def _is_shared(path: Path) -> bool:
    """Return True if `path` is a symbolic link, if another user owns it, or if its group or all users can write to it."""
    found = os.lstat(path)
    if os.name == "nt":  # Windows has neither these owners nor these modes; its cache is in the user's profile.
        return stat.S_ISLNK(found.st_mode)
    is_foreign = found.st_uid != os.geteuid() or bool(found.st_mode & (stat.S_IWGRP | stat.S_IWOTH))
    return stat.S_ISLNK(found.st_mode) or is_foreign


def _remove_abandoned(directory: Path) -> None:
    """Remove unfinished files that killed processes left. No compilation lasts as long as these files have existed."""
    for path in directory.glob("*.so.*"):
        with contextlib.suppress(FileNotFoundError):
            if time.time() - path.lstat().st_mtime > 2 * COMPILE_SECONDS:
                path.unlink()


def _abandon(compiler: subprocess.Popen[str], unfinished: Path) -> None:
    """Stop the compiler process if it still runs, and delete `unfinished`, the file that it writes."""
    if hasattr(os, "killpg") and compiler.poll() is None:
        os.killpg(compiler.pid, signal.SIGKILL)
    compiler.kill()
    compiler.wait()
    if compiler.stderr is not None:
        compiler.stderr.close()
    unfinished.unlink(missing_ok=True)


def find_compiler() -> str | None:
    """Return the path of a C++ compiler: $CXX if it is set, otherwise c++, g++ or clang++. Return None if none is found."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def _cache_key(source: Path) -> str:
    """Return the cache key of a compiled file: a hash of its source, the headers, flags, compiler and the CPU's features."""
    # Several machines with different CPUs may share one home directory.
    key = hashlib.sha256()
    for path in (source, *sorted(source.parent.glob("*.h"))):
        key.update(path.read_bytes())
    key.update(" ".join((*FLAGS, *LIBRARIES, find_compiler() or "", platform.machine(), platform.processor())).encode())
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        key.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return key.hexdigest()[:16]
