"""Commands of training runs that take seconds. test_resume.py stops and kills them, and soak.py does so fifty times."""

from __future__ import annotations

from pathlib import Path

TEXT = "the quick brown fox jumps over the lazy dog, and the dog sleeps on; " * 60
SIZES = "--context_length 16 --emb_dim 16 --n_heads 2 --n_layers 2 --drop_rate 0.2 --batch_size 4 --warmup_steps 3"
EVENTS = "--max_steps 24 --checkpoint_every 4 --eval_every 6 --eval_windows 5 --sample_every 8 --sample_tokens 6 --log_every 1"
RECIPES = {
    "adamw": "--micro_batch_size 2 --order random",
    "muon": "--optimizer muon --order shuffled --keep_best 1 --checkpoint_every 3",
    "bf16": "--precision bf16 --early_stop 2 --eval_every 3 --learning_rate 0.05 --order sequential --deterministic",
}


def train_command(text: Path, out: Path, *options: str) -> list[str]:
    """Return the arguments of `mygpt` for a tiny run on the text file `text` in the directory `out`."""
    return ["train", "--data", str(text), *f"{SIZES} {EVENTS}".split(), *options, "--device", "cpu", "--out", str(out)]
