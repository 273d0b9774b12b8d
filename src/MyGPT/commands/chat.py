"""mygpt chat"""

from __future__ import annotations

import sys
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from MyGPT.sampling import SamplingConfig

if TYPE_CHECKING:
    from MyGPT.tokenizers import Tokenizer

DEFAULTS = {"temperature": 0.7, "top_p": 0.9, "repetition_penalty": 1.1}
HELP = "/reset forgets the conversation, /quit or Ctrl-D ends it, Ctrl-C stops an answer"


@dataclass
class Conversation:
    """What was said, as the text that a language model continues with its next answer."""

    system: str = ""
    user: str = "User"
    assistant: str = "Assistant"
    turns: list[tuple[str, str]] = field(default_factory=list)

    def stops(self) -> list[str]:
        """Texts at which an answer is over: the model has begun to speak for the user."""
        return [f"\n{self.user}:"]

    def prompt(self, question: str) -> str:
        """The conversation up to where the answer begins."""
        said = "".join(f"{self.user}: {asked}\n{self.assistant}: {answered}\n" for asked, answered in self.turns)
        return f"{self.system}\n\n" * bool(self.system) + f"{said}{self.user}: {question}\n{self.assistant}:"

    def ids(self, question: str, tokenizer: Tokenizer, room: int) -> list[int]:
        """The prompt's ids, at most `room`: the oldest turns are forgotten until it fits. A question too long is a ValueError."""
        while len(ids := tokenizer.encode(self.prompt(question))) > room:
            if not self.turns:
                raise ValueError(f"that is {len(ids)} tokens long, the model has room for {room}")
            del self.turns[0]
        return ids


def chat(
    model: str,
    sampling: SamplingConfig,
    system: str = "",
    max_new_tokens: int = 200,
    seed: int | None = None,
    device: str = "auto",
) -> None:
    """Talk with a model, answers appearing as they are made.

    A model that was not trained on conversations, such as gpt2, continues the transcript as a story would.
    Example: mygpt chat --model gpt2

    Args:
        model: a released model (gpt2), a run's directory, a model's, or a checkpoint file
        system: a text before the conversation
        max_new_tokens: most tokens of an answer
        seed: makes the conversation repeatable
        device: auto, cpu, cuda or mps
    """
    from MyGPT.commands._model import open_model, stream_text

    gpt, tokenizer, _ = open_model(model, device)
    room = gpt.config.context_length - max_new_tokens
    if room < 1:
        raise ValueError(f"max_new_tokens must be below the model's context of {gpt.config.context_length}")
    conversation = Conversation(system)
    print(HELP, file=sys.stderr)
    while (question := ask()) is not None:
        if question in ("/quit", "/reset", "/help", ""):
            if question == "/quit":
                return
            if question == "/reset":
                conversation.turns.clear()
            print({"/reset": "forgotten", "/help": HELP}.get(question, ""), file=sys.stderr)
            continue
        answer = ""
        n_turns = len(conversation.turns)
        try:
            ids = conversation.ids(question, tokenizer, room)
            if len(conversation.turns) < n_turns:
                print(
                    f"(the first {n_turns - len(conversation.turns)} turns no longer fit and are forgotten)",
                    file=sys.stderr,
                )
            turn_seed = None if seed is None else seed + n_turns
            for text in stream_text(gpt, tokenizer, ids, max_new_tokens, sampling, conversation.stops(), turn_seed):
                answer += text
                print(text, end="", flush=True)
        except KeyboardInterrupt:
            pass  # what there is of the answer stays
        except ValueError as error:
            print(error, file=sys.stderr)
            continue
        print()
        conversation.turns.append((question, answer.strip()))


def ask() -> str | None:
    """The user's next line, None at its end; without a terminal no prompt is shown."""
    try:
        return input("> " if sys.stdin.isatty() else "").strip()
    except EOFError:
        return None
