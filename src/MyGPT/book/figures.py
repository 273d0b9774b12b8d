"""Chapters 5 and 6: two curves over epochs, with a second axis above that counts tokens or examples."""

from __future__ import annotations

from collections.abc import Sequence

from MyGPT.files import atomic_write


def plot_losses(
    epochs_seen: Sequence[float],
    tokens_seen: Sequence[float],
    train_losses: Sequence[float],
    val_losses: Sequence[float],
) -> None:
    """Shows training and validation loss, and writes them to loss-plot.pdf."""
    _plot(epochs_seen, tokens_seen, "Tokens seen", train_losses, val_losses, "loss")


def plot_values(
    epochs_seen: Sequence[float],
    examples_seen: Sequence[float],
    train_values: Sequence[float],
    val_values: Sequence[float],
    label: str = "loss",
) -> None:
    """The same over examples, for what `label` says, in `label`-plot.pdf."""
    _plot(epochs_seen, examples_seen, "Examples seen", train_values, val_values, label)


def _plot(
    epochs: Sequence[float],
    seen: Sequence[float],
    seen_label: str,
    train: Sequence[float],
    val: Sequence[float],
    label: str,
) -> None:
    import matplotlib.pyplot as plt
    from matplotlib.ticker import MaxNLocator

    figure, axes = plt.subplots(figsize=(5, 3), layout="constrained")
    axes.plot(epochs, train, label=f"Training {label}")
    axes.plot(epochs, val, linestyle="-.", label=f"Validation {label}")
    axes.set(xlabel="Epochs", ylabel=label.capitalize())
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.legend()
    above = axes.twiny()
    above.plot(seen, train, alpha=0)  # unseen, for the ticks
    above.set_xlabel(seen_label)
    with atomic_write(f"{label}-plot.pdf", "wb") as file:
        figure.savefig(file, format="pdf")
    plt.show()
