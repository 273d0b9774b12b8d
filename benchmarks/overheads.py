"""Measure the share of a training run's time spent on batches, evaluations, best models, samples and checkpoints.

Usage: python benchmarks/overheads.py [--recipes configs/quickstart.yaml configs/gpt2_small.yaml] [--text alice] [--rounds 3]
       [--busy] [--out DIR]

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
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from measurements import Results, parse, rounds
from tables import show

from MyGPT import GPTModel, TrainConfig, Trainer
from MyGPT.commands._recipe import read_plan
from MyGPT.commands.train import load_sources
from training import clock_of

INTERVALS = ("eval_every", "eval_windows", "sample_every", "sample_tokens", "checkpoint_every")


def measure(recipe: Path, own: bool, options: argparse.Namespace, results: Results) -> None:
    """Store the seconds of each part, at the recipe's own intervals (`own`) or at the defaults."""
    clock = clock_of(options.busy)
    shape, config, plan = read_plan(recipe)
    if config is None:
        raise SystemExit(f"{recipe} has no training options")
    if not own:
        config = dataclasses.replace(config, **{name: getattr(TrainConfig(), name) for name in INTERVALS})
    sources, tokenizer = load_sources({"": options.text}, plan.get("tokenizer", "chars"), 1024)
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
            "sample": lambda: trainer.samples.text(config.sample_every),
            "checkpoint": trainer.snapshot,
        }
        intervals = {
            "evaluation": config.eval_every,
            "best model": config.eval_every,
            "sample": config.sample_every,
            "checkpoint": config.checkpoint_every,
        }
        name = f"{recipe.stem}, {'its own intervals' if own else 'default intervals'}"
        predicted = config.eval_windows / (3 * config.eval_every * config.batch_size)
        results.settings[name] = {key: getattr(config, key) for key in INTERVALS} | {"batch_size": config.batch_size}
        trainer.step()  # warm-up
        for _ in rounds(options, share=1 / (2 * len(options.recipes))):
            for part, run in parts.items():
                start = clock()
                run()
                row = results.add(name, part, "s", clock() - start)
                row.about = {"steps_between": intervals.get(part, 1)}
            results.row(name, "evaluation").about["predicted_share"] = predicted
            results.save(options.out)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    configs = Path(__file__).parents[1] / "configs"
    recipes = [configs / "quickstart.yaml", configs / "gpt2_small.yaml"]
    parser.add_argument("--recipes", type=Path, nargs="+", default=recipes)
    parser.add_argument("--text", default="alice", help="a file, or the name of a text")
    parser.add_argument("--busy", action="store_true", help="use one thread and measure CPU time")
    options = parse(parser, rounds=3)
    results = Results("overheads", {"busy": options.busy})
    for recipe in options.recipes:
        for own in (True, False):
            measure(recipe, own, options, results)
    show(results)


if __name__ == "__main__":
    main()
