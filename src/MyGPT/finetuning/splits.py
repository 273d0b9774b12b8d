"""Split files of records into training, validation and test sets, and form the batches of `mygpt dpo` and `mygpt classify`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from torch import Tensor

from MyGPT.data.formats import find_arrow_files
from MyGPT.data.instructions import LengthGroupedSampler
from MyGPT.data.records import Split, check_split, split_records
from MyGPT.messages import near_path

MAX_BATCH_TOKENS = 4096
"""Maximum number of tokens in an evaluation batch, including padding, unless a single example is longer."""


@dataclass(frozen=True)
class SplitOptions:
    """The options that name the files of records, and that split the records into training, validation and test sets."""

    data: str
    """File of records: JSON, JSON Lines, CSV or Parquet, or the directory of a data set saved by datasets."""
    val_data: str | None = None
    """File of validation records. Default: a part of data."""
    test_data: str | None = None
    """File of test records. Default: a part of data."""
    train_fraction: float = 0.85
    """Fraction of the records for training."""
    test_fraction: float = 0.1
    """Fraction of the records for the final test. Those in neither train_fraction nor test_fraction are for validation."""
    split_seed: int | None = None
    """Seed for splitting the records at random. Default: split the records in the order of the file."""

    def __post_init__(self) -> None:
        check_split(self.train_fraction, self.test_fraction, self.split_seed)

    def check_files(self) -> None:
        """Raise FileNotFoundError if one of the files does not exist."""
        for path in filter(None, (self.data, self.val_data, self.test_data)):
            require_file(path)


def require_file(path: str | os.PathLike[str]) -> None:
    """Raise FileNotFoundError if `path` is neither a file nor a data set that `datasets.Dataset.save_to_disk` wrote."""
    if not Path(path).is_file() and not find_arrow_files(path):
        reason = "it is a directory" if Path(path).is_dir() else f"there is no such file{near_path(path)}"
        raise FileNotFoundError(f"cannot read the records in {path}: {reason}")


@dataclass(frozen=True)
class Part:
    """The records of one set, such as the training set, and the name of each record for error messages."""

    records: list[Any]
    names: list[str]


@dataclass(frozen=True)
class Parts:
    """The records for training, validation and test. A set without records is None, except the training set."""

    train: Part
    val: Part | None
    test: Part | None
    split: Split
    """The indices of the records of the file `data` in each set."""


def read_parts(options: SplitOptions, read: Callable[[str], list[Any]]) -> Parts:
    """Read the files of `options` with the function `read`, which returns the records of a file, and split the records.

    If val_data or test_data names a file, the records of `data` that would have been in this set are for training.
    """
    records = read(options.data)
    train, test = options.train_fraction, options.test_fraction
    if options.test_data:
        train, test = train + test, 0.0
    if options.val_data:
        train = 1 - test
    split = split_records(len(records), round(train, 9), test, options.split_seed)

    def part(indices: tuple[int, ...], path: str | None) -> Part | None:
        if path:
            return _named(path, read(path))
        named = _named(options.data, records)
        return Part([named.records[i] for i in indices], [named.names[i] for i in indices]) if indices else None

    training = part(split.train, None)
    assert training is not None  # `split_records` raises an error if no record is left for training
    return Parts(training, part(split.val, options.val_data), part(split.test, options.test_data), split)


def _named(path: str | os.PathLike[str], records: list[Any]) -> Part:
    return Part(records, [f"{path}, record {number}" for number in range(1, len(records) + 1)])


class EncodedExamples(Protocol):
    """An interface for data sets that `ExampleSampler` and `ExampleBatches` cut into batches."""

    lengths: npt.NDArray[np.int64]
    """The number of tokens in each example, (n_examples,)."""

    def __len__(self) -> int:
        """Return the number of examples."""

    def examples(self, indices: Sequence[int]) -> tuple[Tensor, ...]:
        """Return the examples with these indices as tensors whose first dimension is the number of examples."""

    def fingerprint(self) -> str:
        """Return a hash of all examples."""


class ExampleSampler:
    """An endless series of training batches of examples of similar length. Each batch depends only on seed and step."""

    def __init__(self, dataset: EncodedExamples, batch_size: int, seed: int) -> None:
        same_interface: Any = dataset  # as far as the order of the examples is concerned
        self.dataset, self._order = dataset, LengthGroupedSampler(same_interface, batch_size, seed=seed)
        self.batches_per_epoch = self._order.batches_per_epoch

    def batch(self, step: int) -> tuple[Tensor, ...]:
        """Return the batch of a training step."""
        return self.dataset.examples(self._order.indices(step))

    def fingerprint(self) -> str:
        """Return a hash of all examples, with which a resumed training run detects changed data."""
        return self.dataset.fingerprint()


@dataclass(frozen=True)
class ExampleBatches:
    """The batches for evaluating a model on all examples of a data set, sorted by length to reduce padding."""

    dataset: EncodedExamples

    def batches(self, whole: bool = True) -> Iterator[tuple[Tensor, ...]]:
        """Yield all examples in batches of at most MAX_BATCH_TOKENS tokens. `whole` is ignored."""
        group: list[int] = []
        for index in self.dataset.lengths.argsort(kind="stable").tolist():
            if group and (len(group) + 1) * int(self.dataset.lengths[index]) > MAX_BATCH_TOKENS:
                yield self.dataset.examples(group)
                group = []
            group.append(index)
        yield self.dataset.examples(group)

    def fingerprint(self) -> str:
        """Return a hash of all examples."""
        return self.dataset.fingerprint()
