"""mygpt plot, and mygpt plot KIND: each kind of picture is a function of its own, with its own options."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from matplotlib.figure import Figure
    from torch import Tensor

    from MyGPT.model import GPTModel
    from MyGPT.tokenizers import Tokenizer


def plot(*runs: str, out: str = "loss.png") -> None:
    """Draw the loss curves of one or several runs into one picture; other pictures have a word of their own.

    mygpt plot attention, lens, sampling, neighbours, schedule or tokens: see mygpt plot attention --help and so on (a run
    of such a name is ./attention). Example: mygpt plot runs/a runs/b --out compared.png

    Args:
        runs: the runs' directories
        out: the picture to write: .png, .svg or .pdf
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
    """Draw how much each token of a text takes from each: a map a head, for one layer.

    Example: mygpt plot attention --model runs/book --text "The wizard entered" --layer 1

    Args:
        model: a released model (gpt2, downloaded once), a run's directory, a model's, or a checkpoint file
        text: the text; as many tokens as the picture can hold are readable, about forty for a single head
        layer: which layer, counted from 0
        head: draw this head only, counted from 0
        adapter: an adapter's directory, or a run of mygpt finetune
        out: the picture to write: .png, .svg or .pdf
        device: auto, cpu, cuda or mps
    """
    _require_matplotlib()
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
    """Draw what the model would say next after each layer, if it ended there (the logit lens).

    Example: mygpt plot lens --model runs/book --text "The wizard entered"

    Args:
        model: a released model (gpt2, downloaded once), a run's directory, a model's, or a checkpoint file
        text: the text; the words in the cells are readable up to about thirty tokens
        adapter: an adapter's directory, or a run of mygpt finetune
        out: the picture to write: .png, .svg or .pdf
        device: auto, cpu, cuda or mps
    """
    _require_matplotlib()
    from MyGPT.inside.plots import plot_logit_lens, token_labels
    from MyGPT.inside.tracing import logit_lens, trace

    gpt, tokenizer, ids = _open(model, text, adapter, device)
    said = logit_lens(gpt, trace(gpt, ids))[:, 0]
    _write(plot_logit_lens(said, token_labels(tokenizer, ids[0].tolist()), tokenizer), out)


def sampling(
    model: str,
    text: str,
    temperature: float = 0.8,
    top_k: int | None = 50,
    top_p: float | None = 0.95,
    min_p: float | None = None,
    repetition_penalty: float | None = None,
    adapter: str | None = None,
    out: str = "sampling.png",
    device: str = "auto",
) -> None:
    """Draw what may come after a text, and how likely, before and after each sampling filter.

    Example: mygpt plot sampling --model runs/book --text "The wizard" --temperature 0.7 --top_k 20

    Args:
        model: a released model (gpt2, downloaded once), a run's directory, a model's, or a checkpoint file
        text: the text that is continued
        temperature: divides the logits; 0 always takes the likeliest token
        top_k: keep the k likeliest tokens; null for all
        top_p: keep the fewest likeliest tokens whose probabilities sum to at least p; null for all
        min_p: keep tokens at least this many times as probable as the likeliest
        repetition_penalty: above 1, makes tokens of the text less likely
        adapter: an adapter's directory, or a run of mygpt finetune
        out: the picture to write: .png, .svg or .pdf
        device: auto, cpu, cuda or mps
    """
    _require_matplotlib()
    import torch

    from MyGPT.inside.plots import plot_sampling
    from MyGPT.sampling import SamplingConfig

    config = SamplingConfig(temperature, top_k, top_p, min_p, repetition_penalty)
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
    """Draw, for each token of a text, the tokens whose embeddings are most like its own.

    Example: mygpt plot neighbours --model runs/book --text "The wizard entered"

    Args:
        model: a released model (gpt2, downloaded once), a run's directory, a model's, or a checkpoint file
        text: the tokens to look at, at most 16 different ones
        k: neighbours of each
        adapter: an adapter's directory, or a run of mygpt finetune
        out: the picture to write: .png, .svg or .pdf
        device: auto, cpu, cuda or mps
    """
    _require_matplotlib()
    from MyGPT.inside.plots import plot_neighbours

    gpt, tokenizer, ids = _open(model, text, adapter, device)
    different = list(dict.fromkeys(ids[0].tolist()))
    if len(different) > 16:
        raise ValueError(f"the text has {len(different)} different tokens, the picture has room for 16")
    _write(plot_neighbours(gpt, tokenizer, different, k), out)


def schedule(*recipes: str, out: str = "schedule.png") -> None:
    """Draw the learning rate of each step of one or several trainings.

    Example: mygpt plot schedule configs/quickstart.yaml runs/book --out schedule.png

    Args:
        recipes: YAML files with a training's options, or runs
        out: the picture to write: .png, .svg or .pdf
    """
    _require_matplotlib()
    from MyGPT.inside.plots import plot_schedule

    _write(plot_schedule({_name_of(recipe): _read_training(recipe) for recipe in recipes}), out)


def tokens(text: str, tokenizer: str = "gpt2", out: str | None = None) -> None:
    """Show a text with its token boundaries in colour, in the terminal or as an HTML file.

    Where the output is no terminal, or NO_COLOR is set, | stands between tokens.
    Example: mygpt plot tokens --text "The wizard entered" --tokenizer gpt2

    Args:
        text: the text, - to read it from standard input
        tokenizer: gpt2, a run's or a model's directory, or one with a tokenizer
        out: an .html file to write instead
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
        raise ValueError(f"coloured tokens are written as .html, got {out}")
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
"""What `mygpt plot` takes as its first word; anything else is a run."""


def _require_matplotlib() -> None:
    try:
        import matplotlib  # noqa: F401
    except ImportError:
        raise ValueError("matplotlib is not installed: pip install 'mygpt[plots]'") from None


def _open(model: str, text: str, adapter: str | None, device: str) -> tuple[GPTModel, Tokenizer, Tensor]:
    """A model, its tokenizer, and the text's ids, (1, T)."""
    from MyGPT.commands._model import encode_for
    from MyGPT.opening import open_model

    gpt, tokenizer = open_model(model, device, adapter)
    return gpt, tokenizer, encode_for(gpt, tokenizer, text)


def _check_count(name: str, value: int, count: int) -> None:
    if not 0 <= value < count:
        raise ValueError(f"{name} must be from 0 to {count - 1}, got {value}")


def _name_of(recipe: str) -> str:
    """A recipe by its file's name, a run by its directory's."""
    path = Path(recipe)
    return path.resolve().name if path.is_dir() else path.stem


def _read_training(recipe: str) -> Any:
    """The TrainConfig in a YAML file or in a run's config.yaml."""
    from MyGPT.commands._recipe import fields_of, read_recipe
    from MyGPT.training.config import TrainConfig

    path = Path(recipe, "config.yaml") if Path(recipe).is_dir() else Path(recipe)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {recipe}: there is no {path}")
    options = fields_of(TrainConfig, read_recipe(path))
    try:
        return TrainConfig(**options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _write(figure: Figure, out: str) -> None:
    from MyGPT.inside.plots import save_figure

    save_figure(figure, out)
    print(out)
