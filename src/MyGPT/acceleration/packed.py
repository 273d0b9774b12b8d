"""The linear layers of an accelerated model, with weights in float32, bf16, int8 with one scale per output, or int4.

Rounding changes a bf16 weight by at most 2^-9 of its value, and an int8 weight by at most 1/254 of the largest weight of its
row. int4.py describes int4 weights. kernel.cpp adds hardly any other error: sums and activations are float32, except that
int8 weights are multiplied with activations rounded to 16 bits, which changes them by at most 2^-16 of the largest of 128
activations, and int4 weights with activations rounded to 8 bits, which changes them by at most 1/254 of the largest of 32.
torch's operators for bf16 and int8 weights round the activations to bf16. N outputs, K inputs, P rows of a weight matrix in
one panel (kernel.cpp).
"""

from __future__ import annotations

import contextlib
import math
import mmap
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.acceleration import int4
from MyGPT.acceleration.kernel import Kernel, LinearStruct, address
from MyGPT.acceleration.operators import int8_linear, onednn_linear

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "int8": torch.int8, "int4": torch.uint8}
"""The dtype in which an accelerated model stores its weights, by the name of the precision. int4 stores bytes."""
_TYPE_CODES = {"fp32": 0, "bf16": 1, "int8": 2, "int4": 3}  # enum Type in products.h
Then = Literal["store", "add", "gelu_new", "gelu"]
"""The last step of a linear layer: "store" stores the output, and "add" adds the output to a given tensor.
"gelu_new" applies the tanh approximation of GELU before storing, and "gelu" applies the exact GELU."""
_THEN_CODES = {"store": 0, "add": 1, "gelu_new": 2, "gelu": 3}  # enum Then in kernel.cpp


def row_scales(weight: Tensor) -> Tensor:
    """Return the int8 scale of each row of `weight` as a float32 tensor (N,): the largest absolute value of the row / 127."""
    largest = torch.linalg.vector_norm(weight, torch.inf, dim=1).float()
    return torch.where(largest == 0, torch.ones_like(largest), largest / 127)


class HugePages:
    """One block of memory for all weight matrices of a model.

    If possible, Linux provides it in pages of 2 MB instead of smaller ones, so that the weights are read 20% faster.
    """

    def __init__(self, n_bytes: int) -> None:
        self.used = 0
        if not hasattr(mmap, "MADV_HUGEPAGE"):
            self.memory = mmap.mmap(-1, n_bytes)
            return
        # The memory is private, because shared memory has no huge pages.
        self.memory = mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
        with contextlib.suppress(OSError):  # a system without huge pages is slower, not wrong
            self.memory.madvise(mmap.MADV_HUGEPAGE)

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Reserve the next free bytes of the memory for a tensor of this shape and dtype, and return it filled with zeros.

        The memory is released only after all of these tensors are deleted.
        """
        n, offset = math.prod(shape), self.used
        self.used += -(-n * dtype.itemsize // 64) * 64
        return torch.frombuffer(self.memory, dtype=dtype, count=n, offset=offset).view(shape)


def panel_shape(weight: Tensor, precision: str, kernel: Kernel) -> tuple[int, ...]:
    """Return the shape in which kernel.cpp stores a weight matrix (N, K) with P = kernel.panel rows interleaved.

    The shape is (N / P, K, P, 1) in float32, (N / P, K / 2, P, 2) in bf16 and int8, and (N / P, K / 32, 18 P) in int4.
    Quotients are rounded up.
    """
    N, K = weight.shape
    if precision == "int4":
        return -(-N // kernel.panel), -(-K // int4.GROUP), (2 + int4.GROUP // 2) * kernel.panel
    interleave = 1 if precision == "fp32" else 2
    return -(-N // kernel.panel), -(-K // interleave), kernel.panel, interleave


def panel_bytes(weights: list[Tensor], precision: str, kernel: Kernel) -> int:
    """Return the number of bytes that kernel.cpp needs to store all these weight matrices (see `panel_shape`)."""
    itemsize = DTYPES[precision].itemsize
    return sum(64 + math.prod(panel_shape(weight, precision, kernel)) * itemsize for weight in weights)


class PanelLinear:
    """A linear layer x Wᵀ + b that kernel.cpp computes. W (N, K) is stored in the order in which the kernel reads it."""

    def __init__(
        self,
        weight: Tensor,
        bias: Tensor | None,
        precision: str,
        kernel: Kernel,
        memory: HugePages,
        moments: Tensor | None = None,
    ) -> None:
        self.kernel = kernel
        self.shape = N, K = weight.shape
        self.panels = memory.take(panel_shape(weight, precision, kernel), DTYPES[precision])
        self.scale = row_scales(weight.detach()) if precision == "int8" else None
        self.bias = None if bias is None else copied(bias)
        if precision == "int4":
            rounded = int4.round_weight(weight, moments)
            self.panels.copy_(rounded.panels(kernel.panel))
            self.scale = rounded.scale
        self.ctypes_struct = LinearStruct(
            address(self.panels), address(self.scale), address(self.bias), N, K, _TYPE_CODES[precision]
        )
        if precision != "int4":
            kernel.pack(weight.detach().float().contiguous(), self.ctypes_struct)

    def __call__(self, x: Tensor, then: Then = "store", onto: Tensor | None = None) -> Tensor:
        """Return x Wᵀ + b, with shape (..., N), for x with shape (..., K).

        With then="gelu_new" or then="gelu", that GELU is applied to the result. With then="add", the result is added to the
        tensor `onto` (..., N) in place, and `onto` is returned.
        """
        y = x.new_empty(*x.shape[:-1], self.shape[0]) if onto is None else onto
        rows = x.reshape(-1, self.shape[1]).contiguous()
        self.kernel.linear(self.ctypes_struct, rows, y.view(-1, self.shape[0]), _THEN_CODES[then])
        return y

    def rows(self, ids: Tensor) -> Tensor:
        """Return the rows of W with the indices `ids`, (B, T) int64, as a float32 tensor (B, T, K)."""
        rows = torch.empty(*ids.shape, self.shape[1])
        self.kernel.rows(self.ctypes_struct, ids.contiguous(), rows)
        return rows


class PlainLinear:
    """A linear layer x Wᵀ + b that torch's operators compute. It replaces PanelLinear if there is no C++ compiler.

    int4 weights are stored in float32 after they are rounded, because torch has no fast product for them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, precision: str, moments: Tensor | None = None) -> None:
        if precision == "int4":
            weight, precision = int4.round_weight(weight, moments).values(), "fp32"
        self.bias = None if bias is None else copied(bias)
        self.scale = row_scales(weight.detach()) if precision == "int8" else None
        if self.scale is not None:
            weight = (weight.detach() / self.scale[:, None]).round()
        self.weight = copied(weight, DTYPES[precision])

    def __call__(self, x: Tensor, then: Then = "store", onto: Tensor | None = None) -> Tensor:
        y = self._product(x)
        if onto is not None:
            return onto.add_(y)
        return y if then == "store" else F.gelu(y, approximate="tanh" if then == "gelu_new" else "none")

    def _product(self, x: Tensor) -> Tensor:
        """Return x Wᵀ + b in float32, with shape (..., N), for x with shape (..., K)."""
        K = x.shape[-1]
        # Many rows are worth converting the weights to float32, because most CPUs multiply no narrower type fast.
        is_wide = self.weight.dtype == torch.float32 or x.numel() > 16 * K
        if is_wide and self.scale is None:
            return onednn_linear(x, self.weight.float(), self.bias)
        if is_wide:
            y = onednn_linear(x, self.weight.float())
        elif self.scale is None:
            y = F.linear(x.bfloat16(), self.weight).float()
        else:
            y = int8_linear(x.reshape(-1, K), self.weight).view(*x.shape[:-1], len(self.weight))
        if self.scale is not None:
            y = y * self.scale
        return y if self.bias is None else y + self.bias

    def rows(self, ids: Tensor) -> Tensor:
        rows = self.weight[ids].float()
        return rows if self.scale is None else rows * self.scale[ids][..., None]


def copied(tensor: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """Return a contiguous copy of the tensor in `dtype`, without gradients.

    Opened models have transposed weights, which torch's int8 operator refuses.
    """
    return tensor.detach().to(dtype, copy=True, memory_format=torch.contiguous_format)


AnyLinear = PanelLinear | PlainLinear
