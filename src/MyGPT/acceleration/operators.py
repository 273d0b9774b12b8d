"""torch's private operators that the library uses, each with a public one to fall back on.

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
    """Return x Wᵀ + b in float32, (..., N), computed by oneDNN if possible and otherwise by F.linear."""
    # torch.compile uses this operator of oneDNN; in eager mode, F.linear never calls oneDNN for float32.
    return _onednn(x, weight, bias) if has_onednn_linear() else F.linear(x, weight, bias)


@functools.cache
def has_onednn_linear() -> bool:
    """Return whether torch can multiply float32 matrices with oneDNN."""
    x, weight, bias = torch.arange(6.0).view(2, 3), torch.arange(12.0).view(4, 3), torch.arange(4.0)
    return torch.backends.mkldnn.is_available() and _gives(F.linear(x, weight, bias), lambda: _onednn(x, weight, bias))


def _onednn(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


def int8_linear(x: Tensor, weight: Tensor) -> Tensor:
    """Return x Wᵀ, (M, N) float32, for rows x (M, K) and an int8 weight (N, K).

    torch's int8 kernel reads x rounded to bf16. Where the kernel cannot be used, the weight is converted to float32 first.
    """
    if has_int8_linear() and x.shape[1] % 32 == 0:  # for other K the kernel crashes the process
        return _int8(x, weight).float()
    return onednn_linear(x, weight.float())


@functools.cache
def has_int8_linear() -> bool:
    """Return whether torch can multiply with an int8 matrix without converting it first."""
    x, weight = torch.arange(-16.0, 16).view(1, 32), torch.arange(-64, 64, dtype=torch.int8).view(4, 32)
    return _gives(F.linear(x, weight.float()).bfloat16(), lambda: _int8(x, weight))


def _int8(x: Tensor, weight: Tensor) -> Tensor:
    scales = torch.ones(len(weight), dtype=torch.bfloat16, device=weight.device)
    return torch.ops.aten._weight_int8pack_mm(x.bfloat16(), weight, scales)  # ten times slower for float32 rows


def _gives(expected: Tensor, operator: Callable[[], Tensor]) -> bool:
    """Return whether a private operator exists, accepts these arguments and gives the expected result."""
    try:
        return torch.allclose(operator(), expected, rtol=1e-2)
    except (AttributeError, RuntimeError, TypeError):
        return False
