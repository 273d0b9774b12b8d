"""mygpt chat"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from MyGPT.config import Precision
from MyGPT.data.templates import Template
from MyGPT.sampling import SamplingConfig

if TYPE_CHECKING:
    from MyGPT.tokenizers import Tokenizer

DEFAULTS = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"
TRANSCRIPT = Template(
    without_input="User: {instruction}\nAssistant:",
    with_input="User: {instruction}\n{input}\nAssistant:",
    user="User: {content}\n",
    assistant="Assistant:{content}",
    turn_end="\n",
    asks="messages",
)
"""For a model that was not tuned: it continues a conversation as it would a story."""


@dataclass
class Conversation:
    """What was said, and how it is put to the model. Without `remembers` each question stands alone."""

    template: Template = TRANSCRIPT
    remembers: bool = True
    system: str = ""
    turns: list[tuple[str, str]] = field(default_factory=list)

    def stops(self) -> list[str]:
        """Texts at which an answer is over, since the model has begun to speak for the user."""
        before = self.template.user.partition("{content}")[0].strip()
        return [f"\n{before}"] if before else []

    def record(self, question: str) -> dict[str, Any]:
        """What the template makes the prompt of, of the kind that the model was tuned on."""
        if not self.remembers and self.template.asks == "prompt":
            return {"prompt": f"{self.system}\n\n{question}" if self.system else question}
        if not self.remembers and self.template.asks == "instruction":
            return {"instruction": question, "input": self.system}
        messages = [{"role": "system", "content": self.system}] if self.system else []
        for asked, answered in self.turns if self.remembers else []:
            messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
        return {"messages": [*messages, {"role": "user", "content": question}]}

    def ids(self, question: str, tokenizer: Tokenizer, room: int) -> list[int]:
        """The prompt's ids, at most `room`: the oldest turns are forgotten until it fits. A question too long is a ValueError."""
        from MyGPT.data.instructions import encode_prompt

        # What a template lets every answer begin with need not be left to the model.
        begun = self.template.response.partition("{output}")[0] if "instruction" in self.record(question) else ""
        while True:
            ids = encode_prompt(self.record(question), tokenizer, self.template) + tokenizer.encode(begun)
            if len(ids) <= room:
                return ids
            if not self.turns or not self.remembers:
                raise ValueError(f"that is {len(ids)} tokens long, beside an answer the model has room for {room}")
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
    """Talk with a model, answers appearing as they are made.

    A tuned model is asked by the template that was saved with it, in the form of the records it was tuned on. One that was
    not tuned, such as gpt2, continues the transcript of a conversation as it would a story. Example: mygpt chat --model gpt2

    Args:
        model: a released model (gpt2), a run's directory, a model's, or a checkpoint file
        adapter: an adapter's directory, or a run of mygpt finetune
        template: alpaca, book or a JSON file; default the model's own, or a plain transcript
        memory: show the model what was said before; default if it was tuned on conversations, or not at all
        system: a text before the conversation; of a model tuned on instructions, the input of each
        max_new_tokens: most tokens of an answer; default 200, or half the model's context if that is less
        seed: makes the conversation repeatable
        device: auto, cpu, cuda or mps
        precision: of the weights; auto is that in which they are stored, bf16 and int8 are faster and less exact
        lookup: guess from what stood after the same words before; faster where a text repeats itself, never another text
    """
    from MyGPT.commands._model import make_fast, start_build
    from MyGPT.data.templates import load_template

    build = start_build(device)
    from MyGPT.generation import stream_text  # after the build has started, because this imports torch
    from MyGPT.opening import find_model_files, open_model

    gpt, tokenizer = open_model(model, device, adapter)
    context = gpt.config.context_length
    fast = make_fast(gpt, precision, lookup, build)
    del gpt  # on a processor the fast one has weights of its own
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
            print({"/reset": "forgotten", "/help": HELP}.get(question, ""), file=sys.stderr)
            continue
        answer, n_turns = "", len(conversation.turns)
        try:
            ids = conversation.ids(question, tokenizer, room)
            n_forgotten = n_turns - len(conversation.turns)
            if n_forgotten:
                print(f"(no longer in the model's sight: the oldest {n_forgotten} of the turns)", file=sys.stderr)
            turn_seed = None if seed is None else seed + n_turns
            for text in stream_text(fast, tokenizer, ids, longest, sampling, conversation.stops(), turn_seed):
                answer += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # what there is of the answer stays
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        print()
        conversation.turns.append((question, answer.rstrip()))


def ask() -> str | None:
    """The user's next line, None at its end; without a terminal no prompt is shown."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
