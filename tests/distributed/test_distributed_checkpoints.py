"""Checkpoints that several ranks write and read together: values, other numbers of ranks, failures and kills."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import shutil
import signal
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
from MyGPT.training.directory import remove_unfinished
from MyGPT.training.optim import make_optimizers
from MyGPT.training.snapshot import (
    Snapshot,
    check_fit,
    check_unchanged,
    identify,
    random_states,
    restore_snapshot,
    take_snapshot,
)
from MyGPT.training.state import IncompatibleCheckpointError, RunState
from MyGPT.weights.formats.safetensors import read_parts, write_safetensors
from ranks import run_on_ranks

# On four ranks, wpe has no rows on the last one. No number of rows but 16 and its multiples is divisible by three.
SIZES = GPTConfig(71, context_length=3, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
CONFIGS = {"adamw": TrainConfig(max_steps=9), "muon": TrainConfig(max_steps=9, optimizer="muon")}
CONTEXT: dict[str, Any] = {"lengths": {}, "recipe": {}, "data": {}, "machine": {}}
MESHES = {"fsdp": (4,), "hybrid": (2, 2), "ddp": (4, 1)}
KINDS = {"fsdp": "adamw", "hybrid": "muon", "ddp": "adamw"}


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
    """Read checkpoints into models on several meshes, and write a checkpoint of each model."""
    group = new_group()
    for mesh, kind in KINDS.items():
        model, optimizers, snapshot = restored(source / kind, kind, MESHES[mesh], group)
        assert snapshot.state == RunState(step=2) and snapshot.context.keys() >= CONTEXT.keys()
        assert all(tensor.is_meta for tensor in snapshot.weights.values())  # nothing is read as a whole
        assert_equal(values(model, optimizers), reference(source / kind))
        with torch.no_grad():
            model(torch.zeros(1, 3, dtype=torch.int64))  # FSDP2 keeps the parameters of the root whole after it
        write_snapshot(target / mesh, snapshot_of(model, optimizers, 2), group)
    for model in (whole := make_model(), sharded := make_model((4,))):
        model.requires_grad_(False)
    context = identify(sharded, None, None, torch.device("cpu"))
    assert context["data"] == identify(whole, None, None, torch.device("cpu"))["data"]  # of the frozen weights
    context["recipe"] = snapshot.context["recipe"]
    changed = Snapshot(RunState(), {}, {}, snapshot.context | {"data": context["data"]})
    assert "ranks was 1 and is 4: the results may differ in the last digits" in check_unchanged(changed, context, [])


def read_on_ranks(source: Path, expected: Path) -> None:
    """Read the checkpoints of all meshes and compare them with the original ones."""
    group = new_group()
    for mesh, kind in KINDS.items():
        model, optimizers, _ = restored(source / mesh, kind, (dist.get_world_size(),), group)
        assert_equal(values(model, optimizers), reference(expected / kind))


@pytest.fixture(scope="module")
def copies(plain: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Directories, one for each mesh, with the same checkpoints, written by four ranks."""
    place = tmp_path_factory.mktemp("copies")
    run_on_ranks(4, copy_on_ranks, plain, place)
    return place


@pytest.mark.torchrun
def test_a_checkpoint_of_a_process_is_read_and_written_by_four_ranks_and_read_again(plain: Path, copies: Path) -> None:
    for mesh, kind in KINDS.items():
        model, optimizers, snapshot = restored(copies / mesh, kind, (), None)
        expected = reference(plain / kind)
        assert_equal(values(model, optimizers), expected)
        assert_equal({**snapshot.weights, **snapshot.optimizer}, expected)


@pytest.mark.torchrun
def test_torch_reads_the_files_and_they_hold_each_row_once(plain: Path, copies: Path) -> None:
    for mesh, kind in KINDS.items():
        path, expected = copies / mesh / "step-000002", reference(plain / kind)
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


ROWS = torch.arange(15.0).reshape(5, 3)


@pytest.mark.parametrize(
    ("tensor", "position"),
    [
        *((ROWS[2:], position) for position in ([1, 0], [3, 0], [2, 1], [-2, 0], [2], [2, 0, 0], [2.0, 0], [True, 0])),
        *((ROWS[2:], position) for position in ([], None, "20", {"0": 2}, [[2], 0])),
        (ROWS[2:], [10**400, 0]),
        (ROWS[2:, :2], [2, 0]),
        (ROWS[2:].half(), [2, 0]),
        (ROWS[:0], [0, 0]),
        (ROWS[:0], [2, 0]),
        (ROWS[0], [2]),
        (ROWS[0, 0], []),
    ],
)
def test_parts_that_do_not_form_a_tensor_are_refused(tensor: Tensor, position: Any, tmp_path: Path) -> None:
    for name, part, place in (("a", ROWS[:2], [0, 0]), ("b", tensor, position)):
        metadata = {"DCP_SHARDING_INFO": json.dumps({"x": {"saved_offsets": place}})}
        safetensors.torch.save_file({"x": part.contiguous()}, tmp_path / name, metadata=metadata)
    with pytest.raises(ValueError, match=r"/(a|b) is damaged: .* x"):
        read_parts([tmp_path / "a", tmp_path / "b"])


@pytest.mark.parametrize("info", ["", "[]", "3", '{"x": 3}', '{"y": {"saved_offsets": [2, 0]}}', "[" * 10**5])
def test_metadata_of_a_shard_that_are_wrong_are_refused(info: str, tmp_path: Path) -> None:
    safetensors.torch.save_file({"x": ROWS}, tmp_path / "a", metadata={"DCP_SHARDING_INFO": info})
    with pytest.raises(ValueError, match="/a"):
        read_parts([tmp_path / "a"])


def test_parts_of_several_files_form_one_tensor(tmp_path: Path) -> None:
    for name, rows in (("b", slice(2, 5)), ("a", slice(0, 2))):
        positions = {"x": [rows.start, 0], "n": []}
        tensors = {"x": ROWS[rows].clone()} | ({"n": torch.tensor(2.0)} if name == "a" else {})
        write_safetensors(tmp_path / name, tensors, positions=positions)
    tensors = read_parts([tmp_path / "b", tmp_path / "a"])
    assert {name: (it.shape, it.dtype) for name, it in tensors.items()} == {
        "x": ((5, 3), torch.float32),
        "n": ((), torch.float32),
    }
    assert torch.equal(tensors["x"].load(), ROWS) and tensors["n"].load() == 2


# Failures and kills


def replicated(step: int) -> Snapshot:
    """Return a snapshot of tensors that all ranks hold as a whole, so that each rank writes some of them."""
    weights = {name: torch.full((64, 64), float(step)) for name in "abcd"}
    return Snapshot(RunState(step=step), weights, {}, CONTEXT | {"random": random_states()})


def fail_in_many_ways(directory: Path) -> list[str]:
    """Make writing fail on one rank after the other, and return the errors of this rank."""
    group, errors = new_group(), []
    write_snapshot(directory, replicated(1), group)
    for failing_rank in (0, 1):
        for target, name in ((safetensors.torch, "save_file"), (os, "fsync"), (os, "rename"), (Path, "is_dir")):
            with pytest.MonkeyPatch.context() as patch:
                if dist.get_rank() == failing_rank:
                    patch.setattr(target, name, full_disk if name != "is_dir" else lambda path: False)
                try:
                    write_snapshot(directory, replicated(2), group)
                except OSError as error:
                    errors.append(str(error))
                else:
                    errors.append("")
            dist.barrier()
            if dist.get_rank() == 0:
                found = {it.name for it in directory.iterdir()} - {"latest"}
                assert found == ({"step-000001"} if errors[-1] else {"step-000001", "step-000002"}), (name, found)
                shutil.rmtree(directory / "step-000002", ignore_errors=True)
            dist.barrier()
    patient, began = new_group(1.0), time.monotonic()
    if dist.get_rank() == 0:  # The other rank does not take part.
        with pytest.raises(OSError, match=r"cannot write .*step-000002: another rank has died or does not answer: .*"):
            write_snapshot(directory, replicated(2), patient)
        assert 1 < time.monotonic() - began < 5
        assert {it.name for it in directory.iterdir()} == {"step-000001", "latest"}
    dist.barrier()
    with pytest.raises(
        ConnectionError, match=r"cannot write .*: the ranks write different checkpoints: step-000005, step"
    ):
        write_snapshot(directory, replicated(5 + dist.get_rank()), group)
    write_snapshot(directory, replicated(3), group)
    return errors


def full_disk(*arguments: Any, **keywords: Any) -> None:
    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


@pytest.mark.torchrun
def test_a_failure_on_one_rank_is_an_error_on_all_that_names_the_rank_and_leaves_nothing(tmp_path: Path) -> None:
    first, second = run_on_ranks(2, fail_in_many_ways, tmp_path)
    assert first == second
    for rank, errors in ((0, first[:4]), (1, first[4:])):
        shard = tmp_path / f"step-000002/shard-0000{rank + 1}-of-00002.safetensors"
        assert errors[:2] == [f"rank {rank}: {shard}: No space left on device"] * 2
    assert first[2] == f"rank 0: {shard.parent}: No space left on device"
    assert first[6] == ""  # Only rank 0 renames the directory.
    assert first[7].startswith(
        f"rank 1: cannot write {shard}: the directory that rank 0 has made is missing; all ranks"
    )
    assert read_newest(tmp_path)[0].state.step == 3


def die_in_a_write(place: Path) -> tuple[str, float]:
    """Write a checkpoint in each of two pairs of ranks. Kill the second rank of the one and the first of the other."""
    rank = dist.get_rank()
    groups = [dist.new_group(pair, backend="gloo", timeout=timedelta(seconds=30)) for pair in ((0, 1), (2, 3))]
    directory = place / f"{rank // 2}/checkpoints"
    writer = CheckpointWriter(directory, 2, 0, groups[rank // 2])
    writer.write(lambda: replicated(1))
    if rank in (1, 2):
        safetensors.torch.save_file = die_in_the_middle_of_a_file
    began = time.monotonic()
    writer.start(lambda: replicated(2))
    writer.wait()
    seconds = time.monotonic() - began
    with pytest.raises(ConnectionError, match="another rank has died"):
        writer.write(lambda: replicated(3))  # without waiting again
    assert writer.written_step == 1 and writer.failure is not None
    return str(writer.failure), seconds


def die_in_the_middle_of_a_file(tensors: Any, path: Path, metadata: Any) -> None:
    path.write_bytes(b"half")
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.torchrun
def test_a_rank_that_is_killed_while_it_writes_leaves_the_checkpoint_before(tmp_path: Path) -> None:
    results = run_on_ranks(4, die_in_a_write, tmp_path, may_die=(1, 2))
    for pair, (failure, seconds) in enumerate((results[0], results[3])):
        path = tmp_path / f"{pair}/checkpoints/step-000002"
        assert failure.startswith(f"cannot write {path}: another rank has died or does not answer: ")
        assert seconds < 10  # The closed connection is noticed before the timeout.
    left = [sorted(it.name for it in (tmp_path / pair / "checkpoints").iterdir()) for pair in "01"]
    assert left[0] == ["latest", "step-000001"]
    assert left[1][1:] == ["latest", "step-000001"] and left[1][0].startswith(".step-000002.")
    remove_unfinished(tmp_path / "1")
    assert sorted(it.name for it in (tmp_path / "1/checkpoints").iterdir()) == left[0]
    for pair in "01":
        snapshot, warnings = read_newest(tmp_path / pair / "checkpoints")
        assert snapshot.state.step == 1 and warnings == []
