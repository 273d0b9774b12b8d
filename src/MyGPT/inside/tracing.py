"""Looking inside a model while it runs: what every part computed, what each layer would say, what a part is needed for.

All of it through torch's hooks for as long as one looks: the model's own code does not know, and costs nothing more.

B batch, T time, C embedding width, H heads, D = C // H, V vocabulary, L layers. A place in the model is called by its
name in the checkpoint without "transformer." (`places` lists them):

    wte, wpe             tokens and positions as vectors, (B, T, C) and (T, C), or (B, T, C) with an attention_mask
    embeddings           their sum, where the residual stream begins, (B, T, C)
    h.3.ln_1             what the attention of layer 3 reads, (B, T, C)
    h.3.attn.q, .k, .v   queries, keys, values, (B, H, T, D)
    h.3.attn.weights     how much each token (row) takes from each token (column), (B, H, T, T); a row sums to 1
    h.3.attn.heads       what each head gathered, (B, H, T, D)
    h.3.attn             what attention adds to the residual stream, (B, T, C)
    h.3.after_attn       the residual stream then, (B, T, C)
    h.3.ln_2             what the MLP reads, (B, T, C)
    h.3.mlp.c_fc         the MLP's neurons before GELU, (B, T, 4 C)
    h.3.mlp.activations  and after it, (B, T, 4 C)
    h.3.mlp              what the MLP adds to the residual stream, (B, T, C)
    h.3                  the residual stream after the layer, (B, T, C)
    ln_f, logits         what the output head reads, (B, T, C), and what it says, (B, T, V)
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from torch import Tensor, nn

from MyGPT.generation import evaluation_mode
from MyGPT.model import GPTModel, plain_attention

# The places that can be edited: the module that they go into or come out of.
_DOORS = {"wte": ("wte", "out"), "wpe": ("wpe", "out"), "embeddings": ("h.0", "in"), "ln_f": ("ln_f", "out")}
_DOORS_OF_LAYER = {
    ".ln_1": (".ln_1", "out"),
    ".attn.heads": (".attn.c_proj", "in"),
    ".attn": (".attn", "out"),
    ".ln_2": (".ln_2", "out"),
    ".mlp.c_fc": (".mlp.c_fc", "out"),
    ".mlp.activations": (".mlp.c_proj", "in"),
    ".mlp": (".mlp", "out"),
    "": ("", "out"),
}


class Trace(dict[str, Tensor]):
    """The activation at every place of one forward pass, in the order of the pass."""

    @property
    def attention(self) -> Tensor:
        """The attention weights of all layers, (L, B, H, T, T)."""
        return torch.stack([value for place, value in self.items() if place.endswith(".attn.weights")])

    @property
    def residual(self) -> Tensor:
        """The residual stream: the embeddings, then what it is after each layer, (L + 1, B, T, C)."""
        return torch.stack([self["embeddings"], *(self[f"h.{i}"] for i in range(len(self.attention)))])


def places(model: GPTModel) -> list[str]:
    """The names of all places, in the order of the forward pass."""
    _require_gpt(model)
    of_layer = [".ln_1", ".attn.q", ".attn.k", ".attn.v", ".attn.weights", ".attn.heads", ".attn", ".after_attn"]
    of_layer += [".ln_2", ".mlp.c_fc", ".mlp.activations", ".mlp", ""]
    in_layers = [f"h.{i}{place}" for i in range(model.config.n_layers) for place in of_layer]
    return ["wte", "wpe", "embeddings", *in_layers, "ln_f", "logits"]


@torch.no_grad()
def trace(model: GPTModel, ids: Tensor, attention_mask: Tensor | None = None) -> Trace:
    """Every activation of the forward pass on ids (B, T) int64, in evaluation mode and without gradients.

    attention_mask (B, T) is that of `GPTModel.forward`. Inside `edit` and what is made of it the edited pass is traced.
    The attention weights, which torch's fused kernel never holds, are computed beside it: they alone are L B H T² numbers.
    """
    _require_gpt(model)
    found: dict[str, Tensor] = {}

    def keep(place: str) -> Callable[[Tensor], Tensor]:
        return lambda value: found.setdefault(place, value)

    with evaluation_mode(model), ExitStack() as hooks:
        hooks.enter_context(edit(model, {place: keep(place) for place in _doors(model)}))
        for i, block in enumerate(model.transformer.h):
            hooks.enter_context(_hook_in(block.ln_2, keep(f"h.{i}.after_attn")))
            hooks.enter_context(_record_attention(block.attn, f"h.{i}.attn", found))
        found["logits"] = model(ids, attention_mask=attention_mask)
    return Trace((place, found[place]) for place in places(model))


@contextmanager
def edit(model: GPTModel, edits: Mapping[str, Callable[[Tensor], Tensor]]) -> Iterator[None]:
    """Within the block each of these places holds what its function makes of the activation there.

    A function takes and returns a tensor of the shape that the head of this file tells. It acts on all that runs the
    model: `trace`, `generate` (with the cache T is the number of new tokens), a loss. Queries, keys, values, attention
    weights, the residual stream between attention and MLP, and the logits can be read but not edited.

        with edit(model, {"h.3.mlp": lambda x: x - x.mean(dim=(0, 1))}):
            ...
    """
    _require_gpt(model)
    doors = _doors(model)
    with ExitStack() as hooks:
        for place, function in edits.items():
            if place not in doors:
                raise ValueError(f"no place {place!r} can be edited; there are {', '.join(_abridged(doors))}")
            name, side = doors[place]
            checked = _same_shape(place, function)
            if place.endswith(".attn.heads"):
                checked = _by_head(checked, model.config.n_heads)
            module = model.transformer.get_submodule(name)
            hooks.enter_context(_hook_in(module, checked) if side == "in" else _hook_out(module, checked))
        yield


@contextmanager
def ablate_heads(model: GPTModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Within the block these attention heads, (layer, head) counted from 0, gather nothing: their outputs are zero."""
    _require_gpt(model)
    of_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        _check_number("layer", layer, model.config.n_layers)
        _check_number("head", head, model.config.n_heads)
        of_layer.setdefault(layer, []).append(head)

    def without(silent: Sequence[int]) -> Callable[[Tensor], Tensor]:
        return lambda gathered: gathered.index_fill(1, torch.tensor(silent, device=gathered.device), 0.0)

    with edit(model, {f"h.{layer}.attn.heads": without(silent) for layer, silent in of_layer.items()}):
        yield


@contextmanager
def ablate_mlps(model: GPTModel, layers: Iterable[int]) -> Iterator[None]:
    """Within the block the MLPs of these layers, counted from 0, add nothing to the residual stream."""
    _require_gpt(model)
    layers = list(layers)
    for layer in layers:
        _check_number("layer", layer, model.config.n_layers)
    with edit(model, {f"h.{layer}.mlp": torch.zeros_like for layer in layers}):
        yield


@contextmanager
def patch(model: GPTModel, source: Trace, place: str, index: int | None = None) -> Iterator[None]:
    """Within the block a place holds what it held in another forward pass of the same shape.

    With an index only that token (of h.i.attn.heads that head) is replaced, on all rows: activation patching, causal
    tracing (Vig et al., 2020; Meng et al., 2022).
    """
    if place not in source:
        raise ValueError(f"the trace has no place {place!r}; there are {', '.join(_abridged(source))}")
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
    """What the metric becomes when one activation of the corrupted prompt is replaced by the clean prompt's: where in
    the model the difference between the two lies.

    clean and corrupted (B, T) int64; metric takes logits (B, T, V) to a number. Returns float64, (L, T) for the residual stream
    after each layer (""), or for what its attention or MLP added, one token at a time; (L, H) for "attn.heads", one head
    at a time. T or H forward passes a layer.
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
    """The logits (L + 1, B, T, V) that the model would give if it ended after the embeddings, or after each layer.

    The final LayerNorm and the output head read the residual stream early (nostalgebraist, 2020); the last of them are
    the model's own logits. Large: at 100 tokens 261 MB for GPT-2 124M in float32.
    """
    _require_gpt(model)
    return torch.stack([model.lm_head(model.transformer.ln_f(x)) for x in traced.residual])


@torch.no_grad()
def induction_scores(model: GPTModel, length: int | None = None, n_sequences: int = 8, seed: int = 0) -> Tensor:
    """How much of its attention each head gives to what followed the same token the time before, (L, H), from 0 to 1.

    Measured on `length` random tokens said twice, as Olsson et al. (2022) do: in the second half the mean weight on the
    token after the earlier copy. Only a head that looks for repetition scores high, since nothing else links the two
    (but a head that looks a fixed distance back does too: compare two lengths). length defaults to half the context, at
    most 50.
    """
    _require_gpt(model)
    half = model.config.context_length // 2
    n = min(50, half) if length is None else length
    if type(n) is not int or not 2 <= n <= half:
        raise ValueError(f"length must be a whole number from 2 to {half}, half the context, got {n!r}")
    if type(n_sequences) is not int or n_sequences < 1:
        raise ValueError(f"n_sequences must be a whole number of at least 1, got {n_sequences!r}")
    generator = torch.Generator().manual_seed(seed)
    once = torch.randint(model.config.vocab_size, (n_sequences, n), generator=generator)
    attention = trace(model, torch.cat([once, once], dim=1).to(model.transformer.wte.weight.device)).attention
    times = torch.arange(n, 2 * n)
    return attention[..., times, times - n + 1].mean(dim=(1, 3))  # over rows and times


def nearest_tokens(model: GPTModel, id_: int, k: int = 10) -> tuple[Tensor, Tensor]:
    """The k tokens whose embeddings point most nearly the same way as that of `id_`, itself left out.

    Ids (k,) int64 and cosines (k,), the largest first.
    """
    _require_gpt(model)
    vectors = nn.functional.normalize(model.transformer.wte.weight.detach().float(), dim=1)  # (V, C)
    _check_number("id", id_, len(vectors))
    if type(k) is not int or not 1 <= k < len(vectors):
        raise ValueError(f"k must be a whole number from 1 to {len(vectors) - 1}, the other tokens, got {k!r}")
    cosines = (vectors @ vectors[id_]).index_fill(0, torch.tensor(id_, device=vectors.device), -2.0)  # (V,)
    best = cosines.topk(k)
    return best.indices, best.values


def _doors(model: GPTModel) -> dict[str, tuple[str, str]]:
    """Every place that can be edited: the name of a module, and whether the activation goes in or comes out there."""
    in_layers = {
        f"h.{i}{place}": (f"h.{i}{module}", side)
        for i in range(model.config.n_layers)
        for place, (module, side) in _DOORS_OF_LAYER.items()
    }
    return {**_DOORS, **in_layers}


@contextmanager
def _hook_in(module: Any, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:]))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _hook_out(module: nn.Module, function: Callable[[Tensor], Tensor]) -> Iterator[None]:
    handle = module.register_forward_hook(lambda _, args, output: function(output))
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _record_attention(attn: Any, name: str, found: dict[str, Tensor]) -> Iterator[None]:
    """Puts queries, keys, values and weights into `found`."""

    def record_qkv(projected: Tensor) -> Tensor:
        B, T, _ = projected.shape
        q, k, v = projected.view(B, T, 3, attn.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        found.update({f"{name}.q": q, f"{name}.k": k, f"{name}.v": v})
        return projected

    def record_weights(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        q, k, mask = found[f"{name}.q"], found[f"{name}.k"], args[1]
        # Attention to one-hot values gathers the weights themselves.
        found[f"{name}.weights"] = plain_attention(q, k, torch.eye(k.shape[2], dtype=k.dtype, device=k.device), mask)

    handle = attn.register_forward_hook(record_weights)
    try:
        with _hook_out(attn.c_attn, record_qkv):
            yield
    finally:
        handle.remove()


def _by_head(function: Callable[[Tensor], Tensor], n_heads: int) -> Callable[[Tensor], Tensor]:
    """A function of (B, H, T, D) as one of (B, T, C)."""

    def of_joined(joined: Tensor) -> Tensor:
        heads = joined.unflatten(2, (n_heads, -1)).transpose(1, 2)
        return function(heads).transpose(1, 2).flatten(2)

    return of_joined


def _same_shape(place: str, function: Callable[[Tensor], Tensor]) -> Callable[[Tensor], Tensor]:
    def checked(activation: Tensor) -> Tensor:
        edited = function(activation)
        if edited.shape != activation.shape:
            raise ValueError(
                f"the edit of {place} gave shape {tuple(edited.shape)}, the activation has {tuple(activation.shape)}"
            )
        return edited

    return checked


def _abridged(all_places: Iterable[str]) -> list[str]:
    """The places, those of the first layer standing for all."""
    return [
        place.replace("h.0", "h.i") for place in all_places if not place.startswith("h.") or place.startswith("h.0")
    ]


def _require_gpt(model: object) -> None:
    if not isinstance(model, GPTModel):
        raise TypeError(
            f"only a GPTModel can be looked into, got {type(model).__name__} (of PEFT's give model.get_base_model())"
        )


def _check_number(name: str, value: object, count: int) -> None:
    if type(value) is not int or not 0 <= value < count:
        raise ValueError(f"{name} must be a whole number from 0 to {count - 1}, got {value!r}")
