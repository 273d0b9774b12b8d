"""Record and edit the activations of a GPTModel during its forward pass.

All functions use torch's forward hooks and remove them afterwards, so the model's code stays unchanged and as fast as
before.

B batch, T time, C embedding width, H heads, D = C // H, V vocabulary, L layers. Each activation has a place, named after
its module in the checkpoint without "transformer."; `places` lists the places of a model:

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

# The places that `edit` accepts, each with a module and whether the activation is its input or its output.
_EDITABLE = {
    "wte": ("wte", "output"),
    "wpe": ("wpe", "output"),
    "embeddings": ("h.0", "input"),
    "ln_f": ("ln_f", "output"),
}
_EDITABLE_IN_LAYER = {
    ".ln_1": (".ln_1", "output"),
    ".attn.heads": (".attn.c_proj", "input"),
    ".attn": (".attn", "output"),
    ".ln_2": (".ln_2", "output"),
    ".mlp.c_fc": (".mlp.c_fc", "output"),
    ".mlp.activations": (".mlp.c_proj", "input"),
    ".mlp": (".mlp", "output"),
    "": ("", "output"),
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
    of_layer = [".ln_1", ".attn.q", ".attn.k", ".attn.v", ".attn.weights", ".attn.heads", ".attn", ".after_attn"]
    of_layer += [".ln_2", ".mlp.c_fc", ".mlp.activations", ".mlp", ""]
    in_layers = [f"h.{i}{place}" for i in range(model.config.n_layers) for place in of_layer]
    return ["wte", "wpe", "embeddings", *in_layers, "ln_f", "logits"]


@torch.no_grad()
def trace(model: GPTModel, ids: Tensor, attention_mask: Tensor | None = None) -> Trace:
    """Run the model in evaluation mode without gradients and return all its activations.

    torch's fused attention kernel does not return the attention weights, so they are computed a second time. They take
    L * B * H * T² numbers, which is most of the memory for a long text.

    Args:
        model: the model to run. Edits that are active (see `edit`) take effect and appear in the trace.
        ids: token ids, (B, T) int64.
        attention_mask: 1 for tokens and 0 for padding, (B, T), as in `GPTModel.forward`.
    """
    _require_gpt(model)
    activations: dict[str, Tensor] = {}

    def record(place: str) -> Edit:
        return lambda value: activations.setdefault(place, value)

    with evaluation_mode(model), ExitStack() as hooks:
        hooks.enter_context(edit(model, {place: record(place) for place in _editable(model)}))
        for i, block in enumerate(model.transformer.h):
            hooks.enter_context(_hook_input(block.ln_2, record(f"h.{i}.after_attn")))
            hooks.enter_context(_record_attention(block.attn, f"h.{i}.attn", activations))
        activations["logits"] = model(ids, attention_mask=attention_mask)
    return Trace((place, activations[place]) for place in places(model))


@contextmanager
def edit(model: GPTModel, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace activations within a `with` block by the results of functions.

        with edit(model, {"h.3.mlp": lambda x: x - x.mean(dim=(0, 1))}):
            ...

    The edits apply to everything that runs the model: `trace`, `generate` (where T is the number of new tokens if the
    cache is used), a loss. Queries, keys, values, attention weights, the residual stream between attention and MLP, and
    the logits cannot be edited.

    Args:
        model: the model to edit. Its weights do not change.
        edits: a function for each place to edit. The function receives the activation and returns a tensor of the same
            shape.

    Raises:
        ValueError: a place cannot be edited, or a function returns another shape.
    """
    _require_gpt(model)
    editable = _editable(model)
    with ExitStack() as hooks:
        for place, function in edits.items():
            if place not in editable:
                raise ValueError(f"the place {place!r} cannot be edited; choose from {', '.join(_abridged(editable))}")
            name, side = editable[place]
            checked = _same_shape(place, function)
            if place.endswith(".attn.heads"):
                checked = _by_head(checked, model.config.n_heads)
            module = model.transformer.get_submodule(name)
            hooks.enter_context(_hook_input(module, checked) if side == "input" else _hook_output(module, checked))
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
    """Replace an activation within a `with` block by its value in another forward pass (activation patching).

    The method is also known as causal tracing (Vig et al., 2020; Meng et al., 2022).

    Args:
        model: the model to patch.
        source: the trace of the other forward pass, over a prompt of the same number of rows and tokens.
        place: the place to replace, one that `edit` accepts.
        index: the token to replace, or the head for "h.i.attn.heads", in all rows of the batch. None replaces everything.

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

    The result shows which layers and tokens, or which heads, cause the difference between the two prompts. The cost is
    one forward pass per number of the result.

    Args:
        model: the model to examine.
        clean: ids of the first prompt, (B, T) int64.
        corrupted: ids of the second prompt, (B, T) int64.
        metric: a function from logits (B, T, V) to a number.
        part: the activation to replace. "" is the residual stream after the layer, "attn" and "mlp" are the outputs of
            these parts, one token at a time; "attn.heads" is the output of one head at a time.

    Returns:
        The metric as float64, (L, T), or (L, H) for "attn.heads".
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
    """Return the predictions if the model stopped after the embeddings or after each layer (the logit lens).

    The final LayerNorm and the output head are applied to the residual stream of every layer (nostalgebraist, 2020).

    Returns:
        Logits (L + 1, B, T, V), of which the last are the model's own. They take 261 MB for 100 tokens of GPT-2 124M in
        float32.
    """
    _require_gpt(model)
    return torch.stack([model.lm_head(model.transformer.ln_f(x)) for x in traced.residual])


@torch.no_grad()
def induction_scores(model: GPTModel, length: int | None = None, n_sequences: int = 8, seed: int = 0) -> Tensor:
    """Return how strongly each head attends to the token that followed the previous occurrence of the current token.

    The model reads `length` random tokens twice in a row, and the score is the mean attention weight in the second half
    (Olsson et al., 2022). Random tokens have no other connection, so a high score means that the head searches for
    repetitions. A head that attends to a fixed distance also scores high at one length: compare two lengths.

    Args:
        model: the model to examine.
        length: number of random tokens. The default is half the context, at most 50.
        n_sequences: number of random sequences to average over.
        seed: seed of the random tokens.

    Returns:
        Scores from 0 to 1, (L, H).
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
    """Return the k tokens whose embeddings have the largest cosine similarity to that of `id_`, excluding itself.

    Returns:
        Ids (k,) int64 and their cosine similarities (k,), in descending order.
    """
    _require_gpt(model)
    vectors = nn.functional.normalize(model.transformer.wte.weight.detach().float(), dim=1)  # (V, C)
    _check_number("id", id_, len(vectors))
    if type(k) is not int or not 1 <= k < len(vectors):
        raise ValueError(f"k must be a whole number from 1 to {len(vectors) - 1}, the other tokens, got {k!r}")
    cosines = (vectors @ vectors[id_]).index_fill(0, torch.tensor(id_, device=vectors.device), -2.0)  # (V,)
    best = cosines.topk(k)
    return best.indices, best.values


def _editable(model: GPTModel) -> dict[str, tuple[str, str]]:
    """Return the module of each editable place, and whether the activation is its "input" or its "output"."""
    in_layers = {
        f"h.{i}{place}": (f"h.{i}{module}", side)
        for i in range(model.config.n_layers)
        for place, (module, side) in _EDITABLE_IN_LAYER.items()
    }
    return {**_EDITABLE, **in_layers}


def _hook_input(module: Any, function: Edit) -> RemovableHandle:
    """Apply `function` to the first argument of the module; leaving the handle's `with` block removes the hook."""
    return module.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:]))


def _hook_output(module: Any, function: Edit) -> RemovableHandle:
    """Apply `function` to the output of the module; leaving the handle's `with` block removes the hook."""
    return module.register_forward_hook(lambda _, args, output: function(output))


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
    """Store queries, keys, values and attention weights in `activations` within a `with` block."""

    def record_qkv(projected: Tensor) -> Tensor:
        B, T, _ = projected.shape
        q, k, v = projected.view(B, T, 3, attn.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        activations.update({f"{place}.q": q, f"{place}.k": k, f"{place}.v": v})
        return projected

    def record_weights(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        q, k, mask = activations[f"{place}.q"], activations[f"{place}.k"], args[1]
        # Attention over one-hot values returns the attention weights.
        one_hot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        activations[f"{place}.weights"] = plain_attention(q, k, one_hot, mask)

    with attn.register_forward_hook(record_weights), _hook_output(attn.c_attn, record_qkv):
        yield


def _by_head(function: Edit, n_heads: int) -> Edit:
    """Turn a function of (B, H, T, D) into a function of (B, T, C)."""

    def of_joined(joined: Tensor) -> Tensor:
        heads = joined.unflatten(2, (n_heads, -1)).transpose(1, 2)
        return function(heads).transpose(1, 2).flatten(2)

    return of_joined


def _same_shape(place: str, function: Edit) -> Edit:
    """Make the function raise a ValueError if its result has another shape than its argument."""

    def checked(activation: Tensor) -> Tensor:
        edited = function(activation)
        if edited.shape != activation.shape:
            raise ValueError(
                f"the edit of {place} returned shape {tuple(edited.shape)}, the activation has {tuple(activation.shape)}"
            )
        return edited

    return checked


def _abridged(all_places: Iterable[str]) -> list[str]:
    """Return the places for an error message: one entry h.i stands for all layers."""
    return [
        place.replace("h.0", "h.i") for place in all_places if not place.startswith("h.") or place.startswith("h.0")
    ]


def _require_gpt(model: object) -> None:
    if not isinstance(model, GPTModel):
        raise TypeError(
            f"the model must be a GPTModel, got {type(model).__name__} (of a PeftModel, pass model.get_base_model())"
        )


def _check_number(name: str, value: object, count: int) -> None:
    """Raise a ValueError unless the value is an integer from 0 to count - 1."""
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{name} must be a whole number from 0 to {count - 1}, got {value!r}")
