"""The arithmetic of training: number formats, fast kernels, compilation and deterministic algorithms."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch

from MyGPT.acceleration.linear import fast_linear
from MyGPT.config import TrainingPrecision
from MyGPT.loss import compiled_loss
from MyGPT.training.config import TrainConfig


def autocast_dtype(device: torch.device, precision: TrainingPrecision, emb_dim: int) -> torch.dtype | None:
    """Return torch.bfloat16 if the matrix products of training should run in bfloat16, or None for no autocast.

    The precision "auto" chooses bfloat16 where it is faster: on GPUs with native bfloat16, and on CPUs with AVX-512
    BF16 or AMX instructions if the model's width emb_dim is at least 256. In a narrower model, a CPU loses more time in
    conversions than it saves.
    """
    is_bf16 = precision == "bf16"
    if precision == "auto" and device.type == "cuda":
        is_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif precision == "auto" and device.type == "cpu":
        is_bf16 = emb_dim >= 256 and _cpu_has_bf16()
    return torch.bfloat16 if is_bf16 else None


@contextmanager
def deterministic_algorithms(required: bool) -> Iterator[None]:
    """Make torch use only deterministic algorithms inside the `with` block if `required` is True.

    On a CPU, torch's algorithms are always deterministic. On a GPU, deterministic algorithms may be slower, and an
    operation without a deterministic algorithm raises RuntimeError.
    """
    mode = torch.get_deterministic_debug_mode()
    if required:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # cuBLAS is not deterministic without it.
        torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.set_deterministic_debug_mode(mode)


@contextmanager
def forward_pass(config: TrainConfig, device: torch.device, dtype: torch.dtype | None) -> Iterator[None]:
    """Run the `with` block in autocast to `dtype`, or without autocast if `dtype` is None.

    On a CPU, linear layers use the kernels of `fast_linear`, unless `config` turns on compile or gradient_checkpointing,
    which cannot use these kernels. If `config` turns on compile, a GPU also computes the loss with compiled code.
    """
    # Neither compiled code nor the second forward pass of gradient checkpointing would use the kernels of fast_linear.
    is_plain = device.type == "cpu" and not config.compile and not config.gradient_checkpointing
    is_compiled = device.type == "cuda" and config.compile
    kernels = fast_linear() if is_plain else compiled_loss() if is_compiled else nullcontext()
    with kernels, torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


def uncompiled(config: TrainConfig) -> AbstractContextManager[object]:
    """Return a context in which compiled blocks run uncompiled, because torch would recompile them for new shapes.

    If config.compile is False, the context does nothing.
    """
    # Without config.compile, torch's compiler need not be installed.
    return torch.compiler.set_stance("force_eager") if config.compile else nullcontext()


def _cpu_has_bf16() -> bool:
    # Both functions are private to torch, so a future version may lack them.
    probes = [getattr(torch.cpu, name, None) for name in ("_is_avx512_bf16_supported", "_is_amx_tile_supported")]
    return any(probe() for probe in probes if probe is not None)
