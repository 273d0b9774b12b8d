"""Tests of records of the four kinds and of their split, against the json module and the book's slices."""

from __future__ import annotations

import gzip
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st

from MyGPT.data.records import Split, check_record, kind_of, load_split, read_records, split_records
from MyGPT.data.templates import ALPACA, BOOK

RECORDS: list[dict[str, Any]] = [
    {"instruction": "Name a colour.", "input": "", "output": "Grün"},
    {"instruction": "Add.", "input": "1, 2", "output": "3", "source": "by hand"},
    {"instruction": "No input at all.", "output": ""},
    {"messages": [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]},
    {"prompt": "2 + 2 =", "completion": " 4"},
    {"text": "A line\u2028with more\nlines."},
]


@pytest.mark.parametrize("ensure_ascii", [True, False])
def test_an_array_and_lines_give_the_same_records(tmp_path: Path, ensure_ascii: bool) -> None:
    """An unescaped U+2028 inside a text does not end a line."""
    array, lines = tmp_path / "records.json", tmp_path / "records.jsonl"
    array.write_text(json.dumps(RECORDS, ensure_ascii=ensure_ascii, indent=4), encoding="utf-8")
    lines.write_text("\n".join(json.dumps(r, ensure_ascii=ensure_ascii) for r in RECORDS), encoding="utf-8")
    assert read_records(array) == read_records(lines) == RECORDS


def test_windows_line_ends_a_byte_order_mark_and_empty_lines_are_accepted(tmp_path: Path) -> None:
    path = tmp_path / "records.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "a"}\r\n\r\n{"text": "b"}\r\n')
    assert read_records(path) == [{"text": "a"}, {"text": "b"}]


@pytest.mark.parametrize("missing", [None, math.nan, np.float64("nan"), pd.NA])
def test_a_missing_value_means_that_there_is_no_key(missing: Any) -> None:
    """Data frames fill up rows of several kinds with missing values. The text "nan" is a text."""
    rest = dict.fromkeys(("instruction", "input", "output", "messages", "prompt", "completion", "text"), missing)
    for record in RECORDS:
        assert check_record({**rest, **record}, "here") == record
        assert kind_of({**rest, **record}) == kind_of(record)
    record = {"instruction": "a", "input": missing, "output": "b"}
    assert (
        BOOK.prompt(record) == BOOK.prompt({"instruction": "a", "output": "b"}) == BOOK.prompt({**record, "input": ""})
    )
    assert "### Input:\nnan" in BOOK.prompt({**record, "input": "nan"})


def test_records_that_pandas_wrote_are_read(tmp_path: Path) -> None:
    """pandas writes a missing value as null, json.dumps as NaN, and to_csv as nothing."""
    frame = pd.DataFrame(RECORDS[:3])
    lines = [json.dumps(record) for record in frame.to_dict(orient="records")]
    assert "NaN" in lines[2]
    (tmp_path / "dumps.jsonl").write_text("\n".join(lines))
    frame.to_json(tmp_path / "array.json", orient="records")
    frame.to_json(tmp_path / "lines.jsonl.gz", orient="records", lines=True)
    frame.to_csv(tmp_path / "table.csv", index=False)
    prompts = [ALPACA.prompt(record) for record in RECORDS[:3]]
    for name in ("dumps.jsonl", "array.json", "lines.jsonl.gz", "table.csv"):
        records = read_records(tmp_path / name)
        assert [ALPACA.prompt(record) for record in records] == prompts, name
        assert [record["output"] for record in records] == ["Grün", "3", ""]


@pytest.mark.parametrize("separator", [",", ";", "\t"])
@pytest.mark.parametrize(
    "rows",
    [
        [{"instruction": 'Say "a, b; c\td"\nand e.', "input": "", "output": " ü\n\nnan"}] * 2,
        [{"completion": " 4, 5", "prompt": "2 + 2 ="}, {"completion": " x", "prompt": " y "}],
        [{"text": "one", "id": "1"}, {"text": "two, three; four", "id": ""}],
    ],
)
def test_a_table_is_read_as_pandas_reads_it(tmp_path: Path, rows: Any, separator: str) -> None:
    """The table has a byte order mark and Windows line ends, as Excel writes them."""
    frame = pd.DataFrame(rows)
    frame.to_csv(tmp_path / "a.CSV", index=False, sep=separator, encoding="utf-8-sig", lineterminator="\r\n")
    theirs = pd.read_csv(tmp_path / "a.CSV", sep=separator, keep_default_na=False).to_dict(orient="records")
    assert read_records(tmp_path / "a.CSV") == theirs == rows


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('prompt,completion\n"a\n\nb",c\n\nd\n', "line 6: 'completion' must be a string, got None"),
        ('prompt,completion\n"a\nb",c,d\n', "line 2: more values than columns; put texts with a comma in quotation"),
        ("prompt,prompt\na,b\n", r"line 1: each column needs a name of its own, got \['prompt', 'prompt'\]"),
        ("question,answer\na,b\n", r"line 2: a record needs the key 'instruction' .*, got \['question', 'answer'\]"),
        ("\nprompt,completion\n", "has no records: the first line must name the columns"),
        ('prompt,completion\na,"b\n', "line 2: the value in quotation marks that begins in line 2 has no end"),
        ("", "has no records: the first line must name the columns"),
    ],
)
def test_an_error_in_a_table_names_the_line_on_which_the_record_starts(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.csv").write_text(text)
    with pytest.raises(ValueError, match=f"a.csv.*{words}"):
        read_records(tmp_path / "a.csv")


def test_conversations_of_sharegpt_become_messages(tmp_path: Path) -> None:
    talk = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
    messages = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}]
    system = {"role": "system", "content": "Be kind."}
    named = [{"from": "user", "value": "Hi"}, {"from": "assistant", "value": "Hello"}]
    expected = {
        json.dumps({"conversations": talk}): messages,
        json.dumps({"conversations": talk, "system": None}): messages,
        json.dumps({"conversations": talk, "system": ""}): messages,
        json.dumps({"conversations": talk, "system": "Be kind."}): [system, *messages],
        json.dumps({"conversations": [{"from": "system", "value": "Be kind."}, *named]}): [system, *messages],
        json.dumps({"conversations": messages}): messages,
    }
    (tmp_path / "talks.jsonl").write_text("\n".join(expected))
    for record, theirs in zip(read_records(tmp_path / "talks.jsonl"), expected.values(), strict=True):
        assert record["messages"] == theirs and kind_of(record) == "messages"
        assert ALPACA.parts(record) == ALPACA.parts({"messages": theirs})
    question = {"conversations": talk[:1]}
    assert kind_of(question) == "messages"
    assert ALPACA.prompt(question) == ALPACA.prompt({"messages": messages[:1]})


@pytest.mark.parametrize("name", ["a.JSON", "a.ndjson", "a.Jsonl", "a.JSONL.GZ", "a"])
def test_the_case_of_a_suffix_does_not_matter(tmp_path: Path, name: str) -> None:
    content = "\n".join(map(json.dumps, RECORDS)).encode()
    (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
    assert read_records(tmp_path / name) == RECORDS


def test_a_file_may_have_any_name(tmp_path: Path) -> None:
    (tmp_path / "data").write_text(' \n[{"text": "a"}]')
    assert read_records(tmp_path / "data") == [{"text": "a"}]


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ('{"instruction": "a"}', r"line 3: the key 'output' is missing, the record has \['instruction'\]"),
        ('{"instruction": "a", "input": true, "output": "b"}', "line 3: 'input' must be a string, got True"),
        ('{"instruction": "a", "output": 1e999}', "line 3: 'output' must be a string, got inf"),
        (
            '{"instruction": {"0": "a"}, "output": {"0": "b"}}',
            r"line 3: 'instruction' must be a string, got \{'0': 'a'\}; for a table of pandas, use to_json\(orient='records'\)",
        ),
        ('{"instruction": null, "output": "b"}', "line 3: 'instruction' must be a string, got None"),
        ('{"instruction": NaN, "output": "b"}', "line 3: 'instruction' must be a string, got nan"),
        ('{"instruction": "a", "output": null}', "line 3: 'output' must be a string, got None"),
        (
            '{"instruction": "a", "output": NaN}',
            "line 3: 'output' must be a string, got nan; fill in the missing value, or remove the record",
        ),
        ('{"prompt": "a", "completion": null}', "line 3: 'completion' must be a string, got None"),
        ('{"prompt": NaN, "completion": "b"}', "line 3: 'prompt' must be a string, got nan"),
        ('{"text": null}', "line 3: 'text' must be a string, got None"),
        ('{"messages": null}', "line 3: 'messages' must be a list of at least one message, got None"),
        ('{"conversations": []}', r"line 3: 'conversations' must be a list of at least one message, got \[\]"),
        ('{"conversations": [{"from": "human"}]}', "line 3, message 1: the key 'value' is missing"),
        (
            '{"conversations": [{"from": "tool", "value": "a"}]}',
            "line 3, message 1: the from is 'tool', but MyGPT's models cannot call tools",
        ),
        (
            '{"conversations": [{"from": "human", "value": "a"}]}',
            "line 3: the last of 'conversations' must have the from 'gpt', which is the answer to learn, got 'human'",
        ),
        (
            '{"conversations": [{"from": "human", "value": null}, {"from": "gpt", "value": "b"}]}',
            "line 3, message 1: 'value' must be a string, got None",
        ),
        (
            '{"conversations": [{"from": "gpt", "value": "b"}], "system": []}',
            r"line 3: 'system' must be a string, got \[\]",
        ),
        ('{"instruction": "a", "output": ["b"]}', r"line 3: 'output' must be a string, got \['b'\]"),
        ('{"prompt": "a"}', "line 3: the key 'completion' is missing"),
        ('{"prompt": "a", "completion": false}', "line 3: 'completion' must be a string, got False"),
        ('{"text": ""}', "line 3: there is nothing to learn from, 'text' is empty"),
        (
            '{"prompt": "", "completion": ""}',
            "line 3: there is nothing to learn from, 'prompt' and 'completion' are empty",
        ),
        ('{"text": {}}', r"line 3: 'text' must be a string, got \{\}"),
        ('{"text": "\\ud800"}', "line 3: 'text': "),
        ('{"question": "a"}', r"line 3: a record needs the key 'instruction' .*, got \['question'\]"),
        ("{}", r"line 3: a record needs the key 'instruction' .*, got \[\]"),
        ('["a"]', r"line 3: a record must be a JSON object, got \['a'\]"),
        ("{'text': 'a'}", "line 3: not JSON: .*a JSON array, or one JSON object per line"),
        ('{"messages": []}', r"line 3: 'messages' must be a list of at least one message, got \[\]"),
        ('{"messages": "Hi"}', "line 3: 'messages' must be a list of at least one message, got 'Hi'"),
        ('{"messages": ["Hi"]}', "line 3, message 1: a message must be a JSON object, got 'Hi'"),
        ('{"messages": [{"role": "user"}]}', "line 3, message 1: the key 'content' is missing"),
        (
            '{"messages": [{"role": "user", "content": null}]}',
            "line 3, message 1: 'content' must be a string, got None",
        ),
        (
            '{"messages": [{"role": "user", "content": ""}, {"role": "bot", "content": ""}]}',
            "line 3, message 2: 'role' must be one of system, user, assistant, got 'bot'",
        ),
        (
            '{"messages": [{"role": "user", "content": ""}]}',
            "line 3: the last of 'messages' must have the role 'assistant', .*, got 'user'",
        ),
    ],
)
def test_a_wrong_record_is_refused_with_file_line_and_key(tmp_path: Path, line: str, words: str) -> None:
    path = tmp_path / "records.jsonl"
    path.write_text('{"text": "good"}\n\n' + line + "\n")
    with pytest.raises(ValueError, match=f"records.jsonl, {words}"):
        read_records(path)
    if not words.startswith("line 3: not JSON"):
        path.write_text(f'[\n{{"text": "good"}},\n{{"text": "good"}}, {line}]')
        with pytest.raises(ValueError, match=f"records.jsonl, {words.replace('line 3', 'line 3, record 3', 1)}"):
            read_records(path)


def test_an_error_in_an_array_names_the_line_on_which_the_record_starts(tmp_path: Path) -> None:
    """Brackets, line ends and commas inside texts and nested values do not end a record."""
    records = [{"text": "a],\n[", "more": [1, {"b": [2, 3]}]}, {"text": '\\"},'}, {"text": False}]
    text = "\n \n" + json.dumps(records, indent=3)
    (tmp_path / "a.json").write_text(text)
    line = text[: text.index("false\n")].count("\n")  # The opening brace of the record is on the line before.
    with pytest.raises(ValueError, match=rf"a\.json, line {line}, record 3: 'text' must be a string, got False"):
        read_records(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "has no records"),
        (b"[]", "has no records"),
        (b'[{"text": "a"},\n{"text": "b"]', "line 2: not JSON"),
        (b'[{"text": "a"}]\n[{"text": "b"}]', "line 2: not JSON: Extra data"),
        (b"[" * 100_000, "records.json"),
        (b'{"text": ' + b"[" * 100_000, "line 1: not JSON"),
        (b'{"text": "\xff"}', "is not UTF-8 text: byte 10 is 0xff"),
        (b'{"text": "\0"}', "looks like a binary file"),
    ],
)
def test_a_file_without_records_is_refused_with_its_name(tmp_path: Path, data: bytes, words: str) -> None:
    path = tmp_path / "records.json"
    path.write_bytes(data)
    with pytest.raises(ValueError, match=words) as caught:
        read_records(path)
    assert "records.json" in str(caught.value)
    assert len(str(caught.value)) < 400


def test_a_missing_file_raises_file_not_found_error(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_records(tmp_path / "none.json")


def test_an_error_message_shortens_a_long_value() -> None:
    with pytest.raises(ValueError) as caught:
        check_record({"text": ["long"] * 10_000}, "here")
    assert len(str(caught.value)) < 150


def test_a_record_without_an_answer_is_accepted_if_no_answer_is_needed() -> None:
    for question in ({"instruction": "a"}, {"prompt": "a"}, {"messages": [{"role": "user", "content": "a"}]}):
        check_record(question, "here", needs_answer=False)
        with pytest.raises(ValueError):
            check_record(question, "here")


# --- splits ----------------------------------------------------------------------------------------------------------


def test_the_split_in_file_order_equals_the_books() -> None:
    """The book uses 85% for training, 10% for test and the rest for validation: 935, 110 and 55 of 1,100 records."""
    data = list(range(1100))
    split = split_records(len(data))
    assert list(split.train) == data[:935]
    assert list(split.test) == data[935:1045]
    assert list(split.val) == data[1045:]


@given(n=st.integers(2, 300), train=st.integers(50, 100), test=st.integers(0, 50), seed=st.none() | st.integers(0, 9))
def test_every_record_is_in_one_part(n: int, train: int, test: int, seed: int | None) -> None:
    test = min(test, 100 - train)
    split = split_records(n, train / 100, test / 100, seed)
    assert sorted([*split.train, *split.val, *split.test]) == list(range(n))
    assert len(split) == n
    assert abs(len(split.train) - n * train / 100) <= 1 and abs(len(split.test) - n * test / 100) <= 1


def test_equal_seeds_give_equal_splits_and_other_seeds_other_splits() -> None:
    """Two random choices of 935 of 1,100 records agree with a probability far below 1e-100."""
    assert split_records(1100, seed=1) == split_records(1100, seed=1)
    assert split_records(1100, seed=1) != split_records(1100, seed=2)
    assert list(split_records(1100, seed=1).train) != sorted(split_records(1100, seed=1).train)


def test_a_saved_split_is_the_same_when_opened(tmp_path: Path) -> None:
    split = split_records(20, seed=3)
    split.save(tmp_path / "split.json")
    assert load_split(tmp_path / "split.json") == split
    assert sorted(json.loads((tmp_path / "split.json").read_text())) == ["test", "train", "val"]


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "must contain the lists train, val, test and nothing else"),
        ('{"train": [0]}', "must contain the lists"),
        ('{"train": [0], "val": 1, "test": []}', "must contain the lists"),
        ('{"train": [0], "val": [], "test": [], "dev": []}', "must contain the lists"),
        (
            '{"train": [0, 1], "val": [1], "test": []}',
            "must contain each of the numbers 0 to 2 once",
        ),
        ('{"train": [0, 5], "val": [1], "test": []}', "each of the numbers 0 to 2 once"),
        ('{"train": [0], "val": ["1"], "test": []}', "lists of whole numbers"),
        ('{"train": [0], "val": [true], "test": []}', "lists of whole numbers"),
        ('{"train": [], "val": [0], "test": []}', "train is empty: a split needs at least one record"),
    ],
)
def test_a_damaged_split_is_refused(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "split.json").write_text(text)
    with pytest.raises(ValueError, match=f"split.json is not a split: .*{words}"):
        load_split(tmp_path / "split.json")


def test_fractions_without_training_records_are_refused() -> None:
    with pytest.raises(ValueError, match=r"train_fraction must be from 0 to 1, got 85"):
        split_records(100, 85)
    with pytest.raises(ValueError, match=r"test_fraction must be from 0 to 1, got -0.1"):
        split_records(100, 0.5, -0.1)
    with pytest.raises(ValueError, match=r"must add up to at most 1, got 1.2"):
        split_records(100, 0.7, 0.5)
    with pytest.raises(ValueError, match=r"train_fraction=0\.85 of 1 records leaves no record"):
        split_records(1)
    assert split_records(10, 0.7, 0.3) == Split(train=tuple(range(7)), val=(), test=(7, 8, 9))


def test_numbers_are_read_as_their_digits(tmp_path: Path) -> None:
    frame = pd.DataFrame({"instruction": ["2 + 3"] * 2, "input": [7, 8], "output": [5, 6]})
    expected = [
        {"instruction": "2 + 3", "input": "7", "output": "5"},
        {"instruction": "2 + 3", "input": "8", "output": "6"},
    ]
    frame.to_json(tmp_path / "a.json", orient="records")
    frame.to_csv(tmp_path / "a.csv", index=False)
    for name in ("a.json", "a.csv"):
        assert read_records(tmp_path / name) == expected
    assert [check_record(dict(row), "here") for _, row in frame.iterrows()] == expected
    record = {"conversations": [{"from": "human", "value": 2}, {"from": "gpt", "value": 0.5}]}
    assert [it["content"] for it in check_record(record, "here")["messages"]] == ["2", "0.5"]
