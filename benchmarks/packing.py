"""Compare rows for instruction tuning: padded in any order, padded in batches of similar length, and packed.

Usage: python benchmarks/packing.py --data alpaca.json [--batch_size 8] [--steps 12] [--rounds 3] [--mask_prompt] [--out DIR]

A random model of GPT_CONFIG_SMALL runs forward and backward passes in float32, with the three kinds of rows in turn.
Steps of all kinds hold about the same amount of text. The results are examples per second and tokens per second,
without padding.
"""

from __future__ import annotations

import argparse
import time
from typing import Any

from measurements import Results, parse, rounds
from tables import show

from MyGPT import GPT_CONFIG_SMALL, GPTModel, InstructionDataset, get_tokenizer
from MyGPT.data.instructions import LengthGroupedSampler
from MyGPT.data.packing import PackedSampler
from MyGPT.data.records import read_records


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", required=True)
    parser.add_argument("--batch_size", type=int, default=8)
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--mask_prompt", action="store_true")
    options = parse(parser, rounds=3)
    dataset = InstructionDataset(read_records(options.data), get_tokenizer("gpt2"), max_length=256)
    model = GPTModel({**GPT_CONFIG_SMALL, "drop_rate": 0.0})
    same: dict[str, Any] = {"mask_prompt": options.mask_prompt, "seed": 1}
    ways = {
        "padded": LengthGroupedSampler(dataset, options.batch_size, pool_batches=1, **same),
        "padded, similar lengths": LengthGroupedSampler(dataset, options.batch_size, **same),
        "packed": PackedSampler(dataset, 256, options.batch_size // 2, **same),
    }
    results = Results("packing", {"batch_size": options.batch_size, "data": dataset.describe()})
    for name in list(ways)[1:]:
        results.compare(name, "padded", "speed")
    for turn in rounds(options, warm_up=True):
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
            if turn:
                results.add(name, "speed", "examples/s", len(indices) / seconds)
                results.add(name, "speed without padding", "tokens/s", n_tokens / seconds)
                results.add(name, "tokens that are no padding", "share", n_tokens / sum(b[0].numel() for b in batches))
        results.save(options.out)
    show(results)


if __name__ == "__main__":
    main()
