"""Runs `mygpt` in a process of its own, kills it at a chosen moment, and collects the files that the run left.

The signal is SIGKILL, which no program can catch. It comes at the n-th call of a function (a training step, or a function
that writes files), or after a given time.
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
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

# Processes are forked from one that has already imported torch, because the import takes seconds.
_processes = multiprocessing.get_context("forkserver")
_processes.set_forkserver_preload(
    "torch MyGPT.cli MyGPT.training.trainer MyGPT.commands.train MyGPT.commands.finetune MyGPT.data.prepare peft".split()
)

MOMENTS = ("step", "half_file", "fsync", "rename", "replace", "rmtree", "snapshot")
"""Functions at whose call a process is killed; "half_file" leaves the first half of a file of tensors on the disk."""


@dataclass(frozen=True)
class Kill:
    """The moment of a kill: the n-th call of a function in MOMENTS, or, with "time", n milliseconds after the start.

    With `after_merge`, calls and time are counted from the moment when `mygpt finetune --merge` merges the adapter.
    """

    moment: str
    n: int
    after_merge: bool = False


def start(
    arguments: list[str],
    kill: Kill | None = None,
    prepare: Callable[[], None] | None = None,
    errors: str | Path = os.devnull,
) -> Any:
    """Start `mygpt` in a new process and return the process.

    Args:
        arguments: the command line.
        kill: when the process is killed; None lets it run.
        prepare: a function that the process calls first.
        errors: the file for its stderr.
    """
    process = _processes.Process(target=_work, args=(arguments, kill, prepare, errors))
    process.start()
    return process


def run(arguments: list[str], *how: Any, **more: Any) -> int:
    """Start `mygpt` as `start` does, wait for its end, and return the exit status (-9 after a kill)."""
    process = start(arguments, *how, **more)
    process.join(600)
    assert process.exitcode is not None, "the process hangs"
    return process.exitcode


class SignalInStep6:
    """A function that can be pickled for another process: it sends a signal in the sixth step."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __call__(self) -> None:
        from MyGPT.training.trainer import Trainer

        step = Trainer.step

        def signalling(trainer: Any) -> dict[str, float]:
            if trainer.step_number == 5:
                os.kill(os.getpid(), self.number)
            return step(trainer)

        Trainer.step = signalling  # type: ignore[method-assign]


def run_with_kills(arguments: list[str], kills: Iterable[Kill]) -> int:
    """Run a command once for each kill and once more to its end. Return how many of the kills hit a running process."""
    struck = 0
    for kill in [*kills, None]:
        status = run(arguments, kill)
        assert status in (0, -signal.SIGKILL), status
        struck += status != 0
    return struck


def remains(run_dir: Path) -> dict[str, Any]:
    """Return everything that must not depend on kills: weights, optimizer and random states, records and samples."""
    from safetensors.torch import load_file

    newest = max((run_dir / "checkpoints").glob("step-*"), key=lambda path: int(path.name[5:]))
    state = json.loads((newest / "state.json").read_text())
    for variable in ("lengths", "recipe"):  # Logged speeds differ in length, and the recipe may contain the run's path.
        del state[variable]
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
    timings = ("tokens_per_second", "checkpoints", "checkpoint_seconds")
    return {
        "checkpoint": newest.name,
        "state": state,
        "records": [{k: v for k, v in record.items() if k not in timings} for record in records],
        "samples": (run_dir / "samples.txt").read_text() if (run_dir / "samples.txt").exists() else "",
        **{
            str(file.relative_to(run_dir)): file.read_bytes()
            for kept in ("adapter", "model")
            for file in (run_dir / kept).glob("*")
            if file.suffix == ".safetensors" or file.name in ("template.json", "tokenizer.json")
        },
        **{
            # By tensor, because the order of the metadata in the header of a file is random.
            f"{file.name} {name}": (tensor.dtype, tensor.shape, tensor.numpy().tobytes())
            for file in newest.glob("*.safetensors")
            for name, tensor in load_file(file).items()
        },
    }


def differences(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    """Return the names of the parts in which the remains of two runs differ."""
    return sorted(name for name in {**one, **other} if one.get(name) != other.get(name))


def leftovers(directory: Path) -> list[str]:
    """Return the names of unfinished files and directories in a directory, and of those beside it that belong to it."""
    known = (".lock", ".process", ".downloads.json", ".downloads.lock")
    inside = [path.name for path in directory.rglob("*") if path.name.startswith(".") or ".part" in path.name]
    beside = [path.name for path in directory.parent.glob(f".{directory.name}.*")]
    return sorted(name for name in [*inside, *beside] if name not in known)


def _work(arguments: list[str], kill: Kill | None, prepare: Callable[[], None] | None, errors: str | Path) -> None:
    import torch

    torch.set_num_threads(1)
    # The workers of `prepare` import the main module. They would import the test program, and with it torch.
    vars(sys.modules["__main__"]).update(__file__=None, __spec__=None)
    sys.stdout, sys.stderr = open(os.devnull, "w"), open(errors, "w")  # noqa: SIM115 - open until the process ends
    if prepare is not None:
        prepare()
    if kill is not None:
        _arm(kill)
    from MyGPT.cli import main

    sys.exit(main(arguments))


def _arm(kill: Kill) -> None:
    if kill.after_merge:
        from MyGPT.commands import _tuning

        merge, kill = _tuning.merge, replace(kill, after_merge=False)
        _tuning.merge = lambda model: (_arm(kill), merge(model))[1]
        return
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
