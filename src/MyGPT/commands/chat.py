"""`mygpt chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import dataclasses
import functools
import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

from MyGPT.commands._lines import LineReader
from MyGPT.commands._model import check_generation, make_fast, report_tokenizer, start_build
from MyGPT.config import Precision, require_positive
from MyGPT.data.instructions import encode_prompt, encode_question
from MyGPT.data.records import Record
from MyGPT.data.templates import Template, load_template
from MyGPT.files import reading
from MyGPT.generation import end_ids, stream_text
from MyGPT.messages import OPTION_SYNONYMS, did_you_mean
from MyGPT.opening import find_model_files, open_lazily
from MyGPT.sampling import SamplingConfig
from MyGPT.serving import Engine
from MyGPT.tokenizers import ENDOFTEXT, Tokenizer

DEFAULTS = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
COMMON = "model adapter template system memory max_new_tokens temperature top_k top_p device precision seed".split()
WELCOME = "/help lists the commands, exit or Ctrl-D ends the chat, Ctrl-C stops an answer"
HELP = """\
/set               show the options of the answers
/set NAME VALUE    change an option, for example /set temperature 0.7; off turns it off
/reset             forget the conversation, but keep the options
/help              show this help
exit               end the chat; also quit, /exit, /quit or Ctrl-D
//text             send a text that begins with a slash: /text
Ctrl-C stops an answer, whose printed part stays in the conversation. At the prompt it clears the line.
In a terminal, a line that ends with a backslash continues in the next line."""
COMMANDS = {
    "/set": "option options",
    "/reset": "clear new restart",
    "/help": "h commands ?",
    "/exit": "quit q bye stop",
}
"""The commands of a chat, and for each of them other names under which users look for it."""
TRANSCRIPT = Template(
    without_input="User: {instruction}\nAssistant:",
    with_input="User: {instruction}\n{input}\nAssistant:",
    user="User: {content}\n",
    assistant="Assistant:{content}",
    turn_end="\n",
    asks="messages",
)
"""The template for a model that was not fine-tuned: the prompt is the transcript of a conversation to continue."""


@dataclass
class Conversation:
    """The questions and answers of a conversation (`turns`), and the template of its prompts.

    If `remembers` is false, a prompt contains only the latest question. `system` is a text at the start of the conversation.
    """

    template: Template = TRANSCRIPT
    remembers: bool = True
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def record(self, question: str) -> Record:
        """Return the question as a record with the same keys as the training data, such as {"messages": [...]}.

        If the conversation remembers earlier turns, the record contains them too.
        """
        if not self.remembers:
            return self.template.question(question, self.system)
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.turns:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return {"messages": [*messages, {"role": "user", "content": question}]}

    def ids(self, question: str, tokenizer: Tokenizer, room: int) -> list[int]:
        """Return the token ids of the prompt for a question, at most `room` ids.

        If the prompt is longer, the oldest turns are deleted from `turns` until it fits. Raises ValueError, and keeps the
        turns, if the prompt is longer even without any turns.
        """
        turns = self.turns
        try:
            while True:
                ids = encode_question(self.record(question), tokenizer, self.template)
                if len(ids) <= room:
                    return ids
                if not self.turns or not self.remembers:
                    limit = f"the context leaves room for {room}; shorten the question"
                    raise ValueError(f"the question has {len(ids)} tokens, but {limit}")
                self.turns = self.turns[1:]
        except ValueError:
            self.turns = turns
            raise


@dataclass
class Chat:
    """A conversation with a model, and the options of its answers, which the command /set changes."""

    stream: Callable[[list[int], int, SamplingConfig, list[str], int | None], Iterator[str]]
    """A function that yields the continuation of a prompt: see `Engine.stream_text`."""
    tokenizer: Tokenizer
    conversation: Conversation
    context: int
    """The context length of the model in tokens."""
    sampling: SamplingConfig
    max_new_tokens: int
    """Maximum length of an answer in tokens."""
    seed: int | None = None
    """Seed of the first answer; each further answer has the next seed. /reset starts again with the first."""
    n_answers: int = 0
    """Number of answers since the start or the last /reset."""

    def options(self) -> dict[str, Any]:
        """Return the names and values of the options."""
        return {**vars(self.sampling), "max_new_tokens": self.max_new_tokens, "seed": self.seed}

    def set_option(self, name: str, text: str) -> None:
        """Change the option `name` to the value that a user typed as `text`; "off" and "null" mean None.

        Raises ValueError, with the message of the option on the command line, for an unknown name or a value out of range.
        """
        if name not in self.options():
            near = did_you_mean(name, self.options(), OPTION_SYNONYMS)
            raise ValueError(f"unknown option {name!r}{near or '; the options are ' + ', '.join(self.options())}")
        value = _value(text)
        if name == "max_new_tokens":
            self.max_new_tokens = _checked_length(value, self.context)
        elif name == "seed":
            if value is not None and type(value) is not int:
                raise ValueError(f"seed must be a whole number or off, got {text!r}")
            check_generation(seed=value)
            self.seed = value
        else:
            self.sampling = dataclasses.replace(self.sampling, **{name: value})

    def reset(self) -> None:
        """Forget the conversation. The options stay as they are."""
        self.conversation.turns, self.n_answers = [], 0

    def answer(self, question: str) -> None:
        """Generate and print the answer to a question, and add both to the conversation.

        Ctrl-C stops the answer. Its printed part is kept; if nothing was printed, the question is not kept either. Raises
        ValueError if the question is too long or cannot be encoded.
        """
        conversation, n_turns, answer = self.conversation, len(self.conversation.turns), ""
        try:
            ids = conversation.ids(question, self.tokenizer, self.context - self.max_new_tokens)
            if n_forgotten := n_turns - len(conversation.turns):
                print(f"(the context is full: dropped the oldest {n_forgotten} of {n_turns} turns)", file=sys.stderr)
            seed = None if self.seed is None else self.seed + self.n_answers
            stops = conversation.template.stops()
            for text in self.stream(ids, self.max_new_tokens, self.sampling, stops, seed):
                answer += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            if not answer:
                print("\n(stopped before the answer began; the question is not kept)", file=sys.stderr)
                return
        print()
        conversation.turns.append((question, answer.rstrip()))
        self.n_answers += 1


def chat(
    model: str,
    sampling: SamplingConfig,
    adapter: str | None = None,
    template: str | None = None,
    memory: bool | None = None,
    system: str = "",
    max_new_tokens: int | None = None,
    seed: int | None = None,
    device: str = "auto",
    precision: Precision = "auto",
    lookup: bool = False,
    with_: str | None = None,
) -> None:
    """Chat with a model in the terminal. There, /help lists commands such as /set temperature 0.7.

    A fine-tuned model receives each question in the prompt format that it was trained on. Other models, such as gpt2, continue
    the transcript of a conversation.

    Examples:
        mygpt chat --model runs/tuned
        mygpt chat --model gpt2 --temperature 0.9

    Args:
        template: Prompt template: alpaca, book or a JSON file. Default: the model's own template, or a plain transcript.
        memory: Show the model the earlier questions and answers. Default: on for models trained on conversations and for
            models that were not fine-tuned.
        system: A text at the start of the conversation. A model trained on instructions receives it as the input.
        max_new_tokens: Maximum length of an answer in tokens. Default: 200, or half the context if that is smaller.
    """
    require_positive(max_new_tokens=1 if max_new_tokens is None else max_new_tokens)
    check_generation(seed=seed)
    given = load_template(template) if template else None
    build = start_build(device, precision) if with_ is None else None  # custom parts do not use the kernel
    with reading(model):
        opened, config, tokenizer = open_lazily(model, device, adapter, with_)
        report_tokenizer(tokenizer)
        context = config.context_length
        longest = _checked_length(min(200, context // 2) if max_new_tokens is None else max_new_tokens, context)
        own = given or find_model_files(model, adapter).template()
        asked_by = own or TRANSCRIPT
        conversation = Conversation(asked_by, asked_by.asks == "messages" if memory is None else memory, system)
        require_known_characters(conversation, tokenizer, model)
        can_end = bool(end_ids(opened, tokenizer))
        fast = make_fast(opened, precision, lookup, build)
    del opened  # on a CPU, `fast` has its own copy of the weights
    if not can_end:
        missing = (
            f"the tokenizer has no {ENDOFTEXT} token, so answers may end only after max_new_tokens={longest} tokens"
        )
        print(f"({missing}; mygpt train --tokenizer bpe makes models that have it)", file=sys.stderr)
    print(WELCOME, file=sys.stderr)
    options = conversation, context, sampling, longest, seed
    if lookup:
        talk(Chat(functools.partial(stream_text, fast, tokenizer), tokenizer, *options), LineReader())
        return
    with Engine(fast, tokenizer, slots=1) as engine:  # keeps the keys and values of earlier turns
        talk(Chat(engine.stream_text, tokenizer, *options), LineReader())


def talk(chat: Chat, lines: LineReader) -> None:
    """Read questions and commands until the user ends the chat, and print the answers."""
    was_interrupted = False
    while True:
        try:
            line = lines.read("> ")
            was_interrupted = False
        except KeyboardInterrupt:
            if not lines.is_terminal:
                raise
            print("\n(exit or Ctrl-D ends the chat)" if was_interrupted else "", file=sys.stderr)
            was_interrupted = True
            continue
        except UnicodeDecodeError as error:
            if not lines.is_terminal:
                raise ValueError(f"the input is not text in the encoding {error.encoding}: {error.reason}") from None
            print(f"that is not text in the encoding {error.encoding}", file=sys.stderr)
            continue
        line = None if line is None else line.strip()
        if line is None or line.lower() in ("exit", "quit", "/exit", "/quit"):
            return
        try:
            if re.match(r"/[a-zA-Z?]*(?=\s|$)", line) and "\n" not in line:
                run_command(chat, line)
            elif line:
                chat.answer(line.removeprefix("/") if line.startswith("//") else line)
        except ValueError as error:
            print(error, file=sys.stderr)


def run_command(chat: Chat, line: str) -> None:
    """Run a command of the chat, such as "/set top_k 5". Raises ValueError for an unknown command or a wrong argument."""
    command, _, argument = line.partition(" ")
    if command == "/help":
        print(HELP, file=sys.stderr)
    elif command == "/reset":
        chat.reset()
        print("conversation cleared", file=sys.stderr)
    elif command == "/set":
        name, _, value = re.sub(r"[=\s]+", " ", argument.strip()).lstrip("-").partition(" ")
        if value:
            chat.set_option(name.replace("-", "_"), value)
        elif name and name not in chat.options():
            chat.set_option(name, "")  # raises an error that names the options
        for option, current in chat.options().items():
            if not name or option == name.replace("-", "_"):
                print(f"{option} {'off' if current is None else current}", file=sys.stderr)
    else:
        near = did_you_mean(command, COMMANDS, COMMANDS) or f"; the commands are {', '.join(COMMANDS)}"
        raise ValueError(f"unknown command {command!r}{near} (/{command} sends {command} to the model as text)")


def require_known_characters(conversation: Conversation, tokenizer: Tokenizer, model: str) -> None:
    """Raise ValueError if the tokenizer cannot encode the system text, or the text that the template adds to a question."""
    for what, record in (("the system text", {"prompt": conversation.system}), ("", conversation.record(""))):
        try:
            encode_prompt(record, tokenizer, conversation.template)
        except ValueError as error:
            what = what or "the text that chat adds to a question"
            way_out = "continue texts with mygpt generate, or train a model with mygpt train --tokenizer bpe"
            raise ValueError(f"the tokenizer of {model} cannot encode {what} ({error}): {way_out}") from None


def _value(text: str) -> Any:
    """Return the value of an option that a user typed: a number, None for "off", or else the text itself."""
    if text.lower() in ("off", "none", "null"):
        return None
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _checked_length(max_new_tokens: Any, context: int) -> int:
    """Return max_new_tokens; raise ValueError if it is not a whole number from 1 to below the model's context."""
    require_positive(max_new_tokens=max_new_tokens)
    if max_new_tokens >= context:
        raise ValueError(f"max_new_tokens must be below the model's context of {context}, got {max_new_tokens}")
    return int(max_new_tokens)
