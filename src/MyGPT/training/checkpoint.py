"""Checkpoints: everything the next training step depends on, stored completely or not at all.

`checkpoints/step-000500/` holds weights.safetensors (the trained parameters), optimizer.safetensors (the optimizer state of
each parameter, named `parameter/key`), state.json (the counters, random states, recipe and versions) and manifest.json (size
and SHA-256 of the other files). `checkpoints/latest` names the newest checkpoint. None of the files is a pickle.

A checkpoint is written to a temporary directory, flushed to the disk and renamed; then `latest` is updated; then old
checkpoints are removed. If the process is killed at any moment, the previous checkpoint is still complete.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from MyGPT.files import atomic_directory, atomic_write, read_json, sha256_of
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from MyGPT.weights.formats.safetensors import read_safetensors, write_safetensors

CHECKPOINTS = "checkpoints"
_WEIGHTS, _OPTIMIZER, _STATE, _MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_LATEST = "latest"
_CONTEXT = ("lengths", "recipe", "data", "machine", "random")
# The library draws from generators of its own; NumPy's and Python's are saved for users' code, such as their batches.
_numpy_random: Any = np.random


@dataclass(frozen=True)
class Snapshot:
    """A copy of a run between two steps. Training can continue while the copy is written."""

    state: RunState
    weights: dict[str, Tensor]
    """The trained parameters by name."""
    optimizer: dict[str, Tensor]
    """The optimizer state, named `parameter/key`."""
    context: dict[str, dict[str, Any]]
    """JSON values: `lengths` of the run's growing files, `recipe`, `data` fingerprints, `machine`, `random` states."""


def write_snapshot(directory: Path, snapshot: Snapshot) -> Path:
    """Write a checkpoint to a run's `checkpoints` directory, let `latest` name it, and return its path."""
    path = directory / _name(snapshot.state.step)
    with atomic_directory(path, replaces=("*",)) as temporary:
        for name, tensors in ((_WEIGHTS, snapshot.weights), (_OPTIMIZER, snapshot.optimizer)):
            write_safetensors(temporary / name, tensors, shown_as=path / name)
        _write_json(temporary / _STATE, {**snapshot.state.to_json(), **snapshot.context})
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(temporary.iterdir())
        }
        _write_json(temporary / _MANIFEST, files)
    with atomic_write(directory / _LATEST) as file:
        file.write(path.name + "\n")
    return path


def read_snapshot(path: Path) -> Snapshot:
    """Read a checkpoint and verify every byte of it.

    Raises:
        IncompatibleCheckpointError: another version of MyGPT wrote the checkpoint, and something is missing from it.
        ValueError, OSError: the checkpoint is damaged. The message names the file.
    """
    manifest = read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or set(manifest) != {_WEIGHTS, _OPTIMIZER, _STATE}:
        raise ValueError(f"{path / _MANIFEST} does not list the files of a checkpoint")
    for name, expected in manifest.items():
        file = path / name
        if not isinstance(expected, dict) or file.stat().st_size != expected.get("bytes"):
            raise ValueError(f"{file} has {file.stat().st_size} bytes, which is not the size in the manifest")
        if sha256_of(file) != expected.get("sha256"):
            raise ValueError(f"{file} is damaged: its SHA-256 is not the one in the manifest")
    content = read_json(path / _STATE)
    if not isinstance(content, dict):
        raise ValueError(f"{path / _STATE} must hold a JSON object, got {content!r:.80}")
    context = {name: content[name] for name in _CONTEXT if isinstance(content.get(name), dict)}
    try:
        state = RunState.from_json(content)
        if missing := [name for name in _CONTEXT if name not in context]:
            raise IncompatibleCheckpointError(f"it lacks {', '.join(missing)}, so another version of MyGPT wrote it")
    except ValueError as error:
        raise type(error)(f"{path / _STATE} is not usable: {error}") from None
    weights, optimizer = (
        {name: lazy.load().clone() for name, lazy in read_safetensors(path / file).items()}
        for file in (_WEIGHTS, _OPTIMIZER)
    )
    return Snapshot(state, weights, optimizer, context)


def has_checkpoint(run: Path) -> bool:
    """Return True if a run's directory contains a checkpoint, complete or not."""
    return bool(_by_step(run / CHECKPOINTS))


def read_newest(directory: Path) -> tuple[Snapshot, list[str]]:
    """Return the newest complete checkpoint, and one sentence for each newer one that is damaged.

    Raises:
        IncompatibleCheckpointError: another version of MyGPT wrote the newest complete checkpoint.
        ValueError: the directory has no complete checkpoint.
    """
    newest_first = list(reversed(_by_step(directory).values()))
    latest = directory / _LATEST
    if (
        latest.is_file()
    ):  # After a return to an earlier step, the newest checkpoint is not the one with the highest number.
        name = latest.read_bytes().decode("utf-8", "replace").strip()
        newest_first.sort(key=lambda path: path.name != name)
    problems: list[str] = []
    for path in newest_first:
        try:
            return read_snapshot(path), problems
        except IncompatibleCheckpointError:
            raise
        except (ValueError, OSError) as error:
            problems.append(f"{path} is not used: {error}")
    raise ValueError(f"there is no complete checkpoint in {directory}" + "".join(f"; {it}" for it in problems))


def remove_old(directory: Path, step: int, keep_last: int, keep_best: int) -> None:
    """Remove checkpoints up to `step`, except the newest and those with the lowest validation loss.

    Checkpoints after `step` remain: they belong to a run that was resumed from an earlier step, which will overwrite them.

    Args:
        directory: a run's `checkpoints` directory.
        step: the step of the checkpoint just written.
        keep_last: how many of the newest checkpoints to keep.
        keep_best: how many of the checkpoints with the lowest validation loss to keep as well.
    """
    past = [path for path_step, path in _by_step(directory).items() if path_step <= step]
    kept = set(past[-keep_last:])
    if keep_best:
        losses = {path: loss for path in past if (loss := _val_loss(path)) is not None}
        kept |= set(sorted(losses, key=losses.__getitem__)[:keep_best])
    for path in past:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)  # Whatever cannot be removed now is tried again next time.


class CheckpointWriter:
    """Writes snapshots in a background thread, one at a time.

    A snapshot that cannot be written does not end the run, because the earlier checkpoints still exist and the next one
    may succeed. `take_failure` returns the error.
    """

    def __init__(self, directory: Path, keep_last: int, keep_best: int) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.written: Path | None = None
        """The newest complete checkpoint of this writer."""
        self.n_written = 0
        self._failure: Exception | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        """True while a snapshot is being written."""
        return self._thread is not None and self._thread.is_alive()

    def start(self, snapshot: Snapshot) -> None:
        """Begin to write a snapshot. The writer must not be busy."""
        assert not self.is_busy
        # A daemon thread does not delay a process that must exit at once; an unfinished checkpoint is never used.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def has_written(self, step: int) -> bool:
        """Return True if the newest complete checkpoint is that of `step`."""
        return self.written is not None and self.written.name == _name(step)

    def take_failure(self) -> Exception | None:
        """Return the error of the last failed write and forget it; None if there was no error."""
        failure, self._failure = self._failure, None
        return failure

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.written = write_snapshot(self.directory, snapshot)
            self.n_written += 1
            remove_old(self.directory, snapshot.state.step, self.keep_last, self.keep_best)
        except Exception as error:  # The training thread reports it.
            self._failure = error


def seed_everything(seed: int) -> None:
    """Seed every generator whose state `random_states` returns."""
    random.seed(seed)
    _numpy_random.seed(seed % 2**32)
    torch.manual_seed(seed)


def trained_parameters(model: nn.Module) -> dict[str, nn.Parameter]:
    """Return the parameters that require gradients, by name."""
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


def take_snapshot(
    model: nn.Module, optimizers: list[Optimizer], state: RunState, context: dict[str, dict[str, Any]]
) -> Snapshot:
    """Return a copy of a run in main memory; `context` lacks only the random states."""
    weights = trained_parameters(model)
    names: dict[Tensor, str] = {parameter: name for name, parameter in weights.items()}
    tensors = {
        f"{names[parameter]}/{key}": tensor
        for optimizer in optimizers
        for parameter, by_key in optimizer.state.items()
        for key, tensor in by_key.items()
    }
    copies = [{name: _copy_to_cpu(tensor) for name, tensor in group.items()} for group in (weights, tensors)]
    return Snapshot(replace(state), copies[0], copies[1], {**context, "random": random_states()})


def restore_snapshot(snapshot: Snapshot, model: nn.Module, optimizers: list[Optimizer]) -> RunState:
    """Load a snapshot into the model, its optimizers and the random generators, and return its counters.

    Raises ValueError if the snapshot trains other parameters than `model`.
    """
    weights = trained_parameters(model)
    if weights.keys() != snapshot.weights.keys():
        raise ValueError(f"the checkpoint of step {snapshot.state.step} trains other parameters than this run")
    with torch.no_grad():
        for name, tensor in snapshot.weights.items():
            weights[name].copy_(tensor)
    by_parameter: dict[str, dict[str, Tensor]] = {}
    for path, tensor in snapshot.optimizer.items():
        name, _, key = path.rpartition("/")
        by_parameter.setdefault(name, {})[key] = tensor
    names = {parameter: name for name, parameter in weights.items()}
    for optimizer in optimizers:
        content = optimizer.state_dict()  # torch numbers the parameters across all groups.
        trained = [names[parameter] for group in optimizer.param_groups for parameter in group["params"]]
        content["state"] = {i: by_parameter[name] for i, name in enumerate(trained) if name in by_parameter}
        optimizer.load_state_dict(content)
    restore_random_states(snapshot.context["random"])
    return replace(snapshot.state)


def random_states() -> dict[str, Any]:
    """Return the states of the global random generators as JSON values."""
    version, integers, gauss = random.getstate()
    kind, keys, *rest = _numpy_random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(integers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_initialized():  # A run on the CPU must not occupy the GPUs.
        states["cuda"] = [_hex(state) for state in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():
        states["mps"] = _hex(torch.mps.get_rng_state())
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Restore the states that `random_states` returned. States of devices that this machine lacks are ignored."""
    version, integers, gauss = states["python"]
    random.setstate((version, tuple(integers), gauss))
    kind, keys, *rest = states["numpy"]
    _numpy_random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(state), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_from_hex(states["mps"]))


def _copy_to_cpu(tensor: Tensor) -> Tensor:
    return tensor.detach().to("cpu", copy=True, memory_format=torch.contiguous_format)


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _by_step(directory: Path) -> dict[int, Path]:
    """Return the checkpoints of a directory by step, in ascending order, complete or not."""
    paths = {int(path.name[5:]): path for path in directory.glob("step-*") if path.name[5:].isdecimal()}
    return dict(sorted(paths.items()))


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _val_loss(path: Path) -> float | None:
    """Return the validation loss of a checkpoint; None if there is none, or the checkpoint is damaged."""
    try:
        loss = read_json(path / _STATE).get("val_loss")
    except (ValueError, OSError, AttributeError):
        return None
    return loss if isinstance(loss, float) else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
