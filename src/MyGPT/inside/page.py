"""One HTML page on how a model reads a text: tokens, attention, what each layer would say, what comes next.

The page is a template (assets/explain.html) with the numbers put into it: nothing is fetched, so it opens from a disk, a
mail or a web server alike.
"""

from __future__ import annotations

import base64
import html
import json
from pathlib import Path
from typing import Any

from torch import Tensor

from MyGPT.inside.tracing import logit_lens, trace
from MyGPT.model import GPTModel
from MyGPT.tokenizers.display import token_labels

LONGEST = 128
"""Tokens that a page can hold: beyond, its maps can neither be read nor drawn quickly."""


def explain_page(model: GPTModel, tokenizer: Any, ids: Tensor, name: str = "a GPT") -> str:
    """The page for ids (1, T), T at most 128, read by the model; name is what the model is called on it."""
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"a page explains one text, ids (1, T), got {tuple(ids.shape)}")
    if ids.shape[1] > LONGEST:
        raise ValueError(f"the text has {ids.shape[1]} tokens, a page can hold {LONGEST}")
    # A < in the text must not end the script that holds the data.
    data = json.dumps(page_data(model, tokenizer, ids), ensure_ascii=False).replace("<", "\\u003c")
    template = (Path(__file__).parents[1] / "assets" / "explain.html").read_text(encoding="utf-8")
    title = html.escape(f"How {name} reads a text")
    before, after = template.split("{{data}}")
    return before.replace("{{title}}", title) + data + after


def page_data(model: GPTModel, tokenizer: Any, ids: Tensor) -> dict[str, Any]:
    """What the page shows, as JSON's types; probabilities are rounded to five decimals, attention weights to bytes."""
    config, traced = model.config, trace(model, ids)
    lens = logit_lens(model, traced)[:, 0]  # (L + 1, T, V)
    lens_tops = [_likeliest(logits.float().softmax(-1), tokenizer, 5) for logits in lens]
    probabilities = lens[-1].float().softmax(-1).cpu()  # (T, V)
    tops = _likeliest(probabilities, tokenizer, 12)
    following = []
    for t, top in enumerate(tops):
        actual = None
        if t + 1 < ids.shape[1]:
            id_ = int(ids[0, t + 1])
            probability = probabilities[t, id_]
            rank = int((probabilities[t] > probability).sum()) + 1
            actual = [token_labels(tokenizer, [id_])[0], round(float(probability), 5), rank, id_]
        rest = max(0.0, 1.0 - sum(probability for _, probability, _ in top))
        following.append({"top": top, "rest": round(rest, 5), "actual": actual})
    attention = (traced.attention[:, 0].float() * 255).round().byte().cpu()  # (L, H, T, T)
    labels = token_labels(tokenizer, ids[0].tolist())
    return {
        "description": (
            f"{config.n_layers} layers of {config.n_heads} heads, {model.num_parameters():,} parameters, "
            f"{config.vocab_size:,} tokens in its vocabulary. This page was made by mygpt explain."
        ),
        "layers": config.n_layers,
        "heads": config.n_heads,
        "tokens": [{"id": id_, "label": label} for id_, label in zip(ids[0].tolist(), labels, strict=True)],
        "attention": base64.b64encode(attention.numpy().tobytes()).decode(),
        "lens": [[[entry[:2] for entry in top] for top in depth] for depth in lens_tops],
        "next": following,
    }


def _likeliest(probabilities: Tensor, tokenizer: Any, k: int) -> list[list[list[Any]]]:
    """For each position of probabilities (T, V) the k likeliest tokens, [label, probability, id] each."""
    best = probabilities.topk(min(k, probabilities.shape[-1]))
    return [
        [
            [label, round(probability, 5), id_]
            for label, probability, id_ in zip(token_labels(tokenizer, ids), values, ids, strict=True)
        ]
        for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True)
    ]
