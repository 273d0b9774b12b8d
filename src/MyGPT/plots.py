"""Figures from a run's metrics.jsonl. They are returned, never shown, so that any program can use them."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from MyGPT.files import atomic_write
from MyGPT.training.metrics import read_metrics

if TYPE_CHECKING:
    from matplotlib.figure import Figure

# Okabe & Ito (2008): told apart by colour-blind readers.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")


def plot_losses(runs: Sequence[str | os.PathLike[str]]) -> Figure:
    """Training loss (thin, smoothed over a fiftieth of the run) and validation loss (dots) of one or several runs."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.2), layout="constrained")
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


def save_figure(figure: Figure, path: str | os.PathLike[str]) -> None:
    """Writes the figure in the format that the name ends in (png, svg, pdf)."""
    kind = Path(path).suffix.lstrip(".") or "png"
    if kind not in ("png", "svg", "pdf"):
        raise ValueError(f"a figure is written as .png, .svg or .pdf, got {path}")
    with atomic_write(path, "wb") as file:
        figure.savefig(file, format=kind, dpi=150)
