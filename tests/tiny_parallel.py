"""The model, the token ids and the comparison of the tests of several ranks."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

CONFIG = {
    "vocab_size": 71,
    "context_length": 16,
    "emb_dim": 32,
    "n_heads": 4,
    "n_layers": 2,
    "drop_rate": 0.0,
    "qkv_bias": True,
}
IDS = np.random.default_rng(0).integers(0, 71, 5000).astype(np.uint16)


def comparable_weights(model: nn.Module) -> dict[str, Any]:
    """Return the trained parameters as arrays by name, without the biases of the keys.

    A bias of the keys does not change the attention weights. Its gradient is only the error of rounding, which Adam
    enlarges to steps of the size of the learning rate.
    """
    weights = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            value = parameter.detach()
            if name.endswith("c_attn.bias"):
                queries, _, values = value.chunk(3)
                value = torch.cat([queries, values])
            weights[name] = value.numpy()
    return weights
