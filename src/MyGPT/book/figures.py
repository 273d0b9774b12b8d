"""The figures of chapters 5 and 6: training and validation curves with two x axes, epochs and tokens or examples seen."""

from __future__ import annotations

from collections.abc import Sequence

from MyGPT.files import atomic_write

Values = Sequence[float]


def plot_losses(epochs_seen: Values, tokens_seen: Values, train_losses: Values, val_losses: Values) -> None:
    """Show the losses against epochs (bottom axis) and tokens seen (top axis), and save the figure as loss-plot.pdf."""
    _plot(epochs_seen, tokens_seen, "Tokens seen", train_losses, val_losses, "loss")


def plot_values(
    epochs_seen: Values, examples_seen: Values, train_values: Values, val_values: Values, label: str = "loss"
) -> None:
    """Show the values against epochs (bottom axis) and examples seen (top axis); save the figure as {label}-plot.pdf."""
    _plot(epochs_seen, examples_seen, "Examples seen", train_values, val_values, label)


def _plot(epochs: Values, seen: Values, seen_label: str, train: Values, val: Values, label: str) -> None:
    """Plot `train` and `val` against epochs (bottom axis) and `seen` (top axis), save {label}-plot.pdf, show the figure."""
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(epochs, train, label=f"Training {label}")
    axes.plot(epochs, val, linestyle="-.", label=f"Validation {label}")
    axes.set(xlabel="Epochs", ylabel=label.capitalize())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    above = axes.twiny()
    above.plot(seen, train, alpha=0)  # invisible; aligns the ticks of the second axis
    above.set_xlabel(seen_label)
    with atomic_write(f"{label}-plot.pdf", "wb") as file:
        figure.savefig(file, format="pdf")
    plt.show()
