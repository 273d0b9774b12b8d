"""`mygpt train`: train a GPT on text files."""

from __future__ import annotations

import dataclasses
import math
import sys
from pathlib import Path
from typing import Any

from MyGPT.commands._resume import choose_run, with_options_of_run
from MyGPT.config import GPTConfig
from MyGPT.training.config import TrainConfig

# A laptop trains a model of this size in minutes; configs/ has the released sizes.
DEFAULTS = {"context_length": 64, "emb_dim": 128, "n_heads": 4, "n_layers": 4, "drop_rate": 0.0, "init_std": 0.05}
HIDDEN = ("vocab_size",)
COMMON = (
    *("data", "tokenizer", "out", "resume", "max_steps", "batch_size", "learning_rate"),
    *("context_length", "emb_dim", "n_heads", "n_layers", "drop_rate", "eval_every", "sample_every", "device"),
)
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
    """Train a GPT on text files.

    The run directory receives config.yaml, metrics.jsonl, samples.txt, loss.png, checkpoints/ and model/ (the model with the
    lowest validation loss). Ctrl-C and SIGTERM save a checkpoint and print how to resume.

    Examples:
        mygpt train --data book.txt --max_steps 500 --out runs/book
        mygpt train --resume runs/book

    Args:
        data: Text files (.txt, .jsonl, also as .gz, or patterns such as 'texts/*.txt'), a directory made by mygpt prepare,
            or alice (built in) or tinyshakespeare (downloaded).
        tokenizer: The tokenizer: chars, words or bpe (learned from the text), gpt2, or a directory with a tokenizer.
        tokenizer_size: Number of tokens that bpe learns.
        val_fraction: Fraction of the text, taken from its end, for validation.
        out: Directory of the run; without it, runs/ and the current time.
        device: Where to compute: auto, cpu, cuda or mps.
        overwrite: Replace a run that is already in the directory.
        resume: Directory of a run to resume with its own options; auto resumes the run in --out, or starts it if it has no
            checkpoint.
        allow_changed: Options that may differ from those of the resumed run.
    """
    import torch

    from MyGPT.devices import pick_device
    from MyGPT.model import GPTModel
    from MyGPT.training.trainer import Trainer

    if not 0 <= val_fraction < 1:
        raise ValueError(f"val_fraction must be at least 0 and below 1, got {val_fraction}")
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
    except (KeyboardInterrupt, FloatingPointError):  # the curve of a stopped or diverged run is useful too
        draw_losses(run)
        raise
    draw_losses(run)
    if not math.isnan(loss):
        print(f"validation loss {loss:.4f} nats per token on the whole validation text (step {trainer.best_step})")
    print(f"model saved in {run / 'model'}; try: mygpt generate --model {run}")


def load_data(data: str | list[str], tokenizer: str, tokenizer_size: int) -> tuple[Any, Any]:
    """Return the token ids of a prepared directory or of text files, and their tokenizer."""
    from MyGPT.data.prepare import tokenize
    from MyGPT.data.sources import find_files, read_documents
    from MyGPT.data.tokens import is_prepared, open_tokens
    from MyGPT.tokenizers import load_tokenizer, make_tokenizer

    if isinstance(data, str) and is_prepared(data):
        return open_tokens(data)[0], load_tokenizer(data)
    files = find_files(data)
    if not any(next(read_documents([file]), "") for file in files):
        raise ValueError(f"the files hold no text: {', '.join(map(str, files))}")
    coder = make_tokenizer(tokenizer, read_documents(files), tokenizer_size)
    return tokenize(files, coder), coder


def draw_losses(run: Path) -> None:
    """Write loss.png, if matplotlib is installed and the run has recorded a loss."""
    if not (run / "metrics.jsonl").is_file():
        return
    try:
        from MyGPT.inside.plots import plot_losses, save_figure

        save_figure(plot_losses([run]), run / "loss.png")
    except ImportError:
        print(
            "loss.png was not drawn, because matplotlib is not installed: pip install 'mygpt[plots]'", file=sys.stderr
        )
