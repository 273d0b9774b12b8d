"""Record and edit the activations of a GPTModel during its forward pass.

All functions use torch's forward hooks and remove them afterwards. B batch, T time, C embedding width, H heads,
D = C // H, V vocabulary, L layers. Each activation has a place, named after its module without "transformer.":

    wte, wpe             token and position embeddings, (B, T, C) and (T, C); wpe is (B, T, C) with an attention_mask
    embeddings           their sum, the input of the first layer, (B, T, C)
    h.3.ln_1             the input of attention in layer 3, (B, T, C)
    h.3.attn.q, .k, .v   queries, keys and values, (B, H, T, D)
    h.3.attn.weights     attention weights of each query (row) over the keys (columns), (B, H, T, T); a row sums to 1
    h.3.attn.heads       the output of each head, before the projection c_proj, (B, H, T, D)
    h.3.attn             the output of attention, which is added to the residual stream, (B, T, C)
    h.3.after_attn       the residual stream after attention, (B, T, C)
    h.3.ln_2             the input of the MLP, (B, T, C)
    h.3.mlp.c_fc         the neurons of the MLP before GELU, (B, T, 4 C)
    h.3.mlp.activations  the neurons of the MLP after GELU, (B, T, 4 C)
    h.3.mlp              the output of the MLP, which is added to the residual stream, (B, T, C)
    h.3                  the residual stream after the layer, (B, T, C)
    ln_f, logits         the input of the output head, (B, T, C), and its output, (B, T, V)
"""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from MyGPT.config import require_positive
from MyGPT.generation import evaluation_mode
from MyGPT.model import GPTModel

Edit = Callable[[Tensor], Tensor]
"""A function from an activation to its replacement of the same shape."""

_IN_LAYER = (".ln_1", ".attn.q", ".attn.k", ".attn.v", ".attn.weights", ".attn.heads", ".attn", ".after_attn", ".ln_2",
             ".mlp.c_fc", ".mlp.activations", ".mlp", "")  # fmt: skip
# `trace` records these places, but `edit` does not accept them.
_NOT_EDITABLE = (".attn.q", ".attn.k", ".attn.v", ".attn.weights", ".after_attn", "logits")
# These places are the input of a module. All other editable places are the output of the module with the same name.
_INPUT_OF = {
    "embeddings": "h.0",
    ".attn.heads": ".attn.c_proj",
    ".after_attn": ".ln_2",
    ".mlp.activations": ".mlp.c_proj",
}


class Trace(dict[str, Tensor]):
    """The activations of one forward pass by place, in the order in which they are computed."""

    @property
    def attention(self) -> Tensor:
        """The attention weights of all layers, (L, B, H, T, T)."""
        return torch.stack([value for place, value in self.items() if place.endswith(".attn.weights")])

    @property
    def residual(self) -> Tensor:
        """The residual stream after the embeddings and after each layer, (L + 1, B, T, C)."""
        return torch.stack([self["embeddings"], *(self[f"h.{i}"] for i in range(len(self.attention)))])


def places(model: GPTModel) -> list[str]:
    """Return the names of all places of the model, in the order of the forward pass."""
    _require_gpt(model)
    in_layers = [f"h.{i}{place}" for i in range(model.config.n_layers) for place in _IN_LAYER]
    return ["wte", "wpe", "embeddings", *in_layers, "ln_f", "logits"]


@torch.no_grad()
def trace(model: GPTModel, ids: Tensor, attention_mask: Tensor | None = None) -> Trace:
    """Run the model in evaluation mode without gradients and return the activations at all places.

    torch's fused attention kernel does not return the attention weights, so they are computed a second time. For a long
    text their L * B * H * T² numbers take most of the memory.

    Args:
        model: the model to run. Edits that are active (see `edit`) take effect and appear in the trace.
        ids: token ids, (B, T) int64.
        attention_mask: 1 for tokens and 0 for padding, (B, T), as in `GPTModel.forward`.
    """
    all_places = places(model)
    activations: dict[str, Tensor] = {}

    def record(place: str) -> Edit:
        return lambda value: activations.setdefault(place, value)

    with evaluation_mode(model), ExitStack() as hooks:
        hooks.enter_context(edit(model, {place: record(place) for place in _editable(all_places)}))
        for i, block in enumerate(model.transformer.h):
            hooks.enter_context(_hook(model, f"h.{i}.after_attn", record(f"h.{i}.after_attn")))
            hooks.enter_context(_record_attention(block.attn, f"h.{i}.attn", activations))
        activations["logits"] = model(ids, attention_mask=attention_mask)
    return Trace((place, activations[place]) for place in all_places)


@contextmanager
def edit(model: GPTModel, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace activations within a `with` block by the results of functions.

        with edit(model, {"h.3.mlp": lambda x: x - x.mean(dim=(0, 1))}):
            ...

    The edits apply to everything that runs the model, such as `trace`, a loss or `generate` (with a cache, an edit sees
    only the new tokens). Queries, keys, values, attention weights, the logits, and the residual stream between
    attention and MLP cannot be edited.

    Args:
        model: the model. Its weights do not change.
        edits: a function for each place to edit, from the activation to a tensor of the same shape.

    Raises:
        ValueError: a place cannot be edited, or a function returns another shape.
    """
    editable = _editable(places(model))
    with ExitStack() as hooks:
        for place, function in edits.items():
            if place not in editable:
                raise ValueError(f"the place {place!r} cannot be edited; choose from {', '.join(_abridged(editable))}")
            hooks.enter_context(_hook(model, place, _checked_edit(place, function, model.config.n_heads)))
        yield


@contextmanager
def ablate_heads(model: GPTModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Set the output of attention heads to zero within a `with` block; heads are (layer, head), counted from 0."""
    _require_gpt(model)
    of_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        _check_number("layer", layer, model.config.n_layers)
        _check_number("head", head, model.config.n_heads)
        of_layer.setdefault(layer, []).append(head)

    def zero(ablated: list[int]) -> Edit:
        return lambda outputs: outputs.index_fill(1, torch.tensor(ablated, device=outputs.device), 0.0)

    with edit(model, {f"h.{layer}.attn.heads": zero(ablated) for layer, ablated in of_layer.items()}):
        yield


@contextmanager
def ablate_mlps(model: GPTModel, layers: Iterable[int]) -> Iterator[None]:
    """Set the output of the MLPs of some layers, counted from 0, to zero within a `with` block."""
    _require_gpt(model)
    layers = list(layers)
    for layer in layers:
        _check_number("layer", layer, model.config.n_layers)
    with edit(model, {f"h.{layer}.mlp": torch.zeros_like for layer in layers}):
        yield


@contextmanager
def patch(model: GPTModel, source: Trace, place: str, index: int | None = None) -> Iterator[None]:
    """Replace an activation within a `with` block by its value in another forward pass.

    This is activation patching, also known as causal tracing (Vig et al., 2020; Meng et al., 2022).

    Args:
        source: the trace of the other forward pass, over a prompt of the same number of rows and tokens.
        place: a place that `edit` accepts.
        index: the token to replace in all rows, or the head to replace for "h.i.attn.heads". None replaces everything.

    Raises:
        ValueError: the trace does not have the place or the index, or the shapes differ.
    """
    if place not in source:
        raise ValueError(f"the trace has no place {place!r}; choose from {', '.join(_abridged(source))}")
    value = source[place]
    dim = 1 if place.endswith(".attn.heads") else value.dim() - 2  # heads, or time
    if index is not None:
        _check_number("index", index, value.shape[dim])

    def replace(activation: Tensor) -> Tensor:
        if activation.shape != value.shape:
            raise ValueError(
                f"{place} has shape {tuple(activation.shape)}, in the trace {tuple(value.shape)}: the prompts must have "
                "the same number of rows and tokens"
            )
        if index is None:
            return value
        only = torch.tensor([index], device=value.device)
        return activation.index_copy(dim, only, value.index_select(dim, only))

    with edit(model, {place: replace}):
        yield


@torch.no_grad()
def patching_effects(
    model: GPTModel,
    clean: Tensor,
    corrupted: Tensor,
    metric: Callable[[Tensor], Tensor | float],
    part: Literal["", "attn", "mlp", "attn.heads"] = "",
) -> Tensor:
    """Measure a metric on the corrupted prompt while one activation at a time comes from the clean prompt.

    The result, float64 (L, T), or (L, H) for "attn.heads", shows which layers and tokens, or which heads, cause the
    difference between the two prompts. Each number costs one forward pass.

    Args:
        clean: ids of the prompt from which activations are taken, (B, T) int64.
        corrupted: ids of the prompt that the model reads, (B, T) int64.
        metric: a function from logits (B, T, V) to a number.
        part: the activation to replace: the residual stream after a layer (""), the output of its attention ("attn") or
            of its MLP ("mlp"), each at one token; or the output of one head ("attn.heads").
    """
    allowed = ("", "attn", "mlp", "attn.heads")
    if part not in allowed:
        raise ValueError(f"part must be one of {', '.join(map(repr, allowed))}, got {part!r}")
    if clean.shape != corrupted.shape:
        raise ValueError(
            f"the prompts must have the same number of rows and tokens, got {tuple(clean.shape)} and {tuple(corrupted.shape)}"
        )
    source = trace(model, clean)
    effects = []
    with evaluation_mode(model):
        for i in range(model.config.n_layers):
            place = f"h.{i}.{part}".rstrip(".")
            for index in range(source[place].shape[1]):
                with patch(model, source, place, index):
                    effects.append(float(metric(model(corrupted))))
    return torch.tensor(effects, dtype=torch.float64).view(model.config.n_layers, -1)


@torch.no_grad()
def logit_lens(model: GPTModel, traced: Trace) -> Tensor:
    """Return the predictions if the model stopped after the embeddings or after each layer, as logits (L + 1, B, T, V).

    This logit lens applies the final LayerNorm and the output head to each residual stream (nostalgebraist, 2020). The
    last logits are the model's own. For 100 tokens of GPT-2 124M in float32 the result takes 261 MB.
    """
    _require_gpt(model)
    return torch.stack([model.lm_head(model.transformer.ln_f(x)) for x in traced.residual])


@torch.no_grad()
def induction_scores(model: GPTModel, length: int | None = None, n_sequences: int = 8, seed: int = 0) -> Tensor:
    """Return how strongly each head attends to the token that followed the previous occurrence of the current token.

    The model reads n_sequences texts. Each has `length` random tokens (by default half the context, at most 50) twice
    in a row. The scores (L, H), from 0 to 1, are mean attention weights in the second half (Olsson et al., 2022).
    Random tokens have no other connection, so a high score means that the head searches for repetitions. But a head that
    attends to a fixed distance also scores high at one length: compare two lengths.
    """
    _require_gpt(model)
    half = model.config.context_length // 2
    n = min(50, half) if length is None else length
    if type(n) is not int or not 2 <= n <= half:
        raise ValueError(f"length must be a whole number from 2 to {half}, half the context, got {n!r}")
    require_positive(n_sequences=n_sequences)
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size, (n_sequences, n), generator=generator)
    attention = trace(model, torch.cat([once, once], dim=1).to(model.transformer.wte.weight.device)).attention
    times = torch.arange(n, 2 * n)
    return attention[..., times, times - n + 1].mean(dim=(1, 3))  # over rows and times


def nearest_tokens(model: GPTModel, id_: int, k: int = 10) -> tuple[Tensor, Tensor]:
    """Return the ids of the k other tokens with the most similar embeddings and their cosine similarities, each (k,).

    The most similar token comes first.
    """
    _require_gpt(model)
    vectors = nn.functional.normalize(model.transformer.wte.weight.detach().float(), dim=1)  # (V, C)
    _check_number("id", id_, len(vectors))
    if type(k) is not int or not 1 <= k < len(vectors):
        raise ValueError(f"k must be a whole number from 1 to {len(vectors) - 1}, the other tokens, got {k!r}")
    cosines = (vectors @ vectors[id_]).index_fill(0, torch.tensor(id_, device=vectors.device), -2.0)  # (V,)
    best = cosines.topk(k)
    return best.indices, best.values


def _editable(all_places: Iterable[str]) -> list[str]:
    return [place for place in all_places if not place.endswith(_NOT_EDITABLE)]


def _hook(model: GPTModel, place: str, function: Edit) -> RemovableHandle:
    """Apply `function` to the activation at a place until the returned handle is closed."""
    for suffix, name in _INPUT_OF.items():
        if place.endswith(suffix):
            module = model.transformer.get_submodule(place.removesuffix(suffix) + name)
            return module.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:]))
    return model.transformer.get_submodule(place).register_forward_hook(lambda _, args, output: function(output))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return softmax(QKᵀ/√D + mask)V, (..., T, D), written as in the paper (Vaswani et al., 2017).

    q (..., T, D); k and v (..., S, D); mask (..., T, S) is True where a query may see a key. Without a mask the queries
    belong to the last T of the S tokens, and each sees the keys up to its own.
    """
    T, S = q.shape[-2], k.shape[-2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v  # (..., T, D)


@contextmanager
def _record_attention(attn: Any, place: str, activations: dict[str, Tensor]) -> Iterator[None]:
    """Store queries, keys, values and attention weights in `activations` when the model runs within a `with` block."""

    def record_qkv(_: nn.Module, args: tuple[Any, ...], projected: Tensor) -> None:
        B, T = projected.shape[:2]
        q, k, v = projected.view(B, T, 3, attn.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        activations.update({f"{place}.q": q, f"{place}.k": k, f"{place}.v": v})

    def record_weights(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        q, k, mask = activations[f"{place}.q"], activations[f"{place}.k"], args[1]
        # Attention over one-hot values returns the attention weights.
        one_hot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        activations[f"{place}.weights"] = plain_attention(q, k, one_hot, mask)

    with attn.c_attn.register_forward_hook(record_qkv), attn.register_forward_hook(record_weights):
        yield


def _checked_edit(place: str, function: Edit, n_heads: int) -> Edit:
    """Return `function` with a check of the returned shape; it receives the outputs of heads as (B, H, T, D)."""
    by_head = place.endswith(".attn.heads")

    def checked(activation: Tensor) -> Tensor:
        before = activation.unflatten(2, (n_heads, -1)).transpose(1, 2) if by_head else activation
        after = function(before)
        if after.shape != before.shape:
            shapes = f"returned shape {tuple(after.shape)}, the activation has {tuple(before.shape)}"
            raise ValueError(f"the edit of {place} {shapes}")
        return after.transpose(1, 2).flatten(2) if by_head else after

    return checked


def _abridged(all_places: Iterable[str]) -> list[str]:
    """Return the places for an error message, with one entry h.i for all layers."""
    return list(dict.fromkeys(re.sub(r"^h\.\d+", "h.i", place) for place in all_places))


def _require_gpt(model: object) -> None:
    if not isinstance(model, GPTModel):
        raise TypeError(
            f"the model must be a GPTModel, got {type(model).__name__} (of a PeftModel, pass get_base_model())"
        )


def _check_number(name: str, value: object, count: int) -> None:
    """Raise a ValueError unless the value is an integer from 0 to count - 1."""
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{name} must be a whole number from 0 to {count - 1}, got {value!r}")
