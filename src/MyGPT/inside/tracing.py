"""Record and edit the activations of a GPTModel during its forward pass.

All functions use torch's forward hooks and remove them afterwards. Shapes: B sequences, T tokens, C embedding width, H
heads, D = C // H, V vocabulary size. Each activation has a name, which is the name of its module without "transformer.":

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

A model with custom parts (see MyGPT.parts) has only the activations that can be observed. A custom block has only h.3. A
custom attention class has no h.3.attn.q to h.3.attn.heads. A custom MLP has neurons if its layers are called c_fc and c_proj.
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

from MyGPT.config import require_index, require_positive
from MyGPT.generation import evaluation_mode
from MyGPT.model import GPTModel
from MyGPT.notebooks import Described
from MyGPT.progress import progress_bar
from MyGPT.sampling import require_finite

Edit = Callable[[Tensor], Tensor]
"""A function that receives an activation and returns its replacement, a tensor of the same shape."""

_IN_LAYER = (".ln_1", ".attn.q", ".attn.k", ".attn.v", ".attn.weights", ".attn.heads", ".attn", ".after_attn", ".ln_2",
             ".mlp.c_fc", ".mlp.activations", ".mlp", "")  # fmt: skip
# `trace` records these activations, but `edit` does not accept them.
_NOT_EDITABLE = (".attn.q", ".attn.k", ".attn.v", ".attn.weights", ".after_attn", "logits")
# These activations are the input of a module. All other editable ones are the output of the module with the same name.
_INPUT_OF = {
    "embeddings": "h.0",
    ".attn.heads": ".attn.c_proj",
    ".after_attn": ".ln_2",
    ".mlp.activations": ".mlp.c_proj",
}


class Trace(Described, dict[str, Tensor]):
    """A dict from the names of activations, such as "h.3.mlp", to their values in one forward pass (see `trace`)."""

    def summary(self) -> dict[str, object]:
        """Return the shape of each activation. Layers after the first are left out, because their shapes are the same."""
        first = {name: tuple(value.shape) for name, value in self.items() if not re.match(r"h\.[1-9]", name)}
        return {"activations": len(self), **first}

    @property
    def attention(self) -> Tensor:
        """The attention weights of all layers, (layers, sequences, heads, queries, keys).

        Raises ValueError if the model has custom parts that do not show their attention weights.
        """
        weights = [value for place, value in self.items() if place.endswith(".attn.weights")]
        if not weights:
            way_out = "only a function attention(q, k, v, mask) that is linear in v shows them"
            raise ValueError(f"the attention weights of this model's custom parts are unknown: {way_out}")
        return torch.stack(weights)

    @property
    def residual(self) -> Tensor:
        """The residual stream after the embeddings and after each layer, (layers + 1, sequences, tokens, width)."""
        return torch.stack([self["embeddings"], *(self[place] for place in self if re.fullmatch(r"h\.\d+", place))])


def places(model: GPTModel) -> list[str]:
    """Return the names of all activations that `trace` records, such as "h.3.mlp", in the order of the forward pass."""
    _require_gpt(model)
    absent = _absent(model)
    in_layers = [f"h.{i}{place}" for i in range(model.config.n_layers) for place in _IN_LAYER if place not in absent]
    return ["wte", "wpe", "embeddings", *in_layers, "ln_f", "logits"]


def _absent(model: GPTModel) -> set[str]:
    """Return the endings of the activations that custom parts of the model do not have."""
    used = () if model.parts is None else model.parts.used
    if "Block" in used:
        return set(_IN_LAYER) - {""}
    absent = set()
    if "CausalSelfAttention" in used:
        absent |= {".attn.q", ".attn.k", ".attn.v", ".attn.weights", ".attn.heads"}
    if "MLP" in used:
        layers = {name for name, _ in model.transformer.get_submodule("h.0.mlp").named_children()}
        absent |= {".mlp.c_fc"} if "c_fc" not in layers else set()
        absent |= {".mlp.activations"} if "c_proj" not in layers else set()
    return absent


@torch.no_grad()
def trace(model: GPTModel, ids: Tensor, attention_mask: Tensor | None = None) -> Trace:
    """Run the model in evaluation mode without gradients and return all activations by name (see `places`).

    torch's fused attention kernel does not return the attention weights, so they are computed a second time. For long
    texts, the attention weights take most of the memory: layers * B * heads * T² numbers.

    Args:
        model: the model to run. Active edits (see `edit`) take effect and appear in the trace.
        ids: token ids of B sequences of T tokens, (B, T) int64.
        attention_mask: a tensor (B, T) that is 1 for tokens and 0 for padding. Default: no padding.
    """
    all_places = places(model)
    activations: dict[str, Tensor] = {}

    def record(place: str) -> Edit:
        return lambda value: activations.setdefault(place, value)

    with evaluation_mode(model), ExitStack() as hooks:
        hooks.enter_context(edit(model, {place: record(place) for place in _editable(all_places)}))
        for i, block in enumerate(model.transformer.h):
            if f"h.{i}.after_attn" in all_places:
                hooks.enter_context(_hook(model, f"h.{i}.after_attn", record(f"h.{i}.after_attn")))
            if f"h.{i}.attn.weights" in all_places:
                hooks.enter_context(_record_attention(block.attn, f"h.{i}.attn", activations))
        activations["logits"] = model(ids, attention_mask=attention_mask)
    return Trace((place, activations[place]) for place in all_places if place in activations)


@contextmanager
def edit(model: GPTModel, edits: Mapping[str, Edit]) -> Iterator[None]:
    """Replace activations of the model by the results of functions, within a `with` block.

        with edit(model, {"h.3.mlp": lambda x: x - x.mean(dim=(0, 1))}):
            ...

    The edits apply to everything that runs the model, such as `trace`, a loss or `generate` (with a KV cache, a function
    receives only the new tokens). Queries, keys, values, attention weights, logits, and the residual stream between
    attention and MLP cannot be edited.

    Args:
        model: the model to edit. Its weights do not change.
        edits: a dict from the name of an activation (see `places`) to a function. The function receives the activation and
            returns a tensor of the same shape.

    Raises:
        ValueError: an activation cannot be edited, or a function returns another shape.
    """
    editable = _editable(places(model))
    with ExitStack() as hooks:
        for place, function in edits.items():
            if place not in editable:
                raise ValueError(
                    f"the activation {place!r} cannot be edited; choose from {', '.join(_abridged(editable))}"
                )
            hooks.enter_context(_hook(model, place, _checked_edit(place, function, model.config.n_heads)))
        yield


@torch.no_grad()
def collect_activations(
    model: GPTModel, ids: Tensor, place: str, batch_size: int = 32, progress: bool = False
) -> Tensor:
    """Return one activation of each token of a long text, (N, C) float32 on the CPU.

    The model reads the text in windows: token i is in window i // context_length, together with the tokens before it in this
    window.

    Args:
        model: the model to run. It runs in evaluation mode.
        ids: token ids of the text, (N,) int64.
        place: the name of an activation with one vector per token, such as "h.3", which `edit` accepts.
        batch_size: windows per forward pass.
        progress: show a progress bar.
    """
    length, pieces = model.config.context_length, list[Tensor]()
    n_whole = len(ids) // length * length
    windows = [*ids[:n_whole].view(-1, length).split(batch_size), ids[None, n_whole:]]

    def record(activation: Tensor) -> Tensor:
        if activation.dim() != 3:
            raise ValueError(f"the activation {place} has no vector per token, its shape is {tuple(activation.shape)}")
        pieces.append(activation.flatten(0, 1).float().cpu())
        return activation

    bar = progress_bar(progress, total=len(ids), unit="token")
    with evaluation_mode(model), edit(model, {place: record}), bar:
        for batch in filter(Tensor.numel, windows):
            model(batch.to(model.transformer.wte.weight.device), last_only=True)
            bar.update(batch.numel())
    return torch.cat(pieces)


@contextmanager
def ablate_heads(model: GPTModel, heads: Iterable[tuple[int, int]]) -> Iterator[None]:
    """Set the output of attention heads to zero within a `with` block; `heads` are pairs (layer, head), counted from 0."""
    _require_gpt(model)
    of_layer: dict[int, list[int]] = {}
    for layer, head in heads:
        require_index("layer", layer, model.config.n_layers)
        require_index("head", head, model.config.n_heads)
        of_layer.setdefault(layer, []).append(head)

    def zero(ablated: list[int]) -> Edit:
        return lambda outputs: outputs.index_fill(1, torch.tensor(ablated, device=outputs.device), 0.0)

    with edit(model, {f"h.{layer}.attn.heads": zero(ablated) for layer, ablated in of_layer.items()}):
        yield


@contextmanager
def ablate_mlps(model: GPTModel, layers: Iterable[int]) -> Iterator[None]:
    """Set the output of the MLP in each of these layers (counted from 0) to zero within a `with` block."""
    _require_gpt(model)
    layers = list(layers)
    for layer in layers:
        require_index("layer", layer, model.config.n_layers)
    with edit(model, {f"h.{layer}.mlp": torch.zeros_like for layer in layers}):
        yield


@contextmanager
def patch(model: GPTModel, source: Trace, place: str, index: int | None = None) -> Iterator[None]:
    """Replace an activation by its value in another forward pass, within a `with` block.

    This is activation patching, also known as causal tracing (Vig et al., 2020; Meng et al., 2022).

    Args:
        model: the model to edit. Its weights do not change.
        source: the trace of the other forward pass, with the same number of sequences and tokens.
        place: the name of the activation, such as "h.3.mlp"; `edit` must accept it.
        index: replace the activation only at the token with this position or, for "h.i.attn.heads", only in the head with
            this number, in all sequences. Default: replace the whole activation.

    Raises:
        ValueError: `place` or `index` is not in the trace, or the two forward passes have different shapes.
    """
    if place not in source:
        raise ValueError(f"the trace has no activation {place!r}; choose from {', '.join(_abridged(source))}")
    value = source[place]
    dim = 1 if place.endswith(".attn.heads") else value.dim() - 2  # heads, or time
    if index is not None:
        require_index("index", index, value.shape[dim])

    def replace(activation: Tensor) -> Tensor:
        if activation.shape != value.shape:
            raise ValueError(
                f"{place} has shape {tuple(activation.shape)}, in the trace {tuple(value.shape)}: the prompts must have "
                "the same number of sequences and tokens"
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
    """Measure a metric on a corrupted prompt while one activation at a time is replaced by its value on a clean prompt.

    Return a float64 tensor (layers, tokens), or (layers, heads) for part="attn.heads". Each entry is the metric after one
    replacement, which takes one forward pass. The entries show which layers and tokens, or which heads, cause the
    difference between the two prompts.

    Args:
        model: the model to run. Its weights do not change.
        clean: token ids of the prompt from which activations are taken, (B, T) int64.
        corrupted: token ids of the prompt that the model reads, (B, T) int64.
        metric: a function that maps logits (B, T, vocabulary) to a number.
        part: the activation to replace in a layer. "" is the residual stream after the layer, "attn" is the output of
            attention, "mlp" is the output of the MLP, each at one token. "attn.heads" is the output of one head.
    """
    allowed = ("", "attn", "mlp", "attn.heads")
    if part not in allowed:
        raise ValueError(f"part must be one of {', '.join(map(repr, allowed))}, got {part!r}")
    if clean.shape != corrupted.shape:
        raise ValueError(
            "the prompts must have the same number of sequences and tokens, got "
            f"{tuple(clean.shape)} and {tuple(corrupted.shape)}"
        )
    source = trace(model, clean)
    require_finite("a logit of the model", source["logits"])
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
    """Return the logits that the model would predict if it stopped after the embeddings or after each layer (logit lens).

    The result has the shape (layers + 1, sequences, tokens, vocabulary); its last entry is the model's own logits. The
    logit lens (nostalgebraist, 2020) applies the final LayerNorm and the output head to each residual stream in `traced`.
    For 100 tokens of GPT-2 124M in float32, the result takes 261 MB.
    """
    _require_gpt(model)
    return torch.stack([model.lm_head(model.transformer.ln_f(x)) for x in traced.residual])


@torch.no_grad()
def induction_scores(model: GPTModel, length: int | None = None, n_sequences: int = 8, seed: int = 0) -> Tensor:
    """Return an induction score from 0 to 1 for each head, a tensor (layers, heads) (Olsson et al., 2022).

    An induction head predicts repetitions: in "A B … A", it attends from the second A to B, the token after the first A.
    The model reads n_sequences sequences. Each consists of `length` random tokens, followed by the same tokens again. The
    score is the mean attention weight from a token of the second half to the token after its first occurrence. A head
    that always attends the same number of tokens back also scores high, but only for one length, so compare two lengths.
    Default length: 50, or half the context if that is smaller. `seed` selects the random tokens.
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
    require_finite("an attention weight", attention)
    times = torch.arange(n, 2 * n)
    return attention[..., times, times - n + 1].mean(dim=(1, 3))  # over sequences and positions


def nearest_tokens(model: GPTModel, id_: int, k: int = 10) -> tuple[Tensor, Tensor]:
    """Return the k tokens whose embeddings have the largest cosine similarity to the embedding of token `id_`.

    The result is the ids and the similarities of these tokens, each (k,), in descending order; `id_` itself is left out.
    """
    _require_gpt(model)
    require_finite("a weight of the token embedding", model.transformer.wte.weight.detach())
    vectors = nn.functional.normalize(model.transformer.wte.weight.detach().float(), dim=1)  # (V, C)
    require_index("id", id_, len(vectors))
    if type(k) is not int or not 1 <= k < len(vectors):
        raise ValueError(f"k must be a whole number from 1 to {len(vectors) - 1}, the other tokens, got {k!r}")
    cosines = (vectors @ vectors[id_]).index_fill(0, torch.tensor(id_, device=vectors.device), -2.0)  # (V,)
    best = cosines.topk(k)
    return best.indices, best.values


def _editable(all_places: Iterable[str]) -> list[str]:
    return [place for place in all_places if not place.endswith(_NOT_EDITABLE)]


def _hook(model: GPTModel, place: str, function: Edit) -> RemovableHandle:
    """Register a hook that replaces the activation with the name `place` by `function(activation)`; return its handle."""
    for suffix, name in _INPUT_OF.items():
        if place.endswith(suffix):
            module = model.transformer.get_submodule(place.removesuffix(suffix) + name)
            return module.register_forward_pre_hook(lambda _, args: (function(args[0]), *args[1:]))
    return model.transformer.get_submodule(place).register_forward_hook(lambda _, args, output: function(output))


def plain_attention(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """Return the attention output softmax(q kᵀ / √D) v with a mask, computed in separate steps (Vaswani et al., 2017).

    Args:
        q: queries (..., T, D) of the last T of S tokens; D is the width of a head.
        k, v: keys and values (..., S, D) of all S tokens.
        mask: a bool tensor (..., T, S) that is True where a query may attend to a key. Default: causal attention, where
            a query attends to the keys up to its own position.
    """
    T, S = q.shape[-2], k.shape[-2]
    if mask is None:
        mask = torch.ones(T, S, dtype=torch.bool, device=q.device).tril(S - T)
    scores = q @ k.transpose(-2, -1) / math.sqrt(q.shape[-1])  # (..., T, S)
    return scores.masked_fill(~mask, -math.inf).softmax(dim=-1) @ v  # (..., T, D)


@contextmanager
def _record_attention(attn: Any, place: str, activations: dict[str, Tensor]) -> Iterator[None]:
    """Record queries, keys, values and attention weights of the layer `attn` while the model runs within a `with` block.

    They are stored in `activations` under names that start with `place`, such as "h.3.attn.q". The weights are those of the
    layer's own function, if it has one. They are left out if this function does not return weighted sums of the values.
    """
    own = getattr(attn, "function", None)

    def record_qkv(_: nn.Module, args: tuple[Any, ...], projected: Tensor) -> None:
        B, T = projected.shape[:2]
        q, k, v = projected.view(B, T, 3, attn.n_heads, -1).permute(2, 0, 3, 1, 4)  # each (B, H, T, D)
        activations.update({f"{place}.q": q, f"{place}.k": k, f"{place}.v": v})

    def record_weights(_: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        q, k, mask = activations[f"{place}.q"], activations[f"{place}.k"], args[1]
        # Attention over one-hot values returns the attention weights.
        one_hot = torch.eye(k.shape[2], dtype=k.dtype, device=k.device)
        if own is None:
            activations[f"{place}.weights"] = plain_attention(q, k, one_hot, mask)
            return
        weights, v = _own_weights(own, q, k, one_hot, mask), activations[f"{place}.v"]
        if weights is not None and _are_weights(weights, own(q, k, v, mask), v):
            activations[f"{place}.weights"] = weights

    with attn.c_attn.register_forward_hook(record_qkv), attn.register_forward_hook(record_weights):
        yield


def _own_weights(function: Any, q: Tensor, k: Tensor, one_hot: Tensor, mask: Tensor | None) -> Tensor | None:
    """Return the result of a custom attention function for one-hot values, or None if it refuses values of this shape."""
    try:
        weights: Tensor = function(q, k, one_hot.expand(*k.shape[:2], -1, -1), mask)
    except Exception:  # code of the user, which need not work with values of another width
        return None
    return weights


def _are_weights(weights: Tensor, output: Tensor, v: Tensor) -> bool:
    """Return True if `weights` (B, H, T, S) times the values v are the output of attention, up to rounding."""
    if weights.shape != (*output.shape[:3], v.shape[2]):
        return False
    tolerance = 1e-3 if v.dtype == torch.float32 else 5e-2
    return bool((weights.to(v.dtype) @ v - output).abs().max() <= tolerance * output.abs().max())


def _checked_edit(place: str, function: Edit, n_heads: int) -> Edit:
    """Return a hook function that applies `function` to the activation `place`.

    The hook function raises ValueError if `function` returns a tensor of another shape.
    For "h.i.attn.heads", `function` receives the outputs of the H = n_heads heads as (B, H, T, D) instead of (B, T, C).
    """
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
    """Return a shorter list of activation names for an error message: "h.0.mlp", "h.1.mlp" and so on become "h.i.mlp"."""
    return list(dict.fromkeys(re.sub(r"^h\.\d+", "h.i", place) for place in all_places))


def _require_gpt(model: object) -> None:
    if not isinstance(model, GPTModel):
        raise TypeError(
            f"the model must be a GPTModel, got {type(model).__name__} (for a PeftModel, pass its get_base_model())"
        )
