"""Compare training steps of MyGPT, a loop like nanoGPT's, transformers and LitGPT: tokens per second and peak memory.

Usage: python benchmarks/training.py [--models small char 124m] [--precision fp32 bf16] [--rounds 3] [--steps 3] [--compiled]
       [--busy] [--programs MyGPT transformers] [--litgpt PYTHON] [--minutes 10] [--out DIR]

All programs train random weights on the same random batches with the model's dropout, AdamW, and gradients clipped to
norm 1. Each program runs in its own process, in turn. Its first step warms up and compiles. The limit of the machine is
the FLOP/s of the best matrix product of the model's own sizes that torch reaches through MKL or oneDNN, measured in
every round. Memory is the peak minus the memory of the imported libraries. bf16 is measured on CPUs with bf16
instructions. --busy is for a machine that runs other work: it uses one thread and measures CPU time instead of wall
time. The script writes training_MODEL.json to --out.

A program that is not installed is left out. LitGPT's requirements conflict with MyGPT's, so it needs its own
environment (pip install torch litgpt), whose Python --litgpt names. LitGPT has neither dropout nor learned positions,
which saves work, and pads the vocabulary to a multiple of 64.
"""

from __future__ import annotations

import argparse
import importlib.metadata
import importlib.util
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from measurements import Results, in_a_process, parse, rounds
from memory import Peak
from tables import show


@dataclass(frozen=True)
class Size:
    """The size of a trained model, and of a batch."""

    vocab_size: int
    context_length: int
    emb_dim: int
    n_heads: int
    n_layers: int
    drop_rate: float
    batch_size: int


MODELS = {
    "small": Size(50257, 256, 384, 6, 6, 0.1, 8),
    "char": Size(65, 64, 128, 4, 4, 0.0, 12),
    "124m": Size(50257, 1024, 768, 12, 12, 0.0, 1),
}


def ids_for(size: Size, steps: int) -> Any:
    """Return random tokens (steps, B, T + 1)."""
    import torch

    shape = (steps, size.batch_size, size.context_length + 1)
    return torch.randint(0, size.vocab_size, shape, generator=torch.Generator().manual_seed(1))


class FixedBatches:
    """The batches that MyGPT's Trainer asks for, from given tokens (steps, B, T + 1)."""

    def __init__(self, ids: Any) -> None:
        self.ids = ids

    def batch(self, step: int) -> tuple[Any, Any]:
        return self.ids[step, :, :-1], self.ids[step, :, 1:]


def mygpt_step(size: Size, ids: Any, precision: str, compiled: bool) -> Callable[[int], float]:
    from MyGPT import GPTModel, TrainConfig, Trainer

    fields = {name: value for name, value in vars(size).items() if name != "batch_size"}
    config = TrainConfig(
        max_steps=len(ids), batch_size=size.batch_size, precision=precision, compile=compiled, warmup_steps=0,
        schedule="constant",
    )  # fmt: skip
    # The exact GELU, which the loop like nanoGPT's and LitGPT use too.
    model = GPTModel({**fields, "qkv_bias": True, "activation": "gelu"})
    trainer = Trainer(model, config, FixedBatches(ids), progress=False)
    trainer.setup()
    return lambda step: trainer.step()["loss"]


def nanogpt_step(size: Size, ids: Any, precision: str, compiled: bool) -> Callable[[int], float]:
    """Return a step like nanoGPT's: all logits at once, plain cross-entropy, torch's default AdamW."""
    import torch
    import torch.nn.functional as F
    from torch import Tensor, nn

    C, H, p = size.emb_dim, size.n_heads, size.drop_rate

    class PlainBlock(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm1, self.norm2 = nn.LayerNorm(C), nn.LayerNorm(C)
            self.qkv, self.out = nn.Linear(C, 3 * C), nn.Linear(C, C)
            self.wide, self.narrow = nn.Linear(C, 4 * C), nn.Linear(4 * C, C)
            self.drop = nn.Dropout(p)

        def forward(self, x: Tensor) -> Tensor:
            B, T, _ = x.shape
            q, k, v = (part.view(B, T, H, C // H).transpose(1, 2) for part in self.qkv(self.norm1(x)).split(C, dim=2))
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=p, is_causal=True)
            x = x + self.drop(self.out(y.transpose(1, 2).contiguous().view(B, T, C)))
            return x + self.drop(self.narrow(F.gelu(self.wide(self.norm2(x)))))

    class PlainGPT(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.wte, self.wpe = nn.Embedding(size.vocab_size, C), nn.Embedding(size.context_length, C)
            self.blocks = nn.Sequential(*(PlainBlock() for _ in range(size.n_layers)))
            self.norm = nn.LayerNorm(C)
            for parameter in self.parameters():
                if parameter.dim() == 2:
                    nn.init.normal_(parameter, std=0.02)

        def forward(self, inputs: Tensor, targets: Tensor) -> Tensor:
            x = F.dropout(self.wte(inputs) + self.wpe(torch.arange(inputs.shape[1])), p)
            logits = F.linear(self.norm(self.blocks(x)), self.wte.weight)
            return F.cross_entropy(logits.view(-1, size.vocab_size), targets.reshape(-1), ignore_index=-1)

    return torch_step(PlainGPT(), ids, precision, compiled)


def transformers_step(size: Size, ids: Any, precision: str, compiled: bool) -> Callable[[int], float]:
    from transformers import GPT2Config, GPT2LMHeadModel

    p = size.drop_rate
    config = GPT2Config(
        vocab_size=size.vocab_size, n_positions=size.context_length, n_embd=size.emb_dim, n_head=size.n_heads,
        n_layer=size.n_layers, resid_pdrop=p, embd_pdrop=p, attn_pdrop=p, use_cache=False, bos_token_id=None,
        eos_token_id=None,
    )  # fmt: skip
    model = GPT2LMHeadModel(config)
    return torch_step(lambda x, y: model(input_ids=x, labels=x, shift_labels=y).loss, ids, precision, compiled, model)


def litgpt_step(size: Size, ids: Any, precision: str, compiled: bool) -> Callable[[int], float]:
    """Return a step of LitGPT with the loss of its own pretraining."""
    from litgpt import GPT, Config
    from litgpt.utils import chunked_cross_entropy

    config = Config(
        block_size=size.context_length, vocab_size=size.vocab_size, padding_multiple=64, n_layer=size.n_layers,
        n_head=size.n_heads, n_embd=size.emb_dim, rotary_percentage=0.0, norm_class_name="LayerNorm",
        mlp_class_name="GptNeoxMLP", bias=True, parallel_residual=False,
    )  # fmt: skip
    model = GPT(config)
    model.apply(model._init_weights)
    model.transformer.wte.weight = model.lm_head.weight  # LitGPT's pretraining ties them too
    return torch_step(lambda x, y: chunked_cross_entropy(model(x), y), ids, precision, compiled, model)


def torch_step(forward: Any, ids: Any, precision: str, compiled: bool, model: Any = None) -> Callable[[int], float]:
    """Return a step as it is usually written: autocast, backward, clipping, and AdamW with two parameter groups."""
    import torch

    model = (forward if model is None else model).train()
    parameters = list(model.parameters())
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": 0.1},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    optimizer = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.99))
    forward = torch.compile(forward) if compiled else forward

    def step(number: int) -> float:
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            loss = forward(ids[number, :, :-1], ids[number, :, 1:].contiguous())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return loss.item()

    return step


PROGRAMS = {"MyGPT": mygpt_step, "nanoGPT-style": nanogpt_step, "transformers": transformers_step,
            "LitGPT": litgpt_step}  # fmt: skip
PACKAGES = {"transformers": "transformers", "LitGPT": "litgpt"}
"""The package that a program needs besides torch."""


def clock_of(busy: bool) -> Callable[[], float]:
    """Return a clock of wall time or, on a busy machine, of the CPU time of one thread."""
    import torch

    if not busy:
        return time.perf_counter
    torch.set_num_threads(1)
    return time.process_time


def measure(program: str, model: str, precision: str, steps: int, busy: bool) -> dict[str, Any]:
    """Return the losses, the seconds of each step, and the peak bytes of a program in this process."""
    import torch

    clock = clock_of(busy)
    size = MODELS[model]
    name, _, compiled = program.partition(", ")
    make = PROGRAMS[name]
    ids = ids_for(size, steps + 1)
    torch.manual_seed(1)
    with Peak() as whole:
        step = make(size, ids, precision, bool(compiled))
        losses, seconds = [], []
        for number in range(steps + 1):
            start = clock()
            losses.append(step(number))
            seconds.append(clock() - start)
    return {"losses": losses, "seconds": seconds[1:], "first": seconds[0], "bytes": whole.n_bytes}


def ceiling(model: str, precision: str, busy: bool) -> dict[str, float]:
    """Return the best FLOP/s of each library over the matrix products of the model."""
    import torch
    import torch.nn.functional as F

    clock = clock_of(busy)
    size, found = MODELS[model], {}
    dtype = torch.bfloat16 if precision == "bf16" else torch.float32
    N, C = size.batch_size * size.context_length, size.emb_dim
    for width in (C, 3 * C, 4 * C):
        x, weight, transposed = (torch.randn(shape, dtype=dtype) for shape in ((N, C), (width, C), (C, width)))
        ways: dict[str, Callable[[], Any]] = {
            "linear": lambda x=x, w=weight: F.linear(x, w),
            "mm": lambda x=x, w=transposed: x @ w,
            "oneDNN": lambda x=x, w=weight: torch.ops.mkldnn._linear_pointwise(x, w, None, "none", [], ""),
        }
        for way, product in ways.items():
            times = []
            for _ in range(7):
                start = clock()
                product()
                times.append(clock() - start)
            found[way] = max(found.get(way, 0.0), 2 * N * C * width / statistics.median(times[1:]))
    return found


def compare(
    model: str, precision: str, programs: dict[str, str], options: argparse.Namespace, results: Results
) -> None:
    """Measure all rounds of a model and store them. `programs` maps names to the Python that runs them."""
    n_tokens = MODELS[model].batch_size * MODELS[model].context_length
    shared: dict[str, Any] = {"model": model, "precision": precision, "busy": options.busy}
    for peer in [program for program in programs if not program.startswith("MyGPT")]:
        for ours in [program for program in programs if program.startswith("MyGPT")]:
            results.compare(ours, peer, f"speed, {precision}")
    for _ in rounds(options, share=1 / len(options.models) / len(options.precision)):
        for way, flops in in_a_process(ceiling, **shared).items():
            results.add(way, f"products, {precision}", "FLOP/s", flops)
        for program, python in programs.items():
            run = in_a_process(measure, python, program=program, steps=options.steps, **shared)
            results.add(program, f"speed, {precision}", "tokens/s", *(n_tokens / second for second in run["seconds"]))
            results.add(program, f"memory, {precision}", "bytes", run["bytes"])
            results.add(program, f"first step, {precision}", "s", run["first"])
            if results.get(program, f"losses, {precision}") is None:
                results.add(program, f"losses, {precision}", "nats", *run["losses"])
            print(f"{program}: {statistics.median(run['seconds']):.3f} s per step", file=sys.stderr)
        results.save(options.out)


def flops_per_token(size: Size) -> int:
    import torch

    from MyGPT import GPTModel

    fields = {name: value for name, value in vars(size).items() if name != "batch_size"}
    with torch.device("meta"):
        return GPTModel({**fields, "qkv_bias": True}).estimate_flops()


def version(package: str) -> dict[str, str | None]:
    """Return the versions of a package and of the torch beside it, or None for both if the package is missing."""
    found = importlib.util.find_spec(package) is not None
    return {name: importlib.metadata.version(name) if found else None for name in (package, "torch")}


def installed(names: list[str], litgpt: str) -> tuple[dict[str, str], dict[str, str]]:
    """Return the installed programs with their Pythons, and the versions of their packages. Report the missing ones."""
    programs, versions = {}, {}
    for name in names:
        python = litgpt if name == "LitGPT" else sys.executable
        if name in PACKAGES:
            found = in_a_process(version, python, package=PACKAGES[name])
            if found[PACKAGES[name]] is None:
                print(f"{name} is left out: {PACKAGES[name]} is not installed", file=sys.stderr)
                continue
            versions[name] = f"{found[PACKAGES[name]]} with torch {found['torch']}"
        programs[name] = python
    return programs, versions


def has_bf16() -> bool:
    import torch

    return bool(torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--precision", nargs="+", choices=["fp32", "bf16"], default=["fp32", "bf16"])
    parser.add_argument("--steps", type=int, default=3)
    parser.add_argument("--compiled", action="store_true", help="also measure each program with torch.compile")
    parser.add_argument("--programs", nargs="+", choices=list(PROGRAMS), default=list(PROGRAMS))
    parser.add_argument("--litgpt", default=sys.executable, help="the path of a Python that has litgpt")
    parser.add_argument("--busy", action="store_true", help="use one thread and measure CPU time")
    options = parse(parser, measure, ceiling, version, rounds=3)
    if not has_bf16() and "bf16" in options.precision:
        print("bf16 is not measured: this CPU has no bf16 instructions", file=sys.stderr)
        options.precision.remove("bf16")
    programs, versions = installed(options.programs, options.litgpt)
    if options.compiled:
        programs |= {f"{program}, compiled": python for program, python in programs.items()}
    for model in options.models:
        size = MODELS[model]
        settings = {**vars(size), "flops_per_token": flops_per_token(size), "steps": options.steps}
        results = Results(f"training_{model}", {**settings, "busy": options.busy})
        results.versions |= versions
        for precision in options.precision:
            compare(model, precision, programs, options, results)
        show(results)


if __name__ == "__main__":
    main()
