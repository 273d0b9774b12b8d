"""Write one HTML page that shows how a model reads a text: tokens, attention, predictions after each layer, next tokens.

The page is the template web/explain.html with the numbers inserted as JSON. The page works without a network. The files
inside.html, inside.css and inside.js in web/ draw the numbers, here and on the page of `mygpt serve`.
"""

from __future__ import annotations

import base64
import html
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from MyGPT.files import json_text
from MyGPT.inside.tracing import logit_lens, trace
from MyGPT.model import GPTModel
from MyGPT.sampling import require_finite
from MyGPT.tokenizers.display import token_labels

WEB = Path(__file__).parent / "web"
MAX_TOKENS = 128
"""The maximum number of tokens on a page. Attention maps of longer texts are unreadable and slow to draw."""


def explain_page(model: GPTModel, tokenizer: Any, ids: Tensor, name: str = "a GPT") -> str:
    """Return an HTML page that shows how the model reads one text.

    Args:
        ids: the token ids of the text, (1, tokens).
        name: the name of the model in the title of the page.

    Raises:
        ValueError: `ids` is not a batch of one text, or has more than 128 tokens.
        FloatingPointError: the model computes logits that are NaN or infinite.
    """
    if ids.dim() != 2 or len(ids) != 1:
        raise ValueError(f"a page explains one text, so ids must have the shape (1, tokens), got {tuple(ids.shape)}")
    if ids.shape[1] > MAX_TOKENS:
        raise ValueError(f"the text has {ids.shape[1]} tokens, a page can hold {MAX_TOKENS}")
    # A < in the text must not end the script element that holds the data.
    data = json_text(page_data(model, tokenizer, ids), ensure_ascii=False).replace("<", "\\u003c")
    return fill_template(WEB / "explain.html", {"title": html.escape(f"How {name} reads a text"), "data": data})


def fill_template(path: Path, values: Mapping[str, str]) -> str:
    """Return the text of a file in which the values replace their names, such as {{title}}.

    Other names in such braces are those of files, whose text replaces them: files in the same directory or in inside/web.
    """

    def value_of(found: re.Match[str]) -> str:
        name = found[1]
        if name in values:
            return values[name]
        file = path.with_name(name)
        return (file if file.exists() else WEB / name).read_text(encoding="utf-8").rstrip()

    return re.sub(r"\{\{([\w.]+)\}\}", value_of, path.read_text(encoding="utf-8"))


def page_data(model: GPTModel, tokenizer: Any, ids: Tensor) -> dict[str, Any]:
    """Return the data of the page for the token ids (1, tokens) of a text, as a dict for JSON.

    The dict has the tokens, the attention weights, and the most likely next tokens after each layer. Probabilities are
    rounded to five decimals; attention weights are stored as bytes, where 255 stands for 1.
    """
    config, traced = model.config, trace(model, ids)
    lens = logit_lens(model, traced)[:, 0]  # (L + 1, T, V)
    require_finite("a logit of the model", lens)
    lens_tops = [_most_likely(logits.float().softmax(-1), tokenizer, 5) for logits in lens]
    probabilities = lens[-1].float().softmax(-1).cpu()  # (T, V)
    tokens = list(zip(ids[0].tolist(), token_labels(tokenizer, ids[0].tolist()), strict=True))
    predictions = []
    for t, top in enumerate(_most_likely(probabilities, tokenizer, 12)):
        actual = None
        if t + 1 < len(tokens):
            id_, label = tokens[t + 1]
            probability = probabilities[t, id_]
            rank = int((probabilities[t] > probability).sum()) + 1
            actual = [label, round(float(probability), 5), rank, id_]
        rest = max(0.0, 1.0 - sum(probability for _, probability, _ in top))
        predictions.append({"top": top, "rest": round(rest, 5), "actual": actual})
    attention = (traced.attention[:, 0].float() * 255).round().byte().cpu()  # (L, H, T, T)
    return {
        "description": describe(model),
        "layers": config.n_layers,
        "heads": config.n_heads,
        "tokens": [{"id": id_, "label": label} for id_, label in tokens],
        "attention": base64.b64encode(attention.numpy().tobytes()).decode(),
        "lens": [[[entry[:2] for entry in top] for top in depth] for depth in lens_tops],
        "next": predictions,
    }


def describe(model: GPTModel) -> str:
    """Return the sentences about the size of a model at the beginning of a page."""
    config = model.config
    return (
        f"The model has {config.n_layers} layers of {config.n_heads} heads, {model.num_parameters():,} parameters and "
        f"a vocabulary of {config.vocab_size:,} tokens. Layers, heads and tokens are numbered from 0."
    )


def _most_likely(probabilities: Tensor, tokenizer: Any, k: int) -> list[list[list[Any]]]:
    """Return, for each of T positions, the k most likely tokens, each as [label, probability, id].

    `probabilities` (T, V) has the probability of each of the V tokens of the vocabulary at each position.
    """
    best, rows = probabilities.topk(min(k, probabilities.shape[-1])), []
    for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        labels = token_labels(tokenizer, ids)
        rows.append([[label, round(p, 5), id_] for label, p, id_ in zip(labels, values, ids, strict=True)])
    return rows
