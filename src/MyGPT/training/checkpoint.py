"""A run's state on disk: all that the next step depends on, whole or not there.

`checkpoints/step-000500/` has weights.safetensors (the parameters that are trained), optimizer.safetensors (what the
optimizers remember of each, as parameter/key), state.json (the counters, the random states, the recipe, the versions) and
manifest.json (length and SHA-256 of the others); `checkpoints/latest` names the newest. There is no pickle in it.

A checkpoint is written beside its place, flushed to the disk and renamed; then `latest` moves; then older ones go. A kill at
any moment leaves the one before.
"""

from __future__ import annotations

import json
import random
import shutil
import threading
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.optim import Optimizer

from MyGPT.files import atomic_directory, atomic_write, read_json, sha256_of
from MyGPT.weights.formats.safetensors import read_safetensors, write_safetensors

CHECKPOINTS = "checkpoints"
_WEIGHTS, _OPTIMIZER, _STATE, _MANIFEST = "weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"
_LATEST = "latest"
# The library draws from generators of its own; these two are for code beside it, such as a user's batches.
_numpy_random: Any = np.random


@dataclass(frozen=True)
class Snapshot:
    """A run between two steps, in memory of its own: training may go on while it is written."""

    step: int
    weights: dict[str, Tensor]
    optimizer: dict[str, Tensor]
    """Each tensor as `parameter/key`."""
    state: dict[str, Any]
    """What JSON can hold. `val_loss` is that of this step, or None if it was not evaluated."""


def write_snapshot(directory: Path, snapshot: Snapshot) -> Path:
    """Writes a checkpoint into the run's `checkpoints` directory, and points `latest` to it."""
    path = directory / f"step-{snapshot.step:06d}"
    with atomic_directory(path, replaces=("*",)) as temporary:
        for name, tensors in ((_WEIGHTS, snapshot.weights), (_OPTIMIZER, snapshot.optimizer)):
            write_safetensors(temporary / name, tensors, shown_as=path / name)
        _write_json(temporary / _STATE, {"step": snapshot.step, **snapshot.state})
        files = {
            file.name: {"bytes": file.stat().st_size, "sha256": sha256_of(file)} for file in sorted(temporary.iterdir())
        }
        _write_json(temporary / _MANIFEST, files)
    with atomic_write(directory / _LATEST) as file:
        file.write(path.name + "\n")
    return path


def read_snapshot(path: Path) -> Snapshot:
    """A checkpoint, every byte of it checked. A damaged one is a ValueError or an OSError that names the file."""
    manifest = read_json(path / _MANIFEST)
    if not isinstance(manifest, dict) or set(manifest) != {_WEIGHTS, _OPTIMIZER, _STATE}:
        raise ValueError(f"{path / _MANIFEST} names other files than a checkpoint has")
    for name, expected in manifest.items():
        file = path / name
        if not isinstance(expected, dict) or file.stat().st_size != expected.get("bytes"):
            raise ValueError(f"{file} has {file.stat().st_size} bytes, not those of which the manifest tells")
        if sha256_of(file) != expected.get("sha256"):
            raise ValueError(f"{file} is damaged: its SHA-256 is not the manifest's")
    state = read_json(path / _STATE)
    weights, optimizer = (
        {name: lazy.load().clone() for name, lazy in read_safetensors(path / file)} for file in (_WEIGHTS, _OPTIMIZER)
    )
    return Snapshot(state["step"], weights, optimizer, state)


def has_checkpoint(run: Path) -> bool:
    """Whether there is anything in a run that looks like a checkpoint."""
    return bool(_by_step(run / CHECKPOINTS))


def read_newest(directory: Path) -> tuple[Snapshot, list[str]]:
    """The newest whole checkpoint, and a sentence for each newer one that is damaged. None that is whole is a ValueError."""
    newest_first = list(reversed(_by_step(directory).values()))
    latest = directory / _LATEST
    if latest.is_file():  # after a step back it is not the one with the highest number
        name = latest.read_bytes().decode("utf-8", "replace").strip()
        newest_first.sort(key=lambda path: path.name != name)
    problems: list[str] = []
    for path in newest_first:
        try:
            return read_snapshot(path), problems
        except (ValueError, OSError, KeyError, TypeError) as error:
            problems.append(f"{path} is not used: {error}")
    raise ValueError(f"there is no whole checkpoint in {directory}" + "".join(f"; {problem}" for problem in problems))


def remove_old(directory: Path, step: int, keep_last: int, keep_best: int) -> None:
    """Removes checkpoints before `step` but for the last ones and those of the lowest validation loss.

    Those after it are of a future that a step back has left, and are written over when it comes again.
    """
    past = [path for of_path, path in _by_step(directory).items() if of_path <= step]
    kept = set(past[-keep_last:])
    if keep_best:
        losses = {path: loss for path in past if (loss := _val_loss(path)) is not None}
        kept |= set(sorted(losses, key=losses.__getitem__)[:keep_best])
    for path in past:
        if path not in kept:
            shutil.rmtree(path, ignore_errors=True)  # what stays of it is no longer whole, and is tried again


class CheckpointWriter:
    """Writes snapshots in the background, one at a time.

    One that cannot be written is told, and the run goes on: those before it are still there, and the next may succeed.
    """

    def __init__(self, directory: Path, keep_last: int, keep_best: int) -> None:
        self.directory = directory
        self.keep_last = keep_last
        self.keep_best = keep_best
        self.written: Path | None = None
        """The newest that is whole on the disk."""
        self.n_written = 0
        self._failure: BaseException | None = None
        self._thread: threading.Thread | None = None

    @property
    def is_busy(self) -> bool:
        return self._thread is not None and self._thread.is_alive()

    def start(self, snapshot: Snapshot) -> None:
        """Begins to write; only while nothing else is being written."""
        assert not self.is_busy
        # A daemon: a process that is told to stop at once does not wait for it. What is half written has no name.
        self._thread = threading.Thread(target=self._write, args=(snapshot,), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Returns when nothing is being written."""
        if self._thread is not None:
            self._thread.join()

    def take_failure(self) -> BaseException | None:
        """Why the last snapshot could not be written, asked for the first time; None if it was."""
        failure, self._failure = self._failure, None
        return failure

    def _write(self, snapshot: Snapshot) -> None:
        try:
            self.directory.mkdir(parents=True, exist_ok=True)
            self.written = write_snapshot(self.directory, snapshot)
            self.n_written += 1
            remove_old(self.directory, snapshot.step, self.keep_last, self.keep_best)
        except Exception as error:  # told by the thread that trains
            self._failure = error


def seed_everything(seed: int) -> None:
    """Seeds every generator whose state is in `random_states`."""
    random.seed(seed)
    _numpy_random.seed(seed % 2**32)
    torch.manual_seed(seed)


def optimizer_tensors(optimizers: list[Optimizer], names: Mapping[Tensor, str]) -> dict[str, Tensor]:
    """What the optimizers remember, as `parameter/key`."""
    return {
        f"{names[parameter]}/{key}": value
        for optimizer in optimizers
        for parameter, remembered in optimizer.state.items()
        for key, value in remembered.items()
    }


def load_optimizer_tensors(
    optimizers: list[Optimizer], names: Mapping[Tensor, str], tensors: Mapping[str, Tensor]
) -> None:
    """Gives the optimizers back what `optimizer_tensors` took of them."""
    remembered: dict[str, dict[str, Tensor]] = {}
    for name, tensor in tensors.items():
        parameter, _, key = name.rpartition("/")
        remembered.setdefault(parameter, {})[key] = tensor
    for optimizer in optimizers:
        content = optimizer.state_dict()  # torch numbers the parameters through all groups
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        content["state"] = {i: remembered[names[p]] for i, p in enumerate(parameters) if names[p] in remembered}
        optimizer.load_state_dict(content)


def random_states() -> dict[str, Any]:
    """The states of every generator that is not seeded anew where it is used."""
    version, integers, gauss = random.getstate()
    kind, keys, *rest = _numpy_random.get_state(legacy=True)
    states: dict[str, Any] = {
        "python": [version, list(integers), gauss],
        "numpy": [kind, np.asarray(keys).tolist(), *rest],
        "torch": _hex(torch.get_rng_state()),
    }
    if torch.cuda.is_available():
        states["cuda"] = [_hex(state) for state in torch.cuda.get_rng_state_all()]
    if torch.backends.mps.is_available():
        states["mps"] = _hex(torch.mps.get_rng_state())
    return states


def restore_random_states(states: Mapping[str, Any]) -> None:
    """Puts the generators where `random_states` found them; a device that is not here any more is left out."""
    version, integers, gauss = states["python"]
    random.setstate((version, tuple(integers), gauss))
    kind, keys, *rest = states["numpy"]
    _numpy_random.set_state((kind, np.array(keys, dtype=np.uint32), *rest))
    torch.set_rng_state(_from_hex(states["torch"]))
    for device, state in enumerate(states.get("cuda", ())[: torch.cuda.device_count()]):
        torch.cuda.set_rng_state(_from_hex(state), device)
    if "mps" in states and torch.backends.mps.is_available():
        torch.mps.set_rng_state(_from_hex(states["mps"]))


def _hex(state: Tensor) -> str:
    return state.numpy().tobytes().hex()


def _from_hex(text: str) -> Tensor:
    return torch.frombuffer(bytearray.fromhex(text), dtype=torch.uint8)


def _by_step(directory: Path) -> dict[int, Path]:
    """The checkpoints of a directory in the order of their steps, whole or not."""
    paths = {int(path.name[5:]): path for path in directory.glob("step-*") if path.name[5:].isdecimal()}
    return dict(sorted(paths.items()))


def _val_loss(path: Path) -> float | None:
    try:
        loss = read_json(path / _STATE).get("val_loss")
    except (ValueError, OSError, AttributeError):
        return None
    return loss if isinstance(loss, float) else None


def _write_json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=1, allow_nan=False) + "\n", encoding="utf-8")
