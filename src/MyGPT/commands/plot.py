"""`mygpt plot`, and `mygpt plot KIND` for other pictures: each kind is a function with its own options."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from MyGPT.sampling import SamplingConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from MyGPT.model import GPTModel
    from MyGPT.tokenizers import Tokenizer


DEFAULTS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


def plot(*runs: str, out: str = "loss.png") -> None:
    """Plot the loss curves of one or more runs in one picture.

    The other kinds of pictures are mygpt plot attention, lens, sampling, neighbours, schedule and tokens; mygpt plot attention
    --help shows the options of the first. Write a run with such a name as ./attention.

    Example:
        mygpt plot runs/a runs/b --out compared.png

    Args:
        runs: Directories of the runs.
        out: The picture to write: a .png, .svg or .pdf file.
    """
    _require_matplotlib()
    from MyGPT.inside.plots import plot_losses

    _write(plot_losses(runs), out)


def attention(
    model: str,
    text: str,
    layer: int = 0,
    head: int | None = None,
    adapter: str | None = None,
    out: str = "attention.png",
    device: str = "auto",
) -> None:
    """Plot how much each token attends to every other token, with one map per head of a layer.

    Example:
        mygpt plot attention --model runs/book --text "The wizard entered" --layer 1

    Args:
        model: A released model such as gpt2, or the path of a run, a model directory or a checkpoint file.
        text: The text. The labels of a single head are readable up to about forty tokens.
        layer: Layer, counted from 0.
        head: Plot only this head, counted from 0.
        adapter: The directory of a LoRA adapter, or a run of mygpt finetune.
        out: The picture to write: a .png, .svg or .pdf file.
        device: Where to compute: auto, cpu, cuda or mps.
    """
    from MyGPT.inside.plots import plot_attention, token_labels
    from MyGPT.inside.tracing import trace

    gpt, tokenizer, ids = _open(model, text, adapter, device)
    _check_count("layer", layer, gpt.config.n_layers)
    if head is not None:
        _check_count("head", head, gpt.config.n_heads)
    weights = trace(gpt, ids)[f"h.{layer}.attn.weights"][0]
    first = 0 if head is None else head
    shown = weights if head is None else weights[head : head + 1]
    _write(plot_attention(shown, token_labels(tokenizer, ids[0].tolist()), first), out)


def lens(model: str, text: str, adapter: str | None = None, out: str = "lens.png", device: str = "auto") -> None:
    """Plot the prediction if the model stopped after each layer (the logit lens).

    Example:
        mygpt plot lens --model runs/book --text "The wizard entered"

    Args:
        model: A released model such as gpt2, or the path of a run, a model directory or a checkpoint file.
        text: The text. The words in the cells are readable up to about thirty tokens.
        adapter: The directory of a LoRA adapter, or a run of mygpt finetune.
        out: The picture to write: a .png, .svg or .pdf file.
        device: Where to compute: auto, cpu, cuda or mps.
    """
    from MyGPT.inside.plots import plot_logit_lens, token_labels
    from MyGPT.inside.tracing import logit_lens, trace

    gpt, tokenizer, ids = _open(model, text, adapter, device)
    said = logit_lens(gpt, trace(gpt, ids))[:, 0]
    _write(plot_logit_lens(said, token_labels(tokenizer, ids[0].tolist()), tokenizer), out)


def sampling(
    model: str,
    text: str,
    config: SamplingConfig,
    adapter: str | None = None,
    out: str = "sampling.png",
    device: str = "auto",
) -> None:
    """Plot the probabilities of the next token before and after each sampling filter.

    Example:
        mygpt plot sampling --model runs/book --text "The wizard" --temperature 0.7 --top_k 20

    Args:
        model: A released model such as gpt2, or the path of a run, a model directory or a checkpoint file.
        text: The text before the next token.
        adapter: The directory of a LoRA adapter, or a run of mygpt finetune.
        out: The picture to write: a .png, .svg or .pdf file.
        device: Where to compute: auto, cpu, cuda or mps.
    """
    import torch

    from MyGPT.inside.plots import plot_sampling

    gpt, tokenizer, ids = _open(model, text, adapter, device)
    with torch.no_grad():
        logits = gpt(ids, last_only=True)[0, -1]
    _write(plot_sampling(logits, config, tokenizer, seen=ids[0].tolist()), out)


def neighbours(
    model: str,
    text: str,
    k: int = 8,
    adapter: str | None = None,
    out: str = "neighbours.png",
    device: str = "auto",
) -> None:
    """Plot the nearest tokens of each token in a text, by the similarity of their embeddings.

    Example:
        mygpt plot neighbours --model runs/book --text "The wizard entered"

    Args:
        model: A released model such as gpt2, or the path of a run, a model directory or a checkpoint file.
        text: The text, with at most 16 different tokens.
        k: Number of neighbours per token.
        adapter: The directory of a LoRA adapter, or a run of mygpt finetune.
        out: The picture to write: a .png, .svg or .pdf file.
        device: Where to compute: auto, cpu, cuda or mps.
    """
    from MyGPT.inside.plots import plot_neighbours

    gpt, tokenizer, ids = _open(model, text, adapter, device)
    different = list(dict.fromkeys(ids[0].tolist()))
    if len(different) > 16:
        raise ValueError(f"the text has {len(different)} different tokens, but the picture shows at most 16")
    _write(plot_neighbours(gpt, tokenizer, different, k), out)


def schedule(*recipes: str, out: str = "schedule.png") -> None:
    """Plot the learning rate of one or more trainings at every step.

    Example:
        mygpt plot schedule configs/quickstart.yaml runs/book --out schedule.png

    Args:
        recipes: YAML files with training options, or directories of runs.
        out: The picture to write: a .png, .svg or .pdf file.
    """
    _require_matplotlib()
    from MyGPT.inside.plots import plot_schedule

    _write(plot_schedule({_name_of(recipe): _read_training(recipe) for recipe in recipes}), out)


def tokens(text: str, tokenizer: str = "gpt2", out: str | None = None) -> None:
    """Show the tokens of a text in colour, in the terminal or as an HTML file.

    If the output is not a terminal, or NO_COLOR is set, the character | separates tokens.

    Example:
        mygpt plot tokens --text "The wizard entered" --tokenizer gpt2

    Args:
        text: The text; - reads it from standard input.
        tokenizer: gpt2, or the directory of a run, a model or a tokenizer.
        out: The .html file to write instead.
    """
    from MyGPT.files import atomic_write
    from MyGPT.inside.plots import tokens_to_html, tokens_to_terminal
    from MyGPT.tokenizers import get_tokenizer

    inside = Path(tokenizer, "model")
    coder = get_tokenizer(inside if (inside / "tokenizer.json").is_file() else tokenizer)
    text = sys.stdin.read() if text == "-" else text
    if out is None:
        print(tokens_to_terminal(coder, text, colour=sys.stdout.isatty() and "NO_COLOR" not in os.environ))
        return
    if Path(out).suffix not in (".html", ".htm"):
        raise ValueError(f"out must end in .html, got {out}")
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Tokens</title>\n'
    with atomic_write(out) as file:
        file.write(f"{head}{tokens_to_html(coder, text)}\n</html>\n")
    print(out)


KINDS = {
    "attention": attention,
    "lens": lens,
    "sampling": sampling,
    "neighbours": neighbours,
    "schedule": schedule,
    "tokens": tokens,
}
"""The kinds that the first argument of `mygpt plot` can name; any other argument is a run."""


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'mygpt[plots]'") from None


def _open(model: str, text: str, adapter: str | None, device: str) -> tuple[GPTModel, Tokenizer, Tensor]:
    """Return a model, its tokenizer, and the token ids (1, T) of the text. Fail first if matplotlib is missing."""
    _require_matplotlib()
    from MyGPT.commands._model import encode_for
    from MyGPT.opening import open_model

    gpt, tokenizer = open_model(model, device, adapter)
    return gpt, tokenizer, encode_for(gpt, tokenizer, text)


def _check_count(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {value}")


def _name_of(recipe: str) -> str:
    """Return the name of a recipe's file or of a run's directory."""
    path = Path(recipe)
    return path.resolve().name if path.is_dir() else path.stem


def _read_training(recipe: str) -> Any:
    """Return the TrainConfig in a YAML file, or in the config.yaml of a run."""
    from MyGPT.commands._recipe import fields_of, read_recipe
    from MyGPT.training.config import TrainConfig

    path = Path(recipe, "config.yaml") if Path(recipe).is_dir() else Path(recipe)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {recipe}: {path} does not exist")
    options = fields_of(TrainConfig, read_recipe(path))
    try:
        return TrainConfig(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _write(figure: Figure, out: str) -> None:
    from MyGPT.inside.plots import save_figure

    save_figure(figure, out)
    print(out)
