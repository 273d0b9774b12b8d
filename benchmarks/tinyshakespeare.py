"""Compare the final loss on tinyshakespeare's characters of nanoGPT's published CPU recipe and of MyGPT's fast one.

Usage: python benchmarks/tinyshakespeare.py [--text tinyshakespeare] [--seeds 3] [--out DIR] [RECIPE ...]

The recipes run in turn, seed by seed. Losses are in nats per character over the whole validation set, the last tenth of the text.
"""

from __future__ import annotations

import argparse
import json
import tempfile
import time
from pathlib import Path

from measurements import Results, parse, rounds
from tables import show

from MyGPT.cli import main as mygpt

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def train(recipe: str, text: str, seed: int, directory: Path) -> tuple[float, float]:
    """Return the final validation loss and the wall time of the whole command in seconds."""
    run = directory / f"{recipe}-{seed}"
    start = time.perf_counter()
    arguments = ["--config", str(CONFIGS / f"{recipe}.yaml"), "--data", text, "--seed", str(seed), "--out", str(run)]
    if mygpt(["train", *arguments, "--sample_every", "0"]) != 0:
        raise SystemExit(f"{recipe} failed")
    seconds = time.perf_counter() - start
    last = json.loads((run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()[-1])
    return last["final_val_loss"], seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("recipes", nargs="*", default=["shakespeare_char", "shakespeare_char_fast"])
    parser.add_argument(
        "--text", default="tinyshakespeare", help="a text file, or the name of a text, which is downloaded"
    )
    parser.add_argument("--seeds", type=int, default=3)
    options = parse(parser)
    options.rounds = options.seeds
    results = Results("tinyshakespeare")
    with tempfile.TemporaryDirectory() as directory:
        for seed in rounds(options):
            for recipe in options.recipes:
                loss, seconds = train(recipe, options.text, seed, Path(directory))
                results.add(recipe, "last loss", "nats per character", loss)
                results.add(recipe, "time", "s", seconds)
            results.save(options.out)
    show(results)


if __name__ == "__main__":
    main()
