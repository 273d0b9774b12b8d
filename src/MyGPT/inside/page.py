"""Write one HTML page that shows how a model reads a text: tokens, attention, predictions after each layer, next tokens.

The page is the template web/explain.html with the numbers inserted as JSON. The page works without a network. The files
inside.html, inside.css and inside.js in web/ draw the numbers, here and on the page of `mygpt serve`.
"""

from __future__ import annotations

import base64
import hashlib
import html
import math
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MyGPT.files import json_text
from MyGPT.inside.tracing import ablate_heads, logit_lens, trace
from MyGPT.model import GPTModel
from MyGPT.sampling import SamplingConfig, filter_logits, require_finite
from MyGPT.tokenizers.display import token_labels

WEB = Path(__file__).parent / "web"
MAX_TOKENS = 128
"""The maximum number of tokens on a page. Attention maps of longer texts are unreadable and slow to draw."""
N_SHOWN = 20
"""The number of most likely tokens in a next-token distribution."""


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
    data = embedded_json(page_data(model, tokenizer, ids))
    return fill_page(WEB / "explain.html", {"title": html.escape(f"How {name} reads a text"), "data": data})


def embedded_json(value: Any) -> str:
    """Return `value` as JSON for a script element of a page. A < in a text must not end this element."""
    return json_text(value, ensure_ascii=False).replace("<", "\\u003c")


def fill_page(path: Path, values: Mapping[str, str], also: str = "") -> str:
    """Return a page made from head.html and the template in `path`, with a policy for its own scripts and styles.

    head.html has {{policy}}, the content security policy, above all values. `also` are further rules of the policy, such as
    "worker-src blob:". `values` has the title of the page; for other values, see `fill_template`.
    """
    values = {**values, "policy": "{{policy}}"}
    page = fill_template(WEB / "head.html", values) + fill_template(path, values)
    return page.replace("{{policy}}", "; ".join(filter(None, [content_policy(page), also])), 1)


def content_policy(page: str) -> str:
    """Return the content security policy under which a page runs only its own scripts and styles, and loads nothing."""
    rules = ["default-src 'none'", "img-src data:", "base-uri 'none'", "form-action 'none'"]
    for kind in ("script", "style"):
        contents = re.findall(rf"<{kind}>(.*?)</{kind}>", page, re.DOTALL)
        hashes = [base64.b64encode(hashlib.sha256(content.encode()).digest()).decode() for content in contents]
        rules.append(" ".join([f"{kind}-src", *(f"'sha256-{hash_}'" for hash_ in hashes)]))
    return "; ".join(rules)


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


def page_data(
    model: GPTModel, tokenizer: Any, ids: Tensor, heads_off: Iterable[tuple[int, int]] = ()
) -> dict[str, Any]:
    """Return the data of the page for the token ids (1, tokens) of a text, as a dict for JSON.

    The dict has the tokens, the attention weights, and the most likely next tokens after each layer. Probabilities are
    rounded to five decimals; attention weights are stored as bytes, where 255 stands for 1. `heads_off` are pairs
    (layer, head) of attention heads whose output is set to zero, as in `ablate_heads`.
    """
    config = model.config
    with ablate_heads(model, heads_off):
        traced = trace(model, ids)
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


def next_token_data(logits: Tensor, tokenizer: Any, sampling: SamplingConfig) -> dict[str, Any]:
    """Return the probabilities of the next token, given its logits (V,), as a dict for JSON.

    Each of the most likely tokens is a list: its id, its label, its probability according to the model, its probability of
    being sampled, and True if the sampling options keep it.
    """
    V, of_model = len(logits), logits.softmax(-1)
    if sampling.temperature == 0:  # greedy: of equal logits, the first is taken
        filtered = torch.full_like(logits, -math.inf).index_fill(0, logits.argmax(), 0.0)
    else:
        filtered = filter_logits(logits[None], sampling)[0]
    sampled, is_kept = filtered.softmax(-1), filtered > -math.inf
    order = is_kept.int().argsort(descending=True, stable=True)  # of equal probabilities, kept ones come first
    order = order[of_model[order].argsort(descending=True, stable=True)]
    shown, hidden = order[:N_SHOWN], order[N_SHOWN:]
    labels = token_labels(tokenizer, shown.tolist())
    values = zip(shown.tolist(), labels, of_model[shown].tolist(), sampled[shown].tolist(), strict=True)
    return {
        "tokens": [[*value, kept] for value, kept in zip(values, is_kept[shown].tolist(), strict=True)],
        "n_kept": int(is_kept.sum()),
        "n_hidden": int(is_kept[hidden].sum()),
        "hidden": float(sampled[hidden].sum()),
        "removed": float(of_model[~is_kept].sum()),
        "vocab_size": V,
    }


def _most_likely(probabilities: Tensor, tokenizer: Any, k: int) -> list[list[list[Any]]]:
    """Return, for each of T positions, the k most likely tokens, each as [label, probability, id].

    `probabilities` (T, V) has the probability of each of the V tokens of the vocabulary at each position.
    """
    best, rows = probabilities.topk(min(k, probabilities.shape[-1])), []
    for ids, values in zip(best.indices.tolist(), best.values.tolist(), strict=True):
        labels = token_labels(tokenizer, ids)
        rows.append([[label, round(p, 5), id_] for label, p, id_ in zip(labels, values, ids, strict=True)])
    return rows
