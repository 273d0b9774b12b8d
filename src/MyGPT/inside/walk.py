"""Collect the numbers of one forward pass, step by step, for one token and one attention head.

The walk on a page goes from token ids to probabilities: embeddings, LayerNorm, queries, keys and values, scores, attention
weights, the output of the head and of attention, the MLP, all layers, the final LayerNorm, logits. web/walk.js explains each
step; this module returns only names, shapes and numbers. The worker of `mygpt explain --live` computes the same dict.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

from torch import Tensor

from MyGPT.config import require_index
from MyGPT.inside.tracing import ablate_heads, trace
from MyGPT.model import GPTModel
from MyGPT.parts import refuse_parts
from MyGPT.sampling import require_finite
from MyGPT.tokenizers.display import token_labels

N_NUMBERS = 8
"""The length of the part of a vector that a walk shows, and the number of most likely tokens in its last steps."""


def walk_data(
    model: GPTModel,
    tokenizer: Any,
    ids: Tensor,
    layer: int,
    head: int,
    token: int,
    heads_off: Iterable[tuple[int, int]] = (),
) -> dict[str, Any]:
    """Return the steps of one forward pass with the numbers of one token, as a dict for JSON.

    T tokens, C embedding width, H heads, D = C // H, L layers, V vocabulary size. The dict has these letters in "config".
    Each step in "steps" has a name and a list of tensors. A tensor has a name, a shape, and either "row" or "top":

    - "row" has the first 8 numbers of the token's row. Ids, scores, attention weights and norms are complete. The scores and
      weights of a token have one number for each token that it can attend to.
    - "top" has the 8 largest logits or probabilities, each as [label, number, id].

    Numbers are rounded to 6 significant digits.

    Args:
        ids: the token ids of the text, (1, T).
        layer: the layer whose attention and MLP are shown.
        head: the head of this layer whose queries, keys, values, scores and weights are shown.
        token: the position of the token in the text, from 0.
        heads_off: pairs (layer, head) of heads whose output is set to zero, as in `ablate_heads`.

    Raises:
        ValueError: `ids` is not a batch of one text, a number is out of range, or the model has custom parts.
        FloatingPointError: the model computes logits that are NaN or infinite.
    """
    refuse_parts(model, "the walk through a forward pass")
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"a walk follows one text, so ids must have the shape (1, tokens), got {tuple(ids.shape)}")
    config, T, t = model.config, ids.shape[1], token
    require_index("layer", layer, config.n_layers)
    require_index("head", head, config.n_heads)
    require_index("token", token, T)
    with ablate_heads(model, heads_off):
        traced = trace(model, ids)
    require_finite("a logit of the model", traced["logits"])
    C, H, L, V = config.emb_dim, config.n_heads, config.n_layers, config.vocab_size
    here = f"h.{layer}"

    def row(name: str, value: Tensor) -> dict[str, Any]:
        """Return the entry of a tensor (T, n) or (1, T, n) with the beginning of the token's row."""
        return _entry(name, list(value.shape[-2:]), value.view(-1, value.shape[-1])[t, :N_NUMBERS])

    def of_head(name: str) -> Tensor:
        return traced[f"{here}.attn.{name}"][0, head].float()  # (T, D), or (T, T) for the weights

    x = traced["embeddings" if layer == 0 else f"h.{layer - 1}"]
    q, k = of_head("q"), of_head("k")
    scores = q[t] @ k[: t + 1].T / math.sqrt(C // H)  # (t + 1,)
    norms = traced.residual[:, 0, t].float().norm(dim=-1)  # (L + 1,)
    logits = traced["logits"][0, t].float()  # (V,)
    steps = {
        "ids": [_entry("ids", [T], ids[0])],
        "embeddings": [row("wte", traced["wte"]), row("wpe", traced["wpe"]), row("embeddings", traced["embeddings"])],
        "ln_1": [
            row("x", x),
            row("ln_1", traced[f"{here}.ln_1"]),
            _entry("mean", [], x[0, t].float().mean()[None]),
            _entry("std", [], x[0, t].float().std(correction=0)[None]),
        ],
        "qkv": [row("q", q), row("k", k), row("v", of_head("v"))],
        "scores": [_entry("scores", [T, T], scores)],
        "weights": [_entry("weights", [T, T], of_head("weights")[t, : t + 1])],
        "head": [row("head", of_head("heads"))],
        "attention": [row("attn", traced[f"{here}.attn"]), row("after_attn", traced[f"{here}.after_attn"])],
        "mlp": [
            row("ln_2", traced[f"{here}.ln_2"]),
            row("activations", traced[f"{here}.mlp.activations"]),
            row("mlp", traced[f"{here}.mlp"]),
            row("after_mlp", traced[here]),
        ],
        "layers": [_entry("norms", [L + 1], norms)],
        "ln_f": [row("ln_f", traced["ln_f"])],
        "logits": [_top("logits", logits, tokenizer)],
        "probabilities": [_top("probabilities", logits.softmax(-1), tokenizer)],
    }
    return {
        "token": token,
        "layer": layer,
        "head": head,
        "config": {"C": C, "H": H, "D": C // H, "L": L, "V": V, "T": T},
        "steps": [{"name": name, "tensors": tensors} for name, tensors in steps.items()],
    }


def _entry(name: str, shape: list[int], values: Tensor) -> dict[str, Any]:
    return {"name": name, "shape": shape, "row": [_rounded(value) for value in values.tolist()]}


def _top(name: str, values: Tensor, tokenizer: Any) -> dict[str, Any]:
    """Return the entry of a vector (V,) with its largest values and the labels of their tokens."""
    best = values.topk(min(N_NUMBERS, len(values)))
    ids = best.indices.tolist()
    labelled = zip(token_labels(tokenizer, ids), map(_rounded, best.values.tolist()), ids, strict=True)
    return {"name": name, "shape": [len(values)], "top": [list(entry) for entry in labelled]}


def _rounded(value: float) -> float:
    return value if isinstance(value, int) else float(f"{value:.6g}")
