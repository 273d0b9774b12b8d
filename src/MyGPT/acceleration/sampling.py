"""The choice of the next token in C++ (sample.h). It is the choice of MyGPT.sampling, with the same random numbers."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from MyGPT import sampling
from MyGPT.acceleration.kernel import Kernel, SamplingStruct
from MyGPT.sampling import SamplingConfig


def pick_next(
    kernel: Kernel | None,
    logits: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Return the next token of each sequence as int64 ids (B,), given the logits of the last position (B, V).

    The tokens are those of `sampling.pick_next`, up to the rounding of float32, and the generators advance equally. Without a
    kernel, or with other than contiguous float32 logits on the CPU, this function calls `sampling.pick_next`.

    Raises FloatingPointError if the largest logit of a sequence is NaN or infinite.
    """
    is_single = generator is None or isinstance(generator, torch.Generator)
    generators: list[torch.Generator]
    if config.temperature == 0:
        generators = []
    elif is_single:
        generators = [torch.default_generator if generator is None else generator]  # type: ignore[list-item]
    else:
        generators = list(generator)  # type: ignore[arg-type]
    if (
        kernel is None
        or logits.dtype != torch.float32
        or logits.device.type != "cpu"
        or not logits.is_contiguous()
        or not (seen is None or seen.is_contiguous())
        or not (is_single or len(set(generators)) == len(logits))  # rows that share a generator draw in turn
        or (generators and not kernel.draws_as_torch)
    ):
        return sampling.pick_next(logits, config, generator, seen)
    states = [one.get_state() for one in generators]
    tokens = torch.empty(len(logits), dtype=torch.int64)
    if not kernel.pick(_struct(config), logits, seen, states, tokens):
        return sampling.pick_next(logits, config, generator, seen)  # raises the error for logits that are not finite
    for one, state in zip(generators, states, strict=True):
        one.set_state(state)
    return tokens


def _struct(config: SamplingConfig) -> SamplingStruct:
    """Return the options as sample.h needs them, with the bounds that `sampling.filter_logits` sets."""
    temperature, penalty = config.temperature, config.repetition_penalty
    return SamplingStruct(
        min(max(temperature, 1e-30), 1e30) if temperature else 0,
        0 if config.top_p is None else 1 - config.top_p,
        config.min_p or 0,
        0 if penalty is None else min(max(penalty, 1e-30), 1e30),
        min(config.top_k or 0, 2**31 - 1),
    )
