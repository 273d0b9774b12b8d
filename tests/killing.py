"""Runs of `mygpt` in processes of their own that are killed at moments of our choice, and what remains of them.

A kill is SIGKILL, which no program can catch. It comes at the n-th call of something in the process itself (a step, and every
kind of call with which files are written), or from outside after a time.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Forked from a process that has imported torch already: a fresh one would take seconds for that.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(["torch", "MyGPT.cli", "MyGPT.training.trainer", "MyGPT.commands.train", "peft"])

MOMENTS = ("step", "half_file", "fsync", "rename", "replace", "rmtree", "snapshot")
"""In the process itself; "half_file" is with the first half of a file of tensors on the disk."""


@dataclass(frozen=True)
class Kill:
    """When a process is killed: at the n-th of a moment, or, with "time", n milliseconds after it began to work."""

    moment: str
    n: int


def start(
    arguments: list[str],
    kill: Kill | None = None,
    prepare: Callable[[], None] | None = None,
    errors: str | Path = os.devnull,
) -> Any:
    """`mygpt` with these arguments, as a process; `prepare` is called in it first, what it says of errors goes to a file."""
    process = _processes.Process(target=_work, args=(arguments, kill, prepare, errors))
    process.start()
    return process


def run(arguments: list[str], *how: Any, **more: Any) -> int:
    """As `start`, to its end; returns the exit status, -9 if it was killed."""
    process = start(arguments, *how, **more)
    process.join(600)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


def run_with_kills(arguments: list[str], kills: Iterable[Kill]) -> int:
    """The same command again and again until the kills are used up, then once more to the end; how many struck."""
    struck = 0
    for kill in [*kills, None]:
        status = run(arguments, kill)
        assert status in (0, -signal.SIGKILL), status
        struck += status != 0
    return struck


def remains(run_dir: Path) -> dict[str, Any]:
    """All of a run that must not depend on whether it was killed: weights, optimizers, generators, records, samples."""
    newest = max((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    state = json.loads((newest / "state.json").read_text())
    for of_machine in ("lengths", "recipe"):  # speeds are of different lengths, and the run's path may be in the recipe
        del state[of_machine]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    of_time = ("tokens_per_second", "checkpoints", "checkpoint_seconds")
    kept = run_dir / ("adapter" if (run_dir / "adapter").is_dir() else "model")
    return {
        "checkpoint": newest.name,
        "state": state,
        "records": [{k: v for k, v in record.items() if k not in of_time} for record in records],
        "samples": (run_dir / "samples.txt").read_text() if (run_dir / "samples.txt").exists() else "",
        **{str(file.relative_to(run_dir)): file.read_bytes() for file in kept.glob("*.safetensors")},
        **{file.name: file.read_bytes() for file in newest.glob("*.safetensors")},
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """The names under which two runs' remains differ."""
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def leftovers(run_dir: Path) -> list[str]:
    """Names of unfinished files and directories."""
    return sorted(
        path.name for path in run_dir.rglob(".*") if path.name not in (".lock", ".process") and "tmp" not in path.name
    )


def _work(arguments: list[str], kill: Kill | None, prepare: Callable[[], None] | None, errors: str | Path) -> None:
    import torch

    torch.set_num_threads(1)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")  # noqa: SIM115 - for the life of the process
    if prepare is not None:
        prepare()
    if kill is not None:
        _arm(kill)
    from MyGPT.cli import main

    sys.exit(main(arguments))


def _arm(kill: Kill) -> None:
    if kill.moment == "time":
        threading.Thread(target=lambda: (time.sleep(kill.n / 1000), _die()), daemon=True).start()
        return
    import safetensors.torch

    from MyGPT.training.trainer import Trainer

    owner, name = {
        "step": (Trainer, "step"),
        "snapshot": (Trainer, "snapshot"),
        "half_file": (safetensors.torch, "save_file"),
        "fsync": (os, "fsync"),
        "rename": (os, "rename"),
        "replace": (os, "replace"),
        "rmtree": (shutil, "rmtree"),
    }[kill.moment]
    function, counter = getattr(owner, name), iter(range(1, kill.n + 1))

    def counted(*arguments: Any, **keywords: Any) -> Any:
        if next(counter, 0) == kill.n:
            if kill.moment == "half_file":
                function(*arguments, **keywords)
                os.truncate(arguments[1], os.path.getsize(arguments[1]) // 2)
            _die()
        return function(*arguments, **keywords)

    setattr(owner, name, counted)


def _die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)
