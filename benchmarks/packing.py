"""Compare rows for instruction tuning: padded in any order, padded in batches of similar length, and packed.

Usage: python benchmarks/packing.py --data alpaca.json [--batch_size 8] [--steps 12] [--rounds 3] [--mask_prompt]

A random model of GPT_CONFIG_SMALL runs forward and backward passes in float32, with the three kinds of rows in turn.
Steps of all kinds hold about the same amount of text. The results are examples per second and tokens per second,
without padding.
"""

from __future__ import annotations

import argparse
import statistics
import time
from typing import Any

import torch

from MyGPT import GPT_CONFIG_SMALL, GPTModel, InstructionDataset, get_tokenizer
from MyGPT.data.instructions import LengthGroupedSampler
from MyGPT.data.packing import PackedSampler
from MyGPT.data.records import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--mask_prompt", action="store_true")
    options = parser.parse_args()
    dataset = InstructionDataset(read_records(options.data), get_tokenizer("gpt2"), max_length=256)
    model = GPTModel({**GPT_CONFIG_SMALL, "drop_rate": 0.0})
    same: dict[str, Any] = {"mask_prompt": options.mask_prompt, "seed": 1}
    ways = {
        "padded": LengthGroupedSampler(dataset, options.batch_size, pool_batches=1, **same),
        "padded, similar lengths": LengthGroupedSampler(dataset, options.batch_size, **same),
        "packed": PackedSampler(dataset, 256, options.batch_size // 2, **same),
    }
    speeds: dict[str, list[tuple[float, float]]] = {name: [] for name in ways}
    fill: dict[str, float] = {}
    for turn in range(options.rounds + 1):  # the first round warms up
        for name, sampler in ways.items():
            steps = range(turn * options.steps, (turn + 1) * options.steps)
            # Built in advance, because the model alone is measured.
            batches = [sampler.batch(step) for step in steps]
            if isinstance(sampler, PackedSampler):
                indices = [index for step in steps for row in sampler.rows(step) for index in row]
            else:
                indices = [index for step in steps for index in sampler.indices(step)]
            start = time.perf_counter()
            for batch in batches:
                total, count = model.token_loss(*batch)
                (total / count).backward()
                model.zero_grad(set_to_none=True)
            seconds = time.perf_counter() - start
            n_tokens = int(dataset.lengths[indices].sum())
            fill[name] = n_tokens / sum(batch[0].numel() for batch in batches)
            if turn:
                speeds[name].append((len(indices) / seconds, n_tokens / seconds))
    print(
        f"{dataset.describe()}; {options.rounds} rounds of {options.steps} steps, medians; {torch.get_num_threads()} threads"
    )
    first = [statistics.median(kind) for kind in zip(*speeds["padded"], strict=True)]
    for name, found in speeds.items():
        examples, tokens = zip(*found, strict=True)
        medians = statistics.median(examples), statistics.median(tokens)
        print(
            f"{name:<24} {medians[0]:6.2f} examples/s ({min(examples):.2f} to {max(examples):.2f}), {medians[1]:6.0f} tokens/s; "
            f"{medians[0] / first[0]:.2f} and {medians[1] / first[1]:.2f} times padded; {fill[name]:.0%} tokens, the rest padding"
        )


if __name__ == "__main__":
    main()
