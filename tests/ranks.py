"""Run a function in several processes that form a gloo process group, as torchrun would start them.

A forkserver that has imported torch and MyGPT starts the processes, so a call takes a fraction of a second. The
functions and their arguments are pickled: use functions at the top level of a test module. Mark the tests with
`torchrun`.
"""

from __future__ import annotations

import multiprocessing
import os
import socket
import traceback
from collections.abc import Callable, Collection
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from typing import Any
from unittest import mock

_context = multiprocessing.get_context("forkserver")
_context.set_forkserver_preload(
    ["torch", "torch.distributed.fsdp", "torch.distributed.checkpoint", "torch._dynamo", "MyGPT.training.trainer"]
)


def without_coverage() -> dict[str, str]:
    """Return the environment without the variables of coverage, which slows the imports of a rank."""
    return {name: value for name, value in os.environ.items() if not name.startswith("COVERAGE")}


def run_on_ranks(
    n: int,
    function: Callable[..., Any],
    *arguments: Any,
    seconds: float = 60,
    minutes: float = 1,
    may_die: Collection[int] = (),
) -> list[Any]:
    """Call function(*arguments) in n ranks, and return the list of their results. An error in any rank raises it here.

    A run that takes longer than `seconds` is killed. `minutes` is the timeout of collective operations. The result of a
    rank that dies is None if its number is in `may_die`; otherwise its death raises RuntimeError.
    """
    with mock.patch.dict(os.environ, without_coverage(), clear=True):
        forkserver.ensure_running()
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes, readers = [], []
    for rank in range(n):
        reader, writer = _context.Pipe(duplex=False)
        process = _context.Process(target=_run, args=(writer, rank, n, port, minutes, function, arguments), daemon=True)
        process.start()
        writer.close()
        processes.append(process)
        readers.append(reader)
    try:
        return _collect(readers, seconds, may_die)
    finally:
        for process in processes:
            process.kill()
            process.join()


def _collect(readers: list[Connection], seconds: float, may_die: Collection[int]) -> list[Any]:
    results: dict[int, Any] = {}
    pending = dict(enumerate(readers))
    while pending:
        ready = wait(list(pending.values()), timeout=seconds)
        if not ready:
            raise TimeoutError(f"ranks {sorted(pending)} did not finish within {seconds} s")
        for rank, reader in list(pending.items()):
            if reader in ready:
                del pending[rank]
                try:
                    is_done, results[rank] = reader.recv()
                except EOFError:
                    if rank not in may_die:
                        raise RuntimeError(f"rank {rank} died") from None
                    is_done, results[rank] = True, None
                if not is_done:
                    raise AssertionError(f"rank {rank} failed:\n{results[rank]}")
    return [results[rank] for rank in range(len(readers))]


def _run(writer: Connection, rank: int, n: int, port: int, minutes: float, function: Any, arguments: Any) -> None:
    os.environ |= {
        "RANK": str(rank),
        "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(n),
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(port),
    }
    import torch

    from MyGPT import ranks

    torch.set_num_threads(1)
    try:
        ranks.join(minutes)
        result = function(*arguments)
        ranks.leave()
        writer.send((True, result))
    except BaseException:
        writer.send((False, traceback.format_exc()))
