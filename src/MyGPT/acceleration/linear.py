"""Faster training on AMD CPUs: large float32 matrix products use oneDNN, which is about twice as fast as MKL there.

torch multiplies float32 matrices with MKL, which uses only AVX2 on AMD CPUs. oneDNN uses AVX-512 where the CPU has it. Both
libraries compute in float32 but add in different orders, so their results differ by rounding. Each gives identical results in
every run. The model itself is unchanged: it calls `F.linear`, and `with fast_linear():` redirects these calls.
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

from MyGPT.acceleration.operators import has_onednn_linear, onednn_linear

MIN_MULTIPLICATIONS = 1 << 27
"""Number of multiplications from which a matrix product is computed by oneDNN.

Smaller products stay with MKL, because oneDNN's setup would take longer than it saves."""


def fast_linear() -> contextlib.AbstractContextManager[Any]:
    """Return a context manager in which `F.linear` uses oneDNN for large float32 products on the CPU, forward and backward.

    oneDNN is used only on AMD CPUs with AVX-512. On other CPUs the context manager does nothing. The
    choice depends only on the CPU and on how torch was built, so results are reproducible. Gradient checkpointing is not
    supported: the backward pass would recompute with MKL, outside of the context, and torch would report that the
    recomputed tensors differ.
    """
    return OneDNNLinear() if onednn_is_faster() else contextlib.nullcontext()


@functools.cache
def onednn_is_faster() -> bool:
    """Return True on an AMD CPU with AVX-512, if torch has both MKL and oneDNN."""
    if not torch.backends.mkl.is_available() or torch.backends.cpu.get_cpu_capability() != "AVX512":
        return False
    return "AuthenticAMD" in _cpu_description() and has_onednn_linear()


def _cpu_description() -> str:
    cpuinfo = Path("/proc/cpuinfo")
    return cpuinfo.read_text(encoding="utf-8", errors="replace") if cpuinfo.is_file() else platform.processor()


class OneDNNLinear(TorchFunctionMode):
    """A context manager in which `F.linear` uses oneDNN for large float32 products on the CPU."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.linear and not kwargs and uses_onednn(*args[:2]):
            return _Linear.apply(*args, *[None] * (3 - len(args)))
        return func(*args, **(kwargs or {}))


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None, out: Tensor | None = None) -> Tensor:
    """Return x Wᵀ + bias (N, M) for float32 matrices x (N, K) and `weight` (M, K), from the faster library on this CPU.

    Autograd does not record the product. The result is in `out` if it is given, and bias must then be None.
    """
    if onednn_is_faster() and uses_onednn(x, weight):
        y = onednn_linear(x, weight, bias)
        return y if out is None else out.copy_(y)
    if bias is not None:
        return torch.addmm(bias, x, weight.T)
    return torch.mm(x, weight.T) if out is None else torch.mm(x, weight.T, out=out)


def uses_onednn(x: Tensor, weight: Tensor) -> bool:
    """Return True for a product that oneDNN can compute in float32 and that is large enough to be worth its setup."""
    return (
        x.dtype == weight.dtype == torch.float32
        and x.device.type == weight.device.type == "cpu"
        and weight.dim() == 2 <= x.dim()
        and x.numel() * weight.shape[0] >= MIN_MULTIPLICATIONS
        and not torch.is_autocast_enabled("cpu")
    )


class _Linear(torch.autograd.Function):
    """A linear layer x Wᵀ + b whose forward and backward matrix products are computed by oneDNN."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return onednn_linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, y_grad: Tensor) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
        x, weight = ctx.saved_tensors
        needs_x, needs_weight, needs_bias = ctx.needs_input_grad
        rows = y_grad.flatten(0, -2)  # (rows, N)
        return (
            onednn_linear(y_grad, weight.T) if needs_x else None,
            onednn_linear(rows.T, x.flatten(0, -2).T) if needs_weight else None,
            rows.sum(0) if needs_bias else None,
        )
