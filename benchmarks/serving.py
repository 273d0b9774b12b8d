"""Compare HTTP servers that answer many clients with a random GPT-2: MyGPT, llama.cpp and transformers.

Usage: python benchmarks/serving.py [--quick] [--llama_server PATH] [--transformers PATH] [--clients 1 4 16 64] [--rounds 3]
       [--directory DIR] [--minutes 10] [--out DIR]

Every client sends its next request as soon as the last one has ended (a closed loop). A request streams /v1/completions at
temperature 0 and always generates --tokens tokens. The prompts of a mix have 10 to 900 tokens of "Alice in Wonderland" in
eight geometric steps; each group of eight requests has one of each length, in random order, and no prompt is sent twice to
one server. All programs get the same prompts in the same order. "short" cases have prompts of 16 tokens, as `mygpt bench`.

Two limits are measured without HTTP: "MyGPT engine" sends the same requests to MyGPT.serving.Engine, and "MyGPT generate"
generates the short prompts as one batch. In each round every program is started, warmed up, measured and ended; they take
turns, so a slow minute of the machine affects all of them, and an idle program disturbs no other. Requests that have not
ended after --limit seconds are stopped; a star marks such a measurement, and its program is left out of later rounds, as is
a program that cannot be started. --quick measures 1 and 16 clients in two rounds, which takes about ten minutes on two
cores; everything takes half an hour. The load goes to 127.0.0.1 only.

The client is one asyncio process that reads the streams itself. Its share of one core is part of the results, and its
highest speed is measured with a server that sends the events of an answer at once.

llama.cpp: build the target llama-server with cmake and GGML_NATIVE=ON (the source archive of llama-cpp-python on PyPI has
llama.cpp's source in vendor/), name it with --llama_server, and install gguf, which writes its model. transformers:
pip install 'transformers[serving]', here or in another environment whose command is named with --transformers. By default
it generates one answer after another; "batched" has its option --continuous-batching.
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import itertools
import json
import math
import os
import random
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import torch
from decode import Child, write_gguf
from measurements import Results, parse, rounds
from tables import show

from MyGPT import GPT2_CONFIGS, GPTModel, accelerate, generate, get_tokenizer
from MyGPT.commands.bench import read_bandwidth
from MyGPT.data.sources import find_files, read_documents

PROGRAMS = (
    "MyGPT fp32", "MyGPT int8", "MyGPT engine fp32", "MyGPT engine int8", "MyGPT generate fp32", "MyGPT generate int8",
    "llama.cpp f32", "llama.cpp q8_0", "transformers fp32", "transformers batched",
)  # fmt: skip
LENGTHS = [round(10 * 90 ** (i / 7)) for i in range(8)]
"""The lengths of the prompts of a mix: 10 to 900 tokens."""
SHORT = 16
HOST = "127.0.0.1"
TARGETS = (
    ("MyGPT fp32", "llama.cpp f32", "1 client", 1.0),
    ("MyGPT int8", "llama.cpp q8_0", "1 client", 1.0),
    ("MyGPT fp32", "llama.cpp f32", "16 clients", 2.0),
    ("MyGPT int8", "llama.cpp q8_0", "16 clients", 2.0),
    ("MyGPT fp32", "MyGPT engine fp32", "16 clients", 0.9),
    ("MyGPT int8", "MyGPT engine int8", "16 clients", 0.9),
    ("MyGPT fp32", "MyGPT generate fp32", "short, 16 clients", 0.9),
    ("MyGPT int8", "MyGPT generate int8", "short, 16 clients", 0.9),
)
"""Two programs, a case, and the smallest ratio of their speeds that we want."""

Answer = list[float]
"""The measurement of one request: the times of sending it, of its first token and of its last token, and the number of tokens.
Times are seconds since the start of the measurement."""
Ask = Callable[[str, Answer], Any]
"""A coroutine function that sends one prompt and fills in the answer."""


def case_name(workload: str, clients: int) -> str:
    name = f"{clients} client" + "s" * (clients > 1)
    return name if workload == "mix" else f"short, {name}"


def prompts_of(workload: str, clients: int, ids: list[int]) -> list[list[int]]:
    """Return the prompts of a case, as parts of the text `ids`. They depend on nothing else."""
    rng = random.Random(f"{workload} {clients}")
    n = {1: 8, 4: 16, 16: 32, 64: 96}.get(clients, 8 * math.ceil(clients / 4))
    blocks = [rng.sample(LENGTHS, len(LENGTHS)) for _ in range(n // len(LENGTHS))]
    lengths = list(itertools.chain(*blocks)) if workload == "mix" else [SHORT] * max(2, 2 * clients)
    starts = [rng.randrange(len(ids) - length) for length in lengths]
    return [ids[start : start + length] for start, length in zip(starts, lengths, strict=True)]


async def closed_loop(prompts: list[Any], clients: int, ask: Ask, limit: float) -> dict[str, Any]:
    """Let the clients send all prompts, and return the answers in the order of the prompts, and the time that it took."""
    answers: list[Answer] = [[] for _ in prompts]
    jobs = iter(zip(prompts, answers, strict=True))

    async def client() -> None:
        for prompt, answer in jobs:
            await ask(prompt, answer)

    start, cpu = time.perf_counter(), time.process_time()
    tasks = [asyncio.create_task(client()) for _ in range(clients)]
    done, pending = await asyncio.wait(tasks, timeout=limit, return_when=asyncio.FIRST_EXCEPTION)
    seconds = time.perf_counter() - start
    for task in pending:
        task.cancel()
    await asyncio.gather(*pending, return_exceptions=True)
    for task in done:
        task.result()  # raises the error of a client
    cpu = time.process_time() - cpu
    rounded = [[round(t - start, 4) if t else None for t in answer[:3]] + answer[3:] for answer in answers if answer]
    return {"seconds": seconds, "client_cpu": cpu / seconds, "answers": rounded, "complete": not pending}


class Server:
    """A program that answers over HTTP."""

    def __init__(
        self, command: list[str], fields: dict[str, Any], ready: str, environment: dict[str, str], log: Path
    ) -> None:
        """Start the program, in whose arguments "PORT" stands for a free port, and wait until `ready` can be fetched."""
        with socket.socket() as probe:
            probe.bind((HOST, 0))
            self.port = probe.getsockname()[1]
        self.fields, self.log = fields, log
        with log.open("w") as file:
            self.process = subprocess.Popen(
                [part.replace("PORT", str(self.port)) for part in command], env=environment, stdout=file, stderr=file
            )
        deadline = time.monotonic() + 120
        while not self.is_ready(ready):
            if self.process.poll() is not None or time.monotonic() > deadline:
                self.close()
                lines = log.read_text(errors="replace").strip().splitlines() or ["no message"]
                raise RuntimeError(lines[-1])
            time.sleep(0.05)

    def is_ready(self, path: str) -> bool:
        try:
            with urllib.request.urlopen(f"http://{HOST}:{self.port}{path}", timeout=5):
                return True
        except (urllib.error.URLError, OSError):
            return False

    def run(self, prompts: list[str], clients: int, tokens: int, limit: float) -> dict[str, Any]:
        async def ask(prompt: str, answer: Answer) -> None:
            await stream_completion(self.port, {**self.fields, "prompt": prompt, "max_tokens": tokens}, answer)
            if answer[3] != tokens:
                raise RuntimeError(f"an answer has {answer[3]} tokens instead of {tokens}")

        return asyncio.run(closed_loop(prompts, clients, ask, limit))

    def close(self) -> None:
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()


async def stream_completion(port: int, fields: dict[str, Any], answer: Answer) -> None:
    """Send one request, and write into `answer` when it was sent, when tokens came, and their number."""
    body = json.dumps({**fields, "temperature": 0, "stream": True}).encode()
    head = f"POST /v1/completions HTTP/1.1\r\nHost: {HOST}:{port}\r\nContent-Type: application/json\r\n"
    head += f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
    answer += [time.perf_counter(), 0.0, 0.0, 0]
    reader, writer = await asyncio.open_connection(HOST, port)
    try:
        writer.write(head.encode() + body)
        status = await reader.readline()
        headers = (await reader.readuntil(b"\r\n\r\n")).lower()
        if b" 200 " not in status:
            raise RuntimeError(f"{status.decode().strip()}: {(await reader.read(1000)).decode(errors='replace')}")
        async for event in events(reader, b"transfer-encoding: chunked" in headers):
            if event.startswith(b"data: {"):
                content = json.loads(event[6:])
                if "error" in content:
                    raise RuntimeError(str(content["error"]))
                if content["choices"]:
                    answer[2] = time.perf_counter()
                    answer[3] += 1
                    answer[1] = answer[1] or answer[2]
                # A server may send several tokens in one event, or an event without a token at the end.
                answer[3] = (content.get("usage") or {}).get("completion_tokens", answer[3])
    finally:
        writer.close()


async def events(reader: asyncio.StreamReader, is_chunked: bool) -> AsyncIterator[bytes]:
    """Yield the server-sent events of a response."""
    rest = b""
    while True:
        if is_chunked:
            size = int((await reader.readline()).split(b";")[0], 16)
            data = (await reader.readexactly(size + 2))[:-2]
        else:
            data = await reader.read(1 << 16)
        if not data:
            return
        *complete, rest = (rest + data).split(b"\n\n")
        for event in complete:
            yield event


class Limit(Child):
    """A process that measures MyGPT without HTTP."""

    def run(self, prompts: list[str], clients: int, tokens: int, limit: float) -> dict[str, Any]:
        result: dict[str, Any] = self.ask(json.dumps([prompts, clients, tokens, limit]))
        return result

    def close(self) -> None:
        self.process.kill()
        self.process.communicate()


def child(name: str, slots: int, directory: Path) -> None:
    """Open MyGPT's engine or its batch generation, then answer each line on standard input with one measurement."""
    _, program, kind = name.split()
    tokenizer = get_tokenizer("gpt2")
    fast = accelerate(GPTModel.from_pretrained(directory / "model"), kind)  # type: ignore[arg-type]

    def generate_batch(prompts: list[str], clients: int, tokens: int, limit: float) -> dict[str, Any]:
        start = time.perf_counter()
        n = len(prompts) // clients
        for i in range(n):
            ids = [tokenizer.encode(prompt)[:SHORT] for prompt in prompts[i * clients : (i + 1) * clients]]
            shortest = min(map(len, ids))  # a part of a text may have fewer tokens than it had in the text
            generate(fast, torch.tensor([row[:shortest] for row in ids]), tokens)
        seconds = time.perf_counter() - start
        return {"seconds": seconds, "answers": [[0, None, seconds, tokens]] * n * clients, "complete": True}

    def run_engine(prompts: list[str], clients: int, tokens: int, limit: float) -> dict[str, Any]:
        async def ask(prompt: str, answer: Answer) -> None:
            answer += [time.perf_counter(), 0.0, 0.0, 0]
            offset = answer[0] - time.monotonic()
            request = engine.submit(prompt, max_new_tokens=tokens, logprobs=None, eos_id=None)
            try:
                await request.wait()
            finally:
                request.cancel()
                answer[1:] = [(request.first_token or -offset) + offset, time.perf_counter(), len(request.tokens)]

        found = asyncio.run(closed_loop(prompts, clients, ask, limit))
        del found["client_cpu"]  # mostly the engine's
        return found

    if program == "engine":
        from MyGPT.serving import Engine

        engine = Engine(fast, tokenizer, slots)
    print(json.dumps("open"), flush=True)
    for line in sys.stdin:
        run = run_engine if program == "engine" else generate_batch
        print(json.dumps(run(*json.loads(line))), flush=True)


async def send_at_once(port: int, tokens: int) -> None:
    """Answer every request with all events at once, to measure the client alone."""
    event = json.dumps(
        {"id": "x", "object": "text_completion", "choices": [{"index": 0, "text": " word", "logprobs": None}]}
    )
    data = f"data: {event}\n\n".encode()

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        with contextlib.suppress(asyncio.IncompleteReadError):
            head = (await reader.readuntil(b"\r\n\r\n")).lower()
            if head.startswith(b"post"):
                await reader.readexactly(int(head.split(b"content-length:")[1].split(b"\r\n")[0]))
            writer.write(b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n")
            writer.write((b"%x\r\n%s\r\n" % (len(data), data)) * tokens + b"0\r\n\r\n")
        writer.close()

    async with await asyncio.start_server(answer, HOST, port) as server:
        await server.serve_forever()


def open_program(name: str, slots: int, options: argparse.Namespace) -> Server | Limit:
    directory: Path = options.directory
    model = str(directory / "model")
    threads = str(options.threads)
    environment = {**os.environ, "OMP_NUM_THREADS": threads, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    program, kind = name.split(maxsplit=1)
    log = directory / f"{name.replace(' ', '_')}.log"
    usage = {"stream_options": {"include_usage": True}}
    if name == "the client alone":
        command = [sys.executable, __file__, "--program", name, "--slots", "PORT", "--tokens", str(options.tokens)]
        return Server(command, {}, "/", environment, log)
    if program == "MyGPT" and " " in kind:
        command = [sys.executable, __file__, "--program", name, "--slots", str(slots), "--directory", str(directory)]
        return Limit(command, environment)
    if program == "MyGPT":
        command = [sys.executable, "-m", "MyGPT", "serve", "--model", model, "--port", "PORT", "--precision", kind]
        fields = {"model": "model", "ignore_eos": True, **usage}
        return Server([*command, "--slots", str(slots)], fields, "/ready", environment, log)
    if program == "transformers":
        command = [options.transformers, "serve", model, "--host", HOST, "--port", "PORT", "--device", "cpu"]
        settings = {"max_new_tokens": options.tokens, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
        fields = {"generation_config": json.dumps(settings)}
        command += ["--dtype", "float32", *["--continuous-batching"] * (kind == "batched")]
        return Server(command, fields, "/health", environment, log)
    if options.llama_server is None:
        raise RuntimeError("--llama_server does not name it")
    path = directory / f"serving-{kind}.gguf"
    if not path.exists():
        write_gguf(GPTModel.from_pretrained(model), path, kind, directory / "model/tokenizer.json")
    command = [options.llama_server, "--model", str(path), "--host", HOST, "--port", "PORT", "--threads", threads]
    command += ["--parallel", str(slots), "--ctx-size", str(1024 * slots), "--no-webui"]
    return Server(command, {"ignore_eos": True, **usage}, "/health", environment, log)


def measure(options: argparse.Namespace) -> Results:
    """Measure every program in every round, and save the results after each program."""
    tokenizer = get_tokenizer("gpt2")
    ids = tokenizer.encode("".join(read_documents(find_files("alice"))))
    cases = [("mix", n) for n in options.clients] + [("short", n) for n in options.clients if n in (1, 16)]
    results = Results(
        "serving", {"size": options.size, "tokens": options.tokens, "threads": options.threads}, ["transformers"]
    )
    if options.llama_server is not None:
        with contextlib.suppress(OSError):
            said = subprocess.run([options.llama_server, "--version"], capture_output=True, text=True)
            results.versions["llama.cpp"] = (said.stdout + said.stderr).splitlines()[0].removeprefix("version: ")
    for target in TARGETS:
        results.compare(*target)
    left_out = set()
    with contextlib.closing(open_program("the client alone", 1, options)) as server:
        store(
            results,
            "the client alone",
            server.run(["word " * 200] * 2000, 16, options.tokens, options.limit),
            "16 clients",
        )
    for turn in rounds(options):
        results.add("memory", "bandwidth", "bytes/s", read_bandwidth())
        for name in options.programs:
            mine = [case for case in cases if " generate " not in name or case[0] == "short"]
            if name in left_out or not mine:
                continue
            print(f"round {turn} of {options.rounds}: {name}", file=sys.stderr, flush=True)
            try:
                with contextlib.closing(open_program(name, max(options.clients), options)) as program:
                    program.run([tokenizer.decode(ids[-64 * (i + 1) :][:64]) for i in range(2)], 2, 4, options.limit)
                    for workload, clients in mine:
                        prompts = [tokenizer.decode(prompt) for prompt in prompts_of(workload, clients, ids)]
                        found = program.run(prompts, clients, options.tokens, options.limit)
                        store(results, name, found, case_name(workload, clients))
                        if not found["complete"]:
                            left_out.add(name)
            except (ImportError, OSError, RuntimeError) as error:
                print(f"{name} is left out: {error}", file=sys.stderr, flush=True)
                left_out.add(name)
            results.save(options.out)
    return results


def store(results: Results, name: str, found: dict[str, Any], case: str) -> None:
    """Store the speed of one measurement, the time to the first token of each answer, and the client's share of a core.

    A request without a token waited until it was stopped.
    """
    about = {} if found["complete"] else {"stopped": True}
    results.add(name, case, "tokens/s", sum(answer[3] for answer in found["answers"]) / found["seconds"], **about)
    if "client_cpu" in found:
        results.add(name, f"{case}, the client's share of a core", "", found["client_cpu"])
    if " generate " not in name and name != "the client alone":
        waits = ((found["seconds"] if first is None else first) - sent for sent, first, *_ in found["answers"])
        results.add(name, f"{case}, first token", "s", *waits)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M")
    parser.add_argument("--clients", type=int, nargs="+", default=[1, 4, 16, 64])
    parser.add_argument("--tokens", type=int, default=32)
    parser.add_argument("--limit", type=float, default=40, help="seconds after which a measurement is stopped")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true", help="measure 1 and 16 clients in two rounds")
    parser.add_argument("--programs", nargs="+", default=list(PROGRAMS))
    parser.add_argument("--llama_server", help="the path of llama.cpp's program llama-server")
    parser.add_argument("--transformers", default="transformers", help="the path of transformers' command")
    parser.add_argument("--directory", type=Path, default=Path("bench-models"))
    parser.add_argument("--program", help=argparse.SUPPRESS)  # in a process of its own
    parser.add_argument("--slots", type=int, help=argparse.SUPPRESS)
    options = parse(parser, rounds=3)
    if options.program == "the client alone":
        asyncio.run(send_at_once(options.slots, options.tokens))
        return
    if options.program:
        child(options.program, options.slots, options.directory)
        return
    if options.quick:
        options.clients, options.rounds = [1, 16], 2
    if not (options.directory / "model").exists():
        torch.manual_seed(1)
        GPTModel(GPT2_CONFIGS[options.size]).save_pretrained(options.directory / "model", get_tokenizer("gpt2"))
    show(measure(options))


if __name__ == "__main__":
    main()
