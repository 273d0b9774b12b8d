"""`mygpt serve`: answer requests over HTTP in the format of OpenAI's API."""

from __future__ import annotations

import contextlib
import importlib.util
import os
import re
import sys
import threading
from pathlib import Path
from typing import TYPE_CHECKING, Any

from MyGPT.config import Precision, require_positive

if TYPE_CHECKING:
    from MyGPT.serving.models import ServedModel, Settings

COMMON = "model host port api_key slots request_timeout device precision".split()
_PACKAGES = ("starlette", "uvicorn", "prometheus_client", "pydantic")


def serve(
    model: str | list[str],
    host: str = "127.0.0.1",
    port: int = 8000,
    api_key: str | None = None,
    slots: int = 16,
    max_queue: int = 256,
    request_timeout: float = 600.0,
    drain_timeout: float = 30.0,
    allowed_hosts: str | list[str] = [],  # noqa: B006 (nothing changes it, and --help shows no default)
    cors_origins: str | list[str] = [],  # noqa: B006
    log_prompts: bool = False,
    device: str = "auto",
    precision: Precision = "auto",
    with_: str | None = None,
) -> None:
    """Serve models over HTTP, with OpenAI's API under /v1 and a page for the browser at /.

    After SIGTERM, the server finishes its requests and exits. A second SIGTERM, or Ctrl-C, stops it at once.

    Examples:
        mygpt serve --model runs/book
        mygpt serve --model runs/book --model small=gpt2 --port 9000

    Args:
        model: A released model such as gpt2, or the path of a run, a model directory or a checkpoint file. Repeat the option
            for several models. NAME=MODEL chooses the name that clients use.
        host: The address to listen on. An address that other machines can reach requires --api_key.
        port: The port to listen on; 0 chooses a free one.
        api_key: The key that clients must send. Other users of this machine can see command lines, so the environment variable
            MYGPT_API_KEY is safer.
        slots: Number of texts that are generated at the same time. Each slot needs memory for the keys and values of one context.
        max_queue: Number of texts that may wait for a slot. Further requests are refused with status 429.
        request_timeout: Seconds after which an unfinished request ends with an error.
        drain_timeout: Seconds that requests may take to finish after SIGTERM.
        allowed_hosts: Additional host names that clients may use in the URL of this server, or "*" for any name.
        cors_origins: Other web pages that may use this server, such as https://example.com, or "*" for all.
        log_prompts: Write prompts into the log.
    """
    models, settings = list_models(_as_list(model)), check_settings(
        host, api_key, request_timeout, _as_list(allowed_hosts), _as_list(cors_origins), log_prompts
    )  # fmt: skip
    require_positive(slots=slots, max_queue=max_queue)
    if not 0 <= port <= 65535:
        raise ValueError(f"port must be a whole number from 0 to 65535, got {port}")
    if drain_timeout < 0:
        raise ValueError(f"drain_timeout must be a number of seconds of at least 0, got {drain_timeout}")

    from MyGPT.serving.app import create_app, log_to_stderr, url_host
    from MyGPT.serving.server import Server, bind
    from MyGPT.training.interrupts import Stopped

    with contextlib.closing(bind(host, port)) as listener:
        served = open_models(models, slots, max_queue, device, precision, with_)
        log_to_stderr()
        url = f"http://{url_host(host)}:{listener.getsockname()[1]}"
        server = Server(create_app(served, settings), drain_timeout, lambda: announce(url, served, settings))
        server.run([listener])
    if server.stopped_by is not None:
        raise Stopped("stopped", server.stopped_by)


def check_settings(
    host: str,
    api_key: str | None,
    request_timeout: float,
    allowed_hosts: list[str],
    cors_origins: list[str],
    log_prompts: bool,
) -> Settings:
    """Return the settings of the server. Raises ValueError for a wrong or unsafe setting, before a model is opened."""
    missing = [package for package in _PACKAGES if importlib.util.find_spec(package) is None]
    if missing:
        raise ValueError(f"mygpt serve needs {' and '.join(missing)}: pip install 'mygpt[serve]'")

    from MyGPT.serving.models import Settings

    source = "--api_key"
    if api_key is None and "MYGPT_API_KEY" in os.environ:
        source, api_key = "MYGPT_API_KEY", os.environ["MYGPT_API_KEY"]
    if api_key is not None and not re.fullmatch(r"[!-~]+", api_key):
        raise ValueError(f"{source} must have at least one character, and only visible ones of ASCII")
    if api_key is None and not _is_loopback(host):
        way_out = "give a key with --api_key or in the environment variable MYGPT_API_KEY"
        raise ValueError(f"other machines can reach the address {host}, so clients must have a key: {way_out}")
    if not 0 < request_timeout < float("inf"):
        raise ValueError(f"request_timeout must be a number of seconds above 0, got {request_timeout}")
    for origin in cors_origins:
        if origin != "*" and not re.fullmatch(r"https?://[^/\s]+", origin):
            raise ValueError(
                f"cors_origins must be origins such as https://example.com, without a path, got {origin!r}"
            )
    for name in allowed_hosts:
        if name != "*" and not re.fullmatch(r"[\w.-]+|\[[\da-fA-F:.]+\]", name):
            raise ValueError(f"allowed_hosts must be names such as gpt.example.com, without a port, got {name!r}")
    hosts = (*Settings().allowed_hosts, *allowed_hosts)
    return Settings(
        host=host,
        api_key=api_key,
        allowed_hosts=hosts,
        cors_origins=tuple(cors_origins),
        request_timeout=request_timeout,
        log_prompts=log_prompts,
    )


def list_models(given: list[str]) -> dict[str, str]:
    """Return a dict from the name that clients use to the path or released name of each model.

    The name of runs/book is "book". The name of a file has no suffix. NAME=MODEL chooses another name. Raises ValueError if
    two models have the same name.
    """
    models: dict[str, str] = {}
    for text in given:
        name, equals, path = text.partition("=")
        if not equals or os.path.exists(text):
            path = text
            place = Path(path).resolve() if os.path.exists(path) else Path(path)
            name = place.stem if place.is_file() else place.name
        if not re.fullmatch(r"[\w.:/-]+", name) or not path:
            raise ValueError(
                f"a model needs a name of letters, digits and the characters - _ . : / as in NAME={text!r}"
            )
        if name in models:
            raise ValueError(
                f"the models {models[name]} and {path} have the same name {name!r}: choose another one, as in --model "
                f"other={path}"
            )
        models[name] = path
    if not models:
        raise ValueError("give at least one model with --model")
    return models


def open_models(
    models: dict[str, str],
    slots: int,
    max_queue: int,
    device: str,
    precision: Precision,
    parts: str | None = None,
) -> dict[str, ServedModel]:
    """Open models and start their engines. `parts` is the file with the custom parts of all models, or None.

    Raises MemoryError if the machine has too little memory for the slots.
    """
    from MyGPT.commands._model import make_fast, report_tokenizer, start_build
    from MyGPT.costs import cache_bytes
    from MyGPT.files import reading
    from MyGPT.opening import find_model_files, open_model
    from MyGPT.serving.engine import Engine
    from MyGPT.serving.models import ServedModel
    from MyGPT.weights.formats import open_checkpoint

    build = start_build(device, precision) if parts is None else None
    # Engines that compute at the same time would take each other's cores.
    lock = threading.Lock() if len(models) > 1 else None
    served = {}
    for name, path in models.items():
        with reading(path):
            gpt, tokenizer = open_model(path, device, parts=parts)
            report_tokenizer(tokenizer)
            template = find_model_files(path).template()
            weight = gpt.transformer.wte.weight
            on_cpu_alone = weight.device.type == "cpu" and find_model_files(path).adapter is None and parts is None
            source = open_checkpoint(find_model_files(path).path) if on_cpu_alone else gpt
            fast: Any = make_fast(source, precision, False, build)
        itemsize = 4 if weight.device.type == "cpu" else weight.itemsize  # an accelerated model's cache is in float32
        n_bytes = slots * gpt.config.context_length * cache_bytes(gpt.config, itemsize)
        require_memory_for_slots(name, n_bytes, weight.device)
        engine = Engine(fast, tokenizer, slots, max_queue=max_queue, lock=lock)
        served[name] = ServedModel(name, engine, tokenizer, gpt, template)
    return served


def require_memory_for_slots(name: str, n_bytes: int, device: Any) -> None:
    """Raise MemoryError if the slots of a model can never fit into memory, and print a note if they do not fit now."""
    from MyGPT.commands._findings import free_memory
    from MyGPT.commands._memory import require_memory

    if device.type == "cpu":
        require_memory(n_bytes)
    free = free_memory(device)
    if free is not None and n_bytes > free:
        amounts = f"{n_bytes / 1e9:,.2g} GB when all are full, and {free / 1e9:,.2g} GB are free"
        print(f"note: the slots of {name} need {amounts}: lower --slots", file=sys.stderr)


def announce(url: str, served: dict[str, ServedModel], settings: Settings) -> None:
    """Print the address, the models and the memory of the slots."""
    print(f"Serving at {url} (Ctrl-C stops)")
    for name, model in served.items():
        engine, config = model.engine, model.gpt.config
        n_slots = engine.stats()["slots"]
        memory = f"{n_slots} slots x {config.context_length:,} tokens: up to {_size(engine.cache_bytes)}"
        chat = "with" if model.template is not None else "without"
        print(f"  model {name}: {model.gpt.num_parameters() / 1e6:,.1f}M parameters, {chat} a chat template; {memory}")
    print(f"  page  {url}/")
    print(f"  API   {url}/v1{', with the key' if settings.api_key is not None else ''}", flush=True)


def _size(n_bytes: int) -> str:
    return f"{n_bytes / 1e9:,.2g} GB" if n_bytes >= 1e8 else f"{n_bytes / 1e6:,.2g} MB"


def _as_list(value: str | list[str]) -> list[str]:
    return [value] if isinstance(value, str) else list(value)


def _is_loopback(host: str) -> bool:
    """Return whether only programs on this machine can reach the address."""
    import ipaddress

    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host.lower() == "localhost"
