"""Measure what checkpoints cost a training run: the same steps without checkpoints and with one every few steps.

    python benchmarks/checkpointing.py [--every 10] [--steps 30] [--rounds 3]

The model is GPT_CONFIG_SMALL: 30 million parameters, 360 MB of weights and optimizer state per checkpoint. A step has 4
x 256 tokens. Training waits while the state is copied. A background thread then writes the copy and competes for the
CPU and the disk.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from MyGPT import GPT_CONFIG_SMALL, GPTModel, TrainConfig, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    ids = np.random.default_rng(0).integers(0, 50257, 200_000).astype(np.uint16)
    seconds: dict[int, list[float]] = {0: [], options.every: []}
    copies = []
    for _ in range(options.rounds):
        for every, times in seconds.items():
            with tempfile.TemporaryDirectory() as directory:
                config = TrainConfig(
                    max_steps=options.steps,
                    batch_size=4,
                    checkpoint_every=every,
                    checkpoint_minutes=0.0,
                    keep_last=1,
                    sample_every=0,
                )
                trainer = Trainer(
                    GPTModel(GPT_CONFIG_SMALL), config, ids, run_dir=Path(directory) / "run", progress=False
                )
                trainer.setup()
                trainer.step()
                began = time.perf_counter()
                while trainer.step_number < options.steps:
                    trainer.step()
                    trainer.files.checkpoint_if_due(trainer.state.step, trainer.snapshot)
                times.append((time.perf_counter() - began) / (options.steps - 1))
                if trainer.files.writer is not None:
                    trainer.files.writer.wait()
                    copies.append(trainer.files.writer.blocking_seconds / max(1, trainer.files.writer.n_written))
    without, with_them = (statistics.median(times) for times in seconds.values())
    print(f"{torch.get_num_threads()} threads, medians of {options.rounds}")
    print(f"seconds per step: {without:.3f} without checkpoints, {with_them:.3f} with one every {options.every} steps")
    copy = statistics.median(copies)
    print(
        f"ratio {with_them / without:.3f}; training waited {copy:.3f} s per checkpoint, {copy / (options.every * without):.2%}"
    )


if __name__ == "__main__":
    main()
