"""Exercise 5: cross-entropy and perplexity. Write `next_token_loss` and `perplexity`.

The loss measures how surprised the model is by the text. A model gives a score (logit) to each entry of the vocabulary, and
softmax turns the logits into probabilities. If the true next token has the probability p, the loss of this position is -ln(p).
The loss of a text is the mean over all positions. Perplexity is exp(loss): a perplexity of 20 means that the model is as
uncertain as if it chose among 20 equally likely tokens.

Example: the vocabulary has two tokens, the text is the ids [0, 1, 1], and the logits at its positions are [0, 0], [0, ln 3]
and [5, 5].
    Position 0 must predict id 1, which has the probability 1/2: loss ln 2 = 0.693.
    Position 1 must predict id 1, which has the probability 3 / (1 + 3) = 3/4: loss ln(4/3) = 0.288.
    Position 2 has no next token, so its logits do not count. The loss is the mean, 0.490, and the perplexity is 1.633.

Do not use torch.nn.functional.cross_entropy, because it is the solution.
Check your work with `mygpt check loss`. A hint is at the end of this file.
"""

from __future__ import annotations

from torch import Tensor


def next_token_loss(logits: Tensor, ids: Tensor) -> Tensor:
    """Return the mean cross-entropy in nats, a tensor with the shape ().

    The logits at position t predict the id at position t + 1, so B * (T - 1) predictions count. Very large logits, such as
    1000, must not give inf or nan. Gradients must reach the logits. Do not change the arguments.

    Args:
        logits: (B, T, V) float, with T >= 2.
        ids: token ids of the same text, (B, T) int64.
    """
    raise NotImplementedError


def perplexity(loss: Tensor) -> Tensor:
    """Return the perplexity of a mean cross-entropy in nats, a tensor with the shape ()."""
    raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. Drop the last position of the logits and the first id, so that both have T - 1 positions. The logarithm of a
# probability is logit - logsumexp(logits), and torch.logsumexp is safe for large numbers (so is log_softmax). To pick the
# log-probability of each target, use gather: its index needs the same number of dimensions, so add one with unsqueeze(-1).
