"""How long a training run would take on this machine, from a few of its own steps.

A step that would take too long to try is tried on a part of it, fewer sequences and then fewer layers, and scaled by the
operations counted. Not in it: reading the text, live samples, compiling, writing.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable
from statistics import median

import torch

from MyGPT.config import GPTConfig
from MyGPT.model import GPTModel
from MyGPT.training.config import TrainConfig
from MyGPT.training.trainer import Trainer

TRIED_STEPS = 3


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Floating-point operations a second of a product of two square matrices, the median of three."""
    n = 512 if device.type == "cpu" else 4096  # a processor without bf16 takes seconds for more
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, device, 3)


def estimate_training(
    config: GPTConfig, training: TrainConfig, device: torch.device, speed: float, longest: float = 1.0
) -> tuple[float, float]:
    """Seconds of one step, and of the whole run with its evaluations.

    `speed` in operations a second, `matmul_speed`'s, decides how large a part is tried: one whose step should take about
    `longest` seconds, if training reached half of it.
    """
    micro = min(training.micro_batch_size or training.batch_size, training.batch_size)
    while micro > 1 and _operations(config, micro) > longest * speed / 2:
        micro = (micro + 1) // 2
    part = config
    while part.n_layers > 1 and _operations(part, micro) > longest * speed / 2:
        part = dataclasses.replace(part, n_layers=(part.n_layers + 1) // 2)
    tried = dataclasses.replace(training, batch_size=micro, micro_batch_size=None, compile=False, tensorboard=False)
    ids = torch.randint(config.vocab_size, (2 * config.context_length * micro + 1,)).numpy()
    trainer = Trainer(GPTModel(part), tried, ids, device=device, progress=False)
    trainer.setup()
    seconds = median_seconds(trainer.step, device, TRIED_STEPS) / _operations(part, micro)
    step = seconds * _operations(config, training.batch_size)
    n_evaluations = training.max_steps // training.eval_every
    evaluation = seconds * _operations(config, training.eval_windows) / 3  # no backward
    return step, training.max_steps * step + n_evaluations * evaluation


def median_seconds(work: Callable[[], object], device: torch.device, n: int) -> float:
    """The median of n times, after once to warm up."""
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        work()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def _operations(config: GPTConfig, n_sequences: int) -> int:
    """Of a training step."""
    with torch.device("meta"):
        return GPTModel(config).estimate_flops() * n_sequences * config.context_length
