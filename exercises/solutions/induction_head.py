"""Solution of the open task: an induction head by hand.

The embedding has three parts: the token, one-hot (V numbers); the position, one-hot (T numbers); and the token before, one-hot
(V numbers), which the head of layer 0 writes.
"""

from __future__ import annotations

import torch
from torch import nn

from MyGPT import GPTConfig, GPTModel

V, T = 64, 32
C = 2 * V + T
CONFIG = GPTConfig(vocab_size=V, context_length=T, emb_dim=C, n_heads=1, n_layers=2, drop_rate=0.0, tie_weights=True)
TOKEN, POSITION, BEFORE = slice(0, V), slice(V, V + T), slice(V + T, C)
SHARP = 1000.0
"""Factor of the queries. The best score is far above the others, so softmax gives its key almost all weight."""


def undo_layer_norm(norm: nn.LayerNorm, n_ones: int) -> None:
    """Set the weight and bias so that the LayerNorm changes no vector that has n_ones ones and zeros otherwise."""
    mean = n_ones / C
    variance = mean * (1 - mean)
    norm.weight.fill_((variance + norm.eps) ** 0.5)
    norm.bias.fill_(mean)


@torch.no_grad()
def build_model() -> GPTModel:
    """Return a GPTModel with two layers that contains an induction head."""
    model = GPTModel(CONFIG)
    for parameter in model.parameters():
        parameter.zero_()
    body = model.transformer
    body.wte.weight[:, TOKEN] = torch.eye(V)
    body.wpe.weight[:, POSITION] = torch.eye(T)
    layer_0, layer_1 = body.h
    undo_layer_norm(layer_0.ln_1, n_ones=2)
    undo_layer_norm(layer_1.ln_1, n_ones=3)
    undo_layer_norm(body.ln_f, n_ones=3)

    # Layer 0 copies the token before. The queries, keys and values of an attention layer are the thirds of its c_attn.
    query, key, value = layer_0.attn.c_attn.weight.view(3, C, C)
    query[POSITION, POSITION] = SHARP * torch.eye(T).roll(-1, 0)  # position t asks for position t - 1
    query[V + T - 1, V] = 0  # roll would let position 0 ask for the last position
    key[POSITION, POSITION] = torch.eye(T)
    value[BEFORE, TOKEN] = torch.eye(V)
    layer_0.attn.c_proj.weight.copy_(torch.eye(C))

    # Layer 1 looks for a place where the token before was the current token, and copies the token of that place.
    query, key, value = layer_1.attn.c_attn.weight.view(3, C, C)
    query[TOKEN, TOKEN] = SHARP * torch.eye(V)
    key[TOKEN, BEFORE] = torch.eye(V)
    key[TOKEN, V] = -1  # position 0 has no token before, so layer 0 has copied the token itself
    value[TOKEN, TOKEN] = 3 * torch.eye(V)
    layer_1.attn.c_proj.weight.copy_(torch.eye(C))
    return model
