"""How a record becomes text: Alpaca's two prompts (Taori et al., 2023), those of Raschka's book, or a user's own.

The template that a model was tuned with is saved beside its weights, so that it is asked the way it was taught.
"""

from __future__ import annotations

import json
import os
import re
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from MyGPT.data.records import Record, check_record, kind_of
from MyGPT.files import atomic_write, read_json
from MyGPT.tokenizers.base import ENDOFTEXT, refuse_surrogates

TEMPLATE_FILE = "template.json"
"""The template's name in a model directory."""


Asks = Literal["instruction", "messages", "prompt"]


class Part(NamedTuple):
    """A stretch of an example's text that is either given to the model or expected of it."""

    text: str
    is_answer: bool


@dataclass(frozen=True)
class Template:
    """Texts around a record's own, with places to fill: {instruction}, {input}, {output}, {content}.

    Other braces stand for themselves. Records of prompt and completion, and plain text, are taken as they are.
    """

    without_input: str
    """The prompt of a record whose input is missing or empty; has {instruction}."""
    with_input: str
    """The prompt of a record with an input; has {instruction} and {input}."""
    response: str = "{output}"
    """What the model is to say after the prompt; has {output}."""
    system: str = "{content}\n\n"
    """In a conversation, the message that sets the scene; has {content}."""
    user: str = "### Instruction:\n{content}\n\n"
    """A user's message; has {content}."""
    assistant: str = "### Response:\n{content}"
    """The model's message; has {content}, and what is before that is given to the model."""
    turn_end: str = ENDOFTEXT
    """What the model says after each of its messages but the last, which ends as every example does."""
    asks: Asks = "instruction"
    """The kind of record that a question to the model is: `mygpt finetune` sets it to the kind that it was tuned on."""

    def __post_init__(self) -> None:
        if self.asks not in get_args(Asks):
            raise ValueError(f"a template's asks must be one of {', '.join(get_args(Asks))}, got {self.asks!r}")
        for field in fields(self):
            text = getattr(self, field.name)
            if not isinstance(text, str):
                raise ValueError(f"a template's {field.name} must be a text, got {text!r}")
            refuse_surrogates(text)
            for place in _PLACES[field.name]:
                if text.count(place) != 1:
                    raise ValueError(f"a template's {field.name} must have {place} once, got {text!r}")

    def prompt(self, record: Record) -> str:
        """What the model is given before it answers: of a conversation, all before the last message of the assistant."""
        return "".join(part.text for part in self.parts(record, with_answer=False))

    def parts(self, record: Record, with_answer: bool = True) -> list[Part]:
        """The record's text from end to end, in stretches that take turns at being answers; none is empty.

        Without the answer, only what comes before it. A record that is none is a ValueError.
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
        """Writes `template.json`, for `load_template`."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(directory) / TEMPLATE_FILE) as file:
            json.dump(asdict(self), file, ensure_ascii=False, indent=1)
            file.write("\n")


_PLACES = {
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
"""Stanford Alpaca's, to the letter: nothing stands between "### Response:" and the output."""

BOOK = Template(
    without_input=f"{_TASK}{_REQUEST}",
    with_input=f"{_TASK}{_REQUEST}{_INPUT}",
    response="\n\n### Response:\n{output}",
)
"""That of "Build a Large Language Model (From Scratch)", chapter 7, where the model itself is to say "### Response:"."""

TEMPLATES = {"alpaca": ALPACA, "book": BOOK}


def format_input(record: Record, template: Template = BOOK) -> str:
    """The prompt of a record, as the book's function of this name makes it. No output is needed.

    >>> format_input({"instruction": "Name a colour.", "input": ""}).splitlines()[-2:]
    ['### Instruction:', 'Name a colour.']
    """
    return template.prompt(record)


def load_template(name_or_path: str | os.PathLike[str]) -> Template:
    """The template called "alpaca" or "book", or the one in a JSON file or in a model directory's `template.json`."""
    name = os.fspath(name_or_path)
    if name in TEMPLATES:
        return TEMPLATES[name]
    path = Path(name) / TEMPLATE_FILE if Path(name).is_dir() else Path(name)
    if not path.is_file():
        raise ValueError(
            f"no template {name!r}: give {', '.join(TEMPLATES)}, a JSON file, or a model directory with {TEMPLATE_FILE}"
        )
    try:
        return _from_json(read_json(path))
    except ValueError as error:
        raise ValueError(f"{path} is no template: {error}") from None


def _from_json(data: Any) -> Template:
    if not isinstance(data, dict):
        raise ValueError(f"it must be a JSON object, got {type(data).__name__}")
    unknown = sorted(data.keys() - _PLACES.keys())
    missing = [name for name in ("without_input", "with_input") if name not in data]
    if unknown or missing:
        problem = f"the key {unknown[0]!r} is unknown" if unknown else f"the key {missing[0]!r} is missing"
        raise ValueError(f"{problem}, the keys are {', '.join(_PLACES)}")
    return Template(**data)


def _fill(text: str, **values: str) -> str:
    """In one pass, so that a place named inside a value is left alone."""
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def _merge(parts: list[Part]) -> list[Part]:
    """The same text in as few parts as possible: within one, a tokenizer may join what it likes."""
    merged: list[Part] = []
    for part in parts:
        if not part.text:
            continue
        if merged and merged[-1].is_answer == part.is_answer:
            merged[-1] = Part(merged[-1].text + part.text, part.is_answer)
        else:
            merged.append(part)
    return merged
