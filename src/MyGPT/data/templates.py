"""Prompt templates, which turn a record into text: Alpaca's (Taori et al., 2023), the book's, or a user's own.

The template of a fine-tuned model is saved beside its weights, so that questions to the model get the same form as in
training.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Literal, NamedTuple, get_args

from MyGPT.data.records import Record, check_record, kind_of
from MyGPT.files import atomic_write, read_json
from MyGPT.tokenizers.base import ENDOFTEXT, refuse_surrogates

TEMPLATE_FILE = "template.json"
"""The name of the template's file in a model directory."""

Asks = Literal["instruction", "messages", "prompt"]


class Part(NamedTuple):
    """A piece of an example's text: either part of the prompt, or an answer that the model must produce."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Template:
    """The text around the fields of a record.

    The placeholders are {instruction}, {input}, {output} and {content}; other braces are ordinary text. Records with
    prompt and completion, and records with text, are used without a template.
    """

    without_input: str
    """Prompt for an instruction without input; contains {instruction}."""
    with_input: str
    """Prompt for an instruction with input; contains {instruction} and {input}."""
    response: str = "{output}"
    """The answer to an instruction; contains {output}."""
    system: str = "{content}\n\n"
    """A system message of a conversation; contains {content}."""
    user: str = "### Instruction:\n{content}\n\n"
    """A user's message; contains {content}."""
    assistant: str = "### Response:\n{content}"
    """An assistant's message; contains {content}. Text before {content} belongs to the prompt."""
    turn_end: str = ENDOFTEXT
    """The end of each assistant's message except the last, which ends with the example's end-of-text id."""
    asks: Asks = "instruction"
    """The kind of record that holds a question to the model. `mygpt finetune` sets it to the kind of the training data."""

    def __post_init__(self) -> None:
        if self.asks not in get_args(Asks):
            raise ValueError(f"a template's asks must be one of {', '.join(get_args(Asks))}, got {self.asks!r}")
        for field in fields(self):
            text = getattr(self, field.name)
            if not isinstance(text, str):
                raise ValueError(f"a template's {field.name} must be a string, got {text!r}")
            refuse_surrogates(text)
            for placeholder in _PLACEHOLDERS[field.name]:
                if text.count(placeholder) != 1:
                    raise ValueError(f"a template's {field.name} must contain {placeholder} once, got {text!r}")

    def prompt(self, record: Record) -> str:
        """Return the prompt of a record. In a conversation, this is the text before the assistant's last message."""
        return "".join(part.text for part in self.parts(record, with_answer=False))

    def parts(self, record: Record, with_answer: bool = True) -> list[Part]:
        """Return the text of a record as non-empty parts that alternate between prompt and answer.

        With with_answer=False, the last answer is left out. An invalid record raises ValueError.
        """
        check_record(record, "the record", needs_answer=with_answer)
        kind = kind_of(record)
        if kind == "messages":
            return _merge(self._conversation(record["messages"], with_answer))
        if kind == "instruction":
            text = self.with_input if record.get("input") else self.without_input
            prompt = _fill(text, instruction=record["instruction"], input=record.get("input", ""))
            answer = _fill(self.response, output=record["output"]) if with_answer else ""
        elif kind == "prompt":
            prompt, answer = record["prompt"], record["completion"] if with_answer else ""
        else:
            prompt, answer = "", record["text"] if with_answer else ""
        return _merge([Part(prompt, False), Part(answer, True)])

    def _conversation(self, messages: list[Record], with_answer: bool) -> list[Part]:
        """Return the parts of a conversation, with or without the assistant's last message."""
        before, after = self.assistant.split("{content}")
        if not with_answer and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        parts = []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                parts += [Part(before, False), Part(content + after, True), Part(self.turn_end, True)]
            else:
                parts.append(Part(_fill(getattr(self, message["role"]), content=content), False))
        return parts[:-1] if with_answer else [*parts, Part(before, False)]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write `template.json` to a directory, for `load_template`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(directory) / TEMPLATE_FILE) as file:
            json.dump(asdict(self), file, ensure_ascii=False, indent=1)
            file.write("\n")


_PLACEHOLDERS = {
    "without_input": ["{instruction}"],
    "with_input": ["{instruction}", "{input}"],
    "response": ["{output}"],
    "system": ["{content}"],
    "user": ["{content}"],
    "assistant": ["{content}"],
    "turn_end": [],
    "asks": [],
}

_TASK = "Below is an instruction that describes a task"
_FURTHER = ", paired with an input that provides further context"
_REQUEST = ". Write a response that appropriately completes the request.\n\n### Instruction:\n{instruction}"
_INPUT = "\n\n### Input:\n{input}"

ALPACA = Template(
    without_input=f"{_TASK}{_REQUEST}\n\n### Response:",
    with_input=f"{_TASK}{_FURTHER}{_REQUEST}{_INPUT}\n\n### Response:",
    assistant="### Response:{content}",
)
"""Stanford Alpaca's template. There is no space between "### Response:" and the output."""

BOOK = Template(
    without_input=f"{_TASK}{_REQUEST}",
    with_input=f"{_TASK}{_REQUEST}{_INPUT}",
    response="\n\n### Response:\n{output}",
)
"""The template of "Build a Large Language Model (From Scratch)", chapter 7, where "### Response:" is part of the answer."""

TEMPLATES = {"alpaca": ALPACA, "book": BOOK}
"""The templates that `load_template` knows by name."""


def format_input(record: Record, template: Template = BOOK) -> str:
    """Return the prompt of a record, like the function of this name in the book. The record needs no output.

    >>> format_input({"instruction": "Name a colour.", "input": ""}).splitlines()[-2:]
    ['### Instruction:', 'Name a colour.']
    """
    return template.prompt(record)


def load_template(name_or_path: str | os.PathLike[str]) -> Template:
    """Return a template by name ("alpaca" or "book"), or from a JSON file or a model directory's `template.json`."""
    name = os.fspath(name_or_path)
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name) / TEMPLATE_FILE if Path(name).is_dir() else Path(name)
    if not path.is_file():
        known = f"{', '.join(TEMPLATES)}, a JSON file, or a model directory with {TEMPLATE_FILE}"
        raise ValueError(f"there is no template {name!r}: give {known}")
    try:
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError(f"a template must be a JSON object, got {type(data).__name__}")
        problems = [f"the key {key!r} is unknown" for key in sorted(data.keys() - _PLACEHOLDERS.keys())]
        problems += [f"the key {key!r} is missing" for key in ("without_input", "with_input") if key not in data]
        if problems:
            raise ValueError(f"{problems[0]}, the keys are {', '.join(_PLACEHOLDERS)}")
        return Template(**data)
    except ValueError as error:
        raise ValueError(f"{path} is not a template: {error}") from None


def _fill(text: str, **values: str) -> str:
    """Replace the placeholders of a template in one pass, so that braces inside a value are not replaced."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def _merge(parts: list[Part]) -> list[Part]:
    """Join adjacent parts of the same kind, and drop empty parts, so that a tokenizer sees each stretch as a whole."""
    groups = groupby((part for part in parts if part.text), key=lambda part: part.is_answer)
    return [Part("".join(part.text for part in group), is_answer) for is_answer, group in groups]
