"""`mygpt runs`: the table, the states of damaged and unfinished runs, and the comparison of two runs."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from typing import Any

import pytest
import yaml

from MyGPT.cli import main
from MyGPT.commands.runs import RunSummary, different_options, find_runs, summarize
from MyGPT.inside.plots import distinct_names
from MyGPT.training.directory import lock_directory
from MyGPT.training.metrics import read_metrics
from MyGPT.training.trainer import Trainer
from terminal import run_in_terminal
from tiny_runs import (
    QUICK,
    change,
    classify_command,
    dpo_command,
    finetune_command,
    make_trainer,
)


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with two finished runs of a Trainer. Tests that change it copy it."""
    place = tmp_path_factory.mktemp("runs")
    for name, config in {"a": QUICK, "b": change(learning_rate=0.003, seed=5, early_stop=9)}.items():
        make_trainer(place / name, config).run()
    return place


@pytest.fixture
def runs(finished: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(finished, tmp_path / "runs"))


def listed(directory: Path, capsys: Any, *options: str) -> list[dict[str, Any]]:
    assert main(["runs", str(directory), "--json", *options]) == 0
    return json.loads(capsys.readouterr().out)


def interrupted(run: Path, steps: int, **options: Any) -> Trainer:
    """Take some steps of a run, write a checkpoint, and leave the directory as after a kill."""
    trainer = make_trainer(run, **options)
    with trainer:
        for _ in range(steps):
            trainer.step()
        trainer.files.writer.write(trainer.snapshot)
    return trainer


def test_the_results_are_those_of_the_run(runs: Path, capsys: Any) -> None:
    first, second = listed(runs, capsys, "--sort", "name")
    records = read_metrics(runs / "a")
    losses = {record["step"]: record["val_loss"] for record in records if "val_loss" in record}
    speeds = sorted(record["tokens_per_second"] for record in records if "tokens_per_second" in record)
    assert first["path"] == str(runs / "a") and second["path"] == str(runs / "b")
    assert first["best_loss"] == min(losses.values())
    assert first["final_loss"] == records[-1]["final_val_loss"]
    assert speeds[3] <= first["tokens_per_second"] <= speeds[4] and len(speeds) == 8
    assert (first["state"], first["step"], first["max_steps"]) == ("finished", 8, 8)
    assert first["command"] == "python" and first["is_resumable"] is False and first["note"] == ""


def test_runs_are_sorted(runs: Path, capsys: Any) -> None:
    os.utime(runs / "a" / "metrics.jsonl", (2e9, 2e9))
    interrupted(runs / "c", 2)
    by = {
        order: [Path(run["path"]).name for run in listed(runs, capsys, "--sort", order)] for order in ("date", "steps")
    }
    assert by == {"date": ["a", "c", "b"], "steps": ["a", "b", "c"]}
    losses = [run["best_loss"] for run in listed(runs, capsys, "--sort", "loss")]
    assert losses[:2] == sorted(losses[:2]) and losses[2] is None
    speeds = [run["tokens_per_second"] or 0 for run in listed(runs, capsys, "--sort", "speed")]
    assert speeds == sorted(speeds, reverse=True)


def test_the_table_fits_a_terminal(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    interrupted(runs / "20251128-041700", 3)
    assert main(["runs"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["kind", "state", "steps", "best", "loss", "tok/s", "date", "run"]
    assert len(lines) == 4 and max(map(len, lines)) <= 80
    assert "python  resumable    3/8          –      –" in lines[1] and lines[1].endswith("  runs/20251128-041700")


@pytest.mark.parametrize(
    ("damage", "state", "note"),
    [
        ("config.yaml: - x", "damaged", "is not a recipe"),
        ("config.yaml", "damaged", "config.yaml is missing"),
        ("metrics.jsonl: {}", "resumable", "line 1 is damaged"),
        ("metrics.jsonl", "resumable", ""),
        ("model", "finished", ""),
        ("checkpoints", "finished", ""),
    ],
)
def test_damaged_runs_have_one_note(runs: Path, capsys: Any, damage: str, state: str, note: str) -> None:
    name, has_content, content = damage.partition(": ")
    path = runs / "a" / name
    shutil.rmtree(path) if path.is_dir() else path.unlink()
    if has_content:
        path.write_text("{half\n" + content + "\n" if name == "metrics.jsonl" else content)
    run = listed(runs / "a", capsys)[0]
    assert run["state"] == state and note in run["note"]
    assert main(["runs", str(runs)]) == 0
    text = capsys.readouterr().out
    assert text.count(f"{runs / 'a'}: ") == bool(note)


@pytest.mark.parametrize("left", [".process", ".process config.yaml", "config.yaml metrics.jsonl", "checkpoints"])
def test_half_written_runs_never_fail(runs: Path, capsys: Any, left: str) -> None:
    for path in (runs / "a").iterdir():
        if path.name not in left.split():
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    run = listed(runs / "a", capsys)[0]
    assert run["state"] in ("stopped", "damaged", "finished") and not run["is_resumable"]


def test_damaged_checkpoints_are_not_resumable(tmp_path: Path) -> None:
    interrupted(tmp_path / "run", 3)
    assert summarize(tmp_path / "run").is_resumable
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/weights.safetensors"):
        os.truncate(path, path.stat().st_size // 2)
    run = summarize(tmp_path / "run")
    assert (run.state, run.is_resumable) == ("stopped", False) and "weights.safetensors is damaged" in run.note
    for path in (tmp_path / "run" / "checkpoints").glob("step-*/manifest.json"):
        path.write_text("[1]")
    assert "is damaged" in summarize(tmp_path / "run").note


def test_a_run_is_running_while_its_directory_is_locked(tmp_path: Path) -> None:
    run = tmp_path / "run"
    interrupted(run, 3)
    assert (summarize(run).state, summarize(run).step) == ("resumable", 3)
    lock = lock_directory(run)
    assert (summarize(run).state, summarize(run).is_resumable) == ("running", False)
    lock.release()
    make_trainer(run, resume=True).run()
    assert (summarize(run).state, summarize(run).step) == ("finished", 8)
    # The final loss of the first 8 steps stays in the file.
    trainer = make_trainer(run, change(max_steps=12), resume=True, allow_changed="max_steps")
    with trainer:
        pass
    assert (summarize(run).state, summarize(run).step, summarize(run).max_steps) == ("resumable", 8, 12)


def test_a_run_without_validation_data_finishes(tmp_path: Path) -> None:
    make_trainer(tmp_path / "run", val=None).run()
    run = summarize(tmp_path / "run")
    assert (run.state, run.best_loss, run.final_loss) == ("finished", None, None)


def test_a_run_that_diverged_has_failed(tmp_path: Path) -> None:
    trainer = make_trainer(tmp_path / "run", change(max_skipped_steps=2, learning_rate=1.0))
    with pytest.raises(FloatingPointError), trainer:
        trainer.model.transformer.ln_f.weight.data[0] = float("nan")
        trainer.run()
    run = summarize(tmp_path / "run")
    assert run.state == "failed" and run.note == "the loss or the gradient of 2 steps was not finite"


def test_hidden_directories_links_and_recipes_are_not_runs(runs: Path) -> None:
    (runs / ".hidden").mkdir()
    shutil.copytree(runs / "a", runs / ".hidden" / "a")
    (runs / "link").symlink_to(runs / "a")
    (runs / "recipes").mkdir()
    (runs / "recipes" / "config.yaml").write_text("max_steps: 3\n")
    assert sorted(find_runs(runs)) == [runs / "a", runs / "b"]
    assert list(find_runs(runs / "a")) == [runs / "a"]


@pytest.mark.slow
def test_the_runs_of_all_commands_are_listed(tmp_path: Path, capsys: Any) -> None:
    commands = {"finetune": finetune_command, "dpo": dpo_command, "classify": classify_command}
    for name, make in commands.items():
        assert main(make(tmp_path, tmp_path / "runs" / name)) == 0
    capsys.readouterr()
    found = listed(tmp_path / "runs", capsys)
    assert {run["command"] for run in found} == set(commands)
    for run in found:
        assert run["state"] == "finished" and run["step"] == run["max_steps"] > 0
        assert run["best_loss"] > 0 and run["tokens_per_second"] > 0
        # The recipe has epochs, so only the checkpoint knows the number of steps.
        assert "max_steps" not in yaml.safe_load((Path(run["path"]) / "config.yaml").read_text())


def test_an_error_is_one_line(runs: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(runs.parent)
    for arguments, message in {
        "rnus": "there is no directory rnus; did you mean runs?",
        "runs --plot x.png": "--plot needs --diff",
        "--diff runs/a": "--diff compares two runs, got 1",
        "--diff runs/a runs/d": "there is no run runs/d",
        "runs --sort size": "--sort must be date, loss, speed, steps or name",
        "--diff runs/a runs/b --plot x.gif": "must end with .png, .svg or .pdf",
    }.items():
        assert main(["runs", *arguments.split()]) == 2
        error = capsys.readouterr().err
        assert message in error and error.count("\n") == 1
    shutil.rmtree(runs)
    assert main(["runs"]) == 2
    assert "there is no directory runs: name the directory of your runs" in capsys.readouterr().err
    runs.mkdir()
    assert main(["runs"]) == 0
    assert capsys.readouterr().out == "there are no runs in runs\n"


def test_the_comparison_shows_options_and_losses(runs: Path, capsys: Any) -> None:
    assert main(["runs", "--diff", str(runs / "a"), str(runs / "b")]) == 0
    lines = capsys.readouterr().out.splitlines()
    rows = [line.split() for line in lines]
    assert max(map(len, lines[2:])) <= 80
    assert (
        ["learning_rate", "0.001", "0.003"] in rows
        and ["seed", "1337", "5"] in rows
        and ["early_stop", "null", "9"] in rows
    )
    a, b = (
        {record["step"]: record["val_loss"] for record in read_metrics(runs / name) if "val_loss" in record}
        for name in "ab"
    )
    for step in (4, 8):
        assert [str(step), f"{a[step]:.4f}", f"{b[step]:.4f}", f"{b[step] - a[step]:+.4f}"] in rows
    assert [row[0] for row in rows if len(row) == 4 and row[0] in ("best", "final")] == ["best", "final"]


def test_the_comparison_is_also_json_and_a_picture(runs: Path, capsys: Any) -> None:
    pytest.importorskip("matplotlib")
    picture = runs.parent / "both.svg"
    assert main(["runs", "--diff", str(runs / "a"), str(runs / "b"), "--json", "--plot", str(picture)]) == 0
    content = json.loads(capsys.readouterr().out)
    assert content["options"] == {"learning_rate": [0.001, 0.003], "early_stop": [None, 9], "seed": [1337, 5]}
    assert [step for step, _, _ in content["validation_losses"]] == [4, 8]
    assert picture.read_text().count('<g id="line2d') > 4


def test_a_missing_option_has_its_default() -> None:
    """A run of an earlier version lacks the options that were added since."""
    assert different_options({"muon_momentum": 0.95}, {}) == {}
    assert different_options({"emb_dim": 64}, {}) == {"emb_dim": (64, 128)}
    assert different_options({"lora": {"r": 8, "alpha": 16}}, {"lora": {"r": 4, "alpha": 16}}) == {"lora.r": (8, 4)}
    mixtures = {"data": {"web": 0.5, "code": 0.5}}, {"data": "book.txt"}
    assert different_options(*mixtures) == {"data": (mixtures[0]["data"], "book.txt")}


def test_long_values_are_not_cut(runs: Path, capsys: Any) -> None:
    config = runs / "a" / "config.yaml"
    config.write_text(config.read_text() + f"data: {'long/' * 20}\n")
    assert main(["runs", "--diff", str(runs / "a"), str(runs / "b")]) == 0
    assert f"\ndata\n  A  {'long/' * 20}\n  B  null\n" in capsys.readouterr().out


def test_names_of_runs_differ_in_a_legend() -> None:
    assert distinct_names(["x/a/seed-1", "x/b/seed-1", "x/b/seed-2"]) == ["a/seed-1", "b/seed-1", "b/seed-2"]
    assert distinct_names(["x/a", "x/b"]) == ["a", "b"]
    assert distinct_names(["x/a", "x/a"]) == ["a", "a"]


def test_a_summary_is_strict_json(tmp_path: Path) -> None:
    run = RunSummary(tmp_path, None, "damaged", 0, None, None, None, None, None, False, "x")
    assert json.loads(json.dumps(run.to_json(), allow_nan=False))["path"] == str(tmp_path)


@pytest.mark.slow
def test_names_of_others_cannot_control_the_terminal(runs: Path) -> None:
    import sys

    shutil.copytree(runs / "a", runs / "\x1b[2Jred")
    status, output = run_in_terminal([sys.executable, "-m", "MyGPT", "runs", str(runs)])
    assert status == 0 and b"\\x1b[2Jred" in output and b"\x1b[2J" not in output
