"""float32 matrix products through oneDNN, on processors where MKL leaves half of their speed unused.

torch multiplies float32 matrices with MKL, which keeps to AVX2 on AMD's processors; oneDNN uses AVX-512 where it is there.
Both multiply and add in float32, in another order, so results differ as two roundings do and are the same in every run.
The model knows nothing of this: it calls `F.linear`, and inside `with fast_linear():` that goes to oneDNN.
"""

from __future__ import annotations

import contextlib
import functools
import platform
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

WORTHWHILE = 1 << 27
"""Multiplications from which oneDNN is asked: small products lose more by its preparations than they gain."""


def fast_linear() -> contextlib.AbstractContextManager[Any]:
    """Inside, large float32 products of `F.linear` on the processor go the faster way, forward and backward.

    Where MKL is as fast it does nothing. Which it is depends on the processor alone, not on a measurement, so that a run
    repeats to the last bit. Not for gradient checkpointing: torch leaves the context on the way back, and what is computed
    anew there would go the other way, which torch refuses.
    """
    return OneDNNLinear() if mkl_leaves_avx512_unused() else contextlib.nullcontext()


@functools.cache
def mkl_leaves_avx512_unused() -> bool:
    """Whether this is an AMD processor with AVX-512, and torch has both libraries."""
    if not (torch.backends.mkl.is_available() and torch.backends.mkldnn.is_available()):
        return False
    return torch.backends.cpu.get_cpu_capability() == "AVX512" and "AuthenticAMD" in _processor()


def _processor() -> str:
    about = Path("/proc/cpuinfo")
    return about.read_text(encoding="utf-8", errors="replace") if about.is_file() else platform.processor()


class OneDNNLinear(TorchFunctionMode):
    """`F.linear` through oneDNN wherever that is worth while."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and _is_worthwhile(*args[:2]):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return func(*args, **(kwargs or {}))


def _is_worthwhile(x: Tensor, weight: Tensor) -> bool:
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.dim() == 2 <= x.dim()
        and x.numel() * weight.shape[0] >= WORTHWHILE
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    """y = x Wᵀ + b, and its three gradients."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return _product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, of_y: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        of_x, of_weight, of_bias = ctx.needs_input_grad
        rows = of_y.flatten(0, -2)  # (N, out)
        return (
            _product(of_y, weight.T) if of_x else None,
            _product(rows.T, x.flatten(0, -2).T) if of_weight else None,
            rows.sum(0) if of_bias else None,
        )


def _product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x Wᵀ + b, (..., out). The operator that torch.compile uses; in eager mode `F.linear` never comes to it in float32."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
