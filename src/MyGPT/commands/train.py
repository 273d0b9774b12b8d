"""mygpt train"""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from MyGPT.commands._resume import choose_run, with_options_of_run
from MyGPT.config import GPTConfig
from MyGPT.training.config import TrainConfig

# A model that a laptop trains in minutes; the released sizes are in configs/.
DEFAULTS = {"context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4, "drop_rate": 0.0, "init_std": 0.05}
HIDDEN = ("vocab_size",)
EXPAND = with_options_of_run


def train(
    model: GPTConfig,
    training: TrainConfig,
    data: str | list[str] = "alice",
    tokenizer: str = "chars",
    tokenizer_size: int = 1024,
    val_fraction: float = 0.1,
    out: str | None = None,
    device: str = "auto",
    overwrite: bool = False,
    resume: str | None = None,
    allow_changed: str | list[str] | None = None,
) -> None:
    """Train a GPT on a text, from text files to a model directory.

    The run's directory gets config.yaml, metrics.jsonl, model/ (the best model), checkpoints/, loss.png and samples.txt.
    Ctrl-C and SIGTERM save a checkpoint and say how to go on.
    Example: mygpt train --data book.txt --max_steps 500 --out runs/book
    A run that was stopped, killed too: mygpt train --resume runs/book

    Args:
        data: text files (.txt, .jsonl, .gz, patterns such as 'texts/*.txt'), a directory made by mygpt prepare, or the
            name of a text: alice (built in), tinyshakespeare (downloaded)
        tokenizer: chars, words, bpe (learned from the text), gpt2, or a directory with a tokenizer
        tokenizer_size: number of tokens that bpe learns
        val_fraction: part of the text, at its end, that is kept for validation
        out: the run's directory; default runs/ and the time
        device: auto, cpu, cuda or mps
        overwrite: replace the run that is in the directory
        resume: the directory of a run that goes on, with the options that it had; "auto" goes on with the run in --out if
            there is one, and else begins it, so that the same command can be given again and again
        allow_changed: options that may differ from those of the run that goes on
    """
    import torch

    from MyGPT.devices import pick_device
    from MyGPT.model import GPTModel
    from MyGPT.training.trainer import Trainer

    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be from 0 up to but not including 1, got {val_fraction}")
    place = pick_device(device)
    run, how = choose_run(out, resume, overwrite)
    ids, coder = load_data(data, tokenizer, tokenizer_size)
    n_train = len(ids) - round(len(ids) * val_fraction)
    torch.manual_seed(training.seed)
    gpt = GPTModel(dataclasses.replace(model, vocab_size=coder.n_vocab))
    trainer = Trainer(
        gpt,
        training,
        ids[:n_train],
        ids[n_train:],
        tokenizer=coder,
        run_dir=run,
        recipe={
            "data": data,
            "tokenizer": tokenizer,
            "tokenizer_size": tokenizer_size,
            "val_fraction": val_fraction,
            "device": device,
            **{
                field.name: getattr(model, field.name)
                for field in dataclasses.fields(model)
                if field.name not in HIDDEN
            },
            **vars(training),
        },
        device=place,
        allow_changed=allow_changed or (),
        **how,
    )
    precision = "bf16" if trainer.autocast_dtype else "fp32"
    print(
        f"{n_train:,} training and {len(ids) - n_train:,} validation tokens, vocabulary {coder.n_vocab:,}; "
        f"{gpt.num_parameters():,} parameters; {place.type}, {precision}"
    )
    try:
        loss = trainer.run()
    except (KeyboardInterrupt, FloatingPointError):  # a run that was stopped or diverged is worth a look too
        draw_losses(run)
        raise
    draw_losses(run)
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats a token over the whole validation text (step {trainer.best_step})")
    print(f"the model is in {run / 'model'}; try: mygpt generate --model {run}")


def load_data(data: str | list[str], tokenizer: str, tokenizer_size: int) -> tuple[Any, Any]:
    """The token ids of a prepared directory or of texts, and their tokenizer."""
    from MyGPT.data.prepare import tokenize
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.data.tokens import is_prepared, open_tokens
    from MyGPT.tokenizers import load_tokenizer, make_tokenizer

    if isinstance(data, str) and is_prepared(data):
        return open_tokens(data)[0], load_tokenizer(data)
    files = find_files(data)
    if not any(next(read_documents([file]), "") for file in files):
        raise ValueError(f"there is no text in {', '.join(map(str, files))}")
    coder = make_tokenizer(tokenizer, read_documents(files), tokenizer_size)
    return tokenize(files, coder), coder


def draw_losses(run: Path) -> None:
    """loss.png, if matplotlib is there and the run got as far as a loss."""
    if not (run / "metrics.jsonl").is_file():
        return
    try:
        from MyGPT.inside.plots import plot_losses, save_figure

        save_figure(plot_losses([run]), run / "loss.png")
    except ImportError:
        print("no loss.png, since matplotlib is not installed: pip install 'mygpt[plots]'", file=sys.stderr)
