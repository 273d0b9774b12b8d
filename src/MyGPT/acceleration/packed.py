"""A model's matrices, laid out once for generation: in float32, in bf16, or as int8 with a scale for each output.

A bf16 weight is off by at most 2^-9 of itself, an int8 weight by half of its row's largest over 127. Through kernel.cpp that
is nearly all: sums are float32, and so are activations, but that int8 weights meet them rounded to 16 bits, off by at most
2^-16 of the largest of 128. torch's operators for narrow weights round the activations to bf16.
N outputs, K inputs.
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.acceleration.kernel import Kernel, Linear, address

Precision = Literal["fp32", "bf16", "int8"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8}
Then = Literal["store", "add", "gelu_new", "gelu"]
"""What becomes of a product: it is the result, is added to what is there, or goes through one of the two GELUs."""
_THEN = {"store": 0, "add": 1, "gelu_new": 2, "gelu": 3}  # as in kernel.cpp


def row_scales(weight: Tensor) -> Tensor:
    """What an int8 weight of 1 stands for in each row: the largest of the row's magnitudes is 127. (N,) float32."""
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=1).float()
    return torch.where(largest > 0, largest / 127, torch.ones_like(largest))


class HugePages:
    """Memory for all matrices of a model in pages of 2 MB where Linux gives them: a fifth faster to read than in 4 KB."""

    def __init__(self, n_bytes: int) -> None:
        self.used = 0
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory = mmap.mmap(-1, n_bytes)
            return
        self.memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)  # shared memory has none
        with contextlib.suppress(OSError):  # nor has every system
            self.memory.madvise(mmap.MADV_HUGEPAGE)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """A tensor of zeros, which keeps the memory alive."""
        n, offset = math.prod(shape), self.used
        self.used += -(-n * dtype.itemsize // 64) * 64
        return torch.frombuffer(self.memory, dtype=dtype, count=n, offset=offset).view(shape)


def panel_shape(weight: Tensor, precision: Precision, kernel: Kernel) -> tuple[int, int, int, int]:
    """(N / P, K / 2, P, 2) for narrow weights, (N / P, K, P, 1) for float32; what does not divide is filled up."""
    N, K = weight.shape
    together = 1 if precision == "fp32" else 2
    return -(-N // kernel.panel), -(-K // together), kernel.panel, together


def panel_bytes(weights: list[Tensor], precision: Precision, kernel: Kernel) -> int:
    """How much memory the panels of all the weights take."""
    itemsize = DTYPES[precision].itemsize
    return sum(64 + math.prod(panel_shape(weight, precision, kernel)) * itemsize for weight in weights)


class PanelLinear:
    """x Wᵀ + b by kernel.cpp, from panels in the order in which it reads them."""

    def __init__(
        self, weight: Tensor, bias: Tensor | None, precision: Precision, kernel: Kernel, memory: HugePages
    ) -> None:
        self.kernel = kernel
        self.shape = N, K = weight.shape
        self.panels = memory.take(panel_shape(weight, precision, kernel), DTYPES[precision])
        self.scale = row_scales(weight) if precision == "int8" else None
        self.bias = None if bias is None else bias.detach().float().contiguous()
        self.described = Linear(address(self.panels), address(self.scale), address(self.bias), N, K)
        kernel.pack(weight.detach().float().contiguous(), self.described, self.panels.element_size())

    def __call__(self, x: Tensor, then: Then = "store", onto: Tensor | None = None) -> Tensor:
        """x (..., K) to (..., N); for "add" it goes onto a tensor of that shape, which is changed."""
        y = x.new_empty(*x.shape[:-1], self.shape[0]) if onto is None else onto
        rows = x.reshape(-1, self.shape[1])
        self.kernel.linear(self.described, self.panels.element_size(), rows, y.view(-1, self.shape[0]), _THEN[then])
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, as it is multiplied with, for ids (B, T): (B, T, K) float32."""
        rows = torch.empty(*ids.shape, self.shape[1])
        self.kernel.rows(self.described, self.panels.element_size(), ids.contiguous(), rows)
        return rows


class PlainLinear:
    """x Wᵀ + b by torch's operators, where there is no compiler."""

    def __init__(self, weight: Tensor, bias: Tensor | None, precision: Precision) -> None:
        weight = weight.detach()
        self.bias = None if bias is None else bias.detach().float()
        self.scale = row_scales(weight) if precision == "int8" else None
        if self.scale is not None:
            weight = (weight / self.scale[:, None]).round()
        self.weight = weight.to(DTYPES[precision])

    def __call__(self, x: Tensor, then: Then = "store", onto: Tensor | None = None) -> Tensor:
        """x (..., K) to (..., N); for "add" it goes onto a tensor of that shape, which is changed."""
        y = self._product(x)
        if onto is not None:
            return onto.add_(y)
        return y if then == "store" else F.gelu(y, approximate="tanh" if then == "gelu_new" else "none")

    def _product(self, x: Tensor) -> Tensor:
        weight = self.weight
        K = x.shape[-1]
        # For many rows float32 pays for widening the weights, and most processors multiply nothing narrower fast. torch's
        # int8 kernel ends the process when a row is not a multiple of its blocks long.
        if weight.dtype == torch.float32 or x.numel() > 16 * K or (self.scale is not None and K % 32):
            y = _float32_linear(x, weight.float(), self.bias if self.scale is None else None)
        elif self.scale is None:
            y = F.linear(x.bfloat16(), weight).float()
            return y if self.bias is None else y + self.bias
        else:
            rows = x.reshape(-1, K).bfloat16()  # for float32 rows torch's kernel is ten times slower
            y = torch.ops.aten._weight_int8pack_mm(rows, weight, torch.ones_like(self.scale, dtype=torch.bfloat16))
            y = y.view(*x.shape[:-1], -1).float()
        if self.scale is None:
            return y
        y = y * self.scale
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Tensor) -> Tensor:
        """Rows of W, as it is multiplied with, for ids (B, T): (B, T, K) float32."""
        rows = self.weight[ids].float()
        return rows if self.scale is None else rows * self.scale[ids][..., None]


def _float32_linear(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Through oneDNN, which reads memory about twice as fast as MKL for a few rows on AMD's processors."""
    if torch.backends.mkldnn.is_available():
        return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
    return F.linear(x, weight, bias)


AnyLinear = PanelLinear | PlainLinear
