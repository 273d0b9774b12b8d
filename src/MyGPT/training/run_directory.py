"""A run on disk: one directory, one process at a time, and what is kept in it of the best model.

`config.yaml` (all that is needed to run it again), `metrics.jsonl`, `model/` or `adapter/` (the best model), `checkpoints/`
(what `--resume` goes on from), `loss.png`, `samples.txt`.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from pathlib import Path
from typing import Protocol

from filelock import FileLock, Timeout

from MyGPT.data.templates import Template
from MyGPT.files import remove_leftovers, restore_directory
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.checkpoint import CHECKPOINTS
from MyGPT.weights.pretrained import read_weights

RUN_FILES = (
    "config.yaml",
    "metrics.jsonl",
    "model",
    "adapter",
    CHECKPOINTS,
    "split.json",
    "loss.png",
    "samples.txt",
    "tensorboard",
)
_LOCK, _PROCESS = ".lock", ".process"


class Keeper(Protocol):
    """What a run keeps of its best model, and where."""

    def place(self, run_dir: Path) -> Path:
        """The directory in the run's."""
        ...

    def save(self, run_dir: Path) -> Path:
        """Writes it there, whole or not at all."""
        ...

    def restore(self, run_dir: Path) -> None:
        """Puts what was written back into the model."""
        ...


class WholeModel:
    """Keeps the model's directory, `model/`."""

    def __init__(self, model: GPTModel, tokenizer: Tokenizer | None, template: Template | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template

    def place(self, run_dir: Path) -> Path:
        return run_dir / "model"

    def save(self, run_dir: Path) -> Path:
        self.model.save_pretrained(self.place(run_dir), self.tokenizer)
        if self.template is not None:
            self.template.save(self.place(run_dir))
        return self.place(run_dir)

    def restore(self, run_dir: Path) -> None:
        self.model.load_state_dict(read_weights(self.place(run_dir))[1])


def check_run_directory(run: Path, overwrite: bool) -> None:
    """A FileExistsError if the directory is not empty, unless it holds a run and that may be overwritten."""
    if not run.exists() or not any(entry.name not in (_LOCK, _PROCESS) for entry in run.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{run} is not empty: choose another --out, or give --overwrite true")
    if not (run / "config.yaml").is_file():
        raise FileExistsError(f"{run} holds something else than a run: choose another --out")


def is_empty_run(run: Path) -> bool:
    """Whether a run was stopped before there was anything in it to keep."""
    kept = [run / name for name in ("model", "adapter")]
    for directory in kept:
        restore_directory(directory)
    return (run / "config.yaml").is_file() and not any(directory.exists() for directory in kept)


def lock_run_directory(run: Path) -> FileLock:
    """Makes the directory and keeps other processes out of it until the lock is released.

    The system releases it when the process ends, however it ends. A directory that is in use is a ValueError.
    """
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / _LOCK)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        process = ""
        with contextlib.suppress(OSError):
            process = f" ({(run / _PROCESS).read_text(encoding='utf-8').strip()})"
        raise ValueError(
            f"another process{process} is training in {run}: wait for it, or choose another --out"
        ) from None
    (run / _PROCESS).write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
    return lock


def clear_run_directory(run: Path) -> None:
    """Removes the files of a run, and those alone; what else stands there is the user's."""
    for name in RUN_FILES:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink(missing_ok=True)
    remove_unfinished(run)


def remove_unfinished(run: Path) -> None:
    """Removes what a kill has left of files that were being written."""
    remove_leftovers(run, RUN_FILES)
    if (run / CHECKPOINTS).is_dir():
        remove_leftovers(run / CHECKPOINTS, ("step-*", "latest"))
