"""`mygpt explain`: HTML pages that show how a model reads a text, and how a run learned."""

from __future__ import annotations

import sys
from collections.abc import Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Literal

OPTIONAL = ("text",)
COMMON = "text model live replay features out".split()
_PAGES = {
    "precision": ("--live",),
    **dict.fromkeys(("layer", "data", "n_features", "k"), ("--features",)),
    "adapter": ("", "--live", "--features"),
    **dict.fromkeys(("device", "with"), ("", "--features", "--replay")),
}
"""The kinds of page to which an option applies: --live and so on, or "" for the page about a text."""
_EXAMPLE = 'mygpt explain --model runs/book "The wizard entered"'


def explain(
    *text: str,
    model: str | None = None,
    live: bool = False,
    replay: bool = False,
    precision: Literal["fp16", "int8"] | None = None,
    features: bool = False,
    layer: int | None = None,
    data: str | list[str] | None = None,
    n_features: int | None = None,
    k: int | None = None,
    adapter: str | None = None,
    out: str = "explain.html",
    device: str = "auto",
    with_: str | None = None,
) -> None:
    """Write an HTML page that shows how a model reads a text.

    The page shows the tokens, the attention of every head, the prediction after every layer, and the most likely next tokens.
    It is one file that works without a network. With --live, the page contains the model and computes while you type.
    With --features, the page shows what a sparse autoencoder finds in one layer: the features, and where each one fires.
    With --replay, the page shows how a run learned: its losses, its texts and its attention at each model that the run kept
    (--keep_every of mygpt train).

    Examples:
        mygpt explain --model runs/book "The wizard entered"
        mygpt explain --model runs/book --live "The wizard"
        mygpt explain --model runs/book --features --layer 1
        mygpt explain runs/book --replay --out replay.html

    Args:
        text: The model, unless --model names it, and the text in quotes, at most 128 tokens. With --live, the text is optional,
            and the page starts with it. With --features, the text is optional too, at most 512 tokens, and the page shows every
            token of it. With --replay, the model is a run, and the page shows the attention in the text, which is optional;
            for a run of mygpt finetune or mygpt dpo, it is a question to the models.
        live: Write a page that contains the model, which can have up to 32 million parameters.
        replay: Write a page that replays the training of a run.
        precision: With --live, the number format of the weights. int8 makes the page half as large as fp16. Default: fp16.
        features: Train a sparse autoencoder on one layer, and write a page that shows where each of its features fires.
        layer: With --features, the layer, counted from 0. Default: the middle layer.
        data: With --features, the text files on which the autoencoder is trained, or one of the names alice and
            tinyshakespeare. Default: the text of the run, or else alice.
        n_features: With --features, the number of features. Default: 512.
        k: With --features, the number of features that describe each token. Default: 16.
        out: The .html file to write.
    """
    from MyGPT.commands._model import check_html_path

    check_html_path(out)
    given = {"precision": precision, "layer": layer, "data": data, "n_features": n_features, "k": k, "adapter": adapter}
    given |= {"device": None if device == "auto" else device, "with": with_}
    page = _kind_of_page({"--live": live, "--features": features, "--replay": replay}, given)
    if model is None and (len(text) > 1 or (text and (page or _is_model(text[0])))):
        model, *rest = text
        text = tuple(rest)
    if replay:
        _write_replay(model, " ".join(text), out, device, with_)
        print(out)
        return
    missing = [name for name, is_given in (("TEXT", text or page), ("--model", model)) if not is_given]
    if model is None or missing:
        raise ValueError(f"missing {' and '.join(missing)}; for example: {_EXAMPLE} (see mygpt explain --help)")
    if live:
        _write_live_page(" ".join(text) if text else None, model, precision or "fp16", adapter, out)
    elif features:
        sizes = {name: size for name, size in (("n_features", n_features), ("k", k)) if size is not None}
        _write_features_page(" ".join(text), model, adapter, device, with_, layer, data, sizes, out)
    else:
        _write_page(text, model, adapter, out, device, with_)
    print(out)


def _kind_of_page(kinds: Mapping[str, bool], given: Mapping[str, object]) -> str:
    """Return the option among `kinds`, such as "--live", that chooses the kind of page, or "" for the page about a text.

    Raises ValueError if several are chosen, or if an option in `given` does not apply to this page. A value of None means that
    the option is not given.
    """
    chosen = [name for name, is_chosen in kinds.items() if is_chosen]
    page = chosen[-1] if chosen else ""
    wrong = [
        *chosen[:-1],
        *(f"--{name}" for name, value in given.items() if value is not None and page not in _PAGES[name]),
    ]
    if not wrong:
        return page
    if page == "--replay":
        raise ValueError(
            f"{wrong[0]} does not apply to --replay, which takes a run and a text: mygpt explain RUN TEXT --replay"
        )
    if len(chosen) > 1:
        raise ValueError(f"{' and '.join(chosen)} write different pages: choose one of them")
    name = wrong[0].removeprefix("--")
    if len(_PAGES[name]) == 1:
        raise ValueError(
            f"--{name} is an option of {_PAGES[name][0]}, got --{name} {given[name]} without {_PAGES[name][0]}"
        )
    reason = {"device": "because the browser computes", "with": "whose page computes only GPT-2's parts"}[name]
    raise ValueError(f"--{name} does not apply to {page}, {reason}; got --{name} {given[name]}")


def _is_model(name: str) -> bool:
    """Return whether `name` is the name of a model or an existing path, and not a text."""
    from MyGPT.weights.pretrained import is_name

    return is_name(name) or Path(name).exists()


def _write_page(
    text: tuple[str, ...], model: str, adapter: str | None, out: str, device: str, parts: str | None
) -> None:
    """Write a page that shows how the model, with the custom parts in the file `parts` if it is not None, reads one text."""
    from MyGPT.commands._model import encode_for, report_tokenizer
    from MyGPT.files import atomic_write
    from MyGPT.inside.page import explain_page
    from MyGPT.opening import open_model

    if not "".join(text):
        raise ValueError("the text is empty; give at least one token")
    gpt, tokenizer = open_model(model, device, adapter, parts)
    report_tokenizer(tokenizer)
    ids = encode_for(gpt, tokenizer, " ".join(text))
    page = explain_page(gpt, tokenizer, ids, Path(model).name)
    with atomic_write(out) as file:
        file.write(page)


def _write_live_page(
    text: str | None, model: str, precision: Literal["fp16", "int8"], adapter: str | None, out: str
) -> None:
    """Write a page that contains the model. Report the size of the page before it is written."""
    from MyGPT.commands._model import report_tokenizer
    from MyGPT.files import atomic_write
    from MyGPT.inside.live import LivePage
    from MyGPT.opening import open_model

    gpt, tokenizer = open_model(model, "cpu", adapter)
    report_tokenizer(tokenizer)
    page = LivePage(gpt, tokenizer, text, Path(model).name, precision)
    n = gpt.num_parameters()
    print(f"the page has {page.n_bytes / 1e6:,.1f} MB, with {n:,} parameters in {precision}", file=sys.stderr)
    with atomic_write(out) as file:
        file.writelines(page.pieces())


def _write_features_page(
    text: str,
    model: str,
    adapter: str | None,
    device: str,
    parts: str | None,
    layer: int | None,
    data: str | list[str] | None,
    sizes: dict[str, int],
    out: str,
) -> None:
    """Train a sparse autoencoder on a layer of a model and write a page about its features.

    The model has the custom parts in the file `parts` if it is not None. `sizes` may have n_features and k.
    """
    import torch

    from MyGPT.commands._model import report_tokenizer
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.files import atomic_write
    from MyGPT.inside.features import features_page
    from MyGPT.opening import open_model

    files = find_files(data or _text_of_run(Path(model)) or "alice", report=partial(print, file=sys.stderr))
    gpt, tokenizer = open_model(model, device, adapter, parts)
    report_tokenizer(tokenizer)
    ids = torch.tensor(tokenizer.encode("".join(read_documents(files))))
    passage = torch.tensor(tokenizer.encode(text)) if text else None
    page = features_page(gpt, tokenizer, ids, layer, passage, **sizes, name=Path(model).name, progress=True)
    with atomic_write(out) as file:
        file.write(page)


def _text_of_run(run: Path) -> str | list[str] | None:
    """Return the option --data of a training run, or None if `run` is not the directory of a run of mygpt train."""
    from MyGPT.commands._recipe import read_recipe
    from MyGPT.commands._run import command_of_recipe

    config = run / "config.yaml"
    if not config.is_file():
        return None
    recipe = read_recipe(config)
    return recipe.get("data") if command_of_recipe(recipe) == "train" else None


def _write_replay(model: str | None, text: str, out: str, device: str, parts: str | None) -> None:
    """Write a page that replays the run `model`. `text` is the text of the page, or "" for the newest sample text.

    `parts` is the file with the custom parts of the run, or None.
    """
    from MyGPT.commands._recipe import fields_of, read_recipe
    from MyGPT.commands._run import command_of_recipe
    from MyGPT.files import atomic_write
    from MyGPT.inside.replay import replay_page
    from MyGPT.messages import near_path, quote
    from MyGPT.opening import open_model
    from MyGPT.training.config import TrainConfig
    from MyGPT.training.names import HISTORY, by_step

    if model is None:
        raise ValueError("--replay needs the directory of a run, as in mygpt explain RUN --replay")
    run = Path(model)
    if not (run / "config.yaml").is_file():
        raise FileNotFoundError(f"there is no run {run}{near_path(run) or ': it has no config.yaml'}")
    recipe = read_recipe(run / "config.yaml")
    command, config = command_of_recipe(recipe), TrainConfig(**fields_of(TrainConfig, recipe))
    if command == "classify":
        raise ValueError(f"{run} is a run of mygpt classify, and --replay shows models that write text")
    kept = [*by_step(run / HISTORY).values()]
    if command != "train":
        if not kept:
            way_out = f"repeat mygpt {command} with --keep_every 20, which keeps a model every 20 steps"
            raise FileNotFoundError(f"{run} kept no models to replay: {way_out}")
        if not text:
            example = f"mygpt explain {quote(run)} QUESTION --replay"
            raise ValueError(f"{run} is a run of mygpt {command}: give a question for its models, as in {example}")
        config = replace(config, sample_prompt=_prompt_for(kept[0], text))
    page = replay_page(run, config, lambda path: open_model(path, device, parts=parts), text or None)
    with atomic_write(out) as file:
        file.write(page)


def _prompt_for(model: Path, question: str) -> str:
    """Return the prompt that asks a fine-tuned model a question. `model` is its directory, or that of its adapter."""
    from MyGPT.finetuning.foreign_adapters import base_of_adapter
    from MyGPT.opening import find_model_files

    try:
        template = find_model_files(model).template()
    except FileNotFoundError:
        base = base_of_adapter(model)
        raise FileNotFoundError(
            f"{model} is an adapter of {base}, which is not on this machine: put it back there, or download it if that is a name"
        ) from None
    return question if template is None else template.prompt(template.question(question))
