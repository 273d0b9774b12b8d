"""The processes that work on one run together, as torchrun starts them. A single process is rank 0 of 1.

torchrun sets the environment variables RANK, LOCAL_RANK and WORLD_SIZE of each process. `join` makes these processes a
process group of torch.distributed. Tensors on GPUs travel over NCCL; tensors on CPUs and decisions travel over gloo.
All functions that communicate must be called by all ranks in the same order. Without a process group, they
return at once.
"""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

T = TypeVar("T")
_FAILURES = "Timed out|timed out|Timeout|Connection closed|Connection reset|Connection refused|Broken pipe".split("|")
"""Parts of the messages of gloo and NCCL when a rank does not take part in an operation or has ended."""
_ROLL_CALL_SECONDS = 10


def join(minutes: float = 10.0, even_alone: bool = False) -> None:
    """Join the process group that torchrun has started, if there is one. Later calls do nothing.

    A collective operation fails if a rank does not take part in it within `minutes`. With even_alone=True, a single
    process makes a process group of its own.
    """
    if not dist.is_available() or dist.is_initialized():
        return
    if int(os.environ.get("WORLD_SIZE", 1)) == 1:
        if even_alone:
            store = dist.HashStore()  # type: ignore[attr-defined]
            dist.init_process_group(store=store, rank=0, world_size=1)
        return
    backend = "gloo"
    if torch.cuda.is_available():
        backend = "cpu:gloo,cuda:nccl"
        torch.cuda.set_device(local_rank())
    options: dict[str, Any] = {"timeout": timedelta(minutes=minutes)}
    if _has_agent_store() and os.environ.get("GROUP_WORLD_SIZE") == "1":
        # Without names of its own, a restart finds the addresses of the ranks before it (issue 135712 of PyTorch).
        options |= {"store": _store(60 * minutes), "rank": int(os.environ["RANK"])}
        options["world_size"] = int(os.environ["WORLD_SIZE"])
    try:
        dist.init_process_group(backend, **options)
    except RuntimeError as error:
        raise ConnectionError(f"the other ranks cannot be reached: {' '.join(str(error).split())}") from error


@contextmanager
def naming_missing_ranks() -> Iterator[None]:
    """Turn the failure of a collective operation in the `with` block into a TimeoutError that names the missing ranks."""
    try:
        yield
    except RuntimeError as error:
        # All ranks that run come here, because the operations of each of them fail.
        missing = _missing_ranks() if world_size() > 1 and any(text in str(error) for text in _FAILURES) else []
        if not missing:
            raise
        plural = "s" if len(missing) > 1 else ""
        raise TimeoutError(
            f"rank{plural} {', '.join(map(str, missing))} of {world_size()} ended or did not respond in time: see the "
            f"output of {'these ranks' if plural else 'this rank'}, or raise timeout_minutes"
        ) from error


def _missing_ranks() -> list[int]:
    """Return the ranks that do not answer a roll call, for which they have a few seconds."""
    try:
        store = _store(_ROLL_CALL_SECONDS)
    except RuntimeError:  # Rank 0 is the host of the store, unless torchrun itself is.
        return [0]
    names = [f"roll call/{rank}" for rank in range(world_size())]
    store.set(names[rank()], "present")
    end = time.monotonic() + _ROLL_CALL_SECONDS
    while time.monotonic() < end and not store.check(names):
        time.sleep(0.1)
    return [number for number, name in enumerate(names) if not store.check([name])]


def is_first_to_say(text: str) -> bool:
    """Return True on the first rank that calls this function with `text`. Several ranks often fail with the same error.

    Before the ranks are connected, the others wait for rank 0 a few seconds, because torchrun ends them after its error.
    """
    if not _has_agent_store() and not dist.is_initialized():
        if os.environ.get("RANK") != "0":
            time.sleep(3)
        return True
    try:
        return _store(_ROLL_CALL_SECONDS).add(f"said/{text}", 1) == 1
    except RuntimeError:  # The host of the store has ended.
        return True


def _has_agent_store() -> bool:
    """Return True if torchrun, and not rank 0, is the host of the key-value store of the ranks."""
    return os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"


def _store(seconds: float) -> Any:
    """Return a connection to the key-value store of the ranks, with names of their own for each restart of the ranks."""
    place, port, timeout = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"]), timedelta(seconds=seconds)
    store = dist.TCPStore(place, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"MyGPT/{os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)  # type: ignore[attr-defined]


def leave() -> None:
    """Leave the process group, if there is one."""
    if world_size() > 1:
        dist.destroy_process_group()


def new_group(minutes: float) -> dist.ProcessGroup | None:
    """Return another gloo process group of all ranks, for operations beside those of the training; None without ranks."""
    if not dist.is_available() or not dist.is_initialized():
        return None
    return dist.new_group(backend="gloo", timeout=timedelta(minutes=minutes))


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


def sum_numbers(values: Sequence[float]) -> list[float]:
    """Return the sum over all ranks of each of the `values`, added in float64."""
    if world_size() == 1:
        return list(values)
    return sum_over_ranks(torch.tensor(values, dtype=torch.float64)).tolist()


def sum_over_ranks(tensor: Tensor) -> Tensor:
    """Add up the tensors of all ranks in place, and return the sum, which has the same bits on every rank."""
    if world_size() > 1:
        dist.all_reduce(tensor)
    return tensor
