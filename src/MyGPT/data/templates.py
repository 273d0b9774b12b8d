"""Prompt templates, which turn a fine-tuning record into text.

Built-in templates are those of Stanford Alpaca (Taori et al., 2023) and of "Build a Large Language Model (From
Scratch)". The template of a fine-tuned model is saved beside its weights, so that later questions are written with the
same template as in training.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from dataclasses import asdict, dataclass, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any, Literal, NamedTuple, get_args

from MyGPT.data.records import Record, check_record, kind_of
from MyGPT.files import atomic_write, json_text, read_json
from MyGPT.messages import did_you_mean, near_path
from MyGPT.tokenizers.base import ENDOFTEXT, refuse_surrogates

TEMPLATE_FILE = "template.json"
"""The name of the file in a model directory that contains the model's template."""

Asks = Literal["instruction", "messages", "prompt"]


class Part(NamedTuple):
    """A part of an example's text. `is_answer` is True if the model must produce it, False if it belongs to the prompt.

    `is_learned` is False for an answer that the loss ignores.
    """

    text: str
    is_answer: bool
    is_learned: bool = True


@dataclass(frozen=True)
class Template:
    """A prompt template: the text that is added around the fields of a fine-tuning record.

    The fields of a record replace the placeholders {instruction}, {input} and {output}, and the text of a message
    replaces {content}. Other braces are ordinary text. Records with `prompt` and `completion`, or only `text`, use no
    template.
    """

    without_input: str
    """Prompt of an instruction record without input; must contain {instruction}."""
    with_input: str
    """Prompt of an instruction record with input; must contain {instruction} and {input}."""
    response: str = "{output}"
    """Text of the answer to an instruction record; must contain {output}, which the record's output replaces."""
    system: str = "{content}\n\n"
    """Text of a system message in a conversation; must contain {content}, which the message's text replaces."""
    user: str = "### Instruction:\n{content}\n\n"
    """Text of a user's message in a conversation; must contain {content}, which the message's text replaces."""
    assistant: str = "### Response:\n{content}"
    """Text of an assistant's message; must contain {content}, which the message's text replaces. The text before
    {content} belongs to the prompt, the text from there on to the answer."""
    turn_end: str = ENDOFTEXT
    """Text after each of the assistant's messages except the last, unless the message already ends with it. Training ends
    the last message with the end-of-text id. If the tokenizer ends texts with another token than `<|endoftext|>`, the
    default stands for this token."""
    asks: Asks = "instruction"
    """`mygpt chat` turns each question into a record of this kind. `mygpt finetune` sets it to the kind of its data."""

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

    def for_tokenizer(self, tokenizer: Any) -> Template:
        """Return this template, with the tokenizer's end-of-text token as `turn_end` if that is `<|endoftext|>`."""
        end = getattr(tokenizer, "eot_token", None)
        return self if self.turn_end != ENDOFTEXT or end is None else replace(self, turn_end=tokenizer.decode([end]))

    def prompt(self, record: Record) -> str:
        """Return the prompt of a record: the text before its answer or, in a conversation, before the last answer."""
        return "".join(part.text for part in self.parts(record, with_answer=False))

    def question(self, question: str, system: str = "") -> Record:
        """Return a question as a record of the kind that `asks` names, which is the kind of the training data.

        `system` is a text that comes before the question. In an instruction record, it is the input.
        """
        if self.asks == "prompt":
            return {"prompt": f"{system}\n\n{question}" if system else question}
        if self.asks == "instruction":
            return {"instruction": question, "input": system}
        messages = [{"role": "system", "content": system}] if system else []
        return {"messages": [*messages, {"role": "user", "content": question}]}

    def conversation(self, messages: Sequence[Record]) -> Record:
        """Return the record whose prompt asks for the assistant's next message in a conversation.

        A single question, with or without system messages before it, becomes a record as in `question`.
        """
        *before, last = messages
        if last["role"] == "user" and all(message["role"] == "system" for message in before):
            return self.question(last["content"], "\n\n".join(message["content"] for message in before))
        return {"messages": [*messages, {"role": "assistant", "content": ""}]}

    def stops(self) -> list[str]:
        """Return the texts at which an answer ends: the line with which the template starts each question.

        The list is empty if the template has no such line.
        """
        before = self.user.partition("{content}")[0].strip()
        return [f"\n{before}"] if before else []

    def parts(self, record: Record, with_answer: bool = True) -> list[Part]:
        """Return the text of a record as non-empty parts that alternate between prompt and answer.

        If with_answer is False, the record's answer is left out and may be missing. An invalid record raises
        ValueError.
        """
        record = check_record(record, "the record", needs_answer=with_answer)
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
        """Return the prompt and answer parts of a conversation.

        If `with_answer` is False, the text of the final answer is left out.
        """
        before, after = self.assistant.split("{content}")
        if not with_answer and messages[-1]["role"] == "assistant":
            messages = messages[:-1]
        parts = []
        for message in messages:
            content = message["content"]
            if message["role"] == "assistant":
                answer, end = content + after, self.turn_end.rstrip()
                has_end = bool(end) and answer.rstrip().endswith(end)
                learned = message.get("weight", 1) != 0
                turn_end = "" if has_end else self.turn_end
                parts += [Part(before, False), Part(answer, True, learned), Part(turn_end, True, learned)]
            else:
                parts.append(Part(_fill(getattr(self, message["role"]), content=content), False))
        return parts[:-1] if with_answer else [*parts, Part(before, False)]

    def save(self, directory: str | os.PathLike[str]) -> None:
        """Write this template to `template.json` in a directory, from which `load_template` reads it."""
        Path(directory).mkdir(parents=True, exist_ok=True)
        with atomic_write(Path(directory) / TEMPLATE_FILE) as file:
            file.write(json_text(asdict(self), ensure_ascii=False, indent=1))
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
"""Stanford Alpaca's template. The output follows "### Response:" directly, without a space or line end."""

BOOK = Template(
    without_input=f"{_TASK}{_REQUEST}",
    with_input=f"{_TASK}{_REQUEST}{_INPUT}",
    response="\n\n### Response:\n{output}",
)
"""The template of "Build a Large Language Model (From Scratch)". Its heading "### Response:" is part of the answer, so
the model learns to produce it."""

TEMPLATES = {"alpaca": ALPACA, "book": BOOK}
"""The built-in templates by name."""
_SYNONYMS = {"alpaca": "stanford stanford_alpaca", "book": "raschka"}


def format_input(record: Record, template: Template = BOOK) -> str:
    """Return the prompt of an instruction record, that is, its text before the answer. The record needs no output.

    `template` adds text around the record's fields.

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
        hint = did_you_mean(name, TEMPLATES, _SYNONYMS) or near_path(name)
        raise ValueError(f"there is no template {name!r}: give {known}{hint}")
    try:
        data = read_json(path)
        if not isinstance(data, dict):
            raise ValueError(f"a template must be a JSON object, got {type(data).__name__}")
        problems = [
            f"the key {key!r} is unknown{did_you_mean(key, _PLACEHOLDERS)}"
            for key in sorted(data.keys() - _PLACEHOLDERS.keys())
        ]
        problems += [f"the key {key!r} is missing" for key in ("without_input", "with_input") if key not in data]
        if problems:
            raise ValueError(f"{problems[0]}, the keys are {', '.join(_PLACEHOLDERS)}")
        return Template(**data)
    except ValueError as error:
        raise ValueError(f"{path} is not a template: {error}") from None


def _fill(text: str, **values: str) -> str:
    """Return `text` with each placeholder {name} replaced by the value of that name in `values`.

    All placeholders are replaced in one pass, so that braces inside a value are not replaced.
    """
    return re.sub(r"\{(\w+)\}", lambda match: values.get(match[1], match[0]), text)


def _merge(parts: list[Part]) -> list[Part]:
    """Return the parts that are not empty, with adjacent prompt parts joined, and adjacent answer parts joined.

    The joined texts are then encoded as a whole.
    """
    groups = groupby((part for part in parts if part.text), key=lambda part: part[1:])
    return [Part("".join(part.text for part in group), *kind) for kind, group in groups]
