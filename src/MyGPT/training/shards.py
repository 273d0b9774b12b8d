"""The tensors of a checkpoint that several ranks write and read together, with torch.distributed.checkpoint.

torch.distributed.checkpoint plans which rank writes which rows of which tensor, and which rows each rank needs. This
module stores them in safetensors files, the format of torch's HuggingFaceStorageWriter, but writes them without a second
copy in memory, and reads them with the checks that every file of unknown origin gets. No file is a pickle.

Importing this module takes a second, so a single process does not import it.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import ProcessGroup
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    TensorProperties,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan, LoadPlanner, SavePlan, SavePlanner
from torch.distributed.checkpoint.state_dict_loader import load
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import StorageReader, StorageWriter, WriteResult
from torch.futures import Future

from MyGPT.messages import error_message
from MyGPT.training.state import IncompatibleCheckpointError
from MyGPT.weights.formats.safetensors import StoredTensor, write_safetensors

T = TypeVar("T")


def on_all_ranks(group: ProcessGroup, function: Callable[[], T]) -> list[T]:
    """Call `function` on all ranks of `group`, and return the results of all ranks in their order.

    If the function raises an exception on any rank, all ranks raise the exception of the first such rank, as an
    IncompatibleCheckpointError, ValueError, OSError or RuntimeError. Its message names the rank, unless all ranks raised
    the same exception. ConnectionError is raised if a rank has died or does not answer within the timeout of the group.
    """
    result, failure = None, None
    try:
        result = function()
    except Exception as error:
        kinds = (IncompatibleCheckpointError, ValueError, OSError)
        kind = next((kind for kind in kinds if isinstance(error, kind)), RuntimeError)
        failure = kind, error_message(error) or type(error).__name__
    answers: list[Any] = [None] * dist.get_world_size(group)
    try:
        dist.all_gather_object(answers, (result, failure), group=group)
    except RuntimeError as error:
        raise _lost_contact(error) from error
    failures = {rank: answer[1] for rank, answer in enumerate(answers) if answer[1] is not None}
    if failures:
        rank, (kind, message) = next(iter(failures.items()))
        is_same = len(failures) == len(answers) and len(set(failures.values())) == 1
        raise kind(message if is_same else f"rank {rank}: {message}")
    return [answer[0] for answer in answers]


def save_shard(path: Path, tensors: Mapping[str, Tensor], shown_as: Path, group: ProcessGroup) -> Callable[[], bool]:
    """Write this rank's share of `tensors` to the file `path`, in agreement with the other ranks of `group`.

    Return a function that raises the OSError of this rank if its file could not be written, and otherwise returns True
    if this rank had anything to write. All ranks must call `save_shard`, with the same names of tensors. Rows that
    several ranks hold are written by one of them.

    Args:
        path: the file of this rank.
        tensors: tensors on the CPU. The DTensors among them are divided into groups of rows.
        shown_as: the path that the file will have later, for errors.
        group: the gloo process group of the ranks.
    """
    writer = _ShardWriter(path, shown_as)
    planner = DefaultSavePlanner(flatten_state_dict=False, flatten_sharded_tensors=False)
    try:
        save(dict(tensors), storage_writer=writer, planner=planner, process_group=group)
    except RuntimeError as error:
        raise _lost_contact(error) from error
    except CheckpointException as error:  # derived from BaseException
        raise _first_failure(error) from error
    return writer.finished


def load_shards(targets: Mapping[str, Tensor], stored: Mapping[str, StoredTensor]) -> None:
    """Copy the values of the stored tensors into `targets`. Of a DTensor, only the rows of this rank are read.

    Raises ValueError if a file is damaged, or if a stored tensor is missing or has another shape than its target.
    """
    with warnings.catch_warnings(), torch.no_grad():
        # Each rank reads what it needs by itself. The caller combines the errors of all ranks.
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        try:
            load(dict(targets), storage_reader=_ShardReader(stored), no_dist=True)
        except CheckpointException as error:
            raise _first_failure(error) from error


class _ShardWriter(StorageWriter):
    """Writes the tensors that torch.distributed.checkpoint assigns to this rank to one safetensors file."""

    def __init__(self, path: Path, shown_as: Path) -> None:
        self._path, self._shown_as = path, shown_as
        self._has_file = False
        self._failure: OSError | None = None

    def finished(self) -> bool:
        """Return True if this rank had anything to write. Raises OSError if its file could not be written."""
        if self._failure is not None:
            raise self._failure
        return self._has_file

    def write_data(self, plan: SavePlan, planner: SavePlanner) -> Future[list[WriteResult]]:
        tensors, positions = {}, {}
        for item in plan.items:
            tensor = planner.resolve_data(item)
            assert isinstance(tensor, Tensor) and item.tensor_data is not None
            if tensor.numel() > 0:  # A rank has no rows of a tensor that is shorter than the number of ranks.
                tensors[item.index.fqn], positions[item.index.fqn] = tensor, item.tensor_data.chunk.offsets
        # The caller passes a failure to all ranks. In Python 3.13, some versions of torch cannot pickle exceptions.
        try:
            self._write(tensors, positions)
        except OSError as error:
            if error.errno is not None:  # The error of a full disk names no file.
                error.filename = str(self._shown_as)
            self._failure = error
        written: Future[list[WriteResult]] = Future()
        written.set_result([])
        return written

    def _write(self, tensors: dict[str, Tensor], positions: dict[str, torch.Size]) -> None:
        if not tensors:
            return
        if not self._path.parent.is_dir():
            raise FileNotFoundError(
                f"cannot write {self._shown_as}: the directory that rank 0 has made is missing; all ranks must run on the "
                "same file system"
            )
        write_safetensors(self._path, tensors, self._shown_as, positions)
        with open(self._path, "rb") as file:  # Another machine than this one could not flush the file.
            os.fsync(file.fileno())
        self._has_file = True

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_writer(self, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: SavePlan) -> SavePlan:
        return plan

    def prepare_global_plan(self, plans: list[SavePlan]) -> list[SavePlan]:
        return plans

    def finish(self, metadata: Metadata, results: list[list[WriteResult]]) -> None:
        pass

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


class _ShardReader(StorageReader):
    """Gives torch.distributed.checkpoint the rows that a rank needs of tensors in memory-mapped safetensors files."""

    def __init__(self, stored: Mapping[str, StoredTensor]) -> None:
        self._parts = {(name, row): part for name, tensor in stored.items() for row, part in tensor.parts}
        self._stored = stored

    def read_metadata(self, *args: Any, **kwargs: Any) -> Metadata:
        return Metadata(
            {
                name: TensorStorageMetadata(
                    TensorProperties(dtype=tensor.dtype or torch.get_default_dtype()),
                    torch.Size(tensor.shape),
                    [
                        ChunkStorageMetadata(_position(row, len(part.shape)), torch.Size(part.shape))
                        for row, part in tensor.parts
                    ],
                )
                for name, tensor in self._stored.items()
            }
        )

    def read_data(self, plan: LoadPlan, planner: LoadPlanner) -> Future[None]:
        for item in plan.items:
            first_row = item.storage_index.offset[0] if item.storage_index.offset else 0
            part = self._parts[item.storage_index.fqn, first_row].load()
            ends = zip(item.storage_offsets, item.lengths, strict=True)
            target = planner.resolve_tensor(item).detach()
            target.copy_(part[tuple(slice(start, start + length) for start, length in ends)])
            planner.commit_tensor(item, target)
        read: Future[None] = Future()
        read.set_result(None)
        return read

    def reset(self, checkpoint_id: str | os.PathLike[str] | None = None) -> None:
        pass

    def set_up_storage_reader(self, metadata: Metadata, is_coordinator: bool, *args: Any, **kwargs: Any) -> None:
        pass

    def prepare_local_plan(self, plan: LoadPlan) -> LoadPlan:
        return plan

    def prepare_global_plan(self, plans: list[LoadPlan]) -> list[LoadPlan]:
        return plans

    @classmethod
    def validate_checkpoint_id(cls, checkpoint_id: str | os.PathLike[str]) -> bool:
        return False


def _position(row: int, n_dimensions: int) -> torch.Size:
    return torch.Size((row, *[0] * (n_dimensions - 1)) if n_dimensions else ())


def _lost_contact(error: RuntimeError) -> ConnectionError:
    return ConnectionError(f"another rank has died or does not answer: {error_message(error)}")


def _first_failure(error: CheckpointException) -> Exception:
    """Return the exception of the first rank that failed, or a RuntimeError for one that is no Exception."""
    failure = next(iter(error.failures.values()))[0]
    return failure if isinstance(failure, Exception) else RuntimeError(str(failure))
