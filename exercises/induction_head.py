"""Open task: an induction head by hand. Write `build_model`.

An induction head continues repetitions: after "A B … A" it predicts B. It needs two layers. A head of layer 0 writes into
every token which token came before it. A head of layer 1 looks for an earlier position that follows a copy of the current
token, attends to it, and copies the token that it finds there. Trained models develop such heads suddenly, and they may carry
much of a model's ability to learn from its prompt (Olsson et al., 2022). Here you set all weights yourself, so you know what
each one does.

A plan: use three parts of the embedding, C = 2 V + T.
    The first V numbers are one-hot for the token, which `wte` sets.
    The next T numbers are one-hot for the position, which `wpe` sets.
    The last V numbers are free. The head of layer 0 writes there, one-hot, the token before.
Example with V = 3, T = 2: token 2 at position 1, after token 0, is [0, 0, 1,  0, 1,  1, 0, 0] after layer 0.

`mygpt check induction_head` runs your model on random tokens that are repeated once. It asks whether the second half is
predicted, and whether `MyGPT.inside.induction_scores` finds the head. A hint is at the end of this file.
"""

from __future__ import annotations

from MyGPT import GPTConfig, GPTModel

V, T = 64, 32
CONFIG = GPTConfig(
    vocab_size=V, context_length=T, emb_dim=2 * V + T, n_heads=1, n_layers=2, drop_rate=0.0, tie_weights=True
)


def build_model() -> GPTModel:
    """Return a GPTModel with two layers that contains an induction head.

    You may change CONFIG, as long as the model has two layers, at least 32 tokens in the vocabulary, and a context of at least
    16 tokens. Change weights under torch.no_grad(). `model.named_parameters()` lists their names, such as
    transformer.wte.weight and transformer.h.0.attn.c_attn.weight, which is model.transformer.h[0].attn.c_attn.weight in Python.
    """
    raise NotImplementedError


if __name__ == "__main__":
    from MyGPT.cli import main

    raise SystemExit(main(["check", __file__]))

# Hint. Begin by setting every parameter to zero, and only then set what you need.
# 1. A LayerNorm subtracts the mean and divides by the standard deviation. If every token has the same number of ones, both
#    are the same for all tokens, so a weight and a bias of ln_1 and ln_f can undo the LayerNorm exactly. Before layer 0,
#    each token has two ones among C numbers: m = 2 / C, s = √(m (1 - m)). After layer 0 there are three.
# 2. c_attn.weight has the shape (3 C, C): C rows that make the queries, C rows for the keys, C rows for the values. The query
#    of layer 0 turns position t into position t - 1, and the key is the position itself. Multiply the query by about 1,000,
#    so that softmax gives almost all weight to one key. c_proj writes the value, the token, into the free part.
# 3. In layer 1 the query is the token, the key is the free part, and the value is the token. c_proj writes the value, times
#    3 or so, back into the first part, where the tied output head reads the prediction.
# 4. The token at position 0 has no token before, so layer 0 attends to the token itself. Make its key in layer 1 useless:
#    the key may also read position 0, with a negative weight.
