"""The web application: routes, protections, errors in OpenAI's format, metrics, and one log line per request."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import logging
import time
from dataclasses import dataclass
from urllib.parse import urlsplit

import prometheus_client
from starlette.applications import Starlette
from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.requests import ClientDisconnect
from starlette.requests import Request as HTTPRequest
from starlette.responses import JSONResponse, Response
from starlette.routing import BaseRoute, Route
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from MyGPT.messages import printable
from MyGPT.serving import api, inspect
from MyGPT.serving.metrics import Metrics
from MyGPT.serving.models import ServedModel, Settings
from MyGPT.serving.wire import APIError, Exchange, error_response, exchange_of, internal_error, logger, stopping

PROBES = ("/health", "/ready")
"""Paths of health checks. They need no key and accept any Host header, because they reveal nothing."""
CLIENT_LEFT = 499
"""The status in the log and the metrics for a request whose client left before the response began (as in nginx)."""
HEADERS = {"X-Content-Type-Options": "nosniff", "Cross-Origin-Resource-Policy": "same-origin"}
"""Headers of every response: browsers must not guess its type, and other pages must not embed it."""


@dataclass
class Status:
    """The present state of the server."""

    active: int = 0
    """Number of requests that are being answered, not counting health checks."""
    is_draining: bool = False
    """True after SIGTERM: running requests are finished, and new ones are refused."""


def create_app(models: dict[str, ServedModel], settings: Settings | None = None) -> Starlette:
    """Return the application that serves these models. The keys are the names for clients. The first model is the default."""
    settings = settings or Settings()
    middleware = [Middleware(Observer), Middleware(Guard, settings=settings)]
    if settings.cors_origins:
        # X-Stainless-* and other headers of the openai client differ between its versions, so all are allowed.
        cors = Middleware(
            CORSMiddleware, allow_origins=settings.cors_origins, allow_methods=["GET", "POST"], allow_headers=["*"],
            expose_headers=["*"],
        )  # fmt: skip
        middleware.insert(0, cors)
    own: list[BaseRoute] = [Route("/health", health), Route("/ready", ready), Route("/metrics", metrics)]
    app = Starlette(
        routes=[*own, *api.ROUTES, *inspect.ROUTES],
        middleware=middleware,
        exception_handlers={APIError: _api_error, HTTPException: _http_error},
    )
    app.state.models, app.state.settings, app.state.status = models, settings, Status()
    app.state.metrics = Metrics(models.values())
    return app


async def health(request: HTTPRequest) -> Response:
    """Return status 200 while the process is alive."""
    return JSONResponse({"status": "ok"})


async def ready(request: HTTPRequest) -> Response:
    """Return status 200 if new requests are accepted, and 503 while the server drains."""
    if request.app.state.status.is_draining:
        raise stopping()
    return JSONResponse({"status": "ready"})


async def metrics(request: HTTPRequest) -> Response:
    """Return the metrics in the text format of Prometheus."""
    recorded: Metrics = request.app.state.metrics
    text = prometheus_client.generate_latest(recorded.registry)
    return Response(text, media_type=prometheus_client.CONTENT_TYPE_LATEST)


async def _api_error(request: HTTPRequest, error: Exception) -> Response:
    assert isinstance(error, APIError)
    return error_response(error)


async def _http_error(request: HTTPRequest, error: Exception) -> Response:
    """Return an error that Starlette raises, such as an unknown path, in OpenAI's format."""
    assert isinstance(error, HTTPException)
    message = error.detail
    if error.status_code == 404:
        message = f"there is no path {request.url.path!r:.200}; /openapi.json describes those that exist"
    elif error.status_code == 405:
        allowed = (error.headers or {}).get("Allow", "")
        message = f"the path {request.url.path} does not allow the method {request.method}; it allows {allowed}"
    return error_response(APIError(error.status_code, message, headers=error.headers))


class Guard:
    """Middleware that refuses requests from other web pages, requests without the key, and new requests while draining.

    A web page can send requests to a server on the visitor's computer. Then the Origin header names the page, and the Host
    header names the server. If the page's owner points the domain name of the page to 127.0.0.1 afterwards (DNS rebinding),
    both headers name the page, and the page is not among the allowed hosts.
    """

    def __init__(self, app: ASGIApp, settings: Settings) -> None:
        self.app, self.settings = app, settings
        self.hosts = {host.lower() for host in (*settings.allowed_hosts, url_host(settings.host))}
        self.key = None if settings.api_key is None else _digest(settings.api_key)

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            error = self.refusal(scope)
            if error is not None:
                await error_response(error)(scope, receive, send)
                return
        await self.app(scope, receive, send)

    def refusal(self, scope: Scope) -> APIError | None:
        """Return the error for a request that is refused, or None for one that is accepted."""
        # uvicorn limits only headers that are not complete yet.
        if sum(len(name) + len(value) for name, value in scope["headers"]) > self.settings.max_header_bytes:
            return headers_too_large(self.settings)
        if scope["path"] in PROBES:
            return None
        headers = Headers(scope=scope)
        host, origin = headers.get("host", "").lower(), headers.get("origin")
        if not self.allows_host(host_name(host)):
            name = host_name(host) or "NAME"
            way_out = f"start the server with --allowed_hosts {name} to allow it"
            return APIError(
                403, f"the Host header {host!r:.200} is not allowed; {way_out:.200}", code="host_not_allowed"
            )
        # The origin of local files and of sandboxed pages is "null".
        if origin is not None and not self.allows_origin(origin, host):
            way_out = f"start the server with --cors_origins {origin} to allow it"
            message = f"requests of pages from {origin!r:.200} are not allowed; {way_out:.200}"
            return APIError(403, message, code="origin_not_allowed")
        if self.key is not None and scope["path"] != "/":
            scheme, _, key = headers.get("authorization", "").partition(" ")
            if scheme.lower() != "bearer" or not hmac.compare_digest(_digest(key.strip()), self.key):
                message = "the request needs the server's API key, in the header Authorization: Bearer KEY"
                if scheme:
                    message = "the API key in the Authorization header is wrong"
                return APIError(401, message, code="invalid_api_key", headers={"WWW-Authenticate": "Bearer"})
        if scope["app"].state.status.is_draining and scope["path"] != "/metrics":
            return stopping()
        return None

    def allows_host(self, name: str) -> bool:
        """Return whether the name in a Host header is allowed.

        If the server listens on all addresses of the machine, every IP address is allowed, because DNS rebinding needs a domain
        name.
        """
        if "*" in self.hosts or name in self.hosts:
            return True
        return self.settings.host in ("0.0.0.0", "::") and is_address(name)

    def allows_origin(self, origin: str, host: str) -> bool:
        """Return whether pages of this origin may send requests: those of the server itself and the configured ones."""
        if "*" in self.settings.cors_origins or origin in self.settings.cors_origins:
            return True
        try:
            parts = urlsplit(origin)
        except ValueError:
            return False
        return parts.scheme in ("http", "https") and parts.netloc.lower() == host


def headers_too_large(settings: Settings) -> APIError:
    """Return the error for a request with too many or too long headers."""
    return APIError(431, f"the headers of a request must have at most {settings.max_header_bytes:,} bytes")


def host_name(host: str) -> str:
    """Return the value of a Host header without the port. An IPv6 address keeps its brackets."""
    name, colon, port = host.rpartition(":")
    return name if colon and port.isdecimal() and not (name.startswith("[") and not name.endswith("]")) else host


def url_host(host: str) -> str:
    """Return an address as it is written in URLs. IPv6 addresses are put in brackets."""
    return f"[{host}]" if ":" in host else host


def is_address(host: str) -> bool:
    """Return whether the host of a URL is an IP address."""
    try:
        ipaddress.ip_address(host.removeprefix("[").removesuffix("]"))
    except ValueError:
        return False
    return True


class Observer:
    """Middleware that records each request, reports internal errors, and cancels the generation when the request ends."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        started, status = time.monotonic(), CLIENT_LEFT
        state, exchange = scope["app"].state, exchange_of(HTTPRequest(scope))
        has_begun = False

        async def observed_send(message: Message) -> None:
            nonlocal status, has_begun
            if message["type"] == "http.response.start":
                status, has_begun = message["status"], True
                headers = MutableHeaders(scope=message)
                headers["X-Request-ID"] = exchange.id
                for name, value in HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        counts = scope["path"] not in PROBES
        state.status.active += counts
        try:
            await self.app(scope, receive, observed_send)
        except (ClientDisconnect, asyncio.CancelledError):  # uvicorn cancels unfinished requests when the server stops
            pass
        except Exception as error:
            exchange.error = internal_error(error, exchange)
            if not has_begun:
                await error_response(exchange.error)(scope, receive, observed_send)
            # Otherwise the response stays incomplete, and uvicorn closes the connection.
        finally:
            for generation in exchange.generations:
                generation.cancel()
            state.status.active -= counts
            duration = time.monotonic() - started
            state.metrics.record(_route_of(scope), status, duration, exchange)
            if counts or status != 200:
                logger.info(log_line(scope, status, started, duration, exchange))


def log_line(scope: Scope, status: int, started: float, duration: float, exchange: Exchange) -> str:
    """Return the log line of a request: its method, path and status, followed by pairs NAME=VALUE."""
    path = scope.get("raw_path", b"").decode("ascii", "backslashreplace")[:200]
    parts = [scope["method"], path, str(status)]
    if exchange.model is not None:
        parts.append(f"model={exchange.model}")
    if exchange.generations:
        parts += [f"prompt_tokens={exchange.n_prompt_tokens()}", f"new_tokens={exchange.n_new_tokens()}"]
    first = exchange.first_token()
    if first is not None:
        parts.append(f"first_token={first - started:.3f}s")
    parts.append(f"duration={duration:.3f}s")
    reasons: list[str] = sorted({generation.finish_reason or "unfinished" for generation in exchange.generations})
    if exchange.error is not None:
        reasons.append(f"error:{exchange.error.status}")
    if reasons:
        parts.append(f"finish={','.join(reasons)}")
    parts.append(f"id={exchange.id}")
    state = scope["app"].state
    if state.settings.log_prompts and exchange.model is not None:
        decode = state.models[exchange.model].tokenizer.decode
        prompts = dict.fromkeys(tuple(generation.prompt_ids) for generation in exchange.generations)
        parts.append(f"prompts={json.dumps([decode(ids) for ids in prompts], ensure_ascii=False)}")
    return printable(" ".join(parts), keep="")


def _route_of(scope: Scope) -> str:
    """Return the path of the route that has answered a request, or "other"."""
    endpoint = scope.get("endpoint")
    routes = (route for route in scope["app"].routes if isinstance(route, Route))
    return next((route.path for route in routes if route.endpoint is endpoint), "other")


def _digest(key: str) -> bytes:
    """Return a hash of the key. A comparison of hashes does not reveal the length of the key."""
    return hashlib.sha256(key.encode("utf-8", "surrogateescape")).digest()


def log_to_stderr() -> None:
    """Write the log, and uvicorn's warnings, to stderr, one line per record."""
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(asctime)s %(message)s"))
    for name, level in ((logger.name, logging.INFO), ("uvicorn", logging.WARNING)):
        log = logging.getLogger(name)
        log.setLevel(level)
        log.propagate = False
        log.handlers = [handler]
