"""`mygpt sweep`: train with several settings and seeds, and compare the losses.

Each run is an ordinary run of `mygpt train`, `finetune`, `dpo` or `classify` in a process and a directory of its own. The
directories of the runs are the only state. A repeated command reads them to find out which runs are not finished.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import itertools
import os
import re
import secrets
import statistics
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, as_completed, wait
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import yaml
from filelock import FileLock, Timeout

from MyGPT.commands._child import SECONDS_TO_STOP
from MyGPT.commands._recipe import read_recipe
from MyGPT.commands._run import command_of_recipe
from MyGPT.commands.prepare import MAX_WORKERS, dask_executor
from MyGPT.commands.runs import flatten, is_locked, option_text, summarize, table
from MyGPT.config import require_positive
from MyGPT.evaluation.welch import welch_test
from MyGPT.files import atomic_write, check_output_directory, json_text
from MyGPT.messages import OPTION_SYNONYMS, did_you_mean, error_message, near_path, printable, quote
from MyGPT.progress import progress_bar

MAX_RUNS = 10_000
"""The largest number of runs of a sweep."""
_UNSAFE = re.compile(r"[^\w.+-]+")
"""Characters that the name of a directory does not contain."""
_RESULTS, _PICTURE, _LOCK = "sweep.json", "sweep.png", ".sweep.lock"
_ABSENT = "(not given)"
_FIXED = {
    "seed": "--seeds sets the seeds",
    **dict.fromkeys(("out", "resume", "overwrite", "allow_changed"), "the sweep sets it for each run"),
    **dict.fromkeys(("config", "print_config", "help", "help_all", "text", "file"), "it does not change a training"),
}
"""Options that --vary refuses, with the reasons."""


def sweep(
    *recipe: str,
    out: str,
    vary: str | list[str] | None = None,
    seeds: int = 3,
    workers: int | None = None,
    scheduler: str | None = None,
    command: Literal["train", "finetune", "dpo", "classify"] | None = None,
) -> None:
    """Train with several settings and several seeds, and compare the final validation losses.

    The output directory receives a directory for each run, sweep.json (all results) and sweep.png (the mean losses). The runs
    are ordinary runs: mygpt runs lists them, and --resume continues them. If the command is interrupted or killed, repeat
    it: finished runs are kept, and the others are resumed. More seeds or values can be added in the same way.

    The table shows the mean, the standard deviation and the range of the losses for each setting, and the p-value of
    Welch's t-test against the first setting.

    Examples:
        mygpt sweep recipe.yaml --vary learning_rate=1e-3,3e-3 --seeds 5 --out s
        mygpt sweep runs/book --vary n_layers=2,4 --vary drop_rate=0,0.1 --out grid

    Args:
        recipe: A YAML file with the options of a training command, or the directory of a run, whose options are used.
        out: Directory for the runs and the results.
        vary: An option and its values, separated by commas. Repeat --vary for more options, to train with all combinations.
            A single value replaces the value in the recipe.
        seeds: Number of seeds. The first one is the seed of the recipe, the others follow it. All settings have the same seeds.
        workers: Number of runs at the same time. They share the CPU cores. Default: 1.
        scheduler: Address of a dask scheduler, such as tcp://10.0.0.1:8786. Its workers train, in place of processes on this
            machine. They need the same paths and the same versions of Python and mygpt.
        command: The training command. Default: the command to which the options of the recipe belong.
    """
    if len(recipe) != 1:
        raise ValueError(f"a sweep has one recipe, got {len(recipe)}: {' '.join(map(quote, recipe))}")
    require_positive(seeds=seeds, workers=1 if workers is None else workers)
    if workers is not None and workers > MAX_WORKERS:
        raise ValueError(f"workers must be at most {MAX_WORKERS}, got {workers}")
    if workers is not None and scheduler is not None:
        raise ValueError(
            "workers is the number of runs at the same time on this machine: leave it out with --scheduler"
        )
    path = Path(recipe[0], "config.yaml") if Path(recipe[0]).is_dir() else Path(recipe[0])
    if not path.is_file():
        raise FileNotFoundError(f"there is no recipe {path}{near_path(path)}")
    plan = make_plan(
        path, [read_vary(text) for text in ([vary] if isinstance(vary, str) else vary or [])], seeds, Path(out), command
    )
    directory = Path(out)
    _check_directory(directory)
    directory.mkdir(parents=True, exist_ok=True)
    try:
        lock = FileLock(directory / _LOCK).acquire(timeout=0)
    except Timeout:
        raise ValueError(f"another process runs a sweep in {out}: wait for it, or choose another --out") from None
    with lock:
        _write_recipes(plan)
        reasons = _train(plan, workers or 1, scheduler)
        _report(plan, reasons)


@dataclass(frozen=True)
class Planned:
    """A run of a sweep: its setting, its seed, all its options, and its directory."""

    setting: dict[str, Any]
    """The varied options and their values."""
    seed: int
    recipe: dict[str, Any]
    directory: Path

    @property
    def recipe_file(self) -> Path:
        """The YAML file with the options of this run, beside its directory."""
        return self.directory.with_name(f"{self.directory.name}.yaml")

    @property
    def log(self) -> Path:
        """The file with everything that the run prints, beside its directory."""
        return self.directory.with_name(f"{self.directory.name}.log")

    @property
    def name(self) -> str:
        """The setting and the seed, for messages."""
        return ", ".join([*([label] if (label := setting_label(self.setting)) else []), f"seed {self.seed}"])


@dataclass(frozen=True)
class Plan:
    """The runs of a sweep. Each seed trains all settings before the next seed begins."""

    directory: Path
    command: str
    vary: dict[str, list[Any]]
    settings: list[dict[str, Any]]
    seeds: list[int]
    runs: list[Planned]


def read_vary(text: str) -> tuple[str, list[Any]]:
    """Return the name and the values in an argument of --vary, such as learning_rate=1e-3,3e-3.

    The values are read as in a recipe: 3 is a number, null is None, and [a, b] is one value, a list.
    """
    from jsonargparse import get_loader

    name, _, listed = text.partition("=")
    name = name.strip().removeprefix("--").replace("-", "_")
    problem = "--vary must be an option with values such as learning_rate=1e-3,3e-3"
    if not name or not listed.strip():
        raise ValueError(f"{problem}, got {text!r}")
    try:
        values = get_loader("yaml")(f"[{listed}]")
    except yaml.YAMLError:
        raise ValueError(f"{problem}, got {text!r}") from None
    if "" in values or any(one == other for one, other in itertools.combinations(values, 2)):
        raise ValueError(f"the values of --vary {name} must be different and not empty, got {listed!r}")
    return name, values


def make_plan(
    path: Path, varied: Sequence[tuple[str, list[Any]]], n_seeds: int, out: Path, command: str | None = None
) -> Plan:
    """Return the runs of a sweep over the recipe `path`. All options are checked as the training command checks them.

    Args:
        path: the recipe, a YAML file.
        varied: names of options with their values. An option with a single value has it in all runs.
        n_seeds: the number of seeds.
        out: the directory of the sweep.
        command: the training command, or None to choose it by the options.
    """
    from MyGPT.commands._options import build_arguments, make_parser

    recipe = read_recipe(path)
    if repeated := [name for name, n in Counter(name for name, _ in varied).items() if n > 1]:
        raise ValueError(f"--vary {repeated[0]} is given twice: write all its values after one --vary")
    command = command or command_of_recipe([*recipe, *(name for name, _ in varied)])
    module = importlib.import_module(f"MyGPT.commands.{command}")
    parser = make_parser(command, getattr(module, command))
    known = {action.dest for action in parser._actions}
    for name, _ in varied:
        if name in _FIXED:
            raise ValueError(f"--vary cannot vary {name}: {_FIXED[name]}")
        if name not in known:
            hint = did_you_mean(name, known - {*_FIXED}, OPTION_SYNONYMS)
            raise ValueError(f"--vary {quote(name)}: mygpt {command} has no such option{hint}")
    vary = {name: values for name, values in varied if len(values) > 1}
    common = {name: values[0] for name, values in varied if len(values) == 1}
    settings = [dict(zip(vary, values, strict=True)) for values in itertools.product(*vary.values())]
    if len(settings) * n_seeds > MAX_RUNS:
        raise ValueError(f"a sweep has at most {MAX_RUNS:,} runs, got {len(settings):,} settings with {n_seeds} seeds")
    first_seed = 0
    for setting in settings:
        values = [f"--{name}={option_text(value)}" for name, value in {**common, **setting}.items()]
        options = parser.parse_args(["--config", str(path), *values])
        build_arguments(getattr(module, command), options)
        first_seed = options.seed
    seeds = [first_seed + i for i in range(n_seeds)]
    planned = []
    names = _directory_names(settings)
    for seed, (setting, name) in itertools.product(seeds, zip(settings, names, strict=True)):
        full = copy.deepcopy({key: value for key, value in recipe.items() if key not in ("out", "resume", "overwrite")})
        for option, value in {**common, **setting, "seed": seed}.items():
            _set_option(full, option, value)
        planned.append(Planned(setting, seed, full, out / name / f"seed-{seed}"))
    return Plan(out, command, vary, settings, seeds, planned)


def _set_option(recipe: dict[str, Any], name: str, value: Any) -> None:
    """Set an option in a recipe; lora.r is the key r of the mapping lora."""
    *parents, last = [name] if name in recipe else name.split(".")
    for parent in parents:
        if not isinstance(recipe.get(parent), dict):
            recipe[parent] = {}
        recipe = recipe[parent]
    recipe[last] = value


def setting_label(setting: Mapping[str, Any]) -> str:
    """Return a setting as a text such as "learning_rate 0.001, n_layers 2"."""
    return ", ".join(f"{name} {option_text(value)}" for name, value in setting.items())


def _directory_names(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the name of the directory of each setting, such as learning_rate=0.001,n_layers=2. Without options, it is ".".

    A name that is too long, or equal to another one in spite of other values, is completed by a hash of the values.
    """
    plain = [
        ",".join(f"{name}={_UNSAFE.sub('_', option_text(value))}" for name, value in setting.items()) or "."
        for setting in settings
    ]
    counts = Counter(name.lower() for name in plain)
    names = []
    for name, setting in zip(plain, settings, strict=True):
        if len(name.encode()) > 120 or counts[name.lower()] > 1:
            name = f"{name[:60]}-{hashlib.sha256(json_text(setting).encode()).hexdigest()[:10]}"
        names.append(name)
    return names


def _check_directory(directory: Path) -> None:
    """Raise an error if the directory of a sweep cannot be written, or contains files but no sweep."""
    check_output_directory(directory)
    names = [path.name for path in directory.iterdir()] if directory.exists() else []
    # A killed command may have left the lock, and a temporary file of sweep.json.
    if any(not name.startswith(".") for name in names) and _RESULTS not in names:
        raise FileExistsError(f"{directory} is not empty and holds no sweep: choose another --out")


def _write_recipes(plan: Plan) -> None:
    """Write sweep.json without results, and the recipe of each run that has none yet.

    Raises ValueError, before anything is written, if an earlier sweep has made one of the runs with other options.
    """
    for run in plan.runs:
        if not run.recipe_file.is_file():
            continue
        before, now = flatten(read_recipe(run.recipe_file)), flatten(run.recipe)
        texts = [
            f"{name} was {_text_of(before, name)} and is {_text_of(now, name)}"
            for name in dict.fromkeys([*before, *now])
            if before.get(name, _ABSENT) != now.get(name, _ABSENT)
        ]
        if texts:
            raise ValueError(f"{run.directory} was made with other options: {'; '.join(texts)}; choose another --out")
    if not (plan.directory / _RESULTS).exists():
        _write_json(plan, {})
    for run in plan.runs:
        if not run.recipe_file.is_file():
            run.directory.parent.mkdir(parents=True, exist_ok=True)
            with atomic_write(run.recipe_file) as file:
                yaml.safe_dump(run.recipe, file, sort_keys=False, allow_unicode=True)


def _text_of(recipe: Mapping[str, Any], name: str) -> str:
    return option_text(recipe[name]) if name in recipe else _ABSENT


class _Task(NamedTuple):
    """A training command, as it is sent to a worker."""

    arguments: tuple[str, ...]
    directory: str
    log: str
    marker: str
    """The file whose removal ends the training."""
    place: str
    """The current directory, to which paths in the recipe are relative."""
    threads: int | None
    """The number of CPU threads of torch, unless OMP_NUM_THREADS is set; None keeps the default."""


def _train(plan: Plan, workers: int, scheduler: str | None) -> dict[str, str]:
    """Train all runs that are not finished. Return the reasons of those that failed, by the run's directory."""
    from MyGPT.data.prepare import open_executor

    missing = [run for run in plan.runs if summarize(run.directory).state != "finished"]
    if len(missing) < len(plan.runs):
        _print(f"continuing: {len(plan.runs) - len(missing)} of {len(plan.runs)} runs are finished")
    if not missing:
        return {}
    for old in plan.directory.glob("running-*"):
        old.unlink()  # It belongs to a killed command, whose runs may still train on other machines.
    marker = plan.directory / f"running-{secrets.token_hex(4)}"
    marker.touch()
    threads = None if workers == 1 else max(1, (os.cpu_count() or 1) // workers)
    reasons: dict[str, str] = {}
    is_terminal = sys.stderr is not None and sys.stderr.isatty()  # A file gets a line for each run.
    try:
        with (
            dask_executor(scheduler) as cluster,
            open_executor(cluster, workers, only_threads=True) as (pool, _),
            progress_bar(is_terminal, total=len(plan.runs), initial=len(plan.runs) - len(missing), unit="run") as bar,
        ):
            futures: dict[Future[str], Planned] = {}
            try:
                for run in missing:
                    futures[pool.submit(_run, _task(plan, run, marker, threads, scheduler is not None))] = run
                for future in as_completed(futures):
                    run = futures[future]
                    reason = _reason(future, run)
                    if reason:
                        reasons[str(run.directory)] = reason
                    bar.update()
                    bar.write(f"{run.name}: {reason or _result_text(run)}", file=sys.stderr)
            except BaseException:
                marker.unlink(missing_ok=True)
                _print("stopping: the runs save their checkpoints")
                for future in futures:
                    future.cancel()
                wait(futures, SECONDS_TO_STOP)
                raise
    except KeyboardInterrupt as interrupt:
        n_finished = sum(summarize(run.directory).state == "finished" for run in plan.runs)
        state = f"{n_finished} of {len(plan.runs)} runs are finished; repeat the command to continue"
        interrupt.args = (f"interrupted: {state}",)
        raise
    finally:
        marker.unlink(missing_ok=True)
    return reasons


def _task(plan: Plan, run: Planned, marker: Path, threads: int | None, is_remote: bool) -> _Task:
    directory, recipe, log, mark = (
        str(path.absolute() if is_remote else path) for path in (run.directory, run.recipe_file, run.log, marker)
    )
    # --resume auto starts a run without a checkpoint again. --overwrite allows it to replace the files of the first attempt.
    options = ("--config", recipe, f"--out={directory}", "--resume=auto", "--overwrite=true")
    return _Task((plan.command, *options), directory, log, mark, os.getcwd(), threads)


def _run(task: _Task) -> str:
    """Run a training command in a new process. Return an empty text if it succeeds, and otherwise the reason."""
    deadline = time.monotonic() + SECONDS_TO_STOP
    while is_locked(Path(task.directory)) and time.monotonic() < deadline:
        time.sleep(0.2)  # The run of a killed command is saving its last checkpoint.
    environment = {**({} if task.threads is None else {"OMP_NUM_THREADS": str(task.threads)}), **os.environ}
    marker = Path(task.marker)
    if not marker.exists():
        return "not started"
    with open(task.log, "ab") as log:
        start = log.tell()
        process = subprocess.Popen(
            [sys.executable, "-m", "MyGPT.commands._child", *task.arguments],
            stdin=subprocess.PIPE,  # It is closed when this process ends.
            stdout=log,
            stderr=subprocess.STDOUT,
            cwd=task.place,
            env=environment,
            start_new_session=True,  # Ctrl-C in the terminal reaches only the sweep, which ends its runs.
        )
        asked_at = None
        while True:
            try:
                status = process.wait(0.2)
                break
            except subprocess.TimeoutExpired:
                now = time.monotonic()
                if asked_at is None and not marker.exists():
                    process.terminate()  # The run saves a checkpoint.
                    asked_at = now
                elif asked_at is not None and now > asked_at + SECONDS_TO_STOP:
                    process.kill()
        if process.stdin is not None:
            process.stdin.close()
    if status == 0:
        return ""
    return _failure(Path(task.log), start, status)


def _failure(log: Path, start: int, status: int) -> str:
    """Return why a command failed: its error message, which is the last line that it printed, or the signal."""
    if status < 0:
        advice = "; perhaps the memory was full" if status == -9 else ""
        return f"the process was ended by signal {-status}{advice}"
    lines = log.read_bytes()[start:].decode("utf-8", "replace").strip().splitlines()
    message = lines[-1].strip() if lines else f"the command ended with status {status}"
    return printable(re.sub(r"^mygpt \w+: ", "", message), keep="")


def _reason(future: Future[str], run: Planned) -> str:
    """Return why a run failed, or an empty text if it is finished."""
    try:
        reason = future.result()
    except Exception as error:  # The log cannot be written, or a worker of the cluster was killed. Other runs continue.
        return error_message(error) or type(error).__name__
    if reason:
        return reason
    summary = summarize(run.directory)
    if summary.state != "finished":
        return summary.note or f"{run.directory} is not finished, although the command ended without an error"
    return ""


def _result_text(run: Planned) -> str:
    loss = summarize(run.directory).final_loss
    return "no validation loss" if loss is None else f"final validation loss {loss:.4f}"


def _print(text: str) -> None:
    if sys.stderr is not None:
        print(text, file=sys.stderr, flush=True)


def compare_settings(losses: Sequence[Sequence[float]]) -> list[dict[str, Any]]:
    """Return the statistics of each setting's losses, as sweep.json contains them. The first setting is the reference.

    `sd` is the standard deviation of the sample (n - 1). Values that do not exist, such as the standard deviation of a single
    loss, are None.
    """
    rows = []
    for i, sample in enumerate(losses):
        mean = statistics.fmean(sample) if sample else None
        reference = statistics.fmean(losses[0]) if losses[0] else None
        row: dict[str, Any] = {
            "n": len(sample),
            "mean": mean,
            "sd": statistics.stdev(sample) if len(sample) > 1 else None,
            "min": min(sample, default=None),
            "max": max(sample, default=None),
        }
        if i:
            test = welch_test(losses[0], sample)
            row["difference"] = None if mean is None or reference is None else mean - reference
            row |= dict.fromkeys(("t", "degrees_of_freedom", "p")) if test is None else test._asdict()
        rows.append(row)
    return rows


def _report(plan: Plan, reasons: Mapping[str, str]) -> None:
    """Write sweep.json and sweep.png, print the table, and raise ChildProcessError if runs failed."""
    content = _write_json(plan, reasons)
    rows: list[dict[str, Any]] = content["settings"]
    print("\n".join(_describe(plan, rows)))
    _draw(plan)
    print(f"results: {plan.directory / _RESULTS}")
    if reasons:
        failed = [run for run in plan.runs if str(run.directory) in reasons]
        for run in failed:
            _print(f"{run.name} failed: {reasons[str(run.directory)]} (see {run.log})")
        raise ChildProcessError(
            f"{len(failed)} of {len(plan.runs)} runs failed; repeat the command to try them again when the cause is removed"
        )
    if not any(row["n"] for row in rows):
        raise ValueError(f"{plan.directory}: no run has a validation loss to compare; its recipe needs validation data")


def _write_json(plan: Plan, reasons: Mapping[str, str]) -> dict[str, Any]:
    """Write sweep.json from the files of the runs, and return its content."""
    summaries = [summarize(run.directory) if run.directory.exists() else None for run in plan.runs]
    finished = [
        it.final_loss if it is not None and it.state == "finished" and it.final_loss is not None else None
        for it in summaries
    ]
    runs = [
        {
            "setting": run.setting,
            "seed": run.seed,
            "directory": run.directory.relative_to(plan.directory).as_posix(),
            "state": "stopped" if it is None else it.state,
            "final_val_loss": loss,
            **({"reason": reasons[str(run.directory)]} if str(run.directory) in reasons else {}),
        }
        for run, it, loss in zip(plan.runs, summaries, finished, strict=True)
    ]
    losses = [
        [x for run, x in zip(plan.runs, finished, strict=True) if run.setting == setting and x is not None]
        for setting in plan.settings
    ]
    statistics_ = compare_settings(losses)
    content = {
        "command": plan.command,
        "vary": plan.vary,
        "seeds": plan.seeds,
        "compared": "final_val_loss: the loss of each run's best model on all validation data, in nats per token",
        "settings": [{"setting": one, **row} for one, row in zip(plan.settings, statistics_, strict=True)],
        "runs": runs,
    }
    with atomic_write(plan.directory / _RESULTS) as file:
        file.write(json_text(content, indent=1) + "\n")
    return content


def _describe(plan: Plan, settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the lines of the table, and the sentences that explain it."""

    def number(row: Mapping[str, Any], name: str, form: str = ".4f") -> str:
        value = row.get(name)
        return "–" if value is None else format(value, form)

    has_others = len(settings) > 1
    header = [*plan.vary, "n", "mean", "sd", "min", "max", *(["difference", "p"] if has_others else [])]
    rows = [header]
    for row in settings:
        values = [option_text(row["setting"][name]) for name in plan.vary]
        numbers = [str(row["n"]), *(number(row, name) for name in ("mean", "sd", "min", "max"))]
        others = [number(row, "difference", "+.4f"), _p_text(row.get("p"))] if has_others else []
        rows.append([*values, *numbers, *others])
    lines = ["final validation loss", *table(rows, right=range(len(plan.vary), len(header)))]
    if any(row["n"] < len(plan.seeds) for row in settings):
        lines.append("Some runs have no loss, so their settings are compared by the other seeds.")
    if has_others:
        lines.append("difference, p: to the first setting, by Welch's t-test (two-sided)")
        n_tests = sum(row.get("p") is not None for row in settings)
        if len(plan.seeds) < 2:
            lines.append("One seed shows no spread, so there are no p-values: use --seeds 2 or more.")
        elif n_tests < len(settings) - 1:
            lines.append("Without two different losses per setting, there is no p-value.")
        if n_tests > 1:
            lines.append(
                f"The p-values are not corrected for {n_tests} comparisons (Bonferroni: multiply them by {n_tests})."
            )
    return lines


def _p_text(p: float | None) -> str:
    if p is None:
        return "–"
    return f"{p:.4f}" if p >= 0.0001 else "< 0.0001"


def _draw(plan: Plan) -> None:
    """Draw the mean losses of the settings in sweep.png, and print its path, or why it was not drawn."""
    groups = {
        setting_label(setting): [
            run.directory
            for run in plan.runs
            if run.setting == setting and summarize(run.directory).state == "finished"
        ]
        for setting in plan.settings
    }
    if not any(groups.values()):
        return
    path = plan.directory / _PICTURE
    try:
        from MyGPT.inside.plots import plot_mean_losses, save_figure

        save_figure(plot_mean_losses(groups), path)
        print(f"picture: {path}")
    except ImportError:
        _print(f"{_PICTURE} was not drawn, because matplotlib is not installed: pip install 'mygpt[plots]'")
    except (ValueError, OSError) as error:
        _print(f"{_PICTURE} was not drawn: {error_message(error)}")
