"""Compare MyGPT on a GPU with a plain loop and transformers: training GPT-2 124M, and generating 1 and 64 sequences.

    python benchmarks/gpu.py [--out benchmarks/results/gpu.json]
    python benchmarks/gpu.py --toy          # a small model on any device, to check that the script runs

The programs run in turn within one process. The table shows the median, the spread and the ratio to MyGPT. The limits
of the machine are measured in the same run: bf16 FLOP/s and bytes read per second. The FLOPs of the model come from
`estimate_flops`.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from MyGPT import GPTConfig, GPTModel, TrainConfig, Trainer, generate
from MyGPT.acceleration.captured import CapturedModel

TOY = GPTConfig(vocab_size=512, context_length=64, emb_dim=64, n_heads=2, n_layers=2, drop_rate=0.0, qkv_bias=True)
FULL = GPTConfig(drop_rate=0.0, qkv_bias=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--batch_size", type=int, default=16, help="sequences per training step")
    parser.add_argument("--steps", type=int, default=10, help="training steps per round")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--new_tokens", type=int, default=256)
    parser.add_argument("--out", help="a JSON file for the table")
    options = parser.parse_args()
    if options.toy:
        options.batch_size, options.steps, options.rounds, options.new_tokens = 2, 2, 2, 8
    elif not torch.cuda.is_available():
        raise SystemExit("no GPU was found; use --toy to check that the script runs")
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    config = TOY if options.toy else FULL
    ceilings = {"bf16_flops": matmul_flops(device, options.toy), "read_bytes": read_bytes(device, options.toy)}
    rows = [*training(config, device, options), *decoding(config, device, options)]
    name = torch.cuda.get_device_name() if device.type == "cuda" else "cpu"
    print(f"{name}, torch {torch.__version__}; {ceilings['bf16_flops'] / 1e12:.1f} TFLOP/s in bf16, ", end="")
    print(f"{ceilings['read_bytes'] / 1e9:.0f} GB/s read from memory")
    flops = GPTModel(config).estimate_flops(config.context_length)
    n_bytes = 2 * sum(p.numel() for p in GPTModel(config).parameters())
    for row in rows:
        if row["what"] == "training":
            row["share of the ceiling"] = row["tokens/s"] * flops / ceilings["bf16_flops"]
        else:
            row["share of the ceiling"] = row["tokens/s"] / row["sequences"] * n_bytes / ceilings["read_bytes"]
        values = (f"{key} {value:,.2f}" if isinstance(value, float) else f"{value}" for key, value in row.items())
        print("  ".join(values))
    if options.out:
        Path(options.out).parent.mkdir(parents=True, exist_ok=True)
        content = {"device": name, "torch": str(torch.__version__), "options": vars(options), **ceilings, "rows": rows}
        Path(options.out).write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


def training(config: GPTConfig, device: torch.device, options: Any) -> list[dict[str, Any]]:
    """Measure a compiled AdamW step in bf16 autocast: MyGPT's Trainer, a plain loop like nanoGPT's, and transformers."""
    T, B = config.context_length, options.batch_size
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 100 * B * T + 1).astype(np.uint16)
    settings = TrainConfig(
        max_steps=10**6, batch_size=B, precision="bf16", compile=device.type == "cuda", learning_rate=6e-4
    )
    trainer = Trainer(GPTModel(config), settings, ids, device=device, progress=False)
    trainer.setup()
    batch = [tensor.to(device) for tensor in trainer.sampler.batch(0)]

    def ours() -> None:
        trainer.step()

    programs = {
        "MyGPT": ours,
        "plain loop like nanoGPT's": plain_step(GPTModel(config), lambda model, x: model(x), batch, device),
        "transformers": plain_step(transformers_model(config), lambda model, x: model(x).logits, batch, device),
    }
    return measure("training", programs, device, options.rounds, options.steps, B * T, B)


def plain_step(
    model: nn.Module, logits_of: Callable[[Any, Tensor], Tensor], batch: list[Tensor], device: torch.device
) -> Callable[[], None]:
    """Return a step like nanoGPT's: a compiled model, cross-entropy of all logits, backward, clipping and fused AdamW."""
    model.to(device).train()
    compiled: Any = torch.compile(model) if device.type == "cuda" else model
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    x, y = batch

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = F.cross_entropy(logits_of(compiled, x).flatten(0, 1), y.flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def decoding(config: GPTConfig, device: torch.device, options: Any) -> list[dict[str, Any]]:
    """Measure greedy generation in bf16 after 32 prompt tokens: captured, eager, and with transformers' generate."""
    model = GPTModel(config).to(device, torch.bfloat16).eval()
    captured, theirs = CapturedModel(model), transformers_model(config).to(device, torch.bfloat16).eval()
    rows = []
    for B in (1, 64):
        ids = torch.randint(0, config.vocab_size, (B, 32), device=device)

        def ours(ids: Tensor = ids, how: nn.Module = captured) -> None:
            generate(how, ids, options.new_tokens)

        def eager(ids: Tensor = ids) -> None:
            generate(model, ids, options.new_tokens)

        def transformers(ids: Tensor = ids) -> None:
            n = options.new_tokens
            theirs.generate(
                ids, attention_mask=torch.ones_like(ids), min_new_tokens=n, max_new_tokens=n, do_sample=False,
                pad_token_id=0,
            )  # fmt: skip

        programs = {"MyGPT, captured": ours, "MyGPT, eager": eager, "transformers": transformers}
        rows += measure(f"decoding, batch {B}", programs, device, options.rounds, 1, B * options.new_tokens, B)
    return rows


def transformers_model(config: GPTConfig) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    return GPT2LMHeadModel(GPT2Config(**{k: v for k, v in config.to_dict().items() if k != "architectures"}))


def measure(
    what: str,
    programs: dict[str, Callable[[], None]],
    device: torch.device,
    rounds: int,
    repeat: int,
    tokens: int,
    B: int,
) -> list[dict[str, Any]]:
    """Return rows with the tokens per second and the peak GPU memory of each program, measured in turn after a warm-up."""
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    speeds: dict[str, list[float]] = {name: [] for name in programs}
    peaks = dict.fromkeys(programs, 0)
    for program in programs.values():
        for _ in range(3):
            program()
    for _ in range(rounds):
        for name, program in programs.items():
            wait()
            if device.type == "cuda":
                torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            for _ in range(repeat):
                program()
            wait()
            speeds[name].append(tokens * repeat / (time.perf_counter() - began))
            if device.type == "cuda":
                peaks[name] = max(peaks[name], torch.cuda.max_memory_allocated())
    first = statistics.median(next(iter(speeds.values())))
    return [
        {
            "what": what,
            "program": name,
            "sequences": B,
            "tokens/s": statistics.median(values),
            "lowest": min(values),
            "highest": max(values),
            "MyGPT's speed over this": first / statistics.median(values),
            "peak GB": peaks[name] / 1e9,
        }
        for name, values in speeds.items()
    ]


def matmul_flops(device: torch.device, toy: bool) -> float:
    """Return the FLOP/s of the fastest of ten products of square bf16 matrices."""
    n = 256 if toy else 8192
    a = torch.randn(n, n, device=device, dtype=torch.bfloat16)
    return 2 * n**3 / best_seconds(lambda: a @ a, device)


def read_bytes(device: torch.device, toy: bool) -> float:
    """Return the bytes per second of the fastest of ten sums over more memory than any cache holds."""
    x = torch.ones((1 << 20) if toy else (1 << 30), device=device, dtype=torch.bfloat16)
    return x.numel() * 2 / best_seconds(lambda: x.sum(), device)


def best_seconds(function: Callable[[], Any], device: torch.device) -> float:
    wait: Callable[[], Any] = torch.cuda.synchronize if device.type == "cuda" else nullcontext
    best = float("inf")
    for _ in range(10):
        wait()
        began = time.perf_counter()
        function()
        wait()
        best = min(best, time.perf_counter() - began)
    return best


if __name__ == "__main__":
    main()
