"""How much memory a model takes, reckoned from its shape: to run it, and to train it.

What is counted is what has a size of the model's: weights, gradients, the optimizer's moments, what the way back needs of
the way forward (after Korthikanti et al., 2022), keys and values. Not counted is what the process has anyway, Python and
torch (about 0.3 GB; a GPU's context about 0.5 GB). `benchmarks/memory_estimates.py` measures how far off this is.
C embedding width, H heads, T tokens of a sequence, V vocabulary.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from MyGPT.config import GPTConfig
from MyGPT.loss import MAX_LOGITS
from MyGPT.model import GPTModel

PARTS = {
    "token embedding": ".wte.",
    "position embedding": ".wpe.",
    "attention": ".attn.",
    "MLP": ".mlp.",
    "LayerNorms": ".ln_",
    "output head": "lm_head.",
}
"""The parts of a model, and how their weights' names are told."""


def parameters_by_part(config: GPTConfig) -> dict[str, int]:
    """How many numbers each part of the model holds; a tied output head has none of its own."""
    counts = dict.fromkeys(PARTS, 0)
    for name, parameter in _without_memory(config).named_parameters():
        counts[next(part for part, mark in PARTS.items() if mark in name)] += parameter.numel()
    return counts


def cache_bytes(config: GPTConfig, itemsize: int = 4) -> int:
    """Keys and values of one token, at `itemsize` bytes a number."""
    return 2 * config.n_layers * config.emb_dim * itemsize


def generation_bytes(config: GPTConfig, itemsize: int = 4, batch_size: int = 1, length: int | None = None) -> int:
    """The most that generating takes, for prompt and answer of `length` tokens together (default: the context).

    Weights, the cache, and the widest moment of the prompt's way through a block: its input, and the MLP's before and
    after GELU.
    """
    T = config.context_length if length is None else length
    widest = 10 * config.emb_dim * itemsize * T
    return _n_parameters(config) * itemsize + batch_size * (T * cache_bytes(config, itemsize) + widest)


@dataclass(frozen=True)
class TrainingMemory:
    """The bytes of a training step, by what they are for."""

    weights: int
    """In float32 at any precision."""
    gradients: int
    """As many."""
    moments: int
    """AdamW's two; Muon keeps one for the blocks' matrices."""
    activations: int
    """What the way back needs of the way forward, for one micro-batch."""
    head: int
    """Logits that exist at one time with their gradient, and the gradient of the head's weights."""
    tying: int
    """A tied head's gradient and the token embedding's, until they are one."""
    copies: int
    """The matrices in bf16, which autocast keeps until the step ends."""
    accumulates: bool
    """Whether a step has several micro-batches, whose gradients wait while the next is computed."""

    @property
    def peak(self) -> int:
        """The most at one time. On the way back activations go as gradients come, so only the larger of the two counts."""
        forward = self.activations + self.head + self.copies
        backward = self.gradients + self.tying
        passing = self.gradients + max(forward, self.tying) if self.accumulates else max(backward, forward)
        return self.weights + self.moments + passing


def training_memory(
    config: GPTConfig,
    batch_size: int = 1,
    *,
    length: int | None = None,
    bf16: bool = False,
    optimizer: str = "adamw",
    gradient_checkpointing: bool = False,
    accumulates: bool = False,
    device: str = "cpu",
) -> TrainingMemory:
    """What a step on micro-batches of `batch_size` sequences takes, each of `length` tokens (default: the context)."""
    T = config.context_length if length is None else length
    C, n_tokens = config.emb_dim, batch_size * T
    itemsize = 2 if bf16 else 4
    n, matrices = _n_parameters(config), 12 * config.n_layers * C * C
    saved = _saved_by_block(config, T, itemsize, device)
    kept = (4 * C * config.n_layers + saved) if gradient_checkpointing else saved * config.n_layers
    kept += (4 + itemsize) * C  # the last LayerNorm's input and output
    if config.drop_rate:
        kept += _dropped(4, C, device)
    logits = min(n_tokens * config.vocab_size, MAX_LOGITS)
    of_logits, of_weights = 2 * 4 * logits, 4 * config.vocab_size * C
    head = of_logits + of_weights
    if n_tokens * config.vocab_size > MAX_LOGITS:  # in chunks, and the gradient is scaled once more on the way back
        head = max(head, 2 * of_weights)
    return TrainingMemory(
        weights=4 * n,
        gradients=4 * n,
        moments=4 * (2 * n - matrices) if optimizer == "muon" else 8 * n,
        activations=n_tokens * kept,
        head=head,
        tying=2 * of_weights if config.tie_weights else 0,
        copies=2 * matrices + of_weights // 2 if bf16 else 0,
        accumulates=accumulates,
    )


def _saved_by_block(config: GPTConfig, T: int, itemsize: int, device: str) -> int:
    """Bytes a token that a block's way back needs.

    In float32 both LayerNorms' inputs; at the precision of the products queries, keys, values, attention's output, both
    LayerNorms' outputs, and the MLP before and after GELU (4 C each).
    """
    C, H = config.emb_dim, config.n_heads
    saved = 2 * 4 * C + itemsize * (3 + 1 + 2 + 4 + 4) * C
    if config.drop_rate == 0:
        return saved + 4 * H  # of each softmax one number
    saved += 2 * _dropped(itemsize, C, device)
    if device != "cpu":
        return saved + 4 * H
    # On a processor torch has no fused attention with dropout: in float32 the weights, their noise and their product stay,
    # T numbers a head each, and queries, keys and values are in float32 too.
    return saved + 3 * 4 * H * T + 3 * (4 - itemsize) * C


def _dropped(itemsize: int, n: int, device: str) -> int:
    """What dropout keeps of n numbers: a byte each that says whether, on a processor the factor itself."""
    return n * (itemsize if device == "cpu" else 1)


def _without_memory(config: GPTConfig) -> GPTModel:
    with torch.device("meta"):
        return GPTModel(config)


def _n_parameters(config: GPTConfig) -> int:
    return _without_memory(config).num_parameters()
