"""The adapter for transformers on a GPU, compared with transformers' own GPT-2 with the same weights."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import lively_model
from MyGPT import GPTConfig, GPTModel, as_transformers

transformers = pytest.importorskip("transformers")
CONFIG = GPTConfig(vocab_size=515, context_length=64, emb_dim=128, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)


def pair(directory: Path) -> tuple[GPTModel, Any]:
    """Return a model, and transformers' GPT-2 with the same weights."""
    ours = lively_model(CONFIG)
    ours.save_pretrained(directory)
    return ours, transformers.GPT2LMHeadModel.from_pretrained(directory)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # of transformers' Trainer about its own dependencies
def test_transformers_trainer_takes_the_same_steps(device: torch.device, tmp_path: Path) -> None:
    """The losses of four steps in float32, whose sums have a relative error of at most about 1e-6 each."""
    pytest.importorskip("accelerate")
    rows = [{"input_ids": ids, "labels": ids.clone()} for ids in torch.randint(0, 515, (16, 33))]
    for row in rows:
        row["labels"][0] = -100  # the Trainer counts it for GPT-2, although the loss has no term for it
    losses = []
    for model in map(copy.deepcopy, pair(tmp_path / "model")):
        arguments = transformers.TrainingArguments(
            output_dir=str(tmp_path / "run"), max_steps=4, per_device_train_batch_size=4, learning_rate=1e-3, seed=1,
            logging_steps=1, report_to="none", use_cpu=device.type == "cpu", disable_tqdm=True, save_strategy="no",
        )  # fmt: skip
        adapted = as_transformers(model) if isinstance(model, GPTModel) else model
        trainer = transformers.Trainer(adapted, arguments, train_dataset=rows)
        trainer.train()
        losses.append([entry["loss"] for entry in trainer.state.log_history if "loss" in entry])
    ours, theirs = losses
    assert len(ours) == 4 and ours[-1] < ours[0]
    assert ours == pytest.approx(theirs, rel=2e-4)  # the log rounds losses to four decimals


def test_transformers_generates_the_same_tokens(device: torch.device, tmp_path: Path) -> None:
    ids = torch.randint(0, 515, (3, 9), device=device)
    mask = torch.ones_like(ids)
    mask[1, :4] = 0  # padding on the left

    def tokens(model: Any) -> Tensor:
        options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        generated: Tensor = model.to(device).generate(ids, attention_mask=mask, **options)
        return generated

    ours, theirs = pair(tmp_path)
    assert torch.equal(tokens(as_transformers(ours)), tokens(theirs.eval()))
