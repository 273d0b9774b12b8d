"""The processes that work on one run together, as torchrun starts them. A single process is rank 0 of 1.

torchrun sets the environment variables RANK, LOCAL_RANK and WORLD_SIZE of each process. `join` makes these processes a
process group of torch.distributed. Tensors on GPUs travel over NCCL; tensors on CPUs and decisions travel over gloo.
All functions that communicate must be called by all ranks in the same order. Without a process group, they
return at once.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")


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
    dist.init_process_group(backend, timeout=timedelta(minutes=minutes))


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


def is_one_of_several() -> bool:
    """Return True if this process has joined a process group, even of one rank, or torchrun started it with others."""
    has_joined = dist.is_available() and dist.is_initialized()
    return has_joined or int(os.environ.get("WORLD_SIZE", 1)) > 1


def is_sharded(tensor: Tensor) -> bool:
    """Return True for a DTensor, of which each rank has only a shard, as after `fully_shard`."""
    return hasattr(tensor, "full_tensor")  # without importing torch.distributed.tensor, which takes a second


def reshard(model: nn.Module) -> None:
    """Make the parameters of a sharded model DTensors again. After a forward pass, some of them may be whole."""
    for module in model.modules():
        if callable(method := getattr(module, "reshard", None)):  # a method of FSDPModule
            method()


def whole(tensor: Tensor) -> Tensor:
    """Return the complete tensor. All ranks must call this function for a sharded tensor; others are returned unchanged."""
    return tensor.full_tensor() if is_sharded(tensor) else tensor  # type: ignore[attr-defined]


@torch.no_grad()
def copy_whole(tensor: Tensor, complete: Tensor) -> None:
    """Copy `complete`, which all ranks have, into `tensor`. If `tensor` is sharded, each rank copies its shard."""
    if is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        mesh, placements = tensor.device_mesh, tensor.placements  # type: ignore[attr-defined]
        complete = distribute_tensor(complete.to(tensor), mesh, placements, src_data_rank=None)
    tensor.copy_(complete)


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up the tensors of all ranks in place, and return the sum, which has the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
