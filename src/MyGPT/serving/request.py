"""A request to an `Engine`: its options, the new tokens so far, and iterators that wait for more tokens.

The engine's thread appends tokens. Any other thread, or any coroutine of any event loop, can read them.
"""

from __future__ import annotations

import asyncio
import contextlib
import threading
import time
from collections.abc import AsyncIterator, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

from MyGPT.generation import Stop, TextStream
from MyGPT.sampling import SamplingConfig

FinishReason = Literal["stop", "length", "cancelled", "timeout"]
"""Why a request ended: an end-of-text token or a stop, the maximum length, `Request.cancel`, or its timeout."""


class QueueFull(RuntimeError):
    """Raised by `Engine.submit` if too many requests are waiting already."""


class EngineClosed(RuntimeError):
    """Raised by `Engine.submit` after `Engine.close`."""


class Token(NamedTuple):
    """A token, its log-probability, and the most likely tokens at its position.

    Log-probabilities are natural logarithms of the model's own probabilities, before the sampling options change them.
    They are None if the request did not ask for them, and for the first token of a prompt.
    """

    id: int
    logprob: float | None = None
    top: list[tuple[int, float]] = []  # noqa: RUF012 (nothing appends to it)
    """The most likely tokens at this position as pairs (id, log-probability), the most likely first."""


@dataclass(eq=False)
class Request:
    """A prompt and its continuation. Iterate over the request, with `for` or `async for`, to get the tokens as they come.

    If the model fails, the iteration raises the error.
    """

    prompt_ids: list[int]
    sampling: SamplingConfig
    max_new_tokens: int
    seed: int
    """The seed of the random numbers: the seed that was given, or else a random one."""
    end_ids: list[int]
    """The tokens that end the request. They are not among its tokens."""
    stop: Sequence[Stop] = ()
    """Texts and sequences of ids that end the request. Their tokens are among its tokens."""
    logprobs: int | None = 0
    """Number of alternatives of each token, or None for tokens without log-probabilities."""
    prompt_logprobs: bool = False
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    slide: bool = False
    deadline: float | None = None
    """The value of time.monotonic() at which the request ends with the reason "timeout"."""
    tokenizer: Any = None
    tokens: list[Token] = field(default_factory=list)
    """The new tokens so far."""
    end_token: Token | None = None
    """The end-of-text token that ended the request, which is not among its tokens. None if another reason ended it."""
    prompt_tokens: list[Token] = field(default_factory=list)
    """The tokens of the prompt with their log-probabilities, if `prompt_logprobs` is true."""
    n_reused: int = 0
    """Number of prompt tokens whose keys and values were already in the cache."""
    finish_reason: FinishReason | None = None
    """Why the request ended. None while it runs, and after an error."""
    error: BaseException | None = None
    submitted: float = field(default_factory=time.monotonic)
    first_token: float | None = None
    """The value of time.monotonic() when the first new token was generated. `submitted` and `finished` are such times too."""
    finished: float | None = None
    is_cancelled: bool = False

    def __post_init__(self) -> None:
        self._changed = threading.Condition()
        self._waiting: list[tuple[asyncio.AbstractEventLoop, asyncio.Future[None]]] = []

    def cancel(self) -> None:
        """End the request before the engine's next step. This has no effect on a request that has already ended."""
        self.is_cancelled = True

    def __iter__(self) -> Iterator[Token]:
        """Yield the new tokens from the first on, and wait for each."""
        n = 0
        while True:
            with self._changed:
                self._changed.wait_for(lambda: len(self.tokens) > n or self.finished is not None)
            yield from self.tokens[n : (n := len(self.tokens))]
            if self.finished is not None and n == len(self.tokens):
                break
        if self.error is not None:
            raise self.error

    async def __aiter__(self) -> AsyncIterator[Token]:
        """Yield the new tokens from the first on, and await each."""
        n = 0
        while True:
            await self._change(n)
            for token in self.tokens[n : (n := len(self.tokens))]:
                yield token
            if self.finished is not None and n == len(self.tokens):
                break
        if self.error is not None:
            raise self.error

    def text(self) -> str:
        """Wait until the request has ended, and return the new text up to the first stop text."""
        return "".join(self.texts())

    def texts(self) -> Iterator[str]:
        """Yield the new text in pieces as it comes, up to the first stop text. This needs a tokenizer."""
        stream = TextStream(self.tokenizer, self.prompt_ids, self.stop_texts)
        for token in self:
            yield stream.add(token.id)
        yield stream.end()

    @property
    def stop_texts(self) -> list[str]:
        """The texts among the stops."""
        return [stop for stop in self.stop if isinstance(stop, str)]

    async def wait(self) -> None:
        """Wait until the request has ended. Raises the error if the model failed."""
        async for _ in self:
            pass

    async def _change(self, n: int) -> None:
        """Wait until there are more than n tokens, or until the request has ended."""
        while True:
            loop = asyncio.get_running_loop()
            with self._changed:
                if len(self.tokens) > n or self.finished is not None:
                    return
                future: asyncio.Future[None] = loop.create_future()
                self._waiting.append((loop, future))
            await future

    def add(self, token: Token) -> None:
        """Append a new token. Only the engine calls this method."""
        with self._changed:
            if not self.tokens:
                self.first_token = time.monotonic()
            self.tokens.append(token)
            self._wake()

    def end(self, reason: FinishReason | None = None, error: BaseException | None = None) -> None:
        """End the request with a reason or with an error. Only the engine calls this method."""
        with self._changed:
            self.finish_reason, self.error, self.finished = reason, error, time.monotonic()
            self._wake()

    def _wake(self) -> None:
        """Wake every thread and every coroutine that waits for this request."""
        self._changed.notify_all()
        for loop, future in self._waiting:
            with contextlib.suppress(RuntimeError):  # the event loop was closed, so nobody waits any more
                loop.call_soon_threadsafe(_resolve, future)
        self._waiting.clear()


def _resolve(future: asyncio.Future[None]) -> None:
    if not future.done():  # its coroutine may have been cancelled
        future.set_result(None)
