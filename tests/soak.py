"""Kills commands seventy times at random moments and compares their results with undisturbed ones (`make soak`).

Every second kill is aimed at a function that writes files (killing.MOMENTS); the others come at a random time. For each
task the table shows how many kills hit a running process, how often the command was started, and in how many parts
(weights, optimizer and random states, losses, samples, or files) the result differs. There must be no differences and no
unfinished files.
"""

from __future__ import annotations

import argparse
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any

from http_server import CONTENT, file, serving, status
from killing import MOMENTS, Kill, differences, leftovers, remains, run
from MyGPT.weights import released
from texts import OPENAI_FILES
from tiny_runs import RECIPES, TEXT, classify_command, dpo_command, finetune_command, train_command

FILE_MOMENTS = ("fsync", "rename", "replace", "rmtree")
SIZE = "355M"
"""The released model that the server has. Its data file has only as many bytes as CONTENT."""


@dataclass(frozen=True)
class Task:
    """A command that is killed and started again until it is done."""

    command: Callable[[Path], list[str]]
    """Returns the command line for an output directory."""
    result: Callable[[Path], dict[str, Any]] = remains
    """Returns the parts of the result in the output directory."""
    moments: tuple[str, ...] = MOMENTS
    longest: int = 700
    """A timed kill comes at most this many milliseconds after the start."""
    in_merge: bool = False
    """Every third kill comes while the adapter is merged."""
    before: Callable[[], None] | None = None
    """A function that the process calls first."""
    does_nothing_when_done: bool = False
    """A further start of the finished command would end at once, so its output is removed first."""


def make_small_model() -> None:
    released.DATA_BYTES[SIZE] = len(CONTENT)


def all_files(directory: Path) -> dict[str, Any]:
    """Return the content of each file, except lists of downloads, which contain times."""
    paths = (path for path in directory.rglob("*") if path.is_file() and not path.name.startswith(".downloads"))
    return {str(path.relative_to(directory)): path.read_bytes() for path in paths}


def answer(handler: BaseHTTPRequestHandler) -> None:
    """Send OpenAI's files slowly, so that kills come while a file arrives."""
    name = handler.path.rpartition("/")[2]
    vocabulary = OPENAI_FILES / name  # the real files, because their hashes are known
    if name not in released.FILES:
        status(404)(handler)
    elif name.startswith("model.ckpt.data"):
        file(CONTENT, pause=0.02)(handler)
    else:
        file(vocabulary.read_bytes() if vocabulary.is_file() else name.encode())(handler)


def tasks(place: Path, address: str) -> dict[str, Task]:
    """Return all tasks. Their input files are written to the directory `place`."""
    text, long = place / "text.txt", place / "long.txt"
    text.write_text(TEXT)
    long.write_text(TEXT * 400)

    def training(recipe: str) -> Callable[[Path], list[str]]:
        return lambda out: [*train_command(text, out, *recipe.split(), "--max_steps", "60"), "--resume", "auto"]

    def tuning(*options: str) -> Callable[[Path], list[str]]:
        return lambda out: [*finetune_command(place, out, *options), "--resume", "auto"]

    def preparing(out: Path) -> list[str]:
        options = "--tokenizer chars --workers 2 --shard_mb 0.1 --overwrite true"
        return ["prepare", str(long), "--out", str(out), *options.split()]

    def downloading(out: Path) -> list[str]:
        return ["download", SIZE, "--out", str(out), "--base_url", address]

    return {
        **{name: Task(training(recipe)) for name, recipe in RECIPES.items()},
        "finetune": Task(tuning("--lora.dropout", "0.2")),
        "merge": Task(tuning("--merge"), in_merge=True),
        "full": Task(tuning("--full", "--rows", "packed")),
        "dpo": Task(lambda out: [*dpo_command(place, out), "--resume", "auto"]),
        "classify": Task(lambda out: [*classify_command(place, out), "--resume", "auto"]),
        "prepare": Task(preparing, all_files, FILE_MOMENTS, longest=1500),
        "download": Task(downloading, all_files, FILE_MOMENTS, before=make_small_model, does_nothing_when_done=True),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=72)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--only", nargs="*", help="names of tasks")
    options = parser.parse_args()
    began, draw, n_wrong = time.monotonic(), random.Random(options.seed), 0
    print(f"{'task':<9}{'kills':>6}{'starts':>8}{'aimed':>7}{'timed':>7}{'differences':>13}{'leftovers':>11}{'s':>6}")
    with tempfile.TemporaryDirectory() as directory, serving() as server:
        server.default = answer
        chosen = {n: t for n, t in tasks(Path(directory), server.address).items() if n in (options.only or [n])}
        for i, (name, task) in enumerate(chosen.items()):
            start, undisturbed, killed = time.monotonic(), Path(directory, name), Path(directory, f"{name}-killed")
            assert run(task.command(undisturbed), prepare=task.before) == 0
            struck, n_starts = kill_until_done(task, killed, len(range(i, options.kills, len(chosen))), draw)
            different = differences(task.result(undisturbed), task.result(killed))
            unfinished = leftovers(killed)
            n_wrong += len(different) + len(unfinished)
            print(
                f"{name:<9}{struck.total():>6}{n_starts:>8}{struck['aimed']:>7}{struck['timed']:>7}"
                f"{len(different):>13}{len(unfinished):>11}{time.monotonic() - start:>6.0f}",
                *different,
                *unfinished,
                flush=True,
            )
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(n_wrong > 0)


def kill_until_done(task: Task, out: Path, n_kills: int, draw: random.Random) -> tuple[Counter[str], int]:
    """Run a task until n_kills kills have hit it, and once more to its end.

    A command that is already done is started again (see `Task.does_nothing_when_done`). Returns the number of aimed and of
    timed kills, and how often the command was started.
    """
    struck: Counter[str] = Counter()
    n_starts = 0
    while struck.total() < n_kills:
        in_merge = task.in_merge and struck.total() % 3 == 2
        if struck.total() % 2:
            kind, kill = "timed", Kill("time", draw.randint(1, 30 if in_merge else task.longest), in_merge)
        else:
            kind, kill = "aimed", Kill(draw.choice(task.moments), draw.randint(1, 2 if in_merge else 5), in_merge)
        exit_status = run(task.command(out), kill, prepare=task.before)
        assert exit_status in (0, -9), (
            f"exit status {exit_status} with {kill} of start {n_starts} of {task.command(out)}"
        )
        if exit_status == 0 and task.does_nothing_when_done:
            shutil.rmtree(out)
        struck[kind] += exit_status != 0
        n_starts += 1
        assert n_starts < 40 * n_kills, f"hardly any kill hits {task.command(out)}"
    assert run(task.command(out), prepare=task.before) == 0
    return struck, n_starts + 1


if __name__ == "__main__":
    main()
