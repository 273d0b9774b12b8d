"""Sends thousands of requests to `mygpt serve`, many of them broken, and checks every answer (`make soak`).

Each client is a socket of its own. A tenth of the clients leave in the middle of a stream. Others send half a header, half a
body, a body that is too large, malformed JSON or wrong values, or read their answer slowly. The texts of all others must be
those of `generate`. At the end, the server must have no text left in a slot or in the queue, must have answered every request
that was complete, and must not have grown.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import random
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
import torch

from MyGPT.acceleration.step import accelerate
from MyGPT.generation import generate
from MyGPT.opening import open_model
from serve_process import ServeProcess, save_tiny_model

HOST = "127.0.0.1"
CLIENTS = 24
"""Number of requests at the same time."""
SLOTS = 8
MAX_GROWTH = 30e6
"""Bytes by which the server's memory may grow between the first fifth of the requests and the end."""
SHARES = {
    "whole": 40, "stream": 26, "leave": 10, "half header": 4, "half body": 4, "too large": 4, "malformed": 4, "wrong": 4,
    "slow": 4,
}  # fmt: skip
"""The kinds of clients, in percent."""


@dataclass
class Soak:
    """The expected answers, and counts of what happened."""

    process: ServeProcess
    expected: list[tuple[dict[str, Any], str]]
    """Fields of a request, and the text that it must give."""
    done: Counter[str] = field(default_factory=Counter)
    statuses: Counter[int] = field(default_factory=Counter)
    """The statuses of complete requests whose clients have read the answer."""
    wrong: list[str] = field(default_factory=list)

    async def client(self, kind: str, rng: random.Random) -> None:
        """Send one request, and check the answer."""
        fields, text = rng.choice(self.expected)
        actions: dict[str, Callable[[], Awaitable[str | None]]] = {
            "whole": lambda: self.complete(fields, text),
            "stream": lambda: self.complete({**fields, "stream": True}, text),
            "slow": lambda: self.complete({**fields, "stream": True}, text, pause=0.02),
            "leave": lambda: self.leave(rng),
            "half header": lambda: self.half(b"POST /v1/completions HTTP/1.1\r\nHost: loc"[: rng.randint(0, 40)], None),
            "half body": lambda: self.half(_post(b'{"model": "tiny", "prompt": "a"}')[:-1], 408),
            "too large": lambda: self.status(b" " * rng.randint(4 << 20, 8 << 20) + b"{}", 413),
            "malformed": lambda: self.status(rng.choice([b"", b"{", b'{"prompt": "a"', b"\xff\xfe", b"[" * 9999]), 400),
            "wrong": lambda: self.status(json.dumps({"model": "tiny", "prompt": "a", **_wrong(rng)}).encode(), 400),
        }
        try:
            problem = await asyncio.wait_for(actions[kind](), 120)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, ValueError, KeyError, IndexError) as error:
            problem = f"{type(error).__name__}: {error}"
        self.done[kind] += 1
        if problem is not None:
            self.wrong.append(f"{kind}: {problem}")

    async def complete(self, fields: dict[str, Any], text: str, pause: float = 0.0) -> str | None:
        """Return None if the answer has the expected text, and else what is wrong. A refusal (429) is tried again."""
        body = json.dumps({"model": "tiny", **fields}).encode()
        while True:
            status, answer = await _ask(_post(body), pause)
            self.statuses[status] += 1
            if status != 429:
                break
            await asyncio.sleep(1)  # as its Retry-After says
        if status != 200:
            return f"status {status}: {answer[:200]!r}"
        if fields.get("stream"):
            *events, end, _ = _unchunked(answer).decode().split("\n\n")
            if end != "data: [DONE]":
                return f"the stream ends with {end!r}"
            got = "".join(json.loads(event.removeprefix("data: "))["choices"][0]["text"] for event in events)
        else:
            got = json.loads(answer)["choices"][0]["text"]
        return None if got == text else f"expected {text!r}, got {got!r}"

    async def leave(self, rng: random.Random) -> str | None:
        """Leave a long stream after its first events, half of the time without closing the connection properly."""
        body = json.dumps(
            {"model": "tiny", "prompt": "the ", "max_tokens": 1500, "stream": True, "n": rng.choice([1, 2])}
        )
        reader, writer = await asyncio.open_connection(HOST, self.process.port)
        writer.write(_post(body.encode()))
        await reader.readuntil(b"\r\n\r\n")
        await reader.read(rng.randint(1, 2000))
        if rng.random() < 0.5:
            writer.transport.abort()
        else:
            writer.close()
        return None

    async def half(self, part: bytes, status: int | None) -> str | None:
        """Send a part of a request, and return None if the server then closes the connection with this status."""
        started = time.monotonic()
        got, _ = await _ask(part)
        seconds = time.monotonic() - started
        if got:
            self.statuses[got] += 1
        return None if got == (status or 0) and 5 < seconds < 40 else f"status {got} after {seconds:.1f} s"

    async def status(self, body: bytes, status: int) -> str | None:
        """Return None if a body is answered with this status, in OpenAI's format."""
        got, answer = await _ask(_post(body))
        self.statuses[got] += 1
        is_error = got >= 400 and set(json.loads(answer)["error"]) == {"message", "type", "param", "code"}
        return None if got == status and is_error else f"status {got} instead of {status}: {answer[:200]!r}"


def _wrong(rng: random.Random) -> dict[str, Any]:
    """Return a field with a wrong value."""
    wrong = [
        {"max_tokens": -1},
        {"temperature": "hot"},
        {"n": 0},
        {"logprobs": 21},
        {"prompt": "é"},
        {"stop": 5},
        {"top_p": 2},
    ]
    return rng.choice(wrong)


def _post(body: bytes) -> bytes:
    lines = [
        "POST /v1/completions HTTP/1.1",
        f"Host: {HOST}",
        f"Content-Length: {len(body)}",
        "Connection: close",
        "",
        "",
    ]
    return "\r\n".join(lines).encode() + body


async def _ask(request: bytes, pause: float = 0.0) -> tuple[int, bytes]:
    """Send a request, and return the status and the body of the answer, or the status 0 if there is none.

    With a pause, the answer is read in small pieces, and the client waits so many seconds before each.
    """
    reader, writer = await asyncio.open_connection(HOST, _ask.port, limit=2048 if pause else 1 << 16)  # type: ignore[attr-defined]
    try:
        with contextlib.suppress(ConnectionError):  # the server may answer before it has read everything
            writer.write(request)
            await writer.drain()
        answer = b""
        while piece := await reader.read(512 if pause else 1 << 16):
            answer += piece
            if pause:
                await asyncio.sleep(pause)
    finally:
        writer.close()
        with contextlib.suppress(ConnectionError):
            await writer.wait_closed()
    head, _, body = answer.partition(b"\r\n\r\n")
    return (int(head.split()[1]), body) if answer else (0, b"")


def _unchunked(body: bytes) -> bytes:
    """Return a body without the sizes of its chunks (Transfer-Encoding: chunked)."""
    whole = b""
    while body:
        size, _, body = body.partition(b"\r\n")
        n = int(size, 16)
        whole, body = whole + body[:n], body[n + 2 :]
    return whole


def expected_texts(directory: Path) -> list[tuple[dict[str, Any], str]]:
    """Return requests and the texts that `generate` gives for them."""
    model, tokenizer = open_model(directory, "cpu")
    fast = accelerate(model)
    rng, cases = random.Random(1), []
    for i in range(40):
        prompt = "".join(rng.choices("abcdefghijklmnopqrstuvwxyz ,.", k=rng.choice([1, 5, 20, 200])))
        n, seed = rng.randint(1, 40), rng.randrange(1000)
        options: dict[str, Any] = [{"temperature": 0.0}, {"temperature": 0.8}, {"temperature": 1.2, "top_k": 7}][i % 3]
        ids = tokenizer.encode(prompt)
        whole = generate(fast, torch.tensor([ids]), n, seed=seed, tokenizer=tokenizer, **options)[0].tolist()
        cases.append(
            ({"prompt": prompt, "max_tokens": n, "seed": seed, **options}, tokenizer.decode(whole[len(ids) :]))
        )
    return cases


async def run(soak: Soak, n: int, seed: int, shares: dict[str, int], report: Callable[[int], None]) -> None:
    """Run n clients of random kinds. Those that only wait for a deadline do not count among the CLIENTS at the same time."""
    rng = random.Random(seed)
    places, waiting = asyncio.Semaphore(CLIENTS), asyncio.Semaphore(100)
    n_done = 0

    async def one(kind: str, own: random.Random, place: asyncio.Semaphore) -> None:
        nonlocal n_done
        try:
            await soak.client(kind, own)
        finally:
            place.release()
        n_done += 1
        if n_done % max(1, n // 10) == 0:
            report(n_done)

    async with asyncio.TaskGroup() as group:
        for kind in rng.choices(list(shares), list(shares.values()), k=n):
            place = waiting if kind.startswith("half") else places
            await place.acquire()
            group.create_task(one(kind, random.Random(rng.random()), place))


def soak(n: int, seed: int, directory: Path, shares: dict[str, int] = SHARES) -> list[str]:
    """Run n clients against a server, print the progress, and return what went wrong."""
    model = save_tiny_model(directory / "tiny")
    with ServeProcess(model, directory / "log", "--slots", str(SLOTS), "--max_queue", "32") as process:
        _ask.port = process.port  # type: ignore[attr-defined]
        state = Soak(process, expected_texts(model))
        server, sizes = psutil.Process(process.process.pid), []
        started = time.monotonic()

        def report(n_done: int) -> None:
            sizes.append(server.memory_info().rss)
            seconds = time.monotonic() - started
            numbers = f"{server.num_threads()} threads, {server.num_fds()} files, {len(state.wrong)} wrong"
            print(f"{n_done:6} requests, {seconds:5.0f} s: {sizes[-1] / 1e6:.1f} MB, {numbers}")

        asyncio.run(run(state, n, seed, shares, report))
        values, wrong = process.wait_until_idle(), state.wrong
        statuses = {
            int(sample.labels["status"]): int(sample.value)
            for sample in process.samples()
            if sample.name == "mygpt_http_requests_total" and sample.labels["path"] == "/v1/completions"
        }
        # A client that leaves may do so before the status is sent (499) or after it.
        statuses[200] = statuses.get(200, 0) + statuses.pop(499, 0)
        state.statuses[200] += state.done["leave"]
        if statuses != dict(state.statuses):
            wrong.append(f"the clients saw the statuses {dict(state.statuses)}, the server counted {statuses}")
        if sizes[-1] - max(sizes[:2]) > MAX_GROWTH:
            wrong.append(f"the memory grew from {max(sizes[:2]) / 1e6:.1f} to {sizes[-1] / 1e6:.1f} MB")
        print(f"{dict(state.done)}\nstatuses {statuses}\n{values['mygpt_generated_tokens_total']:,.0f} tokens")
        status = process.stop()
        if status != 0:
            wrong.append(f"the server ended with status {status}")
        log = (directory / "log").read_text()
        if "Traceback" in log:
            wrong.append(f"the log has a traceback: {log[log.index('Traceback') :][:2000]}")
    return wrong


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--n", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as directory:
        wrong = soak(options.n, options.seed, Path(directory))
    print("\n".join(wrong[:20]) or "nothing is wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    sys.exit(main())
