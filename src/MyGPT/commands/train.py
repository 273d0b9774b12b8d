"""`mygpt train`: train a GPT on text files."""

from __future__ import annotations

import dataclasses
import math
import sys
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from MyGPT.commands._memory import require_memory, step_memory
from MyGPT.commands._run import RunOptions, with_options_of_run
from MyGPT.config import SPECIAL_TOKEN_FIELDS, GPTConfig
from MyGPT.messages import error_message, quote
from MyGPT.training.config import TrainConfig

# A laptop trains a model of this size in minutes; configs/ has the released sizes.
DEFAULTS = {"context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4, "drop_rate": 0.0, "init_std": 0.05}
HIDDEN = ("vocab_size", *SPECIAL_TOKEN_FIELDS)
COMMON = (
    "data tokenizer out resume max_steps batch_size learning_rate context_length emb_dim n_heads n_layers drop_rate "
    "eval_every sample_every device"
).split()
EXPAND = with_options_of_run


@dataclass(frozen=True)
class TextOptions:
    """The options of `mygpt train` that say which text to train on, and which tokenizer turns this text into tokens."""

    data: str | list[str] = "alice"
    """Text files (.txt), or records with a text (.jsonl, .ndjson, .json, .csv), also compressed as .gz,
    patterns such as 'texts/*.txt', a directory made by mygpt prepare, alice (built in) or tinyshakespeare
    (downloaded)."""
    tokenizer: str = "chars"
    """The tokenizer: chars, words or bpe, which are learned from the text; gpt2; or a directory with a tokenizer. Models of
    chars cannot be fine-tuned on answers, because chars has no end-of-text token."""
    tokenizer_size: int = 1024
    val_fraction: float = 0.1
    """Fraction of the text, taken from its end, for validation."""

    def __post_init__(self) -> None:
        if not 0 <= self.val_fraction < 1:
            raise ValueError(f"val_fraction must be at least 0 and below 1, got {self.val_fraction}")


def train(model: GPTConfig, training: TrainConfig, text: TextOptions, run: RunOptions) -> None:
    """Train a GPT on text files.

    The run directory receives config.yaml, metrics.jsonl, samples.txt, loss.png, checkpoints/ and model/ (the best model).
    Ctrl-C and SIGTERM save a checkpoint and print how to resume.

    Examples:
        mygpt train --data book.txt --max_steps 500 --out runs/book
        mygpt train --resume runs/book
        mygpt train --resume runs/book --max_steps 1000 --allow_changed max_steps
    """
    import torch

    from MyGPT.model import GPTModel
    from MyGPT.tokenizers import ENDOFTEXT
    from MyGPT.training.trainer import Trainer

    run_options = run.for_trainer(training)
    ids, coder = load_data(text.data, text.tokenizer, text.tokenizer_size)
    n_train = len(ids) - round(len(ids) * text.val_fraction)
    torch.manual_seed(training.seed)
    config = dataclasses.replace(model, vocab_size=coder.n_vocab)
    if run_options["device"].type == "cpu":
        tokens = 2 * 8 * training.batch_size * config.context_length  # the batch and its targets, in int64
        require_memory(step_memory(config, training, False, "cpu").peak + tokens)
    gpt = GPTModel(config)
    sizes = {name: value for name, value in vars(model).items() if name not in HIDDEN}
    recipe = {**vars(text), "device": run.device, **sizes, **vars(training)}
    train_ids, val_ids = ids[:n_train], ids[n_train:]
    trainer = Trainer(gpt, training, train_ids, val_ids, tokenizer=coder, recipe=recipe, **run_options)
    directory, precision = run_options["run_dir"], "bf16" if trainer.autocast_dtype else "fp32"
    print(
        f"{len(train_ids):,} training and {len(val_ids):,} validation tokens, vocabulary {coder.n_vocab:,}; "
        f"{gpt.num_parameters():,} parameters; {trainer.device.type}, {precision}"
    )
    if coder.eot_token is None:
        print(
            f"the tokenizer has no {ENDOFTEXT} token, which mygpt finetune and dpo need: for a model to train further with "
            "them, use --tokenizer bpe"
        )
        if training.sample_to_end:
            print(f"sample_to_end has no effect, because the tokenizer has no {ENDOFTEXT} token", file=sys.stderr)
    try:
        loss = trainer.run()
    except (KeyboardInterrupt, FloatingPointError):  # the curve of a stopped or diverged run is useful too
        draw_losses(directory)
        raise
    draw_losses(directory)
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats per token on the whole validation text (step {trainer.best_step})")
    print(f"model saved in {directory / 'model'}; try: mygpt generate --model {quote(directory)}")


def load_data(data: str | list[str], tokenizer: str, tokenizer_size: int) -> tuple[Any, Any]:
    """Return the token ids of `data` and their tokenizer.

    `data` is a directory made by mygpt prepare, or one or several text files. Text files are tokenized with the tokenizer
    named `tokenizer`; `tokenizer_size` is the number of tokens that bpe learns.
    """
    from MyGPT.data.prepare import tokenize
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.data.tokens import is_prepared, open_tokens
    from MyGPT.tokenizers import check_tokenizer, load_tokenizer, make_tokenizer

    if isinstance(data, str) and is_prepared(data):
        return open_tokens(data)[0], load_tokenizer(data)
    check_tokenizer(tokenizer, tokenizer_size)
    files = find_files(data, report=partial(print, file=sys.stderr))
    if not any(next(read_documents([file]), "") for file in files):
        raise ValueError(f"the files hold no text: {', '.join(map(str, files))}")
    coder = make_tokenizer(tokenizer, read_documents(files), tokenizer_size)
    return tokenize(files, coder), coder


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
