"""`mygpt` on several ranks: a killed rank, a rank that hangs, signals, and errors that all ranks have."""

from __future__ import annotations

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from killing import differences, leftovers, remains
from soak_ranks import OPTIONS, command, run_and_kill

pytestmark = [pytest.mark.torchrun, pytest.mark.slow]
ENVIRONMENT = {**os.environ, "OMP_NUM_THREADS": "1"}


def mygpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "MyGPT", *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def test_a_run_whose_rank_is_killed_ends_like_an_undisturbed_run(tmp_path: Path) -> None:
    draw = random.Random(0)
    run_and_kill(tmp_path / "undisturbed", 2, 0, "fsdp", draw)
    assert run_and_kill(tmp_path / "killed", 2, 1, "fsdp", draw) == (1, 2)
    assert not differences(remains(tmp_path / "undisturbed"), remains(tmp_path / "killed"))
    assert not leftovers(tmp_path / "killed")


def test_a_rank_that_hangs_is_named_and_a_signal_saves_a_checkpoint(tmp_path: Path) -> None:
    arguments = [*command(tmp_path / "run", 2, 0, "ddp"), "--max_steps", "100000", "--timeout_minutes", "0.05"]
    launcher = start(arguments, tmp_path / "log")
    hung = next(rank for rank in wait_for_steps(launcher, tmp_path / "run") if rank.environ()["RANK"] == "1")
    hung.suspend()
    assert launcher.wait(90) == 2
    assert "rank 1 of 2 ended or did not respond in time" in (tmp_path / "log").read_text()

    launcher = start(arguments, tmp_path / "log")
    wait_for_steps(launcher, tmp_path / "run")
    launcher.send_signal(signal.SIGINT)
    assert launcher.wait(90) == 128 + signal.SIGINT
    text = (tmp_path / "log").read_text()
    assert text.count("stopped at step") == 1
    step = int(text.partition("stopped at step ")[2].partition(";")[0])
    assert (tmp_path / "run" / "checkpoints" / "latest").read_text() == f"step-{step:06d}\n"


def start(arguments: list[str], log: Path) -> subprocess.Popen[bytes]:
    with open(log, "a") as file:
        return subprocess.Popen(arguments, stdout=file, stderr=file, env=ENVIRONMENT)


def wait_for_steps(launcher: subprocess.Popen[bytes], run: Path) -> list[psutil.Process]:
    """Wait until a run has logged further steps, and return the processes of its ranks."""
    log = run / "metrics.jsonl"
    size = log.stat().st_size if log.exists() else 0
    end = time.monotonic() + 60
    while not (log.exists() and log.stat().st_size > size + 500):
        assert launcher.poll() is None and time.monotonic() < end
        time.sleep(0.05)
    return [process for process in psutil.Process(launcher.pid).children() if "RANK" in process.environ()]


def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    failed = mygpt("train", *OPTIONS, "--nproc", "2", "--out", str(tmp_path / "run"))
    assert failed.returncode == 2
    assert failed.stderr.count("is not empty") == 1
    assert "Traceback" not in failed.stderr


def test_evaluation_on_two_ranks_prints_what_one_process_prints(tmp_path: Path) -> None:
    options = ["--max_steps", "2", "--sample_every", "0", "--out", str(tmp_path / "run")]
    assert mygpt("train", *OPTIONS, *options).returncode == 0
    one, two = (
        mygpt("evaluate", "--model", str(tmp_path / "run"), "--data", "alice", "--nproc", n) for n in ("1", "2")
    )
    assert one.returncode == two.returncode == 0
    assert one.stdout.splitlines()[:2] == two.stdout.splitlines()[:2]
    assert "bits per byte" in two.stdout
