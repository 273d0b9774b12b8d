"""Exercise 6: temperature, top-k and top-p. Write `next_probabilities`.

A model gives logits for the next token, and a random draw from their softmax chooses the token. Three options change what can
be drawn. The temperature divides the logits: below 1 the likely tokens become even likelier, above 1 all become more equal.
Top-k keeps the k most likely tokens. Top-p keeps the smallest set of the most likely tokens whose probabilities sum to at
least p: few tokens where the model is sure, many where it is not.

Example: the probabilities are [0.5, 0.1, 0.3, 0.1] before filtering.
    top_k = 2 keeps the tokens 0 and 2. Divided by their sum 0.8, the result is [0.625, 0, 0.375, 0].
    top_p = 0.7 also keeps the tokens 0 and 2: 0.5 alone is less than 0.7, and 0.5 + 0.3 = 0.8 is enough.
    top_p = 0.4 keeps token 0 only. The result is [1, 0, 0, 0].

Check your work with `mygpt check sampling`. A hint is at the end of this file.
"""

from __future__ import annotations

from torch import Tensor


def next_probabilities(
    logits: Tensor, temperature: float = 1.0, top_k: int | None = None, top_p: float | None = None
) -> Tensor:
    """Return the probabilities from which the next token of each sequence is drawn, (B, V). Each row sums to 1.

    The temperature is applied first, then top-k, then top-p to the probabilities that remain after top-k. At least one token
    is always kept. Do not change the logits.

    Args:
        logits: the logits of the last position of B sequences, (B, V). Sequences are filtered independently.
        temperature: divisor of the logits. 0 gives the most likely token the probability 1.
        top_k: number of tokens to keep, or None to keep all. It may be larger than V.
        top_p: smallest total probability of the kept tokens, or None to keep all.
    """
    raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. Excluded tokens get the logit minus infinity, so that the final softmax gives them 0 and makes the others sum to 1.
# Top-k: the k-th largest logit of each row is a threshold. Top-p: sort the probabilities in descending order. A token is
# kept if the sum of the tokens BEFORE it is less than p; this keeps the token that crosses p. Then bring the decision back
# to the original order with scatter. If top_k is larger than V, topk(top_k) fails: use min(top_k, V).
