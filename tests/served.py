"""Run `mygpt serve` in a process of its own, for the tests of documentation."""

from __future__ import annotations

import contextlib
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator


def free_port() -> int:
    """Return a port that no program uses now."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


@contextlib.contextmanager
def running_server(arguments: list[str], port: int) -> Iterator[None]:
    """Run `mygpt serve` on a port, and end it with SIGTERM."""
    process = subprocess.Popen([sys.executable, "-m", "MyGPT", *arguments, "--port", str(port)])
    try:
        deadline = time.monotonic() + 60
        while True:
            try:
                urllib.request.urlopen(f"http://127.0.0.1:{port}/ready", timeout=5).close()
                break
            except OSError:
                assert process.poll() is None and time.monotonic() < deadline, "the server does not start"
                time.sleep(0.05)
        yield
        process.terminate()
        assert process.wait(20) in (0, 1)  # 1 on Windows, where processes end without a signal
    finally:
        process.kill()
