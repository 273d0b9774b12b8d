"""Trackers are read back with their own readers, after a run that crashed at step 5 and was resumed from step 4."""

from __future__ import annotations

import importlib.util
import json
import os
import threading
import time
from pathlib import Path
from typing import Any

import pytest

from MyGPT.cli import main
from MyGPT.training import trackers
from MyGPT.training.console import Console
from MyGPT.training.metrics import read_metrics
from MyGPT.training.trackers import TrackedRun
from tiny_runs import TEXT, change, make_trainer, train_command


class CrashingConsole(Console):
    """A console that crashes after step 5 was logged and keeps all messages."""

    def __init__(self, crashes: bool) -> None:
        super().__init__(progress=False)
        self.crashes, self.n_logged = crashes, 0
        self.texts: list[str] = []

    def logged(self, loss: float | None, tokens_per_second: float) -> None:
        self.n_logged += 1
        if self.crashes and self.n_logged == 5:
            raise RuntimeError("a crash after step 5")

    def message(self, text: str, file: Any = None) -> None:
        self.texts.append(text)


def run_and_resume(directory: Path, name: str) -> dict[int, float]:
    """Train with a crash after step 5, resume from the checkpoint of step 4, and return the training loss of each step."""
    config = change(log_to=[name])
    crashing, resumed = CrashingConsole(True), CrashingConsole(False)
    with pytest.raises(RuntimeError, match="a crash"):
        make_trainer(directory, config, console=crashing).run()
    make_trainer(directory, config, console=resumed, resume=True).run()
    for console in (crashing, resumed):
        assert not [text for text in console.texts if "failed" in text]
        assert [text for text in console.texts if text.startswith(f"{name}: ")]
    losses = {record["step"]: record["loss"] for record in read_metrics(directory) if "loss" in record}
    assert list(losses) == list(range(1, 9))
    return losses


def requires(name: str) -> pytest.MarkDecorator:
    return pytest.mark.skipif(importlib.util.find_spec(name) is None, reason=f"{name} is not installed")


@pytest.mark.slow
def test_tensorboard_has_each_step_once_and_the_recipe(tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    losses = run_and_resume(tmp_path / "run", "tensorboard")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    found = [(event.step, event.value) for event in events.Scalars("loss")]
    assert [step for step, _ in found] == list(losses)
    assert [value for _, value in found] == pytest.approx(list(losses.values()), rel=1e-6)  # stored as float32
    assert "learning_rate: 0.001" in events.Tensors("recipe/text_summary")[0].tensor_proto.string_val[0].decode()


def wandb_records(path: Path) -> list[Any]:
    """Return the complete records in a .wandb file: protocol buffers in LevelDB's log format, after a header of 7 bytes."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, position, part, records = path.read_bytes(), 7, b"", []
    while position < len(data):
        left = 32768 - position % 32768
        if left < 7:  # too little for the header of another part
            position += left
            continue
        length, kind = int.from_bytes(data[position + 4 : position + 6], "little"), data[position + 6 : position + 7]
        if len(data) < position + 7 + length or not kind:
            break  # W&B's process is still writing
        part += data[position + 7 : position + 7 + length]
        position += 7 + length
        if kind in (b"\1", b"\4"):  # a whole record, or its last part
            records.append(Record.FromString(part))
            part = b""
    return records


def records_of_finished_runs(directory: Path, n: int) -> list[list[Any]]:
    """Return the records of `n` runs in order, as soon as each file has the record of the run's end.

    W&B's finish() returns before its other process has written the file.
    """
    end = time.monotonic() + 120
    while True:
        found = [wandb_records(path) for path in sorted(directory.glob("offline-run-*/*.wandb"))]
        n_ended = sum(any(record.HasField("exit") for record in records) for records in found)
        if n_ended == n or time.monotonic() > end:
            return found
        time.sleep(0.05)


@pytest.mark.slow
@requires("wandb")
def test_wandb_without_a_login_logs_to_files_and_resumes_the_same_run(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.setenv("WANDB_MODE", "online")  # which would ask for a login
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    losses = run_and_resume(tmp_path / "run", "wandb")
    tracker_id = json.loads((tmp_path / "run" / "trackers.json").read_text())["wandb"]
    found: dict[int, float] = {}
    for records, status in zip(records_of_finished_runs(tmp_path / "run" / "wandb", 2), (1, 0), strict=True):
        runs = [record.run for record in records if record.HasField("run")]
        assert {(run.run_id, run.project) for run in runs} == {(tracker_id, "mygpt")}
        config = {item.key: json.loads(item.value_json) for run in runs for item in run.config.update}
        assert (config["learning_rate"], config["log_to"]) == (0.001, ["wandb"])
        for record in records:
            keys = ("/".join(item.nested_key) or item.key for item in record.history.item)
            row = dict(zip(keys, (json.loads(item.value_json) for item in record.history.item), strict=True))
            if "loss" in row:
                assert found.setdefault(row["step"], row["loss"]) == row["loss"]
        assert [record.exit.exit_code for record in records if record.HasField("exit")] == [status]
    assert found == losses


@pytest.mark.slow
@requires("mlflow")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its dependencies
def test_mlflow_gets_the_same_numbers_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # MLflow's default, a SQLite database, takes half a minute to set up. Its older store of files takes no time.
    monkeypatch.setenv("MLFLOW_ALLOW_FILE_STORE", "true")
    monkeypatch.setenv("MLFLOW_TRACKING_URI", (tmp_path / "mlruns").as_uri())
    losses = run_and_resume(tmp_path / "run", "mlflow")
    from mlflow import MlflowClient

    client = MlflowClient()
    (run,) = client.search_runs([client.get_experiment_by_name("mygpt").experiment_id])
    assert (run.info.run_name, run.info.status) == ("run", "FINISHED")
    assert (run.data.params["learning_rate"], run.data.params["max_steps"]) == ("0.001", "8")
    assert {it.step: it.value for it in client.get_metric_history(run.info.run_id, "loss")} == losses
    assert "final_val_loss" in run.data.metrics


@pytest.mark.slow
@requires("trackio")
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of its dependencies
def test_trackio_gets_the_same_numbers_in_one_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TRACKIO_DIR", str(tmp_path / "trackio"))
    losses = run_and_resume(tmp_path / "run", "trackio")
    from trackio.sqlite_storage import SQLiteStorage

    (name,) = SQLiteStorage.get_runs("mygpt")
    assert name.startswith("run-")
    assert {row["step"]: row["loss"] for row in SQLiteStorage.get_logs("mygpt", name) if "loss" in row} == losses
    config = SQLiteStorage.get_run_config("mygpt", name)
    assert config is not None
    assert config["learning_rate"] == 0.001


class Recorder:
    """A tracker that keeps what it gets. `fails` names the method that raises an exception."""

    id, place = "7", "in memory"

    def __init__(self, run: TrackedRun, fails: str = "") -> None:
        self.run, self.fails = run, fails
        self.rows: list[dict[str, float]] = []
        self.failed: bool | None = None
        self._attempt("start")

    def _attempt(self, method: str) -> None:
        if method == self.fails:
            raise ConnectionError("no route\nto the host")

    def log(self, step: int, values: Any) -> None:
        self._attempt("log")
        self.rows.append({"step": step, **values})

    def close(self, has_failed: bool) -> None:
        self._attempt("close")
        self.failed = has_failed


@pytest.fixture
def recorders(monkeypatch: pytest.MonkeyPatch) -> list[Recorder]:
    """The trackers that were opened as "mlflow" and "wandb", which need not be installed."""
    opened: list[Recorder] = []

    def open_recorder(run: TrackedRun) -> Recorder:
        opened.append(Recorder(run))
        return opened[-1]

    for name in ("mlflow", "wandb"):
        monkeypatch.setitem(trackers.TRACKERS, name, open_recorder)
    monkeypatch.setattr(trackers, "find_spec", lambda name: importlib.util.find_spec("json"))
    return opened


def test_a_tracker_gets_every_record_of_metrics_jsonl_and_its_id_again(
    tmp_path: Path, recorders: list[Recorder]
) -> None:
    config = change(log_to="mlflow")
    make_trainer(tmp_path / "run", config).run()
    assert recorders[0].rows == read_metrics(tmp_path / "run")
    assert (recorders[0].run.tracker_id, recorders[0].failed) == (None, False)
    assert recorders[0].run.recipe["max_steps"] == 8
    make_trainer(tmp_path / "run", change(config, max_steps=9), resume=True, allow_changed="max_steps").run()
    assert (recorders[1].run.tracker_id, recorders[1].run.after) == ("7", 8)
    make_trainer(tmp_path / "run", config, overwrite=True).run()
    assert recorders[2].run.tracker_id is None


def test_a_tracker_learns_that_training_failed(tmp_path: Path, recorders: list[Recorder]) -> None:
    with pytest.raises(RuntimeError, match="a crash"):
        make_trainer(tmp_path / "run", change(log_to="mlflow"), console=CrashingConsole(True)).run()
    assert recorders[0].failed is True


@pytest.mark.parametrize("method", ["start", "log", "close"])
def test_a_failing_tracker_is_dropped_with_one_warning_and_the_run_is_the_same(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(trackers.TRACKERS, "mlflow", lambda run: Recorder(run, method))
    console = CrashingConsole(False)
    loss = make_trainer(tmp_path / "run", change(log_to="mlflow"), console=console).run()
    warnings = [text for text in console.texts if "mlflow failed" in text]
    assert len(warnings) == 1
    assert warnings[0].endswith("metrics.jsonl has all: no route to the host")
    assert loss == make_trainer(tmp_path / "other").run()


def test_a_tracker_that_hangs_does_not_keep_the_run(
    tmp_path: Path, recorders: list[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    go_on = threading.Event()

    def hang(run: TrackedRun) -> Recorder:
        go_on.wait(60)
        return Recorder(run)

    monkeypatch.setitem(trackers.TRACKERS, "mlflow", hang)
    monkeypatch.setattr(trackers, "CLOSE_SECONDS", 0.1)
    console, began = CrashingConsole(False), time.monotonic()
    make_trainer(tmp_path / "run", change(log_to="mlflow"), console=console).run()
    assert time.monotonic() - began < 30
    assert "it did not end within 0 s" in console.texts[-1]
    go_on.set()


@pytest.mark.parametrize("content", ["{", '{"mlflow": "../x"}', '{"mlflow": 5}'])
def test_damaged_ids_begin_new_runs_in_the_trackers(tmp_path: Path, recorders: list[Recorder], content: str) -> None:
    config = change(log_to="mlflow", max_steps=2)
    make_trainer(tmp_path / "run", config).run()
    (tmp_path / "run" / "trackers.json").write_text(content)
    console = CrashingConsole(False)
    make_trainer(tmp_path / "run", config, resume=True, console=console).run()
    assert recorders[1].run.tracker_id is None
    assert [text for text in console.texts if "the trackers begin new runs" in text]


def test_names_are_checked_before_anything_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ValueError, match=r"log_to must name some of tensorboard, .* got 'wanb'; did you mean wandb"):
        change(log_to="tensorboard,wanb")
    with pytest.raises(ValueError, match="log_to must be a list of texts"):
        change(log_to=[3])
    assert change(log_to="wandb, mlflow,wandb", tensorboard=True).trackers() == ("wandb", "mlflow", "tensorboard")
    with pytest.raises(ValueError, match="log_to needs run_dir"):
        make_trainer(None, change(log_to="tensorboard"))
    monkeypatch.setattr(trackers, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match=r"trackio is not installed: install it with pip install 'mygpt\[trackio\]'"):
        make_trainer(tmp_path / "run", change(log_to="trackio"))
    assert not (tmp_path / "run").exists()


def test_the_commands_take_a_list_and_a_resumed_run_may_change_it(
    tmp_path: Path, recorders: list[Recorder], capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    command = train_command(tmp_path / "text.txt", tmp_path / "run")
    assert main([*command, "--max_steps", "4", "--log_to", '["mlflow"]']) == 0
    assert recorders[0].rows == read_metrics(tmp_path / "run")
    assert "mlflow: in memory" in capsys.readouterr().out
    resume = ["train", "--resume", str(tmp_path / "run"), "--max_steps", "6", "--allow_changed", "max_steps"]
    assert main([*resume, "--log_to", "mlflow,wandb"]) == 0
    assert len(recorders) == 3
    assert (recorders[1].run.after, recorders[1].run.recipe["data"]) == (4, str(tmp_path / "text.txt"))
    assert main([*command, "--log_to", "mlflo", "--overwrite"]) == 2
    assert "did you mean mlflow?" in capsys.readouterr().err
