"""Solution of exercise 6: temperature, top-k and top-p."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def next_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities from which the next token of each sequence is drawn, (B, V). Each row sums to 1."""
    V = logits.shape[-1]
    if temperature == 0:
        return F.one_hot(logits.argmax(-1), V).to(logits.dtype)
    logits = logits / temperature
    if top_k is not None:
        threshold = logits.topk(min(top_k, V)).values[:, -1:]  # (B, 1)
        logits = logits.masked_fill(logits < threshold, -math.inf)
    if top_p is not None:
        probabilities, order = logits.softmax(-1).sort(dim=-1, descending=True)
        sum_before = probabilities.cumsum(-1) - probabilities
        is_kept = sum_before < top_p  # in descending order
        is_kept[:, 0] = True
        is_kept = torch.zeros_like(is_kept).scatter(-1, order, is_kept)  # in the order of the vocabulary
        logits = logits.masked_fill(~is_kept, -math.inf)
    return logits.softmax(-1)
