"""The memory and the communication of one of several ranks, compared with what torch allocates and sends."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from typing import Any

import pytest
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.utils._python_dispatch import TorchDispatchMode

from MyGPT import GPTConfig, GPTModel, TrainConfig, Trainer
from MyGPT.costs import communication, training_memory
from ranks import run_on_ranks

# The rows of the embedding and of the queries, keys and values cannot be divided evenly by 2 or 4.
CONFIG = GPTConfig(vocab_size=101, context_length=9, emb_dim=15, n_heads=3, n_layers=3, drop_rate=0.0, qkv_bias=True)

N_RANKS = 4


class SentBytes(TorchDispatchMode):
    """A context manager that counts the bytes that this rank sends, if every collective operation is a ring."""

    def __init__(self, n_copies: int) -> None:
        super().__init__()
        self.n_copies = n_copies
        self.n_bytes: Counter[str] = Counter()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(issubclass(kind, DTensor) for kind in types):
            return NotImplemented
        name = str(function).removeprefix("c10d.")
        tensors = [part for part in args if isinstance(part, Tensor)]
        if name.startswith("_allgather_base_"):
            whole, part = tensors
            key = "Muon" if whole.dim() > 1 else "all-gather"
            self.n_bytes[key] += whole.nbytes - part.nbytes
        elif name.startswith("_reduce_scatter_base_"):
            part, whole = sorted(tensors, key=lambda tensor: tensor.nbytes)
            self.n_bytes["reduce-scatter"] += whole.nbytes - part.nbytes
        elif name.startswith("alltoall_base_"):
            self.n_bytes["Muon"] += tensors[0].nbytes * (len(tensors[0]) - 1) // len(tensors[0])
        elif name.startswith("allreduce_") and args[0][0].numel() > 1:  # otherwise the loss or the norm of the gradient
            self.n_bytes["all-reduce"] += 2 * (self.n_copies - 1) * args[0][0].nbytes // self.n_copies
        return function(*args, **(kwargs or {}))


def stored(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of the memory of these tensors on this rank."""
    local = [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]
    return sum({t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in local}.values())


def measure_all(cases: list[TrainConfig]) -> list[dict[str, int]]:
    return [measure(training) for training in cases]


def measure(training: TrainConfig) -> dict[str, int]:
    """Return the bytes that a rank stores and sends in the second step of a training run."""
    found: dict[str, int] = {}
    with Trainer(GPTModel(CONFIG), training, [i % 101 for i in range(500)], progress=False) as trainer:
        parameters = list(trainer.model.parameters())
        trainer.step()

        def find_gradients(*_: Any) -> None:
            found["gradients"] = stored(parameter.grad for parameter in parameters if parameter.grad is not None)

        trainer.optimizers[0].register_step_pre_hook(find_gradients)
        with SentBytes(N_RANKS // (training.shard_size_on(N_RANKS) or 1)) as sent:
            trainer.step()
        states = [state for optimizer in trainer.optimizers for state in optimizer.state.values()]
        moments = [tensor for state in states for tensor in state.values() if tensor.dim()]
        return {"weights": stored(parameters), "moments": stored(moments), **found, **sent.n_bytes}


@pytest.mark.torchrun
@pytest.mark.slow
def test_a_rank_stores_and_sends_what_is_estimated() -> None:
    """Rank 0 stores the most. Torch pads the shards of the other ranks, but not their moments."""
    cases = [
        TrainConfig(batch_size=2 * N_RANKS, precision="fp32", **options)
        for options in (
            {"parallel": "fsdp"},
            {"parallel": "ddp", "optimizer": "muon"},
            {"parallel": "fsdp", "shard_size": 2, "optimizer": "muon", "micro_batch_size": 1},
        )
    ]
    found = run_on_ranks(N_RANKS, measure_all, cases)
    for i, training in enumerate(cases):
        size = training.shard_size_on(N_RANKS) or 1
        memory = training_memory(CONFIG, optimizer=training.optimizer, shard_size=size)
        n_micro_batches = 2 if training.micro_batch_size else 1
        sent = communication(CONFIG, N_RANKS, size, n_micro_batches=n_micro_batches, optimizer=training.optimizer)
        for purpose in ("weights", "gradients", "moments"):
            assert max(rank[i][purpose] for rank in found) == getattr(memory, purpose), (training, purpose)
        for operation, n_bytes in sent.items():
            assert {rank[i].get(operation, 0) for rank in found} == {n_bytes}, (training, operation)
