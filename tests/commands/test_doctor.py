"""`mygpt doctor`: its findings, remedies and estimates."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import pytest
import torch

from MyGPT import GPTConfig, TrainConfig
from MyGPT.cli import main
from MyGPT.commands import _findings
from ranks import run_on_ranks

RECIPE = "data: alice\nmax_steps: 3\nbatch_size: 2\ncontext_length: 8\nemb_dim: 8\nn_heads: 2\nn_layers: 1\n"


@pytest.fixture
def no_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(*_: Any, **__: Any) -> Any:
        raise RuntimeError("No working C++ compiler found\nin torch")

    monkeypatch.setattr(torch, "compile", compile_)


@pytest.mark.slow
def test_the_page_is_printed_whatever_is_missing(
    tmp_path: Path, no_compiler: None, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    find_spec = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "peft" else find_spec(name))
    (tmp_path / "small.yaml").write_text(RECIPE)
    (tmp_path / "wrong.yaml").write_text(RECIPE + "emb_dim: 9\n")
    (tmp_path / "huge.yaml").write_text(RECIPE + "batch_size: 100000000\n")
    (tmp_path / "elsewhere.yaml").write_text(RECIPE.replace("alice", "data/texts"))
    assert main(["doctor", "--recipes", str(tmp_path)]) == 0
    captured = capsys.readouterr()
    report, advice = captured.out.split("To do:")
    assert not captured.err and captured.out.count("\n") < 50
    for expected in (
        "torch.compile   does not work: No working C++ compiler found\n",
        "vocabulary      GPT-2's 50,257 tokens",
        "GPT-2's weights none in ",
        "emb_dim must be divisible by n_heads, got 9 and 2",
        "GB are free",
        "(3 steps of ",
    ):
        assert expected in report, expected
    for expected in (
        "peft: pip install 'mygpt[finetune]'",
        "torch.compile: install a C++ compiler",
        "mygpt download gpt2",
        "huge: use a smaller micro_batch_size",
        "elsewhere: the data data/texts does not exist",
    ):
        assert expected in advice, expected


def test_a_compiler_that_works_is_recognised_and_one_that_lies_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function: function)
    assert _findings.find_compiler(torch.device("cpu")).text.startswith("works")
    monkeypatch.setattr(torch, "compile", lambda function: lambda x: function(x) + 1)
    assert _findings.find_compiler(torch.device("cpu")).text == "gives wrong results"


def test_a_download_that_was_begun_is_to_be_finished(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("MYGPT_CACHE", str(tmp_path))
    (tmp_path / "models/355M").mkdir(parents=True)
    (tmp_path / "models/355M/checkpoint").touch()
    finding = _findings.find_weights()
    assert "incomplete: 355M" in finding.text and finding.fix == "mygpt download 355M"


def test_too_few_and_too_many_threads_are_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for threads, advice in ((1, "set OMP_NUM_THREADS=4 or more"), (16, "set OMP_NUM_THREADS=8"), (4, None), (8, None)):
        monkeypatch.setattr(_findings, "_n_cpus", lambda: 8)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        fix = _findings.find_threads(torch.device("cpu")).fix
        assert fix is None if advice is None else advice in str(fix)


def test_a_directory_without_recipes_is_said(tmp_path: Path) -> None:
    [finding] = _findings.find_recipes(tmp_path / "none", torch.device("cpu"), 1e11)
    assert "none in" in finding.text and finding.fix is not None


@pytest.mark.parametrize("speed", [1e15, 1.0])
def test_a_part_of_a_step_is_scaled_by_its_operations(speed: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each step takes a second per million operations, whatever part of the model is measured."""
    tried = []

    def seconds(step: Any, *_: Any) -> float:
        trainer = step.__self__
        tried.append((trainer.config.batch_size, trainer.model.config.n_layers))
        tokens = trainer.config.batch_size * trainer.model.config.context_length
        return trainer.model.estimate_flops() * tokens / 1e6

    monkeypatch.setattr(_findings, "median_seconds", seconds)
    config = GPTConfig(vocab_size=10, context_length=8, emb_dim=8, n_heads=2, n_layers=3, drop_rate=0.0)
    training = TrainConfig(batch_size=12, micro_batch_size=4, max_steps=100, eval_every=50, eval_windows=6)
    step, whole = _findings.training_seconds(config, training, torch.device("cpu"), speed)
    # 2 for each weight in a product, 4 C T for attention, three times for the way back; 12 x 8 tokens.
    per_token = 3 * (2 * (3 * 12 * 8 * 8 + 10 * 8) + 4 * 3 * 8 * 8)
    assert tried == [(4, 3) if speed > 1 else (1, 1)]
    assert step == pytest.approx(per_token * 12 * 8 / 1e6)
    assert whole == pytest.approx(100 * step + 2 * per_token / 3 * 6 * 8 / 1e6)


@pytest.mark.parametrize(
    ("seconds", "text"),
    [(0.0123, "12 ms"), (1.5, "1.5 s"), (95, "95 s"), (400, "6.7 min"), (8000, "2.2 hours"), (1e9, "32 years")],
)
def test_durations_are_told_as_people_do(seconds: float, text: str) -> None:
    assert _findings.duration(seconds) == text


def test_a_process_alone_is_one_rank() -> None:
    [finding] = _findings.find_ranks(torch.device("cpu"))
    assert finding.text == "1 rank; this torch communicates over gloo" + (" and nccl" if has_nccl() else "")


def has_nccl() -> bool:
    return torch.distributed.is_nccl_available()


def report_of_a_rank(recipe: str) -> list[str]:
    """Return what `mygpt doctor` says about the ranks, if each all-reduce of 64 MB takes 10 ms, and about a recipe."""
    device = torch.device("cpu")
    measure = _findings.median_seconds
    _findings.median_seconds = lambda work, *_: 0.01 if work() is not None else 0.0
    ranks = list(_findings.find_ranks(device))
    _findings.median_seconds = measure
    return [finding.text for finding in [*ranks, _findings.find_recipe(Path(recipe), device, 1e9)]]


@pytest.mark.torchrun
@pytest.mark.slow
def test_several_ranks_are_listed_and_estimate_a_recipe_together(tmp_path: Path) -> None:
    (tmp_path / "small.yaml").write_text(RECIPE.replace("batch_size: 2", "batch_size: 3"))
    for ranks, reduced, recipe in run_on_ranks(2, report_of_a_rank, str(tmp_path / "small.yaml")):
        assert ranks.startswith("2 ranks on 1 host: 2 on cpu of ")
        # Of 64 MB, each of two ranks sends 2 (n - 1) / n = 1 times as much.
        assert reduced == "64 MB over gloo in 10 ms: bus bandwidth 6.4 GB/s"
        assert "(3 steps of " in recipe
