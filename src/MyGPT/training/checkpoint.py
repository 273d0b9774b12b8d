"""Checkpoints: snapshots of a run on the disk, each stored completely or not at all.

`checkpoints/step-000500/` holds weights.safetensors (the trained parameters), optimizer.safetensors (the optimizer
state of each parameter, named `parameter/key`), state.json (the counters, random states, config and versions) and
manifest.json (size and SHA-256 of the other three files). The file `checkpoints/latest` holds the name of the newest
checkpoint. None of the files is a pickle. If a process is killed, the newest complete checkpoint remains, because
a checkpoint gets its name only when it is complete, and old checkpoints are removed after that.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from MyGPT.files import atomic_directory, atomic_write, json_text, read_json, sha256_of
from MyGPT.messages import error_message
from MyGPT.training.snapshot import Snapshot, TakeSnapshot, read_context
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from MyGPT.weights.formats.safetensors import read_safetensors, write_safetensors

CHECKPOINTS = "checkpoints"
_FILES = _OPTIMIZER, _STATE, _WEIGHTS = "optimizer.safetensors", "state.json", "weights.safetensors"
_MANIFEST, _LATEST = "manifest.json", "latest"


def write_snapshot(directory: Path, snapshot: Snapshot) -> Path:
    """Write `snapshot` to `directory` as a new checkpoint, store its name in `latest`, and return its path."""
    path = directory / _name(snapshot.state.step)
    with atomic_directory(path, replaces=("*",)) as temporary:
        write_safetensors(temporary / _WEIGHTS, snapshot.weights, shown_as=path / _WEIGHTS)
        write_safetensors(temporary / _OPTIMIZER, snapshot.optimizer, shown_as=path / _OPTIMIZER)
        _write_json(temporary / _STATE, {**snapshot.state.to_json(), **snapshot.context})
        _write_json(temporary / _MANIFEST, _make_manifest(temporary))
    with atomic_write(directory / _LATEST) as file:
        file.write(path.name + "\n")
    return path


def read_snapshot(path: Path) -> Snapshot:
    """Read the checkpoint in the directory `path` and compare its files with their SHA-256 checksums.

    Raises:
        ValueError, OSError: a file of the checkpoint is damaged or missing. The message names the file.
        IncompatibleCheckpointError: another version of MyGPT wrote the checkpoint, and a value is missing.
    """
    manifest = read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or manifest.keys() != set(_FILES):
        raise ValueError(f"{path / _MANIFEST} does not list the files of a checkpoint")
    for name, found in _make_manifest(path).items():
        if found != manifest[name]:
            raise ValueError(
                f"{path / name} is damaged: its size ({found['bytes']} bytes) or SHA-256 is not in the manifest"
            )
    content = read_json(path / _STATE)
    if not isinstance(content, dict):
        raise ValueError(f"{path / _STATE} must hold a JSON object, got {content!r:.80}")
    try:
        state, context = RunState.from_json(content), read_context(content)
        if path.name != _name(state.step):
            raise ValueError(f"its step is {state.step}")
    except ValueError as error:
        raise type(error)(f"{path / _STATE} is not usable: {error}") from None
    weights, optimizer = (
        {name: lazy.load().clone() for name, lazy in read_safetensors(path / file).items()}
        for file in (_WEIGHTS, _OPTIMIZER)
    )
    return Snapshot(state, weights, optimizer, context)


def has_checkpoint(run: Path) -> bool:
    """Return True if the run in the directory `run` has at least one checkpoint, complete or damaged."""
    # A process may have been killed while it replaced the only checkpoint.
    return bool(_by_step(run / CHECKPOINTS)) or any((run / CHECKPOINTS).glob(".step-*.previous"))


def read_newest(
    directory: Path, check: Callable[[Snapshot], None] = lambda snapshot: None
) -> tuple[Snapshot, list[str]]:
    """Return the newest complete checkpoint in `directory`, and a warning for each newer checkpoint that is damaged.

    A checkpoint for which `check` raises ValueError counts as damaged.

    Raises:
        IncompatibleCheckpointError: the newest complete checkpoint lacks values that this version of MyGPT needs, or
            `check` raised this error.
        ValueError: there is no complete checkpoint.
    """
    newest_first = list(reversed(_by_step(directory).values()))
    latest = directory / _LATEST
    if latest.is_file():  # In a run that returned to an earlier step, the newest one need not have the highest number.
        name = latest.read_bytes().decode("utf-8", "replace").strip()
        newest_first.sort(key=lambda path: path.name != name)
    problems: list[str] = []
    for path in newest_first:
        try:
            snapshot = read_snapshot(path)
            check(snapshot)
            return snapshot, problems
        except IncompatibleCheckpointError:
            raise
        except (ValueError, OSError) as error:
            problems.append(f"{path} is not used: {error_message(error)}")
    raise ValueError(f"there is no complete checkpoint in {directory}" + "".join(f"; {it}" for it in problems))


def remove_old(directory: Path, step: int, keep_last: int, keep_best: int) -> None:
    """Remove old checkpoints, except the keep_last newest ones and the keep_best ones with the lowest validation loss.

    Checkpoints of steps after `step` are neither removed nor counted among the newest and best ones, because a run that
    was resumed from an earlier checkpoint will overwrite them.
    """
    past = [path for path_step, path in _by_step(directory).items() if path_step <= step]
    kept = set(past[-keep_last:])
    if keep_best:
        losses = {path: loss for path in past if (loss := _val_loss(path)) is not None}
        kept |= set(sorted(losses, key=losses.__getitem__)[:keep_best])
    for path in set(past) - kept:
        shutil.rmtree(path, ignore_errors=True)  # Whatever cannot be removed now is tried again next time.


@dataclass
class CheckpointWriter:
    """Writes snapshots of a run as checkpoints, one at a time.

    `start` writes in a background thread, and `write` finishes writing before it returns.
    """

    directory: Path
    keep_last: int
    keep_best: int
    written: Path | None = None
    """Path of the newest checkpoint that this writer completed. Before the first checkpoint is complete, it is None."""
    written_step: int | None = None
    n_written: int = 0
    blocking_seconds: float = 0.0
    """Seconds that training has waited in total while snapshots were copied."""
    failure: Exception | None = None
    """The last exception of the background thread. It does not end the run, because the next checkpoint may succeed."""
    _thread: threading.Thread | None = None

    def __post_init__(self) -> None:
        self.created = self.last_taken = time.monotonic()

    @property
    def is_busy(self) -> bool:
        """True while the background thread is writing a snapshot."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, take_snapshot: TakeSnapshot) -> None:
        """Call take_snapshot and begin to write its result in the background. The writer must not be busy."""
        assert not self.is_busy
        snapshot = self._take(take_snapshot)
        # A daemon thread does not delay a process that must exit at once; an unfinished checkpoint is never used.
        self._thread = threading.Thread(target=self._try_to_write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def write(self, take_snapshot: TakeSnapshot) -> None:
        """Call take_snapshot and write its result before returning. The writer must not be busy."""
        self._write(self._take(take_snapshot))

    def wait(self) -> None:
        """Wait until the background thread has written its snapshot, if it is writing one."""
        if self._thread is not None:
            self._thread.join()

    def _take(self, take_snapshot: TakeSnapshot) -> Snapshot:
        began, snapshot = time.monotonic(), take_snapshot()
        self.last_taken = time.monotonic()
        self.blocking_seconds += self.last_taken - began
        return snapshot

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.state.step
        self.written, self.written_step = write_snapshot(self.directory, snapshot), step
        self.n_written += 1
        remove_old(self.directory, step, self.keep_last, self.keep_best)

    def _try_to_write(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except Exception as error:  # The training thread reports it.
            self.failure = error


def _make_manifest(directory: Path) -> dict[str, dict[str, Any]]:
    files = {name: directory / name for name in _FILES}
    return {name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for name, file in files.items()}


def _by_step(directory: Path) -> dict[int, Path]:
    """Return a dict from the step to the path of each checkpoint in `directory`, in ascending order of the steps."""
    paths = {int(path.name[5:]): path for path in directory.glob("step-*") if path.name[5:].isdecimal()}
    return dict(sorted(paths.items()))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _val_loss(path: Path) -> float | None:
    """Return the validation loss in the checkpoint `path`, or None if the checkpoint has none or is damaged."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        loss = read_json(path / _STATE).get("val_loss")
        return loss if isinstance(loss, float) else None
    return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
