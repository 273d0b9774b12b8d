"""Functions that turn requests of the HTTP API into requests of the engine, and new tokens into text with log-probabilities.

No function here waits for the engine or reads HTTP requests; api.py does both.
"""

from __future__ import annotations

import codecs
import math
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from MyGPT.data.instructions import encode_question
from MyGPT.data.templates import Template
from MyGPT.generation import TextStream
from MyGPT.messages import error_message
from MyGPT.sampling import SamplingConfig
from MyGPT.serving.models import ServedModel
from MyGPT.serving.request import Request, Token
from MyGPT.serving.responses import ChatLogprobs, Logprobs, TokenLogprob, TopLogprob
from MyGPT.serving.schema import ChatRequest, CompletionRequest, GenerationRequest, Message
from MyGPT.serving.wire import APIError

DEFAULT_MAX_TOKENS = 16
"""Maximum number of new tokens of a text completion without max_tokens."""
SMALLEST_LOGPROB = -9999.0
"""Lower log-probabilities, such as minus infinity, are reported as this number. OpenAI does the same."""

# ---- requests


def completion_submissions(
    body: CompletionRequest, prompts: Sequence[list[int]], served: ServedModel
) -> list[dict[str, Any]]:
    """Return the arguments of `Engine.submit` for each text to generate: `body.n_texts` texts per prompt, in order."""
    logprobs = body.logprobs
    if body.n_texts > body.n and logprobs is None:
        logprobs = 0  # to find the best
    common = _common(body, served, logprobs) | {"prompt_logprobs": body.echo and body.logprobs is not None}
    for ids in prompts:
        _require_room(ids, served, body.max_tokens, "prompt")
    longest = DEFAULT_MAX_TOKENS if body.max_tokens is None else body.max_tokens
    return _seeded(body, [{"prompt": ids, "max_new_tokens": longest, **common} for ids in prompts], body.n_texts)


def chat_submissions(body: ChatRequest, ids: list[int], served: ServedModel) -> list[dict[str, Any]]:
    """Return the arguments of `Engine.submit` for each of the n answers to a conversation whose prompt has these ids."""
    longest = body.max_tokens if body.max_completion_tokens is None else body.max_completion_tokens
    _require_room(ids, served, longest, "messages")
    common = _common(body, served, (body.top_logprobs or 0) if body.logprobs else None)
    common["stop"] = [*body.stops, *template_of(served).stops()] or None
    return _seeded(body, [{"prompt": ids, "max_new_tokens": longest, **common}], body.n)


def chat_prompt(messages: Sequence[Message], served: ServedModel) -> list[int]:
    """Return the token ids of a conversation as a prompt for the next message. `mygpt chat` makes the same prompt."""
    template = template_of(served)
    try:
        return encode_question(
            template.conversation([message.as_record() for message in messages]), served.tokenizer, template
        )
    except ValueError as error:  # the tokenizer does not know a character
        raise APIError(400, error_message(error), "messages", "invalid_value") from None


def template_of(served: ServedModel) -> Template:
    """Return the model's chat template. Raises APIError if it has none."""
    if served.template is None:
        message = (
            f"the model {served.name} has no chat template: use /v1/completions, or fine-tune it with mygpt finetune"
        )
        raise APIError(400, message, "model", "model_has_no_template")
    return served.template


def require_few_texts(n_prompts: int, n_texts: int, largest: int) -> None:
    """Raise APIError if a request asks for more than `largest` texts: n_texts for each of n_prompts prompts."""
    n = n_prompts * n_texts
    if n > largest:
        message = f"the request asks for {n} texts ({n_texts} per prompt), but at most {largest} are allowed"
        raise APIError(400, message, "prompt" if n_prompts > 1 else "n", "too_many_texts")


def require_ids(ids: Iterable[int], served: ServedModel, param: str) -> None:
    """Raise APIError if an id is outside the model's vocabulary."""
    size = served.gpt.config.vocab_size
    for id_ in ids:
        if not 0 <= id_ < size:
            message = f"{param} has the token id {id_}, but the ids of {served.name} are 0 to {size - 1}"
            raise APIError(400, message, param, "invalid_value")


def _common(body: GenerationRequest, served: ServedModel, logprobs: int | None) -> dict[str, Any]:
    """Return the arguments of `Engine.submit` that all texts of a request share."""
    biases = {int(id_): value for id_, value in body.logit_bias.items()}
    require_ids(biases, served, "logit_bias")
    options: dict[str, Any] = {"eos_id": None} if body.ignore_eos else {}
    return {
        "sampling": SamplingConfig(
            temperature=body.temperature,
            top_k=body.top_k if body.top_k > 0 else None,
            # 0 means only the most likely token. SamplingConfig does not allow 0, so a tiny number stands for it.
            top_p=None if body.top_p == 1 else max(body.top_p, 1e-9),
            min_p=body.min_p or None,
            repetition_penalty=None if body.repetition_penalty == 1 else body.repetition_penalty,
        ),
        "stop": body.stops or None,
        "logprobs": logprobs,
        "logit_bias": biases,
        **options,
    }


def _require_room(ids: list[int], served: ServedModel, max_tokens: int | None, param: str) -> None:
    """Raise APIError if a prompt, or a prompt with max_tokens new tokens, does not fit into the model's context."""
    context = served.engine.context
    room = context - len(ids) + 1  # the last new token need not be in the context
    if room < 1:
        message = f"{param} has {len(ids)} tokens, but the model's context is {context}: shorten the text"
    elif max_tokens is not None and max_tokens > room:
        message = (
            f"{param} takes {len(ids)} of the {context} tokens of the model's context, "
            f"so at most {room} can follow, but {max_tokens} were asked for"
        )
    else:
        return
    raise APIError(400, message, param, "context_length_exceeded")


def _seeded(body: GenerationRequest, submissions: list[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Return n copies of each submission. Copy i, counted over all prompts, has the request's seed plus i, as in `generate`."""
    copies = [submission for submission in submissions for _ in range(n)]
    return [{**copy, "seed": None if body.seed is None else body.seed + i} for i, copy in enumerate(copies)]


# ---- text and tokens


class Piece(NamedTuple):
    """New text of a choice, and the tokens that begin in it, as pairs (offset in the text of prompt and answer, token)."""

    text: str
    tokens: list[tuple[int, Token]] = []  # noqa: RUF012 (nothing appends to it)


class ChoiceText:
    """The text of an engine's request, cut into the pieces that a client receives.

    Each piece has the tokens that begin in its text. A stop text is left out, and so are the tokens that begin in it.

    Args:
        request: the engine's request.
        echo: begin with the prompt.
        keep_end: return the end-of-text token as the last token, although its text is left out.
    """

    def __init__(self, request: Request, echo: bool = False, keep_end: bool = False) -> None:
        self.request = request
        self._keep_end = keep_end
        self._text = TextStream(request.tokenizer, request.prompt_ids, request.stop_texts)
        self._n_echoed = 0 if echo else len(self._text.prompt)
        self._places = TokenPlaces(request.tokenizer)
        self._has_tokens = request.logprobs is not None
        places = [self._places.add(id_) for id_ in request.prompt_ids] if self._has_tokens else []
        self._prompt_places = places if echo else []
        self._held: list[tuple[int, Token]] = []

    def add(self, token: Token) -> Piece:
        """Add a token, and return the text and the tokens that can be sent now. The piece may be empty."""
        self._hold([token])
        return self._piece(self._text.add(token.id))

    def end(self, tokens: Sequence[Token] = ()) -> Piece:
        """Add the last tokens of a request that has ended, and return the rest of its text."""
        self._hold(tokens)
        self._text.ids += [token.id for token in tokens]
        piece = self._piece(self._text.end())
        end = self.request.end_token
        if self.request.finish_reason == "stop" and end is None:  # a stop text has cut off the rest
            return piece
        self._hold([end] if end is not None and self._keep_end else [])
        return Piece(piece.text, [*piece.tokens, *self._held])

    def whole(self) -> Piece:
        """Return the text of a request that has ended, in one piece."""
        return self.end(self.request.tokens)

    def _hold(self, tokens: Sequence[Token]) -> None:
        if self._has_tokens:
            self._held += [(self._places.add(token.id), token) for token in tokens]

    def _piece(self, text: str) -> Piece:
        """Return a piece: the rest of the prompt if it is echoed, the new text, and the held tokens that begin in it."""
        stream = self._text
        is_last = self.request.finished is not None
        # New tokens can complete the last character of the prompt.
        n = stream.start if text or is_last else len(stream.prompt.rstrip("\ufffd"))
        echoed = stream.prompt[self._n_echoed : n]
        self._n_echoed = max(self._n_echoed, n)
        prompt_tokens = list(zip(self._prompt_places, self.request.prompt_tokens, strict=False))
        self._prompt_places = []
        end = stream.start + stream.shown if stream.shown else 0
        n = next((i for i, (place, _) in enumerate(self._held) if place >= end), len(self._held))
        ready, self._held = self._held[:n], self._held[n:]
        return Piece(echoed + text, [*prompt_tokens, *ready])


class TokenPlaces:
    """The offsets at which tokens begin in the text of all tokens so far, in characters.

    A token that continues a character has the offset of that character.
    """

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")("replace")
        self._last: list[int] = []
        self._n = 0

    def add(self, id_: int) -> int:
        """Add a token, and return its offset."""
        place = self._n
        if hasattr(self._tokenizer, "decode_tokens_bytes"):
            raw = self._tokenizer.decode_tokens_bytes([id_])[0]
            incomplete = self._decoder.getstate()[0]
            first = self._decoder.decode(raw[:1])
            if incomplete and first.startswith("\ufffd") and incomplete + raw[:1] != "\ufffd".encode():
                place += 1  # the token does not complete the character before it, which therefore became U+FFFD
            self._n += len(first) + len(self._decoder.decode(raw[1:]))
        elif self._tokenizer.decode([id_]):
            # Some tokenizers put spaces between tokens, so the text of a token depends on the token before it.
            self._n += len(self._tokenizer.decode([*self._last, id_])) - len(self._tokenizer.decode(self._last))
            self._last = [id_]
        return place


def token_bytes(tokenizer: Any, id_: int) -> bytes:
    """Return the bytes of a token alone."""
    if hasattr(tokenizer, "decode_tokens_bytes"):
        return bytes(tokenizer.decode_tokens_bytes([id_])[0])
    return str(tokenizer.decode([id_])).encode()


def token_text(tokenizer: Any, id_: int) -> str:
    """Return the text of a token, with escapes such as \\xe2 for incomplete characters, as in chat completions."""
    return token_bytes(tokenizer, id_).decode(errors="backslashreplace")


def legacy_token_text(tokenizer: Any, id_: int) -> str:
    """Return the text of a token as in text completions: "bytes:\\xe2\\x96" if its bytes are not whole characters."""
    try:
        return token_bytes(tokenizer, id_).decode()
    except UnicodeDecodeError:
        return f"bytes:{token_text(tokenizer, id_)}"


def completion_logprobs(tokenizer: Any, tokens: Sequence[tuple[int, Token]]) -> Logprobs:
    """Return tokens with their offsets in the format of text completions."""
    tops: list[dict[str, float] | None] = []
    for _, token in tokens:
        if token.logprob is None:  # the first token of a prompt
            tops.append(None)
            continue
        top: dict[str, float] = {}
        for id_, logprob in [*_possible(token.top), (token.id, token.logprob)]:
            top.setdefault(legacy_token_text(tokenizer, id_), _bounded(logprob))
        tops.append(top)
    return Logprobs(
        tokens=[legacy_token_text(tokenizer, token.id) for _, token in tokens],
        token_logprobs=[None if token.logprob is None else _bounded(token.logprob) for _, token in tokens],
        top_logprobs=tops,
        text_offset=[place for place, _ in tokens],
    )


def chat_logprobs(tokenizer: Any, tokens: Sequence[tuple[int, Token]]) -> ChatLogprobs:
    """Return tokens in the format of chat completions, which has no offsets."""

    def fields(id_: int, logprob: float | None) -> dict[str, Any]:
        raw = list(token_bytes(tokenizer, id_))
        return {"token": token_text(tokenizer, id_), "logprob": _bounded(logprob or 0.0), "bytes": raw}

    return ChatLogprobs(
        content=[
            TokenLogprob(
                **fields(token.id, token.logprob),
                top_logprobs=[TopLogprob(**fields(*pair)) for pair in _possible(token.top)],
            )
            for _, token in tokens
        ],
        refusal=None,
    )


def best_choices(requests: Sequence[Request], n: int) -> list[Request]:
    """Return the n requests with the highest mean log-probability per generated token, the best first."""

    def mean(request: Request) -> float:
        logprobs = [token.logprob or 0.0 for token in generated(request)]
        return sum(logprobs) / len(logprobs) if logprobs else -math.inf

    return sorted(requests, key=mean, reverse=True)[:n]


def generated(request: Request) -> list[Token]:
    """Return all tokens that were generated, including the end-of-text token."""
    return [*request.tokens, *([] if request.end_token is None else [request.end_token])]


def _possible(top: Iterable[tuple[int, float]]) -> list[tuple[int, float]]:
    """Return the alternatives whose probability is not 0. Ids without a token have probability 0."""
    return [pair for pair in top if pair[1] > -math.inf]


def _bounded(logprob: float) -> float:
    return max(logprob, SMALLEST_LOGPROB)
