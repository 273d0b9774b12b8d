"""Test the numbers of the walk through one forward pass against transformers and computations by hand."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor

from conftest import lively_model
from MyGPT import CharTokenizer, GPTConfig, GPTModel
from MyGPT.inside import ablate_heads
from MyGPT.inside.walk import walk_data
from oracles_model import transformers_twin

TOKENIZER = CharTokenizer([chr(32 + i) for i in range(95)])
C, H, D, L, V, T = 36, 3, 12, 2, 95, 7
ROUNDING = 3e-5
"""The error of float32 for the numbers of this model, which are below 100."""


@pytest.fixture(scope="module")
def model() -> GPTModel:
    return lively_model(
        GPTConfig(vocab_size=V, context_length=16, emb_dim=C, n_heads=H, n_layers=L, drop_rate=0.0, qkv_bias=True)
    )


@pytest.fixture(scope="module")
def ids() -> Tensor:
    return torch.tensor([TOKENIZER.encode("The Cat")])


def tensors(walk: dict[str, Any]) -> dict[str, Any]:
    """Return the tensors of all steps by name."""
    return {tensor["name"]: tensor for step in walk["steps"] for tensor in step["tensors"]}


def close(row: list[float], expected: Tensor) -> bool:
    torch.testing.assert_close(torch.tensor(row, dtype=torch.float64), expected.double(), atol=ROUNDING, rtol=1e-5)
    return True


@torch.no_grad()
@pytest.mark.parametrize(("layer", "head", "t"), [(0, 0, 0), (1, 2, 4), (1, 0, T - 1)])
def test_numbers_equal_those_of_transformers(model: GPTModel, ids: Tensor, layer: int, head: int, t: int) -> None:
    found = tensors(walk_data(model, TOKENIZER, ids, layer, head, t))
    twin = transformers_twin(model)
    theirs = twin(ids, output_attentions=True, output_hidden_states=True)
    states = [state[0, t] for state in theirs.hidden_states]  # the last one is after the final LayerNorm
    assert found["ids"]["row"] == ids[0].tolist()
    assert close(found["embeddings"]["row"], states[0][:8])
    assert close(found["x"]["row"], states[layer][:8])
    assert close(
        found["mean"]["row"] + found["std"]["row"], torch.stack(torch.std_mean(states[layer], correction=0)[::-1])
    )
    assert close(found["weights"]["row"], theirs.attentions[layer][0, head, t, : t + 1])
    assert close(found["norms"]["row"][:-1], torch.stack(states[:-1]).norm(dim=-1))
    assert close(found["ln_f"]["row"], states[-1][:8])
    for name, values in [("logits", theirs.logits[0, t]), ("probabilities", theirs.logits[0, t].softmax(-1))]:
        assert [id_ for _, _, id_ in found[name]["top"]] == values.topk(8).indices.tolist()
        assert close([value for _, value, _ in found[name]["top"]], values.topk(8).values)
        assert [label for label, _, _ in found[name]["top"]] == [
            TOKENIZER.decode([id_]).replace(" ", "·") for _, _, id_ in found[name]["top"]
        ]


@torch.no_grad()
def test_numbers_of_a_layer_equal_a_computation_by_hand(model: GPTModel, ids: Tensor) -> None:
    """Compute the layer in float64 from the weights alone, with the formulas that the page shows."""
    layer, head, t = 1, 2, 5
    found = tensors(walk_data(model, TOKENIZER, ids, layer, head, t))
    weights = {name: value.double() for name, value in model.transformer.h[layer].state_dict().items()}
    x = transformers_twin(model).double()(ids, output_hidden_states=True).hidden_states[layer][0]

    def norm(x: Tensor, name: str) -> Tensor:
        mean, variance = x.mean(-1, keepdim=True), x.var(-1, correction=0, keepdim=True)
        eps = model.config.layer_norm_eps
        return (x - mean) / (variance + eps).sqrt() * weights[f"{name}.weight"] + weights[f"{name}.bias"]

    def linear(x: Tensor, name: str) -> Tensor:
        return x @ weights[f"{name}.weight"].T + weights[f"{name}.bias"]

    a = norm(x, "ln_1")
    q, k, v = (part.unflatten(1, (H, D)).transpose(0, 1) for part in linear(a, "attn.c_attn").split(C, dim=1))
    scores = q @ k.transpose(1, 2) / math.sqrt(D)
    p = scores.masked_fill(torch.ones(T, T).triu(1).bool(), -math.inf).softmax(-1)
    heads = p @ v  # (H, T, D)
    attn = linear(heads.transpose(0, 1).flatten(1), "attn.c_proj")
    u = linear(norm(x + attn, "ln_2"), "mlp.c_fc")
    activations = 0.5 * u * (1 + (math.sqrt(2 / math.pi) * (u + 0.044715 * u**3)).tanh())
    mlp = linear(activations, "mlp.c_proj")
    expected = {
        "ln_1": a[t], "q": q[head, t], "k": k[head, t], "v": v[head, t], "head": heads[head, t], "attn": attn[t],
        "after_attn": (x + attn)[t], "ln_2": norm(x + attn, "ln_2")[t], "activations": activations[t], "mlp": mlp[t],
        "after_mlp": (x + attn + mlp)[t],
    }  # fmt: skip
    assert all(close(found[name]["row"], values[:8]) for name, values in expected.items())
    assert close(found["scores"]["row"], scores[head, t, : t + 1])
    wte, wpe = model.transformer.wte.weight[ids[0, t]], model.transformer.wpe.weight[t]
    assert close(found["wte"]["row"], wte[:8]) and close(found["wpe"]["row"], wpe[:8])


def test_steps_shapes_and_letters(model: GPTModel, ids: Tensor) -> None:
    walk = walk_data(model, TOKENIZER, ids, 0, 1, 3)
    assert walk["config"] == {"C": C, "H": H, "D": D, "L": L, "V": V, "T": T}
    assert (walk["layer"], walk["head"], walk["token"]) == (0, 1, 3)
    assert [(step["name"], [(tensor["name"], tensor["shape"]) for tensor in step["tensors"]]) for step in walk["steps"]] == [
        ("ids", [("ids", [T])]),
        ("embeddings", [("wte", [T, C]), ("wpe", [T, C]), ("embeddings", [T, C])]),
        ("ln_1", [("x", [T, C]), ("ln_1", [T, C]), ("mean", []), ("std", [])]),
        ("qkv", [("q", [T, D]), ("k", [T, D]), ("v", [T, D])]),
        ("scores", [("scores", [T, T])]),
        ("weights", [("weights", [T, T])]),
        ("head", [("head", [T, D])]),
        ("attention", [("attn", [T, C]), ("after_attn", [T, C])]),
        ("mlp", [("ln_2", [T, C]), ("activations", [T, 4 * C]), ("mlp", [T, C]), ("after_mlp", [T, C])]),
        ("layers", [("norms", [L + 1])]),
        ("ln_f", [("ln_f", [T, C])]),
        ("logits", [("logits", [V])]),
        ("probabilities", [("probabilities", [V])]),
    ]  # fmt: skip
    numbers = [number for tensor in tensors(walk).values() for number in tensor.get("row", [])]
    assert all(number == float(f"{number:.6g}") for number in numbers)
    assert [len(tensors(walk)[name]["row"]) for name in ("scores", "weights", "norms", "q")] == [4, 4, L + 1, 8]


@torch.no_grad()
def test_heads_that_are_off_add_nothing(model: GPTModel, ids: Tensor) -> None:
    off = [(0, 1), (1, 2)]
    with ablate_heads(model, off):
        logits = model(ids)[0, 4]
    found = tensors(walk_data(model, TOKENIZER, ids, 1, 2, 4, off))
    assert found["head"]["row"] == [0.0] * 8
    assert close([value for _, value, _ in found["logits"]["top"]], logits.topk(8).values)
    on = tensors(walk_data(model, TOKENIZER, ids, 0, 1, 4))
    off_first = tensors(walk_data(model, TOKENIZER, ids, 0, 1, 4, off))
    assert on["weights"] == off_first["weights"] and on["attn"] != off_first["attn"]  # the weights are computed before


def test_numbers_out_of_range_raise_an_error(model: GPTModel, ids: Tensor) -> None:
    for arguments, message in [
        ((2, 0, 0), "layer must be a whole number from 0 to 1, got 2"),
        ((0, 3, 0), "head must be a whole number from 0 to 2, got 3"),
        ((0, 0, 7), "token must be a whole number from 0 to 6, got 7"),
        ((0, 0, 0, [(2, 0)]), "layer must be a whole number from 0 to 1, got 2"),
    ]:
        with pytest.raises(ValueError, match=message):
            walk_data(model, TOKENIZER, ids, *arguments)
    with pytest.raises(ValueError, match=r"one text, so ids must have the shape \(1, tokens\), got \(2, 7\)"):
        walk_data(model, TOKENIZER, ids.expand(2, -1), 0, 0, 0)
