"""What a run survives: full disks, lost terminals, ended readers, and live samples that fail."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import re
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas
import pytest
import safetensors.torch
import torch
import yaml

from MyGPT import GPTModel
from MyGPT.cli import main
from MyGPT.training import checkpoint
from MyGPT.training.console import Console
from MyGPT.training.interrupts import Stopped, delayed_signals
from MyGPT.training.metrics import AppendedFile, read_metrics
from MyGPT.training.optim import schedule_factor
from MyGPT.training.trainer import Trainer
from places import FIXTURES
from tiny_runs import TEXT, TOKENIZER, change, make_trainer, train_command

FULL = [errno.ENOSPC, errno.EIO, errno.EDQUOT, errno.EROFS, errno.EACCES]

# Failed writes


def failing(function: Callable[..., Any], code: int, is_hit: Callable[[str], bool]) -> Callable[..., Any]:
    """Return the function with an OSError in place of each call whose second argument, a path, is hit."""

    def wrapper(*arguments: Any, **keywords: Any) -> Any:
        if is_hit(str(arguments[1])):
            raise OSError(code, os.strerror(code))
        return function(*arguments, **keywords)

    return wrapper


def fill_disk_for_models(monkeypatch: pytest.MonkeyPatch, code: int, steps: range, trainer: Trainer) -> None:
    """Make saving a model fail while the number of the trainer's step is in `steps`. Checkpoints succeed."""

    def is_hit(path: str) -> bool:
        return "checkpoints" not in path and trainer.step_number in steps

    monkeypatch.setattr(safetensors.torch, "save_file", failing(safetensors.torch.save_file, code, is_hit))


@pytest.mark.parametrize("code", FULL)
def test_a_best_model_that_cannot_be_saved_is_reported_and_the_next_one_is_saved(
    code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    trainer = make_trainer(tmp_path / "run", change(eval_every=2))
    losses = iter([3.0, 1.0, 2.0, 2.5])  # after steps 2, 4, 6 and 8
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda whole=False: evaluate(True) if whole else next(losses))
    fill_disk_for_models(monkeypatch, code, range(4, 5), trainer)
    trainer.run()
    printed = capsys.readouterr()
    assert "the model could not be saved, and the next best model will be saved instead: " in printed.err
    assert f"{os.strerror(code)}\n" in printed.err
    assert "step 4: validation loss 1.0000\n" in printed.out and "step 6: validation loss 2.0000 (best)" in printed.out
    assert (trainer.best_step, trainer.best_loss, trainer.state.evals_since_best) == (6, 2.0, 1)
    # A run that is resumed with changes takes the best model from metrics.jsonl, and step 4 is not on the disk.
    resumed = make_trainer(tmp_path / "run", change(eval_every=2, max_steps=9), resume=True, allow_changed="max_steps")
    with resumed:
        assert (resumed.best_step, resumed.best_loss) == (6, 2.0)


@pytest.mark.parametrize("has_validation", [True, False])
def test_a_run_whose_last_model_cannot_be_saved_fails_and_is_completed_later(
    has_validation: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    untouched = make_trainer(tmp_path / "untouched", **({} if has_validation else {"val": None}))
    untouched.run()
    options = {} if has_validation else {"val": None}
    trainer = make_trainer(tmp_path / "run", **options)
    with monkeypatch.context() as patch:
        fill_disk_for_models(patch, errno.ENOSPC, range(99), trainer)
        with pytest.raises(OSError, match=rf"No space left.*--resume {tmp_path / 'run'} completes.*step-000008"):
            trainer.run()
    assert not (tmp_path / "run/model").exists()
    make_trainer(tmp_path / "run", resume=True, **options).run()
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("untouched", "run"))
    assert one == other


def test_a_last_checkpoint_that_cannot_be_written_does_not_keep_the_model_from_being_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = checkpoint.write_safetensors

    def full(path: Path, tensors: Any, shown_as: Path) -> None:
        if "step-000008" in str(shown_as):
            raise OSError(errno.ENOSPC, "No space left on device")
        write(path, tensors, shown_as)

    monkeypatch.setattr(checkpoint, "write_safetensors", full)
    with pytest.raises(OSError, match="No space left"):
        make_trainer(tmp_path / "run", change(checkpoint_every=3)).run()
    GPTModel.from_pretrained(tmp_path / "run")


@pytest.mark.parametrize("kind", ["signal", "divergence"])
def test_a_full_disk_hides_neither_a_signal_nor_a_divergence(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", change(eval_every=100, max_skipped_steps=0))
    fill_disk_for_models(monkeypatch, errno.ENOSPC, range(99), trainer)
    step = trainer.step

    def interrupted() -> dict[str, float]:
        if trainer.step_number == 3:
            if kind == "signal":
                os.kill(os.getpid(), signal.SIGTERM)
            else:
                with torch.no_grad():
                    trainer.model.lm_head.weight.fill_(math.nan)
        return step()

    monkeypatch.setattr(trainer, "step", interrupted)
    if kind == "signal":
        with pytest.raises(OSError, match=r"No space left.*the last good checkpoint is .*step-000004"):
            trainer.run()
    else:
        with pytest.raises(FloatingPointError, match=r"at step 3 the loss is nan.*checkpoint is .*step-000002"):
            trainer.run()


def test_a_log_that_cannot_be_written_is_completed_later(tmp_path: Path) -> None:
    reports: list[str] = []
    log = AppendedFile(tmp_path / "log", reports.append)
    log.write("1\n")
    log.path = Path("/dev/full")
    log.write("2\n")
    log.write("3\n")
    assert log.failure is not None and log.failure.errno == errno.ENOSPC
    assert len(reports) == 1 and "No space left" in reports[0]
    log.path = tmp_path / "log"
    log.write("4\n")
    assert log.failure is None and (tmp_path / "log").read_text() == "1\n2\n3\n4\n"


@pytest.mark.parametrize("name", ["metrics.jsonl", "samples.txt"])
def test_a_run_survives_a_log_that_cannot_be_written_and_says_so_at_its_end(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = change(sample_every=2, sample_tokens=2)
    trainer = make_trainer(tmp_path / "run", config, tokenizer=TOKENIZER)
    trainer.setup()
    os.symlink("/dev/full", tmp_path / "run" / name)
    with pytest.raises(OSError, match=f"No space left.*--resume {tmp_path / 'run'}"):
        trainer.run()
    assert capsys.readouterr().err.count(f"{name} could not be written") == 1
    assert trainer.step_number == 8
    GPTModel.from_pretrained(tmp_path / "run")


def test_a_picture_that_cannot_be_written_is_one_line(tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "text.txt").write_text(TEXT)
    run_dir = tmp_path / "run"
    assert main(train_command(tmp_path / "text.txt", run_dir, "--max_steps", "2")) == 0
    (run_dir / "loss.png").unlink()
    (run_dir / "loss.png").mkdir()  # rename fails
    capsys.readouterr()
    assert main(["train", "--resume", str(run_dir)]) == 0
    assert "loss.png was not drawn, because it could not be written" in capsys.readouterr().err


# Signals and lost output


@pytest.mark.parametrize("is_ignored", [False, True])
def test_sighup_stops_a_run_like_sigterm_unless_nohup_ignores_it(is_ignored: bool) -> None:
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    try:
        with delayed_signals() as signals:
            os.kill(os.getpid(), signal.SIGHUP)
        assert signals == ([] if is_ignored else [signal.SIGHUP])
        assert signal.getsignal(signal.SIGHUP) == (signal.SIG_IGN if is_ignored else signal.SIG_DFL)
    finally:
        signal.signal(signal.SIGHUP, before)


@pytest.mark.parametrize("lost", [["stdout"], ["stderr"], ["stdout", "stderr"]])
def test_a_run_whose_reader_has_ended_stops_with_a_checkpoint(
    lost: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", change(max_steps=1000), progress=True)
    trainer.setup()
    for name in lost:
        read_end, write_end = os.pipe()
        os.close(read_end)
        monkeypatch.setattr(sys, name, open(write_end, "w", closefd=False))  # noqa: SIM115
    with pytest.raises(Stopped, match=r"stopped at step [1-4]; --resume") as caught:
        trainer.run()
    assert caught.value.signal_number == signal.SIGPIPE
    step = trainer.step_number
    assert (tmp_path / "run/checkpoints/latest").read_text() == f"step-{step:06d}\n"
    # Nothing is missing in the log, so a resumed run has the log of an uninterrupted one.
    assert [record["step"] for record in read_metrics(tmp_path / "run") if "loss" in record] == [*range(1, step + 1)]
    monkeypatch.undo()


class FullStream(io.StringIO):
    def flush(self) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")


def test_a_full_disk_under_the_output_does_not_end_a_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run")
    messages = io.StringIO()
    monkeypatch.setattr(sys, "stdout", FullStream())
    monkeypatch.setattr(sys, "stderr", messages)
    trainer.run()
    monkeypatch.undo()
    assert trainer.step_number == 8
    assert messages.getvalue().count("some of the output could not be printed: No space left on device") == 1


def test_the_end_of_the_reader_is_no_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    read_end, write_end = os.pipe()
    os.close(read_end)
    with open(write_end, "w") as broken:
        monkeypatch.setattr(sys, "stdout", broken)
        assert main(["info", "124M"]) == 128 + signal.SIGPIPE
        monkeypatch.undo()
    assert capsys.readouterr().err == ""


# Progress without a terminal


def test_without_a_terminal_the_progress_is_one_line_per_log_every(tmp_path: Path, capsys: Any) -> None:
    make_trainer(tmp_path / "run", change(log_every=3), progress=True).run()
    lines = capsys.readouterr().err.splitlines()
    number = r"[\d.,e+-]+"
    assert len(lines) == 3
    for step, line in zip((3, 6, 8), lines, strict=True):
        pattern = rf"step {step}/8: loss {number}, learning rate {number}, {number} tokens/s, \d:\d\d:\d\d left"
        assert re.fullmatch(pattern, line), line
    assert lines[-1].endswith("0:00:00 left")


def test_progress_can_be_turned_off(tmp_path: Path, capsys: Any) -> None:
    make_trainer(tmp_path / "run").run()
    assert capsys.readouterr().err == ""


def test_a_progress_line_is_written_at_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with open(tmp_path / "log", "w") as stream:
        monkeypatch.setattr(sys, "stderr", stream)
        console = Console()
        console.start(0, 10)
        console.progressed(1, 2.5, 1e-3, 100.0)
        line = "step 1/10: loss 2.500, learning rate 0.001, 100 tokens/s, 0:0"
        assert (tmp_path / "log").read_text().startswith(line)


# Live samples


class BadTokenizer:
    n_vocab, eot_token = TOKENIZER.n_vocab, None

    def decode(self, ids: Any) -> str:
        raise KeyError("no such token")

    encode = staticmethod(TOKENIZER.encode)
    save = staticmethod(TOKENIZER.save)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["tokenizer", "memory", "divergence", "value"])
def test_a_live_sample_ends_no_run_and_its_failure_is_reported_once(
    kind: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    config = change(sample_every=1, sample_tokens=2)
    make_trainer(tmp_path / "plain", change(sample_every=0)).run()
    tokenizer: Any = BadTokenizer() if kind == "tokenizer" else TOKENIZER
    errors = {"memory": MemoryError(), "divergence": FloatingPointError("nan"), "value": ValueError("out of range")}
    if kind in errors:

        def fail(*arguments: Any, **keywords: Any) -> Any:
            raise errors[kind]

        monkeypatch.setattr("MyGPT.training.texts.generate", fail)
    make_trainer(tmp_path / "run", config, tokenizer=tokenizer).run()
    assert capsys.readouterr().err.count("no sample text, because generating it failed") == 1
    one, other = ((tmp_path / name / "model/model.safetensors").read_bytes() for name in ("plain", "run"))
    assert one == other


# Strict JSON


def refuse(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def test_every_line_of_metrics_is_strict_json_and_reads_as_floats(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run")
    values = iter([math.nan, 2.0])
    evaluate = trainer.evaluate
    monkeypatch.setattr(trainer, "evaluate", lambda whole=False: evaluate(True) if whole else next(values))
    trainer.setup()
    trainer.files.log(0, loss=math.inf, other=-math.inf)
    trainer.run()
    path = tmp_path / "run/metrics.jsonl"
    for line in path.read_text().splitlines():
        json.loads(line, parse_constant=refuse)
    records = read_metrics(tmp_path / "run")
    assert (records[0]["loss"], records[0]["other"]) == (math.inf, -math.inf)
    losses = [record["val_loss"] for record in records if "val_loss" in record]
    assert math.isnan(losses[0]) and losses[1:] == [2.0]
    table = pandas.read_json(path, lines=True)
    assert table["val_loss"].dtype == table["loss"].dtype == float


def test_metrics_of_early_versions_are_read(tmp_path: Path) -> None:
    (tmp_path / "metrics.jsonl").write_text('{"step": 1, "val_loss": NaN}\n{"step": 2, "val_loss": Infinity}\n')
    losses = [record["val_loss"] for record in read_metrics(tmp_path)]
    assert math.isnan(losses[0]) and losses[1] == math.inf
    assert read_metrics(FIXTURES / "run_0_1")


# Warmup


@pytest.mark.slow
@pytest.mark.parametrize(
    ("steps", "given", "used"), [(10, 20, 1), (10, 10, 1), (4, 100, 0), (100, 100, 10), (10, 9, 9)]
)
def test_a_warmup_longer_than_the_run_is_shortened_with_a_report(
    steps: int, given: int, used: int, tmp_path: Path, capsys: Any
) -> None:
    config = change(max_steps=steps, warmup_steps=given, log_every=1, eval_every=1000)
    trainer = make_trainer(tmp_path / "run", config)
    trainer.run()
    err = capsys.readouterr().err
    report = f"warmup_steps is shortened from {given} to {used}, because the run has only {steps} steps\n"
    assert err == ("" if used == given else report)
    assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["warmup_steps"] == used
    rates = [record["learning_rate"] for record in read_metrics(tmp_path / "run") if "learning_rate" in record]
    assert rates == [config.learning_rate * schedule_factor(change(config, warmup_steps=used), i) for i in range(steps)]
    assert max(rates) == config.learning_rate


@pytest.mark.slow
def test_a_run_whose_warmup_was_shortened_is_extended_without_allowing_another_warmup(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    sizes = [10, 30, 200, 300]
    for steps in sizes:
        config = change(max_steps=steps, warmup_steps=100, log_every=1, eval_every=1000, checkpoint_every=1000)
        allowed = () if steps == sizes[0] else ("max_steps",)
        make_trainer(tmp_path / "run", config, resume=bool(allowed), allow_changed=allowed).run()
        assert ("warmup_steps stays 1, because" in capsys.readouterr().err) == bool(allowed)
        assert yaml.safe_load((tmp_path / "run/config.yaml").read_text())["warmup_steps"] == 1
    with pytest.raises(ValueError, match="warmup_steps was 1 and is 100"):
        make_trainer(tmp_path / "run", config, resume=True, allow_changed=("eval_every",)).run()


@pytest.mark.slow
def test_a_shortened_run_resumes_with_the_same_command_and_an_old_one_keeps_its_warmup(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = change(max_steps=10, warmup_steps=20, checkpoint_every=4)
    for is_old in (False, True):
        with monkeypatch.context() as patch:
            if is_old:  # An earlier version neither shortened nor reported the warmup.
                patch.setattr("MyGPT.training.run.Run._shorten_warmup", lambda run: None)
            make_trainer(tmp_path / f"whole {is_old}", config).run()
            trainer = make_trainer(tmp_path / f"run {is_old}", config)
            with trainer:
                for _ in range(4):
                    trainer.step()
                trainer.files.write_last_checkpoint(4, trainer.snapshot)
        make_trainer(tmp_path / f"run {is_old}", config, resume=True).run()
        one, other = (
            (tmp_path / f"{name} {is_old}" / "model/model.safetensors").read_bytes() for name in ("whole", "run")
        )
        assert one == other
    first, second = ((tmp_path / f"run {is_old}" / "model/model.safetensors").read_bytes() for is_old in (False, True))
    assert first != second
