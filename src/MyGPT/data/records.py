"""Examples for fine-tuning, read from a file and checked, and their division into training, validation and test.

A record is a dict with `instruction`, `output` and, if it wants, `input` (Alpaca's); or with `messages`, a list of
{"role", "content"}; or with `prompt` and `completion`; or with `text` alone. Other keys are left as they are. What is made
of a record is up to a template (templates.py). This module needs neither torch nor a tokenizer.
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

ROLES = ("system", "user", "assistant")

Kind = Literal["instruction", "messages", "prompt", "text"]

_ANSWER_KEY: dict[Kind, str | None] = {"instruction": "output", "messages": None, "prompt": "completion", "text": None}
"""A record is of the first of these kinds whose key it has; beside it, the key under which its answer is."""
_BETWEEN = re.compile(r"[\s,]*")
"""What stands between the records of an array."""


def read_records(path: str | os.PathLike[str]) -> list[dict[str, Any]]:
    """The records of a file that is a JSON array, or has a JSON object on each line; any kinds, also mixed.

    A missing key, a value of the wrong type, text that is not UTF-8, no JSON, or no record at all is a ValueError that
    names the file, the line (of an array: also which record, counted from 1) and the key.
    """
    return read_json_records(path, check_record)


def read_json_records(path: str | os.PathLike[str], check: Callable[[Any, str], None]) -> list[Any]:
    """What a JSON array holds, or each line of a file; `check` gets each of them and where it stands."""
    text = read_text(path)
    records = []
    for where, record in (_of_array if text.lstrip().startswith("[") else _of_lines)(text, path):
        check(record, where)
        records.append(record)
    if not records:
        raise ValueError(f"{path} has no records: it needs a JSON array of them, or one on each line")
    return records


def _of_array(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    records = parse_json(text, path)
    # Again, one by one: the parser does not say on which line a record began.
    decoder, end, line = json.JSONDecoder(), text.index("[") + 1, 1
    line += text.count("\n", 0, end)
    for number, record in enumerate(records, start=1):
        start = _BETWEEN.match(text, end).end()  # type: ignore[union-attr]
        line += text.count("\n", end, start)
        yield f"{path}, line {line}, record {number}", record
        end = decoder.raw_decode(text, start)[1]
        line += text.count("\n", start, end)


def _of_lines(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    # Not splitlines(), for which some characters that JSON allows inside a text end a line.
    for number, line in enumerate(text.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            record = parse_json(line, path, number)
        except ValueError as error:
            raise ValueError(f"{error} (records are a JSON array, or one JSON object a line)") from None
        yield f"{path}, line {number}", record


def kind_of(record: Record) -> Kind:
    """The key that tells what a checked record is."""
    return next(kind for kind in _ANSWER_KEY if kind in record)


def check_record(record: Any, where: str, needs_answer: bool = True) -> None:
    """A ValueError that begins with `where` unless the record is one of the four kinds.

    Without `needs_answer` it may be a question only: no output, no completion, no assistant's message at the end.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object, got {_short(record)}")
    if not any(kind in record for kind in _ANSWER_KEY):
        raise ValueError(
            f"{where}: a record needs the key 'instruction' with 'output', 'messages', 'prompt' with 'completion', or "
            f"'text', got {_short(list(record))}"
        )
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
    # Around an instruction stands what the template says.
    if kind != "instruction" and needs_answer and not (record[kind] or record.get(answer_key)):
        keys = f"{kind!r} is" if answer_key is None else f"{kind!r} and {answer_key!r} are"
        raise ValueError(f"{where}: there is nothing to learn from, {keys} empty")


def _check_messages(messages: Any, where: str, needs_answer: bool) -> None:
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
    if needs_answer and messages[-1]["role"] != "assistant":
        raise ValueError(
            f"{where}: the last of 'messages' must be the assistant's, by which a model learns to answer, "
            f"got {messages[-1]['role']!r}"
        )


def _check_text(record: Record, key: str, where: str) -> None:
    if key not in record:
        raise ValueError(f"{where}: the key {key!r} is missing, there are {_short(list(record))}")
    if not isinstance(record[key], str):
        raise ValueError(f"{where}: {key!r} must be a text, got {_short(record[key])}")
    try:
        refuse_surrogates(record[key])
    except ValueError as error:
        raise ValueError(f"{where}: {key!r}: {error}") from None


def _short(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:80]}…"


@dataclass(frozen=True)
class Split:
    """Which records, counted from 0, are for what. Together they are all records, each once."""

    train: tuple[int, ...]
    """What the model is trained on."""
    val: tuple[int, ...]
    """What its settings are chosen by."""
    test: tuple[int, ...]
    """What it is judged by, once, at the end."""

    def __post_init__(self) -> None:
        indices = [*self.train, *self.val, *self.test]
        if any(type(index) is not int for index in indices):
            raise ValueError("train, val and test must be lists of whole numbers")
        if sorted(indices) != list(range(len(indices))):
            raise ValueError(
                f"train, val and test must be the numbers 0 to {len(indices) - 1} together, each of them once"
            )
        if not self.train:
            raise ValueError("there must be at least one record to train on, got none")

    def __len__(self) -> int:
        """How many records are divided."""
        return len(self.train) + len(self.val) + len(self.test)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes the numbers as JSON, for `load_split`."""
        with atomic_write(path) as file:
            json.dump(asdict(self), file)
            file.write("\n")


def split_records(
    n_records: int, train_fraction: float = 0.85, test_fraction: float = 0.10, seed: int | None = None
) -> Split:
    """Train, test and, of what is left, val: in file order, or with a seed drawn at random and the same for ever.

    Of the 1,100 records of Raschka's "Build a Large Language Model (From Scratch)", chapter 7: his first 935, next 110
    and last 55.
    """
    for name, fraction in (("train_fraction", train_fraction), ("test_fraction", test_fraction)):
        if not 0 <= fraction <= 1:
            raise ValueError(f"{name} must be from 0 to 1, got {fraction}")
    if train_fraction + test_fraction > 1 + 1e-9:  # 0.7 + 0.2 + 0.1 is a little over 1
        raise ValueError(
            f"train_fraction and test_fraction must add up to 1 at most, got {train_fraction + test_fraction}"
        )
    n_train, n_test = int(n_records * train_fraction), int(n_records * test_fraction)
    if not n_train:
        raise ValueError(f"of {n_records} records, train_fraction={train_fraction} leaves none to train on")
    order = range(n_records) if seed is None else np.random.default_rng(seed).permutation(n_records).tolist()
    return Split(
        train=tuple(order[:n_train]),
        val=tuple(order[n_train + n_test :]),
        test=tuple(order[n_train : n_train + n_test]),
    )


def load_split(path: str | os.PathLike[str]) -> Split:
    """Opens what `Split.save` wrote; anything else is a ValueError that names the file."""
    try:
        data = read_json(path)
    except ValueError as error:
        raise ValueError(f"{path} is no split: {error}") from None
    names = [field.name for field in fields(Split)]
    if not isinstance(data, dict) or sorted(data) != sorted(names) or not all(isinstance(data[n], list) for n in names):
        raise ValueError(f"{path} is no split: it must have the lists {', '.join(names)} and nothing else")
    try:
        return Split(**{name: tuple(data[name]) for name in names})
    except ValueError as error:
        raise ValueError(f"{path} is no split: {error}") from None
