"""The web application: its protections, the format of its errors, the metrics and the log. No sockets are used."""

from __future__ import annotations

import asyncio
import json
import logging
import re
import time
from collections.abc import AsyncGenerator, Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from prometheus_client.parser import text_string_to_metric_families
from starlette.requests import Request as HTTPRequest
from starlette.responses import Response
from starlette.routing import Route
from starlette.testclient import TestClient

from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig
from MyGPT.serving import Engine
from MyGPT.serving.app import create_app, host_name
from MyGPT.serving.models import ServedModel, Settings
from MyGPT.serving.wire import event_stream, find_model, submit

PAGES = "http://example.com"


@pytest.fixture(scope="module")
def served() -> Iterator[ServedModel]:
    tokenizer = CharTokenizer.from_text("abcdefghijklmnopqrstuvwxyz ,.\n")
    sizes = {"context_length": 64, "emb_dim": 24, "n_heads": 3, "n_layers": 2, "drop_rate": 0.0}
    model = lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes))
    with Engine(model, tokenizer, slots=2, max_queue=3) as engine:
        yield ServedModel("book", engine, tokenizer, model)


@pytest.fixture
def client(served: ServedModel) -> TestClient:
    return client_of(served)


def client_of(served: ServedModel, *routes: Route, **settings: Any) -> TestClient:
    app = create_app({served.name: served}, Settings(**settings))
    app.router.routes.extend(routes)
    return TestClient(app, base_url="http://127.0.0.1:8000")


def code_of(response: Any) -> str:
    """Return the code of an error, whose format is checked."""
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    assert response.headers["x-request-id"]
    return str(error["code"])


def complete(client: TestClient, **options: Any) -> Any:
    return client.post("/v1/completions", json={"model": "book", "prompt": "the ", "max_tokens": 4, **options})


def metric(client: TestClient, name: str, **labels: str) -> float:
    """Return the sum of the samples with this name and these labels, as Prometheus' own parser reads them."""
    families = text_string_to_metric_families(client.get("/metrics").text)
    samples = [sample for family in families for sample in family.samples if sample.name == name]
    assert samples, name
    return sum(s.value for s in samples if labels.items() <= s.labels.items())


def test_the_server_is_alive_and_ready(client: TestClient) -> None:
    assert client.get("/health").json() == {"status": "ok"}
    assert client.get("/ready").json() == {"status": "ready"}


def test_while_draining_only_the_probes_and_metrics_answer(client: TestClient) -> None:
    client.app.state.status.is_draining = True  # type: ignore[attr-defined]
    assert client.get("/health").status_code == client.get("/metrics").status_code == 200
    for response in (client.get("/ready"), client.get("/v1/models"), complete(client)):
        assert (response.status_code, code_of(response)) == (503, "server_stopping")
        assert int(response.headers["retry-after"]) > 0


@pytest.mark.parametrize(
    ("host", "name"),
    [("a.b", "a.b"), ("a.b:80", "a.b"), ("[::1]", "[::1]"), ("[::1]:80", "[::1]"), ("1.2.3.4:5", "1.2.3.4"), ("", "")],
)  # fmt: skip
def test_the_host_header_is_split_into_name_and_port(host: str, name: str) -> None:
    assert host_name(host) == name


@pytest.mark.parametrize("host", ["localhost", "LOCALHOST:8000", "127.0.0.1", "127.0.0.1:8000", "[::1]", "[::1]:8000"])
def test_local_host_headers_are_accepted(client: TestClient, host: str) -> None:
    assert client.get("/v1/models", headers={"Host": host}).status_code == 200


@pytest.mark.parametrize(
    "host",
    ["evil.com", "evil.com:8000", "127.0.0.1.evil.com", "localhost.evil.com", "[::2]:80", "10.0.0.1", "::1", "", "[::1",
     "127.0.0.1@evil.com", "evil.com:127.0.0.1", "localhost:8000:1"],
)  # fmt: skip
def test_other_host_headers_are_refused(client: TestClient, host: str) -> None:
    for path in ("/v1/models", "/", "/metrics", "/openapi.json"):
        response = client.get(path, headers={"Host": host})
        assert (response.status_code, code_of(response)) == (403, "host_not_allowed")
    assert client.get("/health", headers={"Host": host}).status_code == 200


def test_hosts_can_be_allowed(served: ServedModel) -> None:
    def status(header: str, **settings: Any) -> int:
        return client_of(served, **settings).get("/v1/models", headers={"Host": header}).status_code

    assert status("gpt.example.com:80", allowed_hosts=("GPT.example.com",)) == 200
    assert status("evil.com", allowed_hosts=("*",)) == 200
    assert status("myhost:8000", host="myhost") == 200
    assert status("[fe80::1]:8000", host="fe80::1") == 200
    # A server on all addresses is reached under any of them, but rebinding needs a name.
    assert status("192.168.1.7:8000", host="0.0.0.0") == status("[2001:db8::1]:8000", host="::") == 200
    assert status("evil.com", host="0.0.0.0") == 403


def test_pages_from_elsewhere_are_refused(client: TestClient) -> None:
    for origin in (
        PAGES,
        "null",
        "https://127.0.0.1:8001",
        "http://127.0.0.1",
        "file://",
        "http://[",
        "127.0.0.1:8000",
    ):
        # A page can send this request without asking first (no preflight).
        body = json.dumps({"model": "book", "prompt": "a"})
        response = client.post(
            "/v1/completions", content=body, headers={"Origin": origin, "Content-Type": "text/plain"}
        )
        assert (response.status_code, code_of(response)) == (403, "origin_not_allowed")
        assert "access-control-allow-origin" not in response.headers
    assert client.get("/v1/models", headers={"Origin": "http://127.0.0.1:8000"}).status_code == 200


def test_cors_is_only_for_configured_origins(served: ServedModel) -> None:
    client = client_of(served, cors_origins=(PAGES,), api_key="secret")
    asks = {"Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": "authorization,x-stainless-os"}
    preflight = client.options("/v1/completions", headers={"Origin": PAGES, **asks})
    assert preflight.status_code == 200 and preflight.headers["access-control-allow-origin"] == PAGES
    assert "x-stainless-os" in preflight.headers["access-control-allow-headers"]
    key = {"Authorization": "Bearer secret"}
    assert client.get("/v1/models", headers={"Origin": PAGES, **key}).headers["access-control-allow-origin"] == PAGES
    # Even an error must be readable by the page.
    assert client.get("/v1/models", headers={"Origin": PAGES}).headers["access-control-allow-origin"] == PAGES
    assert client.options("/v1/completions", headers={"Origin": "http://other.com", **asks}).status_code == 400
    assert client.get("/v1/models", headers={"Origin": "http://other.com", **key}).status_code == 403
    everyone = client_of(served, cors_origins=("*",)).get("/v1/models", headers={"Origin": PAGES})
    assert everyone.headers["access-control-allow-origin"] == "*"


def test_without_configuration_there_are_no_cors_headers(client: TestClient) -> None:
    asks = {"Origin": PAGES, "Access-Control-Request-Method": "POST"}
    responses = [client.options("/v1/completions", headers=asks), client.get("/v1/models")]
    assert not [name for response in responses for name in response.headers if name.startswith("access-control")]


def test_the_key_is_required(served: ServedModel) -> None:
    client = client_of(served, api_key="secret")
    for value in (
        None,
        "",
        "secret",
        "Bearer",
        "Bearer ",
        "Bearer Secret",
        "Bearer secretx",
        "Basic secret",
        "Bearer sécret",
    ):
        headers = {} if value is None else {"Authorization": value.encode()}
        for path in ("/v1/models", "/metrics", "/openapi.json", "/nothing", "/page/models"):
            response = client.get(path, headers=headers)
            assert (response.status_code, code_of(response)) == (401, "invalid_api_key"), value
            assert response.headers["www-authenticate"] == "Bearer"
    for value in ("Bearer secret", "bearer secret", "Bearer  secret"):
        assert client.get("/v1/models", headers={"Authorization": value}).status_code == 200
    assert [client.get(path).status_code for path in ("/health", "/ready", "/")] == [200, 200, 200]


def test_large_headers_are_refused(served: ServedModel) -> None:
    client = client_of(served, max_header_bytes=2000)
    assert client.get("/health", headers={"X": "a" * 1500}).status_code == 200
    response = client.get("/health", headers={"X": "a" * 2000})
    assert response.status_code == 431 and "2,000" in response.json()["error"]["message"]


def test_large_bodies_are_refused_while_they_are_read(served: ServedModel) -> None:
    client = client_of(served, max_body_bytes=1000)
    n_sent = 0

    def pieces() -> Iterator[bytes]:
        nonlocal n_sent
        for _ in range(100):
            n_sent += 100
            yield b" " * 100

    response = client.post("/v1/completions", content=b" " * 1001)
    assert (response.status_code, code_of(response)) == (413, "request_too_large")
    # Without a Content-Length, the size is known only from reading.
    response = client.post("/v1/completions", content=pieces())
    assert (response.status_code, code_of(response)) == (413, "request_too_large")
    assert complete(client).status_code == 200


@pytest.mark.parametrize(
    "body",
    [b"", b"{", b"words", b"[1]", b"null", b'"a"', b'{"prompt": NaN}', b'{"prompt": -Infinity}', b"\xff", b'{"prompt": "\xff"}',
     b"[" * 100_000, b'{"prompt": "\\ud800"}', b'{"a": 1' + b"0" * 5000 + b"}", b'{"a": 1}{'],
)  # fmt: skip
def test_bodies_that_are_no_json_objects_are_refused(client: TestClient, body: bytes) -> None:
    response = client.post("/v1/completions", content=body)
    assert (response.status_code, code_of(response)) == (400, "invalid_json")


def test_a_body_that_does_not_arrive_is_refused(served: ServedModel) -> None:
    app = create_app({"book": served}, Settings(body_timeout=0.05))
    sent: list[Any] = []

    async def receive() -> Any:
        if not sent:
            sent.append(None)
            return {"type": "http.request", "body": b'{"prompt"', "more_body": True}
        return await asyncio.Future()

    async def send(message: Any) -> None:
        sent.append(message)

    headers = [(b"host", b"127.0.0.1")]
    scope = {"type": "http", "method": "POST", "path": "/v1/completions", "headers": headers, "query_string": b""}
    asyncio.run(app(scope, receive, send))
    assert sent[1]["status"] == 408 and (b"connection", b"close") in sent[1]["headers"]
    assert b"0.05 seconds" in sent[2]["body"]


def test_unknown_paths_and_methods_are_errors_in_the_same_format(client: TestClient) -> None:
    response = client.get("/v2/models")
    assert response.status_code == 404 and code_of(response) and "/v2/models" in response.text
    response = client.get("/v1/completions")
    assert (response.status_code, response.headers["allow"]) == (405, "POST") and code_of(response)
    response = complete(client, model="nope")
    assert (response.status_code, code_of(response)) == (404, "model_not_found") and "book" in response.text


def test_an_internal_error_has_an_id_and_its_traceback_is_in_the_log(
    served: ServedModel, caplog: pytest.LogCaptureFixture
) -> None:
    async def fail(request: HTTPRequest) -> Response:
        raise RuntimeError("secret details")

    async def fail_later(request: HTTPRequest) -> Response:
        async def events() -> Any:
            yield "1"
            raise RuntimeError("secret details")

        return event_stream(request, events())

    client = client_of(served, Route("/fail", fail), Route("/later", fail_later))
    with caplog.at_level(logging.INFO, "MyGPT.serving"):
        response, later = client.get("/fail"), client.get("/later")
    assert (response.status_code, code_of(response)) == (500, "internal_error")
    for answer in (response, later):
        id_ = answer.headers["x-request-id"]
        assert id_ in answer.text and "secret" not in answer.text
        assert any(id_ in record.getMessage() and record.exc_info for record in caplog.records)
    assert later.text.startswith("data: 1\n\ndata: {") and "finish=error:500" in caplog.text


def test_client_errors_leave_no_traceback(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "MyGPT.serving"):
        assert complete(client, prompt="A").status_code == 400
        assert client.post("/v1/completions", content=b"{").status_code == 400
    assert len(caplog.records) == 2 and not any(record.exc_info for record in caplog.records)


def test_each_request_is_one_log_line(client: TestClient, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.INFO, "MyGPT.serving"):
        response = complete(client)
        client.get("/v1/models%0Aforged?prompt=hidden")
        client.get("/health")  # probes come every few seconds
    first, second = [record.getMessage() for record in caplog.records]
    line = (
        r"POST /v1/completions 200 model=book prompt_tokens=4 new_tokens=4 first_token=\d\.\d{3}s duration=\d\.\d{3}s "
    )
    assert re.fullmatch(line + f"finish=length id={response.headers['x-request-id']}", first)
    assert re.fullmatch(r"GET /v1/models%0Aforged 404 duration=\S+ id=\w+", second)
    assert "the " not in first


def test_prompts_are_logged_only_if_asked(served: ServedModel, caplog: pytest.LogCaptureFixture) -> None:
    client = client_of(served, log_prompts=True)
    with caplog.at_level(logging.INFO, "MyGPT.serving"):
        complete(client, prompt="the fox\n")
    assert (
        caplog.records[0].getMessage().endswith(r'prompts=["the fox\n"]') and "\n" not in caplog.records[0].getMessage()
    )


def test_the_metrics_count_requests_and_tokens(client: TestClient) -> None:
    before = metric(client, "mygpt_generated_tokens_total", model="book")
    complete(client)
    client.get("/nothing/1")
    client.get("/nothing/2")
    assert metric(client, "mygpt_generated_tokens_total", model="book") - before == 4
    assert metric(client, "mygpt_http_requests_total", path="/v1/completions", status="200") == 1
    assert metric(client, "mygpt_http_requests_total", path="other", status="404") == 2  # no label for each path
    assert metric(client, "mygpt_time_to_first_token_seconds_count", model="book") == 1
    assert metric(client, "mygpt_tokens_per_second_count", model="book") == 1
    assert metric(client, "mygpt_http_request_duration_seconds_count", path="/v1/completions") == 1
    assert metric(client, "mygpt_queue_length") == metric(client, "mygpt_requests_running") == 0
    assert metric(client, "mygpt_slots") == 2 and metric(client, "mygpt_cache_capacity_tokens") == 128
    assert 0 < metric(client, "mygpt_cache_tokens") <= 128


def test_a_full_queue_is_429_and_what_was_queued_before_is_cancelled(client: TestClient, served: ServedModel) -> None:
    response = complete(client, n=20)  # two slots, and three may wait
    assert (response.status_code, code_of(response)) == (429, "queue_full")
    assert int(response.headers["retry-after"]) > 0
    wait_until_idle(served)
    assert complete(client).status_code == 200


def test_a_request_ends_at_its_deadline(served: ServedModel) -> None:
    client = client_of(served, request_timeout=0.001)
    response = complete(client, max_tokens=60)
    assert (response.status_code, code_of(response)) == (504, "timeout")
    events = complete(client, max_tokens=60, stream=True).text.split("\n\n")
    assert json.loads(events[-2].removeprefix("data: "))["error"]["code"] == "timeout"
    wait_until_idle(served)


def test_a_closed_engine_is_503(served: ServedModel) -> None:
    with Engine(served.gpt, served.tokenizer, slots=1) as engine:
        client = client_of(replace(served, engine=engine))
    response = complete(client)
    assert (response.status_code, code_of(response)) == (503, "server_stopping")


def leave_early(app: Any, path: str, body: bytes, at_once: bool, after: Callable[[], object] = bool) -> None:
    """Call the application as a client that leaves at once, or while it is sent the first piece of the answer."""

    async def run() -> None:
        pieces, left = [{"type": "http.request", "body": body, "more_body": False}], asyncio.Event()

        async def receive() -> Any:
            if pieces:
                return pieces.pop()
            if not at_once:
                await left.wait()
            return {"type": "http.disconnect"}

        async def send(message: Any) -> None:
            if message.get("body"):
                left.set()
                await asyncio.sleep(60)  # a client that has left reads nothing, so sending waits

        headers = [(b"host", b"127.0.0.1")]
        scope = {"type": "http", "method": "POST", "path": path, "headers": headers, "query_string": b""}
        await asyncio.wait_for(app(scope, receive, send), 10)
        after()

    asyncio.run(run())


@pytest.mark.parametrize("streams", [True, False])
def test_a_client_that_leaves_cancels_its_requests(served: ServedModel, streams: bool) -> None:
    app = create_app({"book": served}, Settings())
    body = json.dumps({"model": "book", "prompt": "a", "max_tokens": 60, "n": 3, "stream": streams}).encode()
    before = served.engine.stats()["generated_tokens"]
    leave_early(app, "/v1/completions", body, at_once=not streams)
    wait_until_idle(served)
    assert served.engine.stats()["generated_tokens"] - before < 180
    assert app.state.status.active == 0


def test_the_events_of_a_client_that_leaves_are_closed(served: ServedModel) -> None:
    steps = []

    async def events() -> AsyncGenerator[str]:
        try:
            while True:
                yield "1"
        finally:
            steps.append("closed")

    kept = events()  # a reference, so that the garbage collector does not close it

    async def stream(request: HTTPRequest) -> Response:
        return event_stream(request, kept)

    app = client_of(served, Route("/stream", stream, methods=["POST"])).app
    leave_early(app, "/stream", b"", False, after=lambda: steps.append("answered"))
    assert steps == ["closed", "answered"]


def test_requests_that_were_submitted_end_with_the_response(served: ServedModel) -> None:
    async def forget(request: HTTPRequest) -> Response:
        model = find_model(request)
        await submit(request, model, [1], max_new_tokens=60)
        return Response("done")

    assert client_of(served, Route("/forget", forget)).get("/forget").text == "done"
    wait_until_idle(served)


def test_the_page_is_protected_from_other_pages(client: TestClient) -> None:
    headers = client.get("/").headers
    assert headers["content-type"].startswith("text/html")
    assert "frame-ancestors 'none'" in headers["content-security-policy"]
    assert headers["x-content-type-options"] == client.get("/v1/models").headers["x-content-type-options"] == "nosniff"
    assert headers["cross-origin-resource-policy"] == "same-origin"


def wait_until_idle(served: ServedModel) -> None:
    """Wait until the engine has no requests, and fail if it still has some after five seconds."""
    end = time.monotonic() + 5
    while (stats := served.engine.stats())["running"] or stats["waiting"]:
        assert time.monotonic() < end, stats
        time.sleep(0.001)
