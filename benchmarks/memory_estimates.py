"""Compare the memory estimates of `mygpt info` with the memory that training and generation use.

    python benchmarks/memory_estimates.py [--case "30M, 4 sequences"]

Each case runs in two new processes. For a case with two ranks, torchrun starts two new processes twice, and rank 0 is
measured. "tensors" is the peak size of all tensors that Python sees. "process" is the rise of the resident memory, which
includes temporary buffers of the kernels and memory that the allocator keeps.
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
from torch._subclasses.fake_tensor import FakeTensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from MyGPT import GPT_CONFIG_SMALL, GPTConfig, GPTModel, TrainConfig, Trainer, generate, ranks
from MyGPT.commands._memory import step_memory
from MyGPT.costs import generation_bytes

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
    "30M, 4 sequences, ddp, 2 ranks": (SMALL, 4, {"parallel": "ddp"}),
    "30M, 4 sequences, fsdp, 2 ranks": (SMALL, 4, {"parallel": "fsdp"}),
    "30M, 8 sequences, fsdp, 2 at a time": (SMALL, 8, {"parallel": "fsdp", "micro_batch_size": 2}),
    "124M, 2 sequences, fsdp, 2 ranks": (GPT2, 2, {"parallel": "fsdp"}),
}
N_RANKS = 2
"""The number of ranks of the cases with parallel."""
GENERATION = {"generating, 30M, 256 tokens": SMALL, "generating, 124M, 256 tokens": GPT2}


class TensorPeak(TorchDispatchMode):
    """A context manager whose `n_bytes` is the peak size of all tensors made inside the block, each storage counted once.

    FSDP2 resizes the storages of gathered weights, so resizing is counted too.
    """

    def __init__(self) -> None:
        super().__init__()
        self.sizes: dict[int, int] = {}
        self.total = self.n_bytes = 0
        self._resize = torch.UntypedStorage.resize_

    def __enter__(self) -> TensorPeak:
        def resize_(storage: torch.UntypedStorage, size: int) -> Any:
            resized = self._resize(storage, size)
            self._count(storage)
            return resized

        torch.UntypedStorage.resize_ = resize_
        return super().__enter__()

    def __exit__(self, *exception: object) -> None:
        torch.UntypedStorage.resize_ = self._resize
        super().__exit__(*exception)

    def _count(self, storage: torch.UntypedStorage) -> None:
        key = storage._cdata
        if key not in self.sizes:
            weakref.finalize(storage, self._forget, key)
        self.total += storage.nbytes() - self.sizes.get(key, 0)
        self.sizes[key] = storage.nbytes()
        self.n_bytes = max(self.n_bytes, self.total)

    def _forget(self, key: int) -> None:
        self.total -= self.sizes.pop(key)

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented  # the operations on the tensors of this rank follow
        made = function(*args, **(kwargs or {}))
        for tensor in tree_leaves(made):
            # DTensor finds out how to divide a result with fake tensors, which take no memory.
            is_real = isinstance(tensor, torch.Tensor) and not isinstance(tensor, FakeTensor)
            if is_real and tensor.device.type == "cpu":
                self._count(tensor.untyped_storage())
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
    training = TrainConfig(batch_size=batch_size, **options)
    return step_memory(config, training, bf16=False, device="cpu", n_ranks=n_ranks(case)).peak


def n_ranks(case: str) -> int:
    return N_RANKS if case in TRAINING and "parallel" in TRAINING[case][2] else 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--case", choices=[*TRAINING, *GENERATION])
    parser.add_argument("--as", dest="way", choices=["tensors", "process"], help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.way is not None:
        options_of_case = TRAINING[options.case][2] if n_ranks(options.case) > 1 else {}
        train(
            TINY, TrainConfig(batch_size=N_RANKS, **options_of_case)
        )  # torch loads code at first use, which is not part of any model
        with TensorPeak() if options.way == "tensors" else Peak() as peak:
            run(options.case)
        if ranks.rank() == 0:
            print(json.dumps(peak.n_bytes))
        ranks.leave()
        return
    print(f"{'':<36}{'estimated':>12}{'tensors':>12}{'process':>12}   estimated / tensors, / process")
    for case in [options.case] if options.case else [*TRAINING, *GENERATION]:
        sizes = [estimate(case)]
        for way in ("tensors", "process"):
            launcher = ["-m", "torch.distributed.run", "--nproc-per-node", str(N_RANKS)] if n_ranks(case) > 1 else []
            command = [sys.executable, *launcher, __file__, "--case", case, "--as", way]
            done = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
            sizes.append(json.loads(done.stdout))
        columns = "".join(f"{size / 1e6:>9,.0f} MB" for size in sizes)
        print(f"{case:<36}{columns}   {sizes[0] / sizes[1]:.2f}, {sizes[0] / sizes[2]:.2f}", flush=True)


if __name__ == "__main__":
    main()
