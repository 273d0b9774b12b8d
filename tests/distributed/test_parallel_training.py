"""Training on 1, 2 and 4 ranks: losses, gradient norms and weights equal those of one process.

Tolerances: the order of summation differs in float32. A loss of 4 has a last place of 5e-7.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from MyGPT import GPTModel, TrainConfig, Trainer
from MyGPT.data.sampler import WindowSampler
from MyGPT.finetuning.lora import add_lora
from ranks import run_on_ranks
from tiny_parallel import CONFIG, IDS, comparable_weights


class UnequalRows:
    """Batches of seven rows, whose numbers of targets differ from row to row. A batch of one row ends each epoch of three."""

    def __init__(self) -> None:
        self.windows = WindowSampler(IDS, 16, 7, "shuffled", 1)

    def batch(self, step: int) -> tuple[Tensor, Tensor]:
        inputs, targets = self.windows.batch(step)
        random = np.random.default_rng(step)
        for row in targets:
            row[: random.integers(0, 15)] = -100
        n = 1 if step % 3 == 2 else 7
        return inputs[:n], targets[:n]


class Packed(UnequalRows):
    """The batches of UnequalRows with two texts in each row."""

    def batch(self, step: int) -> tuple[Tensor, ...]:
        inputs, targets = super().batch(step)
        segments = torch.ones_like(inputs)
        segments[:, 9:] = 2
        return inputs, targets, segments


class Validation:
    """Three batches of different sizes."""

    def batches(self, whole: bool) -> Iterator[tuple[Tensor, Tensor]]:
        for n in (5, 3, 1):
            yield WindowSampler(IDS, 16, n, "random", 2).batch(n)


def train(kind: str, parallel: str, options: dict[str, Any]) -> dict[str, Any]:
    """Take six steps, and return the losses, the gradient norms, the validation loss and the trained weights."""
    torch.manual_seed(1337 + torch.distributed.get_rank() if torch.distributed.is_initialized() else 1337)
    model = GPTModel(CONFIG)
    if kind == "lora":
        add_lora(model, r=4, dropout=0.0)
    config = TrainConfig(
        max_steps=6,
        warmup_steps=1,
        micro_batch_size=2,
        optimizer="muon" if kind == "muon" else "adamw",
        parallel=parallel,
        **options,
    )
    sampler = Packed() if kind == "packed" else UnequalRows()
    with Trainer(model, config, sampler, Validation(), progress=False) as trainer:
        steps = [trainer.step() for _ in range(6)]
        validation = trainer.evaluate()
    losses = [step["loss"] for step in steps]
    return {
        "losses": losses,
        "norms": [step["grad_norm"] for step in steps],
        "val": validation,
        "weights": comparable_weights(model),
    }


KINDS = ("adamw", "muon", "lora", "packed")


def train_all(cases: list[tuple[str, str, dict[str, Any]]]) -> list[dict[str, Any]]:
    return [train(*case) for case in cases]


@pytest.fixture(scope="module")
def expected() -> dict[str, dict[str, Any]]:
    torch.set_num_threads(1)
    return {kind: train(kind, "none", {}) for kind in KINDS}


def differences(found: dict[str, Any], expected: dict[str, Any]) -> tuple[float, float, float, float]:
    """Return the largest differences of losses, gradient norms, the validation loss, and weights."""
    assert found["weights"].keys() == expected["weights"].keys()
    return (
        np.abs(np.subtract(found["losses"], expected["losses"])).max(),
        np.abs(np.subtract(found["norms"], expected["norms"])).max(),
        abs(found["val"] - expected["val"]),
        max(np.abs(found["weights"][name] - weight).max() for name, weight in expected["weights"].items()),
    )


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.parametrize("n", [1, 2, 4])
def test_losses_and_weights_do_not_depend_on_the_ranks(expected: dict[str, dict[str, Any]], n: int) -> None:
    cases: list[tuple[str, str, dict[str, Any]]] = [
        (kind, parallel, {}) for kind in KINDS for parallel in ("ddp", "fsdp")
    ]
    if n == 2:
        cases += [("adamw", "fsdp", {"compile": True}), ("adamw", "fsdp", {"gradient_checkpointing": True})]
    if n == 4:
        cases += [("adamw", "fsdp", {"shard_size": 2}), ("muon", "fsdp", {"shard_size": 2})]
    for results in run_on_ranks(n, train_all, cases, seconds=200):
        for (kind, parallel, options), result in zip(cases, results, strict=True):
            found = differences(result, expected[kind])
            print(n, kind, parallel, options, *(f"{value:.1e}" for value in found))
            assert max(found) < 1e-6, (kind, parallel, options, found)
