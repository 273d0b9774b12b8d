"""Measure the loss of a trained model on a text with weights in float32, bf16 and int8.

Usage: python benchmarks/quality.py --model runs/demo [--text alice] [--from 0.9]

--from selects where in the text the evaluation starts, as a fraction. The text is cut into windows of the context
length. Losses are in nats per token.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from MyGPT import accelerate, open_model
from MyGPT.data.sources import find_files
from MyGPT.loss import token_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True)
    parser.add_argument("--text", default="alice", help="a file, or the name of a text")
    parser.add_argument("--from", dest="begin", type=float, default=0.9)
    options = parser.parse_args()
    model, tokenizer = open_model(options.model, "cpu")
    text = Path(find_files(options.text)[0]).read_text(encoding="utf-8")
    ids = tokenizer.encode(text[int(options.begin * len(text)) :])
    T = model.config.context_length
    windows = torch.tensor(ids[: (len(ids) - 1) // T * T + 1])
    inputs, targets = windows[:-1].view(-1, T), windows[1:].view(-1, T)
    exact = None
    for precision in ("fp32", "bf16", "int8"):
        fast = accelerate(model, precision)  # type: ignore[arg-type]
        total, n, n_same = 0.0, 0, 0
        best = []
        for rows, wanted in zip(inputs.split(16), targets.split(16), strict=True):
            logits = fast(rows)
            loss, count = token_loss(logits, wanted)
            total, n = total + float(loss), n + int(count)
            best.append(logits.argmax(-1))
        exact = best if exact is None else exact
        n_same = sum(int((ours == theirs).sum()) for ours, theirs in zip(best, exact, strict=True))
        print(
            f"{precision}: {total / n:.5f} nats per token, the same most likely token as float32 in {n_same / n:.2%} of {n}"
        )


if __name__ == "__main__":
    main()
