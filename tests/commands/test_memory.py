"""Too little memory is one sentence that says what to lower."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from MyGPT import cli
from MyGPT.cli import main


def allocate_with_torch() -> None:
    torch.empty(1 << 56, dtype=torch.uint8)


def allocate_with_numpy() -> None:
    np.empty(1 << 56, dtype=np.uint8)


def fail(error: Exception) -> Callable[[], None]:
    def raise_error() -> None:
        raise error

    return raise_error


CUDA = "CUDA out of memory. Tried to allocate 2.50 GiB. GPU 0 has a total capacity of 4.00 GiB.\nSee documentation"
FAILURES: dict[str, Callable[[], None]] = {
    "torch": allocate_with_torch,
    "numpy": allocate_with_numpy,
    "Python": fail(MemoryError()),
    "CUDA": fail(torch.OutOfMemoryError(CUDA)),
    "MPS": fail(RuntimeError("MPS backend out of memory (MPS allocated: 9.00 GB)")),
    "cuBLAS": fail(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`")),
    "C++": fail(RuntimeError("std::bad_alloc")),
    "mmap": fail(OSError(errno.ENOMEM, "Cannot allocate memory")),
}
ADVICE = {
    "train": "micro_batch_size",
    "finetune": "micro_batch_size",
    "evaluate": "batch_size",
    "generate": "int8",
    "chat": "int8",
    "prepare": "workers",
    "plot": "a smaller model",
}


def line_of(command: str, failure: Callable[[], None], monkeypatch: pytest.MonkeyPatch, capsys: Any) -> str:
    monkeypatch.setattr(cli, "run_command", lambda name, arguments: failure())
    assert main([command]) == 2
    captured = capsys.readouterr()
    assert captured.err.count("\n") == 1
    return captured.err


@pytest.mark.parametrize("kind", FAILURES)
def test_every_way_to_run_out_of_memory_is_recognised(kind: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    line = line_of("train", FAILURES[kind], monkeypatch, capsys)
    assert line.startswith("mygpt train: there is not enough memory") and "lower micro_batch_size" in line
    assert ("2.50 GiB" in line) == (kind == "CUDA")


@pytest.mark.parametrize("command", ADVICE)
def test_the_advice_fits_the_command(command: str, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    assert ADVICE[command] in line_of(command, allocate_with_torch, monkeypatch, capsys)


def test_another_runtime_error_is_a_mistake_of_the_program(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "run_command", lambda name, arguments: fail(RuntimeError("a bug"))())
    with pytest.raises(RuntimeError, match="a bug"):
        main(["train"])


@pytest.mark.slow
def test_a_run_without_memory_keeps_its_directory_usable(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    (tmp_path / "text.txt").write_text("abcdefgh " * 100)
    sizes = "--context_length 8 --emb_dim 8 --n_heads 1 --n_layers 1 --max_steps 4 --sample_every 0 --warmup_steps 0"
    command = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *sizes.split()]
    from MyGPT.training.trainer import Trainer

    step = Trainer.step
    with monkeypatch.context() as patch:
        patch.setattr(
            Trainer, "step", lambda trainer: allocate_with_torch() if trainer.step_number == 2 else step(trainer)
        )
        assert main(command) == 2
    assert "lower micro_batch_size" in capsys.readouterr().err
    assert (
        main(
            [
                "train",
                "--resume",
                str(tmp_path / "run"),
                "--micro_batch_size",
                "3",
                "--allow_changed",
                "micro_batch_size",
            ]
        )
        == 0
    )


MLP = """
from torch import nn


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.emb_dim, WIDTH)
        self.c_proj = nn.Linear(WIDTH, config.emb_dim)

    def forward(self, x):
        return self.c_proj(self.c_fc(x).relu())
"""


@pytest.mark.parametrize("width", [1, 4000])
def test_the_weights_of_custom_parts_are_counted(
    width: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    """Training with GPT-2's MLP needs more than 1 MB. With the narrow MLP it needs less, and with the wide one more."""
    monkeypatch.setattr(os, "sysconf", lambda name: 1000)  # 1,000 pages of 1,000 bytes
    (tmp_path / "text.txt").write_text("abcdefgh " * 100)
    (tmp_path / "own.py").write_text(MLP.replace("WIDTH", str(width)))
    sizes = "--context_length 8 --emb_dim 40 --n_heads 1 --n_layers 2 --max_steps 1 --sample_every 0 --warmup_steps 0"
    command = ["train", "--data", str(tmp_path / "text.txt"), "--out", str(tmp_path / "run"), *sizes.split()]
    assert main(command) == 2
    capsys.readouterr()
    assert main([*command, "--with", str(tmp_path / "own.py")]) == (0 if width == 1 else 2)
    if width > 1:  # weights, gradients and two moments of 2 layers with 2 matrices
        needed = re.search(r"\(([\d.]+) GB are needed", capsys.readouterr().err)
        assert needed and float(needed[1]) * 1e9 == pytest.approx(4 * 4 * 2 * 2 * 40 * width, rel=0.05)
