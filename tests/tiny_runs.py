"""Tiny runs: `make_trainer` for Trainers in this process, `train_command` and `finetune_command` for the command line.

test_resume.py stops and kills the commands, and soak.py does so fifty times.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from conftest import lively_model
from MyGPT import BPETokenizer, CharTokenizer, GPTConfig, GPTModel, TrainConfig, Trainer
from MyGPT.data.templates import load_template

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


EXAMPLES = [(word, n) for word in "abcd" for n in range(1, 8)]
TUNING = "--epochs 3 --batch_size 4 --checkpoint_every 3 --eval_every 5 --device cpu".split()


def finetune_command(place: Path, out: Path, *options: str) -> list[str]:
    """Return the arguments of `mygpt` for a tiny fine-tuning in the directory `out`.

    Its model and its records are written to the directory `place` if they are not there yet.
    """
    records = [{"instruction": f"Say {word} {n} times.", "output": " ".join([word] * n)} for word, n in EXAMPLES]
    where = _base_and_data(place, place / "records.json", records)
    return ["finetune", *where, "--out", str(out), *TUNING, "--sample_tokens", "5", *options]


def dpo_command(place: Path, out: Path) -> list[str]:
    """Return the arguments of `mygpt dpo` for a tiny run. See `finetune_command`."""
    pairs = [{"prompt": f"Say {word}.", "chosen": word * n, "rejected": "x" * n} for word, n in EXAMPLES]
    where = _base_and_data(place, place / "pairs.json", pairs)
    return ["dpo", *where, "--out", str(out), *TUNING]


def classify_command(place: Path, out: Path) -> list[str]:
    """Return the arguments of `mygpt classify` for a tiny run. See `finetune_command`."""
    texts = [{"text": f"Say {word} {n} times.", "label": word} for word, n in EXAMPLES]
    where = _base_and_data(place, place / "texts.json", texts)
    return ["classify", *where, "--out", str(out), *TUNING]


def _base_and_data(place: Path, path: Path, records: list[dict[str, Any]]) -> list[str]:
    """Write the records and a model for them, and return the options --model and --data."""
    path.write_text(json.dumps(records))
    if not (place / "base").exists():
        prompts = [{"instruction": f"Say {word} {n} times.", "output": ""} for word, n in EXAMPLES]
        texts = [load_template("alpaca").prompt(record) for record in prompts]
        tokenizer = BPETokenizer.train(texts, 320, progress=False)
        sizes = {"context_length": 128, "emb_dim": 16, "n_heads": 2, "n_layers": 2, "drop_rate": 0.1}
        lively_model(GPTConfig(vocab_size=tokenizer.n_vocab, **sizes)).save_pretrained(place / "base", tokenizer)
    return ["--model", str(place / "base"), "--data", str(path)]


TOKENIZER = CharTokenizer.from_text(TEXT)
IDS = TOKENIZER.encode(TEXT)
CONFIG = GPTConfig(TOKENIZER.n_vocab, context_length=8, emb_dim=16, n_heads=2, n_layers=2, drop_rate=0.0)
QUICK = TrainConfig(
    max_steps=8,
    batch_size=4,
    checkpoint_every=2,
    eval_every=4,
    eval_windows=10,
    sample_every=0,
    keep_last=3,
    log_every=1,
    warmup_steps=0,
)


def change(config: TrainConfig = QUICK, **fields: Any) -> TrainConfig:
    """Return a config with some fields replaced."""
    return TrainConfig(**{**vars(config), **fields})


def make_model(drop_rate: float = 0.3) -> GPTModel:
    """Return the model of CONFIG with this dropout. Its initial weights are always the same."""
    torch.manual_seed(3)
    return GPTModel({**vars(CONFIG), "drop_rate": drop_rate})


def make_trainer(run_dir: Path | None = None, config: TrainConfig = QUICK, **options: Any) -> Trainer:
    """Return a Trainer on 1,500 characters with 500 for validation; `options` replace its arguments."""
    model = options.pop("model", None) or make_model()
    train, val = options.pop("train", IDS[:1500]), options.pop("val", IDS[1500:2000])
    return Trainer(model, config, train, val, run_dir=run_dir, **{"progress": False, **options})
