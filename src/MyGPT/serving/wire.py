"""Helpers for all HTTP handlers: reading JSON, errors in OpenAI's format, submitting requests, and streams of events."""

from __future__ import annotations

import asyncio
import contextlib
import json
import logging
import secrets
from collections.abc import AsyncGenerator, Awaitable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, StreamingResponse
from starlette.types import Send

from MyGPT.messages import error_message, printable
from MyGPT.sampling import SamplingConfig
from MyGPT.serving.models import ServedModel, Settings
from MyGPT.serving.request import EngineClosed, QueueFull, Request

T = TypeVar("T")
logger = logging.getLogger("MyGPT.serving")

RETRY_AFTER = {"Retry-After": "1"}
"""The header that asks a client to wait a second before it tries again."""
MAX_CHARACTERS_IN_LOOP = 10_000
"""Longest text that is encoded in the event loop itself. Longer texts use another thread, so that other clients need not wait."""


class APIError(Exception):
    """An error that is sent to the client in OpenAI's format.

    Args:
        status: the HTTP status.
        message: one sentence: what was wrong, the value, and what is allowed.
        param: the field of the request that was wrong.
        code: a short name of the error for programs, such as "model_not_found".
        type: OpenAI's kind of error.
        headers: headers of the response.
    """

    def __init__(
        self,
        status: int,
        message: str,
        param: str | None = None,
        code: str | None = None,
        type: str = "invalid_request_error",
        headers: Mapping[str, str] | None = None,
    ) -> None:
        super().__init__(message)
        self.status, self.message, self.param, self.code, self.type = status, message, param, code, type
        self.headers = dict(headers or {})

    def content(self) -> dict[str, Any]:
        """Return the JSON object that describes the error."""
        # A value that the message quotes may have lone surrogates, which cannot be encoded.
        message, param = printable(self.message), self.param and printable(self.param)
        return {"error": {"message": message, "type": self.type, "param": param, "code": self.code}}


@dataclass
class Exchange:
    """The facts about one HTTP request that the log and the metrics record."""

    model: str | None = None
    """The name of the model that answers."""
    id: str = field(default_factory=lambda: secrets.token_hex(8))
    """A random id of the request, which the client receives in the header X-Request-ID."""
    generations: list[Request] = field(default_factory=list)
    """The engine's requests. All of them are cancelled when the HTTP request ends."""
    error: APIError | None = None
    """An internal error, or the error that ended a stream of events after its status was sent."""

    def n_prompt_tokens(self) -> int:
        """Return the number of tokens of the prompts. Equal prompts count once."""
        return sum(map(len, {tuple(generation.prompt_ids) for generation in self.generations}))

    def n_new_tokens(self) -> int:
        """Return the number of new tokens of all texts."""
        return sum(len(generation.tokens) for generation in self.generations)

    def first_token(self) -> float | None:
        """Return the value of time.monotonic() when the first new token was generated, or None."""
        return min((g.first_token for g in self.generations if g.first_token is not None), default=None)


def exchange_of(request: HTTPRequest) -> Exchange:
    """Return the record of an HTTP request."""
    exchange: Exchange = request.scope.setdefault("MyGPT.exchange", Exchange())
    return exchange


def settings_of(request: HTTPRequest) -> Settings:
    """Return the settings of the server that received the request."""
    settings: Settings = request.app.state.settings
    return settings


def error_response(error: APIError) -> JSONResponse:
    """Return the response that reports an error in OpenAI's format."""
    return JSONResponse(error.content(), error.status, error.headers)


def internal_error(error: BaseException, exchange: Exchange) -> APIError:
    """Log the traceback of an unexpected error with the request's id, and return an error that names this id."""
    logger.error("internal error id=%s", exchange.id, exc_info=error)
    message = f"the server failed to answer; its log describes the error under the id {exchange.id}"
    return APIError(500, message, code="internal_error", type="server_error")


async def read_json(request: HTTPRequest) -> dict[str, Any]:
    """Return the JSON object in the body of a request.

    Raises APIError if the body is too large, is not complete in time, or is not a JSON object, and ClientDisconnect if the
    client leaves. A body that is too large is not read to its end.
    """
    settings = settings_of(request)
    too_large = APIError(413, f"the body must have at most {settings.max_body_bytes:,} bytes", code="request_too_large")
    length = request.headers.get("content-length", "")
    if length.isdecimal() and int(length) > settings.max_body_bytes:
        raise too_large
    body = bytearray()
    try:
        async with asyncio.timeout(settings.body_timeout), contextlib.aclosing(request.stream()) as chunks:
            async for chunk in chunks:
                body += chunk
                if len(body) > settings.max_body_bytes:
                    raise too_large
    except TimeoutError:
        message = f"the body was not complete within {settings.body_timeout:g} seconds"
        raise APIError(408, message, code="request_timeout", headers={"Connection": "close"}) from None
    try:
        value = json.loads(body, parse_constant=_refuse_constant)
        if b"\\ud" in body.lower():  # a lone surrogate is no character, so no tokenizer can encode it
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise APIError(400, "the body is not usable JSON: it is nested too deeply", code="invalid_json") from None
    except ValueError as error:
        raise APIError(400, f"the body is not valid JSON: {error_message(error)}", code="invalid_json") from None
    if not isinstance(value, dict):
        raise APIError(400, f"the body must be a JSON object, got {type(value).__name__}", code="invalid_json")
    return value


def find_model(request: HTTPRequest, name: str | None = None) -> ServedModel:
    """Return the model with this name, or the first model for None. Raises APIError for an unknown name."""
    models: dict[str, ServedModel] = request.app.state.models
    name = next(iter(models)) if name is None else name
    if name not in models:
        message = f"there is no model {name!r:.200}; the models are {', '.join(models)}"
        raise APIError(404, message, "model", "model_not_found")
    exchange_of(request).model = name
    return models[name]


async def encode(served: ServedModel, text: str) -> list[int]:
    """Return the token ids of a text. Raises APIError if it has characters that the tokenizer does not know."""
    try:
        if len(text) > MAX_CHARACTERS_IN_LOOP:
            return await asyncio.to_thread(served.tokenizer.encode, text)
        return served.tokenizer.encode(text)
    except ValueError as error:
        raise APIError(400, error_message(error)) from None


async def submit(
    request: HTTPRequest,
    served: ServedModel,
    prompt: str | Sequence[int],
    sampling: SamplingConfig | None = None,
    max_new_tokens: int | None = None,
    **options: Any,
) -> Request:
    """Submit a request to the engine of a model, with the arguments of `Engine.submit`, and return it.

    The engine's request has the server's timeout, and is cancelled when the HTTP request ends. Raises APIError with status 400
    for a wrong argument, 429 if the queue is full, and 503 if the server is stopping.
    """
    ids = await encode(served, prompt) if isinstance(prompt, str) else prompt
    options.setdefault("timeout", settings_of(request).request_timeout)
    try:
        generation = served.engine.submit(ids, sampling, max_new_tokens, **options)
    except QueueFull as error:
        raise APIError(
            429, error_message(error), code="queue_full", type="rate_limit_error", headers=RETRY_AFTER
        ) from None
    except EngineClosed:
        raise stopping() from None
    except ValueError as error:
        raise APIError(400, error_message(error)) from None
    exchange_of(request).generations.append(generation)
    return generation


def stopping() -> APIError:
    """Return the error for a request that is refused or ended because the server is stopping."""
    return APIError(503, "the server is stopping", code="server_stopping", type="server_error", headers=RETRY_AFTER)


def require_finished(generation: Request) -> None:
    """Raise APIError if a request ended before its text was complete: at its deadline, or because the server is stopping."""
    if generation.finish_reason == "timeout":
        n = len(generation.tokens)
        message = f"the request reached its deadline after {n} tokens; ask for fewer with max_tokens"
        # Without this header, the openai client would retry, and reach the deadline again.
        headers = {"x-should-retry": "false"}
        raise APIError(504, message, code="timeout", type="server_error", headers=headers)
    if generation.finish_reason == "cancelled":
        raise stopping()


async def while_connected(request: HTTPRequest, awaitable: Awaitable[T]) -> T:
    """Return the result of `awaitable`. If the client leaves first, cancel `awaitable` and raise ClientDisconnect.

    Read the body of the request before, because this function discards it.
    """
    result = asyncio.ensure_future(awaitable)
    leaving = asyncio.ensure_future(_disconnected(request))
    try:
        await asyncio.wait((result, leaving), return_when=asyncio.FIRST_COMPLETED)
        if not result.done():
            raise ClientDisconnect
        return result.result()
    finally:
        for task in (result, leaving):
            task.cancel()
        await asyncio.gather(result, leaving, return_exceptions=True)


def event_stream(
    request: HTTPRequest, events: AsyncGenerator[str], headers: Mapping[str, str] | None = None
) -> StreamingResponse:
    """Return a response that sends the texts of `events` as server-sent events.

    Each text is the data of one event: a line of JSON, or [DONE]. If `events` raises an error, the last event describes it.
    If the client leaves, `events` is closed and the requests that `submit` made are cancelled.
    """
    all_headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no", **(headers or {})}
    return _EventStream(_framed(events, exchange_of(request)), headers=all_headers)


class _EventStream(StreamingResponse):
    media_type = "text/event-stream"

    async def stream_response(self, send: Send) -> None:
        # The client may leave while an event is being sent. Without aclosing, only the garbage collector would close the events.
        async with contextlib.aclosing(self.body_iterator):  # type: ignore[type-var]
            await super().stream_response(send)


async def _framed(events: AsyncGenerator[str], exchange: Exchange) -> AsyncGenerator[str]:
    """Yield the events in the format of server-sent events. If there is an error, the last event describes it."""
    try:
        async with contextlib.aclosing(events):
            async for event in events:
                yield f"data: {event}\n\n"
    except Exception as error:
        exchange.error = error if isinstance(error, APIError) else internal_error(error, exchange)
        yield f"data: {json.dumps(exchange.error.content())}\n\n"


async def _disconnected(request: HTTPRequest) -> None:
    """Return when the client has left."""
    while (await request.receive())["type"] != "http.disconnect":
        pass


def _refuse_constant(name: str) -> Any:
    raise ValueError(f"{name} is not a number in JSON")
