"""Custom parts on several ranks: losses, the saved model and a resumed run equal those of one process."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from MyGPT import GPTModel, TrainConfig, Trainer, open_model
from ranks import run_on_ranks
from tiny_parallel import CONFIG, IDS, comparable_weights

SOURCE = """
import torch
from torch import nn


def attention(q, k, v, mask):
    S = k.shape[2]
    if mask is None:
        mask = torch.ones(q.shape[2], S, dtype=torch.bool).tril(S - q.shape[2])
    return (q @ k.transpose(2, 3)).masked_fill(~mask, -1e9).softmax(dim=-1) @ v


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.c_fc = nn.Linear(config.emb_dim, 48, bias=False)
        self.c_proj = nn.Linear(48, config.emb_dim)
        self.scale = nn.Parameter(torch.ones(1))

    def forward(self, x):
        return self.scale * self.c_proj(self.c_fc(x).relu().square())
"""


def train(source: str, parallel: str, run_dir: Path) -> tuple[list[float], dict[str, Any]]:
    """Take three steps, save a checkpoint and the model, take three more after resuming, and return losses and weights."""
    losses = []
    for seed, steps in ((1, 3), (2, 6)):
        torch.manual_seed(seed)
        model = GPTModel(CONFIG, source)
        config = TrainConfig(max_steps=steps, batch_size=6, eval_every=3, eval_windows=4, warmup_steps=1, schedule="constant",
                             sample_every=0, parallel=parallel, checkpoint_every=3)  # fmt: skip
        options: dict[str, Any] = {"resume": True, "allow_changed": ["max_steps"]} if steps == 6 else {}
        trainer = Trainer(model, config, IDS[:4000], IDS[4000:], run_dir=run_dir, progress=False, **options)
        losses.append(trainer.run())
    return losses, comparable_weights(model)


@pytest.mark.torchrun
@pytest.mark.slow
@pytest.mark.parametrize("parallel", ["ddp", "fsdp"])
def test_two_ranks_train_save_and_resume_custom_parts(parallel: str, tmp_path: Path) -> None:
    source = tmp_path / "own.py"
    source.write_text(SOURCE)
    losses, weights = train(str(source), "none", tmp_path / "one")
    for found, others in run_on_ranks(2, train, str(source), parallel, tmp_path / "two"):
        assert found == pytest.approx(losses, abs=1e-6)
        for name, weight in weights.items():
            assert np.abs(others[name] - weight).max() < 1e-6, name
    model = GPTModel.from_pretrained(tmp_path / "two", parts=source)
    name = "transformer.h.1.mlp.c_fc.weight"
    assert np.abs(model.get_parameter(name).detach().numpy() - weights[name]).max() < 1e-6
    with pytest.raises(ValueError, match="has its own attention and MLP"):
        open_model(tmp_path / "two")
