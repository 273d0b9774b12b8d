"""A server of the HTTP API in a thread, on a free port of 127.0.0.1, for tests with real clients."""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterator

import uvicorn

from MyGPT.serving.app import create_app
from MyGPT.serving.models import ServedModel, Settings


@contextlib.contextmanager
def running(models: dict[str, ServedModel], settings: Settings | None = None) -> Iterator[str]:
    """Serve models and yield the server's address, such as http://127.0.0.1:40001. The engines stay open."""
    app = create_app(models, settings)
    server = uvicorn.Server(uvicorn.Config(app, log_level="warning", lifespan="off", timeout_graceful_shutdown=1))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        deadline = time.monotonic() + 30
        while not server.started:
            assert time.monotonic() < deadline and thread.is_alive()
            time.sleep(0.005)
        try:
            yield f"http://127.0.0.1:{listener.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join(10)


@contextlib.contextmanager
def serving(*models: ServedModel, settings: Settings | None = None) -> Iterator[str]:
    """Serve models and yield the server's address. The engines are closed at the end."""
    try:
        with running({served.name: served for served in models}, settings) as address:
            yield address
    finally:
        for served in models:
            served.engine.close()
