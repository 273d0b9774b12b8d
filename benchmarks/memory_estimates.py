"""Compare the memory estimates of `mygpt info` with the memory that training and generation use.

    python benchmarks/memory_estimates.py [--case "30M, 4 sequences"]

Each case runs in two new processes. "tensors" is the peak size of all tensors that Python sees. "process" is the rise
of the resident memory, which includes temporary buffers of the kernels and memory that the allocator keeps.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import weakref
from typing import Any

import torch
from memory import Peak
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from MyGPT import GPT_CONFIG_SMALL, GPTConfig, GPTModel, TrainConfig, Trainer, generate
from MyGPT.costs import generation_bytes, training_memory

TINY = GPTConfig(vocab_size=65, context_length=16, emb_dim=16, n_heads=2, n_layers=1)
CHARACTERS = GPTConfig(vocab_size=65, context_length=256, emb_dim=384, n_heads=6, n_layers=6, drop_rate=0.0)
SMALL = GPTConfig(**{**GPT_CONFIG_SMALL, "drop_rate": 0.0})
GPT2 = GPTConfig(drop_rate=0.0, context_length=256)
# The model, the sequences per step, and options of TrainConfig.
TRAINING: dict[str, tuple[GPTConfig, int, dict[str, Any]]] = {
    "11M, characters, 8 sequences": (CHARACTERS, 8, {}),
    "30M, 4 sequences": (SMALL, 4, {}),
    "30M, 4 sequences, dropout": (GPTConfig(**GPT_CONFIG_SMALL), 4, {}),
    "30M, 4 sequences, 2 at a time": (SMALL, 4, {"micro_batch_size": 2}),
    "30M, 4 sequences, checkpointing": (SMALL, 4, {"gradient_checkpointing": True}),
    "124M, 1 sequence of 256": (GPT2, 1, {}),
}
GENERATION = {"generating, 30M, 256 tokens": SMALL, "generating, 124M, 256 tokens": GPT2}


class TensorPeak(TorchDispatchMode):
    """A context manager whose `n_bytes` is the peak size of all tensors made inside the block, each storage counted once."""

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.n_bytes = 0

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            if isinstance(tensor, torch.Tensor) and tensor.device.type == "cpu":
                storage = tensor.untyped_storage()
                if storage._cdata not in self.sizes:
                    self.sizes[storage._cdata] = storage.nbytes()
                    weakref.finalize(storage, self.sizes.pop, storage._cdata, None)
        self.n_bytes = max(self.n_bytes, sum(self.sizes.values()))
        return made


def run(case: str) -> None:
    """Run two training steps, or generate two tokens after a prompt that leaves room for exactly two."""
    torch.manual_seed(0)
    if case in GENERATION:
        config = GENERATION[case]
        generate(GPTModel(config), torch.zeros(1, config.context_length - 2, dtype=torch.int64), 2)
        return
    config, batch_size, options = TRAINING[case]
    train(config, TrainConfig(batch_size=batch_size, precision="fp32", **options))


def train(config: GPTConfig, training: TrainConfig) -> None:
    ids = torch.randint(config.vocab_size, (10_000,)).numpy()
    trainer = Trainer(GPTModel(config), training, ids, progress=False)
    trainer.setup()
    for _ in range(2):
        trainer.step()


def estimate(case: str) -> int:
    """Return the estimated bytes of a case."""
    if case in GENERATION:
        return generation_bytes(GENERATION[case])
    config, batch_size, options = TRAINING[case]
    micro = options.get("micro_batch_size", batch_size)
    checkpointing = "gradient_checkpointing" in options
    return training_memory(config, micro, gradient_checkpointing=checkpointing, accumulates=micro < batch_size).peak


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*TRAINING, *GENERATION])
    parser.add_argument("--as", dest="way", choices=["tensors", "process"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        train(TINY, TrainConfig(batch_size=1))  # torch loads code at first use, which is not part of any model
        with TensorPeak() if options.way == "tensors" else Peak() as peak:
            run(options.case)
        print(json.dumps(peak.n_bytes))
        return
    print(f"{'':<34}{'estimated':>12}{'tensors':>12}{'process':>12}   estimated / tensors, / process")
    for case in [options.case] if options.case else [*TRAINING, *GENERATION]:
        sizes = [estimate(case)]
        for way in ("tensors", "process"):
            command = [sys.executable, __file__, "--case", case, "--as", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sizes.append(json.loads(done.stdout))
        columns = "".join(f"{size / 1e6:>9,.0f} MB" for size in sizes)
        print(f"{case:<34}{columns}   {sizes[0] / sizes[1]:.2f}, {sizes[0] / sizes[2]:.2f}", flush=True)


if __name__ == "__main__":
    main()
