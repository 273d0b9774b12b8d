"""`mygpt chat`: a conversation with a model in the terminal."""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import Any

from MyGPT.commands._model import make_fast, report_tokenizer, start_build
from MyGPT.config import Precision
from MyGPT.data.instructions import encode_prompt
from MyGPT.data.templates import Template, load_template
from MyGPT.generation import stream_text
from MyGPT.opening import find_model_files, open_model
from MyGPT.sampling import SamplingConfig
from MyGPT.tokenizers import Tokenizer

DEFAULTS = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
COMMON = "model adapter template system memory max_new_tokens temperature top_k top_p device precision seed".split()
HELP = "/reset clears the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"
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

    def stops(self) -> list[str]:
        """Return the strings at which an answer ends: the text that the template puts before each question.

        The list is empty if the template has no such text.
        """
        before = self.template.user.partition("{content}")[0].strip()
        return [f"\n{before}"] if before else []

    def record(self, question: str) -> dict[str, Any]:
        """Return the question as a record with the same keys as the training data, such as {"messages": [...]}.

        If the conversation remembers earlier turns, the record contains them too.
        """
        if not self.remembers and self.template.asks == "prompt":
            return {"prompt": f"{self.system}\n\n{question}" if self.system else question}
        if not self.remembers and self.template.asks == "instruction":
            return {"instruction": question, "input": self.system}
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.turns if self.remembers else []:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return {"messages": [*messages, {"role": "user", "content": question}]}

    def ids(self, question: str, tokenizer: Tokenizer, room: int) -> list[int]:
        """Return the token ids of the prompt for a question, at most `room` ids.

        If the prompt is longer, the oldest turns are deleted from `turns` until it fits. Raises ValueError if the prompt
        is still longer without any turns.
        """
        # The model need not generate the text with which the template starts every answer.
        begun = self.template.response.partition("{output}")[0] if "instruction" in self.record(question) else ""
        while True:
            ids = encode_prompt(self.record(question), tokenizer, self.template) + tokenizer.encode(begun)
            if len(ids) <= room:
                return ids
            if not self.turns or not self.remembers:
                limit = f"the context leaves room for {room}; shorten the question"
                raise ValueError(f"the question has {len(ids)} tokens, but {limit}")
            del self.turns[0]


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
) -> None:
    """Chat with a model in the terminal.

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
    build = start_build(device)
    gpt, tokenizer = open_model(model, device, adapter)
    report_tokenizer(tokenizer)
    context = gpt.config.context_length
    fast = make_fast(gpt, precision, lookup, build)
    del gpt  # on a CPU, `fast` has its own copy of the weights
    own = load_template(template) if template else find_model_files(model, adapter).template()
    asked_by = own or TRANSCRIPT
    conversation = Conversation(asked_by, asked_by.asks == "messages" if memory is None else memory, system)
    longest = min(200, context // 2) if max_new_tokens is None else max_new_tokens
    room = context - longest
    if room < 1:
        raise ValueError(f"max_new_tokens must be below the model's context of {context}, got {longest}")
    print(HELP, file=sys.stderr)
    while (question := ask()) is not None:
        if question == "/quit":
            return
        if question == "/reset":
            conversation.turns.clear()
        if question in ("/reset", "/help", ""):
            print({"/reset": "conversation cleared", "/help": HELP}.get(question, ""), file=sys.stderr)
            continue
        answer, n_turns = "", len(conversation.turns)
        try:
            ids = conversation.ids(question, tokenizer, room)
            if n_forgotten := n_turns - len(conversation.turns):
                print(f"(the context is full: dropped the oldest {n_forgotten} of {n_turns} turns)", file=sys.stderr)
            turn_seed = None if seed is None else seed + n_turns
            for text in stream_text(fast, tokenizer, ids, longest, sampling, conversation.stops(), turn_seed):
                answer += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # keep the part of the answer that was printed
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        print()
        conversation.turns.append((question, answer.rstrip()))


def ask() -> str | None:
    """Read and return the next line of the user, or None at the end of the input. In a terminal, print "> " first."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
