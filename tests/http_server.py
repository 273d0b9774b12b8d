"""A local HTTP server whose response to each request is chosen by the test: complete, cut, stalled, reset or refused."""

from __future__ import annotations

import random
import socket
import ssl
import struct
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

CONTENT = random.Random(0).randbytes(300_000)
CERTIFICATE = Path(__file__).parent / "fixtures/localhost.pem"
"""A certificate for 127.0.0.1 and its key, which protect nothing. Clients trust it if SSL_CERT_FILE is this file."""
OTHER = random.Random(1).randbytes(250_000)

Answer = Callable[[BaseHTTPRequestHandler], None]


class Server:
    """A server that replies with the next of `answers`, then with `default`, and records the requests."""

    def __init__(self, tls: bool = False) -> None:
        self.answers: list[Answer] = []
        self.default: Answer = status(599)
        self.requests: list[tuple[str, Message]] = []
        server = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                server.requests.append((self.path, self.headers))
                answer = server.answers.pop(0) if server.answers else server.default
                answer(self)
                self.close_connection = True

            do_HEAD = do_GET

            def log_message(self, format: str, *args: object) -> None:
                pass

        self.http = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.http.daemon_threads = True
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            self.http.socket = context.wrap_socket(self.http.socket, server_side=True)
        self.address = f"{'https' if tls else 'http'}://127.0.0.1:{self.http.server_port}"
        self.url = f"{self.address}/file.bin"

    def will(self, *answers: Answer) -> str:
        self.answers += answers
        return self.url

    def ranges(self) -> list[str | None]:
        return [headers["Range"] for _, headers in self.requests]


@contextmanager
def serving(tls: bool = False) -> Iterator[Server]:
    server = Server(tls)
    threading.Thread(target=server.http.serve_forever, args=(0.01,), daemon=True).start()
    try:
        yield server
    finally:
        server.http.shutdown()
        server.http.server_close()


def file(
    content: bytes = CONTENT,
    *,
    cut: int | None = None,
    stall: float = 0,
    reset: bool = False,
    etag: str | None = '"v1"',
    ranges: bool = True,
    if_range: bool = True,
    length: int | None = None,
    headers: dict[str, str] | None = None,
    pause: float = 0,
) -> Answer:
    """Return an answer that sends a file.

    Args:
        content: the bytes of the file.
        cut: send only this many bytes.
        stall: seconds of silence before the connection ends.
        reset: end the connection by a reset.
        etag: the ETag header, or None to leave it out.
        ranges: support the Range header.
        if_range: support the If-Range header.
        length: the Content-Length header; default: the length of the body.
        headers: more headers.
        pause: seconds of silence after every 20,000 bytes.
    """

    def answer(handler: BaseHTTPRequestHandler) -> None:
        wanted = handler.headers["Range"]
        same = not if_range or handler.headers["If-Range"] == etag
        start = int(wanted.removeprefix("bytes=").removesuffix("-")) if wanted and ranges and same else None
        if start is not None and start >= len(content):
            handler.send_response(416)
            handler.send_header("Content-Range", f"bytes */{len(content)}")
            handler.send_header("Content-Length", "0")
            handler.end_headers()
            return
        body = content[start or 0 :]
        handler.send_response(200 if start is None else 206)
        if start is not None:
            handler.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        if etag is not None:
            handler.send_header("ETag", etag)
        for name, value in {
            "Content-Type": "application/octet-stream",
            "Connection": "close",
            **(headers or {}),
        }.items():
            handler.send_header(name, value)
        handler.send_header("Content-Length", str(len(body) if length is None else length))
        handler.end_headers()
        body = body[:cut]
        for begin in range(0, len(body), 20_000) if pause else ():
            handler.wfile.write(body[begin : begin + 20_000])
            time.sleep(pause)
        handler.wfile.write(b"" if pause else body)
        handler.wfile.flush()
        time.sleep(stall)
        if reset:
            handler.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))

    return answer


def status(code: int, body: bytes = b"", **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(code)
        for name, value in {"Content-Length": str(len(body)), "Connection": "close", **headers}.items():
            handler.send_header(name.replace("_", "-"), value)
        handler.end_headers()
        handler.wfile.write(body)

    return answer


def chunked(content: bytes = CONTENT, ends: bool = True, **headers: str) -> Answer:
    def answer(handler: BaseHTTPRequestHandler) -> None:
        handler.send_response(200)
        handler.send_header("Transfer-Encoding", "chunked")
        for name, value in headers.items():
            handler.send_header(name, value)
        handler.end_headers()
        for start in range(0, len(content), 70_000):
            block = content[start : start + 70_000]
            handler.wfile.write(b"%x\r\n%s\r\n" % (len(block), block))
        if ends:
            handler.wfile.write(b"0\r\n\r\n")

    return answer


def until_the_end(handler: BaseHTTPRequestHandler) -> None:
    """Send a file without its length, as in HTTP/1.0, where the end of the connection is the end of the file."""
    handler.send_response(200)
    handler.end_headers()
    handler.wfile.write(CONTENT)
