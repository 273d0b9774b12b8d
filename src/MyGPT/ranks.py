"""The processes that work on one run together, as torchrun starts them. A single process is rank 0 of 1.

torchrun sets the environment variables RANK, LOCAL_RANK and WORLD_SIZE of each process. `join` makes these processes a
process group of torch.distributed. Tensors on GPUs travel over NCCL; tensors on CPUs and decisions travel over gloo.
All functions that communicate must be called by all ranks in the same order. Without a process group, they
return at once.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")
_FAILURES = ("Timed out", "timed out", "Connection closed", "Connection reset", "Broken pipe", "Timeout")
"""Parts of the messages of gloo and NCCL when a rank does not take part in an operation or has ended."""
_ROLL_CALL_SECONDS = 5
_roll_call: dist.ProcessGroup | None = None
"""The process group with which the ranks find out, after a failure, which of them do not respond."""


def join(minutes: float = 10.0) -> None:
    """Join the process group that torchrun has started, if there is one. Later calls do nothing.

    A collective operation fails if a rank does not take part in it within `minutes`.
    """
    if not dist.is_available() or dist.is_initialized() or int(os.environ.get("WORLD_SIZE", 1)) == 1:
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank())
    global _roll_call
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))
    _roll_call = dist.new_group(backend="gloo")


@contextmanager
def naming_missing_ranks() -> Iterator[None]:
    """Turn the failure of a collective operation in the `with` block into a TimeoutError that names the missing ranks."""
    try:
        yield
    except RuntimeError as error:
        # A rank that runs reaches this barrier, because its own operations fail too. It uses connections of its own,
        # since a timeout has closed those of the failed operation.
        if _roll_call is None or not any(text in str(error) for text in _FAILURES):
            raise
        try:
            dist.monitored_barrier(_roll_call, timedelta(seconds=_ROLL_CALL_SECONDS), wait_all_ranks=True)
        except RuntimeError as missing:
            names = re.findall(r"[Rr]anks? ([\d, ]*\d)", str(missing))
            print("ROLLCALL", missing)
            raise TimeoutError(f"ranks {names}") from error
        raise


def leave() -> None:
    """Leave the process group, if there is one."""
    if world_size() > 1:
        dist.destroy_process_group()


def world_size() -> int:
    """Return the number of ranks: 1 without a process group."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among all ranks, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


def local_rank() -> int:
    """Return the number of this process among the ranks on its machine, from 0. Each uses the GPU of this number."""
    return int(os.environ.get("LOCAL_RANK", 0))


def broadcast(value: T) -> T:
    """Return the `value` of rank 0. It is pickled, so its type must be known to all ranks."""
    if world_size() == 1:
        return value
    values = [value]
    dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
    return values[0]


def on_first_rank(function: Callable[[], T]) -> T:
    """Call `function` on rank 0 only, and return its result on all ranks. If it raises an exception, all ranks raise it."""
    if world_size() == 1:
        return function()
    result: Any = None
    error: Exception | None = None
    if rank() == 0:
        try:
            result = function()
        except Exception as raised:
            error = raised
    result, error = broadcast((result, error))
    if error is not None:
        raise error
    return result


def max_over_ranks(*values: int) -> list[int]:
    """Return the largest of each of the `values` of all ranks."""
    if world_size() == 1:
        return [int(value) for value in values]
    tensor = torch.tensor(values, dtype=torch.int64)
    dist.all_reduce(tensor, dist.ReduceOp.MAX)
    return tensor.tolist()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up the tensors of all ranks in place, and return the sum, which has the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
