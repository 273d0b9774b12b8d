"""Pictures of runs, models and what they compute. A figure is returned, never shown, so that any program can use it.

Nothing here is needed to train or to run a model; matplotlib is imported when the first figure is drawn. Colours are told
apart by colour-blind readers, and a single scale goes from light to dark. Token boundaries of a text, which need no
figure, are drawn by `tokens_to_terminal` and `tokens_to_html`.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from MyGPT.files import atomic_write
from MyGPT.tokenizers.display import shorten, token_labels, tokens_to_html, tokens_to_terminal
from MyGPT.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from MyGPT.model import GPTModel
    from MyGPT.sampling import SamplingConfig
    from MyGPT.training.config import TrainConfig

__all__ = [
    "plot_attention",
    "plot_layers",
    "plot_logit_lens",
    "plot_losses",
    "plot_neighbours",
    "plot_sampling",
    "plot_schedule",
    "save_figure",
    "token_labels",
    "tokens_to_html",
    "tokens_to_terminal",
]

# Okabe & Ito (2008): told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
LIGHT_TO_DARK = "Blues"
# In the order in which sampling.filter_logits applies them.
_FILTER_NAMES = {
    "repetition_penalty": "penalty",
    "temperature": "temperature",
    "top_k": "top-k",
    "top_p": "top-p",
    "min_p": "min-p",
}
WIDTH = 9.0
"""Inches: what a notebook shows without scaling."""


def plot_losses(runs: Sequence[str | os.PathLike[str]]) -> Figure:
    """Training loss (thin, smoothed over a fiftieth of the run) and validation loss (dots) of one or several runs."""
    figure = _figure(7, 4.2)
    axes: Any = figure.subplots()
    for i, run in enumerate(runs):
        records, colour = read_metrics(run), COLOURS[i % len(COLOURS)]
        name = f"{Path(run).resolve().name} " if len(runs) > 1 else ""
        steps = [record["step"] for record in records if "loss" in record]
        losses = smooth([record["loss"] for record in records if "loss" in record])
        axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.6, label=f"{name}training")
        evaluated = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "o-", color=colour, markersize=4, label=f"{name}validation")
    axes.set(xlabel="step", ylabel="loss (nats a token)")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def smooth(values: Sequence[float]) -> list[float]:
    """Means over a window centred on each value, a fiftieth of them wide."""
    half = len(values) // 100
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_schedule(configs: Mapping[str, TrainConfig]) -> Figure:
    """The learning rate of each step of one or several trainings, by name."""
    from MyGPT.training.optim import schedule_factor

    figure = _figure(7, 3.2)
    axes: Any = figure.subplots()
    for i, (name, config) in enumerate(configs.items()):
        rates = [config.learning_rate * schedule_factor(config, step) for step in range(config.max_steps)]
        axes.plot(rates, color=COLOURS[i % len(COLOURS)], label=name, linestyle=("-", "--", "-.", ":")[i % 4])
    axes.set(xlabel="step", ylabel="learning rate of AdamW", ylim=(0, None))
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.grid(alpha=0.3)
    axes.legend(frameon=False)
    return figure


def plot_attention(weights: Tensor, labels: Sequence[str], first_head: int = 0) -> Figure:
    """How much each token (row) takes from each token (column), a map a head; weights (H, T, T) of one layer and text.

    `trace(model, ids)["h.0.attn.weights"][0]` is such. first_head numbers the first of the maps.
    """
    H, T = weights.shape[0], weights.shape[1]
    if weights.dim() != 3 or weights.shape[2] != T or len(labels) != T:
        raise ValueError(f"weights must be (heads, {len(labels)}, {len(labels)}), got {tuple(weights.shape)}")
    # Labels of a longer text need larger maps.
    n_columns = min(H, 2 if T > 16 and H <= 4 else 3 if T > 16 or H in (5, 6, 9) else 4)
    n_rows = math.ceil(H / n_columns)
    side = min(5.5, (WIDTH - 1.3) / n_columns)
    figure = _figure(side * n_columns + 1.3, (side + 0.25) * n_rows + 0.6)
    grid: Any = figure.subplots(n_rows, n_columns, sharex=True, sharey=True, squeeze=False)
    names, every = _readable(labels, side)
    size = min(9.0, 62 * side / T * every)
    for head, axes in enumerate(grid.flat):
        if head >= H:
            axes.set_axis_off()
            continue
        image = axes.imshow(_array(weights[head]), cmap=LIGHT_TO_DARK, vmin=0, vmax=1)
        axes.set_title(f"head {first_head + head}", fontsize=10)
        ticks = range(0, T, every)
        axes.set_xticks(ticks, names[::every], rotation=90, fontsize=size, parse_math=False)
        axes.set_yticks(ticks, names[::every], fontsize=size, parse_math=False)
        axes.tick_params(length=0)
        # A map without another below it keeps its labels.
        axes.tick_params(labelbottom=head + n_columns >= H)
    bar = figure.colorbar(image, ax=grid, shrink=0.6 if n_rows > 1 else 0.8, aspect=30)
    bar.set_label("attention weight")
    figure.supxlabel("takes from", fontsize=10)
    figure.supylabel("token", fontsize=10)
    return figure


def plot_layers(
    values: Tensor, columns: Sequence[str] | str, label: str, limits: tuple[float, float] | None = None
) -> Figure:
    """A number for each layer (row, the first below) and head or token (column): induction scores, effects of patching.

    values (L, N); columns are N texts, or what they are ("head"), to be numbered. limits are the values of the lightest
    and the darkest colour; default the smallest and the largest.
    """
    L, N = values.shape
    numbered = isinstance(columns, str)
    labels = [str(i) for i in range(N)] if numbered else list(columns)
    if len(labels) != N:
        raise ValueError(f"values has {N} columns, there are {len(labels)} labels")
    cell = min(0.7, (WIDTH - 2) / N)
    figure = _figure(max(4.0, cell * N + 2), max(1.8, min(0.5, cell) * L + 1))
    axes: Any = figure.subplots()
    low, high = limits or (None, None)
    image = axes.imshow(_array(values), cmap=LIGHT_TO_DARK, aspect="auto", origin="lower", vmin=low, vmax=high)
    names, every = _readable(labels, cell * N)
    upright = max(map(len, names)) * 0.1 < cell * every
    axes.set_xticks(range(0, N, every), names[::every], rotation=0 if upright else 90, parse_math=False, fontsize=9)
    axes.set_yticks(range(L))
    axes.set(ylabel="layer", xlabel=columns if numbered else "token")
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, pad=0.02).set_label(label)
    return figure


def plot_logit_lens(lens: Tensor, labels: Sequence[str], tokenizer: Any) -> Figure:
    """The likeliest next token after each layer, and how likely: lens (L + 1, T, V), one row of `inspect.logit_lens`.

    Columns are the text's tokens, rows go from the embeddings (below) to the last layer, where the model's answer stands.
    """
    n_depths, T, _ = lens.shape
    if len(labels) != T:
        raise ValueError(f"lens has {T} tokens, there are {len(labels)} labels")
    probabilities, best = lens.detach().float().softmax(-1).max(-1)  # (L + 1, T)
    width = (WIDTH - 1.8) / T
    figure = _figure(WIDTH, max(2.4, 0.3 * n_depths + 1.2))
    axes: Any = figure.subplots()
    image = axes.imshow(_array(probabilities), cmap=LIGHT_TO_DARK, vmin=0, vmax=1, aspect="auto", origin="lower")
    room = int(width / 0.088)  # characters of 9 points that fit into a cell
    if room >= 2:
        for depth in range(n_depths):
            texts = shorten(_drawable(token_labels(tokenizer, best[depth].tolist())), room)
            for t, text in enumerate(texts):
                colour = "white" if probabilities[depth, t] > 0.55 else "black"
                axes.text(t, depth, text, ha="center", va="center", fontsize=9, color=colour, parse_math=False)
    names, every = _readable(labels, WIDTH - 1.8)
    upright = max(map(len, names)) * 0.1 < width * every
    axes.set_xticks(range(0, T, every), names[::every], rotation=0 if upright else 90, parse_math=False, fontsize=9)
    step = max(1, math.ceil(n_depths / 14))
    ticks = sorted({*range(n_depths - 1, 0, -step), 0})
    axes.set_yticks(ticks, ["embeddings" if i == 0 else f"layer {i - 1}" for i in ticks], fontsize=9)
    axes.tick_params(length=0)
    axes.set_xlabel("after this token")
    figure.colorbar(image, ax=axes, pad=0.02).set_label("probability of the likeliest")
    return figure


def plot_sampling(
    logits: Tensor, config: SamplingConfig, tokenizer: Any, seen: Sequence[int] = (), n_tokens: int = 15
) -> Figure:
    """One next-token distribution before and after each sampling filter that the config asks for, in their order.

    logits (V,) of one position; seen are the ids for the repetition penalty. The n_tokens likeliest tokens have a bar,
    all others share one; a token that a filter has ruled out is crossed.
    """
    import torch

    if logits.dim() != 1:
        raise ValueError(f"logits must be those of one position, (vocabulary,), got {tuple(logits.shape)}")
    n = min(n_tokens, len(logits))
    stages = _stages(logits.detach().float().cpu(), config, seen)
    best = torch.topk(stages[0][1], n).indices
    names = shorten(_drawable(token_labels(tokenizer, best.tolist())), 14)
    others = torch.ones(len(logits), dtype=torch.bool).index_fill(0, best, False)
    figure = _figure(WIDTH, 0.22 * (n + 1) + 1.1)
    panels: Any = figure.subplots(1, len(stages), sharey=True, sharex=True, squeeze=False)[0]
    longest = 1.5 * max(float(stage[best].max()) for _, stage in stages)
    panels[0].set_xlim(0, longest)
    for i, (axes, (title, probabilities)) in enumerate(zip(panels, stages, strict=True)):
        bars = [*probabilities[best].tolist(), float(probabilities[others].sum())]
        axes.barh(range(n + 1), bars, color=[COLOURS[0]] * n + ["#BBBBBB"])
        for row, probability in enumerate(bars):
            if probability > 0:  # beside the bar, or at the edge that it runs over
                place = min(probability, 0.66 * longest)
                axes.text(place, row, f" {_percent(probability)}", va="center", fontsize=8)
            else:
                axes.plot(0.05, row, "x", color=COLOURS[1], markersize=5, transform=axes.get_yaxis_transform())
        kept = int((probabilities > 0).sum())
        axes.set_title(f"{title}\n{kept:,} possible" if i else f"{title}\n{len(logits):,} tokens", fontsize=9)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([])
    panels[0].set_yticks(range(n + 1), [*names, "all others"], fontsize=9, parse_math=False)
    panels[0].set_ylim(n + 0.6, -0.6)
    return figure


def _stages(logits: Tensor, config: SamplingConfig, seen: Sequence[int]) -> list[tuple[str, Tensor]]:
    """A name and the probabilities (V,) for the model's own distribution and after each filter that is on."""
    import torch

    from MyGPT.sampling import SamplingConfig, filter_logits

    mask = torch.zeros(1, len(logits), dtype=torch.bool)
    mask[0, list(seen)] = True
    stages, so_far = [("the model's", logits.softmax(-1))], SamplingConfig(temperature=1.0)
    for name in _FILTER_NAMES:
        value = getattr(config, name)
        if value is None or (name, value) == ("temperature", 1.0):
            continue
        so_far = dataclasses.replace(so_far, **{name: value})
        filtered = filter_logits(logits[None], so_far, mask)[0]
        if so_far.temperature == 0:
            stages.append(("temperature 0", torch.zeros_like(filtered).index_fill(0, filtered.argmax(), 1.0)))
            break
        stages.append((f"{_FILTER_NAMES[name]} {value:g}", filtered.softmax(-1)))
    return stages


def plot_neighbours(model: GPTModel, tokenizer: Any, ids: Sequence[int], k: int = 8) -> Figure:
    """For each of some tokens the k tokens whose embeddings are most like its own, by the cosine between them."""
    from MyGPT.inside.tracing import nearest_tokens

    if not ids:
        raise ValueError("there is no token to find neighbours of")
    n_columns = min(len(ids), 4)
    n_rows = math.ceil(len(ids) / n_columns)
    figure = _figure(2.25 * n_columns, (0.2 * k + 0.6) * n_rows)
    grid: Any = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(ids) :]:
        axes.set_axis_off()
    labels = _drawable(token_labels(tokenizer, ids))
    for i, (axes, id_, name) in enumerate(zip(grid.flat, ids, labels, strict=False)):
        nearest, cosines = nearest_tokens(model, id_, k)
        names = shorten(_drawable(token_labels(tokenizer, nearest.tolist())), 12)
        axes.barh(range(k), cosines.tolist(), color=COLOURS[0])
        axes.set_yticks(range(k), names, fontsize=9, parse_math=False)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=11, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8, labelbottom=i + n_columns >= len(ids))
    figure.supxlabel("cosine", fontsize=10)
    return figure


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure in the format that the name ends in (png, svg, pdf)."""
    kind = Path(path).suffix.lstrip(".") or "png"
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"a figure is written as .png, .svg or .pdf, got {path}")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=150)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), layout="constrained")


def _array(values: Tensor) -> Any:
    """As matplotlib wants it: it asks numpy for a copy in a way that tensors do not know."""
    return values.detach().float().cpu().numpy()


def _readable(labels: Sequence[str], inches: float) -> tuple[list[str], int]:
    """Labels that can be drawn along so many inches, and of how many one is to be, so that they do not touch."""
    return shorten(_drawable(labels), 12), math.ceil(len(labels) / max(1, int(inches / 0.09)))


def _drawable(labels: Sequence[str]) -> list[str]:
    """The labels, an escape for each character that matplotlib's font has no shape for."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    shapes = get_font(findfont(FontProperties())).get_charmap()
    return ["".join(c if ord(c) in shapes else c.encode("unicode_escape").decode() for c in text) for text in labels]


def _percent(probability: float) -> str:
    if probability < 0.001:
        return "< 0.1 %"
    return f"{100 * probability:.0f} %" if probability >= 0.1 else f"{100 * probability:.1f} %"
