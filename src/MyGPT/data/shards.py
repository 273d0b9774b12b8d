"""Token ids in several memory-mapped files (shards) that are used like one array.

A data set may be larger than the memory and have thousands of shards. A shard is mapped when it is first needed, and only
the shards used last stay mapped, because every map keeps a file open.
"""

from __future__ import annotations

import mmap
import operator
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, overload

import numpy as np
import numpy.typing as npt

from MyGPT.notebooks import Described

MAX_OPEN_SHARDS = 32
"""Number of shards of a data set that are mapped at the same time. A process may often open only 256 files."""


class ShardedTokens(Described, Sequence[int]):
    """Token ids in several files, in the order of the files. The object can be pickled; its files are not part of the pickle.

    `ids[i]` is a number. `ids[a:b]` is a ShardedTokens of this part, which reads nothing yet; `np.asarray(ids[a:b])` reads
    it. A file that is replaced, changed or removed while it is in use raises OSError.

    Args:
        paths: files that contain only ids, each with at least one id
        dtype: the type of the ids in the files, such as "<u2"
    """

    def __init__(self, paths: Iterable[str | os.PathLike[str]], dtype: npt.DTypeLike) -> None:
        dtype = np.dtype(dtype)
        self._files = _Files([_File.find(path, dtype) for path in paths], dtype)
        self._start, self._stop = 0, int(self._files.ends[-1])

    @property
    def dtype(self) -> np.dtype[Any]:
        """The type of the ids."""
        return self._files.dtype

    @property
    def shape(self) -> tuple[int]:
        """The number of ids, as the shape of an array with one dimension."""
        return (len(self),)

    def __len__(self) -> int:
        return self._stop - self._start

    @overload
    def __getitem__(self, index: int) -> int: ...
    @overload
    def __getitem__(self, index: slice) -> ShardedTokens: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            start, stop, step = index.indices(len(self))
            if step != 1:
                raise ValueError(f"a slice of token ids in files must have the step 1, got {step}")
            part = object.__new__(ShardedTokens)
            part._files, part._start = self._files, self._start + start
            part._stop = max(part._start, self._start + stop)
            return part
        index = operator.index(index)
        if not -len(self) <= index < len(self):
            raise IndexError(f"there is no token {index} among {len(self)} tokens")
        start = self._start + index % len(self)
        return next(self._files.read(start, start + 1))[0]

    def __iter__(self) -> Iterator[int]:
        return (id_ for part in self._files.read(self._start, self._stop) for id_ in part)

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> npt.NDArray[Any]:
        parts = list(self._files.read(self._start, self._stop))
        array = parts[0] if len(parts) == 1 else np.concatenate([*parts, np.empty(0, self.dtype)])
        return array.astype(self.dtype if dtype is None else dtype, copy=bool(copy))

    def summary(self) -> dict[str, object]:
        """Return the number and the type of the ids."""
        return {"ids": len(self), "dtype": self.dtype}

    def astype(self, dtype: npt.DTypeLike) -> npt.NDArray[Any]:
        """Return the ids as an array of another type in memory."""
        return np.asarray(self).astype(dtype)

    def tolist(self) -> list[int]:
        """Return the ids as a list."""
        return np.asarray(self).tolist()

    def max(self) -> int:
        """Return the largest id. All files are read, one after the other."""
        return max(int(part.max()) for part in self._files.read(self._start, self._stop))


class _File:
    """A file of token ids, and what identifies this version of it."""

    def __init__(self, path: Path, version: tuple[int, ...], n_tokens: int) -> None:
        self.path, self.version, self.n_tokens = path, version, n_tokens

    @classmethod
    def find(cls, path: str | os.PathLike[str], dtype: np.dtype[Any]) -> _File:
        path = Path(path)
        n_tokens, rest = divmod(path.stat().st_size, dtype.itemsize)
        if rest or not n_tokens:
            size = n_tokens * dtype.itemsize + rest
            raise ValueError(f"{path} has {size} bytes, which is not a positive number of ids of type {dtype}")
        return cls(path, _version(path), n_tokens)


class _Files:
    """The files of a data set, of which at most MAX_OPEN_SHARDS are mapped into memory."""

    def __init__(self, files: Sequence[_File], dtype: np.dtype[Any]) -> None:
        if not files:
            raise ValueError("token ids in files need at least one file")
        self.files, self.dtype = files, dtype
        self.ends = np.cumsum([file.n_tokens for file in files])
        self._map = lru_cache(MAX_OPEN_SHARDS)(self._open)

    def __reduce__(self) -> tuple[Any, ...]:
        return _Files, (self.files, self.dtype)

    def read(self, start: int, stop: int) -> Iterator[npt.NDArray[Any]]:
        """Yield the ids from `start` to `stop` in pieces, one for each file that contains some of them."""
        number = int(np.searchsorted(self.ends, start, side="right"))
        while start < stop:
            end = int(self.ends[number])
            first = end - self.files[number].n_tokens
            yield self._map(number)[start - first : min(stop, end) - first]
            start, number = end, number + 1

    def _open(self, number: int) -> npt.NDArray[Any]:
        file = self.files[number]
        array = map_ids(file.path, self.dtype)
        if _version(file.path) != file.version:
            raise OSError(f"{file.path} was replaced or changed while it was in use: start again with the new data")
        return array


def map_ids(path: str | os.PathLike[str], dtype: npt.DTypeLike) -> npt.NDArray[Any]:
    """Return the content of a file as a read-only array that is mapped into memory."""
    with open(path, "rb") as file:
        content = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    if hasattr(mmap, "MADV_RANDOM"):
        # Otherwise the system reads up to megabytes around each window of a few kilobytes.
        content.madvise(mmap.MADV_RANDOM)
    return np.frombuffer(content, dtype)


def _version(path: Path) -> tuple[int, ...]:
    status = path.stat()
    return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns
