"""Runs of several ranks: their files, their checkpoints, resuming on another number of ranks, samples and signals."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from MyGPT import CharTokenizer, GPTModel, TrainConfig, Trainer
from MyGPT.generation import generate
from ranks import run_on_ranks
from tiny_parallel import CONFIG, IDS, comparable_weights

TOKENIZER = CharTokenizer([chr(33 + i) for i in range(71)])


def run(directory: str, parallel: str | None, resume: bool = False, **options: Any) -> dict[str, Any]:
    """Train in `directory`, and return the validation loss and the weights of the model that was given to the trainer."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    model = GPTModel(CONFIG)
    config = TrainConfig(
        **{
            "max_steps": 8,
            "batch_size": 6,
            "warmup_steps": 1,
            "eval_every": 3,
            "checkpoint_every": 4,
            "keep_last": 5,
            "sample_every": 4,
            "sample_tokens": 8,
            "log_every": 1,
            "parallel": parallel,
            **options,
        }
    )
    trainer = Trainer(
        model, config, IDS[:4000], IDS[4000:], tokenizer=TOKENIZER, run_dir=directory, resume=resume, progress=False,
    )  # fmt: skip
    loss = trainer.run()
    return {"loss": loss, "weights": comparable_weights(model)}


def logged(directory: Path, name: str) -> list[float]:
    lines = (directory / "metrics.jsonl").read_text().splitlines()
    return [record[name] for record in map(json.loads, lines) if name in record]


def same(found: dict[str, Any], expected: dict[str, Any]) -> bool:
    return all(np.array_equal(found["weights"][name], weight) for name, weight in expected["weights"].items())


def assert_close(found: dict[str, Any], expected: dict[str, Any]) -> None:
    assert found["loss"] == pytest.approx(expected["loss"], abs=1e-6)
    for name, weight in expected["weights"].items():
        np.testing.assert_allclose(found["weights"][name], weight, rtol=0, atol=1e-6)


@pytest.mark.torchrun
@pytest.mark.slow
def test_a_run_of_two_ranks_writes_the_files_of_a_run_and_resumes_on_any_number(tmp_path: Path) -> None:
    expected = run(str(tmp_path / "none"), None)
    whole, other = run_on_ranks(2, run, str(tmp_path / "two"), "fsdp")
    assert same(whole, other)
    assert_close(whole, expected)
    for name in ("loss", "grad_norm", "val_loss", "final_val_loss"):
        ours, theirs = logged(tmp_path / "two", name), logged(tmp_path / "none", name)
        np.testing.assert_allclose(ours, theirs, rtol=0, atol=1e-6)
    # Greedy or sampled, the samples are those of one process, because their probabilities differ by rounding only.
    assert (tmp_path / "two" / "samples.txt").read_text() == (tmp_path / "none" / "samples.txt").read_text()
    opened = GPTModel.from_pretrained(tmp_path / "two" / "model")
    prompt = torch.tensor([[1, 2, 3]])
    assert (
        generate(opened, prompt, 5).tolist()
        == generate(GPTModel.from_pretrained(tmp_path / "none"), prompt, 5).tolist()
    )

    # Each case resumes a copy of the run from step 4, as if it had been killed after this checkpoint.
    for n, parallel in ((1, None), (2, "fsdp"), (2, "ddp"), (4, "fsdp")):
        place = tmp_path / f"{n}-{parallel}"
        cut(tmp_path / "two", place)
        found = run(str(place), parallel, True) if n == 1 else run_on_ranks(n, run, str(place), parallel, True)[0]
        assert_close(found, expected)
        if parallel == "fsdp" and n == 2:
            assert same(found, whole)
            assert logged(place, "loss") == logged(tmp_path / "two", "loss")
    # Several ranks resume a run of one process.
    cut(tmp_path / "none", tmp_path / "more")
    assert_close(run_on_ranks(2, run, str(tmp_path / "more"), "fsdp", True)[0], expected)


def cut(source: Path, target: Path) -> None:
    """Copy a run, and remove its last checkpoint, so that the one of step 4 remains."""
    shutil.copytree(source, target)
    shutil.rmtree(target / "checkpoints" / "step-000008")
    (target / "checkpoints" / "latest").write_text("step-000004\n")
