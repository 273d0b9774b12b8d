"""Measure the share of a training run's time spent on batches, evaluations, best models, samples and checkpoints.

Usage: python benchmarks/overheads.py [--recipes configs/quickstart.yaml configs/gpt2_small.yaml] [--text alice] [--rounds 3]
       [--busy] [--out overheads.json]

Each recipe is measured at its own intervals and at the defaults of TrainConfig. The parts are timed separately and in
turn. The median time of a part is divided by the number of steps between two of its runs, so no long run is needed.
Every evaluation is assumed to find a new best model and to save it. The evaluation of the whole validation text at the
end is left out.

The predicted share of evaluations is eval_windows / (3 * eval_every * batch_size), because an evaluation computes
eval_windows forward passes and a step computes batch_size forward and backward passes. --text replaces the text of the
recipe; it is repeated if a tenth of it is shorter than the windows of an evaluation. --busy uses one thread and
measures CPU time.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import math
import statistics
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from decode import processor

from MyGPT import GPTModel, TrainConfig, Trainer
from MyGPT.commands._recipe import read_plan
from MyGPT.commands.train import load_sources
from MyGPT.files import atomic_write
from training import clock_of

INTERVALS = ("eval_every", "eval_windows", "sample_every", "sample_tokens", "checkpoint_every")


def measure(recipe: Path, text: str, own: bool, rounds: int, clock: Callable[[], float]) -> dict[str, Any]:
    """Return the seconds and the share of each part, at the recipe's own intervals (`own`) or at the defaults."""
    shape, config, plan = read_plan(recipe)
    if config is None:
        raise SystemExit(f"{recipe} has no training options")
    if not own:
        config = dataclasses.replace(config, **{name: getattr(TrainConfig(), name) for name in INTERVALS})
    sources, tokenizer = load_sources({"": text}, plan.get("tokenizer", "chars"), 1024)
    ids = sources[""]
    needed = 10 * (config.eval_windows * shape.context_length + 1)
    ids = np.resize(ids, max(len(ids), needed))  # np.resize repeats the ids
    n_train = len(ids) - len(ids) // 10
    model = GPTModel(dataclasses.replace(shape, vocab_size=tokenizer.n_vocab))
    with tempfile.TemporaryDirectory() as directory:
        trainer = Trainer(
            model, config, ids[:n_train], ids[n_train:], tokenizer=tokenizer, run_dir=Path(directory) / "run", progress=False
        )  # fmt: skip
        trainer.setup()
        parts: dict[str, Callable[[], Any]] = {
            "step": trainer.step,
            "batch": lambda: trainer.sampler.batch(trainer.step_number),
            "evaluation": trainer.evaluate,
            "best model": trainer.save,
            "sample": trainer.sample,
            "checkpoint": trainer.snapshot,
        }
        times: dict[str, list[float]] = {name: [] for name in parts}
        trainer.step()  # warm-up
        for _ in range(rounds):
            for name, part in parts.items():
                start = clock()
                part()
                times[name].append(clock() - start)
    seconds = {name: statistics.median(values) for name, values in times.items()}
    steps_between = {
        "evaluation": config.eval_every,
        "best model": config.eval_every,
        "sample": config.sample_every or math.inf,
        "checkpoint": config.checkpoint_every or math.inf,
    }
    seconds_per_step = {"step": seconds["step"] - seconds["batch"], "batch": seconds["batch"]}
    seconds_per_step |= {name: seconds[name] / steps for name, steps in steps_between.items()}
    return {
        "name": f"{recipe.stem}, {'its own intervals' if own else 'default intervals'}",
        "batch_size": config.batch_size,
        "intervals": {name: getattr(config, name) for name in INTERVALS},
        "seconds": times,
        "predicted": config.eval_windows / (3 * config.eval_every * config.batch_size),
        "shares": {name: part / sum(seconds_per_step.values()) for name, part in seconds_per_step.items()},
    }


def print_table(rows: list[dict[str, Any]]) -> None:
    parts = list(rows[0]["shares"])
    print(
        "| share of the run's time | "
        + " | ".join(parts)
        + " | evaluation, best model and sample | evaluation, predicted |"
    )
    print("|---" * (len(parts) + 3) + "|")
    for row in rows:
        shares = row["shares"]
        evaluating = sum(shares[name] for name in ("evaluation", "best model", "sample"))
        print(
            f"| {row['name']} | "
            + " | ".join(f"{shares[name]:.2%}" for name in parts)
            + f" | {evaluating:.2%} | {row['predicted']:.1%} |"
        )
    print("\n| seconds per call | " + " | ".join(parts) + " | intervals |")
    print("|---" * (len(parts) + 2) + "|")
    for row in rows:
        cells = [f"{statistics.median(row['seconds'][name]):.4g}" for name in parts]
        about = f"{row['batch_size']} sequences per step, " + ", ".join(f"{k} {v}" for k, v in row["intervals"].items())
        print(f"| {row['name']} | " + " | ".join([*cells, about]) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = Path(__file__).parents[1] / "configs"
    recipes = [configs / "quickstart.yaml", configs / "gpt2_small.yaml"]
    parser.add_argument("--recipes", type=Path, nargs="+", default=recipes)
    parser.add_argument("--text", default="alice", help="a file, or the name of a text")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--busy", action="store_true", help="use one thread and measure CPU time")
    parser.add_argument("--out", type=Path, help="a JSON file for the measured seconds")
    options = parser.parse_args()
    clock = clock_of(options.busy)
    rows = [measure(r, options.text, own, options.rounds, clock) for r in options.recipes for own in (True, False)]
    about = {"processor": processor(), "threads": torch.get_num_threads(), "busy": options.busy}
    print(", ".join(f"{key} {value}" for key, value in about.items()) + f", medians of {options.rounds} rounds\n")
    print_table(rows)
    if options.out is not None:
        with atomic_write(options.out) as file:
            json.dump({**about, "rows": rows}, file, indent=1)


if __name__ == "__main__":
    main()
