"""Bytes of a file as arrays that cost no memory until they are looked at, and no copy then."""

from __future__ import annotations

import mmap
import os
import weakref

import numpy as np
from numpy.typing import NDArray


class MappedFile:
    """A file that is mapped once, at the first `read`, and only as long as an array of it lives.

    Tensors that are read and let go one after another do not add up in memory so, and no file is held open for those that
    stay (macOS allows 256). The mapping is private: writing to an array changes memory only, never the file, and a file that
    is deleted or replaced lives on in it. One that is shortened in its place does not: reading past its end kills a process.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = path
        self._mapped: weakref.ref[mmap.mmap] | None = None

    def read(self, offset: int, size: int) -> NDArray[np.uint8]:
        """`size` bytes from `offset` on; a ValueError if the file has become too short for them."""
        if size == 0:
            return np.empty(0, dtype=np.uint8)
        mapped = self._mapped() if self._mapped is not None else None
        if mapped is None:
            with open(self.path, "rb") as file:
                mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
            self._mapped = weakref.ref(mapped)
        return np.frombuffer(mapped, np.uint8, size, offset)
