"""Write one HTML page that replays a training run: its losses, its texts, and the attention of all heads at each kept model.

The models are those that a run keeps with the option keep_every. The page is the template web/replay.html with the numbers
inserted as JSON, and works without a network. web/replay.js draws the numbers.
"""

from __future__ import annotations

import base64
import html
import math
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from MyGPT.acceleration.step import accelerate
from MyGPT.inside.page import WEB, embedded_json, fill_page
from MyGPT.inside.tracing import induction_scores, trace
from MyGPT.messages import quote
from MyGPT.model import GPTModel
from MyGPT.progress import progress_bar
from MyGPT.sampling import require_finite
from MyGPT.tokenizers.display import token_labels, token_texts
from MyGPT.training.config import TrainConfig
from MyGPT.training.metrics import read_metrics
from MyGPT.training.names import HISTORY, by_step
from MyGPT.training.texts import sample_text

MAX_MODELS = 64
"""The maximum number of kept models on a page. If a run has more, the page shows some of them, evenly spaced."""
MAX_TOKENS = 64
"""The maximum number of tokens in the text whose attention the page shows."""
MAX_LOSSES = 400
"""The maximum number of points of each loss curve."""
MAX_ATTENTION_BYTES = 1_000_000
"""The attention weights of a page take at most so many bytes, so long texts are cut if there are many models or heads."""
FORMED = 0.3
"""The page says that a head has formed if its score reaches this value. A score is a share of a head's attention."""
_MAX_SAMPLE = 2000
"""The maximum number of characters of a sample text on the page."""

OpenModel = Callable[[Path], tuple[GPTModel, Any]]
"""A function that opens the model in a directory and returns the model and its tokenizer."""


def replay_page(run: Path, config: TrainConfig, open_kept: OpenModel, text: str | None = None) -> str:
    """Return an HTML page that replays the training run in the directory `run`. For the arguments, see `replay_data`."""
    data = replay_data(run, config, open_kept, text)
    title = html.escape(f"How {run.absolute().name} learned")
    return fill_page(WEB / "replay.html", {"title": title, "data": embedded_json(data)})


def replay_data(run: Path, config: TrainConfig, open_kept: OpenModel, text: str | None = None) -> dict[str, Any]:
    """Return the data of the page that replays a run, as a dict for JSON.

    Args:
        run: the directory of the run.
        config: the options of the run, for the prompt and the sampling of the texts that the kept models write.
        open_kept: opens a kept model, given its directory.
        text: the text whose attention the page shows. Default: the newest text in samples.txt.

    Raises:
        FileNotFoundError: the run kept no models.
        ValueError: there is no text, or it cannot be encoded; or the models have different sizes.
        FloatingPointError: the first model computes values that are NaN or infinite.
    """
    kept = by_step(run / HISTORY)
    if not kept:
        every = min(64, -(-config.max_steps // 10))
        raise FileNotFoundError(
            f"{run} kept no models to replay: train with --keep_every {every}, which keeps a model every {every} steps, or "
            f"extend a run of mygpt train: mygpt train --resume {quote(run)} --max_steps {2 * config.max_steps} --keep_every "
            f"{every} --allow_changed keep_every --allow_changed max_steps"
        )
    steps = _evenly_spaced(list(kept), MAX_MODELS)
    notes = (
        [] if len(steps) == len(kept) else [f"The run kept {len(kept):,} models; the page shows {len(steps)} of them."]
    )
    samples, is_given = read_samples(run), text is not None
    if text is None:
        text = samples[max(samples)] if samples else config.sample_prompt
    model, tokenizer = open_kept(kept[steps[0]])
    config_of_first, ids = model.config, tokenizer.encode(text)
    if not ids:
        raise ValueError(
            f"{run} has no sample text to look at: give a text, as in mygpt explain {quote(run)} TEXT --replay"
        )
    n_heads = config_of_first.n_layers * config_of_first.n_heads
    n_tokens = min(len(ids), MAX_TOKENS, config_of_first.context_length, _longest(len(steps) * n_heads))
    if n_tokens < len(ids):
        notes.append(f"The text has {len(ids):,} tokens; the page shows the first {n_tokens}.")
    prompt = tokenizer.encode(config.sample_prompt) if config.sample_prompt else ids[: n_tokens if is_given else 8]
    short = replace(config, sample_tokens=min(60, config.sample_tokens))
    ids = ids[:n_tokens]
    if n_tokens < 2:
        raise ValueError(f"the text must have at least 2 tokens, got {len(ids)}")
    words = word_numbers(token_texts(tokenizer, ids))
    shown: list[dict[str, Any]] = []
    attention = bytearray()
    for step in progress_bar(True, iterable=steps, desc="models", leave=False):
        if step != steps[0]:
            model, tokenizer = open_kept(kept[step])
        sizes = [(it.n_layers, it.n_heads, it.vocab_size, it.context_length) for it in (model.config, config_of_first)]
        if sizes[0] != sizes[1]:
            raise ValueError(
                f"{kept[step]} has another size than {kept[steps[0]]}, so the two are not from the same run"
            )
        try:
            weights = _attention(model, ids)
            scores = {**attention_scores(weights, words), "induction": induction_scores(model).cpu()}
            is_plain_cpu = model.transformer.wte.weight.device.type == "cpu" and model.parts is None
            written = sample_text(accelerate(model) if is_plain_cpu else model, tokenizer, prompt, short)
        except FloatingPointError as error:
            if not shown:
                raise
            notes.append(f"The page ends before step {step:,}, whose model is not usable: {error}.")
            break
        attention += pack_attention(weights)
        shown.append(
            {
                "step": step,
                "scores": {name: [round(it, 4) for it in values.flatten().tolist()] for name, values in scores.items()},
                "written": written,
                "sample": samples.get(step, "")[:_MAX_SAMPLE],
            }
        )
    uniform = {name: round(value, 4) for name, value in uniform_scores(words, model.config.context_length).items()}
    losses = read_losses(run)
    return {
        "description": (
            f"{_n(len(shown), 'model')} that the run kept from step {shown[0]['step']:,} to step {shown[-1]['step']:,}. Each "
            f"has {_n(model.config.n_layers, 'layer')} of {_n(model.config.n_heads, 'head')} and "
            f"{model.num_parameters():,} parameters. Layers and heads are numbered from 0."
        ),
        "notes": notes,
        "findings": findings(shown, uniform, model.config.n_heads),
        "layers": model.config.n_layers,
        "heads": model.config.n_heads,
        "tokens": token_labels(tokenizer, ids),
        "prompt": tokenizer.decode(prompt),
        "models": shown,
        "uniform": uniform,
        "attention": base64.b64encode(attention).decode(),
        "train": _evenly_spaced(losses["loss"], MAX_LOSSES),
        "val": _evenly_spaced(losses["val_loss"], MAX_LOSSES),
    }


def _n(count: int, noun: str) -> str:
    return f"{count} {noun}{'s' * (count != 1)}"


def read_samples(run: Path) -> dict[int, str]:
    """Return the sample texts in samples.txt of a run by their steps; an empty dict without this file."""
    path = run / "samples.txt"
    if not path.is_file():
        return {}
    parts = re.split(r"^--- step (\d{1,15}) ---\n", path.read_bytes().decode("utf-8", "replace"), flags=re.MULTILINE)
    return {int(step): text.removesuffix("\n\n") for step, text in zip(parts[1::2], parts[2::2], strict=True)}


def read_losses(run: Path) -> dict[str, list[list[float]]]:
    """Return the finite values of "loss" and "val_loss" in metrics.jsonl, each as a list of [step, value]."""
    records = read_metrics(run)
    return {
        name: [[it["step"], it[name]] for it in records if name in it and math.isfinite(it[name])]
        for name in ("loss", "val_loss")
    }


def word_numbers(texts: Sequence[str]) -> Tensor:
    """Return the number of the word to which each token belongs, (T,). A token that begins with white space begins a word."""
    return torch.tensor([text[:1].isspace() for text in texts]).long().cumsum(0)


def attention_scores(weights: Tensor, words: Tensor) -> dict[str, Tensor]:
    """Return two scores of each head on one text, each (layers, heads) and from 0 to 1.

    Args:
        weights: attention weights (layers, heads, T, T).
        words: the number of the word to which each token belongs, (T,).

    "previous" is the mean weight from a token to the token before it. "word" is the mean weight from a token to all
    earlier tokens of the same word. The first token, which can only attend to itself, is left out of both means.
    """
    same = (words[:, None] == words[None, :]).tril(-1)
    return {
        "previous": weights.diagonal(-1, dim1=-2, dim2=-1).mean(-1),
        "word": (weights * same).sum(-1)[..., 1:].mean(-1),
    }


def uniform_scores(words: Tensor, context_length: int) -> dict[str, float]:
    """Return the scores of a head that attends equally to a token and to all earlier tokens, as in an untrained model."""
    T, n = len(words), min(50, context_length // 2)
    even = torch.ones(T, T, dtype=torch.float64).tril()
    scores = attention_scores((even / even.sum(-1, keepdim=True))[None, None], words)
    induction = sum(1 / (t + 1) for t in range(n, 2 * n)) / n  # as induction_scores measures it by default
    return {"induction": induction, **{name: float(value) for name, value in scores.items()}}


def pack_attention(weights: Tensor) -> bytes:
    """Return attention weights (layers, heads, T, T) as bytes, 255 for 1: for each head, the rows up to the diagonal."""
    rows, columns = torch.tril_indices(*weights.shape[-2:])
    return (weights[..., rows, columns] * 255).round().byte().numpy().tobytes()


def findings(shown: Sequence[Mapping[str, Any]], uniform: Mapping[str, float], n_heads: int) -> list[str]:
    """Return a sentence or two about each score: which head reached the highest value, and whether it counts as formed."""
    titles = {"previous": "Previous token", "word": "Same word", "induction": "Induction"}
    texts = []
    for name, title in titles.items():
        best, step, head = max((value, -it["step"], -i) for it in shown for i, value in enumerate(it["scores"][name]))
        where = f"layer {-head // n_heads}, head {-head % n_heads}"
        first = shown[0]["scores"][name][-head]
        if best < FORMED or best < 2 * uniform[name]:
            texts.append(
                f"{title}: no head of this run learned this. The highest score is {best:.2f} ({where}, step {-step:,}); a "
                f"head that attends equally to all earlier tokens scores {uniform[name]:.2f}."
            )
        else:
            half = next(it["step"] for it in shown if it["scores"][name][-head] >= (first + best) / 2)
            texts.append(
                f"{title}: {where} learned this. Its score rises from {first:.2f} to {best:.2f}, and is halfway at step "
                f"{half:,}."
            )
    return texts


def _attention(model: GPTModel, ids: Sequence[int]) -> Tensor:
    """Return the attention weights of all heads on one text, (layers, heads, T, T)."""
    batch = torch.tensor([list(ids)], device=model.transformer.wte.weight.device)
    weights = trace(model, batch).attention[:, 0].float().cpu()
    require_finite("an attention weight", weights)
    return weights


def _longest(n_maps: int) -> int:
    """Return the largest number of tokens T for which `n_maps` attention maps fit, and at least 8.

    A map takes T * (T + 1) / 2 bytes.
    """
    return max(8, math.isqrt(2 * MAX_ATTENTION_BYTES // n_maps))


def _evenly_spaced(values: list[Any], n: int) -> list[Any]:
    """Return at most n of the values, evenly spaced, with the first and the last one."""
    if len(values) <= n:
        return values
    return [values[round(i * (len(values) - 1) / (n - 1))] for i in range(n)]
