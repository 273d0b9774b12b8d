"""Test data in the formats of other projects, against the libraries datasets and TRL, which wrote or read them."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import datasets
import pytest
import trl.data_utils as theirs

from MyGPT import get_tokenizer
from MyGPT.data.formats import find_arrow_files
from MyGPT.data.instructions import InstructionDataset, collate_instructions
from MyGPT.data.records import check_record, read_records
from MyGPT.data.sources import find_files, read_documents
from MyGPT.data.templates import ALPACA
from MyGPT.finetuning.classification import read_labelled, read_unlabelled
from MyGPT.finetuning.preference import read_preferences, with_answers

U, A = {"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Hello"}
TALK = [U, A, {"role": "user", "content": "2?"}, {"role": "assistant", "content": "4"}]
SHAREGPT = [{"from": "human", "value": "Hi"}, {"from": "gpt", "value": "Hello"}]
PAIR = {"prompt": [U], "chosen": [A], "rejected": [{"role": "assistant", "content": "No"}]}
OPENAI_PAIR = {
    "input": {"messages": [U], "tools": [], "parallel_tool_calls": True},
    "preferred_output": PAIR["chosen"],
    "non_preferred_output": PAIR["rejected"],
}


@pytest.fixture(autouse=True)
def _cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", tmp_path / "cache")
    datasets.disable_progress_bars()


def lines(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(map(json.dumps, records)), encoding="utf-8")
    return path


@pytest.mark.parametrize(
    "record",
    [
        {"text": "Hi 🙂"},
        {"prompt": "Hi", "completion": " Hello"},
        {"messages": TALK},
        {"instruction": "Hi", "input": None, "output": "Hello"},
        {"conversations": SHAREGPT},
        {"prompt": [U], "completion": [A]},
    ],
    ids=lambda record: "+".join(record),
)
def test_saved_data_sets_parquet_and_json_lines_give_equal_records(tmp_path: Path, record: dict[str, Any]) -> None:
    data = datasets.Dataset.from_list([record] * 70)
    data.save_to_disk(tmp_path / "saved", num_shards=3)
    data.to_parquet(tmp_path / "a.parquet")
    expected = read_records(lines(tmp_path / "a.jsonl", *[record] * 70))
    assert read_records(tmp_path / "saved") == read_records(tmp_path / "a.parquet") == expected
    assert [check_record(row, "row") for row in datasets.load_from_disk(tmp_path / "saved")] == expected
    [_, file, _] = find_arrow_files(tmp_path / "saved")
    assert read_records(file) == expected[:23]


def test_a_saved_data_set_has_documents_and_labels(tmp_path: Path) -> None:
    features = datasets.Features(
        {"text": datasets.Value("string"), "label": datasets.ClassLabel(names=["ham", "spam"])}
    )
    rows = {"text": [f"text {i}" for i in range(90)], "label": [i % 2 for i in range(90)]}
    data = datasets.Dataset.from_dict(rows, features=features).select(range(1, 81))
    datasets.DatasetDict({"train": data}).save_to_disk(tmp_path / "saved", num_shards={"train": 2})
    assert list(read_documents(find_files(str(tmp_path / "saved")))) == data["text"][:]
    assert read_unlabelled(tmp_path / "saved") == data["text"][:]
    names = [features["label"].int2str(label) for label in data["label"]]
    assert read_labelled(tmp_path / "saved") == [*zip(data["text"], names, strict=True)]


def test_errors_in_a_data_set_name_the_row_or_the_way_out(tmp_path: Path) -> None:
    good = datasets.Dataset.from_list([{"text": "a"}] * 40 + [{"text": None}])
    good.save_to_disk(tmp_path / "a", num_shards=2)
    with pytest.raises(ValueError, match=re.escape(f"{tmp_path / 'a'}, row 41: 'text' must be a string, got None")):
        read_records(tmp_path / "a")
    datasets.DatasetDict({"train": good, "test": good}).save_to_disk(tmp_path / "b")
    with pytest.raises(ValueError, match=r"b has the splits train, test: name the directory of one .*b/train"):
        read_records(tmp_path / "b")
    [first, _] = find_arrow_files(tmp_path / "a")
    first.write_bytes(first.read_bytes()[:-300])
    with pytest.raises(ValueError, match="is a damaged Arrow file"):
        read_records(tmp_path / "a")
    state = tmp_path / "a/state.json"
    state.write_text(state.read_text(encoding="utf-8").replace("data-00000", "../data-00000"), encoding="utf-8")
    with pytest.raises(ValueError, match=r"state.json does not describe a data set"):
        read_records(tmp_path / "a")


def test_openais_messages_are_converted() -> None:
    parts = [{"type": "text", "text": "H"}, {"type": "text", "text": "i"}]
    record = {
        "messages": [
            {"role": "developer", "content": "Be kind.", "name": "x"},
            {"role": "user", "content": parts},
            {**A, "weight": 0, "tool_calls": None},
            U,
            {**A, "weight": 1},
        ],
        "tools": [],
    }
    messages = [{"role": "system", "content": "Be kind."}, U, {**A, "weight": 0}, U, A]
    assert check_record(record, "row")["messages"] == messages


@pytest.mark.parametrize(
    "record, error",
    [
        (
            {"messages": [U, A], "tools": [{"type": "function"}]},
            "line 2: the record has 'tools', but MyGPT's models cannot",
        ),
        ({"messages": [U, {**A, "tool_calls": [{"id": "1"}]}]}, "line 2, message 2: the record has 'tool_calls'"),
        ({"messages": [U, {"role": "tool", "content": "4"}, A]}, "line 2, message 2: the role is 'tool'"),
        ({"conversations": [*SHAREGPT, {"from": "observation", "value": ""}]}, "message 3: the from is 'observation'"),
        (
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}, A]},
            "message 1: 'content' may have only parts",
        ),
        ({"messages": [U, {**A, "weight": 0.5}]}, "message 2: 'weight' must be 0 or 1, got 0.5"),
        ({"messages": [U, {**A, "weight": 0}]}, "line 2: the last of 'messages' is the answer to learn"),
        ({"prompt": [U], "completion": "Hello"}, "line 2: 'completion' must be a list of messages, as 'prompt' is"),
        (PAIR, "line 2: the record is a pair .* which mygpt dpo reads"),
        ({"prompt": "Hi", "chosen": "a", "rejected": "b"}, "line 2: the record is a pair"),
        ({"prompt": "Hi", "completion": "a", "label": False}, "line 2: the label false says"),
    ],
)
def test_records_that_cannot_be_learned_are_refused_with_their_line(tmp_path: Path, record: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_records(lines(tmp_path / "a.jsonl", {"text": "a"}, record))


def test_preferences_of_openai_and_trl_are_one_pair(tmp_path: Path) -> None:
    implicit = {"chosen": [U, A], "rejected": [U, *PAIR["rejected"]]}
    datasets.Dataset.from_list([PAIR] * 3).save_to_disk(tmp_path / "saved")
    records = read_preferences(lines(tmp_path / "a.jsonl", PAIR, OPENAI_PAIR, implicit))
    records += read_preferences(tmp_path / "saved")
    expected = ({"messages": [U, A]}, {"messages": [U, *PAIR["rejected"]]})
    assert [with_answers(record, "row") for record in records] == [expected] * 6
    assert theirs.maybe_extract_prompt(implicit) == PAIR


@pytest.mark.parametrize(
    "record, error",
    [
        (
            {"prompt": "Hi", "completion": "a", "label": True},
            r"line 2: the record has one answer with a label \(unpaired",
        ),
        ({**OPENAI_PAIR, "input": [U]}, "line 2: 'input' must be an object with a list of 'messages'"),
        ({**OPENAI_PAIR, "input": {"messages": [U], "tools": [{"a": 1}]}}, "line 2: the record has 'tools'"),
        ({**OPENAI_PAIR, "preferred_output": "a"}, "line 2: 'preferred_output' must be a list of messages"),
    ],
)
def test_pairs_that_dpo_cannot_use_are_refused_with_their_line(tmp_path: Path, record: Any, error: str) -> None:
    with pytest.raises(ValueError, match=error):
        read_preferences(lines(tmp_path / "a.jsonl", PAIR, record))


def test_trls_unpaired_preferences_are_refused() -> None:
    pairs = datasets.Dataset.from_list([{"prompt": "Hi", "chosen": "a", "rejected": "b"}])
    for row in theirs.unpair_preference_dataset(pairs):
        with pytest.raises(ValueError, match="unpaired preference"):
            with_answers(row, "row")


def test_answers_in_a_prompt_do_not_count_in_the_loss_as_in_trl() -> None:
    """The ids are those of the whole conversation; only the completion, and its end, are targets."""
    gpt2 = get_tokenizer("gpt2")
    split = InstructionDataset([{"prompt": TALK[:3], "completion": TALK[3:]}], gpt2, ALPACA)
    whole = InstructionDataset([{"messages": TALK}], gpt2, ALPACA)
    assert split[0] == whole[0]
    targets = [collate_instructions([data[0]], mask_prompt=True)[1][0] for data in (split, whole)]
    learned = [gpt2.decode(part[part >= 0].tolist()) for part in targets]
    assert learned == ["4<|endoftext|>", "Hello<|endoftext|>4<|endoftext|>"]


def test_a_data_set_in_memory_is_a_sequence_of_records() -> None:
    data = datasets.Dataset.from_list([{"messages": TALK}] * 2)
    gpt2 = get_tokenizer("gpt2")
    assert InstructionDataset(data, gpt2, ALPACA)[1] == InstructionDataset([{"messages": TALK}], gpt2, ALPACA)[0]


def test_sharegpts_conversations_have_trls_contents() -> None:
    """TRL keeps the names of ShareGPT's roles, which a chat template does not know."""
    record = {"conversations": SHAREGPT}
    found = theirs.maybe_convert_to_chatml(copy.deepcopy(record))  # which changes its argument
    roles = {"human": "user", "gpt": "assistant"}
    converted = [{**turn, "role": roles[turn["role"]]} for turn in found["messages"]]
    assert check_record(record, "row")["messages"] == converted
