"""Kills runs fifty times at random moments and compares the results with uninterrupted runs (`make soak`).

Every second kill is aimed at a function that writes files (killing.MOMENTS); the others come at a random time. For each
recipe the table shows how many kills hit a running process, how often the run was resumed, and in how many parts (weights,
optimizer and random states, losses, samples) the result differs. There must be no differences and no unfinished files.
"""

from __future__ import annotations

import argparse
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

from killing import MOMENTS, Kill, differences, leftovers, remains, run
from tiny_runs import RECIPES, TEXT, train_command


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began, draw, n_different = time.monotonic(), random.Random(options.seed), 0
    print(f"{'recipe':<8}{'kills':>6}{'resumes':>9}{'aimed':>7}{'timed':>7}{'differences':>13}{'leftovers':>11}")
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        (place / "text.txt").write_text(TEXT)
        for i, (name, recipe) in enumerate(RECIPES.items()):
            command = train_command(place / "text.txt", place / name, *recipe.split(), "--max_steps", "60")
            assert run(command) == 0
            untouched = remains(place / name)
            command[command.index(str(place / name))] = str(place / f"{name}-killed")
            n_kills = len(range(i, options.kills, len(RECIPES)))
            struck, resumes = kill_until_done([*command, "--resume", "auto"], n_kills, draw)
            different = differences(untouched, remains(place / f"{name}-killed"))
            n_different += len(different)
            unfinished = leftovers(place / f"{name}-killed")
            row = (struck.total(), resumes, struck["aimed"], struck["timed"])
            print(
                f"{name:<8}{row[0]:>6}{row[1]:>9}{row[2]:>7}{row[3]:>7}{len(different):>13}{len(unfinished):>11}",
                *different,
            )
            n_different += len(unfinished)
    print(f"{time.monotonic() - began:.0f} s")
    sys.exit(n_different > 0)


def kill_until_done(command: list[str], n_kills: int, draw: random.Random) -> tuple[Counter[str], int]:
    """Run a command until n_kills kills have hit it, and once more to its end.

    A run that has already reached its end is resumed there again. Returns the number of aimed and of timed kills, and how
    often the command was started.
    """
    struck: Counter[str] = Counter()
    resumes = 0
    while struck.total() < n_kills:
        if struck.total() % 2:
            kind, kill = "timed", Kill("time", draw.randint(1, 700))
        else:
            kind, kill = "aimed", Kill(draw.choice(MOMENTS), draw.randint(1, 5))
        status = run(command, kill)
        assert status in (0, -9), status
        struck[kind] += status != 0
        resumes += 1
    assert run(command) == 0
    return struck, resumes


if __name__ == "__main__":
    main()
