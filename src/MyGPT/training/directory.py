"""Check, lock and clean up the directory of a training run. Files that MyGPT did not write are not removed."""

from __future__ import annotations

import contextlib
import os
import shutil
import socket
from fnmatch import fnmatch
from pathlib import Path

from filelock import FileLock, Timeout

from MyGPT.data.templates import TEMPLATE_FILE
from MyGPT.files import atomic_write, check_output_directory, present_directory, remove_leftovers, target_of
from MyGPT.parts import PARTS_FILE
from MyGPT.tokenizers.settings import CHAT_TEMPLATES
from MyGPT.training.names import CHECKPOINTS, HISTORY, LOCK, PROCESS
from MyGPT.training.snapshot import LOGS

_TRACKER_FILES = ("tensorboard", "wandb", "trackers.json")
_RUN_FILES = (
    "config.yaml", PARTS_FILE, "model", "adapter", CHECKPOINTS, HISTORY, "split.json", "loss.png", *_TRACKER_FILES, *LOGS,
)  # fmt: skip


def check_run_directory(run: Path, overwrite: bool) -> None:
    """Raise FileExistsError if the directory `run` is not empty, unless it holds a run and `overwrite` is True.

    A directory that contains only the lock and the first files of a killed process counts as empty.
    """
    check_output_directory(run)
    first = (LOCK, PROCESS, "config.yaml")
    names = [entry.name for entry in run.iterdir()] if run.exists() else []
    if all(name in first[:2] or target_of(name) in first for name in names):
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

    Raises ValueError if the directory is locked already, or if a file of the run is a symbolic link or a pipe.
    """
    _check_entries(run)
    run.mkdir(parents=True, exist_ok=True)
    lock = FileLock(run / LOCK, thread_local=False)  # A Trainer may be closed by another thread.
    this_process = f"process {os.getpid()} on {socket.gethostname()}"
    try:
        lock.acquire(timeout=0.2)  # mygpt runs holds the lock for a moment, to see whether the run is in use.
    except Timeout:
        holder = ""
        with contextlib.suppress(OSError):
            holder = (run / PROCESS).read_text(encoding="utf-8").strip()
        if holder == this_process:
            way_out = "close the Trainer that uses it, or choose another run_dir"
            raise ValueError(f"this process already holds the lock of {run}: {way_out}") from None
        process = f"another process ({holder})" if holder else "another process"
        raise ValueError(f"{process} is training in {run}: wait for it, or choose another --out") from None
    with atomic_write(run / PROCESS) as file:
        file.write(f"{this_process}\n")
    return lock


def _check_entries(run: Path) -> None:
    """Raise ValueError if an entry that a run reads or writes is a symbolic link, or neither a file nor a directory.

    A run that comes from somebody else could otherwise change any file of the user, or wait forever for a pipe. `run`
    itself may be a link.
    """
    used = {
        run: (LOCK, PROCESS, *_RUN_FILES),
        run / CHECKPOINTS: ("step-*", "latest"),
        run / HISTORY: ("step-*",),
        run / "model": (TEMPLATE_FILE, CHAT_TEMPLATES[0]),
        run / "adapter": (TEMPLATE_FILE,),
    }
    for directory, names in used.items():
        for path in directory.iterdir() if directory.is_dir() else ():
            if not any(fnmatch(path.name, it) for name in names for it in (name, f".{name}.*")):
                continue
            if path.is_symlink():
                raise ValueError(
                    f"{path} is a symbolic link to {os.readlink(path)}, and a run is not written through links: copy the "
                    f"run with cp -RL, or move the whole run, because {run} itself may be a link"
                )
            if not path.is_file() and not path.is_dir():
                raise ValueError(f"{path} is a pipe, socket or device, not a file of a run: remove it")


def log_lengths(run: Path) -> dict[str, int]:
    """Return the size in bytes of metrics.jsonl and samples.txt in the directory `run`. A missing file has size 0."""
    return {name: (run / name).stat().st_size if (run / name).is_file() else 0 for name in LOGS}


def cut_log(path: Path, length: int, more: bytes = b"") -> None:
    """Cut a log of a run back to `length` bytes and append `more`, completely or not at all. It may be missing.

    The log becomes a new file, so that a hard link to the old one, such as a backup, keeps its content.
    """
    if path.is_file() and (path.stat().st_size > length or path.stat().st_nlink > 1):
        content = path.read_bytes()[:length]
        with atomic_write(path, "wb") as file:
            file.write(content + more)


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
    for directory in (run / CHECKPOINTS, run / HISTORY):
        if directory.is_dir():
            remove_leftovers(directory, ("step-*", "latest"))
