"""Print the sizing table of docs/guide/scale.md: memory, speed and communication of GPT-2 on 1, 8 and 64 GPUs.

    python benchmarks/sizing.py

All numbers are computed from the sizes of the models; nothing is measured. tests/test_costs.py compares the page with
this table.
"""

from __future__ import annotations

import dataclasses

from MyGPT import GPT2_CONFIGS
from MyGPT.costs import communication, flops_per_token, training_memory

GPU_FLOPS = 989e12
"""The peak of an H100 in bf16, without sparsity."""
UTILISATION = 0.4
"""The part of this peak that training is assumed to reach (MFU)."""
BUS_BANDWIDTH = 100e9
"""The assumed bus bandwidth between GPUs in bytes per second, which `mygpt doctor` measures."""
BATCH_SIZE, MICRO_BATCH_SIZE = 512, 8
LAYOUTS = [
    (1, "none", None),
    (8, "ddp", 1),
    (8, "fsdp", 8),
    (64, "ddp", 1),
    (64, "fsdp", 64),
    (64, "fsdp, shard_size 8", 8),
]
"""The number of ranks, the options of the run, and the number of ranks that divide one copy of the weights."""


def table() -> str:
    """Return the table in Markdown."""
    lines = [
        "| model | GPUs | `parallel` | memory per rank | tokens per second | computing per step | sent per step and rank "
        "| sending |",
        "|---|--:|---|--:|--:|--:|--:|--:|",
    ]
    for name in ("124M", "355M", "774M", "1558M"):
        config = dataclasses.replace(GPT2_CONFIGS[name], drop_rate=0.0)
        speed = UTILISATION * GPU_FLOPS / flops_per_token(config)  # tokens per second of one GPU
        for n_ranks, parallel, shard_size in LAYOUTS:
            n_rows = BATCH_SIZE // n_ranks
            memory = training_memory(
                config,
                MICRO_BATCH_SIZE,
                bf16=True,
                accumulates=n_rows > MICRO_BATCH_SIZE,
                device="cuda",
                shard_size=shard_size,
            ).peak
            n_micro_batches = n_rows // MICRO_BATCH_SIZE
            sent = communication(config, n_ranks, shard_size or 1, n_micro_batches=n_micro_batches, bf16=True)
            n_bytes, seconds = sum(sent.values()), n_rows * config.context_length / speed
            sending = f"{n_bytes / 1e9:.1f} GB | {duration(n_bytes / BUS_BANDWIDTH)}" if n_bytes else "- | -"
            cells = [name, n_ranks, parallel, f"{memory / 1e9:.1f} GB", thousands(n_ranks * speed), duration(seconds)]
            lines.append(f"| {' | '.join(map(str, cells))} | {sending} |")
    return "\n".join(lines)


def thousands(number: float) -> str:
    """Return a number of about four digits or more, rounded to two digits: 463,123 gives "460,000"."""
    digits = 10 ** (len(str(round(number))) - 2)
    return f"{round(number / digits) * digits:,}"


def duration(seconds: float) -> str:
    return f"{seconds:.2g} s" if seconds >= 1 else f"{1000 * seconds:.0f} ms"


if __name__ == "__main__":
    print(table())
