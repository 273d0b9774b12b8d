"""Answers to requests that generate texts: complete, or as the chunks of a stream, in OpenAI's formats."""

from __future__ import annotations

import asyncio
import contextlib
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import AsyncGenerator, Sequence
from typing import Any, ClassVar

from MyGPT.serving.choices import ChoiceText, Piece, best_choices, chat_logprobs, completion_logprobs, generated
from MyGPT.serving.models import ServedModel
from MyGPT.serving.request import Request, Token
from MyGPT.serving.responses import (
    AssistantMessage,
    CachedTokens,
    ChatChoice,
    ChatChunk,
    ChatChunkChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    Delta,
    FinishReason,
    Logprobs,
    ResponseModel,
    Usage,
)
from MyGPT.serving.schema import ChatRequest, CompletionRequest, GenerationRequest
from MyGPT.serving.wire import require_finished


class GeneratedAnswer(ABC):
    """The answer to a client's HTTP request, made from one or several requests of the engine.

    Args:
        served: the model.
        requests: the engine's requests, in the order of the prompts, with n_per_prompt requests for each prompt.
        body: the fields of the client's request.
        n_per_prompt: number of texts that are generated for each prompt.
    """

    prefix: ClassVar[str]
    """The beginning of the answer's id."""
    chunk: ClassVar[type[Completion] | type[ChatChunk]]
    """The class of a stream's chunks."""

    def __init__(
        self, served: ServedModel, requests: list[Request], body: GenerationRequest, n_per_prompt: int
    ) -> None:
        self.served, self.requests, self.n_per_prompt = served, requests, n_per_prompt
        self.n, self.include_usage = body.n, body.include_usage
        self.head: dict[str, Any] = {
            "id": f"{self.prefix}-{secrets.token_hex(12)}",
            "created": int(time.time()),
            "model": served.name,
            "system_fingerprint": served.fingerprint,
        }

    @abstractmethod
    def whole(self) -> ResponseModel:
        """Return the answer after all requests have ended."""

    @abstractmethod
    def text(self, request: Request) -> ChoiceText:
        """Return an empty ChoiceText, which the tokens of a choice can be added to."""

    @abstractmethod
    def opening(self, index: int) -> list[Any]:
        """Return the objects that the stream sends about a choice before its first token."""

    @abstractmethod
    def part(self, index: int, piece: Piece) -> Any:
        """Return the object that the stream sends for a piece of a choice."""

    @abstractmethod
    def closing(self, index: int, piece: Piece, reason: FinishReason) -> list[Any]:
        """Return the objects that the stream sends for the last piece of a choice and for the reason why it ended."""

    async def events(self) -> AsyncGenerator[str]:
        """Yield the chunks of the stream as JSON, and then [DONE]. Choices are generated at the same time and alternate."""
        head: dict[str, Any] = {"object": self.chunk.model_fields["object"].default, **self.head}
        usage: dict[str, Any] = {"usage": None} if self.include_usage else {}
        texts = [self.text(request) for request in self.requests]

        def chunk(choice: Any) -> str:
            return self.chunk(choices=[choice], **usage, **head).as_json()

        for index in range(len(texts)):
            for choice in self.opening(index):
                yield chunk(choice)
        async with contextlib.aclosing(interleaved(self.requests)) as tokens:
            async for index, token in tokens:
                if token is not None:
                    piece = texts[index].add(token)
                    choices = [self.part(index, piece)] if piece.text or piece.tokens else []
                else:
                    require_finished(self.requests[index])
                    choices = self.closing(index, texts[index].end(), reason_of(self.requests[index]))
                for choice in choices:
                    yield chunk(choice)
        if self.include_usage:
            yield self.chunk(choices=[], usage=self.usage(), **head).as_json()
        yield "[DONE]"

    def shown(self) -> list[Request]:
        """Return the requests that become choices: the n best ones of each prompt."""
        n = self.n_per_prompt
        groups = (self.requests[i : i + n] for i in range(0, len(self.requests), n))
        return [request for group in groups for request in (group if n == self.n else best_choices(group, self.n))]

    def usage(self) -> Usage:
        """Return the token counts of the answer."""
        first_of_prompt = self.requests[:: self.n_per_prompt]
        n_prompt = sum(len(request.prompt_ids) for request in first_of_prompt)
        n_new = sum(len(generated(request)) for request in self.requests)
        return Usage(
            prompt_tokens=n_prompt,
            completion_tokens=n_new,
            total_tokens=n_prompt + n_new,
            prompt_tokens_details=CachedTokens(cached_tokens=sum(request.n_reused for request in first_of_prompt)),
        )


class CompletionAnswer(GeneratedAnswer):
    """The answer of /v1/completions."""

    prefix, chunk = "cmpl", Completion

    def __init__(self, served: ServedModel, requests: list[Request], body: CompletionRequest) -> None:
        super().__init__(served, requests, body, body.n_texts)
        self.echo, self.has_logprobs = body.echo, body.logprobs is not None

    def whole(self) -> Completion:
        choices = [
            self._choice(index, self.text(request).whole(), reason_of(request))
            for index, request in enumerate(self.shown())
        ]
        return Completion(object="text_completion", choices=choices, usage=self.usage(), **self.head)

    def text(self, request: Request) -> ChoiceText:
        return ChoiceText(request, self.echo, keep_end=True)

    def opening(self, index: int) -> list[CompletionChoice]:
        return []

    def part(self, index: int, piece: Piece) -> CompletionChoice:
        return self._choice(index, piece, None)

    def closing(self, index: int, piece: Piece, reason: FinishReason) -> list[CompletionChoice]:
        return [self._choice(index, piece, reason)]

    def _choice(self, index: int, piece: Piece, reason: FinishReason | None) -> CompletionChoice:
        logprobs: Logprobs | None = None
        if self.has_logprobs:
            logprobs = completion_logprobs(self.served.tokenizer, piece.tokens)
        return CompletionChoice(text=piece.text, index=index, logprobs=logprobs, finish_reason=reason)


class ChatAnswer(GeneratedAnswer):
    """The answer of /v1/chat/completions."""

    prefix, chunk = "chatcmpl", ChatChunk

    def __init__(self, served: ServedModel, requests: list[Request], body: ChatRequest) -> None:
        super().__init__(served, requests, body, body.n)
        self.has_logprobs = body.logprobs

    def whole(self) -> ChatCompletion:
        choices = []
        for index, request in enumerate(self.requests):
            piece = self.text(request).whole()
            message = AssistantMessage(role="assistant", content=piece.text, refusal=None)
            logprobs, reason = self._logprobs(piece), reason_of(request)
            choices.append(ChatChoice(index=index, message=message, logprobs=logprobs, finish_reason=reason))
        return ChatCompletion(object="chat.completion", choices=choices, usage=self.usage(), **self.head)

    def text(self, request: Request) -> ChoiceText:
        return ChoiceText(request)

    def opening(self, index: int) -> list[ChatChunkChoice]:
        delta = Delta(role="assistant", content="", refusal=None)
        return [ChatChunkChoice(index=index, delta=delta, logprobs=None, finish_reason=None)]

    def part(self, index: int, piece: Piece) -> ChatChunkChoice:
        delta, logprobs = Delta(content=piece.text), self._logprobs(piece)
        return ChatChunkChoice(index=index, delta=delta, logprobs=logprobs, finish_reason=None)

    def closing(self, index: int, piece: Piece, reason: FinishReason) -> list[ChatChunkChoice]:
        end = ChatChunkChoice(index=index, delta=Delta(), logprobs=None, finish_reason=reason)
        return [self.part(index, piece), end] if piece.text or piece.tokens else [end]

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        return chat_logprobs(self.served.tokenizer, piece.tokens) if self.has_logprobs else None


def reason_of(request: Request) -> FinishReason:
    """Return why a text ended. Call `require_finished` first, which checks that the text is complete."""
    return "length" if request.finish_reason == "length" else "stop"


async def interleaved(requests: Sequence[Request]) -> AsyncGenerator[tuple[int, Token | None]]:
    """Yield pairs (index of a request, new token) as the tokens come, and (index, None) when a request ends.

    Raises the error of a request if the model failed.
    """
    queue: asyncio.Queue[tuple[int, Token | Exception | None]] = asyncio.Queue()

    async def read(index: int, request: Request) -> None:
        try:
            async for token in request:
                queue.put_nowait((index, token))
            queue.put_nowait((index, None))
        except Exception as error:
            queue.put_nowait((index, error))

    readers = [asyncio.create_task(read(index, request)) for index, request in enumerate(requests)]
    n_left = len(requests)
    try:
        while n_left:
            index, token = await queue.get()
            if isinstance(token, Exception):
                raise token
            n_left -= token is None
            yield index, token
    finally:
        for reader in readers:
            reader.cancel()
