"""`mygpt bench`: the speed of generation on this machine.

`benchmarks/decode.py` uses these functions to compare more programs, each of which runs in a process of its own.
"""

from __future__ import annotations

import importlib.util
import statistics
import tempfile
import time
import timeit
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

Run = Callable[["Tensor", int], object]
"""A function run(ids, n) that continues each prompt in `ids`, a tensor (B, T), by n tokens with greedy decoding."""
MYGPT = {
    "GPTModel": "plain",
    "fp32, no compiler": "eager",
    "fp32": "fp32",
    "bf16": "bf16",
    "int8": "int8",
    "int4": "int4",
}
"""For each label in the printed table: the argument `kind` of `open_mygpt`."""
MAX_THREADS = 1024
"""The largest number of CPU threads. torch crashes if the system cannot start as many as it is asked for."""


def bench(
    model: str | None = None,
    size: str = "124M",
    n_tokens: int = 24,
    prompt: int = 16,
    rounds: int = 3,
    threads: int = 0,
) -> None:
    """Measure how fast this machine generates text, and compare with transformers if it is installed.

    The time for the prompt is not counted. The table compares each speed with a limit: the memory bandwidth, which is
    measured by summing a long tensor, divided by the bytes of all weights, which must be read for every token.

    Example:
        mygpt bench --size 124M

    Args:
        model: The name or path of a model. Default: random weights of the given size.
        size: Size of the random weights: 124M, 355M, 774M or 1558M.
        n_tokens: Number of tokens to generate per measurement.
        prompt: Number of tokens in the prompt.
        rounds: Number of measurements of each program; the table shows medians.
        threads: Number of CPU threads; 0 keeps torch's default.
    """
    import torch

    from MyGPT.config import GPT2_CONFIGS, require_positive
    from MyGPT.messages import MODEL_SYNONYMS, did_you_mean
    from MyGPT.model import GPTModel
    from MyGPT.opening import find_model_files
    from MyGPT.weights.formats.huggingface import find_directory

    require_positive(n_tokens=n_tokens, prompt=prompt, rounds=rounds)
    if size not in GPT2_CONFIGS:
        hint = did_you_mean(size, GPT2_CONFIGS, MODEL_SYNONYMS)
        raise ValueError(f"size must be one of {', '.join(GPT2_CONFIGS)}, got {size!r}{hint}")
    if not 0 <= threads <= MAX_THREADS:
        raise ValueError(f"threads must be a whole number from 0 to {MAX_THREADS}, got {threads}")
    if model is None:
        _require_room(prompt + n_tokens, GPT2_CONFIGS[size].context_length)
    if threads:
        torch.set_num_threads(threads)
    with tempfile.TemporaryDirectory() as directory:
        if model is None:
            GPTModel(GPT2_CONFIGS[size]).save_pretrained(directory)
        files = find_model_files(directory if model is None else model)
        gpt = files.model()
        _require_room(prompt + n_tokens, gpt.config.context_length)
        programs = {name: open_mygpt(gpt, kind) for name, kind in MYGPT.items()}
        peer = find_directory(files.path) if files.adapter is None else None
        if peer is not None and importlib.util.find_spec("transformers") is not None:
            programs["transformers fp32"] = open_transformers(str(peer), "float32")
    ids = torch.randint(0, gpt.config.vocab_size, (8, prompt), generator=torch.Generator().manual_seed(1))
    times: dict[str, list[tuple[float, float]]] = {name: [] for name in programs}
    bandwidths = []
    for turn in range(rounds + 1):
        bandwidths.append(read_bandwidth())
        for name, run in programs.items():
            pair = (seconds_per_token(run, ids[:1], n_tokens), seconds_per_token(run, ids, n_tokens))
            if turn > 0:  # the first round warms up
                times[name].append(pair)
    print_table(times, statistics.median(bandwidths[1:]), gpt)


def _require_room(n: int, context: int) -> None:
    """Raise ValueError if a prompt and its continuation have `n` tokens, and the model's context is not longer than that."""
    if n >= context:
        raise ValueError(f"prompt + n_tokens must be below the model's context of {context}, got {n}")


def print_table(times: dict[str, list[tuple[float, float]]], bandwidth: float, gpt: Any) -> None:
    """Print a table of the generation speed of each program, with the model's size and the memory bandwidth above it.

    Args:
        times: for each program and round, the seconds to generate one token for 1 sequence and for 8 sequences at once.
        bandwidth: memory bandwidth in bytes per second.
        gpt: the model that all programs run.
    """
    import torch

    # A token reads one row of the token embedding; an output head that shares the embedding reads all rows.
    n_read = gpt.num_parameters(exclude_embeddings=True)
    n_read += gpt.transformer.wte.weight.numel() if gpt.config.tie_weights else 0
    rounds = len(next(iter(times.values())))
    print(f"{gpt.num_parameters():,} parameters, {torch.get_num_threads()} threads, torch {torch.__version__}")
    print(f"memory bandwidth {bandwidth / 1e9:.1f} GB/s; median (lowest to highest) of {rounds} rounds")
    print(f"{'':<24} {'1 sequence, tokens/s':>26} {'of the limit':>14} {'8 sequences, tokens/s':>24}")
    for name, pairs in times.items():
        one, eight = [1 / first for first, _ in pairs], [8 / second for _, second in pairs]
        limit = bandwidth / (n_read * {"int4": 18 / 32, "int8": 1, "bf16": 2}.get(name, 4))
        print(
            f"{name:<24} {statistics.median(one):10.1f} ({min(one):.1f} to {max(one):.1f}) "
            f"{statistics.median(one) / limit:12.0%} {statistics.median(eight):10.1f} ({min(eight):.0f} to {max(eight):.0f})"
        )


def open_mygpt(gpt: Any, kind: str) -> Run:
    """Return a function that generates with the GPTModel `gpt` itself (kind "plain") or with an accelerated copy.

    For an accelerated copy, `gpt` can also be the path of the model, which needs less memory. Kind "eager" is a float32
    copy that does not use the C++ kernel. Any other kind, such as "bf16", is the precision of a copy that uses this kernel.
    """
    from MyGPT.acceleration.step import accelerate
    from MyGPT.generation import generate

    fast = gpt
    if kind != "plain":
        fast = accelerate(gpt, "fp32" if kind == "eager" else kind, compiled=kind != "eager")  # type: ignore[arg-type]
    return lambda ids, n: generate(fast, ids, n)


def open_transformers(directory: str, dtype: str) -> Run:
    """Return a function that generates with transformers from the model in `directory`, with weights of type `dtype`.

    The function always generates the requested number of tokens, even after an end-of-text token.
    """
    import torch
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(directory, dtype=getattr(torch, dtype)).eval()
    model.generation_config.update(do_sample=False, use_cache=True, eos_token_id=None, pad_token_id=0)
    return lambda ids, n: model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=n, min_new_tokens=n)


def seconds_per_token(run: Run, ids: Tensor, n: int) -> float:
    """Return the seconds per token in which `run` continues the prompts `ids`, measured over n tokens.

    The time for the prompt and the first token is measured separately and subtracted.
    """
    start = time.perf_counter()
    run(ids, 1)
    middle = time.perf_counter()
    run(ids, n + 1)
    return max(time.perf_counter() - 2 * middle + start, 1e-9) / n


def read_bandwidth(n_bytes: int = 2**28) -> float:
    """Return the memory bandwidth in bytes per second: the best of five sums over a tensor of `n_bytes` bytes."""
    import torch

    return n_bytes / min(timeit.repeat(torch.ones(n_bytes // 4).sum, number=1, repeat=5))
