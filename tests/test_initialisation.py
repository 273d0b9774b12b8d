"""The "local" initial weights, with which head h attends to the token h positions before."""

from __future__ import annotations

import torch

from MyGPT import GPTModel
from oracles_model import transformers_twin

SIZES = {
    "vocab_size": 30,
    "context_length": 32,
    "emb_dim": 96,
    "n_heads": 3,
    "n_layers": 2,
    "drop_rate": 0.0,
    "init_std": 0.05,
}
T, C, H = 32, 96, 3


def fresh(init: str) -> GPTModel:
    torch.manual_seed(1)
    return GPTModel({**SIZES, "init": init}).eval()


def test_the_key_of_a_position_is_the_query_of_the_one_that_looks_at_it() -> None:
    """The rotation of sines and cosines is exact up to the rounding of float32 angles, 1e-5."""
    model = fresh("local")
    positions = model.transformer.wpe.weight  # (T, C)
    for block in model.transformer.h:
        q, k, _ = (positions @ block.attn.c_attn.weight.T).view(T, 3, H, C // H).unbind(1)  # each (T, H, D)
        for h in range(H):
            assert torch.allclose(q[h:, h], k[: T - h, h], atol=1e-4)


def test_heads_look_at_the_token_that_is_theirs() -> None:
    """On random tokens, head h gives its largest mean weight to the token h before; GPT-2's weights are nearly equal.

    transformers computes the attention weights.
    """
    ids = torch.randint(30, (50, T), generator=torch.Generator().manual_seed(2))
    for init in ("local", "gpt2"):
        twin = transformers_twin(fresh(init))
        attention = twin(ids, output_attentions=True).attentions[0].mean(0)  # (H, T, T)
        for h in range(H):
            back = [attention[h].diagonal(-n)[H:].mean().item() for n in range(6)]
            if init == "local":
                assert back[h] == max(back) > 1.5 * back[5]
            else:
                assert max(back) < 1.5 * min(back)


def test_what_does_not_look_begins_as_gpt2s() -> None:
    local, plain = (dict(fresh(init).named_parameters()) for init in ("local", "gpt2"))
    for name, parameter in local.items():
        if name.endswith("wte.weight"):
            assert torch.equal(parameter, 2 * plain[name])
        elif name.endswith("c_attn.weight"):
            assert torch.equal(parameter[2 * C :], plain[name][2 * C :])
            assert torch.equal(parameter[:C], 2 * plain[name][:C])
        elif not name.endswith("wpe.weight"):
            assert torch.equal(parameter, plain[name])
