"""The only cross-entropy of the library: how many nats a model pays for the next token.

Sums and counts come apart, because a mean of means is wrong when batches differ in length: add both over batches, then
divide once. N = B * T positions, C embedding width, V vocabulary.
"""

from __future__ import annotations

import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The target that no loss counts, as in torch and transformers."""

MAX_LOGITS = 1 << 24
"""Most logits that exist at one time (64 MB in float32)."""

VOCAB_CHUNK = 2048
"""Words that a product on a processor takes at a time, so that what it makes is still in the cache when it is put away."""


def token_loss(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """Summed cross-entropy in nats, and how many targets were counted.

    logits (..., V) float; targets (...) int64, -100 is skipped. Computed in float32 at least.
    """
    logits = logits.flatten(0, -2)  # (N, V)
    logits = logits.float() if logits.dtype in (torch.float16, torch.bfloat16) else logits
    total = F.cross_entropy(logits, targets.flatten(), reduction="sum", ignore_index=IGNORED)
    return total, (targets != IGNORED).sum()


def linear_token_loss(hidden: Tensor, weight: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    """`token_loss(hidden @ weight.T, targets)` without ever holding all the logits.

    hidden (..., C), weight (V, C), targets (...) int64. For GPT-2's 50,257 words the logits are most of the memory of a
    training step. Products of many words are taken in chunks of rows whose gradients are computed on the way, so they can
    be had once: a second backward is an error.
    """
    hidden, flat_targets = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait to know how many
        counted = flat_targets != IGNORED
        if not counted.all():  # prompts and padding need no logits
            hidden, flat_targets = hidden[counted], flat_targets[counted]
    if len(weight) <= VOCAB_CHUNK and len(hidden) * len(weight) <= MAX_LOGITS:
        return token_loss(F.linear(hidden, weight), flat_targets)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    total = _ChunkedLinearLoss.apply(hidden, weight, flat_targets, torch.is_grad_enabled())
    return total, (targets != IGNORED).sum()


class _ChunkedLinearLoss(torch.autograd.Function):
    """The sum, in float32 at least. d loss / d logits is softmax minus one-hot, so the gradients follow at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, is_grad_enabled: bool) -> Tensor:
        (N, C), V = hidden.shape, len(weight)
        sums = torch.promote_types(hidden.dtype, torch.float32)
        total = hidden.new_zeros((), dtype=sums)
        of_hidden, of_weight = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = hidden.new_empty(N, C) if of_hidden else None
        weight_gradient = weight.new_zeros(V, C, dtype=sums) if of_weight else None
        counted = (targets != IGNORED)[:, None]  # (N, 1)
        index = targets[:, None].where(counted, 0)
        # A product whose rows begin at odd places takes up to a half longer: 50,257 words get room for 50,304.
        width = -(-V // 64) * 64
        n_rows = max(1, min(N, MAX_LOGITS // width))
        room = hidden.new_empty(n_rows, width, dtype=sums)
        n_words = VOCAB_CHUNK if hidden.device.type == "cpu" else V
        words = [slice(start, start + n_words) for start in range(0, V, n_words)]
        for start in range(0, N, n_rows):
            rows = slice(start, start + n_rows)
            x = hidden[rows]
            padded = room[: len(x)]
            padded[:, V:] = -math.inf
            logits = padded[:, :V]
            for some in words:
                logits[:, some] = F.linear(x, weight[some])
            of_target, highest = logits.gather(1, index[rows]), padded.amax(1, keepdim=True)
            # In place: to make room for 16 million numbers anew costs more than to compute them.
            probabilities = torch.softmax(padded, 1, out=padded)
            log_total = highest - probabilities.amax(1, keepdim=True).log()
            total += ((log_total - of_target) * counted[rows]).sum()
            if not (of_hidden or of_weight):
                continue
            gradient = logits.scatter_add_(1, index[rows], logits.new_full((len(x), 1), -1.0)).to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[rows] = F.linear(gradient, weight.T) * counted[rows]
            if weight_gradient is not None:
                x = x * counted[rows]
                for some in words:
                    weight_gradient[some] += F.linear(gradient[:, some].T, x.T)
        ctx.dtype = hidden.dtype
        ctx.save_for_backward(hidden_gradient, weight_gradient)
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        # Multiplied in float32: rounded to bf16 first, one factor would be wrong for all by up to 0.4%. What is float32
        # already is multiplied in place, for it may be 150 MB; a second backward finds it changed, and autograd says so.
        hidden_gradient, weight_gradient = (
            None if saved is None else saved.to(grad_output.dtype).mul_(grad_output).to(ctx.dtype)
            for saved in ctx.saved_tensors
        )
        return hidden_gradient, weight_gradient, None, None
