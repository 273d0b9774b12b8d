"""`mygpt plot` for loss curves, and `mygpt plot KIND` for other pictures. Each kind is a function with its own options."""

from __future__ import annotations

import os
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import torch

from MyGPT.commands._model import check_html_path, encode_for, report_tokenizer
from MyGPT.commands._recipe import fields_of, read_recipe, refuse_unknown_keys
from MyGPT.config import require_positive
from MyGPT.files import atomic_write
from MyGPT.inside import plots
from MyGPT.inside.tracing import logit_lens, trace
from MyGPT.messages import print_styled, read_standard_input
from MyGPT.model import GPTModel
from MyGPT.opening import open_model
from MyGPT.sampling import SamplingConfig
from MyGPT.tokenizers import Tokenizer, get_tokenizer
from MyGPT.training.config import TrainConfig

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEFAULTS = {"temperature": 0.8, "top_k": 50, "top_p": 0.95}


@dataclass(frozen=True)
class Reading:
    """Options of the plots that show how a model reads a text: the model, its adapter and device, and the text."""

    model: str
    text: str
    """The text that the model reads."""
    adapter: str | None = None
    device: str = "auto"
    with_: str | None = None

    def open(self, out: str) -> tuple[GPTModel, Tokenizer, torch.Tensor]:
        """Return the model, its tokenizer, and the token ids of the text as a tensor (1, T).

        Raises an error before the model is opened if matplotlib is not installed, if the text is empty, or if no picture
        can be written to `out`.
        """
        _check_output(out)
        if not self.text:
            raise ValueError("the text is empty; give at least one token")
        model, tokenizer = open_model(self.model, self.device, self.adapter, self.with_)
        report_tokenizer(tokenizer)
        return model, tokenizer, encode_for(model, tokenizer, self.text)


def plot(*runs: str, out: str = "loss.png") -> None:
    """Plot the loss curves of one or more runs in one picture.

    The commands for other pictures are mygpt plot attention, lens, sampling, neighbours, schedule and tokens; for example, mygpt
    plot attention --help shows the options of the first. Write ./attention for a run directory that has one of these names.

    Example:
        mygpt plot runs/a runs/b --out compared.png

    Args:
        runs: Directories of the runs.
    """
    _check_output(out)
    _write(plots.plot_losses(runs), out)


def attention(reading: Reading, layer: int = 0, head: int | None = None, out: str = "attention.png") -> None:
    """Plot how much each token attends to every other token, with one heat map for each attention head of a layer.

    With --head, the labels are readable for texts of up to about forty tokens.

    Example:
        mygpt plot attention --model runs/book --text "The wizard entered" --layer 1

    Args:
        layer: Layer, counted from 0.
        head: Plot only this head, counted from 0.
    """
    model, tokenizer, ids = reading.open(out)
    first = head or 0
    for name, value, count in (("layer", layer, model.config.n_layers), ("head", first, model.config.n_heads)):
        if not 0 <= value < count:
            raise ValueError(f"{name} must be from 0 to {count - 1}, got {value}")
    weights = trace(model, ids).attention[layer, 0]  # (H, T, T)
    shown = weights if head is None else weights[head : head + 1]
    _write(plots.plot_attention(shown, plots.token_labels(tokenizer, ids[0].tolist()), first), out)


def lens(reading: Reading, out: str = "lens.png") -> None:
    """Plot which token the model would predict if it stopped after each layer (the logit lens).

    The predicted tokens are readable for texts of up to about thirty tokens.

    Example:
        mygpt plot lens --model runs/book --text "The wizard entered"
    """
    model, tokenizer, ids = reading.open(out)
    logits = logit_lens(model, trace(model, ids))[:, 0]  # (layers, T, V)
    _write(plots.plot_logit_lens(logits, plots.token_labels(tokenizer, ids[0].tolist()), tokenizer), out)


def sampling(reading: Reading, config: SamplingConfig, out: str = "sampling.png") -> None:
    """Plot the probabilities of the token after a text, before and after each sampling filter.

    Example:
        mygpt plot sampling --model runs/book --text "The wizard" --temperature 0.7 --top_k 20
    """
    model, tokenizer, ids = reading.open(out)
    with torch.no_grad():
        logits = model(ids, last_only=True)[0, -1]  # (V,)
    _write(plots.plot_sampling(logits, config, tokenizer, seen=ids[0].tolist()), out)


def neighbours(reading: Reading, k: int = 8, out: str = "neighbours.png") -> None:
    """Plot, for each token in a text, the tokens whose embeddings have the largest cosine similarity to its embedding.

    The text may have at most 16 different tokens.

    Example:
        mygpt plot neighbours --model runs/book --text "The wizard entered"

    Args:
        k: Number of neighbours per token.
    """
    require_positive(k=k)
    model, tokenizer, ids = reading.open(out)
    different = list(dict.fromkeys(ids[0].tolist()))
    if len(different) > 16:
        raise ValueError(f"the text has {len(different)} different tokens, but the picture shows at most 16")
    _write(plots.plot_neighbours(model, tokenizer, different, k), out)


def schedule(*recipes: str, out: str = "schedule.png") -> None:
    """Plot the learning rate at every step of one or more training runs.

    Example:
        mygpt plot schedule configs/quickstart.yaml runs/book --out schedule.png

    Args:
        recipes: YAML files with training options, or directories of runs.
    """
    _check_output(out)
    _write(plots.plot_schedule(dict(map(_read_training, recipes))), out)


def tokens(text: str, tokenizer: str = "gpt2", out: str | None = None) -> None:
    """Show the tokens of a text in colour, in the terminal or as an HTML file.

    If the output is not a terminal, or NO_COLOR is set, the character | separates tokens.

    Example:
        mygpt plot tokens --text "The wizard entered" --tokenizer gpt2

    Args:
        text: The text; - reads it from standard input.
        tokenizer: gpt2, or the directory of a run, a model or a tokenizer.
        out: The .html file to write instead of printing to the terminal.
    """
    if out is not None:
        check_html_path(out)
    coder = get_tokenizer(tokenizer)
    text = read_standard_input() if text == "-" else text
    if out is None:
        colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
        print_styled(plots.tokens_to_terminal(coder, text, colour))
        return
    head = '<!doctype html>\n<html lang="en">\n<meta charset="utf-8">\n<title>Tokens</title>\n'
    with atomic_write(out) as file:
        file.write(f"{head}{plots.tokens_to_html(coder, text)}\n</html>\n")
    print(out)


KINDS = {function.__name__: function for function in (attention, lens, sampling, neighbours, schedule, tokens)}
"""The function for each kind that the first argument of `mygpt plot` can name. Other arguments are run directories."""


def _check_output(out: str) -> None:
    """Raise an error if matplotlib is not installed, or if no picture can be written to `out`."""
    plots.require_matplotlib()
    plots.check_figure_path(out)


def _read_training(recipe: str) -> tuple[str, TrainConfig]:
    """Return a name for the legend, and the training options, of a YAML file or of the run in a directory."""
    given = Path(recipe)
    path, name = (given / "config.yaml", given.resolve().name) if given.is_dir() else (given, given.stem)
    if not path.is_file():
        raise FileNotFoundError(f"no recipe at {recipe}: {path} does not exist")
    options = read_recipe(path)
    refuse_unknown_keys(path, options)
    try:
        return name, TrainConfig(**fields_of(TrainConfig, options))
    except (ValueError, TypeError) as error:
        raise ValueError(f"{path}: {error}") from None


def _write(figure: Figure, out: str) -> None:
    plots.save_figure(figure, out)
    print(out)
