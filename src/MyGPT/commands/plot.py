"""mygpt plot"""

from __future__ import annotations


def plot(*runs: str, out: str = "loss.png") -> None:
    """Draw the loss curves of one or several runs into one picture.

    Example: mygpt plot runs/a runs/b --out compared.png

    Args:
        runs: the runs' directories
        out: the picture to write: .png, .svg or .pdf
    """
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'mygpt[plots]'") from None
    from MyGPT.plots import plot_losses, save_figure

    save_figure(plot_losses(runs), out)
    print(out)
