"""Tensors that are read from their file only when they are needed, and memory-mapped files."""

from __future__ import annotations

import mmap
import os
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor


@dataclass(frozen=True)
class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are read by `load`."""

    shape: tuple[int, ...]
    dtype: torch.dtype | None
    """The floating-point type; None for any other type, which a weight cannot have."""
    load: Callable[[], Tensor]
    """Read and return the values."""

    @classmethod
    def of(cls, array: Any) -> LazyTensor:
        """Wrap a torch tensor or a numpy array that is already in memory."""
        if isinstance(array, Tensor):
            return cls(tuple(array.shape), array.dtype if array.is_floating_point() else None, lambda: array)

        def load() -> Tensor:
            return torch.from_numpy(array if array.flags.writeable else array.copy())  # torch cannot protect a view

        return cls(array.shape, torch_float_type(array.dtype), load)

    def map(self, shape: tuple[int, ...], change: Callable[[Tensor], Tensor]) -> LazyTensor:
        """Return a lazy tensor of this shape that applies `change` when it is loaded."""
        return LazyTensor(shape, self.dtype, lambda: change(self.load()))

    def equals(self, other: LazyTensor) -> bool:
        """Load both tensors and return whether they share memory or have equal values."""
        if self is other:
            return True
        first, second = self.load(), other.load()
        return first.data_ptr() == second.data_ptr() or torch.equal(first, second)


LazyTensors = Mapping[str, LazyTensor]


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


def flatten(params: Mapping[str, Any]) -> dict[str, LazyTensor]:
    """Return the tensors of a state dict, or of nested parameters, as one flat dict.

    The keys of nested parameters, which `download_and_load_gpt2` returns, become OpenAI's variable names:
    h0/attn/c_attn/w, ln_f/g, wte. Raises ValueError for a value that is not a tensor or an array.
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
    """Return torch's equivalent of a floating-point dtype of numpy, or None for any other dtype."""
    names = {"float16": torch.float16, "float32": torch.float32, "float64": torch.float64}
    return names.get(dtype.name) if dtype.isnative else None
