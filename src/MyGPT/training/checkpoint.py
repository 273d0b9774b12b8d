"""Checkpoints: snapshots of a run on the disk, each stored completely or not at all.

`checkpoints/step-000500/` holds weights.safetensors (the trained parameters), optimizer.safetensors (the optimizer
state of each parameter, named `parameter/key`), state.json (the counters, random states, config and versions) and
manifest.json (size and SHA-256 of the other three files). The file `checkpoints/latest` holds the name of the newest
checkpoint. None of the files is a pickle. If a process is killed, the newest complete checkpoint remains, because
a checkpoint gets its name only when it is complete, and old checkpoints are removed after that.

If several ranks train, each of them writes its rows of all tensors to a file of its own, such as
shard-00001-of-00004.safetensors. Any number of ranks, and a single process, can read both kinds of checkpoints.
"""

from __future__ import annotations

import contextlib
import importlib
import re
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from MyGPT.files import atomic_directory, atomic_write, json_text, read_json, sha256_of
from MyGPT.messages import error_message
from MyGPT.training.names import CHECKPOINTS, LATEST, MANIFEST, STATE, by_step, step_name
from MyGPT.training.snapshot import Snapshot, TakeSnapshot, read_context
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from MyGPT.weights.formats.safetensors import StoredTensor, read_parts, write_safetensors

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup

T = TypeVar("T")

_FILES = _OPTIMIZER, _STATE, _WEIGHTS = "optimizer.safetensors", STATE, "weights.safetensors"
_SHARD = re.compile(r"shard-\d{5}-of-\d{5}\.safetensors")


def write_snapshot(directory: Path, snapshot: Snapshot, group: ProcessGroup | None = None) -> Path:
    """Write `snapshot` to `directory` as a new checkpoint, store its name in `latest`, and return its path.

    Args:
        directory: the directory of the checkpoints, which all ranks share.
        snapshot: the state to write. Several ranks give the snapshots of the same step.
        group: a gloo process group that nothing else uses during the call. All its ranks must call this function, from
            any thread, and each writes its own rows of the tensors. None: a single process writes everything.

    A failure leaves no new checkpoint. If writing fails on one rank, all ranks raise the error.

    Raises:
        OSError: a file could not be written.
        ConnectionError: another rank has died, or did not take part within the timeout of the group. The group cannot be
            used again.
    """
    path = directory / step_name(snapshot.state.step)
    with ExitStack() as unfinished:

        def begin() -> Path:
            return unfinished.enter_context(atomic_directory(path, replaces=("*",)))

        def finish(files: dict[str, Any], temporary: Path) -> None:
            _write_json(temporary / _STATE, {**snapshot.state.to_json(), **snapshot.context})
            files = {**files, **_make_manifest(temporary, [_STATE])}
            _write_json(temporary / MANIFEST, dict(sorted(files.items())))
            unfinished.close()
            with atomic_write(directory / LATEST) as file:
                file.write(path.name + "\n")

        if group is None:
            temporary = begin()
            write_safetensors(temporary / _WEIGHTS, snapshot.weights, shown_as=path / _WEIGHTS)
            write_safetensors(temporary / _OPTIMIZER, snapshot.optimizer, shown_as=path / _OPTIMIZER)
            finish(_make_manifest(temporary, [_OPTIMIZER, _WEIGHTS]), temporary)
        else:
            _write_shards(path, snapshot, group, begin, finish)
    return path


def _write_shards(
    path: Path,
    snapshot: Snapshot,
    group: ProcessGroup,
    begin: Callable[[], Path],
    finish: Callable[[dict[str, Any], Path], None],
) -> None:
    """Write the checkpoint `path` on all ranks of `group`. Rank 0 calls `begin` before the other ranks write.

    Rank 0 also calls `finish`, with the manifest of all shards, when the shards of all ranks are complete.
    """
    from MyGPT.training.shards import on_all_ranks, save_shard

    rank, n_ranks = dist.get_rank(group), dist.get_world_size(group)
    name = f"shard-{rank + 1:05d}-of-{n_ranks:05d}.safetensors"
    temporary = path
    try:
        begun = on_all_ranks(group, lambda: (path.name, str(begin()) if rank == 0 else ""))
        temporary = Path(begun[0][1])
        if any(
            step != path.name for step, _ in begun
        ):  # A rank that was late for an earlier checkpoint writes that one.
            raise ConnectionError(f"the ranks write different checkpoints: {', '.join(step for step, _ in begun)}")
        has_written = save_shard(temporary / name, {**snapshot.weights, **snapshot.optimizer}, path / name, group)
        manifests = on_all_ranks(group, lambda: _make_manifest(temporary, [name] if has_written() else []))
        files = {name: entry for manifest in manifests for name, entry in manifest.items()}
        on_all_ranks(group, lambda: finish(files, temporary) if rank == 0 else None)
    except OSError as error:
        message = error_message(error).replace(str(temporary), str(path))
        raise type(error)(message if str(path) in message else f"cannot write {path}: {message}") from error


def read_snapshot(path: Path, group: ProcessGroup | None = None) -> Snapshot:
    """Read the checkpoint in the directory `path` and compare its files with their SHA-256 checksums.

    If several ranks read it, all ranks of `group` must call this function. They divide the checksums, and read no tensors
    yet: `restore_snapshot` reads them.

    Raises:
        ValueError, OSError: a file of the checkpoint is damaged or missing. The message names the file.
        IncompatibleCheckpointError: another version of MyGPT wrote the checkpoint, and a value is missing.
    """
    snapshots: list[Snapshot] = []  # They stay on their ranks.
    _on_all_ranks(group, lambda: snapshots.append(_read_snapshot(path, group)))
    return snapshots[0]


def _read_snapshot(path: Path, group: ProcessGroup | None) -> Snapshot:
    """Read a checkpoint as `read_snapshot` does. Of several ranks, each checks some of the files."""
    manifest = read_json(path / MANIFEST)
    names = sorted(manifest) if isinstance(manifest, dict) else []
    shards = [name for name in names if _SHARD.fullmatch(name)]
    if names != list(_FILES) and (not shards or names != [*shards, _STATE]):
        raise ValueError(f"{path / MANIFEST} does not list the files of a checkpoint")
    rank, n_ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
    for name, found in _make_manifest(path, names[rank::n_ranks]).items():
        if found != manifest[name]:
            raise ValueError(
                f"{path / name} is damaged: its size ({found['bytes']} bytes) or SHA-256 is not in the manifest"
            )
    content = read_json(path / _STATE)
    if not isinstance(content, dict):
        raise ValueError(f"{path / _STATE} must hold a JSON object, got {content!r:.80}")
    try:
        state, context = RunState.from_json(content), read_context(content)
        if path.name != step_name(state.step):
            raise ValueError(f"its step is {state.step}")
    except ValueError as error:
        raise type(error)(f"{path / _STATE} is not usable: {error}") from None
    stored = read_parts(path / name for name in names if name != _STATE)
    tensors = {name: tensor.load() if group is None else _description(name, tensor) for name, tensor in stored.items()}
    optimizer = {name: tensors.pop(name) for name in stored if "/" in name}
    return Snapshot(state, tensors, optimizer, context, {} if group is None else stored)


def has_checkpoint(run: Path) -> bool:
    """Return True if the run in the directory `run` has at least one checkpoint, complete or damaged."""
    # A process may have been killed while it replaced the only checkpoint.
    return bool(by_step(run / CHECKPOINTS)) or any((run / CHECKPOINTS).glob(".step-*.previous"))


def read_newest(
    directory: Path, check: Callable[[Snapshot], None] = lambda snapshot: None, group: ProcessGroup | None = None
) -> tuple[Snapshot, list[str]]:
    """Return the newest complete checkpoint in `directory`, and a warning for each newer checkpoint that is damaged.

    A checkpoint for which `check` raises ValueError counts as damaged. If several ranks read, all ranks of `group` must
    call this function, and all call `check` for the same checkpoints. A checkpoint that is damaged for one rank counts as
    damaged for all, so all ranks return the same checkpoint and warnings, or raise the same error.

    Raises:
        IncompatibleCheckpointError: the newest complete checkpoint lacks values that this version of MyGPT needs, or
            `check` raised this error.
        ValueError: there is no complete checkpoint.
        ConnectionError: another rank has died or does not answer.
    """
    problems: list[str] = []
    newest_first = _on_all_ranks(group, lambda: _newest_first(directory))
    for path in newest_first[0]:
        try:
            snapshot = read_snapshot(path, group)
            _on_all_ranks(group, partial(check, snapshot))
            return snapshot, problems
        except (IncompatibleCheckpointError, ConnectionError):
            raise
        except (ValueError, OSError) as error:
            problems.append(f"{path} is not used: {error_message(error)}")
    raise ValueError(f"there is no complete checkpoint in {directory}" + "".join(f"; {it}" for it in problems))


def remove_old(directory: Path, step: int, keep_last: int, keep_best: int) -> None:
    """Remove old checkpoints, except the keep_last newest ones and the keep_best ones with the lowest validation loss.

    Checkpoints of steps after `step` are neither removed nor counted among the newest and best ones, because a run that
    was resumed from an earlier checkpoint will overwrite them.
    """
    past = [path for path_step, path in by_step(directory).items() if path_step <= step]
    kept = set(past[-keep_last:])
    if keep_best:
        losses = {path: loss for path in past if (loss := _val_loss(path)) is not None}
        kept |= set(sorted(losses, key=losses.__getitem__)[:keep_best])
    for path in set(past) - kept:
        shutil.rmtree(path, ignore_errors=True)  # Whatever cannot be removed now is tried again next time.


@dataclass
class CheckpointWriter:
    """Writes snapshots of a run as checkpoints, one at a time.

    `start` writes in a background thread, and `write` finishes writing before it returns. With a `group`, all its ranks
    must call both methods in the same order. A rank may finish a little later than rank 0, so rank 0 decides for all
    ranks whether the writer is busy, and `start` and `write` wait for the rest.
    """

    directory: Path
    keep_last: int
    keep_best: int
    group: ProcessGroup | None = None
    """A gloo process group for this writer alone.

    Its timeout must be longer than a rank takes to write its file. After a ConnectionError, which means that a rank has
    died or is late, every write raises this error, because messages of an earlier write could still arrive.
    """
    written: Path | None = None
    """Path of the newest checkpoint that this writer completed. Before the first checkpoint is complete, it is None."""
    written_step: int | None = None
    n_written: int = 0
    blocking_seconds: float = 0.0
    """Seconds that training has waited in total while snapshots were copied."""
    failure: Exception | None = None
    """The last exception of the background thread. It does not end the run, because the next checkpoint may succeed."""
    _thread: threading.Thread | None = None
    _lost_contact: ConnectionError | None = None

    def __post_init__(self) -> None:
        self.created = self.last_taken = time.monotonic()
        if self.group is not None:  # Two threads that import parts of torch at the same time can disturb each other.
            importlib.import_module("MyGPT.training.shards")

    @property
    def is_busy(self) -> bool:
        """True while the background thread is writing a snapshot."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, take_snapshot: TakeSnapshot) -> None:
        """Call take_snapshot and begin to write its result in the background. The writer must not be busy."""
        self._wait_for_other_ranks()
        snapshot = self._take(take_snapshot)
        # A daemon thread does not delay a process that must exit at once; an unfinished checkpoint is never used.
        self._thread = threading.Thread(target=self._try_to_write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def write(self, take_snapshot: TakeSnapshot) -> None:
        """Call take_snapshot and write its result before returning. The writer must not be busy."""
        self._wait_for_other_ranks()
        self._write(self._take(take_snapshot))

    def wait(self) -> None:
        """Wait until the background thread has written its snapshot, if it is writing one."""
        if self._thread is not None:
            self._thread.join()

    def _wait_for_other_ranks(self) -> None:
        if self.group is not None:
            self.wait()
        assert not self.is_busy

    def _take(self, take_snapshot: TakeSnapshot) -> Snapshot:
        began, snapshot = time.monotonic(), take_snapshot()
        self.last_taken = time.monotonic()
        self.blocking_seconds += self.last_taken - began
        return snapshot

    def _write(self, snapshot: Snapshot) -> None:
        step = snapshot.state.step
        if self._lost_contact is not None:
            raise self._lost_contact
        try:
            path = write_snapshot(self.directory, snapshot, self.group)
        except ConnectionError as error:
            self._lost_contact = error
            raise
        self.written, self.written_step = path, step
        self.n_written += 1
        if self.group is None or dist.get_rank(self.group) == 0:
            remove_old(self.directory, step, self.keep_last, self.keep_best)

    def _try_to_write(self, snapshot: Snapshot) -> None:
        try:
            self._write(snapshot)
        except Exception as error:  # The training thread reports it.
            self.failure = error


def _on_all_ranks(group: ProcessGroup | None, function: Callable[[], T]) -> list[T]:
    """Call `function` on all ranks of `group`, and return their results. All ranks raise the error of any rank."""
    if group is None:
        return [function()]
    from MyGPT.training.shards import on_all_ranks

    return on_all_ranks(group, function)


def _description(name: str, tensor: StoredTensor) -> Tensor:
    """Return a tensor without values that has the shape and dtype of a stored tensor, or its value if it is a number."""
    if tensor.dtype is None or tensor.shape == ():
        return tensor.load()
    return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")


def _make_manifest(directory: Path, names: Iterable[str] = _FILES) -> dict[str, dict[str, Any]]:
    files = {name: directory / name for name in names}
    return {name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for name, file in files.items()}


def _newest_first(directory: Path) -> list[Path]:
    """Return the paths of the checkpoints in `directory`: the one that `latest` names, and then the latest steps."""
    newest_first = list(reversed(by_step(directory).values()))
    latest = directory / LATEST
    if latest.is_file():  # In a run that returned to an earlier step, the newest one need not have the highest number.
        name = latest.read_bytes().decode("utf-8", "replace").strip()
        newest_first.sort(key=lambda path: path.name != name)
    return newest_first


def _val_loss(path: Path) -> float | None:
    """Return the validation loss in the checkpoint `path`, or None if the checkpoint has none or is damaged."""
    with contextlib.suppress(ValueError, OSError, AttributeError):
        loss = read_json(path / _STATE).get("val_loss")
        return loss if isinstance(loss, float) else None
    return None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json_text(content, indent=1) + "\n", encoding="utf-8")
