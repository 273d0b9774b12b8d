"""kernel.cpp: compiled once per machine by the user's C++ compiler, and called through ctypes.

The kernel includes only the standard library, so it compiles in about three seconds. A torch extension needs ninja and torch's
headers, and takes half a minute. Without a compiler, packed.py uses torch's operators, which give the same results more slowly.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import weakref
from ctypes import CDLL, POINTER, Structure, byref, c_float, c_int32, c_void_p
from pathlib import Path
from typing import TYPE_CHECKING

from MyGPT.download import cache_directory

if TYPE_CHECKING:
    from torch import Tensor

SOURCE = Path(__file__).with_name("kernel.cpp")
COMPILERS = ("c++", "g++", "clang++")
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


class LinearStruct(Structure):
    """`struct Linear` of kernel.cpp."""

    _fields_ = [("weight", c_void_p), ("scale", c_void_p), ("bias", c_void_p), ("N", c_int32), ("K", c_int32)]


class NormStruct(Structure):
    """`struct Norm` of kernel.cpp."""

    _fields_ = [("weight", c_void_p), ("bias", c_void_p)]


class BlockStruct(Structure):
    """`struct Block` of kernel.cpp."""

    _fields_ = [
        ("ln_1", NormStruct), ("ln_2", NormStruct),
        ("c_attn", LinearStruct), ("attn_proj", LinearStruct), ("c_fc", LinearStruct), ("mlp_proj", LinearStruct),
    ]  # fmt: skip


class ModelStruct(Structure):
    """`struct Model` of kernel.cpp."""

    _fields_ = [
        ("wte", c_void_p), ("wpe", c_void_p), ("blocks", POINTER(BlockStruct)), ("ln_f", NormStruct),
        ("head", LinearStruct), ("n_layers", c_int32), ("n_heads", c_int32), ("weight_bytes", c_int32),
        ("exact_gelu", c_int32), ("eps", c_float),
    ]  # fmt: skip


class Build:
    """A compilation of the kernel in its own process, which runs while the caller loads a model.

    A kernel that is already in the cache directory is not compiled again.
    """

    def __init__(self) -> None:
        self.library = cache_directory() / f"gpt2-{_cache_key()}.so"
        self.unfinished = self.library.with_name(f"{self.library.name}.{os.getpid()}")
        self.compiler: subprocess.Popen[str] | None = None
        self._errors: str | None = None
        program = find_compiler()
        if program is not None and not self.library.exists():
            self.library.parent.mkdir(parents=True, exist_ok=True)
            command = [program, *FLAGS, str(SOURCE), "-o", str(self.unfinished)]
            self.compiler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            weakref.finalize(self, _abandon, self.compiler, self.unfinished)

    def wait(self) -> Kernel:
        """Return the compiled kernel; may be called again. Raises OSError if there is no compiler or it fails."""
        compiler = self.compiler
        if compiler is not None and self._errors is None:
            if compiler.poll() is None:
                print("compiling a fast kernel for this CPU, once (3 s) …", file=sys.stderr)
            self._errors = compiler.communicate()[1]
            if compiler.returncode == 0:
                os.replace(self.unfinished, self.library)
        if compiler is not None and compiler.returncode != 0:
            errors = self._errors or ""
            first = next((line for line in errors.splitlines() if "error" in line), errors.strip())
            raise OSError(f"{find_compiler()} could not compile the kernel: {first}")
        if not self.library.exists():
            raise OSError(f"there is no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)})")
        return Kernel(CDLL(str(self.library)))


def _abandon(compiler: subprocess.Popen[str], unfinished: Path) -> None:
    """Stop a compiler whose result is no longer needed, and delete its unfinished output."""
    compiler.kill()
    compiler.wait()
    if compiler.stderr is not None:
        compiler.stderr.close()
    unfinished.unlink(missing_ok=True)


def find_compiler() -> str | None:
    """Return the path of the user's C++ compiler: $CXX, or else the first of the usual names; None if there is none."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def _cache_key() -> str:
    """Return the cache key of the compiled kernel: a hash of the source, the flags, the compiler and the CPU's features."""
    # Several machines with different CPUs may share one home directory.
    key = hashlib.sha256(SOURCE.read_bytes())
    key.update(" ".join((*FLAGS, find_compiler() or "", platform.machine(), platform.processor())).encode())
    with contextlib.suppress(FileNotFoundError):
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        key.update(next((line for line in lines if line.startswith(("flags", "Features"))), "").encode())
    return key.hexdigest()[:16]


class Kernel:
    """The functions of the compiled kernel. Tensors are contiguous and on the CPU; all but ids and weights are float32."""

    def __init__(self, library: CDLL) -> None:
        self._library = library
        self.panel: int = library.gpt2_panel()
        """Number of outputs per panel, P in kernel.cpp. It depends on the CPU."""

    def pack(self, weight: Tensor, linear: LinearStruct, weight_bytes: int) -> None:
        """Write the weight (N, K), divided by linear's scales if it has any, into linear's panels."""
        self._library.gpt2_pack(address(weight), byref(linear), weight_bytes)

    def rows(self, linear: LinearStruct, weight_bytes: int, ids: Tensor, y: Tensor) -> None:
        """Write the matrix's rows for int64 ids into y, (*ids.shape, K)."""
        self._library.gpt2_rows(byref(linear), weight_bytes, address(ids), ids.numel(), address(y))

    def linear(self, linear: LinearStruct, weight_bytes: int, x: Tensor, y: Tensor, then: int) -> None:
        """Write the product of x (M, K) with the matrix into y (M, N). `then` is an `enum Then` of kernel.cpp."""
        self._library.gpt2_linear(byref(linear), weight_bytes, address(x), len(x), address(y), then)

    def forward(
        self, model: ModelStruct, ids: Tensor, past: int, first: Tensor, cache: Tensor, logits: Tensor, scratch: Tensor
    ) -> None:
        """Write the logits of the last n of T new tokens, with int64 ids (B, T) in the vocabulary, into logits (B, n, V).

        cache (n_layers, 2, B, H, length, D) has `past` tokens, and the T new ones are appended; first (B) int32 is the
        column at which each sequence begins after its left padding; scratch is memory for 6 B T C numbers.
        """
        B, T = ids.shape
        self._library.gpt2_forward(
            byref(model), address(ids), B, T, past, cache.shape[4], address(first), address(cache),
            logits.shape[1], address(logits), address(scratch),
        )  # fmt: skip


def address(tensor: Tensor | None) -> c_void_p:
    """Return the address of a tensor's memory for the kernel; None becomes a null pointer."""
    return c_void_p(None if tensor is None else tensor.data_ptr())
