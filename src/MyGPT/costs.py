"""The costs of a model, computed from its sizes: parameters, floating-point operations (FLOPs), memory, training time.

Memory estimates count what grows with the model: weights, gradients, the optimizer's moments, activations (after
Korthikanti et al., 2022), keys and values. They leave out Python and torch (about 0.3 GB) and a GPU's context (about 0.5 GB).
`benchmarks/memory_estimates.py` measures the error of the estimates. On several ranks (processes that train one model
together), memory and communication are those of one rank. T tokens, C embedding width, H heads, L layers, V vocabulary.
"""

from __future__ import annotations

import dataclasses
import math
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import median

import torch
from torch import nn

from MyGPT.config import GPTConfig
from MyGPT.loss import chunk_sizes


def parameters_by_part(config: GPTConfig) -> dict[str, int]:
    """Return the number of parameters of each part of the model, such as "attention".

    A tied output head counts as 0, because its weight is the token embedding, which is already counted.
    """
    V, T, C, L = config.vocab_size, config.context_length, config.emb_dim, config.n_layers
    return {
        "token embedding": V * C,
        "position embedding": T * C,
        "attention": L * (4 * C * C + C + (3 * C if config.qkv_bias else 0)),
        "MLP": L * (8 * C * C + 5 * C),
        "LayerNorms": (2 * L + 1) * 2 * C,
        "output head": 0 if config.tie_weights else V * C,
    }


def count_matrix_weights(model: nn.Module) -> int:
    """Return the number of weights in all matrix products of the model.

    An embedding table is counted only if the output head multiplies by it (tied weights).
    """
    # A tied head multiplies too; its weight is found in the head.
    layers = [module for module in model.modules() if not isinstance(module, nn.Embedding)]
    weights = [parameter for layer in layers for parameter in layer.parameters(recurse=False)]
    return sum(weight.numel() for weight in weights if weight.dim() == 2)


def flops_per_token(
    config: GPTConfig, n_tokens: int | None = None, backward: bool = True, n_weights: int | None = None
) -> int:
    """Return the floating-point operations per token in a sequence of n_tokens (default: the model's context length).

    A forward pass takes 2 operations per matrix weight, and 4 * emb_dim * n_tokens per layer for attention, which is counted
    without the causal mask (Chowdhery et al., 2022, appendix B). If `backward` is true, the backward pass is added, which
    takes twice as many operations as the forward pass. n_weights is the number of matrix weights (default:
    computed from `config`).
    """
    C, L = config.emb_dim, config.n_layers
    T = config.context_length if n_tokens is None else n_tokens
    if n_weights is None:
        n_weights = 12 * L * C * C + config.vocab_size * C
    forward = 2 * n_weights + 4 * L * C * T
    return 3 * forward if backward else forward


def matmul_speed(device: torch.device, dtype: torch.dtype) -> float:
    """Return the measured speed of multiplying two square matrices, in floating-point operations per second (median of 3)."""
    n = 512 if device.type == "cpu" else 4096  # a CPU without bf16 instructions takes seconds for larger matrices
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / median_seconds(lambda: a @ b, device, 3)


def median_seconds(work: Callable[[], object], device: torch.device, n: int) -> float:
    """Return the median seconds of n calls of `work`, which runs on `device`, after one call to warm up."""
    times = []
    for _ in range(n + 1):
        start = time.perf_counter()
        work()
        if device.type != "cpu":  # GPUs, Apple's included, work in the background.
            torch.accelerator.synchronize(device)
        times.append(time.perf_counter() - start)
    return median(times[1:])


def estimate_step_seconds(
    config: GPTConfig, batch_size: int, measure_step: Callable[[GPTConfig, int], float], flops_per_second: float
) -> float:
    """Estimate the seconds of a training step on batch_size sequences, each as long as the model's context length.

    `measure_step(config, n_sequences)` runs a step and returns its seconds. If the whole step would take over one second at
    half of flops_per_second (see `matmul_speed`), a step with fewer sequences, and if necessary fewer layers, is measured
    instead. The measured time is then multiplied by the ratio of the whole step's operations to the smaller step's.
    """

    def flops(part: GPTConfig, n_sequences: int) -> int:
        return flops_per_token(part) * n_sequences * config.context_length

    part, n_sequences, most = config, batch_size, flops_per_second / 2
    while n_sequences > 1 and flops(part, n_sequences) > most:
        n_sequences = (n_sequences + 1) // 2
    while part.n_layers > 1 and flops(part, n_sequences) > most:
        part = dataclasses.replace(part, n_layers=(part.n_layers + 1) // 2)
    return measure_step(part, n_sequences) * flops(config, batch_size) / flops(part, n_sequences)


def cache_bytes(config: GPTConfig, itemsize: int = 4) -> int:
    """Return the bytes that the KV cache needs per token of one sequence, with `itemsize` bytes per number."""
    return 2 * config.n_layers * config.emb_dim * itemsize


def generation_memory(
    config: GPTConfig, itemsize: int = 4, batch_size: int = 1, length: int | None = None
) -> dict[str, int]:
    """Estimate the peak memory of generating text for batch_size prompts at once: the bytes for each purpose.

    The purposes are the weights, the KV cache, and the largest activations of the prompt, which are the input of an MLP and
    its hidden layer before and after GELU. `itemsize` is the size of a number in bytes, and `length` the number of tokens of
    prompt and answer together (default: the model's context length).
    """
    T = config.context_length if length is None else length
    return {
        "weights": sum(parameters_by_part(config).values()) * itemsize,
        "KV cache": batch_size * T * cache_bytes(config, itemsize),
        "activations": batch_size * 10 * config.emb_dim * itemsize * T,
    }


def generation_bytes(config: GPTConfig, itemsize: int = 4, batch_size: int = 1, length: int | None = None) -> int:
    """Estimate the peak memory, in bytes, of generating text (see `generation_memory`)."""
    return sum(generation_memory(config, itemsize, batch_size, length).values())


@dataclass(frozen=True)
class TrainingMemory:
    """The estimated memory of a training step on one rank, in bytes for each purpose, such as weights or gradients."""

    weights: int
    """Bytes for the weights, which are float32 even if training uses bf16."""
    gradients: int
    """Bytes for the gradients, which take as much memory as the weights."""
    moments: int
    """Bytes for the optimizer's moments. AdamW stores two numbers per weight. Muon stores one per weight of the blocks'
    matrices, and two per other weight."""
    activations: int
    """Bytes for the activations of one micro-batch that the forward pass stores for the backward pass."""
    head: int
    """Bytes for the logits that exist at one time, their gradient, and the gradient of the output head's weight."""
    head_gradient: int
    """Bytes for the gradient of the output head's weight, which exists until the backward pass ends."""
    tying: int
    """Bytes for two gradients of a tied weight, one from the output head and one from the embedding, before they are added."""
    copies: int
    """Bytes for the bf16 copies of the weight matrices, which autocast keeps until the step ends."""
    accumulates: bool
    """True if a step has several micro-batches, so that the gradients of one exist during the forward pass of the next."""
    root: int = 0
    """Bytes for the gathered weights outside of the blocks, which a distributed model keeps during the whole step."""
    block: int = 0
    """Bytes for the gathered weights of the block that is being computed."""
    prefetched: int = 0
    """Bytes for the weights of the next block, which are gathered during the computation."""
    reducing: int = 0
    """Bytes for the gradients of one block, and the copy of them from which the sum over the ranks is computed."""
    whole: int = 0
    """Bytes for the copy of all weights that each rank keeps on the CPU, from which the model is saved."""
    root_reducing: int = 0
    """Bytes for the gradients of the weights outside of the blocks, and the copy of them for the sum over the ranks."""

    def at_peak(self) -> dict[str, int]:
        """Return the bytes in use when a step needs most memory, for each purpose. Their sum is the peak."""
        # The backward pass frees activations while it makes gradients, so only the largest of three moments counts: the
        # end of the forward pass, the gradients of the last block, and the end of the backward pass.
        gathered = self.root + self.prefetched
        forward = {"activations": self.activations, "logits": self.head, "copies": self.copies, "gathered": gathered}
        last_block = {
            **forward,
            "logits": self.head_gradient,
            "gathered": gathered + self.block,
            "reducing": self.reducing,
        }
        if self.accumulates:
            forward["gradients"] = last_block["gradients"] = self.gradients
        backward = {
            "gradients": self.gradients,
            "tying": self.tying,
            "gathered": self.root,
            "reducing": self.root_reducing,
        }
        largest = max((backward, forward, last_block), key=lambda parts: sum(parts.values()))
        return {"weights": self.weights + self.whole, "moments": self.moments, **largest}

    @property
    def peak(self) -> int:
        """Largest number of bytes in use at one time."""
        return sum(self.at_peak().values())


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
    shard_size: int | None = None,
) -> TrainingMemory:
    """Estimate the memory of a training step on one rank.

    Args:
        config: sizes of the model.
        batch_size: sequences per micro-batch of the rank.
        length: tokens per sequence (default: the model's context length).
        bf16: True for training under bf16 autocast.
        optimizer: "adamw" or "muon".
        gradient_checkpointing: True if each block is recomputed in the backward pass.
        accumulates: True if a step adds up the gradients of several micro-batches.
        device: "cpu", or any other name for a GPU. The result depends on it, because dropout takes more memory on a CPU.
        shard_size: number of ranks that divide one copy of the weights, gradients and moments. 1 means that each rank has
            them all, as with parallel: ddp. None means that the model is not distributed.
    """
    T = config.context_length if length is None else length
    C, n_tokens = config.emb_dim, batch_size * T
    itemsize = 2 if bf16 else 4
    saved = _bytes_saved_by_block(config, T, itemsize, device)
    kept = (4 * C * config.n_layers + saved) if gradient_checkpointing else saved * config.n_layers
    kept += (4 + itemsize) * C  # input and output of the final LayerNorm
    if config.drop_rate:
        kept += _dropout_bytes(4, C, device)
    max_logits = chunk_sizes(device)[1]
    logits = min(n_tokens * config.vocab_size, max_logits)
    logits_bytes, weight_bytes = 2 * 4 * logits, 4 * config.vocab_size * C
    head = logits_bytes + weight_bytes
    if n_tokens * config.vocab_size > max_logits:  # computed in chunks; the backward pass scales a copy of the gradient
        head = max(head, 2 * weight_bytes)
    is_distributed, size = shard_size is not None, shard_size or 1
    block, root = _block_shapes(config), _root_shapes(config)
    # The optimizer works on the rows of this rank, and the communication on the same number of rows for each rank.
    own = config.n_layers * _shard(block, size) + _shard(root, size)
    matrices = config.n_layers * _shard((shape for shape in block if len(shape) == 2), size)
    whole_block, whole_root = size * _shard(block, size), size * _shard(root, size)
    distributed = {
        "root": 4 * whole_root,
        "block": itemsize * whole_block,
        "prefetched": itemsize * whole_block if size > 1 else 0,
        "reducing": (itemsize + 4) * whole_block,  # summed in float32
        "root_reducing": 2 * 4 * whole_root,
        "whole": 4 * sum(parameters_by_part(config).values()) if device == "cpu" else 0,
    }
    copies = weight_bytes // 2 + (0 if is_distributed else 2 * matrices)
    return TrainingMemory(
        weights=4 * own,
        gradients=4 * own,
        moments=4 * (2 * own - matrices) if optimizer == "muon" else 8 * own,
        activations=n_tokens * kept,
        head=head,
        head_gradient=weight_bytes,
        tying=2 * weight_bytes if config.tie_weights and not is_distributed else 0,
        copies=copies if bf16 else 0,
        accumulates=accumulates,
        **(distributed if is_distributed else {}),
    )


def communication(
    config: GPTConfig,
    n_ranks: int,
    shard_size: int,
    *,
    n_micro_batches: int = 1,
    bf16: bool = False,
    optimizer: str = "adamw",
) -> dict[str, int]:
    """Return the bytes that one rank sends in a training step, for each collective operation.

    Each operation is counted as a ring: with n ranks, an all-gather or a reduce-scatter sends n - 1 shards, and an
    all-reduce twice as much. Each rank receives as many bytes as it sends.

    Args:
        config: sizes of the model.
        n_ranks: number of ranks, a multiple of shard_size.
        shard_size: number of ranks that divide one copy of the weights: 1 for parallel: ddp.
        n_micro_batches: number of micro-batches of a rank per step.
        bf16: True if the weights of the blocks are gathered in bf16.
        optimizer: "adamw" or "muon".
    """
    L, n_copies = config.n_layers, n_ranks // shard_size
    block, root = _block_shapes(config), _root_shapes(config)
    block_shard, root_shard = L * _shard(block, shard_size), _shard(root, shard_size)
    # Blocks are gathered for the forward pass and again for the backward pass, the other weights once for both.
    gathered = 2 * (2 if bf16 else 4) * block_shard + 4 * root_shard
    sent = {
        "all-gather": n_micro_batches * (shard_size - 1) * gathered,
        "reduce-scatter": n_micro_batches * (shard_size - 1) * 4 * (block_shard + root_shard),
        "all-reduce": 2 * (n_copies - 1) * 4 * (block_shard + root_shard) // n_copies,
    }
    if optimizer == "muon":
        # Each matrix is sent to the rank that orthogonalizes it, and the result back to the ranks of its rows.
        rows = [
            math.ceil(n_rows / shard_size) * n_columns
            for n_rows, n_columns in (shape for shape in block if len(shape) == 2)
        ]
        n_owned = math.ceil(L / n_ranks)  # of the matrices of one shape
        sent["Muon"] = sum((2 * (shard_size - 1) + (n_ranks - shard_size)) * n_owned * 4 * n for n in rows)
    return sent


Shape = tuple[int, ...]


def _block_shapes(config: GPTConfig) -> list[Shape]:
    """Return the shapes of the parameters of a block."""
    C = config.emb_dim
    qkv = [(3 * C, C), *([(3 * C,)] if config.qkv_bias else [])]
    return [*qkv, (C, C), (C,), (4 * C, C), (4 * C,), (C, 4 * C), (C,), *4 * [(C,)]]  # the LayerNorms last


def _root_shapes(config: GPTConfig) -> list[Shape]:
    """Return the shapes of the parameters outside of the blocks."""
    V, T, C = config.vocab_size, config.context_length, config.emb_dim
    return [(V, C), (T, C), (C,), (C,), *([] if config.tie_weights else [(V, C)])]


def _shard(shapes: Iterable[Shape], shard_size: int) -> int:
    """Return how many numbers each rank stores of tensors of these shapes, whose rows are divided over shard_size ranks.

    If the rows cannot be divided evenly, torch pads the smaller shards.
    """
    return sum(math.ceil(n_rows / shard_size) * math.prod(rest) for n_rows, *rest in shapes)


def _bytes_saved_by_block(config: GPTConfig, T: int, itemsize: int, device: str) -> int:
    """Return the bytes per token that one transformer block stores for the backward pass, in sequences of T tokens.

    The inputs of both LayerNorms are float32. Queries, keys, values, attention's output, both LayerNorms' outputs, and the
    MLP's hidden layer before and after GELU (4 C numbers each) take `itemsize` bytes per number.
    """
    C, H = config.emb_dim, config.n_heads
    saved = 2 * 4 * C + itemsize * (3 + 1 + 2 + 4 + 4) * C
    if config.drop_rate == 0:
        return saved + 4 * H  # one number for each softmax
    saved += 2 * _dropout_bytes(itemsize, C, device)
    if device != "cpu":
        return saved + 4 * H
    # On a CPU torch has no fused attention with dropout. It stores the attention weights, their dropout mask and the product,
    # each T float32 numbers per head, and converts queries, keys and values to float32.
    return saved + 3 * 4 * H * T + 3 * (4 - itemsize) * C


def _dropout_bytes(itemsize: int, n: int, device: str) -> int:
    """Return the bytes that dropout of n numbers stores for the backward pass.

    On a CPU, dropout stores n factors of `itemsize` bytes. On any other device, it stores n flags of one byte.
    """
    return n * (itemsize if device == "cpu" else 1)
