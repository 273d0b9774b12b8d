"""Records for fine-tuning: read and check them, and split them into training, validation and test sets.

A record is a dict of one of four kinds, which differ in their keys: `instruction` and `output`, with an optional
`input` (Alpaca's format); `messages`, a list of dicts with `role` and `content`; `prompt` and `completion`; or only
`text`. Other keys are ignored. A template (templates.py) turns a record into text. This module needs neither torch nor
a tokenizer.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from MyGPT.files import atomic_write, parse_json, read_json, read_text
from MyGPT.tokenizers.base import refuse_surrogates

Record = Mapping[str, Any]
"""A fine-tuning record: a dict as read from a JSON file, for example with the keys instruction and output."""

ROLES = ("system", "user", "assistant")
"""The allowed values of `role` in the messages of a conversation."""

Kind = Literal["instruction", "messages", "prompt", "text"]

_ANSWER_KEY: dict[Kind, str | None] = {"instruction": "output", "messages": None, "prompt": "completion", "text": None}
"""Maps each kind of record to the key of its answer, or to None if no key contains only the answer. The kind of a
record is the first key of this dict that the record has."""
_BETWEEN = re.compile(r"[\s,]*")  # the characters between two records of a JSON array


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """Return the fine-tuning records in a file, which contains a JSON array or one JSON object per line.

    Records of different kinds may be mixed. A damaged or empty file, or an invalid record, raises ValueError. The
    message contains the path and, for an invalid record, its line.
    """
    return read_json_records(path, check_record)


def read_json_records(path: str | os.PathLike[str], check: Callable[[Any, str], None]) -> list[Any]:
    """Return the values in a file, which contains a JSON array or one JSON value per line.

    `check` is called with each value and a text such as "a.json, line 3", which names the file and line of the value.
    It must raise ValueError if the value is not valid.
    """
    text = read_text(path)
    records = []
    for where, record in (_array_items if text.lstrip().startswith("[") else _line_items)(text, path):
        check(record, where)
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no records: it must contain a JSON array of records, or one record per line")
    return records


def _array_items(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for each item of the JSON array `text`, which was read from the file `path`.

    `where` names the file and line of the item, for example "a.json, line 3, record 1".
    """
    records = parse_json(text, path)
    # Decode each record a second time to find its line, which the parser of the whole array does not report.
    decoder, end, line = json.JSONDecoder(), text.index("[") + 1, 1
    line += text.count("\n", 0, end)
    for number, record in enumerate(records, start=1):
        start = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", end, start)
        yield f"{path}, line {line}, record {number}", record
        end = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, end)


def _line_items(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for each line of JSON in `text`, which was read from the file `path`.

    `where` names the file and line of the value, for example "a.json, line 3". Empty lines are skipped.
    """
    # str.splitlines would also split at characters that JSON allows inside a string, such as U+2028.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line, path, number)
        except ValueError as error:
            raise ValueError(f"{error} (records are a JSON array, or one JSON object per line)") from None
        yield f"{path}, line {number}", record


def kind_of(record: Record) -> Kind:
    """Return the kind of a valid record: "instruction", "messages", "prompt" or "text"."""
    return next(kind for kind in _ANSWER_KEY if kind in record)


def check_record(record: Any, where: str, needs_answer: bool = True) -> None:
    """Raise ValueError if `record` is not a valid fine-tuning record.

    The message starts with `where`, for example "a.json, line 3". If needs_answer is False, the output, the completion
    or the final message of the assistant may be missing.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object, got {_short(record)}")
    if not any(kind in record for kind in _ANSWER_KEY):
        keys = "the key 'instruction' with 'output', 'messages', 'prompt' with 'completion', or 'text'"
        raise ValueError(f"{where}: a record needs {keys}, got {_short(list(record))}")
    kind = kind_of(record)
    if kind == "messages":
        _check_messages(record["messages"], where, needs_answer)
        return
    _check_text(record, kind, where)
    if kind == "instruction" and "input" in record:
        _check_text(record, "input", where)
    answer_key = _ANSWER_KEY[kind]
    if answer_key is not None and needs_answer:
        _check_text(record, answer_key, where)
    # An instruction may be empty, because the template adds text to it.
    if kind != "instruction" and needs_answer and not (record[kind] or record.get(answer_key)):
        keys = f"{kind!r} is" if answer_key is None else f"{kind!r} and {answer_key!r} are"
        raise ValueError(f"{where}: there is nothing to learn from, {keys} empty")


def _check_messages(messages: Any, where: str, needs_answer: bool) -> None:
    """Raise ValueError if `messages` is not a list of valid messages. The error message starts with `where`.

    If needs_answer is True, the last message must also have the role "assistant".
    """
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: 'messages' must be a list of at least one message, got {_short(messages)}")
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        if not isinstance(message, Mapping):
            raise ValueError(f"{place}: a message must be a JSON object, got {_short(message)}")
        for key in ("role", "content"):
            _check_text(message, key, place)
        if message["role"] not in ROLES:
            raise ValueError(f"{place}: 'role' must be one of {', '.join(ROLES)}, got {message['role']!r}")
    last = messages[-1]["role"]
    if needs_answer and last != "assistant":
        allowed = "the role 'assistant', which is the answer to learn"
        raise ValueError(f"{where}: the last of 'messages' must have {allowed}, got {last!r}")


def _check_text(record: Record, key: str, where: str) -> None:
    """Raise ValueError if record[key] is missing or not valid text. The error message starts with `where`."""
    if key not in record:
        raise ValueError(f"{where}: the key {key!r} is missing, the record has {_short(list(record))}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} must be a string, got {_short(record[key])}")
    refuse_surrogates(record[key], f"{where}: {key!r}: ")


def _short(value: object) -> str:
    """Return the repr of a value, cut to 80 characters."""
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


@dataclass(frozen=True)
class Split:
    """The indices of the records for training, validation and test. Each record belongs to exactly one of these sets.

    The validation set serves to choose settings and the best checkpoint, the test set to measure the final model.
    """

    train: tuple[int, ...]
    val: tuple[int, ...]
    test: tuple[int, ...]

    def __post_init__(self) -> None:
        indices = [*self.train, *self.val, *self.test]
        if any(type(index) is not int for index in indices):
            raise ValueError("train, val and test must be lists of whole numbers")
        if sorted(indices) != list(range(len(indices))):
            largest = len(indices) - 1
            raise ValueError(f"train, val and test together must contain each of the numbers 0 to {largest} once")
        if not self.train:
            raise ValueError("train is empty: a split needs at least one record to train on")

    def __len__(self) -> int:
        """Return the total number of records."""
        return len(self.train) + len(self.val) + len(self.test)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the three lists of indices to a JSON file, which `load_split` reads."""
        with atomic_write(path) as file:
            json.dump(asdict(self), file)
            file.write("\n")


def check_split(train_fraction: float, test_fraction: float, seed: int | None = None) -> None:
    """Raise ValueError if `split_records` accepts no such fractions or no such seed."""
    for name, fraction in (("train_fraction", train_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {fraction}")
    total = train_fraction + test_fraction
    if total > 1 + 1e-9:  # Rounding can make a sum such as 0.7 + 0.2 + 0.1 slightly larger than 1.
        raise ValueError(f"train_fraction and test_fraction must add up to at most 1, got {total}")
    if seed is not None and seed < 0:
        raise ValueError(f"the seed of a split must be at least 0, got {seed}")


def split_records(
    n_records: int, train_fraction: float = 0.85, test_fraction: float = 0.10, seed: int | None = None
) -> Split:
    """Split the indices of `n_records` records: the two fractions are for training and test, the rest for validation.

    `seed` shuffles the indices first; seed=None keeps their order. The defaults give the split of the 1,100 records in
    "Build a Large Language Model (From Scratch)", chapter 7: the first 935 for training, the next 110 for test and the
    last 55 for validation.
    """
    check_split(train_fraction, test_fraction, seed)
    n_train, n_test = int(n_records * train_fraction), int(n_records * test_fraction)
    if not n_train:
        raise ValueError(f"train_fraction={train_fraction} of {n_records} records leaves no record to train on")
    order = range(n_records) if seed is None else np.random.default_rng(seed).permutation(n_records).tolist()
    train, test, val = order[:n_train], order[n_train : n_train + n_test], order[n_train + n_test :]
    return Split(tuple(train), tuple(val), tuple(test))


def load_split(path: str | os.PathLike[str]) -> Split:
    """Return the Split that `Split.save` wrote to a file. Any other file raises ValueError with the path."""
    names = [field.name for field in fields(Split)]
    try:
        data = read_json(path)
        if not isinstance(data, dict) or {*data} != {*names} or not all(isinstance(data[name], list) for name in names):
            raise ValueError(f"it must contain the lists {', '.join(names)} and nothing else")
        return Split(**{name: tuple(data[name]) for name in names})
    except ValueError as error:
        raise ValueError(f"{path} is not a split: {error}") from None
