"""Draw training runs, models and their activations as matplotlib figures.

Each function returns a figure and does not show it, so scripts, notebooks and servers can all use the functions. matplotlib
is imported when the first figure is drawn. Colour-blind readers can distinguish the colours.
"""

from __future__ import annotations

import dataclasses
import io
import math
import os
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from MyGPT.files import atomic_write, check_output_file
from MyGPT.tokenizers.base import ids_without_token
from MyGPT.tokenizers.display import shorten, token_labels, tokens_to_html, tokens_to_terminal
from MyGPT.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from MyGPT.model import GPTModel
    from MyGPT.sampling import SamplingConfig
    from MyGPT.training.config import TrainConfig

__all__ = [
    "plot_attention", "plot_layers", "plot_logit_lens", "plot_losses", "plot_mean_losses", "plot_neighbours", "plot_sampling",
    "plot_schedule", "save_figure", "token_labels", "tokens_to_html", "tokens_to_terminal",
]  # fmt: skip

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
"""The colours of curves and bars, which colour-blind readers can distinguish (Okabe and Ito, 2008)."""
LIGHT_TO_DARK = "Blues"
"""The name of matplotlib's colour map for all heat maps."""
WIDTH = 9.0
"""The width of a wide figure in inches. Notebooks show this width unscaled, so text keeps its size."""

_FILTERS = ("repetition_penalty", "temperature", "top_k", "top_p", "min_p")
"""The options of SamplingConfig that change probabilities, in the order in which `sampling.filter_logits` applies them."""


def plot_losses(runs: Sequence[str | os.PathLike[str]]) -> Figure:
    """Draw the training loss (smoothed line) and the validation loss (dots) of one or several run directories."""
    figure, axes = _line_figure(4.2, "loss (nats per token)")
    names = distinct_names(runs) if len(runs) > 1 else [""]
    for i, (run, name) in enumerate(zip(runs, names, strict=True)):
        records, colour = read_metrics(run), COLOURS[i % len(COLOURS)]
        name = f"{name} " if name else ""
        steps = [record["step"] for record in records if "loss" in record]
        losses = smooth([record["loss"] for record in records if "loss" in record])
        axes.plot(steps, losses, color=colour, linewidth=1, alpha=0.6, label=f"{name}training")
        evaluated = [(record["step"], record["val_loss"]) for record in records if "val_loss" in record]
        if evaluated:
            axes.plot(*zip(*evaluated, strict=True), "o-", color=colour, markersize=4, label=f"{name}validation")
    axes.legend(frameon=False)
    return figure


def plot_mean_losses(settings: Mapping[str, Sequence[str | os.PathLike[str]]]) -> Figure:
    """Draw the mean validation loss of several groups of runs, with a band of one standard deviation on each side.

    `settings` maps the label of each group to its run directories. A curve has the steps at which all runs of its group were
    evaluated.
    """
    import numpy as np

    figure, axes = _line_figure(4.2, "validation loss (nats per token)")
    for i, (label, runs) in enumerate(settings.items()):
        losses = [{it["step"]: it["val_loss"] for it in read_metrics(run) if "val_loss" in it} for run in runs]
        steps = sorted(set.intersection(*map(set, losses))) if losses else []
        values = np.array([[run[step] for step in steps] for run in losses], dtype=np.float64)  # (runs, steps)
        if not steps:
            continue
        style = {"color": COLOURS[i % len(COLOURS)], "linestyle": ("-", "--", "-.", ":")[i // len(COLOURS) % 4]}
        mean = values.mean(axis=0)
        axes.plot(
            steps, mean, marker="o", markersize=3, label=f"{label} (n = {len(losses)})" if label else None, **style
        )
        if len(losses) > 1:
            deviation = values.std(axis=0, ddof=1)
            axes.fill_between(steps, mean - deviation, mean + deviation, color=style["color"], alpha=0.2, linewidth=0)
    axes.set_title("mean over the seeds, with a band of one standard deviation", fontsize=9)
    if len(settings) > 1:
        legend = axes.legend(frameon=False, fontsize=9)
        for text in legend.get_texts():
            text.set_parse_math(False)
    return figure


def distinct_names(paths: Sequence[str | os.PathLike[str]]) -> list[str]:
    """Return the name of each path, with as many of its parent directories as all paths need to differ."""
    parts = [Path(path).resolve().parts for path in paths]
    n = next((n for n in range(1, max(map(len, parts)) + 1) if len({it[-n:] for it in parts}) == len({*parts})), 1)
    return ["/".join(it[-n:]) for it in parts]


def smooth(values: Sequence[float]) -> list[float]:
    """Return a moving average at the position of each value, over the 2% of all values around this position.

    Fewer than 100 values are returned unchanged.
    """
    half = len(values) // 100
    windows = (values[max(0, i - half) : i + half + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]


def plot_schedule(configs: Mapping[str, TrainConfig]) -> Figure:
    """Draw the learning rate at each training step for several configurations; the keys of `configs` label the curves."""
    from MyGPT.training.optim import schedule_factor

    figure, axes = _line_figure(3.2, "learning rate of AdamW")
    for i, (name, config) in enumerate(configs.items()):
        rates = [config.learning_rate * schedule_factor(config, step) for step in range(config.max_steps)]
        axes.plot(rates, color=COLOURS[i % len(COLOURS)], label=name, linestyle=("-", "--", "-.", ":")[i % 4])
    axes.set_ylim(0, None)
    axes.xaxis.set_major_formatter("{x:,.0f}")
    axes.legend(frameon=False)
    return figure


def plot_attention(weights: Tensor, labels: Sequence[str], first_head: int = 0) -> Figure:
    """Draw the attention weights of one layer, one heat map per head; rows are queries and columns are keys.

    Args:
        weights: attention weights of one text of T tokens, (heads, T, T), such as
            `trace(model, ids)["h.0.attn.weights"][0]`.
        labels: the T tokens as strings (see `token_labels`).
        first_head: the number of the first head in the titles, if `weights` does not start with head 0.
    """
    H, T = weights.shape[:2]
    if weights.dim() != 3 or weights.shape[2] != T or len(labels) != T:
        raise ValueError(f"weights must be (heads, {len(labels)}, {len(labels)}), got {tuple(weights.shape)}")
    from MyGPT.sampling import require_finite

    require_finite("an attention weight", weights)
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
        axes.tick_params(length=0, labelbottom=head + n_columns >= H)  # labels below the lowest map of each column
    figure.colorbar(image, ax=grid, shrink=0.6 if n_rows > 1 else 0.8, aspect=30).set_label("attention weight")
    figure.supxlabel("attends to", fontsize=10)
    figure.supylabel("token", fontsize=10)
    return figure


def plot_layers(
    values: Tensor, columns: Sequence[str] | str, label: str, limits: tuple[float, float] | None = None
) -> Figure:
    """Draw a heat map of one number for each layer and each head or token, such as induction scores.

    Args:
        values: the numbers, (layers, N). Layer 0 is drawn at the bottom.
        columns: a label for each of the N columns, or one word such as "head" as the title of numbered columns.
        label: the meaning of the numbers, which is written at the colour bar.
        limits: the values with the lightest and the darkest colour. Default: the smallest and the largest number.
    """
    L, N = values.shape
    numbered = isinstance(columns, str)
    labels = [str(i) for i in range(N)] if numbered else list(columns)
    if len(labels) != N:
        raise ValueError(f"values has {N} columns, there are {len(labels)} labels")
    from MyGPT.sampling import require_finite

    require_finite("a value to draw", values)
    cell = min(0.7, (WIDTH - 2) / N)
    figure = _figure(max(4.0, cell * N + 2), max(1.8, min(0.5, cell) * L + 1))
    axes = _heat_map(figure, values, labels, cell * N, label, limits or (None, None))
    axes.set_yticks(range(L))
    axes.set(ylabel="layer", xlabel=columns if numbered else "token")
    return figure


def plot_logit_lens(lens: Tensor, labels: Sequence[str], tokenizer: Any) -> Figure:
    """Draw the most likely next token and its probability if the model stopped after each layer (the logit lens).

    Columns are tokens of the text. Rows are layers, from the embeddings (bottom) to the model's own prediction (top).

    Args:
        lens: logits of one text of T tokens, (layers + 1, T, vocabulary), such as `logit_lens(model, traced)[:, 0]`.
        labels: the T tokens as strings (see `token_labels`).
        tokenizer: decodes the predicted tokens.
    """
    n_depths, T, _ = lens.shape
    if len(labels) != T:
        raise ValueError(f"lens has {T} tokens, there are {len(labels)} labels")
    from MyGPT.sampling import require_finite

    require_finite("a logit of the model", lens)
    probabilities, best = lens.detach().float().softmax(-1).max(-1)  # (L + 1, T)
    figure, width = _figure(WIDTH, max(2.4, 0.3 * n_depths + 1.2)), WIDTH - 1.8
    axes = _heat_map(figure, probabilities, labels, width, "highest probability", (0, 1))
    room = int(width / T / 0.088)  # characters of 9 points that fit into a cell
    if room >= 2:
        for depth in range(n_depths):
            texts = shorten(_drawable(token_labels(tokenizer, best[depth].tolist())), room)
            for t, text in enumerate(texts):
                colour = "white" if probabilities[depth, t] > 0.55 else "black"
                axes.text(t, depth, text, ha="center", va="center", fontsize=9, color=colour, parse_math=False)
    step = max(1, math.ceil(n_depths / 14))
    ticks = sorted({*range(n_depths - 1, 0, -step), 0})
    axes.set_yticks(ticks, ["embeddings" if i == 0 else f"layer {i - 1}" for i in ticks], fontsize=9)
    axes.set_xlabel("predicted after this token")
    return figure


def plot_sampling(
    logits: Tensor, config: SamplingConfig, tokenizer: Any, seen: Sequence[int] = (), n_tokens: int = 15
) -> Figure:
    """Draw the next-token probabilities of the model, and the probabilities after each filter of `config` (such as top_k).

    A cross marks a token that a filter has removed.

    Args:
        logits: the model's logits at one position, (vocabulary,).
        config: the sampling options. Filters are applied in the order in which generation applies them.
        tokenizer: decodes the tokens for the labels.
        seen: ids of the text so far, for the repetition penalty.
        n_tokens: the number of most likely tokens that have their own bar; all other tokens share one bar.
    """
    import torch

    if logits.dim() != 1:
        raise ValueError(f"logits must have the shape (vocabulary,), one position, got {tuple(logits.shape)}")
    from MyGPT.sampling import require_finite

    require_finite("a logit of the model", logits.amax(-1))
    n = min(n_tokens, len(logits))
    logits = logits.detach().float().cpu()
    without_token = torch.tensor(ids_without_token(tokenizer, len(logits)), dtype=torch.int64)
    stages = _stages(logits, logits.index_fill(0, without_token, -math.inf), config, seen)
    best = torch.topk(stages[0][1], n).indices
    names = shorten(_drawable(token_labels(tokenizer, best.tolist())), 14)
    others = torch.ones(len(logits), dtype=torch.bool).index_fill(0, best, False)
    figure = _figure(WIDTH, 0.22 * (n + 1) + 1.1)
    panels: Any = figure.subplots(1, len(stages), sharey=True, sharex=True, squeeze=False)[0]
    all_bars = [[*stage[best].tolist(), float(stage[others].sum())] for _, stage in stages]
    panels[0].set_xlim(0, 1.5 * max(map(max, all_bars)))  # a third of the width is left for the labels beside the bars
    for i, (axes, (title, probabilities), bars) in enumerate(zip(panels, stages, all_bars, strict=True)):
        axes.barh(range(n + 1), bars, color=[COLOURS[0]] * n + ["#BBBBBB"])
        for row, probability in enumerate(bars):
            if probability > 0:
                axes.text(probability, row, f" {_percent(probability)}", va="center", fontsize=8)
            else:
                axes.plot(0.05, row, "x", color=COLOURS[1], markersize=5, transform=axes.get_yaxis_transform())
        kept = int((probabilities > 0).sum())
        axes.set_title(f"{title}\n{kept:,} left" if i else f"{title}\n{len(logits):,} tokens", fontsize=9)
        axes.spines[["top", "right", "bottom"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.set_xticks([])
    panels[0].set_yticks(range(n + 1), [*names, "all others"], fontsize=9, parse_math=False)
    panels[0].set_ylim(n + 0.6, -0.6)
    return figure


def _stages(logits: Tensor, allowed: Tensor, config: SamplingConfig, seen: Sequence[int]) -> list[tuple[str, Tensor]]:
    """Return pairs of a title and the next-token probabilities (V,), where V is the vocabulary size.

    The first pair is the softmax of `logits`. The others follow each active filter of `config`, applied to `allowed`: the
    logits with -inf for ids without a token. `seen` contains the ids of the text so far, for the repetition penalty.
    """
    import torch

    from MyGPT.sampling import SamplingConfig, filter_logits

    mask = torch.zeros(1, len(logits), dtype=torch.bool)
    mask[0, list(seen)] = True
    stages, so_far = [("unfiltered", logits.softmax(-1))], SamplingConfig(temperature=1.0)
    for name in _FILTERS:
        value = getattr(config, name)
        if value is None or (name, value) == ("temperature", 1.0):
            continue
        so_far = dataclasses.replace(so_far, **{name: value})
        filtered = filter_logits(allowed[None], so_far, mask)[0]
        if so_far.temperature == 0:
            stages.append(("temperature 0", torch.zeros_like(filtered).index_fill(0, filtered.argmax(), 1.0)))
            break
        title = name.removeprefix("repetition_").replace("_", "-")
        stages.append((f"{title} {value:g}", filtered.softmax(-1)))
    return stages


def plot_neighbours(model: GPTModel, tokenizer: Any, ids: Sequence[int], k: int = 8) -> Figure:
    """Draw one bar chart for each token in `ids`: the k tokens with the most similar embeddings (cosine similarity)."""
    from MyGPT.inside.tracing import nearest_tokens

    if not ids:
        raise ValueError("ids must hold at least one token, got none")
    n_columns = min(len(ids), 4)
    n_rows = math.ceil(len(ids) / n_columns)
    figure = _figure(2.25 * n_columns, (0.2 * k + 0.6) * n_rows)
    grid: Any = figure.subplots(n_rows, n_columns, squeeze=False, sharex=True)
    for axes in grid.flat[len(ids) :]:
        axes.set_axis_off()
    labels = _drawable(token_labels(tokenizer, ids))
    for axes, id_, name in zip(grid.flat, ids, labels, strict=False):
        nearest, cosines = nearest_tokens(model, id_, k)
        names = shorten(_drawable(token_labels(tokenizer, nearest.tolist())), 12)
        axes.barh(range(k), cosines.tolist(), color=COLOURS[0])
        axes.set_yticks(range(k), names, fontsize=9, parse_math=False)
        axes.invert_yaxis()
        axes.set_title(name, fontsize=11, parse_math=False)
        axes.spines[["top", "right"]].set_visible(False)
        axes.tick_params(axis="y", length=0)
        axes.tick_params(axis="x", labelsize=8, labelbottom=True)
    figure.supxlabel("cosine similarity", fontsize=10)
    return figure


def check_figure_path(path: str | os.PathLike[str]) -> None:
    """Raise an error if the suffix of `path` is not that of a picture, or if no file can be written there."""
    if Path(path).suffix not in ("", ".png", ".svg", ".pdf"):
        raise ValueError(f"the path of a figure must end with .png, .svg or .pdf, got {path}")
    check_output_file(path)


def require_matplotlib() -> None:
    """Raise ValueError if matplotlib is not installed."""
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'mygpt[plots]'") from None


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Write the figure to the file `path`. The suffix .png, .svg or .pdf selects the format; without a suffix, it is PNG."""
    check_figure_path(path)
    kind = Path(path).suffix.lstrip(".") or "png"
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=150)


def _figure(width: float, height: float) -> Figure:
    """Return an empty figure with this width and height in inches."""
    # pyplot is not used, because it would keep every figure in memory and choose a backend.
    from matplotlib.figure import Figure

    figure = Figure(figsize=(width, height), layout="constrained")
    figure._repr_png_ = partial(_png, figure)  # type: ignore[attr-defined]
    return figure


def _png(figure: Figure) -> bytes:
    """Return the figure as a PNG file, which a notebook shows. Without pyplot, IPython cannot show a figure by itself."""
    with io.BytesIO() as file:
        figure.savefig(file, format="png")
        return file.getvalue()


def _line_figure(height: float, ylabel: str) -> tuple[Figure, Any]:
    """Return an empty figure, `height` inches high, and its axes for curves over training steps."""
    figure = _figure(7, height)
    axes: Any = figure.subplots()
    axes.set(xlabel="step", ylabel=ylabel)
    axes.grid(alpha=0.3)
    return figure, axes


def _heat_map(
    figure: Figure, values: Tensor, labels: Sequence[str], width: float, label: str, limits: tuple[Any, Any]
) -> Any:
    """Draw a heat map of `values` (rows, columns) with row 0 at the bottom; return its axes.

    `labels` are the labels of the columns, which are `width` inches wide together. `label` is the title of the colour bar,
    and `limits` are the values with the lightest and the darkest colour.
    """
    axes: Any = figure.subplots()
    low, high = limits
    image = axes.imshow(_array(values), cmap=LIGHT_TO_DARK, aspect="auto", origin="lower", vmin=low, vmax=high)
    names, every = _readable(labels, width)
    is_horizontal = max(map(len, names)) * 0.1 < width / len(labels) * every
    ticks, angle = range(0, len(labels), every), 0 if is_horizontal else 90
    axes.set_xticks(ticks, names[::every], rotation=angle, parse_math=False, fontsize=9)
    axes.tick_params(length=0)
    figure.colorbar(image, ax=axes, pad=0.02).set_label(label)
    return axes


def _array(values: Tensor) -> Any:
    """Return the values as a float32 numpy array, because matplotlib cannot read bfloat16 tensors or tensors on a GPU."""
    return values.detach().float().cpu().numpy()


def _readable(labels: Sequence[str], inches: float) -> tuple[list[str], int]:
    """Return the shortened labels and a number n: if only every n-th label is drawn on an axis, labels do not overlap.

    `inches` is the length of the axis.
    """
    return shorten(_drawable(labels), 12), math.ceil(len(labels) / max(1, int(inches / 0.09)))


def _drawable(labels: Sequence[str]) -> list[str]:
    """Return the labels; an escape sequence replaces each character that matplotlib's font does not have."""
    from matplotlib.font_manager import FontProperties, findfont, get_font

    shapes = get_font(findfont(FontProperties())).get_charmap()
    return ["".join(c if ord(c) in shapes else c.encode("unicode_escape").decode() for c in text) for text in labels]


def _percent(probability: float) -> str:
    """Return the probability as text, such as "12 %", "1.2 %" or "< 0.1 %"."""
    if probability < 0.001:
        return "< 0.1 %"
    return f"{100 * probability:.0f} %" if probability >= 0.1 else f"{100 * probability:.1f} %"
