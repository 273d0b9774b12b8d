"""Files as arrays: memory-mapped, so that bytes are read from disk only when they are used, and never copied."""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray


class MappedFile:
    """A file that is mapped at the first `read` and unmapped when the last array of it is deleted.

    Tensors that are read and freed one after another therefore do not add up in memory, and no file stays open (macOS
    allows 256 open files). Writing to an array changes memory only, never the file. The arrays stay valid if the file
    is deleted or replaced, but not if it is truncated in place: reading past the new end kills the process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._mapped: weakref.ref[mmap.mmap] | None = None

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """Return `size` bytes from `offset`. Raises ValueError if the file has become too short."""
        if size == 0:
            return np.empty(0, dtype=np.uint8)
        mapped = self._mapped() if self._mapped is not None else None
        if mapped is None:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mapped = weakref.ref(mapped)
        return np.frombuffer(mapped, np.uint8, size, offset)
