"""Solution of exercise 5: cross-entropy and perplexity."""

from __future__ import annotations

from torch import Tensor


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, a tensor with the shape ()."""
    logits, targets = logits[:, :-1], ids[:, 1:]  # (B, T - 1, V), (B, T - 1)
    log_probabilities = logits - logits.logsumexp(dim=-1, keepdim=True)  # (B, T - 1, V)
    of_targets = log_probabilities.gather(-1, targets.unsqueeze(-1))  # (B, T - 1, 1)
    return -of_targets.mean()


def perplexity(loss: Tensor) -> Tensor:
    """Return the perplexity of a mean cross-entropy in nats, a tensor with the shape ()."""
    return loss.exp()
