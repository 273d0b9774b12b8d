"""Makes the pictures of README and docs anew: `python docs/pictures/draw.py [--only NAME]`.

architecture.svg is drawn from architecture.dot by Graphviz. losses.svg and sampling.svg come from a real run, "Alice in
Wonderland" by letters, which is trained first; a run that is there already is drawn again.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from matplotlib.figure import Figure

from MyGPT import GPTModel, SamplingConfig, load_tokenizer
from MyGPT.inside.plots import COLOURS, plot_losses, save_figure
from MyGPT.sampling import filter_logits

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RECIPE = ROOT / "configs/quickstart.yaml"
# Muon, the recipe's optimizer, is slow on a processor without bf16.
CHANGES = ["--optimizer", "adamw", "--learning_rate", "1e-3"]


def train(run: Path) -> None:
    if not (run / "model").is_dir():
        options = ["--config", str(RECIPE), "--out", str(run), *CHANGES]
        subprocess.run([sys.executable, "-m", "MyGPT", "train", *options], check=True)


def draw_architecture(_: Path) -> None:
    subprocess.run(["dot", "-Tsvg", HERE / "architecture.dot", "-o", HERE / "architecture.svg"], check=True)


def draw_losses(run: Path) -> None:
    train(run)
    save_figure(plot_losses([run]), HERE / "losses.svg")


def draw_sampling(run: Path) -> None:
    """What temperature, top-k and top-p leave of the probabilities of the letter after "Alice was "."""
    train(run)
    model, tokenizer = GPTModel.from_pretrained(run), load_tokenizer(run / "model")
    with torch.no_grad():
        logits = model(torch.tensor([tokenizer.encode("Alice was ")]))[:, -1]
    ways = {
        "temperature 1": SamplingConfig(1.0),
        "temperature 0.5": SamplingConfig(0.5),
        "top_k 3": SamplingConfig(1.0, top_k=3),
        "top_p 0.8": SamplingConfig(1.0, top_p=0.8),
    }
    likeliest = logits[0].topk(16).indices.tolist()
    figure = Figure(figsize=(8, 2.6), layout="constrained")
    panels: Any = figure.subplots(1, len(ways), sharey=True)
    for axes, (title, config), colour in zip(panels, ways.items(), COLOURS, strict=False):
        axes.bar(range(len(likeliest)), filter_logits(logits, config)[0].softmax(-1)[likeliest], color=colour)
        axes.set_title(title, fontsize=10)
        axes.set_xticks(range(len(likeliest)), [tokenizer.decode([id_]) for id_ in likeliest], fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    panels[0].set_ylabel("probability")
    figure.supxlabel("the letter after “Alice was ”", fontsize=10)
    save_figure(figure, HERE / "sampling.svg")


PICTURES = {"architecture": draw_architecture, "losses": draw_losses, "sampling": draw_sampling}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", choices=PICTURES, help="one of them")
    parser.add_argument("--run", type=Path, default=ROOT / "runs/pictures", help="where the run is, or will be")
    options = parser.parse_args()
    for name in [options.only] if options.only else PICTURES:
        PICTURES[name](options.run)
        print(HERE / f"{name}.svg")


if __name__ == "__main__":
    main()
