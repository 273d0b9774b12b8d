"""Experiment trackers, which receive the records of `metrics.jsonl`: TensorBoard, Weights & Biases, MLflow and Trackio.

Each tracker works in a thread of its own, so a slow server does not slow down training. If a tracker fails, it is dropped
with a warning, and the run continues. The ids of the trackers' runs are stored in `trackers.json` in the run's directory,
so that a resumed run continues them. The trackers' packages are optional and imported by these threads.
"""

from __future__ import annotations

import json
import os
import re
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from importlib import import_module
from importlib.util import find_spec
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Protocol

import yaml

from MyGPT.files import atomic_write, read_json
from MyGPT.messages import error_message, quote

CLOSE_SECONDS = 120.0
"""The time that a tracker gets at the end of a run to store the records that it has not stored yet."""
_IDS = "trackers.json"
_PROJECT = "mygpt"
"""The project (Weights & Biases, Trackio) or experiment (MLflow) of a run, unless the environment names another."""


@dataclass(frozen=True)
class TrackedRun:
    """The facts about a training run that a tracker stores or needs."""

    directory: Path
    recipe: Mapping[str, Any]
    """The options of the run, which are the content of its config.yaml."""
    after: int | None
    """The step after which the run is resumed; None for a new run."""
    tracker_id: str | None
    """The id that the tracker gave this run before it was resumed; None if the tracker does not know the run yet."""


class Tracker(Protocol):
    """An open run of a tracker. Any of its methods may raise any exception."""

    id: str
    """The name under which the tracker finds the run again."""
    place: str
    """A text that says where the measurements can be seen."""

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Store values measured after `step` steps."""

    def close(self, has_failed: bool) -> None:
        """Store everything and end the tracker's run. `has_failed` is True if an error or a signal ended the training."""


class _TensorBoard:
    """Writes event files. TensorBoard ignores the events after the step of the checkpoint from which a run is resumed."""

    def __init__(self, run: TrackedRun) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self.id, self.place = "tensorboard", str(run.directory / "tensorboard")
        self._writer = SummaryWriter(self.place, purge_step=None if run.after is None else run.after + 1)
        text = yaml.safe_dump(dict(run.recipe), sort_keys=False, allow_unicode=True)
        self._writer.add_text("recipe", f"```\n{text}```", run.after or 0)

    def log(self, step: int, values: Mapping[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def close(self, has_failed: bool) -> None:
        self._writer.close()


class _Wandb:
    """Logs to Weights & Biases, or to files for `wandb sync` if there is no login. It never asks for a login."""

    def __init__(self, run: TrackedRun) -> None:
        wandb: Any = import_module("wandb")
        # Without a login, wandb.init would ask for one in a terminal.
        is_asking = os.environ.get("WANDB_MODE") != "disabled" and not wandb.login(prompt=False, verify=False)
        self.id = run.tracker_id or uuid.uuid4().hex[:12]
        self._run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", _PROJECT),
            dir=os.environ.get("WANDB_DIR", str(run.directory)),
            id=self.id,
            name=os.environ.get("WANDB_NAME", run.directory.resolve().name),
            resume="allow",
            config=dict(run.recipe),
            mode="offline" if is_asking else None,
            reinit="create_new",  # A run that the same process has opened elsewhere stays open.
            settings=wandb.Settings(console="off", silent=True, init_timeout=60, finish_timeout=CLOSE_SECONDS / 2),
        )
        # W&B drops a record whose step is below its last one, as after resuming, so the step is a value like the others.
        self._run.define_metric("*", step_metric="step")
        self.place = (
            self._run.url or f"{self._run.settings.mode}; wandb sync {quote(Path(self._run.dir).parent)} uploads it"
        )

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log({**values, "step": step})

    def close(self, has_failed: bool) -> None:
        self._run.finish(exit_code=int(has_failed))


class _MLflow:
    """Logs to the MLflow server or database in MLFLOW_TRACKING_URI, by default to mlflow.db in the current directory."""

    def __init__(self, run: TrackedRun) -> None:
        mlflow: Any = import_module("mlflow")
        self._client, self._metric = mlflow.MlflowClient(), mlflow.entities.Metric
        if run.tracker_id is not None:
            self._client.update_run(run.tracker_id, status="RUNNING")
            self.id = run.tracker_id
        else:
            self.id = self._client.create_run(self._experiment(), run_name=run.directory.resolve().name).info.run_id
            params = [mlflow.entities.Param(_mlflow_name(key), str(value)[:6000]) for key, value in flat(run.recipe)]
            for start in range(0, len(params), 100):  # A request may have no more.
                self._client.log_batch(self.id, params=params[start : start + 100])
        self.place = f"run {self.id} in {mlflow.get_tracking_uri()}"

    def _experiment(self) -> str:
        if experiment_id := os.environ.get("MLFLOW_EXPERIMENT_ID"):
            return experiment_id
        name = os.environ.get("MLFLOW_EXPERIMENT_NAME", _PROJECT)
        experiment = self._client.get_experiment_by_name(name)
        return self._client.create_experiment(name) if experiment is None else experiment.experiment_id

    def log(self, step: int, values: Mapping[str, float]) -> None:
        now = int(time.time() * 1000)
        metrics = [self._metric(_mlflow_name(name), float(value), now, step) for name, value in values.items()]
        self._client.log_batch(self.id, metrics=metrics)

    def close(self, has_failed: bool) -> None:
        self._client.set_terminated(self.id, "FAILED" if has_failed else "FINISHED")


class _Trackio:
    """Logs to Trackio's local database, or to the server or Space that its environment variables name."""

    def __init__(self, run: TrackedRun) -> None:
        trackio: Any = import_module("trackio")
        project = os.environ.get("TRACKIO_PROJECT", _PROJECT)
        # Trackio finds a run by its name, and directories in different places may have the same name.
        self.id = run.tracker_id or f"{run.directory.resolve().name}-{uuid.uuid4().hex[:6]}"
        self._run = trackio.init(
            project, name=self.id, resume="allow", config=dict(run.recipe), embed=False, auto_log_gpu=False,
            auto_log_cpu=False,
        )  # fmt: skip
        self.place = f"run {self.id}; show it with: trackio show --project {project}"

    def log(self, step: int, values: Mapping[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def close(self, has_failed: bool) -> None:
        self._run.finish()


TRACKERS: dict[str, Callable[[TrackedRun], Tracker]] = {
    "tensorboard": _TensorBoard,
    "wandb": _Wandb,
    "mlflow": _MLflow,
    "trackio": _Trackio,
}
"""The functions that open a run in each tracker. The name of a tracker is also that of its package and MyGPT's extra."""


def require_trackers(names: Sequence[str]) -> None:
    """Raise ValueError if the package of one of the trackers `names` is not installed."""
    for name in names:
        spec = find_spec(name)
        if spec is None or spec.origin is None:  # A directory of this name in the current directory has no origin.
            raise ValueError(
                f"{name} is not installed: install it with pip install 'mygpt[{name}]', or leave it out of log_to"
            )


class TrackerThread:
    """A thread in which one tracker stores records. An error ends it with a warning instead of an exception.

    Args:
        name: a key of TRACKERS.
        run: the run whose records are stored.
        message: is called with a text that says where the tracker stores the records.
        warn: is called with a warning if the tracker fails.
        opened: is called with the tracker's id of the run.
    """

    def __init__(
        self,
        name: str,
        run: TrackedRun,
        message: Callable[[str], None],
        warn: Callable[[str], None],
        opened: Callable[[str], None],
    ) -> None:
        self._name, self._run, self._message, self._warn, self._opened = name, run, message, warn, opened
        self._items: SimpleQueue[tuple[int, Mapping[str, float]] | bool] = SimpleQueue()
        self._is_dropped = False
        self._thread = threading.Thread(target=self._work, name=f"tracker {name}", daemon=True)
        self._thread.start()

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over a record and return at once."""
        if not self._is_dropped:
            self._items.put((step, values))

    def request_close(self, has_failed: bool) -> None:
        """Let the thread end after the records that it has received. `has_failed` goes to Tracker.close."""
        self._items.put(has_failed)

    def join(self, end: float) -> None:
        """Wait for the end of the thread, at most until time.monotonic() is `end`. After that, drop the tracker."""
        self._thread.join(max(0.0, end - time.monotonic()))
        if self._thread.is_alive():
            self._drop(f"it did not end within {CLOSE_SECONDS:.0f} s")

    def _work(self) -> None:
        try:
            tracker = TRACKERS[self._name](self._run)
            self._opened(tracker.id)
            self._message(f"{self._name}: {tracker.place}")
            while not isinstance(item := self._items.get(), bool):
                tracker.log(*item)
            tracker.close(has_failed=item)
        except (Exception, SystemExit) as error:  # Other people's packages and servers fail in any way.
            self._drop(error_message(error) or type(error).__name__)

    def _drop(self, reason: str) -> None:
        if not self._is_dropped:
            self._is_dropped = True
            self._warn(
                f"{self._name} failed and gets no more measurements of this run, but metrics.jsonl has all: {reason}"
            )


class TrackerThreads:
    """The trackers `names` of the run in `directory`, each in a thread of its own. See TrackerThread."""

    def __init__(
        self,
        names: Sequence[str],
        directory: Path,
        recipe: Mapping[str, Any],
        after: int | None,
        message: Callable[[str], None],
        warn: Callable[[str], None],
    ) -> None:
        self._path, self._lock = directory / _IDS, threading.Lock()
        self._ids = {} if after is None or not names else self._stored_ids(warn)
        self._threads = []
        for name in names:
            run = TrackedRun(directory, recipe, after, self._ids.get(name))
            self._threads.append(TrackerThread(name, run, message, warn, partial(self._store, name)))

    def log(self, step: int, values: Mapping[str, float]) -> None:
        """Hand over a record to all trackers."""
        for thread in self._threads:
            thread.log(step, values)

    def close(self, has_failed: bool) -> None:
        """Wait until all trackers have stored their records, at most CLOSE_SECONDS."""
        for thread in self._threads:
            thread.request_close(has_failed)
        end = time.monotonic() + CLOSE_SECONDS
        for thread in self._threads:
            thread.join(end)

    def _stored_ids(self, warn: Callable[[str], None]) -> dict[str, str]:
        try:
            ids = read_json(self._path)
            if not isinstance(ids, dict) or not all(
                isinstance(it, str) and re.fullmatch(r"\w[\w. -]{0,199}", it) for it in ids.values()
            ):
                raise ValueError(f"{self._path} does not contain ids of trackers")
            return ids
        except FileNotFoundError:
            return {}
        except (ValueError, OSError) as error:
            warn(f"the trackers begin new runs, because the ids of their runs cannot be read: {error_message(error)}")
            return {}

    def _store(self, name: str, tracker_id: str) -> None:
        with self._lock:
            self._ids[name] = tracker_id
            with atomic_write(self._path) as file:
                json.dump(self._ids, file)


def flat(recipe: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield the names and values of a recipe. A nested value has a name such as lora.r."""
    for key, value in recipe.items():
        if isinstance(value, Mapping):
            yield from flat(value, f"{prefix}{key}.")
        else:
            yield f"{prefix}{key}", value


def _mlflow_name(name: str) -> str:
    """Return `name` with underscores for the characters that MLflow does not allow in names."""
    return re.sub(r"[^\w\-. /:]", "_", name)[:250]
