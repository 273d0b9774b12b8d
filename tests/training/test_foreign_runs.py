"""Runs that come from somebody else, or whose files are damaged, moved or extended: nothing outside of the run changes."""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import shutil
import struct
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file

from conftest import lively_model
from MyGPT import BPETokenizer, GPTConfig
from MyGPT.cli import main
from MyGPT.commands.train import draw_losses
from MyGPT.data.prepare import prepare
from MyGPT.training.checkpoint import CheckpointWriter, read_newest
from MyGPT.training.config import TrainConfig
from MyGPT.training.metrics import read_metrics
from MyGPT.training.snapshot import random_states
from tiny_runs import QUICK, TEXT, TOKENIZER, change, make_trainer, train_command

MUON = change(optimizer="muon")


@pytest.fixture(autouse=True)
def _patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Make training wait for each checkpoint, so that each is written when it is due."""
    monkeypatch.setattr(CheckpointWriter, "is_busy", property(lambda writer: bool(writer.wait())))


def finish(run: Path, config: TrainConfig) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CheckpointWriter, "is_busy", property(lambda writer: bool(writer.wait())))
        make_trainer(run, config).run()
    return run


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the checkpoints of steps 4, 6 and 8. Tests copy it."""
    return finish(tmp_path_factory.mktemp("finished") / "run", QUICK)


@pytest.fixture(scope="module")
def finished_muon(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run with the optimizer Muon."""
    return finish(tmp_path_factory.mktemp("finished") / "muon", MUON)


@pytest.fixture
def run(finished: Path, tmp_path: Path) -> Path:
    shutil.copytree(finished, tmp_path / "run")
    return tmp_path / "run"


def sign(checkpoint: Path) -> None:
    """Write a manifest that fits the files of a checkpoint, as someone who changed them on purpose would do."""
    names = ("optimizer.safetensors", "state.json", "weights.safetensors")
    contents = {name: (checkpoint / name).read_bytes() for name in names}
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in contents.items()}
    (checkpoint / "manifest.json").write_text(json.dumps(manifest))


def change_state(checkpoint: Path, *path: str, value: Any) -> None:
    """Set a value in state.json, at a path of keys, and sign the checkpoint."""
    state = json.loads((checkpoint / "state.json").read_text())
    inner = state
    for key in path[:-1]:
        inner = inner[key]
    inner[path[-1]] = value
    (checkpoint / "state.json").write_text(json.dumps(state))
    sign(checkpoint)


# Wrong values with a valid manifest

WRONG_VALUES: list[tuple[tuple[str, ...], Any]] = [
    *((("lengths", name), 0) for name in ("../../victim", "/etc/victim", "config.yaml", "")),
    *((("lengths", "metrics.jsonl"), value) for value in ("9", None, -1, 1.5, True, [], 2**70, math.nan)),
    *(((key,), value) for key in ("lengths", "recipe", "data", "machine", "random") for value in (None, [], "x", 3, True)),
    *((("random", key), value) for key in ("python", "numpy", "torch") for value in (None, [], {}, "x", 3, [1, [2], 3])),
    (("random", "python"), [3, [1] * 624 + [625], None]),
    (("random", "python"), [3, [1] * 625, "gauss"]),
    (("random", "python"), [3, ["x"] * 625, None]),
    (("random", "numpy"), ["MT19937", [1] * 624, 10**6, 0, 0.0]),
    (("random", "numpy"), ["MT19937", [1] * 624, -1, 0, 0.0]),
    (("random", "numpy"), ["MT19937", [2**40] * 624, 3, 0, 0.0]),
    (("random", "numpy"), ["PCG64", [1] * 624, 3, 0, 0.0]),
    (("random", "numpy"), ["MT19937", [[1]] * 624, 3, 0, 0.0]),
    (("random", "torch"), ""),
    (("random", "torch"), "00" * 5056),
    (("random", "torch"), "ab" * 17),
    (("random", "cuda"), 5),
    (("random", "cuda"), [5]),
    (("random", "mps"), {}),
    (("step",), 3),
    (("step",), 10**9),
    (("evaluated_step",), 9),
    (("n_skipped",), 9),
    (("evals_since_best",), 10**6),
    (("best_loss",), "nan"),
    (("best_loss",), "-inf"),
    (("best_loss",), math.nan),
    (("tokens_seen",), [[1]]),
    (("mean_grad_norm",), {"a": 1}),
]  # fmt: skip


@pytest.mark.parametrize(("path", "value"), WRONG_VALUES, ids=lambda it: str(it)[:40])
def test_a_wrong_value_with_a_valid_manifest_is_damage(path: tuple[str, ...], value: Any, run: Path) -> None:
    """Seven of these ended in tracebacks. The checkpoint before is used instead, and the warning names the file."""
    before = random_states()
    change_state(run / "checkpoints/step-000008", *path, value=value)
    snapshot, (warning,) = read_newest(run / "checkpoints")
    assert snapshot.state.step == 6
    assert f"{run / 'checkpoints/step-000008'} is not used: " in warning and "state.json" in warning
    assert random_states() == before


VALUES: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=9) | st.sampled_from([2**63, 2**64, -1]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner, max_size=3),
    max_leaves=6,
)


@st.composite
def changed_states(draw: st.DrawFn, state: dict[str, Any]) -> dict[str, Any]:
    """Draw a state.json in which some keys, at the top or one level below, are missing, extra or have other values."""
    state = json.loads(json.dumps(state))
    for _ in range(draw(st.integers(1, 3))):
        objects = [state, *(value for value in state.values() if isinstance(value, dict))]
        target = draw(st.sampled_from(objects))
        key = draw(st.sampled_from([*target, "extra"]) if target else st.just("extra"))
        if draw(st.booleans()):
            target.pop(key, None)
        else:
            target[key] = draw(VALUES)
    return state


@pytest.mark.slow
def test_whatever_state_json_holds_the_run_resumes_or_is_refused_with_one_error(finished: Path, tmp_path: Path) -> None:
    state = json.loads((finished / "checkpoints/step-000008/state.json").read_text())
    (tmp_path / "victim").write_text("mine")
    (tmp_path / "place").mkdir()

    factor = int(os.environ.get("MYGPT_FUZZ", "1"))

    @settings(max_examples=60 * factor, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(changed_states(state))
    def check(changed: dict[str, Any]) -> None:
        run = tmp_path / "place" / "run"
        shutil.rmtree(run, ignore_errors=True)
        shutil.copytree(finished, run)
        (run / "checkpoints/step-000008/state.json").write_text(json.dumps(changed))
        sign(run / "checkpoints/step-000008")
        trainer = make_trainer(run, resume=True)
        try:
            with trainer:
                assert trainer.step_number in (6, 8)
        except ValueError as error:
            assert "state.json" in str(error) or "cannot be resumed" in str(error)
        assert (tmp_path / "victim").read_text() == "mine"

    check()


def rewrite(change: Any) -> Any:
    """Return a function that changes the tensors of a checkpoint's file and signs the checkpoint."""

    def work(checkpoint: Path, file: str) -> None:
        tensors = load_file(checkpoint / file)
        save_file(change(tensors), checkpoint / file)
        sign(checkpoint)

    return work


def rename_first(tensors: dict[str, Any]) -> dict[str, Any]:
    name = sorted(tensors)[0]
    return {(f"other.{k}" if k == name else k): v for k, v in tensors.items()}


def without_first(tensors: dict[str, Any]) -> dict[str, Any]:
    return {name: tensors[name] for name in sorted(tensors)[1:]}


def cut_first(tensors: dict[str, Any]) -> dict[str, Any]:
    name = sorted(tensors)[0]
    return {**tensors, name: torch.zeros(3)}


def with_step(value: float) -> Any:
    def change(tensors: dict[str, Any]) -> dict[str, Any]:
        return {k: torch.tensor(value) if k.endswith("/step") else v for k, v in tensors.items()}

    return change


@pytest.mark.parametrize("config", [QUICK, MUON], ids=["adamw", "muon"])
@pytest.mark.parametrize(
    ("file", "changed"),
    [
        *(("weights.safetensors", it) for it in (rename_first, without_first, cut_first)),
        *(("optimizer.safetensors", it) for it in (rename_first, cut_first, lambda tensors: {})),
        ("optimizer.safetensors", lambda t: {k: v for k, v in t.items() if not k.endswith("exp_avg")}),
        ("optimizer.safetensors", lambda t: {**t, "transformer.ln_f.weight/extra": torch.zeros(16)}),
        ("optimizer.safetensors", with_step(math.nan)),
        ("optimizer.safetensors", with_step(0.0)),
        ("optimizer.safetensors", with_step(1e9)),
    ],
)
def test_tensors_of_another_model_with_a_valid_manifest_are_damage(
    config: TrainConfig,
    file: str,
    changed: Any,
    finished: Path,
    finished_muon: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    shutil.copytree(finished if config is QUICK else finished_muon, tmp_path / "run")
    rewrite(changed)(tmp_path / "run/checkpoints/step-000008", file)
    with make_trainer(tmp_path / "run", config, resume=True) as trainer:
        assert trainer.step_number == 6
    assert "step-000008 is not used: " in capsys.readouterr().err


def test_the_state_of_another_optimizer_is_refused(run: Path) -> None:
    """Muon has one tensor per matrix, AdamW three."""
    with pytest.raises(ValueError, match=r"no complete checkpoint .*this run needs momentum_buffer"):
        make_trainer(run, MUON, resume=True, allow_changed=["optimizer"]).run()


# Links


LINKS = (
    ".process .lock metrics.jsonl samples.txt config.yaml loss.png split.json model checkpoints tensorboard "
    "wandb trackers.json "
    "checkpoints/latest checkpoints/step-000008 model/template.json .config.yaml.0123abcd .model.previous"
).split()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
@pytest.mark.parametrize("how", ["resume", "overwrite"])
@pytest.mark.parametrize("name", LINKS)
def test_a_link_out_of_a_run_is_never_written_through(name: str, how: str, run: Path) -> None:
    """The run comes from somebody else. The links lead to files and directories of the user."""
    outside = run.parent / "outside"
    link = run / name
    if link.is_dir():
        shutil.copytree(link, outside)
        shutil.rmtree(link)
    else:
        outside.write_text("mine " * 1000)
        link.unlink(missing_ok=True)
    before = {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()}
    link.symlink_to(outside)
    with pytest.raises(
        ValueError,
        match=r"is a symbolic link to .*: copy the run with cp -RL, or move the whole run, because .* itself may be a link",
    ):
        make_trainer(run, resume=how == "resume", overwrite=how == "overwrite").run()
    assert {path: path.read_bytes() for path in (outside, *outside.rglob("*")) if path.is_file()} == before
    assert link.is_symlink()


@pytest.mark.skipif(os.name == "nt", reason="links need a privilege on Windows")
def test_a_run_directory_that_is_a_link_itself_is_used(run: Path) -> None:
    """A user may keep the runs on a larger disk, and read their models through links."""
    (run.parent / "link").symlink_to(run)
    (run / "mine").symlink_to("/etc/passwd")  # not a file that a run writes
    make_trainer(run.parent / "link", change(max_steps=9), resume=True, allow_changed="max_steps").run()
    assert (run / "checkpoints/step-000009").is_dir()


@pytest.mark.skipif(os.name == "nt", reason="hard links of backups")
def test_a_hard_linked_backup_of_a_log_is_not_cut(run: Path) -> None:
    """`cp -al` makes such backups: the two names share one file, so a log that is cut in place is cut in both."""
    os.link(run / "metrics.jsonl", run.parent / "backup.jsonl")
    before = (run.parent / "backup.jsonl").read_bytes()
    make_trainer(run, resume=True).run()
    assert (run.parent / "backup.jsonl").read_bytes() == before


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", [".process", ".lock", "metrics.jsonl", "samples.txt", "checkpoints/latest"])
def test_a_pipe_in_a_run_is_refused(name: str, run: Path) -> None:
    """A process that opens a pipe waits until another process opens its other end, so the run hung."""
    (run / name).unlink(missing_ok=True)
    os.mkfifo(run / name)
    with pytest.raises(
        ValueError, match=rf"{re.escape(name)} is a pipe, socket or device, not a file of a run: remove it"
    ):
        make_trainer(run, resume=True).run()


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no pipes with names here")
@pytest.mark.parametrize("name", ["manifest.json", "state.json", "weights.safetensors"])
def test_a_pipe_in_a_checkpoint_is_damage(name: str, run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = run / "checkpoints/step-000008" / name
    path.unlink()
    os.mkfifo(path)
    with make_trainer(run, resume=True) as trainer:
        assert trainer.step_number == 6
    assert f"{path} is a pipe: it must be an ordinary file" in capsys.readouterr().err


# Missing and damaged files of the user's own run


@pytest.mark.parametrize("early_stop", [None, 1])
@pytest.mark.parametrize("max_steps", [8, 9])
def test_a_run_whose_best_model_was_deleted_saves_the_next_one(
    max_steps: int, early_stop: int | None, run: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The run trained to its end, and then failed because there was no model to restore."""
    shutil.rmtree(run / "model")
    for key, value in (("best_loss", 0.0), ("best_step", 4), ("evaluated_step", 8), ("evals_since_best", 1)):
        change_state(run / "checkpoints/step-000008", key, value=value)
    options = {"max_steps": max_steps, "early_stop": early_stop}
    trainer = make_trainer(run, change(**options), resume=True, allow_changed=list(options))
    assert math.isfinite(trainer.run())
    assert (run / "model/model.safetensors").is_file()
    assert "model is missing, so the model with the next validation loss is saved there" in capsys.readouterr().err


@pytest.mark.parametrize(
    "garbage",
    [
        b"\0" * 512,
        b"{broken}\n",
        b'{"step": 8, "val_loss": "x", "final_val_loss": 1.0}\n',
        b'{"step": -1, "val_loss": 0.0}\n',
    ],
)
def test_a_run_with_damaged_lines_at_the_end_of_its_log_is_extended(garbage: bytes, run: Path) -> None:
    """A power failure leaves such lines."""
    with open(run / "metrics.jsonl", "ab") as file:
        file.write(garbage)
    make_trainer(run, change(max_steps=12), resume=True, allow_changed="max_steps").run()
    assert read_metrics(run)[-1]["step"] == 12


def test_a_damaged_log_does_not_fail_a_run_that_has_finished(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (run / "metrics.jsonl").write_bytes(b"broken\n" + (run / "metrics.jsonl").read_bytes())
    draw_losses(run)
    assert f"loss.png was not drawn, because {run}/metrics.jsonl, line 1 is damaged" in capsys.readouterr().err


def test_a_long_name_of_a_machine_is_shortened(run: Path, capsys: pytest.CaptureFixture[str]) -> None:
    change_state(run / "checkpoints/step-000008", "machine", "torch", value="x" * 5000)
    with make_trainer(run, resume=True):
        pass
    assert f"torch was {'x' * 80} and is" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["a link", "another process", "a changed recipe"])
def test_a_finetuning_that_is_refused_writes_nothing(
    reason: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """split.json was written even though the run had been refused."""
    command = finetune_command(tmp_path)
    run = tmp_path / "run"
    assert main(command) == 0
    (tmp_path / "victim").write_text("mine")
    options = []
    if reason == "a link":
        (run / "split.json").unlink()
        (run / "split.json").symlink_to(tmp_path / "victim")
    elif reason == "a changed recipe":
        options = ["--train_fraction", "0.5"]
    before = {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".process"}
    holder = None
    if reason == "another process":
        from MyGPT.training.directory import lock_directory

        holder = lock_directory(run)
    assert main(["finetune", "--resume", str(run), *options]) == 2
    if holder is not None:
        holder.release()
    assert {path: path.read_bytes() for path in run.rglob("*") if path.is_file() and path.name != ".process"} == before
    assert (tmp_path / "victim").read_text() == "mine"


def finetune_command(place: Path, *options: str) -> list[str]:
    """Return a command for a tiny fine-tuning in `place`/run, after writing its model and its records."""
    records = [{"instruction": f"Say {w} {n} times.", "output": " ".join([w] * n)} for w in "abcd" for n in range(1, 6)]
    (place / "records.json").write_text(json.dumps(records))
    tokenizer = BPETokenizer.train([json.dumps(records)], 300, progress=False)
    sizes = {"context_length": 128, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}
    lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes)).save_pretrained(place / "base", tokenizer)
    sizes_of_run = "--epochs 1 --batch_size 8 --sample_every 0 --device cpu --warmup_steps 0".split()
    where = ["--model", str(place / "base"), "--data", str(place / "records.json"), "--out", str(place / "run")]
    return ["finetune", *where, *sizes_of_run, *options]


# Moved data


def resume(run: Path, *options: str) -> int:
    return main(["train", "--resume", str(run), *options])


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["text file", "files in order", "prepared", "relative"])
def test_the_same_bytes_at_another_path_are_the_same_data(
    kind: str, in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    place = in_tmp_path
    old, new = place / "old", place / "new"
    old.mkdir()
    (old / "a.txt").write_text(TEXT[:900])
    (old / "b.txt").write_text(TEXT[900:2000])
    names = {"text file": ["a.txt"], "relative": ["a.txt"], "files in order": ["b.txt", "a.txt"], "prepared": ["p"]}[
        kind
    ]
    if kind == "prepared":
        prepare([old / "a.txt"], old / "p", TOKENIZER, progress=False)

    def paths(directory: Path) -> str:
        found = [str(directory / name) for name in names]
        return found[0] if len(found) == 1 else json.dumps(found)

    command = train_command(old / "a.txt", place / "run", "--max_steps", "3", "--sample_every", "0")
    command[command.index("--data") + 1] = os.path.relpath(paths(old)) if kind == "relative" else paths(old)
    assert main(command) == 0
    weights = (place / "run/model/model.safetensors").read_bytes()
    old.rename(new)
    capsys.readouterr()
    assert resume(place / "run", "--data", paths(new)) == 0
    assert (place / "run/model/model.safetensors").read_bytes() == weights
    assert str(new) in (place / "run/config.yaml").read_text()
    assert resume(place / "run") == 0


@pytest.mark.slow
def test_other_bytes_need_their_own_key_at_any_path(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """`--allow_changed data` once allowed other texts too."""
    (in_tmp_path / "a.txt").write_text(TEXT[:900])
    assert main(train_command(in_tmp_path / "a.txt", in_tmp_path / "run", "--max_steps", "3")) == 0
    other = TEXT[:400] + "x" + TEXT[401:900]
    (in_tmp_path / "a.txt").write_text(other)
    (in_tmp_path / "b.txt").write_text(other)
    for path in ("a.txt", "b.txt"):
        for options in ([], ["--allow_changed", "data"], ["--allow_changed", "model_content"]):
            capsys.readouterr()
            assert resume(in_tmp_path / "run", "--data", str(in_tmp_path / path), *options) == 2
            assert "data_content: the training data differ" in capsys.readouterr().err
    assert resume(in_tmp_path / "run", "--data", str(in_tmp_path / "b.txt"), "--allow_changed", "data_content") == 0
    assert resume(in_tmp_path / "run") == 0  # the change is part of the run from now on


def test_files_in_another_order_are_other_data(in_tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name, text in (("a.txt", TEXT[:500]), ("b.txt", TEXT[500:1000])):
        (in_tmp_path / name).write_text(text)
    command = train_command(Path("a.txt"), in_tmp_path / "run", "--max_steps", "2", "--sample_every", "0")
    command[command.index("--data") + 1] = '["a.txt", "b.txt"]'
    assert main(command) == 0
    assert resume(in_tmp_path / "run", "--data", '["b.txt", "a.txt"]') == 2
    assert "data_content: the training data differ" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize("options", [[], ["--full"]], ids=["adapter", "full"])
def test_a_base_model_and_records_may_move(
    options: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(finetune_command(tmp_path, *options)) == 0
    for name in ("base", "records.json"):
        (tmp_path / name).rename(tmp_path / f"moved-{name}")
    moved = ["--model", str(tmp_path / "moved-base"), "--data", str(tmp_path / "moved-records.json")]
    assert main(["finetune", "--resume", str(tmp_path / "run"), *moved]) == 0
    weights = tmp_path / "moved-base/model.safetensors"
    if not options:  # With --full, the checkpoint holds all weights.
        tensors = load_file(weights)
        tensors["transformer.ln_f.weight"][0] += 1
        save_file(tensors, weights, metadata={"format": "pt"})
        for allowed in ([], ["--allow_changed", "model"]):
            assert main(["finetune", "--resume", str(tmp_path / "run"), *moved, *allowed]) == 2
            assert "model_content: the frozen weights differ" in capsys.readouterr().err
    config = json.loads((tmp_path / "moved-base/config.json").read_text())
    (tmp_path / "moved-base/config.json").write_text(json.dumps(config | {"n_head": 4}))
    (tmp_path / "again").mkdir()
    (tmp_path / "moved-base").rename(tmp_path / "again/base")
    if options:
        assert main(["finetune", "--resume", str(tmp_path / "run"), "--model", str(tmp_path / "again/base")]) == 2
        assert "model was" in capsys.readouterr().err


# Extending a finished run


def evaluations(run: Path) -> list[tuple[str, int]]:
    names = ("val_loss", "final_val_loss")
    return [(name, record["step"]) for record in read_metrics(run) for name in names if name in record]


def test_an_extended_run_keeps_the_evaluations_of_its_earlier_end(run: Path) -> None:
    before = {key: [r for r in read_metrics(run) if key in r] for key in ("val_loss", "final_val_loss")}
    assert [r["step"] for r in before["val_loss"]] == [4, 8]
    trainer = make_trainer(run, change(max_steps=12), resume=True, allow_changed=["max_steps"])
    trainer.run()
    steps = [step for name, step in evaluations(run) if name == "val_loss"]
    assert steps == [4, 8, 12]
    assert [r for r in read_metrics(run) if "val_loss" in r][:2] == before["val_loss"]
    assert next(r for r in read_metrics(run) if "final_val_loss" in r) == before["final_val_loss"][0]
    assert len([name for name, _ in evaluations(run) if name == "final_val_loss"]) == 2
    assert trainer.best_loss == min(r["val_loss"] for r in read_metrics(run) if "val_loss" in r)
    extended = evaluations(run)
    make_trainer(run, change(max_steps=12), resume=True).run()  # finished again: nothing is lost or doubled
    assert evaluations(run) == extended


def test_data_with_another_vocabulary_are_not_taken_for_damaged_checkpoints(
    in_tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """The characters of other data make another vocabulary, so the weights do not fit, even if other data are allowed."""
    (in_tmp_path / "text.txt").write_text(TEXT)
    (in_tmp_path / "other.txt").write_text(TEXT.upper() + TEXT)
    assert main(train_command(Path("text.txt"), Path("run"), "--max_steps", "4", "--sample_every", "0")) == 0
    allowed = ["--allow_changed", '["data", "data_content"]']
    assert main(["train", "--resume", "run", "--data", "other.txt", *allowed]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert "the weights of step 4 do not fit this model (" in error and "no complete checkpoint" not in error


def test_a_run_cannot_be_shortened_to_less_than_it_has_trained(run: Path) -> None:
    """It trained nothing, and config.yaml then had a last step before the checkpoint's."""
    config = (run / "config.yaml").read_text()
    with pytest.raises(ValueError, match="the run is at step 8 already, so it cannot end at step 3"):
        make_trainer(run, change(max_steps=3), resume=True, allow_changed="max_steps").run()
    assert (run / "config.yaml").read_text() == config


@pytest.mark.parametrize("n_steps", [0, 1, 2])
def test_an_extension_that_is_interrupted_resumes_without_options(n_steps: int, run: Path) -> None:
    """It stops before it writes a checkpoint of its own. The earlier end is neither lost nor doubled."""
    config = change(max_steps=12, checkpoint_every=6)
    with make_trainer(run, config, resume=True, allow_changed=["max_steps", "checkpoint_every"]) as trainer:
        trainer.files.write_first_checkpoint(trainer.snapshot)
        for _ in range(n_steps):
            trainer.step()
            trainer.files.log(trainer.step_number, loss=1.0)
    make_trainer(run, config, resume=True).run()
    assert [step for name, step in evaluations(run) if name == "val_loss"] == [4, 8, 12]
    assert [r["step"] for r in read_metrics(run) if "loss" in r] == list(range(1, 13))


def test_a_run_that_was_stopped_early_can_be_extended(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = change(max_steps=20, eval_every=2, early_stop=2)
    trainer = make_trainer(tmp_path / "run", config)
    losses = iter([1.0, 2.0, 2.0])
    monkeypatch.setattr(trainer, "evaluate", lambda whole=False: 1.0 if whole else next(losses))
    trainer.run()
    assert trainer.step_number == 6
    first = evaluations(tmp_path / "run")
    longer = make_trainer(tmp_path / "run", change(config, early_stop=4), resume=True, allow_changed=["early_stop"])
    monkeypatch.setattr(longer, "evaluate", lambda whole=False: 1.0 if whole else 3.0)
    longer.run()
    assert longer.step_number == 10
    assert evaluations(tmp_path / "run")[:4] == first
    assert [step for name, step in evaluations(tmp_path / "run") if name == "val_loss"] == [2, 4, 6, 8, 10]


@pytest.mark.slow
def test_the_documented_commands_extend_training_and_finetuning(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(TEXT[:900])
    run = tmp_path / "trained"
    assert main(train_command(tmp_path / "a.txt", run, "--max_steps", "3", "--sample_every", "0")) == 0
    assert resume(run, "--max_steps", "5", "--allow_changed", "max_steps") == 0
    assert [step for name, step in evaluations(run) if name == "val_loss"] == [3, 5]
    assert main(finetune_command(tmp_path)) == 0
    tuned = ["finetune", "--resume", str(tmp_path / "run"), "--epochs", "2", "--allow_changed", "epochs"]
    assert main(tuned) == 0
    steps = [step for name, step in evaluations(tmp_path / "run") if name == "val_loss"]
    assert len(steps) == len(set(steps)) == 2


def test_a_kill_while_a_checkpoint_is_replaced_is_undone_before_it_is_read(run: Path) -> None:
    """Extending a run replaces its last checkpoint, which may be the only one."""
    checkpoints = run / "checkpoints"
    for step in ("step-000004", "step-000006"):
        shutil.rmtree(checkpoints / step)
    (checkpoints / "step-000008").rename(checkpoints / ".step-000008.previous")
    from MyGPT.training.checkpoint import has_checkpoint

    assert has_checkpoint(run)
    with make_trainer(run, resume=True) as trainer:
        assert trainer.step_number == 8


def test_headers_of_a_file_in_a_foreign_checkpoint_do_not_fill_the_memory(run: Path) -> None:
    path = run / "checkpoints/step-000008"
    (path / "weights.safetensors").write_bytes(struct.pack("<Q", 1 << 40))
    sign(path)
    assert read_newest(run / "checkpoints")[0].state.step == 6
