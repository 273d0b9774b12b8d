"""`mygpt sweep`: the plan, the statistics, the results, and what happens when runs or the command itself are killed."""

from __future__ import annotations

import json
import os
import shutil
import signal
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import yaml

from killing import differences, remains
from MyGPT.cli import main
from MyGPT.commands import sweep
from MyGPT.commands.runs import summarize
from MyGPT.commands.sweep import compare_settings, make_plan, read_vary
from terminal import Terminal
from tiny_runs import TEXT

RECIPE = {
    "data": "book.txt", "context_length": 8, "emb_dim": 8, "n_heads": 2, "n_layers": 1, "batch_size": 4, "max_steps": 6,
    "warmup_steps": 1, "eval_every": 3, "eval_windows": 4, "sample_every": 0, "log_every": 1, "device": "cpu", "seed": 7,
}  # fmt: skip
OPTIONS = ["recipe.yaml", "--vary", "learning_rate=1e-3,3e-3", "--seeds", "2"]


def write_recipe(place: Path, **options: Any) -> None:
    (place / "book.txt").write_text(TEXT)
    (place / "recipe.yaml").write_text(yaml.safe_dump({**RECIPE, **options}))


def in_this_process(task: Any) -> str:
    """Run a training command as `sweep._run` does, but without a new process, which takes seconds to start."""
    assert Path(task.marker).exists()
    return "" if main(list(task.arguments)) == 0 else "it failed"


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a recipe, and a finished sweep in `out`. Tests that change it copy it."""
    place = tmp_path_factory.mktemp("sweep")
    write_recipe(place)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sweep, "_run", in_this_process)
        patch.setattr("MyGPT.commands.train.draw_losses", lambda run: None)
        patch.chdir(place)
        assert main(["sweep", *OPTIONS, "--out", "out"]) == 0
    return place


@pytest.fixture
def place(finished: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the finished sweep, as the current directory. New runs train in this process."""
    monkeypatch.setattr(sweep, "_run", in_this_process)
    monkeypatch.setattr("MyGPT.commands.train.draw_losses", lambda run: None)
    shutil.copytree(finished, tmp_path / "place")
    monkeypatch.chdir(tmp_path / "place")
    return tmp_path / "place"


def results(out: Path) -> dict[str, Any]:
    return json.loads((out / "sweep.json").read_text())


@pytest.mark.parametrize(
    ("text", "name", "values"),
    [
        ("learning_rate=1e-3,3e-3", "learning_rate", [0.001, 0.003]),
        ("--learning-rate=1", "learning_rate", [1]),
        ("early_stop=null,3", "early_stop", [None, 3]),
        ("qkv_bias=true,false", "qkv_bias", [True, False]),
        ("data={a: 0.5, b: 0.5},c.txt", "data", [{"a": 0.5, "b": 0.5}, "c.txt"]),
        ("lora.targets=[c_attn],[c_attn, c_fc]", "lora.targets", [["c_attn"], ["c_attn", "c_fc"]]),
    ],
)
def test_values_are_read_as_in_a_recipe(text: str, name: str, values: list[Any]) -> None:
    assert read_vary(text) == (name, values)


def test_several_options_make_a_grid_with_the_same_seeds(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    varied = [("n_layers", [1, 2]), ("max_steps", [9]), ("learning_rate", [0.001, 0.003])]
    plan = make_plan(tmp_path / "recipe.yaml", varied, 3, Path("out"))
    assert plan.seeds == [7, 8, 9] and len(plan.settings) == 4 and len(plan.runs) == 12
    assert [run.seed for run in plan.runs] == [7] * 4 + [8] * 4 + [9] * 4  # A seed trains all settings before the next.
    last = plan.runs[-1]
    assert last.setting == {"n_layers": 2, "learning_rate": 0.003}
    assert last.directory == Path("out/n_layers=2,learning_rate=0.003/seed-9")
    assert last.recipe == {**RECIPE, "n_layers": 2, "learning_rate": 0.003, "max_steps": 9, "seed": 9}
    assert make_plan(tmp_path / "recipe.yaml", [], 2, Path("out")).runs[1].directory == Path("out/seed-8")


@pytest.mark.slow
def test_nested_options_of_other_commands_can_be_varied(tmp_path: Path) -> None:
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("model: gpt2\ndata: records.json\nlora: {alpha: 16}\n")
    plan = make_plan(recipe, [("lora.r", [4, 8])], 1, Path("out"))
    assert plan.command == "finetune"
    assert plan.runs[1].recipe["lora"] == {"alpha": 16, "r": 8} and plan.runs[1].setting == {"lora.r": 8}
    assert plan.runs[0].seed == 1337  # the default of the command


def test_names_of_directories_are_safe_and_differ(tmp_path: Path) -> None:
    write_recipe(tmp_path)
    values = ["a/b", "a b", "../x", "y" * 200, "$(z)"]
    plan = make_plan(tmp_path / "recipe.yaml", [("sample_prompt", values)], 1, Path("out"))
    names = {run.directory.parent.name for run in plan.runs}
    assert len(names) == 5 and all(len(name) <= 120 for name in names)
    assert all(
        run.directory.parent.parent == Path("out") and set("/$ ()").isdisjoint(name)
        for run in plan.runs
        for name in names
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--vary lr=1,2", "--vary lr: mygpt train has no such option; did you mean learning_rate?"),
        ("--vary model.n_layers=1,2", "has no such option; did you mean n_layers?"),
        ("--vary learning_rate=1e-3,fast", "--learning_rate must be a number, got 'fast'"),
        ("--vary learning_rate=1e-3,1e-5", "min_learning_rate must be at most learning_rate, got 0.0001 and 1e-05"),
        ("--vary n_heads=2,3", "emb_dim must be divisible by n_heads"),
        ("--vary seed=1,2", "--vary cannot vary seed: --seeds sets the seeds"),
        ("--vary out=a,b", "--vary cannot vary out: the sweep sets it for each run"),
        ("--vary n_layers=1,1", "the values of --vary n_layers must be different"),
        ("--vary n_layers=", "--vary must be an option with values such as learning_rate=1e-3,3e-3"),
        ("--vary n_layers=[1", "--vary must be an option with values"),
        ("--vary n_layers=1 --vary n_layers=2", "--vary n_layers is given twice"),
        ("--vary", "--vary needs a value"),
        ("--seeds 0", "seeds must be a whole number of at least 1, got 0"),
        ("--seeds 20000", "a sweep has at most 10,000 runs"),
        ("--workers 2 --scheduler tcp://127.0.0.1:1", "leave it out with --scheduler"),
        ("--command dpo", "unknown option --context_length"),
    ],
)
def test_mistakes_are_found_before_anything_is_written(place: Path, capsys: Any, options: str, message: str) -> None:
    assert main(["sweep", "recipe.yaml", "--out", "new", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1
    assert not Path("new").exists()


def test_other_files_and_other_options_are_refused(place: Path, capsys: Any) -> None:
    write_recipe(place, batch_size=8)
    assert main(["sweep", *OPTIONS, "--out", "out"]) == 2
    assert "was made with other options: batch_size was 4 and is 8; choose another --out" in capsys.readouterr().err
    Path("other").mkdir()
    Path("other/file").touch()
    assert main(["sweep", *OPTIONS, "--out", "other"]) == 2
    assert "other is not empty and holds no sweep" in capsys.readouterr().err
    assert main(["sweep", "recipe.yml", "--out", "new"]) == 2
    assert "there is no recipe recipe.yml; did you mean recipe.yaml?" in capsys.readouterr().err


def test_the_results_are_those_of_the_runs(finished: Path) -> None:
    out = finished / "out"
    content = results(out)
    assert content["vary"] == {"learning_rate": [0.001, 0.003]} and content["seeds"] == [7, 8]
    by_setting: dict[float, list[float]] = {}
    for run in content["runs"]:
        summary = summarize(out / run["directory"])
        assert (summary.state, summary.command) == (run["state"], "train") == ("finished", "train")
        assert run["final_val_loss"] == summary.final_loss
        config = yaml.safe_load((out / run["directory"] / "config.yaml").read_text())
        assert (config["seed"], config["learning_rate"]) == (run["seed"], run["setting"]["learning_rate"])
        by_setting.setdefault(config["learning_rate"], []).append(run["final_val_loss"])
    for row in content["settings"]:
        losses = by_setting[row["setting"]["learning_rate"]]
        assert (row["n"], row["mean"]) == (2, statistics.fmean(losses)) and row["sd"] == statistics.stdev(losses)
        assert [row["min"], row["max"]] == sorted(losses)
    assert sorted(path.name for path in out.iterdir()) == [
        ".sweep.lock", "learning_rate=0.001", "learning_rate=0.003", "sweep.json", "sweep.png",
    ]  # fmt: skip


def test_a_repeated_command_trains_nothing_and_prints_the_table(
    place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sweep, "_run", None)
    before = results(place / "out")
    assert main(["sweep", *OPTIONS, "--out", "out"]) == 0
    printed = capsys.readouterr()
    assert "continuing: 4 of 4 runs are finished" in printed.err
    lines = printed.out.splitlines()
    assert lines[1].split() == ["learning_rate", "n", "mean", "sd", "min", "max", "difference", "p"]
    assert lines[2].split()[:2] == ["0.001", "2"] and max(map(len, lines)) <= 80
    assert "significant" not in printed.out and results(place / "out") == before


@pytest.mark.slow
def test_seeds_and_values_can_be_added(place: Path, capsys: Any) -> None:
    options = ["recipe.yaml", "--vary", "learning_rate=1e-3,3e-3,1e-2", "--seeds", "3", "--out", "out"]
    assert main(["sweep", *options]) == 0
    printed = capsys.readouterr()
    assert "continuing: 4 of 9 runs are finished" in printed.err
    assert "The p-values are not corrected for 2 comparisons (Bonferroni: multiply them by 2)." in printed.out
    assert [row["n"] for row in results(place / "out")["settings"]] == [3, 3, 3]


def test_one_seed_has_no_p_value(place: Path, capsys: Any) -> None:
    assert main(["sweep", "recipe.yaml", "--vary", "learning_rate=1e-3,3e-3", "--seeds", "1", "--out", "out"]) == 0
    assert "One seed shows no spread, so there are no p-values: use --seeds 2 or more." in capsys.readouterr().out
    assert results(place / "out")["settings"][1]["p"] is None


def test_without_validation_data_there_is_nothing_to_compare(place: Path, capsys: Any) -> None:
    assert main(["sweep", "recipe.yaml", "--vary", "val_fraction=0", "--seeds", "1", "--out", "new"]) == 2
    printed = capsys.readouterr()
    assert "no run has a validation loss to compare" in printed.err and "seed 7: no validation loss" in printed.err


@pytest.mark.slow
def test_a_failed_run_does_not_stop_the_others(place: Path, capsys: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(task: Any) -> str:
        if "seed-8" in task.directory and "0.003" in task.directory:
            raise OSError("the disk is full")
        return in_this_process(task)

    monkeypatch.setattr(sweep, "_run", fail)
    assert main(["sweep", *OPTIONS, "--out", "new"]) == 2
    printed = capsys.readouterr()
    lines = printed.err.splitlines()
    assert lines[-2].startswith("learning_rate 0.003, seed 8 failed: the disk is full (see new/")
    assert lines[-1] == (
        "mygpt sweep: 1 of 4 runs failed; repeat the command to try them again when the cause is removed"
    )
    assert "Some runs have no loss, so their settings are compared by the other seeds." in printed.out
    content = results(place / "new")
    assert [row["n"] for row in content["settings"]] == [2, 1]
    assert [run.get("reason") for run in content["runs"]] == [None, None, None, "the disk is full"]
    monkeypatch.setattr(sweep, "_run", in_this_process)
    assert main(["sweep", *OPTIONS, "--out", "new"]) == 0
    assert results(place / "new")["settings"] == results(place / "out")["settings"]


def test_two_sweeps_do_not_share_a_directory(place: Path, capsys: Any) -> None:
    from filelock import FileLock

    with FileLock("out/.sweep.lock"):
        assert main(["sweep", *OPTIONS, "--out", "out"]) == 2
    assert "another process runs a sweep in out" in capsys.readouterr().err


def test_the_statistics_are_those_of_scipy() -> None:
    stats = pytest.importorskip("scipy.stats")
    losses = [[1.43, 1.44, 1.42, 1.47], [1.40, 1.41, 1.45], [1.52]]
    first, second, third = compare_settings(losses)
    expected = stats.ttest_ind(losses[1], losses[0], equal_var=False)
    assert "p" not in first and first["sd"] == pytest.approx(stats.tstd(losses[0]))
    assert second["p"] == pytest.approx(expected.pvalue, rel=1e-10)
    assert second["t"] == pytest.approx(expected.statistic, rel=1e-10)
    assert second["degrees_of_freedom"] == pytest.approx(expected.df, rel=1e-10)
    assert second["difference"] == pytest.approx(statistics.fmean(losses[1]) - statistics.fmean(losses[0]))
    assert third["sd"] is None and third["p"] is None and third["difference"] == pytest.approx(0.08)


def test_the_picture_has_a_curve_and_a_band_for_each_setting(finished: Path) -> None:
    pytest.importorskip("matplotlib")
    from MyGPT.inside.plots import plot_mean_losses

    out = finished / "out"
    groups = {rate: sorted((out / f"learning_rate={rate}").glob("seed-?")) for rate in ("0.001", "0.003")}
    axes = plot_mean_losses(groups).axes[0]
    for line, band, runs in zip(axes.lines, axes.collections, groups.values(), strict=True):
        losses = [[record["val_loss"] for record in sweep_records(run) if "val_loss" in record] for run in runs]
        means = [statistics.fmean(pair) for pair in zip(*losses, strict=True)]
        assert line.get_xdata().tolist() == [3, 6] and line.get_ydata() == pytest.approx(means)
        deviation = statistics.stdev(loss[0] for loss in losses)
        heights = sorted(y for x, y in band.get_paths()[0].vertices if x == 3)
        assert (heights[0], heights[-1]) == pytest.approx((means[0] - deviation, means[0] + deviation))
    assert [text.get_text() for text in axes.get_legend().get_texts()] == ["0.001 (n = 2)", "0.003 (n = 2)"]


def sweep_records(run: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


# These tests start the processes of a sweep, each of which imports torch.


@pytest.fixture
def real(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    write_recipe(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "MyGPT", "sweep", "recipe.yaml", "--out", "out", *options]


@pytest.mark.slow
def test_the_run_equals_that_of_mygpt_train(real: Path) -> None:
    """Weights, optimizer and random states, records and samples are equal, bit by bit, to a run by hand."""
    options = ["--vary", "n_layers=2", "--vary", "drop_rate=0.2", "--seeds", "1", "--workers", "1"]
    assert main(["sweep", "recipe.yaml", *options, "--out", "out"]) == 0
    assert main(["train", "--config", "recipe.yaml", "--n_layers", "2", "--drop_rate", "0.2", "--out", "hand"]) == 0
    made, hand = real / "out/seed-7", real / "hand"
    assert differences(remains(made), remains(hand)) == []
    assert (made / "config.yaml").read_bytes() == (hand / "config.yaml").read_bytes()


@pytest.mark.slow
def test_a_killed_sweep_loses_nothing(real: Path) -> None:
    """The sweep is killed, then stopped by Ctrl-C in a terminal. The run ends as if nothing had happened."""
    write_recipe(real, max_steps=1500, eval_every=500, checkpoint_every=50, drop_rate=0.1)
    run, deadline = real / "out/seed-7", time.monotonic() + 120
    first = subprocess.Popen(command("--seeds", "1"), stderr=subprocess.DEVNULL)
    while not list(run.glob("checkpoints/step-000050")):
        assert time.monotonic() < deadline and first.poll() is None
        time.sleep(0.02)
    first.kill()
    first.wait()
    terminal = Terminal(command("--seeds", "1"))  # It waits until the first run has saved its checkpoint.
    terminal.wait_until(lambda: "stopped at step" in (real / "out/seed-7.log").read_text(), 120)
    step = summarize(run).step
    terminal.wait_until(lambda: summarize(run).step >= step + 100, 120)
    terminal.type("\x03")
    assert terminal.end() == 130
    assert b"0 of 1 runs are finished; repeat the command to continue" in terminal.received
    assert b"Traceback" not in terminal.received
    assert summarize(run).state == "resumable" and step + 100 <= summarize(run).step < 1500
    assert main(["sweep", "recipe.yaml", "--seeds", "1", "--out", "out"]) == 0
    text = (real / "out/seed-7.log").read_text()
    assert text.count("stopped at step") == 2 and "Traceback" not in text
    assert main(["train", "--config", "recipe.yaml", "--out", "hand"]) == 0
    assert differences(remains(run), remains(real / "hand")) == []


@pytest.mark.slow
def test_a_killed_run_is_reported_and_the_others_go_on(real: Path) -> None:
    write_recipe(real, max_steps=100_000, checkpoint_every=50)
    process = subprocess.Popen(
        command("--vary", "max_steps=100000,5", "--seeds", "1"), stderr=subprocess.PIPE, text=True
    )
    run, deadline = real / "out/max_steps=100000/seed-7", time.monotonic() + 120
    while not (run / "checkpoints/step-000050").exists():
        assert time.monotonic() < deadline and process.poll() is None
        time.sleep(0.02)
    os.kill(int((run / ".process").read_text().split()[1]), signal.SIGKILL)
    _, errors = process.communicate()
    assert process.returncode == 2
    assert "max_steps 100000, seed 7 failed: the process was ended by signal 9; perhaps the memory was full" in errors
    assert [row["n"] for row in results(real / "out")["settings"]] == [0, 1]


@pytest.mark.slow
def test_the_reason_of_a_failure_is_its_error_message(real: Path, capsys: Any) -> None:
    (real / "book.txt").unlink()
    assert main(["sweep", "recipe.yaml", "--seeds", "1", "--out", "out"]) == 2
    errors = capsys.readouterr().err
    assert "seed 7 failed: " in errors and "book.txt" in errors and "mygpt train:" not in errors
    assert (real / "out/seed-7.log").read_text().startswith("mygpt train: ")


@pytest.mark.slow
def test_the_workers_of_a_dask_cluster_train(real: Path) -> None:
    distributed = pytest.importorskip("distributed")
    with distributed.LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=None) as cluster:
        options = ["sweep", *OPTIONS[:-1], "1", "--scheduler", cluster.scheduler_address]
        assert main([*options, "--out", "out"]) == 0
    assert [row["n"] for row in results(real / "out")["settings"]] == [1, 1]
