"""Measure how much prompt lookup speeds up repetitive text: greedy tokens per second with and without it, in turn.

Usage: python benchmarks/lookup.py [--size 124M] [--tokens 200] [--rounds 5] [--out DIR]

A GPT-2 with random weights soon repeats itself, so most guesses are right, as in tables, source code or quotations.
Text without repetition gains nothing. Both ways must give the same tokens.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

import torch
from measurements import Results, parse, rounds
from tables import show

from MyGPT import GPT2_CONFIGS, GPTModel, PromptLookup, accelerate, generate
from MyGPT.acceleration.packed import DTYPES


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M")
    parser.add_argument("--tokens", type=int, default=200)
    options = parse(parser, rounds=5)
    torch.manual_seed(1)
    model = GPTModel(GPT2_CONFIGS[options.size])
    ids = torch.randint(0, model.config.vocab_size, (1, 16))
    results = Results("lookup", {"size": options.size, "tokens": options.tokens})
    for precision in DTYPES:
        fast = accelerate(model, precision)  # type: ignore[arg-type]
        ways = {"plain": fast, "lookup": PromptLookup(fast)}
        results.compare(f"{precision}, lookup", f"{precision}, plain", "speed", target=2.0)
        for turn in rounds(options, warm_up=True, share=1 / len(DTYPES)):
            texts = []
            for way, program in ways.items():
                start = time.perf_counter()
                texts.append(generate(program, ids, options.tokens))
                if turn:
                    speed = options.tokens / (time.perf_counter() - start)
                    results.add(f"{precision}, {way}", "speed", "tokens/s", speed)
            assert torch.equal(*texts)
        results.add(f"{precision}, lookup", "passes", "forward passes", count_passes(fast, ids, options.tokens))
        results.save(options.out)
    show(results)


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
