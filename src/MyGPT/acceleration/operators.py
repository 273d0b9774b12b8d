"""Private operators of torch that the library uses, each with a public operator as a fallback.

A private operator can change or disappear with any release of torch. Each one is therefore tried once on small tensors, and is
used only if it exists and gives the right result.
"""

from __future__ import annotations

import functools
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor


def onednn_linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return F.linear(x, weight, bias) for float32 tensors, computed by oneDNN if possible and otherwise by F.linear."""
    # torch.compile uses this operator of oneDNN; in eager mode, F.linear never calls oneDNN for float32.
    return _onednn(x, weight, bias) if has_onednn_linear() else F.linear(x, weight, bias)


@functools.cache
def has_onednn_linear() -> bool:
    """Return True if torch can multiply float32 matrices with oneDNN."""
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    return torch.backends.mkldnn.is_available() and _gives(F.linear(x, weight, bias), lambda: _onednn(x, weight, bias))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return the float32 product x Wᵀ (M, N) of a float32 matrix x (M, K) and an int8 weight matrix W (N, K).

    torch's int8 kernel rounds x to bf16. Where the kernel cannot be used, the weight is converted to float32 instead.
    """
    if has_int8_linear() and x.shape[1] % 32 == 0:  # for other K the kernel crashes the process
        return _int8(x, weight).float()
    return onednn_linear(x, weight.float())


@functools.cache
def has_int8_linear() -> bool:
    """Return True if torch can multiply by an int8 matrix without converting the matrix to another type first."""
    x, weight = torch.arange(-16.0, 16).view(1, 32), torch.arange(-64, 64, dtype=torch.int8).view(4, 32)
    return _gives(F.linear(x, weight.float()).bfloat16(), lambda: _int8(x, weight))


def _int8(x: Tensor, weight: Tensor) -> Tensor:
    scales = torch.ones(len(weight), dtype=torch.bfloat16, device=weight.device)
    # Rows in float32 would be ten times slower.
    return torch.ops.aten._weight_int8pack_mm(x.bfloat16().contiguous(), weight.contiguous(), scales)


def _gives(expected: Tensor, operator: Callable[[], Tensor]) -> bool:
    """Return True if `operator` runs without an error and its result is close to `expected`."""
    try:
        return torch.allclose(operator(), expected, rtol=1e-2)
    except (AttributeError, RuntimeError, TypeError):
        return False
