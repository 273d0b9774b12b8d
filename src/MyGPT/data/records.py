"""Records for fine-tuning: read and check them, and split them into training, validation and test sets.

A record is a dict of one of five kinds, which differ in their keys: `instruction` and `output`, with an optional
`input` (Alpaca's format); `messages`, a list of dicts with `role` and `content`; `conversations`, a list of dicts with
`from` and `value` (ShareGPT's format); `prompt` and `completion`; or only `text`. Other keys are ignored. A number in the
place of a text, as pandas writes a column of numbers, is read as its digits. conversions.py turns the forms of other
projects into these. A value that is null or NaN, as pandas writes
missing values, means that the key is missing. A template (templates.py) turns a record into text. This module needs neither
torch nor a tokenizer.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, Literal

import numpy as np

from MyGPT.data.conversions import converted, converted_message, short
from MyGPT.data.conversions import is_missing as is_missing  # "import X as X" marks X as public.
from MyGPT.data.formats import find_arrow_files, format_of, read_arrow, read_data, read_parquet, refuse_archive
from MyGPT.files import atomic_write, json_text, parse_json, read_json
from MyGPT.tokenizers.base import refuse_surrogates

Record = Mapping[str, Any]
"""A fine-tuning record: a dict as read from a JSON file, for example with the keys instruction and output."""

Kind = Literal["instruction", "messages", "prompt", "text"]

ANSWER_KEYS: dict[str, str | None] = {
    "instruction": "output", "messages": None, "conversations": None, "prompt": "completion", "text": None,
}  # fmt: skip
"""Maps each kind of record to the key of its answer, or to None if no key contains only the answer. The kind of a
record is the first key of this dict that the record has."""
_BETWEEN = re.compile(r"[\s,]*")  # the characters between two records of a JSON array


def read_records(path: str | os.PathLike[str]) -> list[Record]:
    """Return the fine-tuning records in a file, in the form that `check_record` returns.

    The file contains a JSON array, one JSON object per line, or a table (.csv or .tsv), all of which may be compressed as
    .gz or .zst, or it is a Parquet file. Records of different kinds may be mixed. A damaged or empty file, or an invalid
    record, raises ValueError. The message contains the path and, for an invalid record, its line or row.
    """
    return [check_record(record, where) for where, record in read_items(path)]


def read_items(path: str | os.PathLike[str], has_header: bool = True) -> Iterator[tuple[str, Any]]:
    """Yield (where, record) for each record of a file; `where` names the file and line, for example "a.json, line 3".

    A file whose name ends in .csv or .tsv is a table: its first line names the columns, which are separated by commas,
    semicolons or tabs, and each record is a dict of strings. Any other file contains a JSON array, or one JSON value per
    line. All these files may be compressed as .gz or .zst. Each row of a .parquet or .arrow file is a record, and of a
    directory that `datasets.Dataset.save_to_disk` wrote. A damaged file, or a file without records, raises ValueError.

    If has_header is False, the file is a table without names of columns, whatever its name. The keys of a record are then
    the positions of the columns: "1", "2" and so on.
    """
    is_table, is_empty = format_of(path) == "table" or not has_header, True
    items: Iterator[tuple[str, Any]]
    if files := find_arrow_files(path):
        items = read_arrow(files, path)
    elif format_of(path) == "parquet":
        refuse_archive(path)
        items = read_parquet(path)
    else:
        text = read_data(path)
        items = table_items(text, path, has_header) if is_table else json_items(text, path)
    for item in items:
        is_empty = False
        yield item
    if is_empty and not has_header:
        raise ValueError(f"{path} has no records: it must contain a table without names of columns")
    if is_empty and is_table:
        raise ValueError(f"{path} has no records: the first line must name the columns, and records must follow")
    if is_empty:
        raise ValueError(f"{path} has no records: it must contain a JSON array of records, or one record per line")


def json_items(text: str, path: str | os.PathLike[str]) -> Iterator[tuple[str, Any]]:
    """Yield (where, value) for each value in `text`, a JSON array or one JSON value per line, read from the file `path`."""
    return (_array_items if text.lstrip().startswith("[") else _line_items)(text, path)


def table_items(
    text: str, path: str | os.PathLike[str], has_header: bool = True
) -> Iterator[tuple[str, dict[str, str | None]]]:
    """Yield (where, record) for each line of the table `text`, except the first line if it names the columns.

    A record is a dict of strings. Values that are missing at the end of a line are None. If has_header is False, the keys are
    the positions of the columns, and in a table with tabs a quotation mark is an ordinary character.
    """
    columns: list[str] = []
    rows, line = csv.reader([]), 1
    has_tabs = not has_header and "\t" in text.lstrip("\n").partition("\n")[0]
    delimiter = "\t" if has_tabs else _delimiter(text)
    # Such files, for example the SMS Spam Collection of the UCI repository, are written without any quoting.
    quoting: Any = csv.QUOTE_NONE if has_tabs else csv.QUOTE_MINIMAL
    try:
        rows = csv.reader(io.StringIO(text, newline=""), delimiter=delimiter, quoting=quoting, strict=True)
        for row in rows:
            where, line = f"{path}, line {line}", rows.line_num + 1
            if row and not has_header:
                columns = [str(position) for position in range(1, max(len(row), len(columns)) + 1)]
            if row and not columns:
                columns = [name.strip() for name in row]
                if len(set(columns)) < len(columns):
                    raise ValueError(f"{where}: each column needs a name of its own, got {short(columns)}")
            elif len(row) > len(columns):
                raise ValueError(f"{where}: more values than columns; put texts with a comma in quotation marks")
            elif row:
                yield where, dict(zip(columns, [*row, *[None] * (len(columns) - len(row))], strict=True))
    except csv.Error as error:
        if "unexpected end of data" in str(error):
            error = csv.Error(f"the value in quotation marks that begins in line {line} has no end")
        raise ValueError(f"{path}, line {rows.line_num}: {error}") from None


def _delimiter(text: str) -> str:
    """Return the separator of a table: a comma, semicolon or tab, whichever gives its first line the most columns."""
    lines = {delimiter: csv.reader(io.StringIO(text, newline=""), delimiter=delimiter) for delimiter in ",;\t"}
    return max(lines, key=lambda delimiter: len(next(filter(None, lines[delimiter]), [])))


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
    key = _kind_key(record)
    return "messages" if key == "conversations" else key  # type: ignore[return-value]


def _kind_key(record: Record) -> str | None:
    """Return the key that decides of which kind a record is. A key with a value counts before a key with null."""
    present = [key for key in ANSWER_KEYS if key in record]
    return next((key for key in present if not is_missing(record[key])), present[0] if present else None)


def _as_text(value: Any) -> Any:
    """Return a finite number as a string of its digits, and any other value unchanged."""
    # An exact type: bool is a subclass of int. NumPy's scalars, which pandas returns, convert themselves.
    number = value.item() if isinstance(value, np.number) else value
    return str(number) if type(number) is int or (type(number) is float and math.isfinite(number)) else value


def check_record(record: Any, where: str, needs_answer: bool = True) -> Record:
    """Return a fine-tuning record without the keys whose value is missing, and with `messages` for `conversations`.

    Numbers in the place of texts become strings.

    An invalid record raises ValueError. The message starts with `where`, for example "a.json, line 3". If needs_answer is
    False, the output, the completion or the final message of the assistant may be missing.
    """
    if not isinstance(record, Mapping):
        raise ValueError(f"{where}: a record must be a JSON object, got {short(record)}")
    record = converted(record, where)
    kind = _kind_key(record)
    is_pair = "chosen" in record and "rejected" in record
    if is_pair and (kind is None or (kind == "prompt" and needs_answer and is_missing(record.get("completion")))):
        raise ValueError(f"{where}: the record is a pair of a chosen and a rejected answer, which mygpt dpo reads")
    if kind == "prompt" and record.get("label") is False:
        reason = "the label false says that the completion is undesirable"
        raise ValueError(f"{where}: {reason}: remove such records before fine-tuning")
    if kind is None:
        keys = "the key 'instruction' with 'output', 'messages', 'conversations', 'prompt' with 'completion', or 'text'"
        raise ValueError(f"{where}: a record needs {keys}, got {short(list(record))}")
    present = {key: _as_text(value) for key, value in record.items() if not is_missing(value)}
    record = {**record, **present}
    if kind in ("messages", "conversations"):
        return {**present, "messages": _checked_messages(record, kind, where, needs_answer)}
    _check_text(record, kind, where)
    if kind == "instruction" and "input" in present:
        _check_text(record, "input", where)
    answer_key = ANSWER_KEYS[kind]
    if answer_key is not None and needs_answer:
        _check_text(record, answer_key, where)
    # An instruction may be empty, because the template adds text to it.
    if kind != "instruction" and needs_answer and not (record[kind] or present.get(answer_key)):
        keys = f"{kind!r} is" if answer_key is None else f"{kind!r} and {answer_key!r} are"
        raise ValueError(f"{where}: there is nothing to learn from, {keys} empty")
    return present


def _checked_messages(record: Record, key: str, where: str, needs_answer: bool) -> list[dict[str, Any]]:
    """Return the messages under the key "messages" or "conversations" of a record, as `converted_message` returns them.

    The system prompt that a ShareGPT record may have beside its conversation becomes the first message. Invalid messages
    raise ValueError, also if needs_answer is True and the last message is not from the assistant.
    """
    messages = record[key]
    if not isinstance(messages, list) or not messages:
        raise ValueError(f"{where}: {key!r} must be a list of at least one message, got {short(messages)}")
    result = []
    if key == "conversations" and not is_missing(record.get("system")):
        _check_text(record, "system", where)
        result = [{"role": "system", "content": record["system"]}] if record["system"] else []
    for number, message in enumerate(messages, start=1):
        place = f"{where}, message {number}"
        found = converted_message(message, key, place)
        found["content"] = _as_text(found["content"])
        names = ("from", "value") if key == "conversations" and "role" not in message else ("role", "content")
        for ours, name in zip(("role", "content"), names, strict=True):
            _check_text({name: found[ours]}, name, place)
        result.append(found)
    if needs_answer and result[-1]["role"] != "assistant":
        allowed = f"the {names[0]} {'gpt' if names[0] == 'from' else 'assistant'!r}, which is the answer to learn"
        raise ValueError(f"{where}: the last of {key!r} must have {allowed}, got {message[names[0]]!r}")
    if needs_answer and "weight" in result[-1]:
        raise ValueError(f"{where}: the last of {key!r} is the answer to learn, so its 'weight' must not be 0")
    return result


def _check_text(record: Record, key: str, where: str) -> None:
    """Raise ValueError if record[key] is missing or not valid text. The error message starts with `where`."""
    if key not in record:
        raise ValueError(f"{where}: the key {key!r} is missing, the record has {short(list(record))}")
    if not isinstance(record[key], str):
        way_out = "; for a table of pandas, use to_json(orient='records')" if isinstance(record[key], Mapping) else ""
        way_out = "; fill in the missing value, or remove the record" if is_missing(record[key]) else way_out
        raise ValueError(f"{where}: {key!r} must be a string, got {short(record[key])}{way_out}")
    refuse_surrogates(record[key], f"{where}: {key!r}: ")


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
            file.write(json_text(asdict(self)))
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
