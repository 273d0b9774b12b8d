"""Write one HTML page about the features that a sparse autoencoder finds in a layer of a model (see sae.py).

The page is the template web/features.html with the numbers inserted as JSON. It lists the features, shows the passages of a
text in which each one fires, and shows which features fire at each token of a passage.
"""

from __future__ import annotations

import html
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from MyGPT.config import require_positive
from MyGPT.evaluation.perplexity import strided_loss
from MyGPT.inside.page import WEB, embedded_json, fill_page
from MyGPT.inside.sae import SparseAutoencoder, train_autoencoder
from MyGPT.inside.tracing import collect_activations, edit
from MyGPT.model import GPTModel
from MyGPT.notebooks import Described
from MyGPT.tokenizers.display import token_labels

MAX_TOKENS = 200_000
"""The number of tokens of the text that are read. Their activations take 100 MB for a model of width 128."""
MAX_FEATURES = 2048
"""The largest number of features on a page."""
MAX_PASSAGE = 512
"""The largest number of tokens in the passage of which the page shows every token."""
N_EXAMPLES = 4000
"""The number of examples on a page, which keeps the page below 2 MB. They are divided among the features."""
BEFORE, AFTER = 30, 8
"""The number of tokens that an example shows before and after the token at which the feature fires."""
N_BINS = 20


class Firings(NamedTuple):
    """All places where features fire: the features, the tokens (positions in the text) and the strengths, three vectors."""

    features: Tensor
    tokens: Tensor
    strengths: Tensor


def features_page(
    model: GPTModel,
    tokenizer: Any,
    ids: Tensor,
    layer: int | None = None,
    passage: Tensor | None = None,
    *,
    n_features: int = 512,
    k: int = 16,
    steps: int = 1000,
    seed: int = 0,
    name: str = "a GPT",
    progress: bool = False,
) -> str:
    """Train a sparse autoencoder on the residual stream after a layer, and return an HTML page about its features.

    Args:
        model: the model whose layer is explained.
        tokenizer: the model's tokenizer.
        ids: token ids of a text, (N,) int64. The autoencoder is trained on the first nine tenths of at most 200,000 tokens
            and measured on the rest. The examples come from both parts.
        layer: the layer, counted from 0. Default: the middle layer.
        passage: token ids of the passage of which the page shows every token. Default: the first 512 tokens after the nine
            tenths.
        n_features, k, steps, seed: see SparseAutoencoder and train_autoencoder.
        name: the name of the model in the title of the page.
        progress: show progress bars.

    Raises:
        ValueError: an argument is out of range, or the text is too short.
    """
    layer, n_layers = model.config.n_layers // 2 if layer is None else layer, model.config.n_layers
    if type(layer) is not int or not 0 <= layer < n_layers:
        raise ValueError(f"layer must be a whole number from 0 to {n_layers - 1}, got {layer!r}")
    require_positive(n_features=n_features, k=k)
    if n_features > MAX_FEATURES:
        raise ValueError(f"n_features must be at most {MAX_FEATURES:,} for a page, got {n_features:,}")
    if k > n_features:
        raise ValueError(f"k must be at most n_features, got k={k} and n_features={n_features}")
    length = model.config.context_length
    needed = 10 * max(n_features, length)
    if len(ids) < needed:
        what = f"{n_features} features of a model with a context of {length}"
        raise ValueError(f"the text has {len(ids):,} tokens, {what} need {needed:,}: give a longer text")
    if passage is not None and len(passage) > MAX_PASSAGE:
        raise ValueError(f"the passage has {len(passage)} tokens, the page can show {MAX_PASSAGE}")
    n_all, ids = len(ids), ids[:MAX_TOKENS]
    place = f"h.{layer}"
    n_train = len(ids) * 9 // 10 // length * length
    activations = collect_activations(model, ids, place, progress=progress)
    if torch.equal(activations, activations[:1].expand_as(activations)):
        raise ValueError(f"layer {layer} has the same activation at every token, so it has no features")
    autoencoder = train_autoencoder(activations[:n_train], n_features, k, steps=steps, seed=seed, progress=progress)
    quality = measure_autoencoder(model, ids[n_train:], place, autoencoder)
    passage = ids[n_train : n_train + MAX_PASSAGE] if passage is None else passage
    data = features_data(
        model, tokenizer, ids, activations, autoencoder, collect_activations(model, passage, place), passage
    )
    rounded = {name: round(value, 4) for name, value in quality.summary().items()}
    data |= {"layer": layer, "n_all": n_all, "n_train": n_train, "quality": rounded}
    title = html.escape(f"Features in layer {layer} of {name}")
    return fill_page(WEB / "features.html", {"title": title, "data": embedded_json(data)})


@torch.no_grad()
def features_data(
    model: GPTModel,
    tokenizer: Any,
    ids: Tensor,
    activations: Tensor,
    autoencoder: SparseAutoencoder,
    passage_activations: Tensor,
    passage: Tensor,
) -> dict[str, Any]:
    """Return the features of a text and of a passage, as a dict for JSON.

    Tokens are numbers of entries in the list "labels". Each feature that fires has its rate (the fraction of the tokens), its
    largest strength, the tokens at which it fires most often, the tokens whose logits its direction raises and lowers most, a
    histogram of its strengths, and examples. Examples show strengths in percent of the largest one.

    Args:
        ids: token ids of the text, (N,), and `activations` of its tokens, (N, C).
        passage: token ids of the passage, (P,), and `passage_activations` of its tokens, (P, C).
    """
    n_features = len(autoencoder.directions)
    table = _Labels(tokenizer)
    fired = find_firings(autoencoder, activations)
    effects = logit_effects(model, autoencoder.directions)
    counts = torch.bincount(fired.features, minlength=n_features)
    of_feature = fired.features.argsort(stable=True).split(counts.tolist())
    n_examples = max(2, min(10, N_EXAMPLES // n_features))
    generator = torch.Generator().manual_seed(0)
    features = []
    for feature, order in enumerate(of_feature):
        if not len(order):
            continue
        tokens, strengths = fired.tokens[order], fired.strengths[order]
        largest = float(strengths.max())
        values, n_on = ids[tokens].unique(return_counts=True)
        most = n_on.argsort(descending=True, stable=True)[:4]
        bins = (strengths / largest * N_BINS).long().clamp_max(N_BINS - 1)
        dense = torch.zeros(len(ids)).index_put((tokens,), strengths)
        chosen = _choose_examples(tokens, strengths, n_examples, generator)
        features.append(
            {
                "id": feature,
                "rate": float(f"{len(order) / len(ids):.3g}"),
                "max": float(f"{largest:.4g}"),
                "on": [[table.of(int(values[i])), round(int(n_on[i]) / len(order), 3)] for i in most],
                "up": [table.of(i) for i in effects[feature].topk(min(8, effects.shape[1])).indices.tolist()],
                "down": [table.of(i) for i in (-effects[feature]).topk(min(8, effects.shape[1])).indices.tolist()],
                "histogram": torch.bincount(bins, minlength=N_BINS).tolist(),
                "strongest": [_example(ids, dense, at, model.config.context_length, table) for at in chosen[0]],
                "random": [_example(ids, dense, at, model.config.context_length, table) for at in chosen[1]],
            }
        )
    return {
        "n_tokens": len(ids),
        "n_features": n_features,
        "k": autoencoder.k,
        "context": model.config.context_length,
        "features": features,
        "passage": {
            "tokens": [table.of(id_) for id_ in passage.tolist()],
            "active": _active(find_firings(autoencoder, passage_activations), len(passage)),
        },
        "labels": table.labels,
    }


@torch.no_grad()
def find_firings(autoencoder: SparseAutoencoder, activations: Tensor, batch_size: int = 4096) -> Firings:
    """Return where the features fire in activations (N, C), and how strongly. The places are in the order of the tokens."""
    parts = []
    for start in range(0, len(activations), batch_size):
        strengths = autoencoder.encode(activations[start : start + batch_size])
        tokens, features = strengths.nonzero(as_tuple=True)
        parts.append((features, tokens + start, strengths[tokens, features]))
    return Firings(*(torch.cat(columns) for columns in zip(*parts, strict=True)))


@dataclass(frozen=True)
class AutoencoderQuality(Described):
    """The quality of a sparse autoencoder on the activations of a text, and the number of features that it uses."""

    variance_explained: float
    """The fraction of the variance of the activations that the reconstruction explains: 1 is perfect, 0 is the mean."""
    n_active: float
    """The mean number of features per token with a strength above zero (L0)."""
    n_dead: int
    """The number of features that fire at no token of the text."""
    loss: float
    """The loss of the language model, in nats per token."""
    reconstructed_loss: float
    """The loss when the reconstruction replaces the activation of every token."""
    mean_loss: float
    """The loss when the mean over all tokens replaces the activation of every token."""

    @property
    def loss_recovered(self) -> float:
        """The fraction of the loss between `mean_loss` (0) and `loss` (1) that the reconstruction recovers."""
        return (self.mean_loss - self.reconstructed_loss) / (self.mean_loss - self.loss)

    def summary(self) -> dict[str, float]:
        """Return all measures by name."""
        return {**vars(self), "loss_recovered": self.loss_recovered}


@torch.no_grad()
def measure_autoencoder(model: GPTModel, ids: Tensor, place: str, autoencoder: SparseAutoencoder) -> AutoencoderQuality:
    """Measure an autoencoder for the activation `place` on a text, which should not be the text of its training.

    `ids` are the token ids of the text, (N,) int64. The model reads the text four times: to collect the activations, and for
    each of the three losses.
    """
    x = collect_activations(model, ids, place)
    fired = find_firings(autoencoder, x)
    mean, device = x.mean(0), model.transformer.wte.weight.device
    error = sum(float((batch - autoencoder(batch)).pow(2).sum()) for batch in x.split(4096))
    with edit(model, {place: lambda activation: autoencoder(activation.float().cpu()).to(device, activation.dtype)}):
        reconstructed_loss = strided_loss(model, ids).loss
    with edit(model, {place: lambda activation: mean.to(device, activation.dtype).expand_as(activation)}):
        mean_loss = strided_loss(model, ids).loss
    return AutoencoderQuality(
        variance_explained=1 - error / float((x - mean).pow(2).sum()),
        n_active=len(fired.tokens) / len(x),
        n_dead=len(autoencoder.directions) - len(fired.features.unique()),
        loss=strided_loss(model, ids).loss,
        reconstructed_loss=reconstructed_loss,
        mean_loss=mean_loss,
    )


@torch.no_grad()
def logit_effects(model: GPTModel, directions: Tensor) -> Tensor:
    """Return how much a small step in each direction (F, C) of the residual stream raises each logit, (F, V).

    Only the direct path to the output is counted: the final LayerNorm and the output head. The LayerNorm also divides by the
    standard deviation of the residual stream, which depends on the token, so only the effects of one direction can be compared.
    The mean effect on all tokens is subtracted, because it does not change a probability.
    """
    norm = model.transformer.ln_f
    centered = directions.to(norm.weight) - directions.to(norm.weight).mean(-1, keepdim=True)  # as the LayerNorm does
    logits = model.lm_head(centered * norm.weight).float().cpu()
    return logits - logits.mean(-1, keepdim=True)


class _Labels:
    """A list of token labels that grows as tokens are used."""

    def __init__(self, tokenizer: Any) -> None:
        self.tokenizer = tokenizer
        self.labels: list[str] = []
        self._index: dict[int, int] = {}

    def of(self, id_: int) -> int:
        """Return the number of a token's label in the list."""
        if id_ not in self._index:
            self._index[id_] = len(self.labels)
            self.labels += token_labels(self.tokenizer, [id_])
        return self._index[id_]


def _choose_examples(
    tokens: Tensor, strengths: Tensor, n: int, generator: torch.Generator
) -> tuple[list[int], list[int]]:
    """Return the positions of the strongest examples of a feature, which do not overlap, and of others drawn at random."""
    strongest: list[int] = []
    for at in tokens[strengths.argsort(descending=True, stable=True)].tolist():
        if all(abs(at - other) > BEFORE + AFTER for other in strongest):
            strongest.append(at)
            if len(strongest) == n - n // 3:
                break
    others = tokens[torch.randperm(len(tokens), generator=generator)[:n]].tolist()
    return strongest, [at for at in others if at not in strongest][: n // 3]


def _example(ids: Tensor, strengths: Tensor, at: int, length: int, table: _Labels) -> list[Any]:
    """Return an example as [tokens, strengths in percent of the strongest, index of the token `at`].

    `strengths` (N,) are those of one feature in the whole text. The example does not cross the borders of the window of
    `length` tokens in which the model read the token.
    """
    start = at // length * length
    begin, end = max(start, at - BEFORE), min(start + length, at + AFTER + 1, len(ids))
    percents = (strengths[begin:end] / strengths.max() * 100).round().int().tolist()
    return [[table.of(id_) for id_ in ids[begin:end].tolist()], percents, at - begin]


def _active(fired: Firings, n_tokens: int) -> list[list[Any]]:
    """Return, for each token, the features that are active and their strengths, [[feature, strength], …], strongest first."""
    active: list[list[Any]] = [[] for _ in range(n_tokens)]
    order = fired.strengths.argsort(descending=True, stable=True)
    for feature, token, strength in zip(*(column[order].tolist() for column in fired), strict=True):
        active[token].append([feature, float(f"{strength:.4g}")])
    return active
