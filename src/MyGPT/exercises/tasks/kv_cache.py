"""Exercise 7: the key-value cache. Write `KVCache.append` and `forward_cached`.

A model generates one token at a time. Without a cache, every step would compute the keys and values of all earlier tokens
again. But these never change, because causal attention makes them independent of later tokens. So they are stored, and each
step computes the new token alone. Its query still attends to all stored keys. Every fast generator works in this way.

Example: a sequence has the ids [5, 3, 8], and its keys and values are in the cache, so cache.length is 3. The next call gets
the ids [[4]]. This token has position 3, not 0. It adds one key and one value, attends to all four, and the length becomes 4.
If a call gets two new ids, the first of them must not see the second: their mask is [[1, 1, 1, 1, 0], [1, 1, 1, 1, 1]].

The model below has a single attention layer. Its `forward` shows the computation without a cache.
Check your work with `mygpt check kv_cache`. A hint is at the end of this file.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class OneLayerModel(nn.Module):
    """A model with one attention layer. B batch size, T tokens, C embedding width, H heads, D = C // H, V vocabulary size."""

    def __init__(self, vocab_size: int, context_length: int, emb_dim: int, n_heads: int) -> None:
        super().__init__()
        self.n_heads = n_heads
        self.wte = nn.Embedding(vocab_size, emb_dim)
        self.wpe = nn.Embedding(context_length, emb_dim)
        self.c_attn = nn.Linear(emb_dim, 3 * emb_dim)
        self.c_proj = nn.Linear(emb_dim, emb_dim)
        self.lm_head = nn.Linear(emb_dim, vocab_size)

    def split_heads(self, x: Tensor) -> Tensor:
        """Return x (B, T, C) as (B, H, T, D)."""
        B, T, _ = x.shape
        return x.view(B, T, self.n_heads, -1).transpose(1, 2)

    def forward(self, ids: Tensor) -> Tensor:
        """Return the logits (B, T, V) of the token ids (B, T), computed without a cache."""
        B, T = ids.shape
        positions = torch.arange(T)
        x = self.wte(ids) + self.wpe(positions)  # (B, T, C)
        q, k, v = map(self.split_heads, self.c_attn(x).chunk(3, dim=-1))  # each (B, H, T, D)
        mask = torch.ones(T, T, dtype=torch.bool).tril()
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)  # (B, H, T, D)
        y = y.transpose(1, 2).reshape(B, T, -1)
        return self.lm_head(x + self.c_proj(y))


class KVCache:
    """The keys and values of all tokens so far, each (B, H, S, D), or None at first."""

    def __init__(self) -> None:
        self.keys: Tensor | None = None
        self.values: Tensor | None = None

    @property
    def length(self) -> int:
        """Number of tokens S in the cache."""
        return 0 if self.keys is None else self.keys.shape[2]

    def append(self, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Add the keys and values of T new tokens, each (B, H, T, D), after those in the cache.

        Return the keys and the values of all tokens so far, each (B, H, S + T, D).
        """
        raise NotImplementedError


def forward_cached(model: OneLayerModel, ids: Tensor, cache: KVCache) -> Tensor:
    """Return the logits of T new tokens, (B, T, V), and add their keys and values to the cache.

    The result must equal the last T positions of model(all ids so far). Compute only the new tokens: do not store their ids,
    and do not run the layers for earlier tokens again.

    Args:
        model: the model; use its layers as `OneLayerModel.forward` does.
        ids: the ids of the new tokens, (B, T) int64. T may be 1 or more.
        cache: the keys and values of the earlier tokens.
    """
    raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. `append` is two calls of torch.cat along the dimension of the tokens, and both results must be stored. Start
# `forward_cached` as a copy of `OneLayerModel.forward` and change three things: the positions start at cache.length (read it
# before append), k and v come back from append, and the mask has T rows and S columns, where S now counts the new tokens too.
# Row 0 is token number S - T, so use torch.ones(T, S, dtype=torch.bool).tril(S - T). Do not use is_causal=True: it aligns the
# mask with the first key.
