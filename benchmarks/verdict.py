"""Repeat the training run of chapter 5 of "Build a Large Language Model (From Scratch)" (Raschka, 2024) with MyGPT.

Usage: python benchmarks/verdict.py --text the-verdict.txt [--eval_freq 89] [--gpt2_init]

A model of 124 million parameters trains on a short story: context 256, batch size 2, AdamW with learning rate 4e-4 and
weight decay 0.1, ten epochs. The model is the book's, with torch's default initial weights and an untied head. With
--gpt2_init it gets GPT-2's initial weights and tied head. In these 90 steps without a warmup it then learns little more
than how frequent each token is (a loss of about 6).
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path

import torch

from MyGPT import GPT_CONFIG, GPTModel, create_dataloader, get_tokenizer, train_model_simple


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", required=True, help="the file of the story")
    parser.add_argument("--gpt2_init", action="store_true", help="use GPT-2's initial weights and a tied head")
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--eval_freq", type=int, default=5, help="steps between evaluations")
    options = parser.parse_args()
    text = Path(options.text).read_text(encoding="utf-8")
    cut = int(0.9 * len(text))
    torch.manual_seed(123)
    config = {**GPT_CONFIG, "context_length": 256}
    if not options.gpt2_init:
        config |= {"tie_weights": False, "init_std": None}
    model = GPTModel(config)
    train_loader = create_dataloader(text[:cut], batch_size=2, max_length=256)
    val_loader = create_dataloader(text[cut:], batch_size=2, max_length=256, shuffle=False, drop_last=False)
    optimizer = torch.optim.AdamW(model.parameters(), lr=4e-4, weight_decay=0.1)
    start = time.perf_counter()
    train_losses, _, _ = train_model_simple(
        model,
        train_loader,
        val_loader,
        optimizer,
        "cpu",
        options.epochs,
        eval_freq=options.eval_freq,
        start_context="Every effort moves you",
        tokenizer=get_tokenizer("gpt2"),
    )
    print(f"last training loss {train_losses[-1]:.3f} after {time.perf_counter() - start:.0f} s")


if __name__ == "__main__":
    main()
