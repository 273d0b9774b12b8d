"""Exercise 3: causal multi-head attention. Write `attention`.

In attention, every token gathers information from the tokens before it. Each token has a query ("what do I look for?"), a key
("what do I have?") and a value ("what do I pass on?"). The score of a query and a key is their dot product divided by √D.
Without this division, the scores would grow with the width D of a head, and softmax would put almost all weight on one token.
Softmax turns the scores of a query into weights with the sum 1, and the output is the weighted sum of the values. "Causal"
means that a token cannot see later tokens, because it must predict them. Every head computes this separately.

Example with one head, D = 1 and two tokens: the queries are [1, 2], the keys [1, 3] and the values [10, 20].
    Token 0 sees only itself, so its output is 10.
    Token 1 has the scores 2 · 1 = 2 and 2 · 3 = 6. Their softmax is [0.018, 0.982], so its output is
    0.018 · 10 + 0.982 · 20 = 19.82.

Check your work with `mygpt check attention`. A hint is at the end of this file.
"""

from __future__ import annotations

from torch import Tensor


def attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the attention output softmax(q kᵀ / √D) v, (B, H, T, D).

    B batch size, H heads, T queries, S keys, D width of a head. The queries belong to the last T of the S tokens. T and S are
    equal except in generation with a cache, where the keys of earlier tokens are already known. Do not change q, k and v.

    Args:
        q: queries, (B, H, T, D).
        k: keys, (B, H, S, D) with S >= T.
        v: values, (B, H, S, D).
        mask: a bool tensor that can be broadcast to (B, H, T, S). It is True where a query may attend to a key. None means
            causal attention: a query sees its own token and all tokens before it.
    """
    raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. Four lines are enough: the scores (B, H, T, S), the causal mask if none was given, masked_fill with minus infinity
# before the softmax, and a matrix product with v. k.transpose(-2, -1) has the shape (B, H, D, S). With S = T the causal mask
# is a lower triangle: torch.ones(T, S, dtype=torch.bool).tril(). With S > T, query number 0 is token number S - T, so the
# diagonal moves to the right; see the argument `diagonal` of tril.
