"""A run that is stopped or killed, at any moment and any number of times, ends bit-identical to an uninterrupted run."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import resource
import shutil
import signal
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from killing import Kill, SignalInStep6, differences, leftovers, remains, run, run_with_kills, start
from MyGPT import GPTModel, Trainer
from MyGPT.cli import main
from MyGPT.training import checkpoint
from MyGPT.training.checkpoint import (
    CheckpointWriter,
    read_newest,
    read_snapshot,
    remove_old,
    write_snapshot,
)
from MyGPT.training.metrics import read_metrics
from tiny_runs import IDS, RECIPES, TEXT, TOKENIZER, change, finetune_command, make_trainer, train_command


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "text.txt"
    path.write_text(TEXT)
    return path


@pytest.fixture(scope="module")
def untouched(text: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The AdamW run without interruption."""
    out = tmp_path_factory.mktemp("untouched") / "run"
    assert run(train_command(text, out, *RECIPES["adamw"].split())) == 0
    return out


KILLS = [
    Kill("step", 3),  # before the first checkpoint
    Kill("half_file", 2),
    Kill("fsync", 9),
    Kill("rename", 2),
    Kill("replace", 3),
    Kill("snapshot", 2),
    Kill("step", 7),
    Kill("rmtree", 1),
    Kill("step", 5),
]


@pytest.mark.slow
@pytest.mark.parametrize("recipe", RECIPES)
def test_a_run_that_is_killed_again_and_again_ends_like_an_untouched_one(
    recipe: str, text: Path, tmp_path: Path
) -> None:
    options = RECIPES[recipe].split()
    assert run(train_command(text, tmp_path / "untouched", *options)) == 0
    struck = run_with_kills(train_command(text, tmp_path / "killed", *options, "--resume", "auto"), KILLS)
    assert struck >= 6
    assert differences(remains(tmp_path / "untouched"), remains(tmp_path / "killed")) == []
    assert leftovers(tmp_path / "killed") == []


@pytest.mark.slow
@pytest.mark.parametrize("options", ["--lora.dropout 0.2", "--full --rows packed --gradient_checkpointing", "--merge"])
def test_a_finetuning_that_is_killed_ends_like_an_untouched_one(options: str, tmp_path: Path) -> None:
    command = finetune_command(tmp_path, tmp_path / "untouched", *options.split())
    assert run(command) == 0
    command[command.index(str(tmp_path / "untouched"))] = str(tmp_path / "killed")
    kills = [Kill("step", 6), Kill("half_file", 3), Kill("fsync", 12), Kill("rename", 3)]
    if options == "--merge":
        kills += [Kill(moment, 1, after_merge=True) for moment in ("half_file", "fsync", "rename", "replace")]
    struck = run_with_kills([*command, "--resume", "auto"], kills)
    assert struck >= 3
    assert differences(remains(tmp_path / "untouched"), remains(tmp_path / "killed")) == []
    assert leftovers(tmp_path / "killed") == []


@pytest.mark.slow
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGHUP, 129)])
def test_a_signal_saves_a_checkpoint_from_which_the_run_is_resumed(
    number: int, status: int, text: Path, untouched: Path, tmp_path: Path
) -> None:
    """A cluster sends SIGTERM, a user presses Ctrl-C. The signal comes between two regular checkpoints."""
    command = train_command(text, tmp_path / "run", *RECIPES["adamw"].split())
    assert run(command, prepare=SignalInStep6(number)) == status
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")].count("step-000006") == 1
    assert main(["train", "--resume", str(tmp_path / "run")]) == 0
    assert differences(remains(untouched), remains(tmp_path / "run")) == []


@pytest.mark.slow
def test_a_run_stopped_before_its_first_evaluation_has_a_model(text: Path, tmp_path: Path) -> None:
    command = train_command(text, tmp_path / "run", "--eval_every", "100")
    assert run(command, prepare=SignalInStep6(signal.SIGTERM), errors=tmp_path / "errors") == 143
    error = (tmp_path / "errors").read_text()
    assert "stopped at step 6" in error and f"--resume {tmp_path / 'run'}" in error
    GPTModel.from_pretrained(tmp_path / "run")


@pytest.mark.slow
def test_a_second_process_is_refused_as_long_as_the_first_lives(text: Path, tmp_path: Path, capsys: Any) -> None:
    command = train_command(text, tmp_path / "run", "--max_steps", "1000000", "--sample_every", "0")
    first = start(command)
    try:
        _wait_for(lambda: (tmp_path / "run/checkpoints/latest").exists())
        for options in (["--resume", str(tmp_path / "run")], [*command[1:], "--overwrite"]):
            assert main(["train", *options]) == 2
            assert f"process {first.pid}" in capsys.readouterr().err
    finally:
        first.kill()
        first.join()
    steps = _steps(tmp_path / "run")
    resume = ["train", "--resume", str(tmp_path / "run"), "--allow_changed", "max_steps", "--max_steps"]
    assert main([*resume, str(steps + 1)]) == 0
    assert _steps(tmp_path / "run") == steps + 1


@pytest.mark.slow
@pytest.mark.parametrize("kill", [Kill("fsync", 1), Kill("replace", 1), Kill("fsync", 2), Kill("replace", 2)])
def test_a_run_that_is_killed_while_it_writes_its_first_files_is_started_anew(
    text: Path, tmp_path: Path, kill: Kill
) -> None:
    """Its directory holds only unfinished files, which used to be taken for somebody else's."""
    command = train_command(text, tmp_path / "run", "--max_steps", "2", "--resume", "auto")
    assert run_with_kills(command, [kill]) == 1
    assert leftovers(tmp_path / "run") == []


def _wait_for(condition: Any) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def _steps(run_dir: Path) -> int:
    return int((run_dir / "checkpoints/latest").read_text().strip()[5:])


# What a checkpoint is


@pytest.fixture
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training wait for each checkpoint, so that no checkpoint is postponed while a slow disk writes another."""
    monkeypatch.setattr(CheckpointWriter, "is_busy", property(lambda writer: bool(writer.wait())))


@pytest.fixture
def finished(tmp_path: Path, patient: None) -> Path:
    make_trainer(tmp_path / "run").run()
    return tmp_path / "run"


def test_a_checkpoint_holds_tensors_and_json_with_their_hashes_in_a_manifest(finished: Path) -> None:
    path = finished / "checkpoints/step-000008"
    assert {file.name for file in path.iterdir()} == {
        "weights.safetensors",
        "optimizer.safetensors",
        "state.json",
        "manifest.json",
    }
    weights, optimizer = load_file(path / "weights.safetensors"), load_file(path / "optimizer.safetensors")
    assert {name.rpartition("/")[0] for name in optimizer} == set(weights)
    assert {name.rpartition("/")[2] for name in optimizer} == {"step", "exp_avg", "exp_avg_sq"}
    state = json.loads((path / "state.json").read_text())
    assert state["step"] == 8 and state["tokens_seen"] == 8 * 4 * 8
    assert state["random"].keys() >= {"python", "numpy", "torch"}
    assert state["machine"]["torch"] == torch.__version__
    assert sorted(p.name for p in (finished / "checkpoints").iterdir()) == [
        "latest",
        "step-000004",
        "step-000006",
        "step-000008",
    ]


def test_a_checkpoint_cannot_change_while_it_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Training continues while the writer waits. The writer must store the weights from before."""
    may_write, write = threading.Event(), checkpoint.write_snapshot
    monkeypatch.setattr(checkpoint, "write_snapshot", lambda *a: (may_write.wait(60), write(*a))[1])
    trainer = make_trainer(tmp_path / "run")
    trainer.setup()
    writer = CheckpointWriter(tmp_path, 1, 0)
    trainer.step()
    before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
    writer.start(trainer.snapshot)
    for _ in range(3):
        trainer.step()
    assert writer.is_busy
    may_write.set()
    writer.wait()
    for name, tensor in read_snapshot(tmp_path / "step-000001").weights.items():
        assert torch.equal(tensor, before[name])
        assert not torch.equal(tensor, trainer.model.get_parameter(name))


@pytest.mark.slow
def test_a_writer_that_is_busy_is_not_waited_for_and_never_doubled(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at_once, most, write = 0, 0, checkpoint.write_snapshot

    def slow(*arguments: Any) -> Path:
        nonlocal at_once, most
        at_once += 1
        most = max(most, at_once)
        time.sleep(0.3)
        at_once -= 1
        return write(*arguments)

    monkeypatch.setattr(checkpoint, "write_snapshot", slow)
    trainer = make_trainer(tmp_path / "run", change(checkpoint_every=1, keep_last=100))
    trainer.run()
    assert most == 1
    assert trainer.files.writer is not None and 3 <= trainer.files.writer.n_written < 9


def test_checkpoints_come_by_time_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = iter(range(0, 10**6, 40))  # in seconds; read more than once per step
    monkeypatch.setattr(time, "monotonic", lambda: next(clock))
    trainer = make_trainer(tmp_path / "run", change(checkpoint_every=0, checkpoint_minutes=2.0, keep_last=100))
    trainer.run()
    steps = sorted(int(path.name[5:]) for path in (tmp_path / "run/checkpoints").glob("step-*"))
    assert steps[-1] == 8 and 2 <= len(steps) < 8


def test_no_checkpoints_on_request(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", change(checkpoint_every=0, checkpoint_minutes=0.0)).run()
    assert not (tmp_path / "run/checkpoints").exists()


def test_the_last_and_the_best_are_kept(tmp_path: Path) -> None:
    trainer = make_trainer()
    trainer.setup()
    for step, loss in enumerate([3.0, 1.0, None, 2.0, 4.0, None], start=1):
        trainer.state.step = trainer.state.evaluated_step = step
        trainer.state.val_loss = loss
        write_snapshot(tmp_path, trainer.snapshot())
    (tmp_path / "step-000009").mkdir()  # left by a run that was resumed from an earlier step
    remove_old(tmp_path, 6, keep_last=2, keep_best=1)
    kept = sorted(path.name for path in tmp_path.glob("step-*"))
    assert kept == ["step-000002", "step-000005", "step-000006", "step-000009"]


# Damage


def _damage_half(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def _damage_byte(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


@pytest.mark.parametrize("file", ["weights.safetensors", "optimizer.safetensors", "state.json", "manifest.json"])
@pytest.mark.parametrize("damage", [_damage_half, _damage_byte, Path.unlink])
def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(file: str, damage: Any, finished: Path) -> None:
    damage(finished / "checkpoints/step-000008" / file)
    snapshot, problems = read_newest(finished / "checkpoints")
    assert snapshot.state.step == 6
    assert len(problems) == 1 and "step-000008" in problems[0] and file.partition(".")[0] in problems[0]


def test_a_run_resumed_from_the_checkpoint_before_a_damaged_one_ends_the_same(
    finished: Path, tmp_path: Path, capsys: Any
) -> None:
    before = remains(finished)
    _damage_byte(finished / "checkpoints/step-000008/weights.safetensors")
    make_trainer(finished, resume=True).run()
    assert "step-000008 is not used" in capsys.readouterr().err
    assert differences(before, remains(finished)) == []


def test_a_deleted_checkpoint_and_a_lost_or_wrong_pointer_do_not_matter(finished: Path) -> None:
    checkpoints = finished / "checkpoints"
    shutil.rmtree(checkpoints / "step-000008")
    assert read_newest(checkpoints)[0].state.step == 6
    (checkpoints / "latest").write_bytes(b"\xff../../etc\n")
    assert read_newest(checkpoints)[0].state.step == 6
    (checkpoints / "latest").unlink()
    assert read_newest(checkpoints)[0].state.step == 6
    for path in checkpoints.glob("step-*"):
        shutil.rmtree(path)
    with pytest.raises(ValueError, match="no complete checkpoint in"):
        read_newest(checkpoints)


def test_the_clock_may_go_backwards(finished: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Neither the files' times nor the time of day decide which checkpoint is the newest."""
    for age, path in enumerate(sorted((finished / "checkpoints").glob("step-*"))):
        os.utime(path, (10**9 - age, 10**9 - age))
    now = iter(range(2 * 10**9, 0, -1000))
    monkeypatch.setattr(time, "time", lambda: float(next(now)))
    trainer = make_trainer(finished, change(max_steps=10), resume=True, allow_changed=["max_steps"])
    trainer.run()
    assert trainer.step_number == 10
    assert [record["step"] for record in read_metrics(finished) if "loss" in record] == list(range(1, 11))


# What fails while it is written


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EROFS, errno.EACCES])
def test_a_checkpoint_that_cannot_be_written_is_reported_and_the_earlier_ones_stay(
    code: int, tmp_path: Path, patient: None, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    write = checkpoint.write_safetensors

    def failing(path: Path, tensors: Any, shown_as: Path) -> None:
        if "step-000004" in str(path):
            raise OSError(code, os.strerror(code))
        write(path, tensors, shown_as)

    monkeypatch.setattr(checkpoint, "write_safetensors", failing)
    make_trainer(tmp_path / "run").run()
    assert f": {os.strerror(code)}\n" in capsys.readouterr().err
    assert sorted(path.name for path in (tmp_path / "run/checkpoints").iterdir()) == [
        "latest",
        "step-000002",
        "step-000006",
        "step-000008",
    ]


def _no_large_file() -> None:
    """Limit the file size to more than the weights need and less than AdamW's state needs."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, 60_000))


@pytest.mark.slow
def test_a_quota_that_is_reached_is_one_line_and_harms_nothing(text: Path, tmp_path: Path) -> None:
    """The operating system's limit stops the optimizer's file only."""
    command = train_command(text, tmp_path / "run", "--eval_every", "100", "--sample_every", "0", "--max_steps", "6")
    assert run(command, prepare=_no_large_file, errors=tmp_path / "errors") == 2
    last = (tmp_path / "errors").read_text().strip().splitlines()[-1]
    assert last.startswith(
        f"mygpt train: cannot write {tmp_path / 'run/checkpoints/step-000006/optimizer.safetensors'}"
    )
    assert leftovers(tmp_path / "run") == []
    assert [path.name for path in (tmp_path / "run/checkpoints").glob("step-*")] == ["step-000000"]
    assert main([*command, "--resume", "auto"]) == 0


# What may not change


def test_a_changed_recipe_is_refused_with_what_differs_unless_it_is_allowed(finished: Path) -> None:
    before = (finished / "metrics.jsonl").read_bytes()
    with pytest.raises(ValueError, match=r"batch_size was 4 and is 2; max_steps was 8 and is 10 \(--allow_changed KEY"):
        make_trainer(finished, change(max_steps=10, batch_size=2), resume=True).run()
    with pytest.raises(ValueError, match="batch_size was 4 and is 2"):
        make_trainer(
            finished, change(max_steps=10, batch_size=2), resume=True, allow_changed=["max_steps", "seed"]
        ).run()
    assert (finished / "metrics.jsonl").read_bytes() == before
    make_trainer(finished, change(max_steps=10), resume=True, allow_changed="seed, max_steps").run()
    assert json.loads((finished / "checkpoints/step-000010/state.json").read_text())["recipe"]["max_steps"] == 10


def change_state(path: Path, *removed: str, **changed: Any) -> None:
    """Remove counters from a checkpoint's state.json or change them, and put the new hash into the manifest."""
    state = json.loads((path / "state.json").read_text())
    state = {name: value for name, value in state.items() if name not in removed} | changed
    content = json.dumps(state).encode()
    (path / "state.json").write_bytes(content)
    manifest = json.loads((path / "manifest.json").read_text())
    manifest["state.json"] = {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
    (path / "manifest.json").write_text(json.dumps(manifest))


def test_a_checkpoint_of_another_version_is_refused_by_what_it_lacks(finished: Path) -> None:
    place = finished / "checkpoints"
    change_state(place / "step-000008", "mean_grad_norm")
    with pytest.raises(
        ValueError,
        match=r"step-000008.state.json is not usable: it lacks mean_grad_norm, so another version of MyGPT wrote it",
    ):
        make_trainer(finished, resume=True).run()


def test_other_data_are_noticed(finished: Path) -> None:
    """One letter in the middle is changed; the length stays the same."""
    ids = list(IDS[:1500])
    ids[700] = (ids[700] + 1) % TOKENIZER.n_vocab
    with pytest.raises(ValueError, match="data_content: the training data differ from those the run began with"):
        make_trainer(finished, resume=True, train=ids).run()
    with pytest.raises(ValueError, match="data_content: the training data differ"):
        make_trainer(finished, resume=True, train=ids, allow_changed=["data"]).run()
    make_trainer(finished, resume=True, train=ids, allow_changed=["data_content"]).run()


@pytest.mark.slow
def test_a_run_whose_long_epochs_are_now_shuffled_differently_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An earlier version shuffled epochs of any length with a table of all windows."""
    shuffled = change(order="shuffled")
    make_trainer(tmp_path / "run", shuffled).run()
    monkeypatch.setattr("MyGPT.data.sampler.MAX_TABLE", 10)
    words = (
        "data_content: the training data are the same, but this version of MyGPT shuffles so many windows in another"
    )
    with pytest.raises(ValueError, match=f"{words} order than the run began with.*--allow_changed"):
        make_trainer(tmp_path / "run", shuffled, resume=True).run()
    make_trainer(tmp_path / "run", shuffled, resume=True, allow_changed="data_content").run()
    make_trainer(tmp_path / "run", shuffled, resume=True).run()


def test_other_frozen_weights_are_noticed(tmp_path: Path) -> None:
    def frozen(value: float) -> Trainer:
        trainer = make_trainer(tmp_path / "run", resume=(tmp_path / "run").exists())
        with torch.no_grad():
            trainer.model.transformer.wpe.weight.requires_grad_(False)[3, 3] = value
        return trainer

    frozen(0.5).run()
    with pytest.raises(ValueError, match="model_content: the frozen weights differ from those the run began with"):
        frozen(0.25).run()
    assert frozen(0.5).run() > 0


def test_the_best_model_on_the_disk_stays_until_a_changed_run_beats_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run")
    losses = iter([3.0, 1.0])
    monkeypatch.setattr(trainer, "evaluate", lambda whole=False: 0.0 if whole else next(losses))
    trainer.run()
    model = (tmp_path / "run/model/model.safetensors").read_bytes()
    shutil.rmtree(tmp_path / "run/checkpoints/step-000008")  # resumes from step 6, before the best
    changed = make_trainer(tmp_path / "run", change(learning_rate=2e-3), resume=True, allow_changed=["learning_rate"])
    monkeypatch.setattr(changed, "evaluate", lambda whole=False: 2.0)
    changed.run()
    assert changed.best_loss == 1.0 and changed.best_step == 8
    assert (tmp_path / "run/model/model.safetensors").read_bytes() == model


def test_another_number_of_threads_is_reported(finished: Path, capsys: Any) -> None:
    torch.set_num_threads(2)
    try:
        make_trainer(finished, resume=True).run()
    finally:
        torch.set_num_threads(1)
    assert "threads was 1 and is 2" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("options", "words"),
    [
        (["--resume", "{tmp}/none"], "no run to resume at"),
        (["--resume", "auto"], "--resume auto needs --out"),
        (["--resume", "{tmp}/a", "--out", "{tmp}/b"], "continues in the directory of that run: leave out --out"),
    ],
)
def test_a_resume_that_cannot_be_is_one_sentence(options: list[str], words: str, tmp_path: Path, capsys: Any) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a/config.yaml").write_text("data: alice\n")
    assert main(["train", *(option.format(tmp=tmp_path) for option in options)]) == 2
    error = capsys.readouterr().err
    assert words in error and len(error.splitlines()) == 1


# The divergence guard


def poison(trainer: Trainer, steps: dict[int, float], monkeypatch: pytest.MonkeyPatch) -> None:
    """Multiply the training loss of some steps by a factor."""
    compute = trainer._token_loss

    def poisoned(*batch: Any) -> Any:
        total, count = compute(*batch)
        return total * steps.get(trainer.step_number if trainer.model.training else -1, 1.0), count

    monkeypatch.setattr(trainer, "_token_loss", poisoned)


def test_a_step_that_is_not_finite_is_left_out_and_counted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    trainer = make_trainer(tmp_path / "run")
    poison(trainer, {2: float("nan"), 5: float("inf")}, monkeypatch)
    trainer.setup()
    for step in range(8):
        before = {name: p.detach().clone() for name, p in trainer.model.named_parameters()}
        trainer.step()
        same = all(torch.equal(p, before[name]) for name, p in trainer.model.named_parameters())
        assert same == (step in (2, 5))
    assert trainer.state.n_skipped == 2


def test_too_many_such_steps_stop_the_run_and_the_last_good_checkpoint_is_named(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trainer = make_trainer(tmp_path / "run", change(max_skipped_steps=2))
    poison(trainer, dict.fromkeys(range(4, 8), float("nan")), monkeypatch)
    with pytest.raises(
        FloatingPointError, match=r"at step 6 the loss is nan.*3 steps in all were not finite"
    ) as caught:
        trainer.run()
    last = read_newest(tmp_path / "run/checkpoints")[0]
    assert f"step-{last.state.step:06d}" in str(caught.value)
    assert all(bool(tensor.isfinite().all()) for tensor in last.weights.values())
    assert [record["skipped_steps"] for record in read_metrics(tmp_path / "run") if "skipped_steps" in record] == [1, 2]


def test_an_unusually_large_gradient_is_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    trainer = make_trainer(tmp_path / "run")
    poison(trainer, {5: 100.0}, monkeypatch)
    trainer.run()
    spikes = [record for record in read_metrics(tmp_path / "run") if "grad_norm_spike" in record]
    assert [record["step"] for record in spikes] == [6]
    assert 50 < spikes[0]["grad_norm_spike"] < 200
    assert "step 6: the gradient norm" in capsys.readouterr().out
