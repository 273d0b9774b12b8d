"""The files of a run are closed on every path, its checkpoints are valid JSON, and old checkpoints can be read."""

from __future__ import annotations

import json
import math
import shutil
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from filelock import FileLock

from MyGPT import GPTModel, Trainer
from MyGPT.training import checkpoint
from MyGPT.training.checkpoint import read_newest
from MyGPT.training.console import Console, SilentConsole
from MyGPT.training.directory import lock_directory
from MyGPT.training.metrics import read_metrics
from MyGPT.training.snapshot import check_unchanged, random_states, take_snapshot
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from places import FIXTURES
from tiny_runs import CONFIG, IDS, TOKENIZER, change, make_model, make_trainer


def strict_json(path: Path) -> Any:
    """Read JSON without Python's extensions NaN and Infinity."""

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    return json.loads(path.read_text(), parse_constant=refuse)


# Closing


@pytest.fixture
def events(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Return a list of the events "written" (a checkpoint, on a slow disk) and "released" (a lock)."""
    events: list[str] = []
    write, release = checkpoint.write_snapshot, FileLock.release

    def slowly(*arguments: Any) -> Path:
        time.sleep(0.3)
        path = write(*arguments)
        events.append("written")
        return path

    def released(lock: FileLock, force: bool = False) -> None:
        if lock.is_locked:
            events.append("released")
        release(lock, force)

    monkeypatch.setattr(checkpoint, "write_snapshot", slowly)
    monkeypatch.setattr(FileLock, "release", released)
    return events


@pytest.mark.slow
def test_after_an_error_the_lock_is_released_when_the_writer_has_finished(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, events: list[str]
) -> None:
    """A step fails while a slow disk still writes a checkpoint. Another process must not get the directory before."""
    trainer = make_trainer(tmp_path / "run")
    batch = trainer.sampler.batch

    def failing(step: int) -> Any:
        if step == 2:
            raise OSError("the data are gone")
        return batch(step)

    monkeypatch.setattr(trainer.sampler, "batch", failing)
    with pytest.raises(OSError, match="the data are gone"):
        trainer.run()
    assert events == ["written", "written", "released"]
    assert not any(thread.name == "checkpoint" for thread in threading.enumerate())


def test_a_run_is_a_context_manager_that_releases_the_lock_after_an_error(tmp_path: Path, events: list[str]) -> None:
    run = make_trainer(tmp_path / "run").files
    with pytest.raises(ZeroDivisionError), run as snapshot:
        assert snapshot is None and run.writer is not None
        with pytest.raises(ValueError, match="already holds the lock"):
            lock_directory(tmp_path / "run")
        run.writer.start(lambda: take_snapshot(make_model(), [], RunState(step=2), run.context()))
        raise ZeroDivisionError
    assert events == ["written", "released"]
    lock_directory(tmp_path / "run").release()


def test_a_run_that_cannot_be_opened_releases_the_lock(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="there is no complete checkpoint"), make_trainer(tmp_path, resume=True).files:
        raise AssertionError("the block must not run")
    lock_directory(tmp_path).release()


def test_a_checkpoint_that_fails_during_an_error_is_reported(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    with make_trainer(tmp_path / "run") as trainer:
        monkeypatch.setattr(checkpoint, "write_snapshot", lambda *_: 1 / 0)
        trainer.files.checkpoint_if_due(2, trainer.snapshot, is_late=False, is_busy=False)
    assert "a checkpoint could not be written: division by zero" in capsys.readouterr().err


def test_a_manual_loop_releases_the_lock_and_the_deterministic_mode(tmp_path: Path) -> None:
    for mode in (0, 1):
        torch.set_deterministic_debug_mode(mode)
        try:
            with make_trainer(tmp_path / f"run{mode}", change(deterministic=True)) as trainer:
                assert torch.get_deterministic_debug_mode() == 2
                trainer.step()
            assert torch.get_deterministic_debug_mode() == mode
        finally:
            torch.set_deterministic_debug_mode(0)
    with make_trainer(tmp_path / "run0", overwrite=True) as second:
        second.step()


def test_close_can_be_repeated_and_ends_what_setup_began(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.close()
    trainer.setup()
    optimizers = trainer.optimizers
    trainer.setup()
    assert trainer.optimizers is optimizers
    trainer.step()
    trainer.close()
    trainer.close()
    with pytest.raises(RuntimeError, match=r"call setup\(\)"):
        trainer.step()
    assert trainer.evaluate() > 0
    assert trainer.save() == tmp_path / "run/model"


def test_close_in_another_thread_releases_the_lock(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run")
    trainer.setup()
    thread = threading.Thread(target=trainer.close)
    thread.start()
    thread.join()
    make_trainer(tmp_path / "run", overwrite=True).run()


def test_a_second_trainer_of_the_same_process_is_told_so(tmp_path: Path) -> None:
    with make_trainer(tmp_path / "run") as first:
        second = make_trainer(tmp_path / "run", overwrite=True)
        with pytest.raises(ValueError, match=f"this process already holds the lock of {tmp_path / 'run'}: close the"):
            second.setup()
        first.step()
    second.run()


def test_a_setup_that_fails_leaves_nothing_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run", change(deterministic=True))
    monkeypatch.setattr(trainer.model, "to", lambda *_: 1 / 0)
    with pytest.raises(ZeroDivisionError), trainer:
        raise AssertionError("the block must not run")
    assert torch.get_deterministic_debug_mode() == 0
    make_trainer(tmp_path / "run", overwrite=True).run()


def test_run_continues_a_loop_that_was_begun_by_hand() -> None:
    whole, begun = make_trainer(), make_trainer()
    whole.run()
    begun.setup()
    begun.step()
    begun.run()
    assert begun.step_number == 8
    for name, tensor in whole.model.state_dict().items():
        assert torch.equal(tensor, begun.model.state_dict()[name])


def test_resuming_needs_a_directory() -> None:
    with pytest.raises(ValueError, match="resume=True needs run_dir"):
        make_trainer(resume=True)


# Losses that are not finite


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_a_run_whose_validation_loss_is_never_finite_says_so_and_keeps_its_last_model(
    loss: float, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def spoil(trainer: Trainer) -> Trainer:
        monkeypatch.setattr(trainer, "evaluate", lambda whole=False: loss)
        return trainer

    trainer = spoil(make_trainer(tmp_path / "run"))
    with pytest.raises(FloatingPointError, match=f"no validation loss was finite, the last one is {loss}") as caught:
        trainer.run()
    assert str(tmp_path / "run/model") in str(caught.value)
    saved = GPTModel.from_pretrained(tmp_path / "run").state_dict()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in trainer.model.state_dict().items())
    for path in (tmp_path / "run/checkpoints").glob("step-*"):
        assert strict_json(path / "state.json")["step"] == int(path.name[5:])
    resumed = spoil(make_trainer(tmp_path / "run", resume=True))
    with pytest.raises(FloatingPointError, match="no validation loss was finite"):
        resumed.run()
    assert resumed.best_loss == math.inf and resumed.state.evals_since_best == trainer.state.evals_since_best


def test_validation_data_without_a_target_have_no_finite_loss(tmp_path: Path) -> None:
    class Ignored:
        def batches(self, whole: bool) -> Any:
            yield torch.zeros(1, 8, dtype=torch.int64), torch.full((1, 8), -100)

    with pytest.raises(FloatingPointError, match="the last one is nan: check the validation data"):
        make_trainer(tmp_path / "run", val=Ignored()).run()


# The counters


def test_counters_survive_json() -> None:
    state = RunState(7, 100, math.inf, None, 7, math.nan, 3, 2, 0.1 + 0.2, -math.inf)
    again = RunState.from_json(json.loads(json.dumps(state.to_json(), allow_nan=False)))
    assert math.isnan(again.val_loss or 0.0)
    state.val_loss = again.val_loss = None
    assert again == state


def test_the_validation_loss_of_an_earlier_step_is_not_stored() -> None:
    state = RunState(step=8, evaluated_step=6, val_loss=2.5)
    assert state.to_json()["val_loss"] is None
    assert RunState(step=6, evaluated_step=6, val_loss=2.5).to_json()["val_loss"] == 2.5


def old_run(run_dir: Path) -> Path:
    """Copy the run of version 0.1, whose counters have other names and whose infinite loss would be null."""
    shutil.copytree(FIXTURES / "run_0_1", run_dir)
    return run_dir


def test_counters_of_an_old_run_are_read(tmp_path: Path) -> None:
    path = old_run(tmp_path / "run") / "checkpoints/step-000004"
    written = json.loads((path / "state.json").read_text())
    state = read_newest(path.parent)[0].state
    assert (state.step, state.tokens_seen, state.best_loss, state.best_step) == (4, 64, 3.3572885517128004, 3)
    assert (state.evals_since_best, state.mean_grad_norm) == (written["n_waited"], written["usual_norm"])
    assert RunState.from_json({**written, "best_loss": None}).best_loss == math.inf


def test_a_run_from_before_an_option_existed_is_resumed(tmp_path: Path) -> None:
    """Ranks came after version 0.1, so its recipes lack these options. Their values do not change the results."""
    with make_trainer(tmp_path / "run", recipe={"text": "a"}) as trainer:
        context = trainer.files.context()
        snapshot = trainer.snapshot()
    recipe = {"text": "a", "parallel": None, "shard_size": None, "timeout_minutes": 10.0, "grad_clip": 1.0}
    assert check_unchanged(snapshot, {**context, "recipe": recipe}, ()) == []
    assert check_unchanged(snapshot, {**context, "recipe": {**recipe, "parallel": "fsdp"}}, ()) == []
    with pytest.raises(ValueError, match=r"grad_clip was 1\.0 and is 2\.0"):
        check_unchanged(snapshot, {**context, "recipe": {**recipe, "grad_clip": 2.0}}, ())


def test_an_old_run_is_resumed(tmp_path: Path) -> None:
    """With version 0.1 its loss was 3.3343946; another processor may round differently."""
    config = change(batch_size=2, eval_every=3, eval_windows=200, keep_last=1, schedule="constant")
    model = GPTModel({**vars(CONFIG), "emb_dim": 8, "n_layers": 1, "drop_rate": 0.1})
    recipe = {"text": "a quick brown fox"}
    trainer = make_trainer(old_run(tmp_path / "run"), config, model=model, recipe=recipe, resume=True)
    assert trainer.run() == pytest.approx(3.3343946, abs=1e-5)
    steps = [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record]
    assert steps == list(range(1, 9))


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("step", "8"),
        ("step", -1),
        ("step", 1.5),
        ("step", True),
        ("step", 2**64),
        ("tokens_seen", None),
        ("best_loss", "low"),
        ("best_loss", [1.0]),
        ("best_step", {}),
        ("val_loss", True),
        ("mean_grad_norm", "0.5"),
    ],
)
def test_a_counter_of_the_wrong_type_is_one_clear_error(name: str, value: Any) -> None:
    with pytest.raises(ValueError, match=f"^{name} must be of type (int|float).*, got ") as caught:
        RunState.from_json({**RunState().to_json(), name: value})
    assert not isinstance(caught.value, IncompatibleCheckpointError)


# What a checkpoint depends on


class EmptyLookingBatches:
    """Batches whose length is 0, as that of a stream may be."""

    def __init__(self, ids: list[int]) -> None:
        self.ids = torch.tensor(ids)

    def __len__(self) -> int:
        return 0

    def batch(self, step: int) -> tuple[torch.Tensor, ...]:
        return self.ids[None, :8], self.ids[None, 1:9]

    def batches(self, whole: bool) -> Any:
        yield self.batch(0)

    def fingerprint(self) -> str:
        return str(self.ids.tolist())


def test_batches_that_look_empty_are_compared_on_resuming(tmp_path: Path) -> None:
    first, other = EmptyLookingBatches(IDS[:9]), EmptyLookingBatches(IDS[1:10])
    make_trainer(tmp_path / "run", train=first, val=first).run()
    saved = read_newest(tmp_path / "run/checkpoints")[0].context["data"]
    del saved["architecture"]
    assert saved == {"training_data": first.fingerprint(), "validation_data": first.fingerprint()}
    words = r"data_content: the training data differ .*; data_content: the validation data differ"
    with pytest.raises(ValueError, match=words):
        make_trainer(tmp_path / "run", train=other, val=other, resume=True).run()


def test_a_run_on_the_cpu_does_not_occupy_the_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    """To ask a GPU for its random state would reserve memory on it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_rng_state_all", lambda: pytest.fail("the GPUs were asked"))
    assert "cuda" not in random_states()


# The console


def test_a_silent_console_prints_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = change(sample_every=2, sample_tokens=2)
    make_trainer(tmp_path / "run", config, console=SilentConsole(), tokenizer=TOKENIZER).run()
    assert capsys.readouterr() == ("", "")
    assert "--- step 2 ---" in (tmp_path / "run/samples.txt").read_text()


def test_a_console_of_ones_own_gets_every_event(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    class Collecting(Console):
        def __init__(self) -> None:
            super().__init__(progress=False)
            self.losses: list[tuple[int, float]] = []
            self.steps = 0

        def evaluated(self, step: int, loss: float, is_best: bool) -> None:
            self.losses.append((step, loss))

        def stepped(self) -> None:
            self.steps += 1

    console = Collecting()
    make_trainer(tmp_path / "run", console=console).run()
    assert console.steps == 8
    records = [(r["step"], r["val_loss"]) for r in read_metrics(tmp_path / "run") if "val_loss" in r]
    assert console.losses == records
    assert "validation loss" not in capsys.readouterr().out
