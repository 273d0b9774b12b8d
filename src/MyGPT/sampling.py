"""Sampling: pure functions that filter logits (B, V), and the choice of the next token.

A filter sets the logits of the tokens that it excludes to minus infinity. The filters run in the same order as in
transformers: repetition penalty, temperature, top-k, top-p, min-p. B batch size, V vocabulary size.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from numbers import Real

import numpy as np
import torch
from torch import Tensor

from MyGPT.config import require_positive

_LARGEST_LOGIT = 1e7
"""The bound of penalized logits. Tokens that differ by this much have the probabilities 0 and 1."""


@dataclass(frozen=True)
class SamplingConfig:
    """Options for choosing the next token from the logits. Raises ValueError if a value is out of range."""

    temperature: float = 0.0
    """Divisor of the logits: low values give predictable text, and high values give varied text.
    0 is a special case: the most likely token is always taken."""
    top_k: int | None = None
    """Sample only from the k most likely tokens."""
    top_p: float | None = None
    """Sample only from the smallest set of most likely tokens with a total probability of at least p."""
    min_p: float | None = None
    """Sample only from tokens that have at least p times the probability of the most likely token."""
    repetition_penalty: float | None = None
    """Values above 1 make tokens that already occurred less likely."""

    def __post_init__(self) -> None:
        if not _is_number(self.temperature) or not 0 <= self.temperature < math.inf:
            self._refuse("temperature", "a number of at least 0")
        if self.top_k is not None:
            require_positive(top_k=self.top_k)
        if self.top_p is not None and not (_is_number(self.top_p) and 0 < self.top_p <= 1):
            self._refuse("top_p", "a number above 0 and at most 1")
        if self.min_p is not None and not (_is_number(self.min_p) and 0 <= self.min_p <= 1):
            self._refuse("min_p", "a number from 0 to 1")
        penalty = self.repetition_penalty
        if penalty is not None and not (_is_number(penalty) and 0 < penalty < math.inf):
            self._refuse("repetition_penalty", "a number above 0")

    def _refuse(self, name: str, allowed: str) -> None:
        raise ValueError(f"{name} must be {allowed}, got {getattr(self, name)!r}")


def _is_number(value: object) -> bool:
    return isinstance(value, Real) and not isinstance(value, bool)


def require_finite(name: str, values: Tensor | float) -> None:
    """Raise FloatingPointError, with `name` in its message, if one of the values is NaN or infinite."""
    values = torch.as_tensor(values).detach()
    # A sum is finite only if all of its values are. The reverse does not hold for very large values.
    if not math.isfinite(values.sum()) and not values.isfinite().all():
        wrong = values[~values.isfinite()][0].item()
        raise FloatingPointError(f"{name} is {wrong}: the weights are damaged, or the training of the model diverged")


def keep_top_k(logits: Tensor, k: int) -> Tensor:
    """Return the logits (B, V) with all but the k largest of each sequence set to -inf (Fan et al., 2018).

    Logits that are equal to the k-th largest are also kept.
    """
    smallest = logits.topk(min(k, logits.shape[-1])).values[:, -1:]  # (B, 1)
    return logits.masked_fill(logits < smallest, -math.inf)


def keep_top_p(logits: Tensor, p: float) -> Tensor:
    """Return the logits (B, V) with all set to -inf except those of the most likely tokens (Holtzman et al., 2020).

    The kept tokens are the smallest set with a total probability of at least p.
    """
    ascending = _sorted(logits)
    is_outside = ascending.softmax(-1).cumsum(-1) <= 1 - p  # these tokens together have at most 1 - p
    is_outside[:, -1] = False
    n_outside = is_outside.sum(-1, keepdim=True)  # (B, 1)
    smallest = ascending.gather(1, n_outside)
    is_below, is_tied = logits < smallest, logits == smallest
    # Of the tokens whose logits equal the smallest that is kept, the first ones may be outside too.
    n_tied_outside = n_outside - is_below.sum(-1, keepdim=True)
    return logits.masked_fill(is_below | (is_tied & (is_tied.cumsum(-1) <= n_tied_outside)), -math.inf)


def keep_min_p(logits: Tensor, p: float) -> Tensor:
    """Return the logits (B, V) with those of improbable tokens set to -inf (Nguyen et al., 2024).

    A token is improbable if its probability is less than p times that of the most likely token of its sequence.
    """
    probabilities = logits.softmax(-1)
    return logits.masked_fill(probabilities < p * probabilities.amax(-1, keepdim=True), -math.inf)


def penalize_repetition(logits: Tensor, seen: Tensor, penalty: float) -> Tensor:
    """Return logits (B, V) in which tokens that already occurred are less likely (Keskar et al., 2019).

    `seen` is a bool tensor (B, V) that is True for these tokens. Their positive logits are divided by the penalty, and their
    negative logits are multiplied by it.
    """
    penalty = min(max(penalty, 1e-30), 1e30)  # other values are zero or infinity in float32
    penalized = torch.where(logits > 0, logits / penalty, logits * penalty)
    # An extreme penalty must not lead to infinity, also after a division by the temperature.
    return torch.where(seen & logits.isfinite(), penalized.clamp(-_LARGEST_LOGIT, _LARGEST_LOGIT), logits)


def filter_logits(logits: Tensor, config: SamplingConfig, seen: Tensor | None = None) -> Tensor:
    """Return the logits (B, V) after the repetition penalty, the temperature and the filters of `config`.

    `seen` is a bool tensor (B, V) that is True for tokens that already occurred. If the temperature is 0,
    only the penalty is applied, because greedy decoding needs no filters.
    """
    if config.repetition_penalty is not None and seen is not None:
        logits = penalize_repetition(logits, seen, config.repetition_penalty)
    if config.temperature == 0:
        return logits
    # Outside this range the quotient overflows to inf or NaN. 1e-30 already means greedy, and 1e30 equal probabilities.
    logits = logits / min(max(config.temperature, 1e-30), 1e30)
    if config.top_k is not None:
        logits = keep_top_k(logits, config.top_k)
    if config.top_p is not None and config.top_p < 1:
        logits = keep_top_p(logits, config.top_p)
    if config.min_p:
        logits = keep_min_p(logits, config.min_p)
    return logits


def pick_next(
    logits: Tensor,
    config: SamplingConfig,
    generator: torch.Generator | Sequence[torch.Generator] | None = None,
    seen: Tensor | None = None,
) -> Tensor:
    """Return the next token of each sequence as int64 ids (B,), given the logits of the last position (B, V).

    Args:
        logits: the logits of the last position, (B, V).
        config: the sampling options.
        generator: the source of random numbers: one generator for all sequences, or a list with one generator per
            sequence. Default: torch's global generator.
        seen: a bool tensor (B, V) that is True for tokens that already occurred. Without it, no repetition penalty is
            applied.

    Raises FloatingPointError if the largest logit of a sequence is NaN or infinite. Single logits may be -inf, as after a
    filter.
    """
    logits = logits.float() if logits.dtype.itemsize < 4 else logits
    require_finite("a logit of the model", largest(logits))
    logits = filter_logits(logits, config, seen)
    if config.temperature == 0:
        return _argmax(logits)
    probabilities = logits.softmax(-1)
    if generator is None or isinstance(generator, torch.Generator):
        return torch.multinomial(probabilities, 1, generator=generator).squeeze(1)
    # torch.multinomial takes one generator for all rows. This is its algorithm, with the random numbers of each row from
    # the generator of the row: if q has an exponential distribution, the largest p / q is at i with probability p_i.
    noise = torch.empty_like(probabilities)
    for row, row_generator in zip(noise, generator, strict=True):
        row.exponential_(generator=row_generator)
    return _argmax(torch.div(probabilities, noise, out=noise))


def seeded_generators(seed: int, n: int, device: torch.device | str = "cpu") -> list[torch.Generator]:
    """Return n random generators on `device`, with the seeds seed, seed + 1, seed + 2 and so on."""
    return [torch.Generator(device).manual_seed((seed + i) % 2**64) for i in range(n)]


def largest(x: Tensor) -> Tensor:
    """Return the largest value of each row of x (B, V), as (B,). A row with NaN gives NaN."""
    if x.device.type == "cpu" and x.dtype in (torch.float32, torch.float64):
        return torch.from_numpy(x.detach().numpy().max(-1))  # ten times faster than torch's amax
    return x.amax(-1)


def _sorted(x: Tensor) -> Tensor:
    """Return each row of x (B, V) in ascending order."""
    if x.device.type == "cpu":
        return torch.from_numpy(np.sort(x.detach().numpy()))  # twenty times faster than torch's sort
    return x.sort().values


def _argmax(x: Tensor) -> Tensor:
    """Return the index of the largest value in each row of x (B, V), as int64 (B,)."""
    if x.device.type == "cpu":
        return torch.from_numpy(x.detach().numpy().argmax(-1))  # ten times faster than torch's argmax
    return x.argmax(-1)
