"""Measure the loss of a trained model on a text with weights in float32, bf16, int8 and int4.

Usage: python benchmarks/quality.py [--model runs/demo] [--text alice] [--from 0.9] [--directory DIR] [--out DIR]

Without --model, the recipe configs/quickstart.yaml is trained once, into --directory. --from selects where in the text
the evaluation starts, as a fraction. The text is cut into windows of the context length.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import torch
from measurements import Results, parse
from tables import show

from MyGPT import accelerate, open_model
from MyGPT.cli import main as mygpt
from MyGPT.data.sources import find_files
from MyGPT.loss import token_loss


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a trained model")
    parser.add_argument("--directory", type=Path, default=Path("bench-models"), help="the directory for a new model")
    parser.add_argument("--text", default="alice", help="a file, or the name of a text")
    parser.add_argument("--from", dest="begin", type=float, default=0.9)
    options = parse(parser)
    if options.model is None:
        options.model = options.directory / "quickstart"
        recipe = Path(__file__).parents[1] / "configs/quickstart.yaml"
        if not options.model.exists() and mygpt(["train", "--config", str(recipe), "--out", str(options.model)]) != 0:
            raise SystemExit("the model could not be trained")
    model, tokenizer = open_model(str(options.model), "cpu")
    results = Results("quality")
    text = Path(find_files(options.text)[0]).read_text(encoding="utf-8")
    ids = tokenizer.encode(text[int(options.begin * len(text)) :])
    T = model.config.context_length
    windows = torch.tensor(ids[: (len(ids) - 1) // T * T + 1])
    inputs, targets = windows[:-1].view(-1, T), windows[1:].view(-1, T)
    exact = None
    for precision in ("fp32", "bf16", "int8", "int4"):
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
        results.add(precision, "loss", "nats per token", total / n, positions=n)
        results.add(precision, "same most likely token as float32", "share", n_same / n)
    results.save(options.out)
    show(results)


if __name__ == "__main__":
    main()
