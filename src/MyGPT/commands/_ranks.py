"""Start a command in several processes on this machine, as `torchrun --standalone` does."""

from __future__ import annotations

import logging
import os
import sys
import uuid
from collections.abc import Sequence


def launch(arguments: Sequence[str], n: int, max_restarts: int) -> int:
    """Run `mygpt` with `arguments` in n ranks, and return the exit status of the first rank that failed, or 0.

    If a rank fails, all ranks are started again, up to `max_restarts` times.
    """
    import torch
    from torch.distributed.elastic.multiprocessing.api import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    if max_restarts == 0:
        # The failed rank has already printed its error. torch would add a table and a traceback.
        logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, torch.get_num_threads() // n)))
    config = LaunchConfig(
        min_nodes=1,
        max_nodes=1,
        nproc_per_node=n,
        run_id=str(uuid.uuid4()),
        rdzv_backend="c10d",
        rdzv_endpoint="localhost:0",
        max_restarts=max_restarts,
    )
    try:
        elastic_launch(config, sys.executable)("-m", "MyGPT", *arguments)
    except ChildFailedError as failed:
        status = failed.get_first_failure()[1].exitcode
        return 128 - status if status < 0 else status
    except SignalException as stopped:
        return 128 + int(stopped.sigval)
    return 0
