"""The HTTP server: uvicorn with deadlines for connections, draining, and a shutdown within two seconds."""

from __future__ import annotations

import asyncio
import errno
import functools
import os
import signal
import socket
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType
from typing import Any

import h11
import uvicorn
from starlette.applications import Starlette
from uvicorn.protocols.http.h11_impl import STATUS_PHRASES, H11Protocol

from MyGPT.serving.app import Status, headers_too_large, url_host
from MyGPT.serving.engine import Engine
from MyGPT.serving.models import ServedModel, Settings
from MyGPT.serving.wire import APIError, error_response, logger

KEEP_ALIVE_SECONDS = 20
"""Seconds after which an idle connection is closed. Clients such as httpx close theirs after 5 seconds, and thus first."""
GRACE_SECONDS = 5.0
"""Seconds that a response has after its request's deadline, to report the deadline to the client."""
LINGER_SECONDS = 5.0
"""Seconds for which the rest of a request is read and dropped after it has been answered."""
BACKLOG = 256
"""Number of connections that wait until the server accepts them."""
STOP_SECONDS = 1
"""Seconds that the requests have to end when the server stops. Their connections are aborted after half of this time."""
ENGINE_SECONDS = 1.5
"""Seconds that the engines have for their last step when the server stops. The process may end during a step."""


class Protocol(H11Protocol):
    """uvicorn's protocol for one connection, with deadlines.

    uvicorn itself only closes connections that are idle between requests. This class also closes a connection if the headers of
    its next request are not complete in time, or if its client has not read the whole response at the deadline of the request.
    If too many connections are open, a new one is answered with status 503.

    The server may answer before it has read the whole request, for example with status 413 for a large body. If it closed the
    connection at once, the operating system would reset the connection, and the answer would be lost. So the rest of the
    request is read and dropped.
    """

    def __init__(self, *arguments: Any, settings: Settings, **options: Any) -> None:
        super().__init__(*arguments, **options)
        self.settings = settings
        self.is_lingering = False
        self.deadline: asyncio.TimerHandle | None = None
        self.timed_cycle: Any = None
        """The request for which the deadline was set."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(_Transport(transport, self))  # type: ignore[arg-type]
        if len(self.connections) > self.settings.max_connections:
            message = f"the server has {self.settings.max_connections} open connections already"
            self.answer_and_close(APIError(503, message, code="too_many_connections", type="server_error"))
        else:
            self.set_deadline(self.settings.body_timeout)

    def data_received(self, data: bytes) -> None:
        if not self.is_lingering:
            super().data_received(data)

    def handle_events(self) -> None:
        super().handle_events()
        if self.cycle is not self.timed_cycle and not self.cycle.response_complete:
            self.timed_cycle = self.cycle
            self.set_deadline(self.settings.body_timeout + self.settings.request_timeout + GRACE_SECONDS)

    def on_response_complete(self) -> None:
        # If the client has not read the whole response yet, the deadline of the request remains.
        if not self.transport.is_closing() and not self.transport.get_write_buffer_size():
            self.set_deadline(self.timeout_keep_alive + self.settings.body_timeout)
        super().on_response_complete()

    def connection_lost(self, exc: Exception | None) -> None:
        if self.deadline is not None:
            self.deadline.cancel()
        super().connection_lost(exc)

    def linger(self, transport: asyncio.Transport) -> bool:
        """If the client has not sent its whole request, close only our side and return True.

        Otherwise return False, as for a connection that lingers already.
        """
        if self.is_lingering or self.conn.their_state not in (h11.SEND_BODY, h11.ERROR):
            return False
        self.is_lingering = True
        transport.write_eof()
        self.flow.resume_reading()
        self.set_deadline(LINGER_SECONDS)
        return True

    def set_deadline(self, seconds: float) -> None:
        """Abort the connection after this number of seconds. The new deadline replaces the previous one.

        The connection is aborted, because `transport.close` would wait until the client has read everything.
        """
        if self.deadline is not None:
            self.deadline.cancel()
        self.deadline = self.loop.call_later(seconds, self.transport.abort)

    def send_400_response(self, msg: str) -> None:
        """Answer a request that is not valid HTTP, or whose headers are too large. uvicorn calls this method for both."""
        status = getattr(sys.exc_info()[1], "error_status_hint", 400)
        invalid = APIError(status, "the request is not valid HTTP")
        self.answer_and_close(headers_too_large(self.settings) if status == 431 else invalid)

    def answer_and_close(self, error: APIError) -> None:
        """Send an error as the whole response, and close the connection."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            response = error_response(error)
            headers = [*response.raw_headers, (b"connection", b"close")]
            reason = STATUS_PHRASES[error.status]
            start = h11.Response(status_code=error.status, headers=headers, reason=reason)
            for event in (start, h11.Data(data=bytes(response.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()


class _Transport:
    """A transport that lets its `Protocol` linger before it closes the connection."""

    def __init__(self, transport: asyncio.Transport, protocol: Protocol) -> None:
        self.transport, self.protocol = transport, protocol

    def close(self) -> None:
        if not self.transport.is_closing() and not self.protocol.linger(self.transport):
            self.transport.close()

    def is_closing(self) -> bool:
        return self.protocol.is_lingering or self.transport.is_closing()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.transport, name)


class Server(uvicorn.Server):
    """uvicorn's server with different signal handling: SIGTERM drains, and a second SIGTERM, or Ctrl-C, stops at once.

    Args:
        app: the application of `create_app`.
        drain_timeout: seconds that running and waiting requests have to finish after SIGTERM.
        announce: a function that is called when the server accepts requests.
    """

    def __init__(self, app: Starlette, drain_timeout: float = 30.0, announce: Callable[[], None] | None = None) -> None:
        settings: Settings = app.state.settings
        super().__init__(
            uvicorn.Config(
                app,
                loop="asyncio",
                http=functools.partial(Protocol, settings=settings),  # type: ignore[arg-type]
                ws="none",
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_keep_alive=KEEP_ALIVE_SECONDS,
                timeout_graceful_shutdown=STOP_SECONDS,
                h11_max_incomplete_event_size=settings.max_header_bytes,
            )
        )
        self.status: Status = app.state.status
        models: dict[str, ServedModel] = app.state.models
        self.engines: list[Engine] = [model.engine for model in models.values()]
        self.drain_timeout, self.announce = drain_timeout, announce
        self.drain_deadline = 0.0
        self.stopped_by: int | None = None
        """The signal that stopped the server before all requests were finished, or None."""

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Drain after the first SIGTERM, and stop after another signal."""
        if sig == signal.SIGTERM and not self.status.is_draining:
            self.drain_deadline = time.monotonic() + self.drain_timeout
            self.status.is_draining = True
        else:
            self.stopped_by = self.stopped_by or sig
            self.should_exit = True

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Start to listen, and then call `announce`."""
        await super().startup(sockets)
        if self.announce is not None:
            self.announce()

    async def on_tick(self, counter: int) -> bool:
        """Return True if the server should end now. uvicorn calls this method ten times per second."""
        if self.status.is_draining and not self.should_exit:
            if not self.status.active:
                self.should_exit = True
            elif time.monotonic() >= self.drain_deadline:
                self.stopped_by, self.should_exit = signal.SIGTERM, True
        return await super().on_tick(counter)

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Close the engines, which ends the open streams, and then close the connections."""
        if self.status.active:
            logger.info("stopping: %d requests end unfinished", self.status.active)
        end = time.monotonic() + ENGINE_SECONDS
        # Engine.close waits for the engine's current step, which may be long. The streams must not wait for it.
        closing = [threading.Thread(target=engine.close, daemon=True) for engine in self.engines]
        for thread in closing:
            thread.start()
        # A stream that is still open after this time has a client that does not read.
        abort = asyncio.get_running_loop().call_later(STOP_SECONDS / 2, self.abort_connections)
        await super().shutdown(sockets)
        abort.cancel()
        for thread in closing:
            await asyncio.to_thread(thread.join, max(0.0, end - time.monotonic()))

    def abort_connections(self) -> None:
        """Close all connections without waiting for their clients."""
        for connection in list(self.server_state.connections):
            connection.transport.abort()


def bind(host: str, port: int) -> socket.socket:
    """Return a socket that listens on an address. Port 0 stands for any free port.

    Clients that connect before the server runs wait until it runs. Raises ValueError if `host` is not an address of this
    machine, or if the port is in use or not allowed.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (socket.gaierror, UnicodeError) as error:
        raise ValueError(f"host must be an address of this machine, such as 127.0.0.1, got {host!r}: {error}") from None
    bound = socket.socket(family, kind, protocol)
    try:
        if os.name == "posix":
            # Without this option, the port would stay in use for a minute after the server has ended.
            bound.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        if family == socket.AF_INET6 and host != "::":
            bound.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 1)
        bound.bind(address)
        bound.listen(BACKLOG)  # only a listening socket keeps the port from other programs
    except OSError as error:
        bound.close()
        raise ValueError(_bind_message(error, host, port)) from None
    bound.set_inheritable(False)
    return bound


def _bind_message(error: OSError, host: str, port: int) -> str:
    """Return the message for an address that cannot be used."""
    if error.errno == errno.EADDRINUSE:
        return f"port {port} of {host} is in use already: choose another one with --port"
    if error.errno in (errno.EACCES, errno.EPERM):
        return f"port {port} needs the rights of an administrator: choose one above 1023 with --port"
    if error.errno == errno.EADDRNOTAVAIL:
        return f"{host} is not an address of this machine: choose another one with --host"
    return f"cannot listen on port {port} of {url_host(host)}: {error.strerror}"
