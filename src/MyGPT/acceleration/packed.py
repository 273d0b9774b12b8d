"""The linear layers of an accelerated model, with weights in float32, bf16, int8 with one scale per output, or int4.

Rounding changes a bf16 weight by at most 2^-8 of its value, and an int8 weight by at most 1/254 of the largest weight of its
row. int4.py describes int4 weights. kernel.cpp adds hardly any other error: sums and activations are float32, except that
int8 weights are multiplied with activations rounded to 16 bits, which changes them by at most 2^-16 of the largest of 128
activations, and int4 weights with activations rounded to 8 bits, which changes them by at most 1/254 of the largest of 32.
torch's operators for bf16 and int8 weights round the activations to bf16. N outputs, K inputs, P rows of a weight matrix in
one panel (kernel.cpp).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor

from MyGPT.acceleration import int4
from MyGPT.acceleration.kernel import Kernel, LinearStruct, address
from MyGPT.acceleration.operators import int8_linear, onednn_linear
from MyGPT.acceleration.storage import Arrays
from MyGPT.sampling import require_finite
from MyGPT.weights.lazy import LazyTensor, release_pages

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


PACKED_BYTES = 4 << 20
"""Number of bytes of a weight matrix that are read before their memory is released."""


def panel_shape(N: int, K: int, precision: str, kernel: Kernel) -> tuple[int, ...]:
    """Return the shape in which kernel.cpp stores a weight matrix (N, K) with P = kernel.panel rows interleaved.

    The shape is (N / P, K, P, 1) in float32, (N / P, K / 2, P, 2) in bf16 and int8, and (N / P, K / 32, 18 P) in int4.
    Quotients are rounded up.
    """
    if precision == "int4":
        return -(-N // kernel.panel), -(-K // int4.GROUP), (2 + int4.GROUP // 2) * kernel.panel
    interleave = 1 if precision == "fp32" else 2
    return -(-N // kernel.panel), -(-K // interleave), kernel.panel, interleave


class PanelLinear:
    """A linear layer x Wᵀ + b that kernel.cpp computes. W (N, K) is stored in the order in which the kernel reads it.

    Args:
        name: the name of the layer in the model, such as "transformer.h.0.attn.c_attn".
        weight: W, which is read only if `arrays` are not filled.
        bias: b, or None.
        precision: the number format of the packed weights.
        kernel: the compiled kernel.cpp.
        arrays: the memory of the packed weights. They are filled already if they come from a file of packed weights.
        moments: the sum of xᵀx over inputs x of the layer in a calibration text, for int4 with error feedback; or None.

    Raises:
        FloatingPointError: precision is "int8" or "int4", and a weight is NaN or infinite.
    """

    def __init__(
        self,
        name: str,
        weight: LazyTensor,
        bias: LazyTensor | None,
        precision: str,
        kernel: Kernel,
        arrays: Arrays,
        moments: Tensor | None = None,
    ) -> None:
        self.kernel = kernel
        self.shape = N, K = weight.shape
        self.panels = arrays.take(f"{name}.panels", panel_shape(N, K, precision, kernel), DTYPES[precision])
        self.scale = arrays.take(f"{name}.scale", (N,), torch.float32) if precision in ("int8", "int4") else None
        self.bias = None if bias is None else float_array(f"{name}.bias", bias, precision, arrays)
        self.ctypes_struct = LinearStruct(
            address(self.panels), address(self.scale), address(self.bias), N, K, _TYPE_CODES[precision]
        )
        if not arrays.are_filled:
            self._pack(f"{name}.weight", weight.load().detach(), moments)

    def _pack(self, name: str, weight: Tensor, moments: Tensor | None) -> None:
        """Fill the panels and the scales with the weight matrix `weight`, (N, K), whose name is used in errors.

        A memory-mapped matrix is read in groups of rows, and the memory of each group is released before the next is read.
        """
        if weight.dtype not in (torch.float32, torch.bfloat16, torch.float16):
            weight = weight.float()
        N, K = self.shape
        n_rows = N
        # Each group of rows of a transposed matrix is spread over the whole matrix.
        is_stored_by_rows = weight.stride(0) > weight.stride(1)
        if moments is None and is_stored_by_rows:
            n_rows = -(-PACKED_BYTES // (K * weight.element_size() * self.kernel.panel)) * self.kernel.panel
        for first in range(0, N, n_rows):
            rows = weight[first : first + n_rows]
            if self.panels.dtype == torch.uint8:
                self._pack_int4(name, rows, first, moments)
            elif not self.kernel.pack(rows, self.ctypes_struct, first):
                require_finite(f"a weight of {name}", rows)
            release_pages(rows)

    def _pack_int4(self, name: str, rows: Tensor, first: int, moments: Tensor | None) -> None:
        assert self.scale is not None
        require_finite(f"a weight of {name}", torch.linalg.vector_norm(rows, torch.inf))
        rounded = int4.round_weight(rows, moments)
        panels, end = rounded.panels(self.kernel.panel), first + len(rows)
        self.panels[first // self.kernel.panel :][: len(panels)] = panels
        self.scale[first:end] = rounded.scale

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


def float_array(name: str, tensor: LazyTensor, precision: str, arrays: Arrays) -> Tensor:
    """Return the array called `name`, in float32. Unless the arrays are filled, it becomes a copy of `tensor`.

    Raises FloatingPointError if precision is "int8" or "int4" and a value is NaN or infinite, because such weights have no NaN.
    """
    array = arrays.take(name, tensor.shape, torch.float32)
    if not arrays.are_filled:
        values = tensor.load().detach()
        array.copy_(values)
        release_pages(values)
        if precision in ("int8", "int4"):
            require_finite(f"a weight of {name}", array)
    return array


AnyLinear = PanelLinear | PlainLinear
