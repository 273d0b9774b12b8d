"""The files of a training run, in a directory that one process uses at a time.

The directory holds `config.yaml` (everything needed to repeat the run), `metrics.jsonl`, `model/` or `adapter/` (the
best model), `checkpoints/` (for `--resume`), `history/` (the models that keep_every keeps), `samples.txt`, and
`loss.png`, a plot of the losses.
"""

from __future__ import annotations

import math
import shutil
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Protocol

import yaml
from torch.distributed import ProcessGroup

from MyGPT import ranks
from MyGPT.data.chat_template import save_chat_template
from MyGPT.data.templates import Template
from MyGPT.files import atomic_write, json_text
from MyGPT.messages import error_message, quote
from MyGPT.model import GPTModel, load_own_weights
from MyGPT.parts import PARTS_FILE, Parts
from MyGPT.tokenizers import Tokenizer
from MyGPT.training.checkpoint import CheckpointWriter, read_newest
from MyGPT.training.config import TrainConfig
from MyGPT.training.console import Console
from MyGPT.training.directory import (
    check_run_directory,
    cut_log,
    lock_directory,
    log_lengths,
    remove_run,
    remove_unfinished,
)
from MyGPT.training.metrics import AppendedFile, MetricsLog, read_evaluations
from MyGPT.training.names import CHECKPOINTS, HISTORY, by_step, step_name
from MyGPT.training.optim import fitting_warmup
from MyGPT.training.snapshot import Snapshot, TakeSnapshot, check_unchanged
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from MyGPT.training.trackers import TrackerThreads, require_trackers
from MyGPT.weights.pretrained import load_weights_into_gpt, read_weights

_SPIKE = 5.0
"""A gradient norm above this multiple of its running mean is reported."""
_NOT_SAVED = "model_not_saved"
"""The key in metrics.jsonl that marks the validation loss of a model which was the best one but could not be saved."""


class BestModelStore(Protocol):
    """An interface for objects that save the best model of a training run and load it again."""

    def place(self, run_dir: Path) -> Path:
        """Return the directory inside run_dir in which the best model is saved."""

    def save(self, run_dir: Path) -> Path:
        """Save the current model inside run_dir, completely or not at all, and return its directory."""

    def save_to(self, directory: Path) -> None:
        """Save the current model as `directory`, not as a subdirectory of it, for the option keep_every."""

    def restore(self, run_dir: Path) -> None:
        """Load the weights that were saved inside run_dir into the model."""


@dataclass
class WholeModel:
    """Saves the best model of a run in the directory `model/`, with its tokenizer and its prompt template, if any."""

    model: GPTModel
    tokenizer: Tokenizer | None
    template: Template | None = None

    def place(self, run_dir: Path) -> Path:
        return run_dir / "model"

    def save(self, run_dir: Path) -> Path:
        self.save_to(self.place(run_dir))
        return self.place(run_dir)

    def save_to(self, directory: Path) -> None:
        self.model.save_pretrained(directory, self.tokenizer)
        if self.template is not None:
            self.template.save(directory)
            if self.tokenizer is not None:
                save_chat_template(directory, self.template, self.tokenizer)

    def restore(self, run_dir: Path) -> None:
        weights = read_weights(self.place(run_dir), parts=self.model.parts)[1]
        if self.model.parts is not None:
            load_own_weights(self.model, weights)
            return
        # Not load_state_dict: if another program has trained the directory since, it may have biases that the model lacks.
        load_weights_into_gpt(self.model, weights)


@dataclass
class GatheredModel:
    """Saves and restores the best model of several ranks as `store` does for one. All ranks must call the methods."""

    store: BestModelStore
    gather: Callable[[], None]
    """Copies the weights of all ranks into the model of the store, on every rank."""

    def place(self, run_dir: Path) -> Path:
        return self.store.place(run_dir)

    def save(self, run_dir: Path) -> Path:
        self.gather()
        return ranks.on_first_rank(lambda: self.store.save(run_dir))

    def save_to(self, directory: Path) -> None:
        self.gather()
        ranks.on_first_rank(lambda: self.store.save_to(directory))

    def restore(self, run_dir: Path) -> None:
        self.store.restore(run_dir)


@dataclass
class Run:
    """The directory of a training run, its lock and its files. If `directory` is None, nothing is written.

    `with Run(...) as snapshot:` locks the directory. The end of the block waits for the checkpoint writer, closes the
    files and releases the lock, also after an exception. Whatever is written is also reported on the console.

    After its first checkpoint, a run continues when a file cannot be written, for example on a full disk. The failure is
    reported, the next save tries again, and `raise_failed_writes` ends the run with an error if the last try failed.
    """

    directory: Path | None
    config: TrainConfig
    recipe: dict[str, Any]
    """The content of config.yaml, which must not change when the run is resumed."""
    best_model: BestModelStore
    console: Console
    identify: Callable[[], dict[str, dict[str, Any]]]
    """Returns hashes of the data and a description of the machine. It may be slow, so only checkpoints call it."""
    check_fit: Callable[[Snapshot], None]
    """Raises ValueError if the tensors of a snapshot do not fit the model."""
    overwrite: bool
    resume: bool
    allow_changed: Sequence[str]
    group: ProcessGroup | None = field(init=False, default=None)
    """The process group with which several ranks read and write checkpoints."""
    parts: Parts | None = None
    """The custom parts of the model, of whose file the directory gets a copy."""
    has_failed: bool = False
    """True if an error or a signal ended the training, for the trackers."""
    writer: CheckpointWriter | None = None
    """The checkpoint writer; None before the directory is locked, or if checkpoints are turned off."""
    _metrics: MetricsLog | None = None
    _samples: AppendedFile | None = None
    _failures: dict[str, OSError] = field(default_factory=dict)
    """The errors of the last attempts to save "the model", "the kept model" and "the last checkpoint", if they failed."""
    _resources: ExitStack = field(default_factory=ExitStack)
    _is_checkpoint_due: bool = False
    _has_changed: bool = False
    """True if the run was resumed with values that differ from those in its checkpoint."""

    def __post_init__(self) -> None:
        if self.resume and self.directory is None:
            raise ValueError("resume=True needs run_dir, the directory of the run to resume")
        if self.config.trackers() and self.directory is None:
            raise ValueError("log_to needs run_dir, the directory that stores the ids of the trackers' runs")
        require_trackers(self.config.trackers())
        self.recipe = yaml.safe_load(yaml.safe_dump(self.recipe))  # as it will be read back: tuples become lists

    def __enter__(self) -> Snapshot | None:
        """Lock the directory. Return the snapshot from which the run is resumed, or None for a new run.

        A new run removes an existing run, and a resumed run cuts its logs back to the snapshot. Both happen only after
        all checks have passed.

        Raises:
            FileExistsError: the directory is not empty and may not be overwritten.
            ValueError: the directory is locked, or resuming fails: there is no complete checkpoint, or the recipe
                (config.yaml) or the data have changed.
        """
        directory, config = self.directory, self.config
        self.group = ranks.new_group(config.timeout_minutes)
        if not self.resume:
            self._shorten_warmup()
        if directory is None:
            return None
        if not self.resume:
            ranks.on_first_rank(lambda: check_run_directory(directory, self.overwrite))
        with ExitStack() as resources:  # Only rank 0 holds resources. An error on any rank is raised on all ranks.
            ranks.on_first_rank(lambda: self._lock(directory, resources))
            snapshot = self._rewind(directory) if self.resume else None
            ranks.on_first_rank(lambda: self._open_files(directory, resources, snapshot))
            self._resources = resources.pop_all()
        if config.checkpoint_every or config.checkpoint_minutes:
            self.identify()  # now, because the weights may be divided among the ranks later
            self.writer = CheckpointWriter(directory / CHECKPOINTS, config.keep_last, config.keep_best, self.group)
        return snapshot

    def _lock(self, directory: Path, resources: ExitStack) -> None:
        resources.callback(lock_directory(directory).release)
        remove_unfinished(directory)

    def _open_files(self, directory: Path, resources: ExitStack, snapshot: Snapshot | None) -> None:
        """Write config.yaml, and open the logs to append to them after the snapshot. Without one, remove an existing run."""
        if snapshot is None:
            remove_run(directory)
        with atomic_write(directory / "config.yaml") as file:
            yaml.safe_dump(self.recipe, file, sort_keys=False, allow_unicode=True)
        if self.parts is not None and self.parts.source is not None:
            with atomic_write(directory / PARTS_FILE, "wb") as file:
                file.write(self.parts.source)
        after = snapshot.state.step if snapshot else None
        names, console = self.config.trackers(), self.console
        trackers = TrackerThreads(names, directory, self.recipe, after, console.message, console.warn)
        resources.callback(lambda: trackers.close(self.has_failed))
        self._metrics = MetricsLog(directory, console.warn, trackers)
        self._samples = AppendedFile(directory / "samples.txt", console.warn)

    def __exit__(self, *exception: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for the checkpoint writer, close the files, and then release the lock. Later calls do nothing.

        If Ctrl-C interrupts the wait, the writer is still at work, so the lock is kept until the next call.
        """
        if self.writer is not None:
            self.writer.wait()
        with self._resources:
            self._flush_logs()
            self._metrics = self._samples = None
            self._report_failed_checkpoint()

    def log(self, step: int, **values: float) -> None:
        """Append a record with `step` and the named values to metrics.jsonl."""
        if self._metrics is not None:
            self._metrics.write(step, **values)

    def record_step(self, state: RunState, loss: float, grad_norm: float) -> None:
        """Add `loss` and `grad_norm` of the last step to the moving averages in `state`.

        A skipped step or a large gradient norm is reported on the console.
        """
        self.console.stepped()
        if not math.isfinite(loss) or not math.isfinite(grad_norm):
            self.log(state.step, skipped_steps=state.n_skipped)
            self.console.skipped(state.step, loss, grad_norm)
        elif (ratio := state.add_to_means(loss, grad_norm, _SPIKE)) > _SPIKE:
            self.log(state.step, grad_norm_spike=ratio)
            self.console.spiked(state.step, grad_norm, ratio)

    def record_speed(self, state: RunState, values: Mapping[str, float], tokens_per_second: float) -> None:
        """Append `values`, the result of Trainer.step, and the speed to metrics.jsonl if the loss is finite.

        The speed is also shown on the console.
        """
        if math.isfinite(values["loss"]):
            self.log(state.step, **values, tokens_per_second=tokens_per_second)
        self.console.logged(state.smoothed_loss, tokens_per_second)
        self.console.progressed(state.step, state.smoothed_loss, values["learning_rate"], tokens_per_second)

    def record_evaluation(
        self, state: RunState, loss: float, is_saved: bool = True, scores: Mapping[str, float] | None = None
    ) -> None:
        """Store the validation loss of the current step in `state` and metrics.jsonl, and print it on the console.

        `is_saved` is False if the loss is the lowest so far but the model could not be saved. `scores` are other measured
        values, such as an accuracy, which are recorded and printed as well.
        """
        self.console.evaluated(state.step, loss, state.add_evaluation(loss, is_saved))
        if scores:
            self.console.scored(state.step, scores)
        values = {f"val_{name}": value for name, value in (scores or {}).items()}
        self.log(state.step, val_loss=loss, **values, **({} if is_saved else {_NOT_SAVED: 1}))
        if state.has_lost_patience(self.config.early_stop):
            self.console.stopped_early(state.step, state.evals_since_best)

    def record_sample(self, step: int, text: str) -> None:
        """Show `text`, which the model generated after `step` steps, and append it to samples.txt."""
        self.console.sampled(step, text)
        if self._samples is not None:
            self._samples.write(f"--- step {step} ---\n{text}\n\n")

    def save_model(self) -> Path | None:
        """Save the current model as the best model and return its directory, or None if the run has none."""
        return None if self.directory is None else self.best_model.save(self.directory)

    def try_to_save(self, save: Callable[[], object]) -> bool:
        """Call `save`, which saves the current model, and return True. Report an OSError instead, and return False."""
        try:
            save()
        except OSError as error:
            self.console.warn(
                f"the model could not be saved, and the next best model will be saved instead: {error_message(error)}"
            )
            self._failures["the model"] = error
            return False
        self._failures.pop("the model", None)
        return True

    def keep_model_if_due(self, state: RunState) -> None:
        """Save the current model for good in the directory `history` if it is due, and report an OSError.

        The models after every config.keep_every steps are due, including step 0, and the model after the last step. A
        model that is there already, because the run was resumed at its step, is not written again.
        """
        step, every = state.step, self.config.keep_every
        is_last = step >= self.config.max_steps or state.has_lost_patience(self.config.early_stop)
        if self.directory is None or every == 0 or (step % every != 0 and not is_last):
            return
        path = self.directory / HISTORY / step_name(step)
        if ranks.on_first_rank(path.is_dir):
            return
        try:
            self.best_model.save_to(path)
        except OSError as error:
            ranks.on_first_rank(lambda: shutil.rmtree(path, ignore_errors=True))  # A part of it may have been written.
            self.console.warn(f"the model of step {step} could not be kept: {error_message(error)}")
            self._failures["the kept model"] = error
        else:
            self._failures.pop("the kept model", None)

    def raise_failed_writes(self) -> None:
        """Raise OSError if the last attempt to write the model, a kept model, the last checkpoint or a log failed."""
        self._flush_logs()
        logs = [log.failure for log in self._logs() if log.failure is not None]
        if failures := [*self._failures.values(), *logs]:
            way_out = (
                "" if self.writer is None else f"; --resume {quote(self.directory or '')} completes the run after that"
            )
            text = "; ".join(map(error_message, failures))
            raise OSError(f"{text}; make room on the disk or correct its permissions{way_out}{self._last_checkpoint()}")

    def restore_best_model(self, state: RunState) -> None:
        """Load the weights of the run's best model, unless the model after the last step is the best one.

        If no model could be saved, the last model is kept. Raises FloatingPointError if no validation loss was finite.
        """
        if state.best_step is None and self._failures:
            return
        if state.best_step is None:
            raise FloatingPointError(
                f"no validation loss was finite, the last one is {state.val_loss}: check the validation data, or lower "
                f"learning_rate{self._what_is_saved(state)}"
            )
        if self.directory is not None and state.best_step != state.step:
            self.best_model.restore(self.directory)

    def check_divergence(self, state: RunState, loss: float, grad_norm: float, learning_rate: float) -> None:
        """Raise FloatingPointError, with the arguments in its message, if more than max_skipped_steps were skipped."""
        if state.n_skipped > self.config.max_skipped_steps:
            raise FloatingPointError(
                f"at step {state.step} the loss is {loss} and the gradient norm {grad_norm}; {state.n_skipped} steps "
                f"in all were not finite, more than max_skipped_steps={self.config.max_skipped_steps}: lower "
                f"learning_rate (now {learning_rate:.3g}) or raise warmup_steps{self._what_is_saved(state)}"
            )

    def stop_message(self, state: RunState) -> str:
        """Return a message with the step, the saved files and the way to resume. Saves the model if none was saved."""
        way_out = "" if self.writer is None else f"; --resume {quote(self.directory or '')} continues the run"
        return f"stopped at step {state.step}{way_out}{self._what_is_saved(state)}"

    def context(self) -> dict[str, dict[str, Any]]:
        """Return Snapshot.context without the random states: log sizes, recipe, hashes of the data, machine.

        The number of planned steps is added for `mygpt runs`, because a recipe may set the number of epochs instead.
        """
        self._flush_logs()
        lengths = {} if self.directory is None else log_lengths(self.directory)
        plan = {"max_steps": self.config.max_steps}
        return {"lengths": lengths, "recipe": self.recipe, "plan": plan, **self.identify()}

    def write_first_checkpoint(self, take_snapshot: TakeSnapshot) -> None:
        """Write a checkpoint before the first step of a new run, so that a full disk raises an error early.

        A run that is resumed with allowed changes also gets a checkpoint, so that it can be resumed without them.
        """
        if self.writer is not None and (not self.resume or self._has_changed):
            self.writer.write(take_snapshot)

    @property
    def is_checkpoint_late(self) -> bool:
        """True on rank 0 if config.checkpoint_minutes have passed since the last checkpoint."""
        seconds = 60 * self.config.checkpoint_minutes
        return (
            self.writer is not None and ranks.rank() == 0 and 0 < seconds <= time.monotonic() - self.writer.last_taken
        )

    @property
    def is_writer_busy(self) -> bool:
        """True while this rank is writing a checkpoint in the background."""
        return self.writer is not None and self.writer.is_busy

    def checkpoint_if_due(self, step: int, take_snapshot: TakeSnapshot, is_late: bool, is_busy: bool) -> None:
        """Begin to write a checkpoint in the background if one is due after `step` steps and the writer is free.

        All ranks give the same `is_late` and `is_busy`: whether these properties are True on any rank.
        """
        if self.writer is None:
            return
        every = self.config.checkpoint_every
        self._is_checkpoint_due |= is_late or (every > 0 and step % every == 0)
        self._report_failed_checkpoint()
        if self._is_checkpoint_due and not is_busy:
            self.writer.start(take_snapshot)
            self._is_checkpoint_due = False

    def write_last_checkpoint(self, step: int, take_snapshot: TakeSnapshot) -> None:
        """Write the checkpoint of the last `step` if it is missing. Report how long training waited for checkpoints.

        If writing fails, the run continues, so that its model can be saved. `raise_failed_writes` then raises the error.
        """
        if self.writer is None:
            return
        self.writer.wait()
        self._report_failed_checkpoint()
        if self.writer.written_step != step:
            try:
                self.writer.write(take_snapshot)
            except OSError as error:
                self._failures["the last checkpoint"] = error
        n, seconds = self.writer.n_written, self.writer.blocking_seconds
        self.log(step, checkpoints=n, checkpoint_seconds=seconds)
        self.console.checkpointed(n, seconds, seconds / (time.monotonic() - self.writer.created))

    def _what_is_saved(self, state: RunState) -> str:
        """Return a text with the paths of the model and the last checkpoint. Saves the model if none was saved."""
        if self.directory is None:
            return ""
        which = "last model" if state.best_step is None else f"best model (step {state.best_step})"
        is_saved = state.best_step is not None or self.try_to_save(self.save_model)
        text = f"; the {which} is in {self.best_model.place(self.directory)}" if is_saved else ""
        return text + self._last_checkpoint()

    def _last_checkpoint(self) -> str:
        """Return a text with the path of the last complete checkpoint, or an empty text if this process wrote none."""
        if self.writer is None:
            return ""
        self.writer.wait()
        return f"; the last good checkpoint is {self.writer.written}" if self.writer.written else ""

    def _logs(self) -> list[AppendedFile]:
        metrics = None if self._metrics is None else self._metrics.file
        return [log for log in (metrics, self._samples) if log is not None]

    def _flush_logs(self) -> None:
        for log in self._logs():
            log.flush()

    def _shorten_warmup(self) -> None:
        """Shorten and report the warmup of a new run that would not end before the run does."""
        warmup, before = fitting_warmup(self.config), self.config.warmup_steps
        if warmup == before:
            return
        self._set_warmup(warmup)
        steps = f"{self.config.max_steps} step{'s' if self.config.max_steps > 1 else ''}"
        self.console.warn(f"warmup_steps is shortened from {before} to {warmup}, because the run has only {steps}")

    def _keep_shortened_warmup(self, recipe: Mapping[str, Any]) -> None:
        """Use the warmup in `recipe`, the recipe of the resumed run, if the run has shortened its warmup.

        A run that is extended keeps its warmup, which is over. A run of an earlier version keeps a warmup that was not
        shortened. In both cases the steps so far are those of the stored recipe.
        """
        warmup, allowed = recipe.get("warmup_steps"), set(self.allow_changed)
        is_extended = not allowed.isdisjoint(("max_steps", "epochs")) and "warmup_steps" not in allowed
        if type(warmup) is not int or not 0 <= warmup < self.config.warmup_steps:
            return
        if is_extended:
            given = self.config.warmup_steps
            self.console.warn(
                f"warmup_steps stays {warmup}, because the warmup of this run is over; {given} is ignored"
            )
        if is_extended or warmup == fitting_warmup(self.config):
            self._set_warmup(warmup)

    def _set_warmup(self, steps: int) -> None:
        """Set the warmup in the config and in the recipe."""
        self.config = replace(self.config, warmup_steps=steps)
        self.recipe["warmup_steps"] = steps

    def _report_failed_checkpoint(self) -> None:
        if self.writer is not None and self.writer.failure is not None:
            self.console.warn(f"a checkpoint could not be written: {error_message(self.writer.failure)}")
            self.writer.failure = None

    def _rewind(self, directory: Path) -> Snapshot:
        """Return the newest complete checkpoint, and cut metrics.jsonl, samples.txt and the history back to its step.

        If a finished run is extended, the evaluations at its earlier end stay in metrics.jsonl.
        """
        context = self.context()

        def check(snapshot: Snapshot) -> None:
            self._keep_shortened_warmup(snapshot.context["recipe"])
            check_unchanged(snapshot, context, self.allow_changed)
            step, max_steps = snapshot.state.step, self.config.max_steps
            if step > max_steps:
                raise IncompatibleCheckpointError(
                    f"the run is at step {step} already, so it cannot end at step {max_steps}"
                )
            try:
                self.check_fit(snapshot)
            except ValueError as error:
                if snapshot.context["data"].get("architecture") == context["data"].get("architecture"):
                    raise
                reason = "options of the model, or a tokenizer that was learned from other data, have changed its size"
                raise IncompatibleCheckpointError(
                    f"the weights of step {step} do not fit this model ({error}): {reason}"
                ) from None

        snapshot, warnings = read_newest(directory / CHECKPOINTS, check, self.group)
        changed = ranks.on_first_rank(lambda: self._rewind_logs(directory, snapshot, warnings))
        if self.allow_changed:
            self._has_changed = any(snapshot.context[name] != context[name] for name in ("recipe", "data"))
        return replace(snapshot, state=changed)

    def _rewind_logs(self, directory: Path, snapshot: Snapshot, warnings: Sequence[str]) -> RunState:
        """Cut the logs and the history back to the snapshot, report its warnings, and return its state.

        The state is changed where the files require it.
        """
        context = self.context()
        for warning in (*warnings, *check_unchanged(snapshot, context, self.allow_changed)):
            self.console.warn(warning)
        lengths = log_lengths(directory) | snapshot.context["lengths"]
        kept = self._past_evaluations(directory, lengths["metrics.jsonl"], snapshot.state)
        if self.allow_changed:
            saved = [it for it in read_evaluations(directory) if "val_loss" in it and _NOT_SAVED not in it]
            if finite := [(it["val_loss"], it["step"]) for it in saved if math.isfinite(it["val_loss"])]:
                # A changed run does not repeat the losses: the best model on the disk stays until it is beaten.
                snapshot.state.best_loss, snapshot.state.best_step = min(finite)
        best = self.best_model.place(directory)
        if snapshot.state.best_step is not None and not best.is_dir():
            self.console.warn(f"{best} is missing, so the model with the next validation loss is saved there")
            # Without evaluated_step, a run that takes no further step is evaluated again, and its last model is saved.
            snapshot.state.best_loss, snapshot.state.best_step, snapshot.state.evaluated_step = math.inf, None, None
        for name, length in lengths.items():
            cut_log(directory / name, length, kept if name == "metrics.jsonl" else b"")
        for step, path in by_step(directory / HISTORY).items():
            if step > snapshot.state.step and path.is_dir():
                shutil.rmtree(path)
        return snapshot.state

    def _past_evaluations(self, directory: Path, length: int, state: RunState) -> bytes:
        """Return the lines after `length` bytes of metrics.jsonl that an extended run must keep, and update `state`.

        A finished run evaluates its last model after its last checkpoint. A resumed run repeats these evaluations only
        if it trains no further.
        """
        if state.step >= self.config.max_steps:
            return b""
        records = read_evaluations(directory, length, state.step)
        for record in records:
            if record["step"] == state.step != state.evaluated_step and "val_loss" in record:
                state.add_evaluation(record["val_loss"], is_saved=_NOT_SAVED not in record)
        if state.has_lost_patience(self.config.early_stop):
            records = [record for record in records if "val_loss" in record]
        return "".join(json_text(record) + "\n" for record in records).encode()
