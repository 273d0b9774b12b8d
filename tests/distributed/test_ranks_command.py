"""`mygpt` on several ranks: a killed rank, a rank that hangs, signals, and errors that all ranks have."""

from __future__ import annotations

import random
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch

from killing import differences, leftovers, remains
from MyGPT import CharTokenizer, GPTModel
from MyGPT.cli import main
from MyGPT.evaluation.protocols import measure_last_words, measure_text
from ranks import run_on_ranks, without_coverage
from soak_ranks import OPTIONS, command, run_and_kill
from tiny_parallel import CONFIG
from tiny_runs import TEXT

pytestmark = [pytest.mark.torchrun, pytest.mark.slow]
ENVIRONMENT = {**without_coverage(), "OMP_NUM_THREADS": "1"}


def mygpt(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "MyGPT", *arguments], capture_output=True, text=True, env=ENVIRONMENT, timeout=120
    )


def test_a_run_whose_rank_is_killed_ends_like_an_undisturbed_run(tmp_path: Path) -> None:
    draw = random.Random(0)
    run_and_kill(tmp_path / "undisturbed", 2, 0, "fsdp", draw, 40)
    assert run_and_kill(tmp_path / "killed", 2, 1, "fsdp", draw, 40) == (1, 2)
    assert not differences(remains(tmp_path / "undisturbed"), remains(tmp_path / "killed"))
    assert not leftovers(tmp_path / "killed")


def test_a_rank_that_hangs_is_named_and_a_signal_saves_a_checkpoint(tmp_path: Path) -> None:
    arguments = [*command(tmp_path / "run", 2, 0, "ddp", 100_000), "--timeout_minutes", "0.05"]
    launcher = start(arguments, tmp_path / "log")
    hung = next(rank for rank in wait_for_steps(launcher, tmp_path / "run") if rank.environ()["RANK"] == "1")
    hung.suspend()
    wait_until(lambda: is_asked_to_end(hung))
    hung.resume()  # torchrun would wait 30 seconds for a suspended process to end
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


def is_asked_to_end(process: psutil.Process) -> bool:
    """Return True if a suspended process was sent SIGTERM, which it will receive when it is resumed."""
    status = Path(f"/proc/{process.pid}/status").read_text()
    pending = int(status.partition("ShdPnd:")[2].split()[0], 16)
    return bool(pending & 1 << (signal.SIGTERM - 1))


def wait_until(condition: Callable[[], bool]) -> None:
    end = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def wait_for_steps(launcher: subprocess.Popen[bytes], run: Path) -> list[psutil.Process]:
    """Wait until a run has logged further steps, and return the processes of its ranks."""
    log = run / "metrics.jsonl"
    size = log.stat().st_size if log.exists() else 0
    wait_until(lambda: launcher.poll() is not None or (log.exists() and log.stat().st_size > size + 500))
    assert launcher.poll() is None
    return [process for process in psutil.Process(launcher.pid).children() if "RANK" in process.environ()]


def test_an_error_of_all_ranks_is_printed_once(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine.txt").write_text("precious")
    failed = mygpt("train", *OPTIONS, "--nproc", "2", "--out", str(tmp_path / "run"))
    assert failed.returncode == 2
    assert failed.stderr.count("is not empty") == 1
    assert "Traceback" not in failed.stderr


def train_on_shards(out: str, shard_size: int) -> int:
    """Run `mygpt train` in this rank, and return its exit status."""
    options = ["--max_steps", "2", "--parallel", "fsdp", "--shard_size", str(shard_size), "--sample_every", "0"]
    return main(["train", *OPTIONS, *options, "--out", out])


def test_the_command_shards_and_refuses_a_wrong_shard_size_before_it_writes(tmp_path: Path) -> None:
    assert run_on_ranks(2, train_on_shards, str(tmp_path / "run"), 2) == [0, 0]
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert run_on_ranks(2, train_on_shards, str(tmp_path / "wrong"), 3) == [2, 2]
    assert not (tmp_path / "wrong").exists()


def measure(divide: bool) -> tuple[Any, Any]:
    """Measure a text in windows and the last words of passages, with a new model whose weights depend on a seed only."""
    torch.manual_seed(0)
    tokenizer = CharTokenizer.from_text(TEXT)
    model = GPTModel({**CONFIG, "vocab_size": tokenizer.n_vocab, "context_length": 16}).eval()
    passages = [TEXT[i : i + 60] for i in range(0, 300, 60)]
    return (
        measure_text(model, tokenizer, passages, stride=5, batch_size=2, divide=divide),
        measure_last_words(model, tokenizer, passages, batch_size=2, divide=divide),
    )


def test_evaluation_on_two_ranks_equals_that_of_one_process() -> None:
    text, words = measure(divide=False)
    for found, found_words in run_on_ranks(2, measure, True):
        # The loss of a batch is summed in float32, and other windows share a batch.
        assert found.result.total_nats == pytest.approx(text.result.total_nats, rel=1e-6)
        assert replace(found, result=text.result) == text
        assert found.result.n_tokens == text.result.n_tokens
        assert found_words.total_nats == pytest.approx(words.total_nats, rel=1e-6)
        assert replace(found_words, total_nats=words.total_nats) == words
