"""Initial weights: GPT-2's, torch's defaults, or weights with which every head attends to a token shortly before.

With GPT-2's random position embeddings a new model cannot tell near tokens from far ones, and learns to look at the previous
token late. `init="local"` gives it this ability from the start. Positions begin as sinusoids (Vaswani et al., 2017), in which
one step is the same rotation everywhere, and the keys of head h begin as its queries rotated by h positions. The query at time
t therefore matches the key at time t - h. Starting with keys equal to queries is "mimetic initialization" (Trockman & Kolter,
2023); the rotation is new here. T context length, C embedding width, H heads, D = C // H, V vocabulary size.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from MyGPT.config import GPTConfig
from MyGPT.ranks import copy_whole, reshard, whole

QUERY_SCALE = 2.0
"""Factor by which init="local" enlarges the query and key weights, so that each head at first attends mostly to one token."""


@torch.no_grad()
def initialise(model: nn.Module, config: GPTConfig) -> None:
    """Set the weights of a GPTModel to random initial values, in place and in the order of model.named_parameters().

    Matrices and embeddings are drawn from a normal distribution with mean 0 and standard deviation config.init_std. For the
    2·n_layers projections into the residual stream (c_proj), the standard deviation is init_std / √(2·n_layers). Biases are 0
    and LayerNorm weights 1. With config.init="local", `_make_local` then changes some of these weights. With init_std=None,
    all layers get torch's default weights instead. A model on the meta device is left unchanged. Sharded weights are drawn as
    a whole on every rank, one at a time, so ranks with equal random states get the weights of an unsharded model.
    """
    if next(model.parameters()).is_meta:
        return
    reshard(model)
    std = config.init_std
    if std is None:
        for module in model.modules():
            if isinstance(module, (nn.Linear, nn.Embedding, nn.LayerNorm)):
                own = dict(module.named_parameters(recurse=False))
                with _complete(*own.values()) as complete:
                    twin: Any = copy.copy(module)
                    twin._parameters = {**module._parameters, **dict(zip(own, complete, strict=True))}
                    twin.reset_parameters()
        return
    kinds = (nn.Linear, nn.Embedding, nn.LayerNorm)
    layers = [module for module in model.modules() if isinstance(module, kinds)]
    drawn = {parameter for layer in layers for parameter in layer.parameters(recurse=False)}
    # Parameters that custom parts make themselves keep their values.
    parameters: dict[str, Tensor] = {name: it for name, it in model.named_parameters() if it in drawn}
    for name, parameter in parameters.items():
        with _complete(parameter) as (weight,):
            if name.endswith("c_proj.weight"):
                nn.init.normal_(weight, std=std / math.sqrt(2 * config.n_layers))
            elif weight.dim() == 2:
                nn.init.normal_(weight, std=std)
            elif name.endswith("bias"):
                nn.init.zeros_(weight)
            else:
                nn.init.ones_(weight)
    if config.init == "local":
        shape = (3 * config.emb_dim, config.emb_dim)  # custom attention may have a c_attn of another shape
        c_attn = [it for name, it in parameters.items() if name.endswith("c_attn.weight") and it.shape == shape]
        wte, wpe = parameters["transformer.wte.weight"], parameters["transformer.wpe.weight"]
        with _complete(wte, wpe, *c_attn) as (wte, wpe, *c_attn):
            _make_local(wte, wpe, c_attn, config.n_heads, std)
    for module in model.modules():
        reset: Any = getattr(module, "reset_parameters", None)
        if reset is not None and not type(module).__module__.startswith(("torch.", "MyGPT.")):
            reset()  # custom parts may set initial values of their own


@contextmanager
def _complete(*parameters: Tensor) -> Iterator[list[Tensor]]:
    """Yield the complete tensors of sharded parameters, and copy them back into the shards when the `with` block ends.

    Parameters that are not sharded are yielded themselves.
    """
    complete = [whole(parameter) for parameter in parameters]
    yield complete
    for parameter, tensor in zip(parameters, complete, strict=True):
        if tensor is not parameter:
            copy_whole(parameter, tensor)


def _make_local(wte: Tensor, wpe: Tensor, c_attn: Sequence[Tensor], n_heads: int, std: float) -> None:
    """Change the random weights in place so that head h of every block attends to the token h positions before.

    wte (V, C) and wpe (T, C), with an even C, are the token and position embeddings. c_attn has the weight (3 C, C) of
    queries, keys and values of each block. `std` is the standard deviation of the random weights.
    """
    T, C = wpe.shape
    # Wavelengths from two tokens to twice the context.
    angles = torch.pi * T ** -torch.linspace(0, 1, C // 2, device=wpe.device)  # radians per token, (C / 2,)
    phases = torch.arange(T, device=wpe.device)[:, None] * angles  # (T, C / 2)
    wpe.copy_(4 * std * torch.cat([phases.sin(), phases.cos()], dim=1))
    wte.mul_(2)  # otherwise the larger position embeddings would drown the tokens
    for weight in c_attn:
        queries, keys, _ = weight.view(3, n_heads, C // n_heads, C)
        queries.mul_(QUERY_SCALE)
        rotations = torch.arange(n_heads, device=weight.device)[:, None, None] * angles  # (H, 1, C / 2)
        sines, cosines = queries.chunk(2, dim=2)  # each (H, D, C / 2)
        keys[..., : C // 2] = sines * rotations.cos() - cosines * rotations.sin()
        keys[..., C // 2 :] = sines * rotations.sin() + cosines * rotations.cos()
