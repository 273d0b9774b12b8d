"""The files of a training run: one directory, used by one process at a time.

`config.yaml` (everything needed to repeat the run), `metrics.jsonl`, `model/` or `adapter/` (the best model), `checkpoints/`
(for `--resume`), `samples.txt`, and `loss.png`, which the commands draw.
"""

from __future__ import annotations

import contextlib
import math
import os
import shutil
import socket
import time
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, Protocol

import yaml
from filelock import FileLock, Timeout

from MyGPT.data.templates import Template
from MyGPT.files import atomic_write, remove_leftovers, restore_directory
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.checkpoint import CHECKPOINTS, CheckpointWriter, Snapshot, read_newest
from MyGPT.training.config import TrainConfig
from MyGPT.training.console import Console
from MyGPT.training.metrics import MetricsLog, read_metrics
from MyGPT.training.resume import check_unchanged, plain
from MyGPT.training.state import RunState
from MyGPT.weights.pretrained import read_weights

_GROWING = ("metrics.jsonl", "samples.txt")
RUN_FILES = ("config.yaml", "model", "adapter", CHECKPOINTS, "split.json", "loss.png", "tensorboard", *_GROWING)
Identify = Callable[[], dict[str, dict[str, Any]]]
TakeSnapshot = Callable[[], Snapshot]
_LOCK, _PROCESS = ".lock", ".process"
_SPIKE = 5.0
"""Gradient norms above this multiple of the running mean are reported."""


class BestModelStore(Protocol):
    """Saves the best model of a run and loads it again."""

    def place(self, run_dir: Path) -> Path:
        """Return the directory of the best model inside a run's directory."""
        ...

    def save(self, run_dir: Path) -> Path:
        """Write the model completely or not at all, and return its directory."""
        ...

    def restore(self, run_dir: Path) -> None:
        """Load the saved weights into the model."""
        ...


class WholeModel:
    """Stores the best model as a model directory, `model/`, with its tokenizer and template."""

    def __init__(self, model: GPTModel, tokenizer: Tokenizer | None, template: Template | None = None) -> None:
        self.model = model
        self.tokenizer = tokenizer
        self.template = template

    def place(self, run_dir: Path) -> Path:
        """Return the directory of the best model inside a run's directory."""
        return run_dir / "model"

    def save(self, run_dir: Path) -> Path:
        """Write the model directory completely or not at all, and return its path."""
        self.model.save_pretrained(self.place(run_dir), self.tokenizer)
        if self.template is not None:
            self.template.save(self.place(run_dir))
        return self.place(run_dir)

    def restore(self, run_dir: Path) -> None:
        """Load the saved weights into the model."""
        self.model.load_state_dict(read_weights(self.place(run_dir))[1])


class Run:
    """The directory of a training run and everything in it. One process at a time can open it.

    `open` locks the directory; `close`, or the end of a `with` block, releases it. Whatever is written is also reported on
    the console. Without a directory nothing is written.

    Args:
        directory: the run's directory, or None.
        config: says when checkpoints are written, how many are kept, and whether TensorBoard's files are written.
        recipe, best_model, console, overwrite, resume, allow_changed: see `Trainer`.
    """

    def __init__(
        self,
        directory: str | Path | None,
        config: TrainConfig,
        recipe: Mapping[str, Any] | None,
        best_model: BestModelStore,
        console: Console,
        *,
        overwrite: bool = False,
        resume: bool = False,
        allow_changed: str | Sequence[str] = (),
    ) -> None:
        if resume and directory is None:
            raise ValueError("resume=True needs run_dir, the directory of the run to resume")
        self.directory = None if directory is None else Path(directory)
        self.config = config
        self.recipe = plain(vars(config) if recipe is None else recipe)
        self.best_model = best_model
        self.console = console
        self.overwrite = overwrite
        self.resume = resume
        self.allow_changed = (allow_changed,) if isinstance(allow_changed, str) else tuple(allow_changed)
        self.writer: CheckpointWriter | None = None
        """The checkpoint writer; None before the run is opened, or if it writes no checkpoints."""
        self._identify: Identify = dict
        self._lock: FileLock | None = None
        self._metrics: MetricsLog | None = None
        self._is_checkpoint_due = False
        self._began = self._checkpoint_time = time.monotonic()
        self.checkpoint_seconds = 0.0

    def __enter__(self) -> Run:
        return self

    def __exit__(self, *exception: object) -> None:
        self.close()

    def open(self, identify: Identify) -> Snapshot | None:
        """Lock the directory and begin a run in it, or return the checkpoint from which the run is resumed.

        Files change only after all checks have passed.

        Args:
            identify: returns the hashes of the data and a description of the machine (see resume.py). It may take
                long, and is called once, when the first checkpoint is read or written.

        Raises:
            FileExistsError: the directory is not empty, unless it holds a run and `overwrite` is True.
            ValueError: the directory is locked; or a run cannot be resumed, because it has no complete checkpoint, or
                because its recipe or its data differ.
        """
        self._identify = lru_cache(maxsize=1)(identify)
        if self.directory is None:
            return None
        if not self.resume:
            check_run_directory(self.directory, self.overwrite)
        self._lock = _lock(self.directory)
        snapshot = self._rewind() if self.resume else None
        if snapshot is None:
            _clear(self.directory)
        _remove_unfinished(self.directory)
        with atomic_write(self.directory / "config.yaml") as file:
            yaml.safe_dump(self.recipe, file, sort_keys=False, allow_unicode=True)
        self._metrics = MetricsLog(self.directory, self.config.tensorboard, snapshot.state.step if snapshot else None)
        if self.config.checkpoint_every or self.config.checkpoint_minutes:
            self.writer = CheckpointWriter(self.directory / CHECKPOINTS, self.config.keep_last, self.config.keep_best)
        self._began = self._checkpoint_time = time.monotonic()
        return snapshot

    def close(self) -> None:
        """Wait for the checkpoint writer, close the files, and then release the lock. Later calls do nothing.

        If Ctrl-C interrupts the wait, the lock stays, because the writer is still at work. A second call releases it.
        """
        if self.writer is not None:
            self.writer.wait()
        try:
            self._report_failed_checkpoint()
            if self._metrics is not None:
                self._metrics.close()
        finally:
            if self._lock is not None:
                self._lock.release()
            self._lock = self._metrics = None

    def log(self, step: int, **values: float) -> None:
        """Append a record to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(step, **values)

    def record_step(self, state: RunState, loss: float, grad_norm: float) -> None:
        """Add a step to the running means of `state`, and report it if it was skipped or its gradient is large."""
        self.console.stepped()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self.log(state.step, skipped_steps=state.n_skipped)
            self.console.skipped(state.step, loss, grad_norm)
        elif (ratio := state.add_to_means(loss, grad_norm, _SPIKE)) > _SPIKE:
            self.log(state.step, grad_norm_spike=ratio)
            self.console.spiked(state.step, grad_norm, ratio)

    def record_speed(self, state: RunState, values: Mapping[str, float], tokens_per_second: float) -> None:
        """Record the values that a step returned, unless its loss is not finite, and show the speed."""
        if math.isfinite(values["loss"]):
            self.log(state.step, **values, tokens_per_second=tokens_per_second)
        self.console.logged(state.smoothed_loss, tokens_per_second)

    def record_evaluation(self, state: RunState, loss: float) -> None:
        """Count an evaluation in `state` and record its loss."""
        self.console.evaluated(state.step, loss, state.add_evaluation(loss))
        self.log(state.step, val_loss=loss)
        if state.has_lost_patience(self.config.early_stop):
            self.console.stopped_early(state.step, state.evals_since_best)

    def record_sample(self, step: int, text: str) -> None:
        """Show a live sample and append it to samples.txt."""
        self.console.sampled(step, text)
        if self.directory is not None:
            with open(self.directory / "samples.txt", "a", encoding="utf-8", newline="\n") as file:
                file.write(f"--- step {step} ---\n{text}\n\n")

    def save_model(self) -> Path | None:
        """Save the current model as the best one and return its directory; None without a directory of the run."""
        return None if self.directory is None else self.best_model.save(self.directory)

    def restore_best_model(self, state: RunState) -> None:
        """Load the best model, unless it is the current one. Raises FloatingPointError if no validation loss was finite."""
        if state.best_step is None:
            raise FloatingPointError(
                f"no validation loss was finite, the last one is {state.val_loss}: check the validation data, or lower "
                f"learning_rate{self.failure_message(state)}"
            )
        if self.directory is not None and state.best_step != state.step:
            self.best_model.restore(self.directory)

    def context(self) -> dict[str, dict[str, Any]]:
        """Return what a checkpoint stores beside the counters, tensors and random states: see `Snapshot.context`."""
        directory = self.directory
        lengths = {} if directory is None else {name: _size(directory / name) for name in _GROWING}
        return {"lengths": lengths, "recipe": self.recipe, **self._identify()}

    def write_first_checkpoint(self, take_snapshot: TakeSnapshot) -> None:
        """Write the checkpoint of a new run, so that a disk without room is an error before hours of training."""
        if self.writer is not None and not self.resume:
            self._checkpoint_now(self.writer, take_snapshot)

    def checkpoint_if_due(self, step: int, take_snapshot: TakeSnapshot) -> None:
        """Begin to write a checkpoint in the background if it is time for one and the writer is free.

        Args:
            step: the number of steps so far.
            take_snapshot: returns a copy of the run.
        """
        if self.writer is None:
            return
        every, minutes = self.config.checkpoint_every, self.config.checkpoint_minutes
        waited = time.monotonic() - self._checkpoint_time
        self._is_checkpoint_due |= (every > 0 and step % every == 0) or 0 < 60 * minutes <= waited
        self._report_failed_checkpoint()
        if self._is_checkpoint_due and not self.writer.is_busy:
            self._start_checkpoint(self.writer, take_snapshot)

    def write_last_checkpoint(self, step: int, take_snapshot: TakeSnapshot) -> None:
        """Write the checkpoint of the step at which training ended, and wait until it is on the disk."""
        if self.writer is None:
            return
        self.writer.wait()
        self._report_failed_checkpoint()
        if not self.writer.has_written(step):
            self._checkpoint_now(self.writer, take_snapshot)
        n, seconds = self.writer.n_written, self.checkpoint_seconds
        self.log(step, checkpoints=n, checkpoint_seconds=seconds)
        self.console.checkpointed(n, seconds, seconds / (time.monotonic() - self._began))

    def stop_message(self, state: RunState) -> str:
        """Return where a stopped run stands and how to resume it. Saves the model if there is no best one yet."""
        parts = [f"stopped at step {state.step}"]
        if self.writer is not None:
            parts.append(f"--resume {self.directory} continues the run")
        return "; ".join([*parts, *self._saved_model(state)])

    def check_divergence(self, state: RunState, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Raise FloatingPointError if too many steps were skipped. The three values are those of the last step."""
        if state.n_skipped <= self.config.max_skipped_steps:
            return
        raise FloatingPointError(
            f"at step {state.step} the loss is {loss} and the gradient norm {grad_norm}; {state.n_skipped} steps in all "
            f"were not finite, more than max_skipped_steps={self.config.max_skipped_steps}: lower learning_rate (now "
            f"{learning_rate:.3g}) or raise warmup_steps{self.failure_message(state)}"
        )

    def failure_message(self, state: RunState) -> str:
        """Return where a failed run left its model and its last checkpoint, for the end of an error message.

        Saves the model if there is no best one yet.
        """
        parts = ["", *self._saved_model(state)]
        if self.writer is not None:
            self.writer.wait()
            if self.writer.written is not None:
                parts.append(f"the last good checkpoint is {self.writer.written}")
        return "; ".join(parts)

    def _saved_model(self, state: RunState) -> list[str]:
        if self.directory is None:
            return []
        if state.best_step is None:
            self.save_model()
        which = "last model" if state.best_step is None else f"best model (step {state.best_step})"
        return [f"the {which} is in {self.best_model.place(self.directory)}"]

    def _rewind(self) -> Snapshot:
        """Return the newest complete checkpoint, and cut the logs back to their length at its step."""
        assert self.directory is not None
        snapshot, warnings = read_newest(self.directory / CHECKPOINTS)
        warnings += check_unchanged(snapshot, self.context(), self.allow_changed)
        for warning in warnings:
            self.console.warn(warning)
        if self.allow_changed:
            records = read_metrics(self.directory)
            losses = [(record["val_loss"], record["step"]) for record in records if "val_loss" in record]
            if losses := [pair for pair in losses if math.isfinite(pair[0])]:
                # A changed run does not repeat the losses: the best model on the disk stays until it is beaten.
                snapshot.state.best_loss, snapshot.state.best_step = min(losses)
        for name in _GROWING:
            length = snapshot.context["lengths"].get(name, math.inf)
            if _size(self.directory / name) > length:
                os.truncate(self.directory / name, length)
        return snapshot

    def _start_checkpoint(self, writer: CheckpointWriter, take_snapshot: TakeSnapshot) -> None:
        began = time.monotonic()
        writer.start(take_snapshot())
        self._is_checkpoint_due, self._checkpoint_time = False, time.monotonic()
        self.checkpoint_seconds += self._checkpoint_time - began

    def _checkpoint_now(self, writer: CheckpointWriter, take_snapshot: TakeSnapshot) -> None:
        """Write a checkpoint, wait until it is on the disk, and raise the writer's error if there is one."""
        self._start_checkpoint(writer, take_snapshot)
        writer.wait()
        if (failure := writer.take_failure()) is not None:
            raise failure

    def _report_failed_checkpoint(self) -> None:
        failure = None if self.writer is None else self.writer.take_failure()
        if failure is not None:
            self.console.warn(f"a checkpoint could not be written: {failure}")


def check_run_directory(run: Path, overwrite: bool) -> None:
    """Raise FileExistsError if the directory is not empty, unless it holds a run and `overwrite` is True."""
    if not run.exists() or not any(entry.name not in (_LOCK, _PROCESS) for entry in run.iterdir()):
        return
    if not overwrite:
        raise FileExistsError(f"{run} is not empty: choose another --out, or give --overwrite true")
    if not (run / "config.yaml").is_file():
        raise FileExistsError(f"{run} holds files but no run (config.yaml is missing): choose another --out")


def is_empty_run(run: Path) -> bool:
    """Return True for a run that was stopped before it saved a model."""
    kept = [run / name for name in ("model", "adapter")]
    for directory in kept:
        restore_directory(directory)
    return (run / "config.yaml").is_file() and not any(directory.exists() for directory in kept)


def _lock(run: Path) -> FileLock:
    """Create the directory and lock it. The operating system releases the lock when the process ends.

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
            raise ValueError(
                f"this process already holds the lock of {run}: close the Trainer that uses it, or choose another run_dir"
            ) from None
        raise ValueError(
            f"another process{f' ({holder})' if holder else ''} is training in {run}: wait for it, or choose another --out"
        ) from None
    (run / _PROCESS).write_text(f"{this_process}\n", encoding="utf-8")
    return lock


def _clear(run: Path) -> None:
    """Remove the files of an earlier run. Other files may be the user's and stay."""
    for name in RUN_FILES:
        if (run / name).is_dir():
            shutil.rmtree(run / name)
        else:
            (run / name).unlink(missing_ok=True)


def _remove_unfinished(run: Path) -> None:
    """Remove the temporary files of a process that was killed while it wrote."""
    remove_leftovers(run, RUN_FILES)
    if (run / CHECKPOINTS).is_dir():
        remove_leftovers(run / CHECKPOINTS, ("step-*", "latest"))


def _size(path: Path) -> int:
    return path.stat().st_size if path.is_file() else 0
