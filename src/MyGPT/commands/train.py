"""`mygpt train`: train a GPT on text files."""

from __future__ import annotations

import dataclasses
import math
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from MyGPT.commands._memory import least_step_memory, require_memory, step_memory
from MyGPT.commands._run import RunOptions, with_options_of_run
from MyGPT.config import SPECIAL_TOKEN_FIELDS, GPTConfig
from MyGPT.messages import error_message, quote
from MyGPT.training.config import TrainConfig

if TYPE_CHECKING:
    from MyGPT.data.tokens import Tokens
    from MyGPT.tokenizers import Tokenizer

# A laptop trains a model of this size in minutes; configs/ has the released sizes.
DEFAULTS = {"context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4, "drop_rate": 0.0, "init_std": 0.05}
DEFAULT_TOKENIZER = "chars"
HIDDEN = ("vocab_size", *SPECIAL_TOKEN_FIELDS)
COMMON = (
    "data tokenizer out resume max_steps batch_size learning_rate context_length emb_dim n_heads n_layers drop_rate "
    "eval_every sample_every device"
).split()
EXPAND = with_options_of_run


@dataclass(frozen=True)
class TextOptions:
    """The options of `mygpt train` that say which text to train on, and which tokenizer turns this text into tokens."""

    data: str | list[str] | dict[str, float] = "alice"
    """Texts (.txt) or records (.jsonl, .ndjson, .json, .csv, .parquet), also as .gz or .zst; patterns such as
    'texts/*.txt'; a directory made by mygpt prepare; token files of datatrove (.ds); alice (built in) or
    tinyshakespeare (downloaded). A mixture such as '{web: 0.8, code: 0.2}' takes 80% of the tokens from web."""
    tokenizer: str | None = None
    """The tokenizer: chars, words or bpe, learned from the text; gpt2; or a directory with a tokenizer. Models of chars
    cannot be fine-tuned, because chars has no end-of-text token. Default: chars."""
    tokenizer_size: int = 1024
    val_fraction: float = 0.1
    """Fraction of the text, taken from its end, for validation."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")
        if isinstance(self.data, dict):
            from MyGPT.data.mixture import check_weights

            check_weights(self.data)
        elif isinstance(self.data, str) and self.data.lstrip().startswith("{") and not Path(self.data).exists():
            raise ValueError(
                f"data must map each source to a number, as in '{{web: 0.8, code: 0.2}}', got {self.data!r}"
            )


def train(
    model: GPTConfig, training: TrainConfig, text: TextOptions, run: RunOptions, with_: str | None = None
) -> None:
    """Train a GPT on text files.

    The run directory receives config.yaml, metrics.jsonl, samples.txt, loss.png, checkpoints/ and model/ (the best model).
    Ctrl-C and SIGTERM save a checkpoint and print how to resume.

    Examples:
        mygpt train --data book.txt --max_steps 500 --out runs/book
        mygpt train --resume runs/book
        mygpt train --resume runs/book --max_steps 1000 --allow_changed max_steps

    Args:
        with_: Python file with your own attention, MLP or block, which is run in place of GPT-2's (docs/guide/model.md shows
            how to write it). A run that is resumed needs it again.
    """
    import torch

    from MyGPT import ranks
    from MyGPT.model import GPTModel
    from MyGPT.parts import check_parts, load_parts
    from MyGPT.tokenizers import ENDOFTEXT
    from MyGPT.training.trainer import Trainer

    custom_parts = None if with_ is None else load_parts(with_)
    run_options = run.for_trainer(training)
    if custom_parts is None and run_options.get("resume") and "with" not in run_options["allow_changed"]:
        require_custom_parts(run_options["run_dir"])
    # The order of the sources in a recipe has no meaning, but the sample texts and the tokenizer follow an order.
    weights = dict(sorted(text.data.items())) if isinstance(text.data, dict) else {}
    tokenizer = text.tokenizer or DEFAULT_TOKENIZER
    sources, coder = load_sources({name: name for name in weights} or {"": text.data}, tokenizer, text.tokenizer_size)
    n_train = {name: len(ids) - round(len(ids) * text.val_fraction) for name, ids in sources.items()}
    train_ids = {name: ids[: n_train[name]] for name, ids in sources.items()}
    val_ids = {name: ids[n_train[name] :] for name, ids in sources.items()}
    torch.manual_seed(training.seed)
    config = dataclasses.replace(model, vocab_size=coder.n_vocab)
    is_on_cpu, n_ranks = run_options["device"].type == "cpu", ranks.world_size()
    if is_on_cpu and custom_parts is None:
        tokens = 2 * 8 * training.batch_size * config.context_length  # the batch and its targets, in int64
        require_memory(step_memory(config, training, False, "cpu", n_ranks).peak + tokens)
    gpt = GPTModel(config, custom_parts)
    if is_on_cpu and custom_parts is not None:  # what the parts themselves store for the backward pass is not known
        require_memory(least_step_memory(gpt.num_parameters(), training, n_ranks))
        check_parts(gpt)  # before the directory of the run is made, so that the corrected file can be used with it
    sizes = {name: value for name, value in vars(model).items() if name not in HIDDEN}
    own = {} if with_ is None else {"with": with_}
    recipe = {**vars(text), "tokenizer": tokenizer, **own, "device": run.device, **sizes, **vars(training)}
    batches: dict[str, Any] = {"train": train_ids.get(""), "val": val_ids.get("")}
    if weights:
        batches = mix(train_ids, val_ids, weights, config.context_length, training)
    trainer = Trainer(gpt, training, tokenizer=coder, recipe=recipe, **batches, **run_options)
    directory, precision = run_options["run_dir"], "bf16" if trainer.autocast_dtype else "fp32"
    for name in weights:
        share = f"{float(batches['train'].shares[name]):.1%} of each batch"
        print(f"{name}: {share}; {len(train_ids[name]):,} training and {len(val_ids[name]):,} validation tokens")
    n_train_ids, n_val_ids = (sum(map(len, ids.values())) for ids in (train_ids, val_ids))
    print(
        f"{n_train_ids:,} training and {n_val_ids:,} validation tokens, vocabulary {coder.n_vocab:,}; "
        f"{gpt.num_parameters():,} parameters; {trainer.device.type}, {precision}"
    )
    if gpt.parts is not None:
        print(f"with {gpt.parts.description}")
    if coder.eot_token is None and text.tokenizer != DEFAULT_TOKENIZER:  # who chose chars knows what its help says
        print(
            f"the tokenizer has no {ENDOFTEXT} token, which mygpt finetune and dpo need: for a model to train further with "
            "them, use --tokenizer bpe"
        )
    if coder.eot_token is None and training.sample_to_end:
        print(f"sample_to_end has no effect, because the tokenizer has no {ENDOFTEXT} token", file=sys.stderr)
    try:
        loss = trainer.run()
    except (KeyboardInterrupt, FloatingPointError):  # the curve of a stopped or diverged run is useful too
        draw_losses(directory)
        raise
    draw_losses(directory)
    if weights:
        drawn = batches["train"].tokens(trainer.step_number)
        parts = (f"{name} {n:,} ({n / max(1, sum(drawn.values())):.2%})" for name, n in drawn.items())
        print(f"tokens in the batches of {trainer.step_number:,} steps: {', '.join(parts)}")
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats per token on the whole validation text (step {trainer.best_step})")
    with_parts = "" if gpt.parts is None else f" --with {quote(gpt.parts.path)}"
    print(f"model saved in {directory / 'model'}; try: mygpt generate --model {quote(directory)}{with_parts}")


def require_custom_parts(run: Path) -> None:
    """Raise ValueError if the run in the directory `run` was trained with custom parts, which are not given to resume it."""
    from MyGPT.commands._recipe import read_recipe
    from MyGPT.parts import PARTS_FILE

    file = read_recipe(run / "config.yaml").get("with")
    if file is not None:
        raise ValueError(
            f"the run in {run} was trained with the parts in {quote(str(file))}, and MyGPT runs code of a run only if you name "
            f"it: read {run / PARTS_FILE}, a copy of it, and then resume with --with {quote(run / PARTS_FILE)}"
        )


def load_sources(
    sources: Mapping[str, Any], tokenizer: str, tokenizer_size: int
) -> tuple[dict[str, Tokens], Tokenizer]:
    """Return the token ids of each source by name, and the tokenizer of all sources.

    Each source is a directory made by mygpt prepare, or one or several text files as `find_files` finds them. If there is a
    prepared directory, its tokenizer also encodes the text files. Otherwise they are tokenized with the tokenizer named
    `tokenizer`, which learns from the texts of all sources; bpe learns `tokenizer_size` tokens. A source may also be token
    files of datatrove, whose tokenizer is GPT-2's or the directory `tokenizer` (see data/datatrove.py).

    Raises:
        ValueError: two sources were prepared with different tokenizers, a file belongs to two sources, or there is no text.
    """
    from MyGPT.data.datatrove import find_token_files, open_token_files
    from MyGPT.data.prepare import tokenize
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.data.tokens import is_prepared, open_tokens
    from MyGPT.tokenizers import check_tokenizer, make_tokenizer

    prepared = {name: data for name, data in sources.items() if isinstance(data, str) and is_prepared(data)}
    written = {
        name: open_token_files(paths, tokenizer) for name, data in sources.items() if (paths := find_token_files(data))
    }
    if not prepared and not written:
        check_tokenizer(tokenizer, tokenizer_size)
    report = partial(print, file=sys.stderr)
    files = {name: find_files(data, report) for name, data in sources.items() if name not in {*prepared, *written}}
    all_files = [path for paths in files.values() for path in paths]
    if files:
        find_files(map(os.fspath, all_files), report=_refuse_shared)
    if prepared or written:
        coders = [_common_tokenizer(list(prepared.values()))] if prepared else []
        coders += [coder for _, coder in written.values()]
        coder = coders[0]
        if any(other is not coder and other.to_json() != coder.to_json() for other in coders):
            raise ValueError(f"{', '.join([*prepared, *written])} were prepared with different tokenizers")
        if files:
            report(f"{', '.join(files)}: encoded with the tokenizer of {next(iter({**prepared, **written}))}")
    else:
        if not any(next(read_documents([file]), "") for file in all_files):
            raise ValueError(f"the files hold no text: {', '.join(map(str, all_files))}")
        coder = make_tokenizer(tokenizer, read_documents(all_files), tokenizer_size)
    ids: dict[str, Tokens] = {name: tokens for name, (tokens, _) in written.items()}
    ids |= {name: open_tokens(directory)[0] for name, directory in prepared.items()}
    ids |= {name: tokenize(paths, coder) for name, paths in files.items()}
    return {name: ids[name] for name in sources}, coder


def _common_tokenizer(directories: Sequence[str]) -> Tokenizer:
    """Return the tokenizer with which all these directories were prepared. Different tokenizers raise ValueError."""
    from MyGPT.files import present_directory, sha256_of
    from MyGPT.tokenizers import load_tokenizer

    hashes = [sha256_of(present_directory(directory) / "tokenizer.json") for directory in directories]
    for directory, known in zip(directories, hashes, strict=True):
        if known != hashes[0]:
            raise ValueError(
                f"{directories[0]} and {directory} were prepared with different tokenizers: run mygpt prepare with the same "
                "tokenizer for all sources of a mixture"
            )
    return load_tokenizer(directories[0])


def mix(
    train: Mapping[str, Tokens],
    val: Mapping[str, Tokens],
    weights: Mapping[str, float],
    max_length: int,
    training: TrainConfig,
) -> dict[str, Any]:
    """Return the arguments of Trainer for a mixture: `train`, `val` and `prompts`, the first 8 tokens of each source.

    `train` and `val` have the token ids of each source. With fewer than two validation tokens in each, `val` is None.
    """
    from MyGPT.data.mixture import MixtureSampler, MixtureValidation

    sampler = MixtureSampler(train, weights, max_length, training.batch_size, training.order, training.seed)
    has_val = any(len(ids) > 1 for ids in val.values())
    validation = MixtureValidation(val, weights, max_length, training.eval_windows) if has_val else None
    prompts = [ids[:8].tolist() for ids in (val if has_val else train).values() if len(ids)]
    return {"train": sampler, "val": validation, "prompts": prompts}


def _refuse_shared(message: str) -> None:
    """Raise ValueError for a file that occurs in two sources. One would validate on what the other trains on."""
    raise ValueError(
        f"{message.removesuffix(' and is read once')}, but a file may belong to one source of a mixture only"
    )


def draw_losses(run: Path) -> None:
    """Draw the losses that were recorded in the run directory `run`, and write the picture to loss.png in this directory.

    Without recorded losses, nothing is written. If matplotlib is missing, metrics.jsonl is damaged, or the picture cannot be
    written, the reason is printed.
    """
    if not (run / "metrics.jsonl").is_file():
        return
    try:
        from MyGPT.inside.plots import plot_losses, save_figure

        save_figure(plot_losses([run]), run / "loss.png")
        return
    except ImportError:
        reason = "matplotlib is not installed: pip install 'mygpt[plots]'"
    except ValueError as error:
        reason = error_message(error)
    except OSError as error:
        reason = f"it could not be written: {error_message(error)}"
    print(f"loss.png was not drawn, because {reason}", file=sys.stderr)
