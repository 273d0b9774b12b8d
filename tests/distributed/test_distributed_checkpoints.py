"""Checkpoints that several ranks write and read together: values, other numbers of ranks, failures and kills."""

from __future__ import annotations

import hashlib
import json
import time
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from safetensors.torch import load_file
from torch import Tensor
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor

from MyGPT import GPTConfig, GPTModel, TrainConfig
from MyGPT.training.checkpoint import CheckpointWriter, read_newest, write_snapshot
from MyGPT.training.optim import make_optimizers
from MyGPT.training.snapshot import Snapshot, check_fit, random_states, restore_snapshot, take_snapshot
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from MyGPT.weights.formats.safetensors import read_parts
from ranks import run_on_ranks

# On four ranks, wpe has no rows on the last one. No number of rows but 16 and its multiples is divisible by three.
SIZES = GPTConfig(71, context_length=3, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
CONFIGS = {"adamw": TrainConfig(max_steps=9), "muon": TrainConfig(max_steps=9, optimizer="muon")}
CONTEXT: dict[str, Any] = {"lengths": {}, "recipe": {}, "data": {}, "machine": {}}
MESHES = {"fsdp": (4,), "hybrid": (2, 2), "ddp": (4, 1)}


def make_model(mesh_shape: tuple[int, ...] = (), seed: int = 0) -> GPTModel:
    """Return a model, sharded over the ranks in a mesh of this shape. The model of the empty shape is not sharded."""
    torch.manual_seed(seed)
    model = GPTModel(SIZES)
    if mesh_shape:
        mesh = init_device_mesh("cpu", mesh_shape, mesh_dim_names=("replicate", "shard")[-len(mesh_shape) :])
        for block in model.transformer.h:
            fully_shard(block, mesh=mesh)
        fully_shard(model, mesh=mesh)
        for module in model.modules():
            if isinstance(module, FSDPModule):  # gloo has no average
                module.set_gradient_divide_factor(float(dist.get_world_size()))
                module.set_force_sum_reduction_for_comms(True)
    return model


def train(model: GPTModel, optimizers: list[Any], steps: range) -> None:
    for step in steps:
        ids = torch.randint(71, (2, 4), generator=torch.Generator().manual_seed(step))
        model(ids[:, :-1], labels=ids[:, 1:]).loss.backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()


def snapshot_of(model: GPTModel, optimizers: list[Any], step: int) -> Snapshot:
    return take_snapshot(model, optimizers, RunState(step=step), CONTEXT)


def new_group(seconds: float = 60) -> Any:
    return dist.new_group(backend="gloo", timeout=timedelta(seconds=seconds))


def values(model: GPTModel, optimizers: list[Any]) -> dict[str, Tensor]:
    """Return the whole weights and optimizer states by the names that they have in a checkpoint."""
    names = {parameter: name for name, parameter in model.named_parameters()}
    tensors = {name: parameter.detach() for parameter, name in names.items()}
    for optimizer in optimizers:
        for parameter, state in optimizer.state.items():
            tensors |= {f"{names[parameter]}/{key}": tensor for key, tensor in state.items()}
    return {name: it.full_tensor() if isinstance(it, DTensor) else it.clone() for name, it in tensors.items()}


def restored(
    directory: Path, kind: str, mesh_shape: tuple[int, ...], group: Any
) -> tuple[GPTModel, list[Any], Snapshot]:
    """Read the newest checkpoint into a model with other weights."""
    model = make_model(mesh_shape, seed=9)
    optimizers = make_optimizers(model, CONFIGS[kind])
    snapshot, warnings = read_newest(directory, partial(check_fit, model, CONFIGS[kind]), group)
    assert warnings == []
    restore_snapshot(snapshot, model, optimizers, group)
    return model, optimizers, snapshot


def assert_equal(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in found.items():
        assert torch.equal(tensor, expected[name]), name


def reference(directory: Path) -> dict[str, Tensor]:
    return {name: it for file in sorted(directory.glob("*/*.safetensors")) for name, it in load_file(file).items()}


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories with the checkpoint of a single process, one for each optimizer."""
    place = tmp_path_factory.mktemp("plain")
    for kind, config in CONFIGS.items():
        model = make_model()
        optimizers = make_optimizers(model, config)
        train(model, optimizers, range(2))
        write_snapshot(place / kind, snapshot_of(model, optimizers, 2))
    return place


# Values


def copy_on_ranks(source: Path, target: Path) -> None:
    """Read a checkpoint of each optimizer into models on each mesh, and write a checkpoint of each model."""
    group = new_group()
    meshes = MESHES if dist.get_world_size() == 4 else {"fsdp": (dist.get_world_size(),)}
    for kind in CONFIGS:
        expected = reference(source / kind)
        for mesh, shape in meshes.items():
            model, optimizers, snapshot = restored(source / kind, kind, shape, group)
            assert snapshot.state == RunState(step=2) and snapshot.context.keys() >= CONTEXT.keys()
            assert all(tensor.is_meta for tensor in snapshot.weights.values())  # nothing is read as a whole
            assert_equal(values(model, optimizers), expected)
            with torch.no_grad():
                model(torch.zeros(1, 3, dtype=torch.int64))  # FSDP2 keeps the parameters of the root whole after it
            write_snapshot(target / mesh / kind, snapshot_of(model, optimizers, 2), group)


def read_on_ranks(source: Path, expected: Path) -> None:
    """Read the checkpoints of all meshes and compare them with the original ones."""
    group = new_group()
    for mesh in MESHES:
        for kind in CONFIGS:
            model, optimizers, _ = restored(source / mesh / kind, kind, (dist.get_world_size(),), group)
            assert_equal(values(model, optimizers), reference(expected / kind))


@pytest.fixture(scope="module")
def copies(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories MESH/OPTIMIZER with the same checkpoints, written by four ranks."""
    place = tmp_path_factory.mktemp("copies")
    run_on_ranks(4, copy_on_ranks, plain, place)
    return place


@pytest.mark.torchrun
def test_a_checkpoint_of_a_process_is_read_and_written_by_four_ranks_and_read_again(plain: Path, copies: Path) -> None:
    for mesh in MESHES:
        for kind in CONFIGS:
            model, optimizers, snapshot = restored(copies / mesh / kind, kind, (), None)
            expected = reference(plain / kind)
            assert_equal(values(model, optimizers), expected)
            assert_equal({**snapshot.weights, **snapshot.optimizer}, expected)


@pytest.mark.torchrun
def test_torch_reads_the_files_and_they_hold_each_row_once(plain: Path, copies: Path) -> None:
    for mesh in MESHES:
        path, expected = copies / mesh / "adamw/step-000002", reference(plain / "adamw")
        manifest = json.loads((path / "manifest.json").read_text())
        names = [*(f"shard-0000{n}-of-00004.safetensors" for n in range(1, 5)), "state.json"]
        assert list(manifest) == names and {it.name for it in path.iterdir()} == {*names, "manifest.json"}
        for name, entry in manifest.items():
            content = (path / name).read_bytes()
            assert entry == {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}
        target = {name: torch.empty_like(tensor) for name, tensor in expected.items()}
        with pytest.warns(UserWarning, match="torch.distributed is disabled"):
            dcp.load(target, storage_reader=dcp.HuggingFaceStorageReader(str(path)), no_dist=True)
        assert_equal(target, expected)
        shards = [load_file(path / name) for name in names[:4]]
        assert sum(it.numel() for shard in shards for it in shard.values()) == sum(
            it.numel() for it in expected.values()
        )
        sizes = [sum(it.numel() for it in shard.values()) for shard in shards]
        assert max(sizes) < 1.4 * min(sizes), f"{mesh}: the ranks write {sizes} numbers"


@pytest.mark.torchrun
def test_other_numbers_of_ranks_read_the_checkpoints_of_four_ranks(plain: Path, copies: Path) -> None:
    for n_ranks in (2, 3):
        run_on_ranks(n_ranks, read_on_ranks, copies, plain)


def test_shards_that_torch_wrote_are_read(tmp_path: Path) -> None:
    tensors = {"a": torch.randn(5, 3), "b/step": torch.tensor(2.0)}
    with pytest.warns(UserWarning, match="torch.distributed is disabled"):
        writer = dcp.HuggingFaceStorageWriter(str(tmp_path), save_distributed=True)
        dcp.save(tensors, storage_writer=writer, no_dist=True)
    found = {name: stored.load() for name, stored in read_parts(tmp_path.glob("*.safetensors")).items()}
    assert_equal(found, tensors)


def interrupted_training(directory: Path) -> None:
    """Train to step 4 while a checkpoint of step 2 is written. Then train from this checkpoint to step 4 again."""
    group = new_group()
    model = make_model((2,))
    optimizers = make_optimizers(model, CONFIGS["adamw"])
    train(model, optimizers, range(2))
    writer = CheckpointWriter(directory, 2, 0, group)
    may_write, write_file = directory.parent / f"train-{dist.get_rank()}", safetensors.torch.save_file

    def waiting(*arguments: Any, **keywords: Any) -> None:
        while not may_write.exists():
            time.sleep(0.01)
        write_file(*arguments, **keywords)

    safetensors.torch.save_file = waiting
    writer.start(lambda: snapshot_of(model, optimizers, 2))
    train(model, optimizers, range(2, 4))  # Its collective operations run while the writer's wait.
    assert writer.is_busy
    may_write.touch()
    writer.wait()
    assert writer.failure is None and writer.written == directory / "step-000002" and writer.written_step == 2
    again, others, snapshot = restored(directory, "adamw", (2,), group)
    assert random_states()["torch"] == snapshot.context["random"]["torch"]
    train(again, others, range(2, 4))
    assert_equal(values(again, others), values(model, optimizers))
    for step in (4, 5, 6):
        writer.write(lambda step=step: snapshot_of(model, optimizers, step))
        writer.start(lambda step=step: snapshot_of(model, optimizers, step))  # The same step is replaced.
    writer.wait()
    assert (writer.failure, writer.n_written) == (None, 7)


@pytest.mark.torchrun
def test_training_goes_on_while_a_checkpoint_is_written_and_resumes_bit_for_bit(tmp_path: Path) -> None:
    run_on_ranks(2, interrupted_training, tmp_path / "checkpoints")
    assert sorted(it.name for it in (tmp_path / "checkpoints").iterdir()) == ["latest", "step-000005", "step-000006"]
    assert (tmp_path / "checkpoints/latest").read_text() == "step-000006\n"


# Damage


def read_damaged(directory: Path) -> list[str]:
    """Damage the newest checkpoint in several ways, and return the warnings of this rank."""
    group = new_group()
    model = make_model((2,))
    optimizers = make_optimizers(model, CONFIGS["adamw"])
    for step in (2, 4):
        train(model, optimizers, range(2))
        write_snapshot(directory, snapshot_of(model, optimizers, step), group)
    path, found = directory / "step-000004", []
    for name in ("shard-00001-of-00002.safetensors", "shard-00002-of-00002.safetensors", "state.json", "manifest.json"):
        content = (path / name).read_bytes()
        for damage in (content[:-9], content.replace(b"s", b"x", 1), None):
            dist.barrier()
            if dist.get_rank() == 0:
                (path / name).unlink() if damage is None else (path / name).write_bytes(damage)
            dist.barrier()
            snapshot, warnings = read_newest(directory, partial(check_fit, model, CONFIGS["adamw"]), group)
            assert snapshot.state.step == 2
            found += warnings
            if dist.get_rank() == 0:
                (path / name).write_bytes(content)

    def refuse(snapshot: Snapshot) -> None:
        raise IncompatibleCheckpointError("the recipe has changed")

    with pytest.raises(IncompatibleCheckpointError, match=r"^the recipe has changed$"):
        read_newest(directory, refuse, group)
    with pytest.raises(ValueError, match=r"there is no complete checkpoint in .*; .*rank 1: only here"):
        read_newest(directory, refuse_on_rank_1, group)
    return found


def refuse_on_rank_1(snapshot: Snapshot) -> None:
    if dist.get_rank() == 1:
        raise ValueError("only here")


@pytest.mark.torchrun
def test_a_damaged_shard_is_named_by_all_ranks_and_the_checkpoint_before_is_used(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, read_damaged, tmp_path)
    assert first == second and len(first) == 12
    names = [name for name in ("shard-00001-of", "shard-00002-of", "state", "manifest") for _ in range(3)]
    for name, warning in zip(names, first, strict=True):
        assert warning.startswith(f"{tmp_path / 'step-000004'} is not used: ") and f"step-000004/{name}" in warning


def sign(path: Path) -> None:
    """Write a manifest that fits the files of a checkpoint, as someone who changed them on purpose would do."""
    contents = {it.name: it.read_bytes() for it in path.iterdir() if it.name != "manifest.json"}
    manifest = {n: {"bytes": len(c), "sha256": hashlib.sha256(c).hexdigest()} for n, c in sorted(contents.items())}
    (path / "manifest.json").write_text(json.dumps(manifest))
