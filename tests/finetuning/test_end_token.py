"""Every example, pair and document ends with one end-of-text token, also if it already has one, as with TRL."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from MyGPT import BPETokenizer, CharTokenizer, SimpleTokenizer, get_tokenizer
from MyGPT.data import sources
from MyGPT.data.instructions import InstructionDataset, collate_instructions
from MyGPT.data.packing import collate_packed
from MyGPT.data.prepare import prepare, tokenize
from MyGPT.data.templates import ALPACA, Template
from MyGPT.data.tokens import open_tokens
from MyGPT.finetuning.preference import PreferencePairs

BYTES = BPETokenizer.train("", 257, progress=False)  # one token per byte
END = "<|endoftext|>"
CHATML = Template(
    ALPACA.without_input,
    ALPACA.with_input,
    system="<|im_start|>system\n{content}<|im_end|>\n",
    user="<|im_start|>user\n{content}<|im_end|>\n",
    assistant="<|im_start|>assistant\n{content}",
    turn_end="<|im_end|>\n",
)


def learned(record: dict[str, Any], tokenizer: Any = BYTES, template: Template = ALPACA) -> str:
    """Return the whole text of a record that the model learns, in padded and in packed batches: inputs and last target."""
    example = InstructionDataset([record], tokenizer, template)[0]
    inputs, targets = collate_instructions([example], tokenizer.eot_token)
    packed_inputs, packed_targets, _ = collate_packed([[example]], len(example), tokenizer.eot_token)
    assert (inputs == packed_inputs).all() and (targets == packed_targets).all()
    return str(tokenizer.decode([*inputs[0].tolist(), targets[0, -1].item()]))


@pytest.mark.parametrize("white_space", ["", "\n", " \n\n", "\t"])
@pytest.mark.parametrize(
    ("record", "key"),
    [
        ({"text": "ab"}, "text"),
        ({"prompt": "a b", "completion": " c"}, "completion"),
        ({"instruction": "a", "output": "b"}, "output"),
        ({"instruction": "a", "input": None, "output": ""}, "output"),
        ({"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}, "messages"),
    ],
)
def test_a_record_that_ends_with_the_end_token_gets_no_second_one(record: Any, key: str, white_space: str) -> None:
    if key == "messages":
        *others, last = record["messages"]
        ended = {"messages": [*others, {**last, "content": last["content"] + END + white_space}]}
    else:
        ended = {**record, key: record[key] + END + white_space}
    for tokenizer in (BYTES, get_tokenizer("gpt2")):
        text = learned(ended, tokenizer)
        assert text == learned(record, tokenizer)
        assert text.count(END) == 1 and text.endswith(END)


def test_other_texts_are_unchanged() -> None:
    """White space at the end, an end token in the middle, in the prompt or twice, and an unknown one stay."""
    for text in ("ab \n", f"a{END}b", f"a{END}b\n", f"{END}a", "a<|im_end|>", "a <|endoftext|"):
        assert learned({"text": text}) == text + END
    assert learned({"text": f"a{END}{END}"}) == f"a{END}{END}"
    assert learned({"prompt": f"a{END}", "completion": ""}) == f"a{END}{END}"
    assert InstructionDataset([{"text": "ab \n"}], CharTokenizer("ab \n"))[0] == [0, 1, 2, 3]
    with pytest.raises(ValueError, match="record 1 has no tokens"):
        InstructionDataset([{"text": END}], BYTES)


def test_the_turns_of_a_conversation_end_once() -> None:
    turns = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    plain = {"messages": [{"role": role, "content": content} for role, content in turns]}
    for end, template in ((END, ALPACA), (f"{END}\n", ALPACA), ("<|im_end|>", CHATML), ("<|im_end|>\n", CHATML)):
        ended = {"messages": [{"role": role, "content": content + end} for role, content in turns[1::2]]}
        ended["messages"] = [plain["messages"][0], ended["messages"][0], plain["messages"][2], ended["messages"][1]]
        text = learned(ended, BYTES, template)
        assert text.count(end.rstrip()) == (2 if template is ALPACA else 4)
        assert text.count(END) == (2 if template is ALPACA else 1)
        if template is ALPACA and end == END:
            assert text == learned(plain)


def test_a_template_may_write_the_end_token() -> None:
    template = Template(ALPACA.without_input, ALPACA.with_input, "{output}" + END, assistant="{content}" + END + "\n")
    talk = [("user", "a"), ("assistant", "b"), ("user", "c"), ("assistant", "d")]
    for record in (
        {"instruction": "a", "output": "b"},
        {"messages": [{"role": role, "content": content} for role, content in talk]},
    ):
        text = learned(record, BYTES, template)
        assert text.count(END) == len(record.get("messages", "ab")) // 2 and text.endswith(f"{END}")


@pytest.mark.parametrize("white_space", ["", "\n", "  "])
def test_preference_pairs_end_once(white_space: str) -> None:
    pair = {"prompt": "a", "chosen": "b", "rejected": "c"}
    plain = PreferencePairs([pair], BYTES, 32).pairs
    for key in ("chosen", "rejected"):
        assert PreferencePairs([{**pair, key: pair[key] + END + white_space}], BYTES, 32).pairs == plain
    limit = PreferencePairs([{**pair, "chosen": "b" * 4 + END}], BYTES, 5)
    assert (len(limit), limit.n_too_long) == (1, 0)


@pytest.mark.slow
def test_the_token_ids_are_those_of_trl(tmp_path: Path) -> None:
    from datasets import Dataset
    from transformers import AutoTokenizer
    from trl import SFTConfig
    from trl.trainer.dpo_trainer import DPOTrainer
    from trl.trainer.sft_trainer import SFTTrainer

    BYTES.save(tmp_path)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        options = SFTConfig(output_dir=str(tmp_path), report_to="none", use_cpu=True, bf16=False, max_length=None)
    trainer: Any = SimpleNamespace(_tokenizer=tokenizer, chat_template=None, completion_only_loss=False, _is_vlm=False)
    texts = ["ab", f"ab{END}", f"a{END}b", f"a{END}{END}", "ab\n"]
    for records in ([{"text": text} for text in texts], [{"prompt": "a ", "completion": text} for text in texts]):
        data = Dataset.from_list(records)
        theirs = SFTTrainer._prepare_dataset(trainer, data, tokenizer, options, False, None, "train")
        for record, row in zip(records, theirs, strict=True):
            inputs, targets = collate_instructions([InstructionDataset([record], BYTES)[0]], 256)
            assert [*inputs[0].tolist(), targets[0, -1].item()] == row["input_ids"], record
    pairs = [{"prompt": "a", "chosen": one, "rejected": other} for one in texts for other in texts]
    theirs = DPOTrainer._prepare_dataset(trainer, Dataset.from_list(pairs), tokenizer, options, "train")
    for ours, row in zip(PreferencePairs(pairs, BYTES, 32).pairs, theirs, strict=True):
        assert ours == tuple(row[f"{key}_ids"] for key in ("prompt", "chosen", "rejected"))


# --- documents -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("block", [3, 8, 4096])
@pytest.mark.parametrize("end", ["", END, f"{END}\n", f"\n{END} \n\n"])
def test_a_document_that_ends_with_the_end_token_gets_no_second_one(
    end: str, block: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The reader cuts a long text file into pieces, also within the white space at its end."""
    monkeypatch.setattr(sources, "BLOCK_BYTES", block)
    newline = "\n" * end.startswith("\n")
    (tmp_path / "a.txt").write_text(f"the cat{END}\nthe dog{end}")
    (tmp_path / "a.jsonl").write_text("".join(json.dumps({"text": text + end}) + "\n" for text in ("cat", "dog ")))
    expected = f"the cat{END}\nthe dog{newline}{END}cat{newline}{END}dog {newline}{END}"
    files = [tmp_path / "a.txt", tmp_path / "a.jsonl"]
    assert BYTES.decode(tokenize(files, BYTES)) == expected
    prepare(files, tmp_path / "out", BYTES, progress=False)
    assert BYTES.decode(open_tokens(tmp_path / "out")[0]) == expected


def test_white_space_at_the_end_of_other_documents_stays(tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("the cat \n\n")
    assert BYTES.decode(tokenize([tmp_path / "a.txt"], BYTES)) == f"the cat \n\n{END}"
    words = SimpleTokenizer.from_text("the cat")
    assert words.decode(tokenize([tmp_path / "a.txt"], words)) == f"the cat {END}"
    characters = CharTokenizer.from_text("the cat \n")
    assert characters.decode(tokenize([tmp_path / "a.txt"], characters)) == "the cat \n\n"
