"""A GPTModel inside torch's wrappers for several processes computes the losses and gradients of one process."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from MyGPT import GPTConfig, GPTModel, generate
from ranks import run_on_ranks

CONFIG = GPTConfig(vocab_size=71, context_length=16, emb_dim=32, n_heads=4, n_layers=2, drop_rate=0.0, qkv_bias=True)
TOLERANCE = 1e-6
"""Largest difference of losses and gradients, which are around 1: float32 rounding of sums in another order is 1e-7."""


def batch() -> tuple[Tensor, Tensor]:
    """Return inputs and targets, (4, 16) each. The rows, and the halves of the batch, have different numbers of targets."""
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(71, (4, 17), generator=generator)
    inputs, targets = ids[:, :-1], ids[:, 1:].clone()
    for row, n_ignored in enumerate((0, 3, 8, 13)):
        targets[row, :n_ignored] = -100
    return inputs, targets


def mine(tensor: Tensor) -> Tensor:
    """Return this rank's rows."""
    return tensor.chunk(dist.get_world_size())[dist.get_rank()]


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def gradients(model: nn.Module) -> dict[str, Tensor]:
    # Wrappers put "module." in front of names, torch.compile "_orig_mod.".
    return {
        name.replace("module.", "").replace("_orig_mod.", ""): whole(parameter.grad)
        for name, parameter in model.named_parameters()
    }


def sum_over_ranks(tensor: Tensor) -> Tensor:
    total = tensor.detach().clone()
    dist.all_reduce(total)
    return total


# What a training loop can call: each returns the loss of the whole batch's rows that it gets, summed, and their number.
def by_targets(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    return model(inputs, targets=targets)[0]


def by_token_loss(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return model.token_loss(inputs, targets)[0]


def by_row_losses(model: Any, inputs: Tensor, targets: Tensor) -> Tensor:
    return model.row_losses(inputs, targets).sum()


def by_labels(model: nn.Module, inputs: Tensor, targets: Tensor) -> Tensor:
    labels = torch.cat([torch.full_like(targets[:, :1], -100), targets[:, :-1]], dim=1)
    return model(inputs, labels=labels).loss * (labels != -100).sum()


Loss = Callable[[Any, Tensor, Tensor], Tensor]


def largest_difference(model: nn.Module, plain: nn.Module, loss_of: Loss, n_steps: int = 2) -> float:
    """Return the largest difference between the losses and gradients of a wrapped model on all ranks and a plain model."""
    inputs, targets = batch()
    count = (targets != -100).sum()
    difference = 0.0
    for _ in range(n_steps):  # static_graph=True learns the graph in the first step
        model.zero_grad()
        plain.zero_grad()
        expected = loss_of(plain, inputs, targets) / count
        expected.backward()
        loss = loss_of(model, mine(inputs), mine(targets)) / count
        (loss * dist.get_world_size()).backward()  # the wrappers average gradients over the ranks
        theirs, ours = gradients(plain), gradients(model)
        assert ours.keys() == theirs.keys()
        differences = [(ours[name] - theirs[name]).abs().max().item() for name in theirs]
        difference = max(difference, abs(sum_over_ranks(loss) - expected).item(), *differences)
    return difference


def sharded(model: GPTModel, **options: Any) -> GPTModel:
    from torch.distributed.fsdp import fully_shard

    for block in model.transformer.h:
        fully_shard(block, **options)
    return fully_shard(model, **options)


def replicated(model: GPTModel) -> GPTModel:
    from torch.distributed._composable.replicate_with_fsdp import replicate

    for block in model.transformer.h:
        replicate(block)
    return replicate(model)


def composed(model: GPTModel) -> GPTModel:
    from torch.distributed._composable import replicate

    return replicate(model)


def static(model: GPTModel) -> nn.Module:
    return DistributedDataParallel(model, static_graph=True)


def sharded_and_checkpointed(model: GPTModel) -> GPTModel:
    model.gradient_checkpointing = True
    return sharded(model).train()


def sharded_whole(model: GPTModel) -> GPTModel:
    from torch.distributed.fsdp import fully_shard

    return fully_shard(model)


WRAPPERS: dict[Callable[[GPTModel], nn.Module], list[Loss]] = {
    DistributedDataParallel: [by_targets, by_labels],
    static: [by_targets, by_labels],
    composed: [by_targets, by_token_loss, by_row_losses, by_labels],
    replicated: [by_token_loss, by_labels],
    sharded: [by_targets, by_token_loss, by_row_losses, by_labels],
    sharded_and_checkpointed: [by_token_loss],
    sharded_whole: [by_token_loss],
}


def differences(directory: Path) -> dict[str, float]:
    torch.manual_seed(0)
    models = {
        "new": GPTModel(CONFIG),
        "untied": GPTModel(dataclasses.replace(CONFIG, tie_weights=False)),
        "opened": GPTModel.from_pretrained(directory),
    }
    found = {}
    for kind, model in models.items():
        for wrap, losses in WRAPPERS.items():
            wrapped = wrap(copy.deepcopy(model))
            for loss_of in losses:
                name = f"{kind}, {wrap.__name__}, {loss_of.__name__}"
                try:
                    found[name] = largest_difference(wrapped, copy.deepcopy(model), loss_of)
                except Exception as e:
                    found[name] = repr(e)[:200]
    return found


@pytest.mark.torchrun
def test_losses_and_gradients_are_those_of_one_process(tmp_path: Path) -> None:
    torch.manual_seed(1)
    GPTModel(CONFIG).save_pretrained(tmp_path)
    for found in run_on_ranks(2, differences, tmp_path):
        for k, v in found.items(): print(k, v)
        assert max(found.values()) < TOLERANCE, found
