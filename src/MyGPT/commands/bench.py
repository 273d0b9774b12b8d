"""mygpt bench. benchmarks/decode.py measures with the same functions, in a process for each program, beside more peers."""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[["Tensor", int], object]
"""Continues prompts (B, T) by n tokens, greedily."""


def bench(
    model: str | None = None,
    size: str = "124M",
    n_tokens: int = 24,
    prompt: int = 16,
    rounds: int = 3,
    threads: int = 0,
) -> None:
    """Measure how fast this machine generates, beside transformers if it is installed.

    The programs run in turn. A token's time is that of a long continuation less that of one token; the limit is that of
    reading all weights once at the speed at which torch sums a long tensor. Example: mygpt bench --size 124M

    Args:
        model: a model to measure; without one, random weights
        size: of the random weights: 124M, 355M, 774M or 1558M
        n_tokens: how many tokens a measurement generates
        prompt: how many tokens stand before them
        rounds: how often each is measured; the table shows medians
        threads: processor threads; 0 leaves torch's choice
    """
    import torch

    from MyGPT.config import GPT2_CONFIGS
    from MyGPT.model import GPTModel
    from MyGPT.weights.pretrained import find_model

    for name, value in (("n_tokens", n_tokens), ("prompt", prompt), ("rounds", rounds)):
        if value < 1:
            raise ValueError(f"{name} must be at least 1, got {value}")
    if size not in GPT2_CONFIGS:
        raise ValueError(f"size must be one of {', '.join(GPT2_CONFIGS)}, got {size!r}")
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        if model is None:
            GPTModel(GPT2_CONFIGS[size]).save_pretrained(directory)
        gpt = GPTModel.from_pretrained(directory if model is None else find_model(model))
        if prompt + n_tokens + 1 > gpt.config.context_length:
            raise ValueError(f"prompt and n_tokens must fit the model's context of {gpt.config.context_length}")
        peer = directory if model is None else model
        has_peer = Path(peer, "config.json").is_file() and importlib.util.find_spec("transformers") is not None
        programs = {name: open_mygpt(gpt, kind) for name, kind in MYGPT.items()}
        if has_peer:
            programs["transformers fp32"] = open_transformers(peer, "float32")
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, gpt.config.vocab_size, (8, prompt), generator=generator)
    found: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    speeds = []
    for turn in range(rounds + 1):  # the first warms up
        speeds.append(read_bandwidth())
        for name, run in programs.items():
            times = (seconds_a_token(run, ids[:1], n_tokens), seconds_a_token(run, ids, n_tokens))
            if turn:
                found[name].append(times)
    print_table(found, statistics.median(speeds[1:]), gpt)


MYGPT = {
    "the model as it stands": "plain",
    "fp32, no compiler": "eager",
    "fp32": "fp32",
    "bf16": "bf16",
    "int8": "int8",
}
"""What the table calls each way of running MyGPT, and what `open_mygpt` calls it."""


def print_table(found: dict[str, list[tuple[float, float]]], bandwidth: float, gpt: Any) -> None:
    import torch

    n_bytes = {"int8": 1, "bf16": 2}
    # The token embedding is a table of which one row is read, unless the head shares it and reads it all.
    n_read = gpt.num_parameters(exclude_embeddings=True)
    n_read += gpt.transformer.wte.weight.numel() if gpt.config.tie_weights else 0
    print(f"{gpt.num_parameters():,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"memory reads {bandwidth / 1e9:.1f} GB/s; medians, lowest and highest of {len(next(iter(found.values())))}")
    print(f"{'':<24} {'one sequence, tokens/s':>26} {'of the limit':>14} {'eight, tokens/s':>20}")
    for name, times in found.items():
        one, eight = ([B / row[i] for row in times] for i, B in ((0, 1), (1, 8)))
        limit = bandwidth / (n_read * n_bytes.get(name, 4))
        print(
            f"{name:<24} {statistics.median(one):10.1f} ({min(one):.1f} to {max(one):.1f}) "
            f"{statistics.median(one) / limit:12.0%} {statistics.median(eight):10.1f} ({min(eight):.0f} to {max(eight):.0f})"
        )


def open_mygpt(gpt: Any, kind: str) -> Run:
    """kind: "plain" (the model itself), "eager" (float32 without a compiler), or a precision."""
    from MyGPT.acceleration.step import accelerate
    from MyGPT.generation import generate

    fast = gpt
    if kind != "plain":
        fast = accelerate(gpt, "fp32" if kind == "eager" else kind, compiled=kind != "eager")  # type: ignore[arg-type]
    return lambda ids, n: generate(fast, ids, n)


def open_transformers(directory: str, dtype: str) -> Run:
    """transformers' own generate, without an end of text."""
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model.generation_config.eos_token_id = None
    model.generation_config.pad_token_id = 0
    options: dict[str, Any] = {"do_sample": False, "use_cache": True}
    return lambda ids, n: model.generate(
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n, **options
    )


def seconds_a_token(run: Run, ids: Tensor, n: int) -> float:
    """Of the n tokens after the first, in which the prompt is."""
    start = time.perf_counter()
    run(ids, 1)
    middle = time.perf_counter()
    run(ids, n + 1)
    return max(time.perf_counter() - 2 * middle + start, 1e-9) / n


def read_bandwidth(n_bytes: int = 2**28) -> float:
    """Bytes a second at which all threads together read a tensor that no cache holds: the best of five sums."""
    import torch

    numbers = torch.ones(n_bytes // 4)
    best = float("inf")
    for _ in range(5):
        start = time.perf_counter()
        numbers.sum()
        best = min(best, time.perf_counter() - start)
    return n_bytes / best
