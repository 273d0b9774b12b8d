"""Measure the training time until a given loss on tinyshakespeare's characters, for nanoGPT's CPU recipe and one of MyGPT's.

Usage: python benchmarks/time_to_quality.py --text FILE [--seeds 1 2 3] [--recipe shakespeare_char_quick] [--out FILE] [--append]

nanoGPT's recipe is reimplemented here without MyGPT: 4 layers, 4 heads, width 128, no biases, context 64, random
windows, batch size 12, and 2,000 steps of AdamW with a learning rate from 1e-3 to 1e-4 along a cosine. The other recipe
is a file in configs/, trained by MyGPT's Trainer. The two run in turn, seed by seed, each run in its own process.

The time counts the steps, including making the batches. It does not count starting, reading the text, or the
evaluations. The loss is measured on the whole validation set (the last tenth of the text) after every tenth of a run.
The target is 1.88, which nanoGPT publishes, or the mean of the baseline's last losses if that is lower. A baseline that
ends above the target counts as if its last step had reached it. --append adds seeds to those in FILE, so that a long
measurement can be split.
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from training import machine

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "time_to_quality.json"
PUBLISHED = 1.88
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


def measure(program: str, text: str, seed: int) -> dict[str, Any]:
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
    return {"program": program, "seed": seed, "evaluations": evaluations}


def in_a_process(program: str, text: str, seed: int) -> dict[str, Any]:
    command = [sys.executable, str(Path(__file__)), "--child", json.dumps([program, text, seed])]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{program} of seed {seed} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def reached(run: dict[str, Any], target: float) -> dict[str, Any] | None:
    """Return the first evaluation at or below the target."""
    return next((evaluation for evaluation in run["evaluations"] if evaluation["loss"] <= target), None)


def print_table(runs: list[dict[str, Any]]) -> None:
    baselines = {run["seed"]: run for run in runs if run["program"] == BASELINE}
    ours = {run["seed"]: run for run in runs if run["program"] != BASELINE}
    target = min(PUBLISHED, statistics.mean(run["evaluations"][-1]["loss"] for run in baselines.values()))
    print(f"\ntarget: {target:.4f} nats per character over the whole validation set")
    print(f"{'program':<24} {'seed':>4} {'last loss':>9} {'reached at step':>15} {'seconds':>8} {'ratio':>6}")
    ratios = []
    for seed, baseline in sorted(baselines.items()):
        until = reached(baseline, target) or baseline["evaluations"][-1]
        for run in (baseline, ours[seed]):
            at, last = reached(run, target), run["evaluations"][-1]
            step, seconds, ratio = "never", last["seconds"], ""
            if at is not None:
                step, seconds = at["step"], at["seconds"]
            if run is not baseline and at is not None:
                ratios.append(until["seconds"] / seconds)
                ratio = f"{ratios[-1]:.2f}"
            print(f"{run['program']:<24} {seed:>4} {last['loss']:>9.4f} {step:>15} {seconds:>8.1f} {ratio:>6}")
    if ratios:
        n_of = f"{len(ratios)} of {len(baselines)} seeds reached it"
        print(f"{n_of}; ratio, median {statistics.median(ratios):.2f}, lowest {min(ratios):.2f}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--text", help="the file of tinyshakespeare")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--recipe", default="shakespeare_char_quick", help="a file in configs/, without .yaml")
    parser.add_argument("--out", type=Path, default=RESULTS)
    parser.add_argument("--append", action="store_true", help="keep the other seeds in --out")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.child:
        print(json.dumps(measure(*json.loads(options.child))))
        return
    if options.text is None:
        parser.error("--text is needed: the file of tinyshakespeare")
    runs = (
        json.loads(options.out.read_text(encoding="utf-8"))["runs"] if options.append and options.out.exists() else []
    )
    runs = [run for run in runs if run["seed"] not in options.seeds]
    for seed in options.seeds:
        for program in (BASELINE, options.recipe):
            runs.append(in_a_process(program, options.text, seed))
            last = runs[-1]["evaluations"][-1]
            print(f"{program}, seed {seed}: {last['loss']:.4f} after {last['seconds']:.1f} s", file=sys.stderr)
    options.out.parent.mkdir(exist_ok=True)
    written = json.dumps({"machine": machine(), "runs": runs}, indent=1) + "\n"
    options.out.write_text(written, encoding="utf-8")
    print_table(runs)


if __name__ == "__main__":
    main()
