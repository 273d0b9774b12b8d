"""The memory of an accelerated model: named arrays in huge pages, which are computed or read from a file of packed weights."""

from __future__ import annotations

import contextlib
import math
import mmap

import torch
from torch import Tensor

_ALIGNMENT = 64
"""Each array starts at a multiple of this number of bytes, which is the size of a cache line."""


class HugePages:
    """Memory for tensors, in blocks of at least `block_bytes` bytes.

    If possible, Linux provides it in pages of 2 MB instead of smaller ones, so that the weights are read 20% faster. A page
    takes up memory only after something has been written to it.
    """

    def __init__(self, block_bytes: int = 64 << 20) -> None:
        self.block_bytes = block_bytes
        self.block: mmap.mmap | None = None
        self.used = 0

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Reserve the next free bytes of the memory for a tensor of this shape and dtype, and return it filled with zeros.

        A block is released only after all of its tensors are deleted.
        """
        n_bytes = math.prod(shape) * dtype.itemsize
        if self.block is None or self.used + n_bytes > len(self.block):
            self.block, self.used = _new_block(max(self.block_bytes, n_bytes, 1)), 0
        offset = self.used
        self.used += -(-n_bytes // _ALIGNMENT) * _ALIGNMENT
        return torch.frombuffer(self.block, dtype=dtype, count=math.prod(shape), offset=offset).view(shape)


def _new_block(n_bytes: int) -> mmap.mmap:
    """Return memory filled with zeros, which Linux provides in pages of 2 MB if possible."""
    if not hasattr(mmap, "MADV_HUGEPAGE"):
        return mmap.mmap(-1, n_bytes)
    # The memory is private, because shared memory has no huge pages.
    block = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a system without huge pages is slower, not wrong
        block.madvise(mmap.MADV_HUGEPAGE)
    return block


class Arrays:
    """The arrays of an accelerated model by name. A layer takes each of its arrays and, unless they are filled, fills it."""

    def __init__(self, stored: dict[str, Tensor] | None = None) -> None:
        """Start without arrays, or with those that were read from a file."""
        self.named: dict[str, Tensor] = {}
        """The arrays that were taken so far, in this order."""
        self._stored = stored
        self._memory = HugePages()

    @property
    def are_filled(self) -> bool:
        """True if the arrays come from a file, so that the layers need not fill them."""
        return self._stored is not None

    def take(self, name: str, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Return the array called `name`. Raises ValueError if a file lacks it, or has it with another shape or dtype."""
        if self._stored is None:
            array = self._memory.take(shape, dtype)
        else:
            found = self._stored.get(name)
            if found is None or tuple(found.shape) != shape or found.dtype != dtype:
                raise ValueError(f"its array {name} does not fit this model")
            array = found
        self.named[name] = array
        return array
