"""kernel.cpp, compiled once for this processor by the user's own C++ compiler, and called.

It includes nothing but the standard library and is called through ctypes, so it compiles in three seconds, where torch's
builders, which need ninja and read torch's headers, take half a minute. Where there is no compiler nothing is lost but speed:
packed.py then multiplies with torch's own operators.
"""

from __future__ import annotations

import contextlib
import ctypes
import hashlib
import os
import platform
import shutil
import subprocess
import sys
import weakref
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
    "-fno-math-errno",  # a square root and a rounding are one instruction
    "-fno-trapping-math",
    *(() if sys.platform == "darwin" else ("-fopenmp",)),  # which Apple's compiler lacks: there it is one thread
    "-shared",
    "-fPIC",
)


class Linear(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "scale", "bias")] + [
        (name, ctypes.c_int32) for name in ("N", "K")
    ]


class Norm(ctypes.Structure):
    _fields_ = [(name, ctypes.c_void_p) for name in ("weight", "bias")]


class Block(ctypes.Structure):
    _fields_ = [(name, Norm) for name in ("ln_1", "ln_2")] + [
        (name, Linear) for name in ("c_attn", "attn_proj", "c_fc", "mlp_proj")
    ]


class Model(ctypes.Structure):
    _fields_ = [
        *((name, ctypes.c_void_p) for name in ("wte", "wpe")),
        ("blocks", ctypes.POINTER(Block)),
        ("ln_f", Norm),
        ("head", Linear),
        *((name, ctypes.c_int32) for name in ("n_layers", "n_heads", "weight_bytes", "exact_gelu")),
        ("eps", ctypes.c_float),
    ]


class Build:
    """The kernel on its way: compiled, if it has not been yet, in a process of its own while a model is being loaded."""

    def __init__(self) -> None:
        self.library = cache_directory() / f"gpt2-{_fingerprint()}.so"
        self.half = self.library.with_name(f"{self.library.name}.{os.getpid()}")
        self.compiler: subprocess.Popen[str] | None = None
        program = find_compiler()
        if program is not None and not self.library.exists():
            self.library.parent.mkdir(parents=True, exist_ok=True)
            command = [program, *FLAGS, str(SOURCE), "-o", str(self.half)]
            self.compiler = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
            weakref.finalize(self, _give_up, self.compiler, self.half)

    def wait(self) -> Kernel:
        """The compiled kernel. An OSError says in a sentence why there is none."""
        if self.compiler is not None:
            if self.compiler.poll() is None:
                print("compiling a fast kernel for this processor, once (3 s) …", file=sys.stderr)
            messages = self.compiler.communicate()[1]
            if self.compiler.returncode == 0:
                os.replace(self.half, self.library)
            else:
                errors = [line for line in messages.splitlines() if "error" in line] or [messages.strip()]
                raise OSError(f"{find_compiler()} could not compile the kernel: {errors[0]}")
        if not self.library.exists():
            raise OSError(f"there is no C++ compiler ({os.environ.get('CXX') or ', '.join(COMPILERS)})")
        return Kernel(ctypes.CDLL(str(self.library)))


def _give_up(compiler: subprocess.Popen[str], half: Path) -> None:
    """What is left to do when no one will wait for the compiler any more; nothing, if it was waited for."""
    compiler.kill()
    compiler.wait()
    if compiler.stderr is not None:
        compiler.stderr.close()
    half.unlink(missing_ok=True)


def find_compiler() -> str | None:
    """The user's C++ compiler: $CXX, or what is usually there."""
    names = [os.environ["CXX"]] if os.environ.get("CXX") else COMPILERS
    return next(filter(None, map(shutil.which, names)), None)


def _fingerprint() -> str:
    """Of everything that the compiled code depends on. A home directory may be shared by different processors."""
    hashed = hashlib.sha256(SOURCE.read_bytes())
    hashed.update(" ".join((*FLAGS, find_compiler() or "", platform.machine(), platform.processor())).encode())
    with contextlib.suppress(FileNotFoundError):
        described = Path("/proc/cpuinfo").read_text().splitlines()
        hashed.update(next((line for line in described if line.startswith(("flags", "Features"))), "").encode())
    return hashed.hexdigest()[:16]


class Kernel:
    """The compiled functions, called with tensors: contiguous, on the CPU, float32 but for packed weights."""

    def __init__(self, library: ctypes.CDLL) -> None:
        self._library = library
        self.panel: int = library.gpt2_panel()
        """Outputs of a panel, P in kernel.cpp."""

    def pack(self, weight: Tensor, linear: Linear, weight_bytes: int) -> None:
        """weight (N, K) into the matrix's panels, divided by its scale."""
        self._library.gpt2_pack(address(weight), ctypes.byref(linear), weight_bytes)

    def rows(self, linear: Linear, weight_bytes: int, ids: Tensor, y: Tensor) -> None:
        """The matrix's rows for int64 ids, into y (*ids.shape, K)."""
        self._library.gpt2_rows(ctypes.byref(linear), weight_bytes, address(ids), ids.numel(), address(y))

    def linear(self, linear: Linear, weight_bytes: int, x: Tensor, y: Tensor, then: int) -> None:
        """x (M, K) through a matrix into y (M, N)."""
        self._library.gpt2_linear(ctypes.byref(linear), weight_bytes, address(x), len(x), address(y), then)

    def forward(
        self, model: Model, ids: Tensor, past: int, first: Tensor, cache: Tensor, logits: Tensor, scratch: Tensor
    ) -> None:
        """ids (B, T) int64, each in the vocabulary, to logits (B, n, V) of the last n tokens.

        cache (n_layers, 2, B, H, length, D) holds `past` tokens and gets T more; first (B) int32 tells where each
        sequence begins after its padding; scratch has room for 6 B T C numbers.
        """
        B, T = ids.shape
        self._library.gpt2_forward(
            ctypes.byref(model), address(ids), B, T, past, cache.shape[4], address(first), address(cache),
            logits.shape[1], address(logits), address(scratch),
        )  # fmt: skip


def address(tensor: Tensor | None) -> ctypes.c_void_p:
    return ctypes.c_void_p(None if tensor is None else tensor.data_ptr())
