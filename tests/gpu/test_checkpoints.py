"""Checkpoints of a sharded model: their snapshot is on the CPU, wherever the model is."""

from __future__ import annotations

from functools import partial
from pathlib import Path

import torch
import torch.distributed as dist
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard

from MyGPT import GPTModel, TrainConfig
from MyGPT.training.checkpoint import CheckpointWriter, read_newest
from MyGPT.training.optim import make_optimizers
from MyGPT.training.snapshot import check_fit, restore_snapshot, take_snapshot
from MyGPT.training.state import RunState

SIZES = {"vocab_size": 71, "context_length": 8, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.0}
CONFIG = TrainConfig(max_steps=9)


def sharded_model(seed: int, device: torch.device) -> GPTModel:
    torch.manual_seed(seed)
    model = GPTModel(SIZES).to(device)
    for module in (*model.transformer.h, model):
        fully_shard(module, mesh=init_device_mesh(device.type, (1,)))
    return model


def test_a_sharded_model_is_written_from_a_copy_on_the_cpu_and_restored(device: torch.device, tmp_path: Path) -> None:
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    try:
        group = dist.new_group(backend="gloo")
        model = sharded_model(0, device)
        optimizers = make_optimizers(model, CONFIG)
        ids = torch.arange(9, device=device)[None]
        for _ in range(2):
            model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
            optimizers[0].step()
        snapshot = take_snapshot(
            model, optimizers, RunState(step=2), {"lengths": {}, "recipe": {}, "data": {}, "machine": {}}
        )
        copies = {**snapshot.weights, **snapshot.optimizer}.values()
        assert {getattr(it, "_local_tensor", it).device.type for it in copies} == {"cpu"}
        writer = CheckpointWriter(tmp_path, 1, 0, group)
        writer.start(lambda: snapshot)
        writer.wait()
        assert writer.failure is None
        again = sharded_model(1, device)
        others = make_optimizers(again, CONFIG)
        newest, warnings = read_newest(tmp_path, partial(check_fit, again, CONFIG), group)
        restore_snapshot(newest, again, others, group)
        assert warnings == []
        for (name, restored), parameter in zip(again.named_parameters(), model.parameters(), strict=True):
            assert torch.equal(restored.full_tensor(), parameter.full_tensor()), name  # type: ignore[attr-defined]
            states, expected = others[0].state[restored], optimizers[0].state[parameter]
            assert states.keys() == expected.keys() == {"step", "exp_avg", "exp_avg_sq"}
            for key in ("exp_avg", "exp_avg_sq"):
                assert torch.equal(states[key].full_tensor(), expected[key].full_tensor()), (name, key)
            assert states["step"] == 2 and states["step"].device == expected["step"].device
    finally:
        dist.destroy_process_group()
