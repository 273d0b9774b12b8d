"""The arithmetic of training: number formats, fast kernels, compilation, deterministic algorithms, and memory for reuse."""

from __future__ import annotations

import ctypes
import os
import platform
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

    On a CPU, linear layers use the kernels of `fast_linear`, unless `config` turns on gradient_checkpointing. If `config`
    turns on compile, a GPU also computes the loss with compiled code.
    """
    # The second forward pass of gradient checkpointing would not use the kernels of fast_linear.
    is_plain = device.type == "cpu" and not config.gradient_checkpointing
    is_compiled = device.type == "cuda" and config.compile
    kernels = fast_linear() if is_plain else compiled_loss() if is_compiled else nullcontext()
    with kernels, torch.autocast(device.type, dtype, enabled=dtype is not None):
        yield


_M_TRIM_THRESHOLD, _M_MMAP_THRESHOLD, _M_MMAP_MAX = -1, -3, -4  # parameters of mallopt in glibc's malloc.h


@contextmanager
def reused_memory(device: torch.device) -> Iterator[None]:
    """Keep the memory of freed tensors for new tensors inside the `with` block, on a CPU with glibc (Linux).

    glibc returns large blocks to the system as soon as they are freed. Each training step would then get hundreds of
    thousands of new pages, which the system must fill with zeros first: a tenth of the step. The peak memory stays the
    same. At the end of the block, unused memory is returned to the system.
    """
    libc = ctypes.CDLL(None) if device.type == "cpu" and platform.libc_ver()[0] == "glibc" else None
    if libc is None:
        yield
        return
    libc.mallopt(_M_MMAP_MAX, 0)  # no block is mapped on its own
    libc.mallopt(_M_TRIM_THRESHOLD, -1)  # the heap never shrinks
    try:
        yield
    finally:
        # The defaults: 65,536 mappings at most, and the largest thresholds that glibc chooses by itself.
        libc.mallopt(_M_MMAP_MAX, 1 << 16)
        libc.mallopt(_M_MMAP_THRESHOLD, 32 << 20)
        libc.mallopt(_M_TRIM_THRESHOLD, 64 << 20)
        libc.malloc_trim(0)


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
