"""The server with real sockets: deadlines of connections, slow and leaving clients, signals, and the command's options."""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import json
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route

from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, cli
from MyGPT.commands import serve
from MyGPT.serving import Engine, server
from MyGPT.serving.app import create_app
from MyGPT.serving.models import ServedModel, Settings
from serve_process import CONTEXT, ServeProcess, save_tiny_model
from soak_server import SHARES, soak

HOST = "127.0.0.1"


class Pace:
    """A lock for an engine that makes each step last a while, or as long as `is_open` is not set."""

    def __init__(self) -> None:
        self.seconds, self.is_open = 0.0, threading.Event()
        self.is_open.set()

    def __enter__(self) -> None:
        time.sleep(self.seconds)
        self.is_open.wait()

    def __exit__(self, *_: object) -> None:
        pass


class Running:
    """A server in a thread, and clients that write to its sockets themselves."""

    def __init__(self, drain_timeout: float = 30.0, send_buffer: int | None = None, **settings: Any) -> None:
        tokenizer = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyz ,.\n")
        sizes = {"context_length": CONTEXT, "emb_dim": 16, "n_heads": 2, "n_layers": 1, "drop_rate": 0.0}
        model = lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes))
        self.pace = Pace()
        self.engine = Engine(model, tokenizer, slots=4, lock=self.pace)
        self.settings = Settings(**settings)
        self.app = create_app({"book": ServedModel("book", self.engine, tokenizer, model)}, self.settings)
        self.server = server.Server(self.app, drain_timeout)
        self.listener = server.bind(HOST, 0)
        if send_buffer is not None:
            self.listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)
        self.port = self.listener.getsockname()[1]
        self.thread = threading.Thread(target=self.server.run, args=([self.listener],))
        self.thread.start()
        while not self.server.started:
            time.sleep(0.001)

    def connect(self, receive_buffer: int | None = None) -> socket.socket:
        client = socket.socket()
        if receive_buffer is not None:
            client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
        client.settimeout(20)
        try:
            client.connect((HOST, self.port))
        except OSError:
            client.close()
            raise
        return client

    def ask(self, request: bytes) -> bytes:
        """Return everything that the server answers until it closes the connection."""
        with self.connect() as client:
            client.sendall(request)
            return read_all(client)

    def completion(self, **options: Any) -> bytes:
        """Return the bytes of a request for a completion, after which the connection is closed."""
        body = json.dumps({"model": "book", "prompt": "the ", "max_tokens": 5, **options}).encode()
        return post(body, "Connection: close")

    def stream(self, max_tokens: int = 1500) -> socket.socket:
        """Return the connection of a stream that has begun, and whose steps last 5 milliseconds."""
        self.pace.seconds = 0.005
        client = self.connect()
        client.sendall(self.completion(stream=True, max_tokens=max_tokens))
        data = b""
        while b"data: " not in data:
            data += (received := client.recv(1000))
            assert received, data
        return client

    def wait_until_idle(self) -> dict[str, int]:
        end = time.monotonic() + 10
        while (stats := self.engine.stats())["running"] or stats["waiting"]:
            assert time.monotonic() < end, stats
            time.sleep(0.001)
        return stats

    @property
    def n_active(self) -> int:
        """The number of requests that are being answered."""
        return self.server.status.active

    def signal(self, number: int) -> None:
        """Do what the server's handler of this signal does. Signals themselves only reach the main thread of a process."""
        self.server.handle_exit(number, None)

    def close(self) -> None:
        self.pace.is_open.set()
        self.signal(signal.SIGINT)
        self.thread.join(20)
        self.engine.close()
        self.listener.close()
        assert not self.thread.is_alive()


@pytest.fixture(scope="module")
def calm() -> Iterator[Running]:
    """A server with short deadlines, for tests that leave it as it was."""
    with contextlib.closing(Running(body_timeout=0.3, max_header_bytes=3000, max_body_bytes=200_000)) as running:
        yield running


def running(**options: Any) -> Any:
    return contextlib.closing(Running(**options))


def post(body: bytes, *headers: str) -> bytes:
    lines = ["POST /v1/completions HTTP/1.1", f"Host: {HOST}", f"Content-Length: {len(body)}", *headers, "", ""]
    return "\r\n".join(lines).encode() + body


def read_all(client: socket.socket) -> bytes:
    data = b""
    with contextlib.suppress(ConnectionResetError):
        while received := client.recv(65536):
            data += received
    return data


def read_status(client: socket.socket) -> int:
    """Read one response, and return its status."""
    response = http.client.HTTPResponse(client)
    response.begin()
    response.read()
    return response.status


def status_of(answer: bytes) -> int:
    return int(answer.split(b" ", 2)[1])


def error_of(answer: bytes) -> dict[str, Any]:
    error: dict[str, Any] = json.loads(answer.partition(b"\r\n\r\n")[2])["error"]
    return error


GET = f"GET /v1/models HTTP/1.1\r\nHost: {HOST}\r\n".encode()


@pytest.mark.parametrize("start", [b"", b"GET", b"GET / HTTP/1.1\r\nHost:", GET])
def test_a_connection_without_complete_headers_is_closed(calm: Running, start: bytes) -> None:
    started = time.monotonic()
    assert calm.ask(start) == b""
    assert 0.2 < time.monotonic() - started < 5


def test_headers_that_trickle_do_not_extend_the_deadline(calm: Running) -> None:
    started = time.monotonic()
    with calm.connect() as client, contextlib.suppress(OSError):
        client.sendall(GET)
        while time.monotonic() - started < 10:
            client.sendall(b"X: y\r\n")
            time.sleep(0.02)
    assert time.monotonic() - started < 5


def test_a_second_request_has_the_same_deadline(calm: Running) -> None:
    with calm.connect() as client:
        client.sendall(GET)
        while not calm.server.server_state.connections:
            time.sleep(0.001)
        for connection in calm.server.server_state.connections:
            connection.timeout_keep_alive = 0.4  # type: ignore[union-attr]
        client.sendall(b"\r\n")
        assert read_status(client) == 200
        client.sendall(GET)  # from here on, uvicorn has no deadline of its own
        assert read_all(client) == b""


def test_half_a_body_is_a_408(calm: Running) -> None:
    answer = calm.ask(post(b'{"prompt": "the "}')[:-5])
    assert status_of(answer) == 408 and error_of(answer)["code"] == "request_timeout"


@pytest.mark.parametrize(
    "request_", [b"GARBAGE\r\n\r\n", b"\x16\x03\x01\x02\x00\x01\x00\r\n\r\n", GET.replace(b"Host", b"X") + b"\r\n"]
)
def test_invalid_http_is_a_400(calm: Running, request_: bytes) -> None:
    answer = calm.ask(request_)
    assert status_of(answer) == 400 and error_of(answer)["type"] == "invalid_request_error"


@pytest.mark.parametrize("n", [4000, 100_000])
def test_large_headers_are_a_431(calm: Running, n: int) -> None:
    """uvicorn limits headers that are incomplete; those that arrive in one piece are checked afterwards."""
    with calm.connect() as client:
        client.sendall(GET + b"Connection: close\r\nX: " + b"a" * n)
        with contextlib.suppress(OSError):
            client.sendall(b"\r\n\r\n")
        answer = read_all(client)
    assert status_of(answer) == 431 and "3,000" in error_of(answer)["message"]


def test_a_client_that_sends_a_large_body_gets_its_413(calm: Running) -> None:
    """The rest of the body is read and dropped. Closing the connection would discard the answer with it."""
    with calm.connect() as client:
        client.sendall(post(b" " * 3_000_000))
        assert read_status(client) == 413
        client.sendall(GET + b"Connection: close\r\n\r\n")
        assert status_of(read_all(client)) == 200


@pytest.mark.parametrize(("header", "status"), [("X: y", 413), ("Origin: http://example.com", 403)])
def test_an_answer_before_the_end_of_a_request_arrives(calm: Running, header: str, status: int) -> None:
    request = post(b" " * 3_000_000, "Connection: close", header)
    with calm.connect() as client:
        client.sendall(request[:200])
        time.sleep(0.05)  # the answer is sent now
        client.sendall(request[200:])
        answer = b""
        while received := client.recv(65536):  # raises an error if the connection was reset
            answer += received
    assert status_of(answer) == status


def test_connections_over_the_limit_are_a_503() -> None:
    with running(max_connections=2) as server_, server_.connect(), server_.connect():
        time.sleep(0.05)
        answer = server_.ask(b"")
        assert status_of(answer) == 503 and error_of(answer)["code"] == "too_many_connections"


def test_a_client_that_leaves_frees_its_slot() -> None:
    with running() as server_:
        clients = [server_.stream() for _ in range(3)]
        steps = server_.engine.stats()["steps"]
        for client in clients:
            client.close()
        assert server_.wait_until_idle()["steps"] - steps < 100  # of 1,500
        assert status_of(server_.ask(server_.completion())) == 200


@pytest.mark.slow
def test_a_client_that_does_not_read_stalls_nobody_and_ends(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "GRACE_SECONDS", 0.1)
    with running(send_buffer=4096, request_timeout=2.5, body_timeout=0.1) as server_, server_.connect(4096) as slow:
        slow.sendall(server_.completion(stream=True, max_tokens=2000, logprobs=5))
        started = time.monotonic()
        time.sleep(0.3)
        while time.monotonic() - started < 0.9:
            before = time.monotonic()
            assert status_of(server_.ask(server_.completion())) == 200
            assert time.monotonic() - before < 1.5
        assert server_.n_active == 1
        while server_.n_active:
            assert time.monotonic() - started < 10
            time.sleep(0.01)
        server_.wait_until_idle()
        assert b"[DONE]" not in read_all(slow)  # the connection was reset


@pytest.mark.slow
def test_sigterm_finishes_requests_and_refuses_new_ones() -> None:
    with running() as server_, server_.stream(400) as client:
        server_.signal(signal.SIGTERM)
        probe = f"GET /ready HTTP/1.1\r\nHost: {HOST}\r\nConnection: close\r\n\r\n".encode()
        assert status_of(server_.ask(probe)) == 503
        assert status_of(server_.ask(probe.replace(b"ready", b"health"))) == 200
        answer = server_.ask(server_.completion())
        assert status_of(answer) == 503 and error_of(answer)["code"] == "server_stopping"
        server_.pace.seconds = 0.0
        assert read_all(client).endswith(b"data: [DONE]\n\n\r\n0\r\n\r\n")
        server_.thread.join(10)
        assert not server_.thread.is_alive() and server_.server.stopped_by is None
        with pytest.raises(ConnectionRefusedError):
            server_.connect()


def test_draining_has_a_deadline() -> None:
    with running(drain_timeout=0.1) as server_, server_.stream() as client:
        server_.signal(signal.SIGTERM)
        assert b"server_stopping" in read_all(client)
        server_.thread.join(10)
        assert not server_.thread.is_alive() and server_.server.stopped_by == signal.SIGTERM


@pytest.mark.parametrize(
    "signals", [[signal.SIGINT], [signal.SIGTERM, signal.SIGTERM], [signal.SIGTERM, signal.SIGINT]]
)
def test_streams_end_with_an_error_when_the_server_stops(signals: list[int]) -> None:
    with running() as server_, server_.stream() as client:
        started = time.monotonic()
        for number in signals:
            server_.signal(number)
        answer = read_all(client)
        assert b"server_stopping" in answer and answer.endswith(b"0\r\n\r\n")
        server_.thread.join(10)
        assert time.monotonic() - started < 2 and not server_.thread.is_alive()
        assert server_.server.stopped_by == signals[-1]
        server_.engine._thread.join(1)
        assert not server_.engine._thread.is_alive()


@pytest.mark.slow
def test_a_client_that_does_not_read_does_not_delay_the_stop(caplog: pytest.LogCaptureFixture) -> None:
    with running(send_buffer=4096) as server_, server_.connect(4096) as slow:
        slow.sendall(server_.completion(stream=True, max_tokens=2000, logprobs=5))
        time.sleep(0.5)
        started = time.monotonic()
        server_.signal(signal.SIGINT)
        server_.thread.join(10)
        assert time.monotonic() - started < 2 and not server_.thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info or record.levelname == "ERROR"]


@pytest.mark.slow
def test_a_handler_that_goes_on_does_not_delay_the_stop(caplog: pytest.LogCaptureFixture) -> None:
    async def endless(request: HTTPRequest) -> Response:
        await asyncio.sleep(60)
        return Response()

    with running() as server_, server_.connect() as client:
        server_.app.router.routes.append(Route("/endless", endless))
        client.sendall(GET.replace(b"v1/models", b"endless") + b"\r\n")
        while not server_.n_active:
            time.sleep(0.001)
        started = time.monotonic()
        server_.signal(signal.SIGINT)
        server_.thread.join(10)
        assert time.monotonic() - started < 2 and not server_.thread.is_alive()
    assert not [record for record in caplog.records if record.exc_info]


@pytest.mark.slow
def test_the_server_stops_during_a_long_step() -> None:
    with running() as server_, server_.stream() as client:
        server_.pace.is_open.clear()
        time.sleep(0.02)
        started = time.monotonic()
        server_.signal(signal.SIGINT)
        server_.thread.join(10)
        assert time.monotonic() - started < 2 and not server_.thread.is_alive()
        read_all(client)


def test_a_port_in_use_is_an_error() -> None:
    with server.bind(HOST, 0) as listener:
        port = listener.getsockname()[1]
        with pytest.raises(ValueError, match=f"port {port} of {HOST} is in use already"):
            server.bind(HOST, port)
    with pytest.raises(ValueError, match="host must be an address of this machine"):
        server.bind("no such host", 0)
    with pytest.raises(ValueError, match="not an address of this machine"):
        server.bind("192.0.2.1", 0)


@pytest.mark.skipif(not socket.has_ipv6, reason="no IPv6")
def test_ipv6_addresses_can_be_served() -> None:
    with server.bind("::1", 0) as listener:
        assert listener.family == socket.AF_INET6


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ("--host 0.0.0.0", "other machines can reach the address 0.0.0.0"),
        ("--host ::", "clients must have a key"),
        ("--host example.com", "clients must have a key"),
        ("--api_key=", "--api_key is empty"),
        ("--api_key=ä", "only visible ones of ASCII"),
        ("--port 65536", "port must be a whole number from 0 to 65535, got 65536"),
        ("--slots 0", "slots must be a whole number of at least 1, got 0"),
        ("--request_timeout 0", "request_timeout must be a number of seconds above 0"),
        ("--drain_timeout -1", "drain_timeout must be a number of seconds of at least 0"),
        ("--cors_origins https://a.b/c", "without a path, got 'https://a.b/c'"),
        ("--allowed_hosts a --allowed_hosts b:1", "without a port, got 'b:1'"),
        ("--model x/a", "have the same name 'a'"),
        ("--model =x", "a model needs a name"),
        ("", "no model at nowhere/a"),
    ],
)  # fmt: skip
def test_wrong_options_are_one_sentence(options: str, message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["serve", "--model", "nowhere/a", "--port", "0", *options.split()]) == 2
    error = capsys.readouterr().err
    assert message in error and error.count("\n") == 1


def test_a_busy_port_ends_the_command_before_the_model_is_opened(capsys: pytest.CaptureFixture[str]) -> None:
    with server.bind(HOST, 0) as listener:
        port = listener.getsockname()[1]
        assert cli.main(["serve", "--model", "nowhere", "--port", str(port)]) == 2
    assert f"port {port} of {HOST} is in use already" in capsys.readouterr().err


def test_missing_packages_are_one_sentence(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(serve, "_PACKAGES", ("starlette", "no_such_package"))
    assert cli.main(["serve", "--model", "nowhere"]) == 2
    assert capsys.readouterr().err == "mygpt serve: mygpt serve needs no_such_package: pip install 'mygpt[serve]'\n"


def test_models_have_names(tmp_path: Path) -> None:
    run, file = tmp_path / "book", tmp_path / "ckpt.v2.pt"
    run.mkdir()
    file.touch()
    odd = tmp_path / "a=b"
    odd.mkdir()
    with contextlib.chdir(run):
        here = serve.list_models(["."])
    assert here == {"book": "."}
    given = [f"{run}/", str(file), "gpt2", "hf://user/tiny", f"other={run}", "tiny2=hf://user/tiny"]
    names = serve.list_models(given)
    assert names == dict(
        zip(
            ["book", "ckpt.v2", "gpt2", "tiny", "other", "tiny2"], [*given[:4], str(run), "hf://user/tiny"], strict=True
        )
    )
    with pytest.raises(ValueError, match="a model needs a name"):
        serve.list_models([str(odd)])
    assert serve.list_models([f"x={odd}"]) == {"x": str(odd)}


@pytest.mark.slow
def test_slots_that_never_fit_are_an_error(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    assert cli.main(["serve", "--model", str(model), "--port", "0", "--slots", "100000000", "--device", "cpu"]) == 2
    assert "there is not enough memory" in (error := capsys.readouterr().err) and "--slots" in error


@pytest.mark.slow
def test_several_models_take_turns(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = save_tiny_model(tmp_path / "tiny")
    served = serve.open_models({"a": str(model), "b": str(model)}, 3, 5, "cpu", "fp32")
    try:
        assert list(served) == [served["a"].name, served["b"].name] == ["a", "b"]
        assert served["a"].engine._lock is served["b"].engine._lock
        serve.announce("http://x:1", served, Settings())
    finally:
        for model_ in served.values():
            model_.engine.close()
    out = capsys.readouterr().out
    # 2 layers, keys and values of 16 numbers in 4 bytes, for 3 slots of 2,048 tokens
    size = f"3 slots x 2,048 tokens: up to {2 * 2 * 16 * 4 * 3 * 2048 / 1e6:.2g} MB"
    assert out.count(size) == 2 and "http://x:1/v1\n" in out


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_tiny_model(tmp_path_factory.mktemp("served") / "tiny")


def begin_stream(process: ServeProcess, n: int) -> socket.socket:
    client = socket.create_connection((HOST, process.port), timeout=30)
    body = json.dumps({"model": "tiny", "prompt": "the ", "max_tokens": n, "stream": True}).encode()
    client.sendall(post(body, "Authorization: Bearer secret"))
    data = b""
    while b"data: " not in data:
        data += (received := client.recv(1000))
        assert received, data
    return client


@pytest.mark.slow
@pytest.mark.parametrize("end", ["Ctrl-C", "drain", "twice"])
def test_signals_of_a_process(model: Path, tmp_path: Path, end: str) -> None:
    with ServeProcess(model, tmp_path / "log", MYGPT_API_KEY="secret") as process:
        assert "tiny: 0.0M parameters" in process.announcement and "with the key" in process.announcement
        with begin_stream(process, 600 if end == "drain" else 2000) as client:
            started = time.monotonic()
            process.process.send_signal(signal.SIGINT if end == "Ctrl-C" else signal.SIGTERM)
            if end == "twice":
                process.wait_until_draining()
                started = time.monotonic()
                process.process.send_signal(signal.SIGTERM)
            answer = read_all(client)
            status = process.process.wait(60)
            seconds = time.monotonic() - started
    log = (tmp_path / "log").read_text()
    assert "Traceback" not in log, log
    assert "the " not in log  # no prompt
    if end == "drain":
        assert status == 0 and b"[DONE]" in answer and "finish=length" in log
    else:
        assert seconds < (2 if end == "Ctrl-C" else 5) and b"server_stopping" in answer and "finish=cancelled" in log
        assert status == (130 if end == "Ctrl-C" else 143)


@pytest.mark.slow
def test_two_hundred_clients_get_their_answers(tmp_path: Path) -> None:
    """A small version of `make soak`, without the clients that wait ten seconds for the deadline of their half request."""
    shares = {kind: share for kind, share in SHARES.items() if not kind.startswith("half")}
    assert soak(200, 1, tmp_path, shares) == []
