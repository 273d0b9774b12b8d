"""Kills one rank of several twenty times, and compares the run with an undisturbed one (part of `make soak`).

`mygpt train --nproc N --max_restarts M --resume auto` starts all ranks again after each kill, as torchrun does. Half of the
kills come at a random time after the start of the ranks, the others after a random number of steps. There must be no
differences and no unfinished files.
"""

from __future__ import annotations

import argparse
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

from killing import differences, leftovers, remains
from ranks import without_coverage

OPTIONS = (
    "--data alice --device cpu --context_length 16 --emb_dim 16 --n_heads 2 --n_layers 2 --batch_size 8 "
    "--warmup_steps 3 --checkpoint_every 5 --eval_every 20 --eval_windows 5 --sample_every 40 --sample_tokens 6 --log_every 1 "
    "--drop_rate 0.1"
).split()


def command(out: Path, n_ranks: int, n_restarts: int, parallel: str, n_steps: int = 120) -> list[str]:
    """Return the command line of a run of several ranks in the directory `out`."""
    ranks = ["--nproc", str(n_ranks), "--max_restarts", str(n_restarts), "--parallel", parallel]
    options = [*OPTIONS, "--max_steps", str(n_steps), *ranks, "--out", str(out), "--resume", "auto"]
    return [sys.executable, "-m", "MyGPT", "train", *options]


def run_and_kill(
    out: Path, n_ranks: int, n_kills: int, parallel: str, draw: random.Random, n_steps: int = 120
) -> tuple[int, int]:
    """Run a training in the directory `out`, kill ranks n_kills times, and return the numbers of kills and of starts."""
    environment = {**without_coverage(), "OMP_NUM_THREADS": "1"}
    with open(f"{out}.log", "w") as log:
        arguments = command(out, n_ranks, n_kills + 5, parallel, n_steps)
        launcher = subprocess.Popen(arguments, stdout=log, stderr=log, env=environment)
    struck, starts, known = 0, 0, set[int]()
    while launcher.poll() is None:
        time.sleep(0.02)
        ranks = _ranks(launcher.pid)
        if len(ranks) < n_ranks or known & {rank.pid for rank in ranks}:
            continue
        known, starts = {rank.pid for rank in ranks}, starts + 1
        if struck == n_kills:
            continue
        if struck % 2:
            time.sleep(draw.uniform(0, 6))
        else:
            _wait_for_steps(launcher, out, draw.randint(1, 12))
        victim = draw.choice(ranks)
        if victim.is_running() and launcher.poll() is None:
            victim.kill()
            struck += 1
    assert launcher.returncode == 0, f"exit status {launcher.returncode}, see {out}.log"
    return struck, starts


def _ranks(launcher: int) -> list[psutil.Process]:
    try:
        return [it for it in psutil.Process(launcher).children() if "RANK" in it.environ()]
    except psutil.Error:  # a process has just ended
        return []


def _wait_for_steps(launcher: subprocess.Popen[bytes], out: Path, n: int) -> None:
    """Wait until a run has logged n more steps, or has ended."""
    lines = _n_lines(out)
    while launcher.poll() is None and _n_lines(out) < lines + n:
        time.sleep(0.005)


def _n_lines(out: Path) -> int:
    log = out / "metrics.jsonl"
    return log.read_bytes().count(b"\n") if log.exists() else 0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=4)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--parallel", default="fsdp")
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as directory:
        undisturbed, killed = Path(directory, "undisturbed"), Path(directory, "killed")
        draw = random.Random(options.seed)
        run_and_kill(undisturbed, options.ranks, 0, options.parallel, draw)
        struck, starts = run_and_kill(killed, options.ranks, options.kills, options.parallel, draw)
        different, unfinished = differences(remains(undisturbed), remains(killed)), leftovers(killed)
        print(f"{options.ranks} ranks, {options.parallel}: {struck} kills, {starts} starts,", end=" ")
        print(f"{len(different)} differences, {len(unfinished)} leftovers", *different, *unfinished, end="; ")
        print(f"{time.monotonic() - began:.0f} s")
        sys.exit(bool(different or unfinished))


if __name__ == "__main__":
    main()
