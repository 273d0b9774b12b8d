"""The only cross-entropy of the library: how many nats a model pays for the next token.

Sums and counts come apart, because a mean of means is wrong when batches differ in length: add both over batches, then
divide once. N = B * T positions, C embedding width, V vocabulary.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORED = -100
"""The target that no loss counts, as in torch and transformers."""

MAX_LOGITS = 1 << 24
"""Most logits that exist at one time (64 MB in float32)."""


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
    training step. Larger products are taken in chunks of rows whose gradients are computed on the way.
    """
    hidden, flat_targets = hidden.flatten(0, -2), targets.flatten()  # (N, C), (N,)
    if hidden.device.type == "cpu" and not torch.compiler.is_compiling():  # a GPU would have to wait to know how many
        counted = flat_targets != IGNORED
        if not counted.all():  # prompts and padding need no logits
            hidden, flat_targets = hidden[counted], flat_targets[counted]
    rows = max(1, MAX_LOGITS // len(weight))
    if len(hidden) <= rows:
        return token_loss(F.linear(hidden, weight), flat_targets)
    device = hidden.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        hidden, weight = hidden.to(dtype), weight.to(dtype)
    # torch's own (since 2.13) gives its sum in the inputs' dtype, which for bf16 is 3 digits: not for half precision.
    if hasattr(F, "linear_cross_entropy") and hidden.dtype.itemsize >= 4:
        # Compiled, torch wants a second backward to be possible, and warns where it must see to that itself.
        options = torch.nn.LinearCrossEntropyOptions(
            batch_chunk_size=rows, allow_retain_graph=torch.compiler.is_compiling()
        )
        total = F.linear_cross_entropy(
            hidden, weight, flat_targets, reduction="sum", ignore_index=IGNORED, options=options
        )
    else:
        total = _ChunkedLinearLoss.apply(hidden, weight, flat_targets, rows, torch.is_grad_enabled())
    return total, (targets != IGNORED).sum()


class _ChunkedLinearLoss(torch.autograd.Function):
    """The same in float32 sums at any precision. d loss / d logits is softmax minus one-hot, so gradients follow at once."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, targets: Tensor, rows: int, is_grad_enabled: bool) -> Tensor:
        total = torch.zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32), device=hidden.device)
        of_hidden, of_weight = (is_grad_enabled and needed for needed in ctx.needs_input_grad[:2])
        hidden_gradient = torch.empty_like(hidden) if of_hidden else None
        weight_gradient = torch.zeros_like(weight, dtype=total.dtype) if of_weight else None
        for start in range(0, len(hidden), rows):
            part = slice(start, start + rows)
            logits = F.linear(hidden[part], weight).to(total.dtype)  # (rows, V)
            counted = targets[part] != IGNORED
            index = targets[part].where(counted, 0)[:, None]
            log_total = logits.logsumexp(1, keepdim=True)
            total += ((log_total - logits.gather(1, index)).squeeze(1) * counted).sum()
            if not (of_hidden or of_weight):
                continue
            gradient = logits.sub_(log_total).exp_()
            gradient.scatter_add_(1, index, gradient.new_full(index.shape, -1.0))
            gradient = gradient.mul_(counted[:, None]).to(weight.dtype)
            if hidden_gradient is not None:
                hidden_gradient[part] = gradient @ weight
            if weight_gradient is not None:
                weight_gradient += gradient.T @ hidden[part]
        ctx.save_for_backward(hidden_gradient, None if weight_gradient is None else weight_gradient.to(weight.dtype))
        return total

    @staticmethod
    def backward(ctx: Any, grad_output: Tensor) -> tuple[Tensor | None, Tensor | None, None, None, None]:
        # Multiplied in grad_output's float32: rounded to bf16 first, one factor would be wrong for all by up to 0.4%.
        hidden_gradient, weight_gradient = (
            None if saved is None else (saved.to(grad_output.dtype) * grad_output).to(saved.dtype)
            for saved in ctx.saved_tensors
        )
        return hidden_gradient, weight_gradient, None, None, None
