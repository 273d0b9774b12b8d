"""Load OpenAI's GPT-2 weights into the model of Raschka's book (chapter 5).

weights/layout.py lists which names in the book's model and in OpenAI's files belong together.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from MyGPT.book.gpt import GPTModel
from MyGPT.weights import pretrained
from MyGPT.weights.layout import BLOCK, TOP, align, config_of, fit, to_ours
from MyGPT.weights.lazy import LazyTensor, flatten


def assign(left: Tensor, right: Tensor | np.ndarray[Any, Any]) -> nn.Parameter:
    """Return a parameter with the values of `right` and the device and dtype of `left`. The shapes must be equal."""
    if left.shape != right.shape:
        raise ValueError(f"the weights have the shape {tuple(right.shape)}, the parameter has {tuple(left.shape)}")
    values = right.detach().clone() if isinstance(right, Tensor) else torch.tensor(right)
    return nn.Parameter(values.to(left))


def load_weights_into_gpt(gpt: nn.Module, params: Mapping[str, Any]) -> None:
    """Load the weights `params`, which `download_and_load_gpt2` returned, into a model with the book's layer names.

    A model with qkv_bias=False gets new biases for queries, keys and values. A model with a shorter context than the
    weights gets the first position embeddings. Like `MyGPT.load_weights_into_gpt`, the function also accepts a
    `MyGPT.GPTModel`, and state dicts from Hugging Face, nanoGPT, the book and MyGPT.

    Raises:
        ValueError: the weights do not fit the model. The message lists every mismatch, and the model is unchanged.
    """
    if not hasattr(gpt, "tok_emb"):
        return pretrained.load_weights_into_gpt(gpt, params)
    parameters = dict(gpt.named_parameters())
    config = dataclasses.replace(config_of(to_ours(flatten(parameters))[0], n_heads=1), tie_weights=False)
    tensors, aligned = align(to_ours(flatten(params))[0], config)
    weights = _with_book_names(fit(tensors, aligned))
    can_be_created = (".W_query.bias", ".W_key.bias", ".W_value.bias")
    problems = []
    for name, weight in weights.items():
        if name not in parameters:
            problems += [] if name.endswith(can_be_created) else [f"the model has no {name}"]
        elif weight.shape != parameters[name].shape:
            problems.append(f"{name} is {tuple(weight.shape)}, the model's is {tuple(parameters[name].shape)}")
    if problems:
        raise ValueError(f"the weights do not fit the model: {'; '.join(problems)}")
    with torch.no_grad():
        for name, weight in weights.items():
            if name in parameters:
                parameters[name].copy_(weight)
            else:
                layer: Any = gpt.get_submodule(name.removesuffix(".bias"))
                layer.bias = assign(layer.weight[:, 0], weight)
    if isinstance(gpt, GPTModel):
        gpt.config = dataclasses.replace(gpt.config, qkv_bias=aligned.qkv_bias)
    return None


def _with_book_names(tensors: Mapping[str, LazyTensor]) -> dict[str, Tensor]:
    """Load tensors that have MyGPT's names, and return them with the names of Raschka's book.

    c_attn, which holds the weights of queries, keys and values, is split into three tensors.
    """
    top: dict[str, tuple[str, ...]] = {ours: (theirs,) for ours, _, theirs, _ in TOP}
    in_block = {ours: theirs for ours, _, theirs, _ in BLOCK}
    weights: dict[str, Tensor] = {}
    for name, tensor in tensors.items():
        if name in top:
            names = top[name]
        else:
            _, _, number, ours = name.split(".", 3)  # transformer.h.0.attn.c_attn.weight
            names = tuple(f"trf_blocks.{number}.{theirs}" for theirs in in_block[ours])
        weights |= zip(names, tensor.load().chunk(len(names)), strict=True)
    return weights
