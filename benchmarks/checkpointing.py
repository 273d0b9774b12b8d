"""Measure what checkpoints cost a training run: the same steps without checkpoints and with one every few steps.

    python benchmarks/checkpointing.py [--every 10] [--steps 30] [--rounds 3] [--out DIR]

The model is GPT_CONFIG_SMALL: 30 million parameters, 360 MB of weights and optimizer state per checkpoint. A step has 4
x 256 tokens. Training waits while the state is copied. A background thread then writes the copy and competes for the
CPU and the disk.
"""

from __future__ import annotations

import argparse
import tempfile
import time
from pathlib import Path

import numpy as np
from measurements import Results, parse, rounds
from tables import show

from MyGPT import GPT_CONFIG_SMALL, GPTModel, TrainConfig, Trainer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--every", type=int, default=10, help="steps between checkpoints")
    parser.add_argument("--steps", type=int, default=30)
    options = parse(parser, rounds=3)
    ids = np.random.default_rng(0).integers(0, 50257, 200_000).astype(np.uint16)
    names = {0: "without checkpoints", options.every: f"one every {options.every} steps"}
    results = Results("checkpointing", {"steps": options.steps, "every": options.every})
    results.compare(names[options.every], names[0], "step")
    for _ in rounds(options):
        for every, name in names.items():
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
                results.add(name, "step", "s", (time.perf_counter() - began) / (options.steps - 1))
                if trainer.files.writer is not None:
                    trainer.files.writer.wait()
                    copy = trainer.files.writer.blocking_seconds / max(1, trainer.files.writer.n_written)
                    results.add(name, "training waited per checkpoint", "s", copy)
        results.save(options.out)
    show(results)


if __name__ == "__main__":
    main()
