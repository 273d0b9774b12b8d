"""Check, lock and clean up the directory of a training run. Files that MyGPT did not write are not removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path

from filelock import FileLock, Timeout

from MyGPT.files import present_directory, remove_leftovers
from MyGPT.training.checkpoint import CHECKPOINTS

_LOGS = ("metrics.jsonl", "samples.txt")
_RUN_FILES = ("config.yaml", "model", "adapter", CHECKPOINTS, "split.json", "loss.png", "tensorboard", *_LOGS)
_LOCK, _PROCESS = ".lock", ".process"


def check_run_directory(run: Path, overwrite: bool) -> None:
    """Raise FileExistsError if the directory `run` is not empty, unless it holds a run and `overwrite` is True."""
    if not run.exists() or not any(entry.name not in (_LOCK, _PROCESS) for entry in run.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{run} is not empty: choose another --out, or give --overwrite true")
    if not (run / "config.yaml").is_file():
        raise FileExistsError(f"{run} holds files but no run (config.yaml is missing): choose another --out")


def is_empty_run(run: Path) -> bool:
    """Return True if the directory `run` holds a run that was stopped before it saved a model."""
    models = map(present_directory, (run / "model", run / "adapter"))
    return (run / "config.yaml").is_file() and not any(directory.exists() for directory in models)


def lock_directory(run: Path) -> FileLock:
    """Create the directory `run`, lock it and return the lock. The end of the process also releases the lock.

    Raises ValueError if the directory is locked already.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / _LOCK, thread_local=False)  # A Trainer may be closed by another thread.
    this_process = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        lock.acquire(timeout=0)
    except Timeout:
        holder = ""
        with contextlib.suppress(OSError):
            holder = (run / _PROCESS).read_text(encoding="utf-8").strip()
        if holder == this_process:
            way_out = "close the Trainer that uses it, or choose another run_dir"
            raise ValueError(f"this process already holds the lock of {run}: {way_out}") from None
        process = f"another process ({holder})" if holder else "another process"
        raise ValueError(f"{process} is training in {run}: wait for it, or choose another --out") from None
    (run / _PROCESS).write_text(f"{this_process}\n", encoding="utf-8")
    return lock


def log_lengths(run: Path) -> dict[str, int]:
    """Return the size in bytes of metrics.jsonl and samples.txt in the directory `run`. A missing file has size 0."""
    return {name: (run / name).stat().st_size if (run / name).is_file() else 0 for name in _LOGS}


def remove_run(run: Path) -> None:
    """Remove the files that MyGPT wrote in the directory `run`. Other files stay, because they may be the user's."""
    for path in (run / name for name in _RUN_FILES):
        if path.is_dir():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def remove_unfinished(run: Path) -> None:
    """Remove the temporary files that a killed process left in the directory `run`."""
    remove_leftovers(run, _RUN_FILES)
    if (run / CHECKPOINTS).is_dir():
        remove_leftovers(run / CHECKPOINTS, ("step-*", "latest"))
