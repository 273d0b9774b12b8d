"""`mygpt runs`: list training runs, or compare two of them."""

from __future__ import annotations

import dataclasses
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from filelock import FileLock, Timeout

from MyGPT.commands._recipe import read_recipe
from MyGPT.commands._run import RUNS, command_of_recipe
from MyGPT.commands.train import DEFAULTS as MODEL_DEFAULTS
from MyGPT.config import GPTConfig
from MyGPT.files import json_text, present_directory, read_json
from MyGPT.messages import error_message, near_path, printable
from MyGPT.training.config import TrainConfig
from MyGPT.training.metrics import read_evaluations, read_metrics
from MyGPT.training.names import CHECKPOINTS, LATEST, LOCK, MANIFEST, PROCESS, STATE

OPTIONAL = ("directories",)
Sort = Literal["date", "loss", "speed", "steps", "name"]
State = Literal["finished", "running", "resumable", "stopped", "failed", "damaged"]
MAX_COMPARED = 12
"""The number of steps whose losses `--diff` prints."""
_MAX_VALUE = 24
"""The number of characters of an option's value that fit into a table."""


def runs(
    *directories: str, sort: Sort = "date", diff: bool = False, plot: str | None = None, json: bool = False
) -> None:
    """List the runs in a directory and in its subdirectories, or compare two runs.

    Each line shows the command that made the run, its state, the steps so far (and the planned ones, if it is not
    finished), the lowest validation loss, the median speed in tokens per second, and the date of the last change. A run is
    finished, running, resumable (--resume continues it), stopped (it has no checkpoint to resume from), failed (its losses
    were not finite) or damaged.

    With --diff, the options that differ and the losses at common steps of two runs are shown.

    Examples:
        mygpt runs --sort loss
        mygpt runs runs/sweep --json
        mygpt runs --diff runs/a runs/b --plot both.png

    Args:
        directories: Directories with runs, or runs. Default: runs, the directory in which commands put runs by default.
        sort: Order of the runs: date (newest first), loss (lowest first), speed or steps (highest first), or name.
        diff: Compare the two runs that are given.
        plot: With --diff, also draw the losses of both runs in this .png, .svg or .pdf file.
        json: Print JSON, with exact values, instead of a table.
    """
    if diff:
        _compare(directories, plot, json)
        return
    if plot is not None:
        raise ValueError("--plot needs --diff; mygpt plot draws the losses of any number of runs")
    for directory in directories or (RUNS,):
        if not Path(directory).is_dir():
            way_out = near_path(directory) if directories else ": name the directory of your runs, or start one first"
            raise FileNotFoundError(f"there is no directory {directory}{way_out}")
    found = sorted({path for directory in directories or (RUNS,) for path in find_runs(Path(directory))})
    summaries = sorted(map(summarize, found), key=_SORT_KEYS[sort])
    if json:
        print(json_text([summary.to_json() for summary in summaries], indent=1))
    elif not summaries:
        print(f"there are no runs in {' or '.join(directories or (RUNS,))}")
    else:
        print("\n".join(describe_runs(summaries)))


@dataclass(frozen=True)
class RunSummary:
    """The state and the results of a run, as far as its files show them."""

    path: Path
    command: str | None
    """The command that made the run; "python" for a Trainer in a program, and None if config.yaml cannot be read."""
    state: State
    step: int
    """The number of steps so far."""
    max_steps: int | None
    """The number of planned steps; None if neither the recipe nor a checkpoint contains it."""
    best_loss: float | None
    """The lowest validation loss so far, on the part of the validation data that each evaluation uses."""
    final_loss: float | None
    """The loss of the best model on all validation data, which a run measures at its end."""
    tokens_per_second: float | None
    """The median of the recorded speeds, in tokens per second."""
    updated: float | None
    """The time of the last change, in seconds since 1970."""
    is_resumable: bool
    note: str
    """The reason why the run failed, or why a part of it cannot be read; otherwise an empty text."""

    def to_json(self) -> dict[str, Any]:
        """Return the values for `mygpt runs --json`."""
        updated = None if self.updated is None else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime(self.updated))
        return {**vars(self), "path": str(self.path), "updated": updated}


def find_runs(directory: Path) -> Iterator[Path]:
    """Yield the runs in `directory`, which may be a run itself, and in its subdirectories.

    Hidden directories and symbolic links are not searched. A directory that cannot be read is reported on stderr.
    """

    def report(error: OSError) -> None:
        print(f"note: {error_message(error)}", file=sys.stderr)

    for parent, directories, files in os.walk(directory, onerror=report):
        if {"metrics.jsonl", PROCESS} & {*files} or CHECKPOINTS in directories:
            yield Path(parent)
            directories.clear()
        directories[:] = [name for name in directories if not name.startswith(".")]


def summarize(run: Path) -> RunSummary:
    """Return the summary of a run. Damaged and missing files give a note, never an error."""
    notes: list[str] = []

    def attempt(read: Callable[[], Any], otherwise: Any) -> Any:
        try:
            return read()
        except (ValueError, OSError) as error:
            notes.append(error_message(error))
            return otherwise

    recipe = attempt(lambda: _read_config(run), None)
    is_running = attempt(lambda: is_locked(run), False)
    has_metrics = (run / "metrics.jsonl").exists()
    records = attempt(lambda: read_metrics(run), None) if has_metrics else []
    if records is None:  # A run can be resumed although some of its lines are damaged.
        records = attempt(lambda: read_evaluations(run), [])
    checkpoint = attempt(lambda: _newest_checkpoint(run), None)
    known = recipe or {}
    max_steps = known.get("max_steps", checkpoint[1] if checkpoint else None)
    max_steps = max_steps if type(max_steps) is int else None
    steps = [record["step"] for record in records if "final_val_loss" not in record]
    step = max([*steps, checkpoint[0] if checkpoint else 0])
    losses, speeds = _numbers(records, "val_loss"), _numbers(records, "tokens_per_second")
    final = _numbers(records, "final_val_loss")
    skipped = _numbers(records, "skipped_steps")
    state: State = "resumable" if checkpoint else "stopped"
    if recipe is None and not is_running:
        state = "damaged"
    elif is_running:
        state = "running"
    elif _is_finished(run, known, records, step, max_steps):
        state = "finished"
    elif skipped and skipped[-1] >= known.get("max_skipped_steps", TrainConfig.max_skipped_steps):
        state = "failed"
        notes.append(f"the loss or the gradient of {skipped[-1]:.0f} steps was not finite")
    return RunSummary(
        path=run,
        command=None if recipe is None else command_of_recipe(recipe) if "data" in recipe else "python",
        state=state,
        step=step,
        max_steps=max_steps,
        best_loss=min(losses, default=None),
        final_loss=final[-1] if final else None,
        tokens_per_second=statistics.median(speeds) if speeds else None,
        updated=_last_change(run),
        is_resumable=checkpoint is not None and state in ("resumable", "failed"),
        note="; ".join(notes),
    )


def _read_config(run: Path) -> dict[str, Any]:
    """Return the options of a run."""
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError("config.yaml is missing")
    return read_recipe(run / "config.yaml")


def _is_finished(
    run: Path, recipe: Mapping[str, Any], records: Sequence[Mapping[str, Any]], step: int, max_steps: int | None
) -> bool:
    """Return True if the run has measured its final loss or, without validation data, has saved its last model."""
    if not records:
        return False
    is_complete = max_steps is None or step >= max_steps or recipe.get("early_stop") is not None
    if any("val_loss" in record for record in records):
        # After an extension, the final loss of the shorter run stays in the middle of the file.
        return is_complete and "final_val_loss" in records[-1]
    models = map(present_directory, (run / "model", run / "adapter"))
    return max_steps is not None and is_complete and any(model.is_dir() for model in models)


def is_locked(run: Path) -> bool:
    """Return True if a process is training in the directory of a run."""
    if not (run / LOCK).is_file():
        return False
    lock = FileLock(run / LOCK, thread_local=False)
    try:
        lock.acquire(timeout=0)
    except Timeout:
        return True
    except OSError:  # The lock of another user's run may be unreadable. No process of this user is training there.
        return False
    lock.release()
    return False


def _newest_checkpoint(run: Path) -> tuple[int, int | None] | None:
    """Return the step and the planned number of steps of the newest checkpoint whose files have their full size.

    Returns None if there is no such checkpoint. Raises ValueError if there are only damaged ones.
    """
    directory = run / CHECKPOINTS
    paths = [path for path in directory.glob("step-*") if path.name[5:].isdecimal()]
    latest = directory / LATEST
    newest = latest.read_bytes().decode("utf-8", "replace").strip() if latest.is_file() else ""
    problem: Exception | None = None
    for path in sorted(paths, key=lambda path: (path.name == newest, int(path.name[5:])), reverse=True):
        try:
            for name, entry in read_json(path / MANIFEST).items():
                if (path / name).stat().st_size != entry["bytes"]:
                    raise ValueError(f"{path / name} is damaged")
            planned = read_json(path / STATE).get("plan", {}).get("max_steps")
            return int(path.name[5:]), planned if type(planned) is int else None
        except (ValueError, OSError) as error:
            problem = problem or error
        except (AttributeError, LookupError, TypeError):
            problem = problem or ValueError(f"{path} is damaged")
    if problem is not None:
        raise problem
    return None


def _numbers(records: Sequence[Mapping[str, Any]], name: str) -> list[float]:
    """Return the finite numbers that the records contain under this name."""
    values: list[Any] = [record.get(name) for record in records]
    return [float(it) for it in values if type(it) in (int, float) and abs(it) < 1e300 and math.isfinite(it)]


def _last_change(run: Path) -> float | None:
    """Return the time of the last change of a run's files, in seconds since 1970, or None if it has none of them."""
    files = [run / "metrics.jsonl", run / "config.yaml", run / PROCESS, run / CHECKPOINTS / LATEST]
    return max((path.stat().st_mtime for path in files if path.is_file()), default=None)


_SORT_KEYS: dict[Sort, Callable[[RunSummary], Any]] = {
    "date": lambda run: (-(run.updated or 0), str(run.path)),
    "loss": lambda run: (math.inf if run.best_loss is None else run.best_loss, str(run.path)),
    "speed": lambda run: (-(run.tokens_per_second or 0), str(run.path)),
    "steps": lambda run: (-run.step, str(run.path)),
    "name": lambda run: str(run.path),
}


def describe_runs(summaries: Sequence[RunSummary]) -> list[str]:
    """Return the lines of the table of runs, followed by their notes."""
    rows = [("kind", "state", "steps", "best loss", "tok/s", "date", "run")]
    for run in summaries:
        steps = str(run.step)
        if run.state != "finished":
            steps += f"/{'?' if run.max_steps is None else run.max_steps}"
        date = "–" if run.updated is None else time.strftime("%Y-%m-%d", time.localtime(run.updated))
        loss = "–" if run.best_loss is None else f"{run.best_loss:.4f}"
        speed = "–" if run.tokens_per_second is None else f"{run.tokens_per_second:.0f}"
        rows.append((run.command or "–", run.state, steps, loss, speed, date, printable(str(run.path), keep="")))
    notes = [f"{run.path}: {run.note}" for run in summaries if run.note]
    return [*table(rows, right=(2, 3, 4)), *([""] if notes else []), *notes]


def table(rows: Sequence[Sequence[str]], right: Sequence[int]) -> list[str]:
    """Return rows of cells as aligned lines. The columns with the indices in `right` are aligned to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            cell.rjust(width) if i in right else cell.ljust(width)
            for i, (cell, width) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def _compare(paths: Sequence[str], plot: str | None, json: bool) -> None:
    """Print which options of two runs differ, and their losses. With `plot`, also draw the losses in this file."""
    if len(paths) != 2:
        raise ValueError(f"--diff compares two runs, got {len(paths)}: mygpt runs --diff runs/a runs/b")
    pair = [Path(path) for path in paths]
    for path in pair:
        if not (path / "config.yaml").is_file():
            raise FileNotFoundError(f"there is no run {path}{near_path(path) or ': it has no config.yaml'}")
    if plot is not None:
        from MyGPT.inside.plots import check_figure_path, require_matplotlib

        check_figure_path(plot)
        require_matplotlib()
    summaries = [summarize(path) for path in pair]
    options = different_options(*(read_recipe(path / "config.yaml") for path in pair))
    kind, losses = common_losses(*pair)
    if json:
        content = {"runs": [summary.to_json() for summary in summaries], "options": options, kind: losses}
        print(json_text(content, indent=1))
    else:
        print("\n".join(_describe_difference(summaries, options, kind, losses)))
    if plot is not None:
        from MyGPT.inside.plots import plot_losses, save_figure

        save_figure(plot_losses(pair), plot)
        print(plot, file=sys.stderr if json else sys.stdout)


def different_options(first: Mapping[str, Any], second: Mapping[str, Any]) -> dict[str, tuple[Any, Any]]:
    """Return the options whose values differ in two recipes, with both values.

    Nested options get names such as lora.r. An option that a recipe lacks has its default value, or None if the command has
    no such option: a run of an earlier version does not contain the options that were added since.
    """
    flat = flatten(first), flatten(second)
    defaults = {
        field.name: field.default
        for kind in (GPTConfig, TrainConfig)
        for field in dataclasses.fields(kind)
        if field.default is not dataclasses.MISSING
    } | MODEL_DEFAULTS
    names = [*flat[0], *(name for name in flat[1] if name not in flat[0])]
    pairs = {name: tuple(recipe.get(name, defaults.get(name)) for recipe in flat) for name in names}
    return {name: (one, other) for name, (one, other) in pairs.items() if one != other}


def flatten(recipe: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Return a recipe without nesting: {"lora": {"r": 8}} becomes {"lora.r": 8}. A mixture of data stays one value."""
    flat: dict[str, Any] = {}
    for name, value in recipe.items():
        is_nested = isinstance(value, dict) and not prefix and name != "data"
        flat.update(flatten(value, f"{name}.") if is_nested else {prefix + name: value})
    return flat


def common_losses(first: Path, second: Path) -> tuple[str, list[tuple[int, float, float]]]:
    """Return a kind of loss and a list of (step, loss of the first run, loss of the second run).

    The validation losses of the steps at which both runs were evaluated are returned or, if there are none, the training
    losses of the steps at which both runs recorded them.
    """
    records = [read_metrics(path) if (path / "metrics.jsonl").is_file() else [] for path in (first, second)]

    def common(name: str) -> list[tuple[int, float, float]]:
        one, other = ({it["step"]: float(it[name]) for it in part if name in it} for part in records)
        return [(step, one[step], other[step]) for step in sorted(one.keys() & other.keys())]

    losses = common("val_loss")
    return ("validation_losses", losses) if losses else ("training_losses", common("loss"))


def _describe_difference(
    summaries: Sequence[RunSummary],
    options: Mapping[str, tuple[Any, Any]],
    kind: str,
    losses: Sequence[tuple[int, float, float]],
) -> list[str]:
    lines = [
        f"{letter}  {run.path} ({run.command or 'unknown'}, {run.state}, step {run.step})"
        for letter, run in zip("AB", summaries, strict=True)
    ]
    lines += [f"   {run.note}" for run in summaries if run.note]
    shown = {name: tuple(map(option_text, pair)) for name, pair in options.items()}
    short = {name: pair for name, pair in shown.items() if max(map(len, pair)) <= _MAX_VALUE}
    if not options:
        lines += ["", "all options are equal"]
    if short:
        lines += ["", *table([("option", "A", "B"), *((name, *pair) for name, pair in short.items())], right=())]
    for name, pair in shown.items():
        if name not in short:
            lines += ["", name, *(f"  {letter}  {value}" for letter, value in zip("AB", pair, strict=True))]
    title = kind.replace("_losses", " loss")
    if not losses:
        return [*lines, "", "the runs have no losses at common steps"]
    count = min(len(losses), MAX_COMPARED)
    chosen = sorted({round(i * (len(losses) - 1) / max(1, count - 1)) for i in range(count)})
    rows = [("step", "A", "B", "B - A")]
    rows += [(str(step), f"{a:.4f}", f"{b:.4f}", f"{b - a:+.4f}") for step, a, b in (losses[i] for i in chosen)]
    best = [run.best_loss for run in summaries]
    final = [run.final_loss for run in summaries]
    for label, (one, other) in (("best", best), ("final", final)):
        if one is not None and other is not None:
            rows.append((label, f"{one:.4f}", f"{other:.4f}", f"{other - one:+.4f}"))
    some = f" ({len(chosen)} of {len(losses)} common steps)" if len(chosen) < len(losses) else ""
    lines += ["", f"{title}{some}", *table(rows, right=(0, 1, 2, 3))]
    if final[0] is not None and final[1] is not None:
        lines.append("final: the loss of the best model on all validation data")
    return lines


def option_text(value: Any) -> str:
    """Return the value of an option as it is written in a recipe."""
    return printable(value if isinstance(value, str) and value else json_text(value, ensure_ascii=False), keep="")
