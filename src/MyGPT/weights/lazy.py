"""Tensors that are read from their file only when they are needed, and memory-mapped files."""

from __future__ import annotations

import ctypes
import functools
import math
import mmap
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from MyGPT.ranks import whole


@dataclass(frozen=True)
class LazyTensor:
    """A tensor in a file or in memory. Its shape and dtype are known from the start; `load` reads its values."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """The floating-point dtype, or None if the values are not floating-point numbers."""
    load: Callable[[], Tensor]
    """A function that reads the values and returns them as a tensor."""

    @classmethod
    def of(cls, array: Any) -> LazyTensor:
        """Return a lazy tensor for a torch tensor or numpy array that is already in memory.

        If a torch tensor is sharded, loading gathers it from all ranks.
        """
        if isinstance(array, Tensor):
            return cls(tuple(array.shape), array.dtype if array.is_floating_point() else None, lambda: whole(array))

        def load() -> Tensor:
            return torch.from_numpy(array if array.flags.writeable else array.copy())  # torch cannot protect a view

        return cls(array.shape, torch_float_type(array.dtype), load)

    @property
    def nbytes(self) -> int:
        """The number of bytes of the values in memory."""
        itemsize = self.load().element_size() if self.dtype is None else self.dtype.itemsize
        return math.prod(self.shape) * itemsize

    def map(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return a lazy tensor that loads this tensor and applies `change`, which must return a tensor of `shape`."""
        return LazyTensor(shape, self.dtype, lambda: change(self.load()))

    def equals(self, other: LazyTensor) -> bool:
        """Load both tensors and return whether they share memory or have equal values. Their dtypes may differ."""
        if self is other:
            return True
        first, second = self.load(), other.load()
        common = torch.promote_types(first.dtype, second.dtype)
        return first.data_ptr() == second.data_ptr() or torch.equal(first.to(common), second.to(common))


LazyTensors = Mapping[str, LazyTensor]


class MappedFile:
    """A file that is memory-mapped at the first `read`, and unmapped when all arrays that `read` returned are deleted.

    Tensors that are read and freed one after another therefore do not fill the memory, and no file stays open (macOS
    allows 256 open files). Writing to an array does not change the file. The arrays stay valid if the file is deleted
    or replaced. If the file is truncated in place, reading past the new end kills the process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._mapped: weakref.ref[mmap.mmap] | None = None

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return the `size` bytes that start at byte `offset`. Raises ValueError if the file is too short."""
        if size == 0:
            return np.empty(0, dtype=np.uint8)
        mapped = self._mapped() if self._mapped is not None else None
        if mapped is None:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mapped = weakref.ref(mapped)
        return np.frombuffer(mapped, np.uint8, size, offset)

    def read_tensor(self, name: str, offset: int, size: int) -> NDArray[np.uint8]:
        """Return the `size` bytes of the tensor called `name` that start at byte `offset`. Errors contain the name."""
        try:
            return self.read(offset, size)
        except ValueError as error:
            raise ValueError(f"{self.path} is damaged: {name} cannot be read: {error}") from None


def release_pages(tensor: Tensor) -> None:
    """Release the memory pages of `tensor` that the system can read again from a memory-mapped file (on Linux only).

    The tensor stays usable, because the next access reads the pages again. Pages that were modified, and memory that
    belongs to no file, are not released.
    """
    pagemap = Path("/proc/self/pagemap")
    if tensor.numel() == 0 or tensor.device.type != "cpu" or not pagemap.exists():
        return
    page = mmap.PAGESIZE
    span = 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))
    first = tensor.data_ptr() // page
    end = (tensor.data_ptr() + span * tensor.element_size() - 1) // page + 1
    try:
        with open(pagemap, "rb", buffering=0) as file:
            file.seek(8 * first)
            entries = np.frombuffer(file.read(8 * (end - first)), np.uint64)
    except OSError:  # a system that hides its page tables
        return
    # See pagemap.rst of the Linux kernel: bit 63 present in memory, 62 swapped out, 61 page of a file or of shared memory.
    present, swapped, of_file = (entries >> np.uint64(bit) & np.uint64(1) for bit in (63, 62, 61))
    must_stay = ((present & ~of_file) | swapped).astype(bool)
    edges = np.flatnonzero(np.diff(np.concatenate([[True], must_stay, [True]]).astype(np.int8)))
    for start, stop in zip(edges[::2].tolist(), edges[1::2].tolist(), strict=True):
        # An error means that the pages cannot be released, for example because they are locked in memory.
        _libc().madvise((first + start) * page, (stop - start) * page, mmap.MADV_DONTNEED)


@functools.cache
def _libc() -> ctypes.CDLL:
    library = ctypes.CDLL(None)
    library.madvise.argtypes = (ctypes.c_size_t, ctypes.c_size_t, ctypes.c_int)
    return library


def flatten(params: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return a state dict, or the nested dict that `download_and_load_gpt2` returns, as a flat dict of lazy tensors.

    The keys of a nested dict become OpenAI's variable names: h0/attn/c_attn/w, ln_f/g, wte.

    Raises ValueError for a value that is not a tensor or an array.
    """
    if isinstance(params.get("blocks"), (list, tuple)):
        blocks = {f"h{i}": block for i, block in enumerate(params["blocks"])}
        top = {f"ln_f/{key}" if key in ("g", "b") else key: params[key] for key in params if key != "blocks"}
        params = {**top, **blocks}
    flat: dict[str, LazyTensor] = {}

    def add(path: str, value: Any) -> None:
        if isinstance(value, Mapping):
            for key, inner in value.items():
                add(f"{path}/{key}", inner)
        elif isinstance(value, (Tensor, np.ndarray)):
            flat[path] = LazyTensor.of(value)
        else:
            raise ValueError(f"{path} is {type(value).__name__}, but weights must be tensors or arrays")

    for key, value in params.items():
        add(str(key), value)
    return flat


def torch_float_type(dtype: np.dtype[Any]) -> torch.dtype | None:
    """Return the torch dtype that corresponds to a floating-point numpy dtype, or None for any other numpy dtype."""
    names = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    return names.get(dtype.name) if dtype.isnative else None
