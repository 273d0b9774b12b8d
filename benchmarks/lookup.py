"""Measure how much prompt lookup speeds up repetitive text: greedy tokens per second with and without it, in turn.

Usage: python benchmarks/lookup.py [--size 124M] [--tokens 200] [--rounds 5] [--out results.json]

A GPT-2 with random weights soon repeats itself, so most guesses are right, as in tables, source code or quotations.
Text without repetition gains nothing. Both ways must give the same tokens.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from pathlib import Path
from typing import Any

import torch

from MyGPT import GPT2_CONFIGS, GPTModel, PromptLookup, accelerate, generate
from MyGPT.acceleration.packed import DTYPES
from MyGPT.files import atomic_write


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M")
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    torch.manual_seed(1)
    model = GPTModel(GPT2_CONFIGS[options.size])
    ids = torch.randint(0, model.config.vocab_size, (1, 16))
    result: dict[str, Any] = {}
    for precision in DTYPES:
        fast = accelerate(model, precision)  # type: ignore[arg-type]
        ways = {"plain": fast, "lookup": PromptLookup(fast)}
        seconds: dict[str, list[float]] = {way: [] for way in ways}
        for turn in range(options.rounds + 1):  # the first round warms up
            texts = []
            for way, program in ways.items():
                start = time.perf_counter()
                texts.append(generate(program, ids, options.tokens))
                if turn:
                    seconds[way].append(time.perf_counter() - start)
            assert torch.equal(*texts)
        n_passes = count_passes(fast, ids, options.tokens)
        plain, lookup = (options.tokens / statistics.median(seconds[way]) for way in ways)
        ratios = [a / b for a, b in zip(seconds["plain"], seconds["lookup"], strict=True)]
        print(
            f"{precision}: {plain:.0f} tokens/s, with lookup {lookup:.0f}: {statistics.median(ratios):.2f} times "
            f"({min(ratios):.2f} to {max(ratios):.2f}); {options.tokens} tokens in {n_passes} passes"
        )
        result[precision] = {"seconds": seconds, "passes": n_passes, "tokens": options.tokens}
    if options.out is not None:
        with atomic_write(options.out) as file:
            json.dump(result, file, indent=1)


def count_passes(fast: Any, ids: torch.Tensor, n: int) -> int:
    passes = 0

    def count(*_: Any) -> None:
        nonlocal passes
        passes += 1

    handle = fast.register_forward_hook(count)
    generate(PromptLookup(fast), ids, n)
    handle.remove()
    return passes


if __name__ == "__main__":
    main()
