"""Exercise 4: a transformer block. Write `Block.forward`.

GPT-2 is a stack of blocks of the same structure. The vectors of the tokens flow through all of them; this is the residual
stream. A block adds to the stream twice: first the output of attention, which moves information between tokens, then the
output of an MLP, which works on each token separately. Both read a normalised copy of the stream (pre-LN). Because a block
only adds, gradients flow back along the stream unchanged, which makes deep models trainable.

Example of the splitting into heads: C = 4 and H = 2, so D = 2. If the query of a token is [1, 2, 3, 4], head 0 gets [1, 2] and
head 1 gets [3, 4]. After attention, the outputs of the heads are put side by side again in the same order.
Example of the residual stream: if a token is [1, 1], attention gives [0.5, 0] and the MLP gives [0, 2], the token becomes
[1.5, 1] and then [1.5, 3].

Check your work with `mygpt check block`. A hint is at the end of this file.
"""

from __future__ import annotations

from torch import Tensor, nn


class Block(nn.Module):
    """A block of GPT-2. B batch size, T tokens, C embedding width, H heads, D = C // H."""

    def __init__(self, emb_dim: int, n_heads: int) -> None:
        """Make the layers. You need not change this function."""
        super().__init__()
        self.n_heads = n_heads
        self.ln_1 = nn.LayerNorm(emb_dim)
        self.c_attn = nn.Linear(emb_dim, 3 * emb_dim)  # the queries, keys and values of all heads, in this order
        self.attn_proj = nn.Linear(emb_dim, emb_dim)  # applied to the outputs of all heads side by side
        self.ln_2 = nn.LayerNorm(emb_dim)
        self.c_fc = nn.Linear(emb_dim, 4 * emb_dim)
        self.mlp_proj = nn.Linear(4 * emb_dim, emb_dim)

    def forward(self, x: Tensor) -> Tensor:
        """Return the residual stream after this block, (B, T, C), given the stream x before it, (B, T, C).

        Use torch.nn.functional.scaled_dot_product_attention with is_causal=True for attention, and
        torch.nn.functional.gelu with approximate="tanh", as GPT-2 does, between the two layers of the MLP. Do not change x.
        """
        raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. The first half: c_attn(ln_1(x)).chunk(3, dim=-1) gives q, k and v, each (B, T, C). view(B, T, H, D).transpose(1, 2)
# makes (B, H, T, D) from each. After attention, transpose(1, 2).reshape(B, T, C) undoes this. Then comes attn_proj, and the
# result is added to x. The second half reads the new x: mlp_proj(gelu(c_fc(ln_2(x)))) is added to it.
