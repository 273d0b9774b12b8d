"""The files of a training run: one directory, used by one process at a time.

`config.yaml` (everything needed to repeat the run), `metrics.jsonl`, `model/` or `adapter/` (the best model),
`checkpoints/` (for `--resume`), `samples.txt`, and `loss.png`, which the commands draw.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import yaml

from MyGPT.data.templates import Template
from MyGPT.files import atomic_write
from MyGPT.model import GPTModel
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.checkpoint import CHECKPOINTS, CheckpointWriter, read_newest
from MyGPT.training.config import TrainConfig
from MyGPT.training.console import Console
from MyGPT.training.directory import check_run_directory, lock_directory, log_lengths, remove_run, remove_unfinished
from MyGPT.training.metrics import MetricsLog, read_metrics
from MyGPT.training.snapshot import Snapshot, TakeSnapshot, check_unchanged
from MyGPT.training.state import RunState
from MyGPT.weights.pretrained import read_weights

_SPIKE = 5.0
"""Gradient norms above this multiple of the running mean are reported."""


class BestModelStore(Protocol):
    """Saves the best model of a run and loads it again."""

    def place(self, run_dir: Path) -> Path:
        """Return the directory of the best model inside a run's directory."""

    def save(self, run_dir: Path) -> Path:
        """Write the model completely or not at all, and return its directory."""

    def restore(self, run_dir: Path) -> None:
        """Load the saved weights into the model."""


@dataclass
class WholeModel:
    """Stores the best model as a model directory, `model/`, with its tokenizer and template."""

    model: GPTModel
    tokenizer: Tokenizer | None
    template: Template | None = None

    def place(self, run_dir: Path) -> Path:
        return run_dir / "model"

    def save(self, run_dir: Path) -> Path:
        self.model.save_pretrained(self.place(run_dir), self.tokenizer)
        if self.template is not None:
            self.template.save(self.place(run_dir))
        return self.place(run_dir)

    def restore(self, run_dir: Path) -> None:
        self.model.load_state_dict(read_weights(self.place(run_dir))[1])


@dataclass
class Run:
    """The directory of a training run and the files in it; without a directory, nothing is written.

    `open` locks the directory and `close` unlocks it. Whatever is written is also reported on the console.
    """

    directory: Path | None
    config: TrainConfig
    recipe: dict[str, Any]
    """The content of config.yaml."""
    best_model: BestModelStore
    console: Console
    identify: Callable[[], dict[str, dict[str, Any]]]
    """Returns the `data` and the `machine` of `Snapshot.context`. It may take long, so only checkpoints call it."""
    overwrite: bool
    resume: bool
    allow_changed: Sequence[str]
    writer: CheckpointWriter | None = None
    """The checkpoint writer; None before the run is opened, or if it writes no checkpoints."""
    _metrics: MetricsLog | None = None
    _resources: ExitStack = field(default_factory=ExitStack)
    _is_checkpoint_due: bool = False

    def __post_init__(self) -> None:
        if self.resume and self.directory is None:
            raise ValueError("resume=True needs run_dir, the directory of the run to resume")
        self.recipe = yaml.safe_load(yaml.safe_dump(self.recipe))  # as it will be read back: tuples become lists

    def open(self) -> Snapshot | None:
        """Lock the directory and begin a run in it, or return the snapshot from which the run is resumed.

        Files change only after all checks have passed. Raises FileExistsError for a directory that may not be
        overwritten, and ValueError if it is locked, has no complete checkpoint, or holds a run with another recipe or
        other data.
        """
        directory, config = self.directory, self.config
        if directory is None:
            return None
        if not self.resume:
            check_run_directory(directory, self.overwrite)
        self._resources.callback(lock_directory(directory).release)
        snapshot = self._rewind(directory) if self.resume else None
        if snapshot is None:
            remove_run(directory)
        remove_unfinished(directory)
        with atomic_write(directory / "config.yaml") as file:
            yaml.safe_dump(self.recipe, file, sort_keys=False, allow_unicode=True)
        self._metrics = MetricsLog(directory, config.tensorboard, snapshot.state.step if snapshot else None)
        self._resources.callback(self._metrics.close)
        if config.checkpoint_every or config.checkpoint_minutes:
            self.writer = CheckpointWriter(directory / CHECKPOINTS, config.keep_last, config.keep_best)
        return snapshot

    def close(self) -> None:
        """Wait for the checkpoint writer, close the files, and then release the lock. Later calls do nothing.

        If Ctrl-C interrupts the wait, the lock stays, because the writer is still at work. A second call releases it.
        """
        if self.writer is not None:
            self.writer.wait()
        with self._resources:
            self._metrics = None
            self._report_failed_checkpoint()

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
        """Load the best model, if it is not the current one; FloatingPointError if no validation loss was finite."""
        if state.best_step is None:
            raise FloatingPointError(
                f"no validation loss was finite, the last one is {state.val_loss}: check the validation data, or lower "
                f"learning_rate{self._what_is_saved(state)}"
            )
        if self.directory is not None and state.best_step != state.step:
            self.best_model.restore(self.directory)

    def check_divergence(self, state: RunState, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Raise FloatingPointError if too many steps were skipped. The three values are those of the last step."""
        if state.n_skipped > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"at step {state.step} the loss is {loss} and the gradient norm {grad_norm}; {state.n_skipped} steps "
                f"in all were not finite, more than max_skipped_steps={self.config.max_skipped_steps}: lower "
                f"learning_rate (now {learning_rate:.3g}) or raise warmup_steps{self._what_is_saved(state)}"
            )

    def stop_message(self, state: RunState) -> str:
        """Return where a stopped run stands and how to resume it. Saves the model if there is no best one yet."""
        way_out = "" if self.writer is None else f"; --resume {self.directory} continues the run"
        return f"stopped at step {state.step}{way_out}{self._what_is_saved(state)}"

    def context(self) -> dict[str, dict[str, Any]]:
        """Return the content of a checkpoint except counters, tensors and random states (see `Snapshot.context`)."""
        lengths = {} if self.directory is None else log_lengths(self.directory)
        return {"lengths": lengths, "recipe": self.recipe, **self.identify()}

    def write_first_checkpoint(self, take_snapshot: TakeSnapshot) -> None:
        """Write the checkpoint of a new run, so that a disk without room is an error before hours of training."""
        if self.writer is not None and not self.resume:
            self.writer.write(take_snapshot)

    def checkpoint_if_due(self, step: int, take_snapshot: TakeSnapshot) -> None:
        """Begin to write a checkpoint in the background if one is due after `step` steps and the writer is free."""
        if self.writer is None:
            return
        every, seconds = self.config.checkpoint_every, 60 * self.config.checkpoint_minutes
        is_late = 0 < seconds <= time.monotonic() - self.writer.last_taken
        self._is_checkpoint_due |= is_late or (every > 0 and step % every == 0)
        self._report_failed_checkpoint()
        if self._is_checkpoint_due and not self.writer.is_busy:
            self.writer.start(take_snapshot)
            self._is_checkpoint_due = False

    def write_last_checkpoint(self, step: int, take_snapshot: TakeSnapshot) -> None:
        """Write the checkpoint of the step at which training ended, and wait until it is on the disk."""
        if self.writer is None:
            return
        self.writer.wait()
        self._report_failed_checkpoint()
        if self.writer.written_step != step:
            self.writer.write(take_snapshot)
        n, seconds = self.writer.n_written, self.writer.blocking_seconds
        self.log(step, checkpoints=n, checkpoint_seconds=seconds)
        self.console.checkpointed(n, seconds, seconds / (time.monotonic() - self.writer.created))

    def _what_is_saved(self, state: RunState) -> str:
        """Return where the model and the last checkpoint are, to end a message; save a model if there is none."""
        if self.directory is None:
            return ""
        if state.best_step is None:
            self.save_model()
        which = "last model" if state.best_step is None else f"best model (step {state.best_step})"
        text = f"; the {which} is in {self.best_model.place(self.directory)}"
        if self.writer is not None:
            self.writer.wait()
            text += f"; the last good checkpoint is {self.writer.written}" if self.writer.written else ""
        return text

    def _report_failed_checkpoint(self) -> None:
        if self.writer is not None and self.writer.failure is not None:
            self.console.warn(f"a checkpoint could not be written: {self.writer.failure}")
            self.writer.failure = None

    def _rewind(self, directory: Path) -> Snapshot:
        """Return the newest complete checkpoint, and cut the logs back to their length at its step."""
        snapshot, warnings = read_newest(directory / CHECKPOINTS)
        for warning in (*warnings, *check_unchanged(snapshot, self.context(), self.allow_changed)):
            self.console.warn(warning)
        if self.allow_changed:
            pairs = [(record["val_loss"], record["step"]) for record in read_metrics(directory) if "val_loss" in record]
            if finite := [(loss, step) for loss, step in pairs if math.isfinite(loss)]:
                # A changed run does not repeat the losses: the best model on the disk stays until it is beaten.
                snapshot.state.best_loss, snapshot.state.best_step = min(finite)
        for name, length in log_lengths(directory).items():
            if (saved := snapshot.context["lengths"].get(name, length)) < length:
                os.truncate(directory / name, saved)
        return snapshot
