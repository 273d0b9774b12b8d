"""Compile kernel.cpp once per machine with the user's C++ compiler, and call its functions through ctypes.

The compiled file is stored in the cache with its length and SHA-256. It is loaded only if both match, and if no other user
could have written it. The kernel includes only the standard library, so it compiles in about three seconds. A torch extension
would need ninja and torch's headers, and half a minute. Without a compiler, packed.py uses torch's operators, which give the
same results more slowly. B batch size, T new tokens, H heads, D = C // H, C embedding width, V vocabulary size.
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
from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int32, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING, Any

from MyGPT.download import cache_directory
from MyGPT.files import atomic_write, read_json, sha256_of
from MyGPT.messages import error_message

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("c++", "g++", "clang++")
COMPILE_SECONDS = 120
"""A compiler that takes longer is stopped. Usually the compilation takes 3 seconds."""
PANELS = 12, 24, 48
"""The possible values of Kernel.panel."""
FUNCTIONS = ("gpt2_panel", "gpt2_pack", "gpt2_rows", "gpt2_linear", "gpt2_forward")
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


class LinearStruct(Structure):
    """The ctypes declaration of `struct Linear` in kernel.cpp: weight, int8 scales, bias and sizes of a linear layer."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("N", c_int32), ("K", c_int32)]


class NormStruct(Structure):
    """The ctypes declaration of `struct Norm` in kernel.cpp: weight and bias of a LayerNorm."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class BlockStruct(Structure):
    """The ctypes declaration of `struct Block` in kernel.cpp: the layers of a transformer block."""

    _fields_ = [
        ("ln_1", NormStruct), ("ln_2", NormStruct),
        ("c_attn", LinearStruct), ("attn_proj", LinearStruct), ("c_fc", LinearStruct), ("mlp_proj", LinearStruct),
    ]  # fmt: skip


class ModelStruct(Structure):
    """The ctypes declaration of `struct Model` in kernel.cpp: the addresses of all weights, and the sizes of the model."""

    _fields_ = [
        ("wte", c_void_p), ("wpe", c_void_p), ("blocks", POINTER(BlockStruct)), ("ln_f", NormStruct),
        ("head", LinearStruct), ("n_layers", c_int32), ("n_heads", c_int32), ("weight_bytes", c_int32),
        ("exact_gelu", c_int32), ("eps", c_float),
    ]  # fmt: skip


class Build:
    """A compilation of the C++ kernel in a separate process, so that the caller can load a model at the same time.

    If the cache already contains the compiled kernel, undamaged, no compilation is started. Raises OSError if the cache
    cannot be written, or if other users can write to it.
    """

    def __init__(self) -> None:
        self.library = cache_directory() / "kernels" / f"gpt2-{_cache_key()}.so"
        self.unfinished = self.library.with_name(f"{self.library.name}.{os.getpid()}")
        self.compiler: subprocess.Popen[str] | None = None
        self._kernel: Kernel | None = None
        self._failure: str | None = None
        program = find_compiler()
        if not _is_intact(self.library) and program is not None:
            _make_private_directory(self.library.parent)
            _remove_abandoned(self.library.parent)
            command = [program, *FLAGS, str(SOURCE), *LIBRARIES, "-o", str(self.unfinished)]
            self.compiler = subprocess.Popen(
                command,
                stdout=subprocess.DEVNULL,
                stderr=subprocess.PIPE,
                text=True,
                errors="replace",
                start_new_session=True,  # so that `_abandon` also ends the programs that the compiler starts
            )
            weakref.finalize(self, _abandon, self.compiler, self.unfinished)

    def wait(self) -> Kernel:
        """Wait for the compiler and return the kernel. Raises OSError if no C++ compiler is found or the compilation fails."""
        if self._kernel is None and self._failure is None:
            try:
                self._kernel = self._load() if self.compiler is None else self._finish(self.compiler)
            except OSError as error:
                self._failure = str(error)
        if self._kernel is None:
            raise OSError(self._failure)
        return self._kernel

    def _load(self) -> Kernel:
        """Return the kernel in the cache. Raises OSError if there is none, which is so without a compiler."""
        if not _is_intact(self.library):
            raise OSError(f"there is no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)})")
        return _open(self.library)

    def _finish(self, compiler: subprocess.Popen[str]) -> Kernel:
        """Wait for the compiler, and return the kernel that it made after storing it in the cache."""
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
            kernel = _open(self.unfinished)
            _store(self.unfinished, self.library)
        finally:
            self.unfinished.unlink(missing_ok=True)
        return kernel


def _open(library: Path) -> Kernel:
    """Return the kernel in the compiled file `library`. Raises OSError if the file is not a compiled kernel."""
    loaded = CDLL(str(library))
    if missing := [name for name in FUNCTIONS if not hasattr(loaded, name)]:
        raise OSError(f"{library} is not the compiled kernel: it lacks {missing[0]}")
    kernel = Kernel(loaded)
    if kernel.panel not in PANELS:
        raise OSError(f"{library} is not the compiled kernel: its panels have {kernel.panel} rows")
    return kernel


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
    for path in directory.glob("gpt2-*.so.*"):
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


def _cache_key() -> str:
    """Return the cache key of the compiled kernel: a hash of the source, the flags, the compiler and the CPU's features."""
    # Several machines with different CPUs may share one home directory.
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(" ".join((*FLAGS, *LIBRARIES, find_compiler() or "", platform.machine(), platform.processor())).encode())
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        key.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return key.hexdigest()[:16]


class Kernel:
    """The functions of the compiled C++ kernel, as Python methods.

    All tensors that are passed to them must be contiguous, on the CPU, and float32 unless a method states another dtype.
    """

    def __init__(self, library: CDLL) -> None:
        self._library = library
        self.panel: int = library.gpt2_panel()
        """Number of rows of a weight matrix that are stored interleaved, as one panel: 12, 24 or 48, depending on the CPU."""

    def pack(self, weight: Tensor, linear: LinearStruct, weight_bytes: int) -> None:
        """Copy a weight matrix (N, K) into the memory of `linear`, in the order in which the kernel reads it.

        weight_bytes is the size of a stored number: 4 (float32), 2 (bf16) or 1 (int8, after division by linear's scales).
        """
        self._library.gpt2_pack(address(weight), byref(linear), weight_bytes)

    def rows(self, linear: LinearStruct, weight_bytes: int, ids: Tensor, y: Tensor) -> None:
        """Write the rows with the indices `ids` (int64) of the weight matrix (N, K) of `linear` into y, (*ids.shape, K).

        weight_bytes is the size of a stored number: 4 (float32), 2 (bf16) or 1 (int8).
        """
        self._library.gpt2_rows(byref(linear), weight_bytes, address(ids), ids.numel(), address(y))

    def linear(self, linear: LinearStruct, weight_bytes: int, x: Tensor, y: Tensor, then: int) -> None:
        """Write x Wᵀ + bias, for x (M, K) and the weight matrix W (N, K) of `linear`, into y (M, N).

        weight_bytes is the size of a stored number: 4 (float32), 2 (bf16) or 1 (int8). then=0 stores the result in y, and
        then=1 adds the result to y. then=2 stores the GELU of the result in the tanh approximation, and then=3 stores the
        exact GELU of the result.
        """
        self._library.gpt2_linear(byref(linear), weight_bytes, address(x), len(x), address(y), then, _n_threads())

    def forward(
        self,
        model: ModelStruct,
        sequences: Tensor,
        ids: Tensor,
        cache: Tensor,
        wanted: Tensor,
        logits: Tensor,
        scratch: Tensor,
    ) -> None:
        """Write the logits of the new tokens with the indices `wanted`, (n) int32, into `logits`, (n, V).

        sequences (n_sequences, 4) int32 has, for each sequence: the number of new tokens, the number of earlier tokens, the
        index of the first token after its left padding, and its slot. ids (M) int64 are the new tokens of all sequences, one
        sequence after another, and must be in the vocabulary. cache (n_layers, 2, slots, H, capacity, D) holds the keys and
        values of the earlier tokens, and those of the new tokens are written after them. scratch is memory for 6 M C numbers.
        """
        self._library.gpt2_forward(
            byref(model), address(sequences), len(sequences), address(ids), address(cache), cache.shape[2], cache.shape[4],
            address(wanted), len(wanted), address(logits), address(scratch), _n_threads(),
        )  # fmt: skip


def address(tensor: Tensor | None) -> c_void_p:
    """Return a pointer to the tensor's memory, as an argument for the kernel. For None, return a null pointer."""
    return c_void_p(None if tensor is None else tensor.data_ptr())


def _n_threads() -> int:
    """Return torch's number of threads, which OpenMP does not know in threads that Python starts."""
    import torch  # here, because a compilation starts before torch is loaded

    return torch.get_num_threads()
