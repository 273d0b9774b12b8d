"""Measure the training time until a given loss on tinyshakespeare's characters, for nanoGPT's CPU recipe and one of MyGPT's.

Usage: python benchmarks/time_to_quality.py --text FILE [--seeds 1 2 3] [--recipe shakespeare_char_quick] [--out DIR] [--append]

nanoGPT's recipe is reimplemented here without MyGPT: 4 layers, 4 heads, width 128, no biases, context 64, random
windows, batch size 12, and 2,000 steps of AdamW with a learning rate from 1e-3 to 1e-4 along a cosine. The other recipe
is a file in configs/, trained by MyGPT's Trainer. The two run in turn, seed by seed, each run in its own process.

The time counts the steps, including making the batches. It does not count starting, reading the text, or the
evaluations. The loss is measured on the whole validation set (the last tenth of the text) after every tenth of a run.
The target is 1.88, which nanoGPT publishes, or the mean of the baseline's last losses if that is lower. A baseline that
ends above the target counts as if its last step had reached it. --append adds seeds to the results in --out, so that a
long measurement can be split.
"""

from __future__ import annotations

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from measurements import Results, in_a_process, parse, rounds
from tables import show

ROOT = Path(__file__).resolve().parents[1]
BASELINE = "nanoGPT's recipe"


def read_ids(text: str) -> tuple[Any, Any]:
    """Return the character ids of the training text and of the validation text."""
    import numpy as np

    written = Path(text).read_text(encoding="utf-8")
    place = {character: id_ for id_, character in enumerate(sorted(set(written)))}
    ids = np.array([place[character] for character in written], dtype=np.uint16)
    n_train = len(ids) - round(len(ids) * 0.1)
    return ids[:n_train], ids[n_train:]


def nanogpt(train: Any, val: Any, seed: int) -> tuple[int, Callable[[int], None], Callable[[], float]]:
    """Return nanoGPT's published recipe: the number of steps, a function for one step, and one for the loss on all of `val`."""
    import math

    import numpy as np
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    C, H, L, T, B, V, n_steps = 128, 4, 4, 64, 12, int(train.max()) + 1, 2000
    torch.manual_seed(seed)

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C, bias=False), nn.LayerNorm(C, bias=False)
            self.qkv, self.out = nn.Linear(C, 3 * C, bias=False), nn.Linear(C, C, bias=False)
            self.wide, self.narrow = nn.Linear(C, 4 * C, bias=False), nn.Linear(4 * C, C, bias=False)

        def forward(self, x: Tensor) -> Tensor:
            n, t, _ = x.shape
            q, k, v = (part.view(n, t, H, C // H).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, is_causal=True)
            x = x + self.out(y.transpose(1, 2).contiguous().view(n, t, C))
            return x + self.narrow(F.gelu(self.wide(self.norm2(x))))

    class GPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.words, self.places = nn.Embedding(V, C), nn.Embedding(T, C)
            self.blocks, self.norm = nn.Sequential(*(Block() for _ in range(L))), nn.LayerNorm(C, bias=False)
            for name, parameter in self.named_parameters():
                if parameter.dim() == 2:
                    is_last = name.endswith(("out.weight", "narrow.weight"))
                    nn.init.normal_(parameter, std=0.02 / math.sqrt(2 * L) if is_last else 0.02)

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            x = self.words(inputs) + self.places(torch.arange(inputs.shape[1]))
            logits = F.linear(self.norm(self.blocks(x)), self.words.weight)
            return F.cross_entropy(logits.view(-1, V), targets.view(-1))

    model = GPT()
    groups = [
        {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))

    def step(number: int) -> None:
        risen, fallen = (number + 1) / 101, (number - 100) / (n_steps - 100)
        rate = 1e-3 * risen if number < 100 else 1e-4 + 9e-4 * (1 + math.cos(math.pi * fallen)) / 2
        for group in optimizer.param_groups:
            group["lr"] = rate
        starts = torch.randint(len(train) - T, (B,)).tolist()
        inputs = torch.stack([torch.from_numpy(train[i : i + T].astype(np.int64)) for i in starts])
        targets = torch.stack([torch.from_numpy(train[i + 1 : i + 1 + T].astype(np.int64)) for i in starts])
        loss = model(inputs, targets)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        loss.item()

    def evaluate() -> float:
        total, n_targets = 0.0, len(val) - 1
        ids = torch.from_numpy(val.astype(np.int64))
        rest = n_targets % T
        with torch.no_grad():
            for inputs, targets in zip(
                ids[: n_targets - rest].view(-1, T).split(64),
                ids[1 : n_targets - rest + 1].view(-1, T).split(64),
                strict=True,
            ):
                total += model(inputs, targets.contiguous()).item() * targets.numel()
            if rest:
                total += model(ids[None, -rest - 1 : -1], ids[None, -rest:].contiguous()).item() * rest
        return total / n_targets

    return n_steps, step, evaluate


def mygpt(recipe: str, train: Any, val: Any, seed: int) -> tuple[int, Callable[[int], None], Callable[[], float]]:
    """Return the number of steps, a function for one step, and one for the loss on all of `val`, of a recipe in configs/."""
    import dataclasses

    import torch

    from MyGPT import GPTModel, Trainer
    from MyGPT.commands._recipe import read_plan

    size, config, _ = read_plan(ROOT / "configs" / f"{recipe}.yaml")
    assert config is not None, "a recipe to train with"
    config = dataclasses.replace(config, seed=seed)
    torch.manual_seed(seed)
    model = GPTModel(dataclasses.replace(size, vocab_size=int(train.max()) + 1))
    trainer = Trainer(model, config, train, val, progress=False)
    trainer.setup()
    return config.max_steps, lambda number: trainer.step() and None, lambda: trainer.evaluate(whole=True)


def measure(program: str, text: str, seed: int) -> list[dict[str, Any]]:
    """Return the evaluations of a run: the step, the seconds of training so far, and the loss."""
    train, val = read_ids(text)
    n_steps, step, evaluate = nanogpt(train, val, seed) if program == BASELINE else mygpt(program, train, val, seed)
    seconds, evaluations = 0.0, []
    for number in range(n_steps):
        start = time.perf_counter()
        step(number)
        seconds += time.perf_counter() - start
        if (number + 1) * 10 % n_steps < 10:
            evaluations.append({"step": number + 1, "seconds": seconds, "loss": evaluate()})
    return evaluations


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="the file of tinyshakespeare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="shakespeare_char_quick", help="a file in configs/, without .yaml")
    parser.add_argument("--append", action="store_true", help="keep the other seeds in --out")
    options = parse(parser, measure)
    if options.text is None:
        parser.error("--text is needed: the file of tinyshakespeare")
    results = Results("time_to_quality")
    if options.append and options.out is not None and (options.out / "time_to_quality.json").exists():
        kept = Results.load(options.out / "time_to_quality.json")
        results.rows = [row for row in kept.rows if row.about["seed"] not in options.seeds]
    options.rounds = len(options.seeds)
    for turn in rounds(options):
        seed = options.seeds[turn - 1]
        for program in (BASELINE, options.recipe):
            evaluations = in_a_process(measure, program=program, text=options.text, seed=seed)
            for key, unit in (("step", "steps"), ("seconds", "s"), ("loss", "nats")):
                values = [evaluation[key] for evaluation in evaluations]
                results.add(program, f"{key} at each evaluation, seed {seed}", unit, *values, seed=seed)
            print(f"{program}, seed {seed}: {values[-1]:.4f} after {evaluations[-1]['seconds']:.1f} s", file=sys.stderr)
        results.save(options.out)
    show(results)


if __name__ == "__main__":
    main()
