"""Training on several ranks with FSDP2 (Zhao et al., 2023). All ranks together reach the losses of a single process.

Each block is one FSDP2 group. The root group holds everything else: the embeddings, the final LayerNorm and the tied
head. `fsdp` divides the weights, gradients and optimizer states over shard_size ranks. `ddp` is the special case in which each
rank holds all weights, a shard of size 1. Gradients are summed, not averaged, because each loss is already divided by the
number of targets of the whole batch.
"""

from __future__ import annotations

from datetime import timedelta
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from MyGPT import ranks
from MyGPT.training.config import TrainConfig


def distribute(
    model: nn.Module, shard_size: int, config: TrainConfig, device: torch.device, dtype: torch.dtype | None
) -> None:
    """Make `model`, which is on `device`, a model that all ranks train together, in place.

    The weights become those of rank 0, and each shard_size ranks share one copy of them. `dtype` is the dtype of
    autocast, or None without autocast.
    """
    if ranks.world_size() > 1:
        for parameter in model.parameters():
            dist.broadcast(parameter.detach(), src=0)
    from torch.distributed.fsdp import FSDPModule, MixedPrecisionPolicy, fully_shard  # takes a second

    mesh = _mesh(device, shard_size, timedelta(minutes=config.timeout_minutes))
    transformer: Any = model.transformer
    # Under autocast, blocks are gathered in its dtype, which halves the communication. Their inputs stay in float32, which a
    # CPU's LayerNorm does not accept together with weights in bfloat16.
    policy = MixedPrecisionPolicy(param_dtype=dtype, reduce_dtype=torch.float32, cast_forward_inputs=False)
    is_narrow = dtype is not None and device.type != "cpu"
    for block in transformer.h:
        fully_shard(block, mesh=mesh, mp_policy=policy if is_narrow else MixedPrecisionPolicy())
    fully_shard(model, mesh=mesh)
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.set_gradient_divide_factor(1.0)
            module.set_force_sum_reduction_for_comms(True)  # gloo has no other way to divide by 1


def _mesh(device: torch.device, size: int, timeout: timedelta) -> DeviceMesh:
    """Return a mesh of all ranks: one-dimensional if all share one copy of the weights, otherwise (replicate, shard)."""
    n = ranks.world_size()
    if size == n:
        return init_device_mesh(device.type, (n,), mesh_dim_names=("shard",))
    columns = torch.arange(n).view(-1, size)
    shard_group, _ = dist.new_subgroups(size, timeout=timeout)
    replicate_group, _ = dist.new_subgroups_by_enumeration(columns.T.tolist(), timeout=timeout)
    names = ("replicate", "shard")
    return DeviceMesh.from_group([replicate_group, shard_group], device.type, columns, mesh_dim_names=names)


def gather_weights(distributed: nn.Module, whole: nn.Module) -> None:
    """Copy the trained weights of a distributed model into `whole`, a model of the same structure. All ranks take part."""
    parameters = dict(whole.named_parameters())
    with torch.no_grad():
        ranks.reshard(distributed)
        for name, parameter in distributed.named_parameters():
            if parameter.requires_grad:
                parameters[name].copy_(ranks.whole(parameter))


def reduce_gradients(model: nn.Module, is_last: bool) -> None:
    """Choose whether the next backward pass adds up the gradients of all copies of the weights.

    Only the last micro-batch of a step does.
    """
    if hasattr(model, "set_requires_all_reduce"):  # a method of FSDPModule
        model.set_requires_all_reduce(is_last)  # type: ignore[operator]


Rows = tuple[tuple[Tensor, ...], bool]
"""Rows of a batch, and True if they count. A rank without rows of its own computes a row that does not count."""


def micro_batches(batch: tuple[Tensor, ...], size: int | None) -> list[Rows]:
    """Return this rank's rows of a batch in parts of at most `size` rows (None: in one part).

    All ranks get the same number of parts, because all must take part in the communication of each part.
    """
    n_rows = -(-len(batch[0]) // ranks.world_size())
    start = ranks.rank() * n_rows
    mine = [tensor[start : start + n_rows] for tensor in batch]
    parts = []
    for first in range(0, n_rows, size or n_rows):
        part = tuple(tensor[first : min(n_rows, first + (size or n_rows))] for tensor in mine)
        parts.append((part, True) if len(part[0]) else (tuple(tensor[:1] for tensor in batch), False))
    return parts


def seed_step(seed: int, step: int) -> None:
    """Seed torch's random generators for a step, differently on each of several ranks. A single rank is not seeded.

    Dropout depends on (seed, step, rank) only, so a checkpoint needs no random state of each rank.
    """
    if ranks.world_size() > 1:
        words = np.random.SeedSequence((seed, step, ranks.rank())).generate_state(2, np.uint32)
        torch.manual_seed(int(words[0]) << 32 | int(words[1]))
