"""Tests of templates, against Stanford's published texts, the book's function and plain f-strings."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from MyGPT.config import GPTConfig
from MyGPT.data.templates import ALPACA, BOOK, TEMPLATES, Part, Template, format_input, load_template
from MyGPT.model import GPTModel

PLAIN = {"instruction": "Name a colour.", "input": "", "output": "Green."}
WITH_INPUT = {"instruction": "Add the numbers.", "input": "1, 2", "output": "3"}
TALK = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Hi"},
    {"role": "assistant", "content": "Hello!"},
    {"role": "user", "content": "Bye"},
    {"role": "assistant", "content": "Bye!"},
]
PIRATE = Template(
    without_input="Captain: {instruction}\nPirate:",
    with_input="Captain: {instruction} ({input})\nPirate:",
    response=" {output} Arr!",
    system="[{content}]\n",
    user="Captain: {content}\n",
    assistant="Pirate: {content}",
    turn_end="\n",
)


def test_alpacas_prompts_equal_stanfords() -> None:
    assert ALPACA.prompt(PLAIN) == (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request.\n\n"
        "### Instruction:\nName a colour.\n\n### Response:"
    )
    assert ALPACA.prompt(WITH_INPUT) == (
        "Below is an instruction that describes a task, paired with an input that provides further context. Write a "
        "response that appropriately completes the request.\n\n"
        "### Instruction:\nAdd the numbers.\n\n### Input:\n1, 2\n\n### Response:"
    )
    assert ALPACA.parts(PLAIN)[1] == Part("Green.", True)


@pytest.mark.slow
@given(instruction=st.text(), input=st.text(), output=st.text())
def test_the_books_prompt_names_no_input_and_no_response(instruction: str, input: str, output: str) -> None:
    record = {"instruction": instruction, "input": input, "output": output}
    prompt = (
        "Below is an instruction that describes a task. Write a response that appropriately completes the request."
        f"\n\n### Instruction:\n{instruction}" + (f"\n\n### Input:\n{input}" if input else "")
    )
    assert format_input(record) == prompt
    assert BOOK.parts(record) == [Part(prompt, False), Part(f"\n\n### Response:\n{output}", True)]


def test_a_prompt_needs_no_answer_and_no_input() -> None:
    assert format_input({"instruction": "a"}) == format_input({"instruction": "a", "input": "", "output": "b"})
    assert format_input({"prompt": "a"}) == format_input({"prompt": "a", "completion": "b"}) == "a"
    with pytest.raises(ValueError, match="the record: the key 'output' is missing"):
        BOOK.parts({"instruction": "a"})


def test_prompts_completions_and_texts_are_used_without_changes() -> None:
    for template in (ALPACA, BOOK, PIRATE):
        assert template.parts({"prompt": "a", "completion": "b"}) == [Part("a", False), Part("b", True)]
        assert template.parts({"text": "{output}"}) == [Part("{output}", True)]
        assert template.prompt({"text": "a"}) == ""


def test_a_users_template_puts_its_own_words_around_a_record() -> None:
    assert PIRATE.parts(WITH_INPUT) == [Part("Captain: Add the numbers. (1, 2)\nPirate:", False), Part(" 3 Arr!", True)]


def test_braces_in_a_record_and_other_braces_in_a_template_are_left_alone() -> None:
    template = Template(without_input='{"ask": "{instruction}", "x": {other}}', with_input="{instruction}{input}")
    record = {"instruction": "{input} {instruction} {0}", "input": "", "output": "{output}"}
    assert template.prompt(record) == '{"ask": "{input} {instruction} {0}", "x": {other}}'
    assert template.prompt({**record, "input": "{instruction}"}) == "{input} {instruction} {0}{instruction}"
    assert template.parts(record)[1].text == "{output}"


def test_only_the_assistants_messages_of_a_conversation_are_answers() -> None:
    assert BOOK.parts({"messages": TALK}) == [
        Part("Be brief.\n\n### Instruction:\nHi\n\n### Response:\n", False),
        Part("Hello!<|endoftext|>", True),
        Part("### Instruction:\nBye\n\n### Response:\n", False),
        Part("Bye!", True),
    ]
    assert PIRATE.parts({"messages": TALK[1:]}) == [
        Part("Captain: Hi\nPirate: ", False),
        Part("Hello!\n", True),
        Part("Captain: Bye\nPirate: ", False),
        Part("Bye!", True),
    ]


@pytest.mark.parametrize("template", [ALPACA, BOOK, PIRATE])
def test_the_prompt_of_a_conversation_is_the_text_before_the_last_answer_in_training(template: Template) -> None:
    trained = template.parts({"messages": TALK})
    for messages in (TALK, TALK[:-1]):
        assert template.parts({"messages": messages}, with_answer=False) == trained[:-1]
    assert template.prompt({"messages": TALK}) == "".join(part.text for part in trained[:-1])


@pytest.mark.parametrize("template", [ALPACA, BOOK, PIRATE])
def test_a_saved_template_is_the_same_when_opened(tmp_path: Path, template: Template) -> None:
    template.save(tmp_path / "model")
    assert load_template(tmp_path / "model") == template
    assert load_template(tmp_path / "model" / "template.json") == template
    assert json.loads((tmp_path / "model" / "template.json").read_text()) == dataclasses.asdict(template)


def test_saving_the_model_again_keeps_its_template(tmp_path: Path, tiny_config: GPTConfig) -> None:
    GPTModel(tiny_config).save_pretrained(tmp_path / "model")
    PIRATE.save(tmp_path / "model")
    GPTModel(tiny_config).save_pretrained(tmp_path / "model")
    assert load_template(tmp_path / "model") == PIRATE


def test_templates_are_known_by_name(in_tmp_path: Path) -> None:
    assert load_template("alpaca") is ALPACA and load_template("book") is BOOK
    assert sorted(TEMPLATES) == ["alpaca", "book"]
    for name in ("alpacca", in_tmp_path):
        with pytest.raises(ValueError, match=r"no template .*: give alpaca, book, a JSON file, or a model directory"):
            load_template(name)


def test_a_template_file_needs_only_its_prompts(tmp_path: Path) -> None:
    (tmp_path / "mine.json").write_text('{"without_input": "{instruction}?", "with_input": "{instruction} {input}?"}')
    assert load_template(tmp_path / "mine.json").response == "{output}"


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"without_input": "Do it."}, "without_input must contain {instruction} once, got 'Do it.'"),
        ({"with_input": "{instruction}"}, "with_input must contain {input} once"),
        ({"response": "{outptu}"}, "response must contain {output} once, got '{outptu}'"),
        ({"assistant": "{content} {content}"}, "assistant must contain {content} once"),
        ({"user": 5}, "user must be a string, got 5"),
        ({"asks": "text"}, "asks must be one of instruction, messages, prompt, got 'text'"),
        ({"turn_end": None}, "turn_end must be a string, got None"),
        ({"system": "{content}\ud800"}, "surrogate|half"),
    ],
)
def test_a_template_without_its_placeholders_is_refused(change: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        dataclasses.replace(BOOK, **change)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "Expecting value"),
        ("[]", "a template must be a JSON object, got list"),
        (
            '{"without_input": "{instruction}"}',
            "the key 'with_input' is missing, the keys are without_input, with_input",
        ),
        (
            '{"without_input": "{instruction}", "with_input": "{instruction}{input}", "answer": ""}',
            "the key 'answer' is unknown",
        ),
        (
            '{"without_input": "", "with_input": "{instruction}{input}"}',
            "without_input must contain {instruction} once",
        ),
    ],
)
def test_a_damaged_template_file_is_refused_with_its_name(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "template.json").write_text(text)
    with pytest.raises(ValueError, match=f"template.json is not a template: .*{words}"):
        load_template(tmp_path)


def test_a_conversation_asks_for_the_next_message_as_in_training() -> None:
    system, user = TALK[:2]
    assert ALPACA.conversation([user]) == {"instruction": "Hi", "input": ""}
    assert ALPACA.conversation([system, system, user]) == {"instruction": "Hi", "input": "Be brief.\n\nBe brief."}
    asks_messages = dataclasses.replace(ALPACA, asks="messages")
    assert asks_messages.prompt(asks_messages.conversation([system, user])) == ALPACA.prompt(
        {"messages": [system, user]}
    )
    for n in (1, 3, 4, 5):  # also after the assistant's own message, and after a system message
        asked = ALPACA.prompt(ALPACA.conversation(TALK[:n]))
        last = {"role": "assistant", "content": "Yes."}
        assert asked + "Yes." == "".join(part.text for part in ALPACA.parts({"messages": [*TALK[:n], last]}))
