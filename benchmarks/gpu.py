"""Measure and test MyGPT on a machine with a GPU, in about nine minutes.

    python benchmarks/gpu.py --out benchmarks/results            # all parts
    python benchmarks/gpu.py --out benchmarks/results --parts training decoding
    python benchmarks/gpu.py --out /tmp/toy --toy                # small models on any device: checks the script itself

The parts are:

environment  the GPU, the CPU, the packages, and the limits of the machine: memory bandwidth and matrix products
tests        tests/gpu with the marker gpu, then tests/acceleration, which runs the CPU kernel's own code for this CPU
training     a step of GPT-2 124M at context 1,024: MyGPT, a loop like nanoGPT's, transformers, all compiled
loss         the output head with its loss, which is a third of a step's arithmetic, in several variants
decoding     greedy generation with CUDA graphs, without them, and with transformers
kernel       the C++ kernel on this CPU with AVX2, AVX-512 and VNNI, and torch's bf16 products, which use AMX
sharding     FSDP2 on one device against none: losses, time and memory

Each part runs in its own process with a time limit, so that an error or a crash in one part loses no other results.
OUT/gpu.json is written after every part, together with OUT/gpu.md, the same as Markdown tables; OUT/gpu.log has all
output. The JSON is {"toy", "seconds", "parts", "verdicts"}. Each of "parts" has "status" (done, failed, stopped or skipped),
"message", "seconds" and "rows"; each row is one measurement. Each verdict has "question", "rule", "result" and "is_met".
The script needs torch and numpy; what needs transformers, pytest, hypothesis or a C++ compiler is left out without them.
"""

from __future__ import annotations

import argparse
import contextlib
import functools
import importlib.metadata
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import threading
import time
import xml.etree.ElementTree as ElementTree
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from measurements import cpu_facts, run_limited

ROOT = Path(__file__).resolve().parent.parent
MARK = "ROW "  # begins a line of a part's output that is a row in JSON
TOTAL_SECONDS = 540
LIMITS = {  # seconds
    "environment": 40, "tests": 120, "training": 210, "decoding": 120, "loss": 40, "kernel": 60, "sharding": 40,
}  # fmt: skip
PACKAGES = (
    "torch triton numpy transformers tokenizers tiktoken safetensors pytest hypothesis regex filelock tqdm jsonargparse"
)
DENSE_BF16 = {"H100 PCIe": 756e12, "H100": 989e12, "H200": 989e12, "A100": 312e12}
"""FLOP/s of bfloat16 matrix products without sparsity, by NVIDIA's data sheets. The first name that fits counts."""
TOY_SIZES = {"vocab_size": 515, "context_length": 64, "emb_dim": 64, "n_heads": 2, "n_layers": 2}
Row = dict[str, Any]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("gpu"), help="the directory for the results")
    parser.add_argument("--parts", nargs="+", choices=list(LIMITS), default=list(LIMITS))
    parser.add_argument("--seconds", type=float, default=TOTAL_SECONDS, help="limit of all parts together")
    parser.add_argument("--toy", action="store_true", help="small models on any device, to check the script")
    parser.add_argument("--part", choices=list(LIMITS), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.part:
        globals()[options.part](options.toy)
        return
    options.out.mkdir(parents=True, exist_ok=True)
    began, found, lock = time.monotonic(), {}, threading.Lock()
    with open(options.out / "gpu.log", "w", encoding="utf-8") as log:

        def work(name: str) -> None:
            command = [
                sys.executable,
                str(Path(__file__).resolve()),
                "--part",
                name,
                *(["--toy"] if options.toy else []),
            ]
            seconds = time.monotonic() - began
            print(f"[{seconds:4.0f} s] {name}", flush=True)
            part = run_part(command, 600 if options.toy else min(LIMITS[name], options.seconds - seconds), log)
            with lock:
                found[name], seconds = part, time.monotonic() - began
                print(f"[{seconds:4.0f} s] {name}: {part['status']} {part['message']}", flush=True)
                save(options, seconds, {name: found[name] for name in options.parts if name in found})

        if options.toy:  # its times do not matter
            with ThreadPoolExecutor(2) as pool:
                list(pool.map(work, options.parts))
        else:
            for name in options.parts:
                work(name)
    print((options.out / "gpu.md").read_text(encoding="utf-8"))


def save(options: argparse.Namespace, seconds: float, parts: dict[str, Any]) -> None:
    results = {"toy": options.toy, "seconds": seconds, "parts": parts, "verdicts": verdicts(parts)}
    (options.out / "gpu.json").write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")
    (options.out / "gpu.md").write_text(markdown(results), encoding="utf-8")


def run_part(command: list[str], seconds: float, log: Any) -> dict[str, Any]:
    """Run a part for at most `seconds`, write its output to `log`, and return its status, message, time and rows."""
    if seconds < 5 and "--part" in command:
        return {"status": "skipped", "message": "no time was left", "seconds": 0.0, "rows": []}
    paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "HF_HUB_OFFLINE": "1", "PYTHONUNBUFFERED": "1"}
    began, rows, others = time.monotonic(), [], [""]

    def read(line: str) -> None:
        log.write(line)
        log.flush()
        if line.startswith(MARK):
            rows.append(json.loads(line.removeprefix(MARK)))
            print(f"         {format_row(rows[-1])}", flush=True)
        elif line.strip():
            others.append(line.strip())

    status, is_stopped = run_limited(command, seconds, read, environment)
    result = {"status": "done", "message": "", "seconds": time.monotonic() - began, "rows": rows}
    if is_stopped:
        result |= {"status": "stopped", "message": f"after the limit of {seconds:.0f} seconds"}
    elif status == SKIPPED:
        result |= {"status": "skipped", "message": others[-1]}
    elif status:
        result |= {"status": "failed", "message": f"with status {status}: {others[-1]}"}
    return result


# What the parts share. Each part is a function of the same name, which runs in its own process.

SKIPPED = 77  # the exit status of a part that cannot run here


def emit(**row: Any) -> None:
    print(MARK + json.dumps(row), flush=True)


def skip(reason: str) -> None:
    print(reason)
    raise SystemExit(SKIPPED)


def has(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


def the_device(toy: bool) -> Any:
    import torch

    if not torch.cuda.is_available() and not toy:
        skip("no GPU was found; --toy checks the script on the CPU")
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def synchronize() -> None:
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def milliseconds(work: Callable[[], Any], n: int = 10) -> float:
    """Return the median milliseconds of n calls after three calls to warm up, each with the work that a GPU does."""
    times = []
    for _ in range(n + 3):
        synchronize()
        began = time.perf_counter()
        work()
        synchronize()
        times.append(1000 * (time.perf_counter() - began))
    return statistics.median(times[3:])


def product_flops(device: Any, dtype: Any, toy: bool) -> float:
    """Return the FLOP/s of products of square matrices with random entries."""
    import torch

    n = 256 if toy else 8192 if device.type == "cuda" else 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    return 2 * n**3 / milliseconds(lambda: a @ b) * 1000


def bandwidths(device: Any, toy: bool) -> tuple[float, float]:
    """Return the bytes per second of a sum, which reads, and of a copy, which reads and writes, of a tensor beyond any cache."""
    import torch

    x = torch.randn((1 << 20) if toy else (1 << 30) if device.type == "cuda" else (1 << 28), device=device)
    y, n_bytes = torch.empty_like(x), 4 * x.numel()
    return 1000 * n_bytes / milliseconds(x.sum), 2000 * n_bytes / milliseconds(lambda: y.copy_(x))


def gpt2(toy: bool, **changes: Any) -> Any:
    """Return the config of GPT-2 124M without dropout, or of the toy model."""
    from MyGPT import GPTConfig

    return GPTConfig(**{**(TOY_SIZES if toy else {}), "drop_rate": 0.0, "qkv_bias": True, **changes})


def transformers_model(config: Any) -> Any:
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(GPT2Config(**{k: v for k, v in config.to_dict().items() if k != "architectures"}))
    model.generation_config.eos_token_id = None
    return model


def one_line(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"


def take_turns(
    programs: dict[str, Callable[[], Callable[[], Any]]], n_tokens: int, repeat: int, rounds: int
) -> Iterator[Row]:
    """Yield a row for every program: the median speed of several rounds, in which the programs take turns.

    Each of `programs` is a function that prepares a program and returns the function to measure, which processes n_tokens
    tokens. A program that raises an error becomes a row with this error.
    """
    import torch

    ready, firsts, speeds, bytes_used = {}, {}, {}, {}
    for name, prepare in programs.items():
        began = time.perf_counter()
        try:
            ready[name] = prepare()
            ready[name]()
            synchronize()
            firsts[name] = time.perf_counter() - began
            ready[name]()
        except Exception as error:  # of another library, or too little memory: the other programs are still measured
            ready.pop(name, None)
            yield {"program": name, "error": one_line(error)}
        else:
            print(f"{name} took {firsts[name]:.1f} s to prepare")
    for _ in range(rounds):
        for name, program in ready.items():
            synchronize()
            if torch.cuda.is_available():
                torch.cuda.reset_peak_memory_stats()
                before = torch.cuda.memory_allocated()
            began = time.perf_counter()
            for _ in range(repeat):
                program()
            synchronize()
            speeds.setdefault(name, []).append(n_tokens * repeat / (time.perf_counter() - began))
            if torch.cuda.is_available():
                bytes_used[name] = torch.cuda.max_memory_allocated() - before
    for name, values in speeds.items():
        yield {
            "program": name, "tokens_per_second": statistics.median(values), "lowest": min(values), "highest": max(values),
            "first_seconds": firsts[name], "temporary_gb": bytes_used.get(name, 0) / 1e9,
        }  # fmt: skip


# The parts


def environment(toy: bool) -> None:
    import torch

    if smi := run_quietly("nvidia-smi", "--query-gpu=name,driver_version,memory.total,power.limit,clocks.max.sm,clocks.max.mem",
                          "--format=csv,noheader"):  # fmt: skip
        emit(fact="nvidia-smi", value=smi)
    has_gpu = torch.cuda.is_available()
    emit(fact="device", value=torch.cuda.get_device_name() if has_gpu else "cpu")
    if has_gpu:
        about = torch.cuda.get_device_properties(0)
        value = f"{about.multi_processor_count} multiprocessors, {about.total_memory / 1e9:.0f} GB, {about.major}.{about.minor}"
        emit(fact="GPU", value=f"{value}; CUDA {torch.version.cuda}, cuDNN {torch.backends.cudnn.version()}")
    cpu = cpu_facts()
    emit(fact="CPU", value=f"{cpu.get('model name', platform.processor())}, {os.cpu_count()} cores")
    flags = [flag for flag in cpu.get("flags", "").split() if flag.startswith(("avx", "amx"))]
    emit(fact="instructions", value=" ".join(flags))
    emit(fact="compiler", value=(run_quietly("c++", "--version") or "none").splitlines()[0])
    emit(fact="system", value=f"Python {platform.python_version()}, {platform.platform()}")
    found, missing = [], []
    for package in PACKAGES.split():
        try:
            found.append(f"{package} {importlib.metadata.version(package)}")
        except importlib.metadata.PackageNotFoundError:
            missing.append(package)
    emit(fact="packages", value=", ".join(found))
    emit(fact="missing packages", value=", ".join(missing) or "none")
    for device in [torch.device("cpu"), *([torch.device("cuda")] if has_gpu else [])]:
        read, copied = bandwidths(device, toy)
        emit(limit=f"{device.type}, reading memory", GB_per_second=read / 1e9)
        emit(limit=f"{device.type}, copying memory", GB_per_second=copied / 1e9)
        for name, dtype in (("bf16", torch.bfloat16), ("fp32", torch.float32)):
            # Without its own instructions, a CPU needs minutes for bf16.
            if device.type == "cuda" or name == "fp32" or toy or any("bf16" in flag for flag in flags):
                emit(limit=f"{device.type}, {name} products", TFLOP_per_second=product_flops(device, dtype, toy) / 1e12)
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = True
            speed = product_flops(device, torch.float32, toy)
            emit(limit="cuda, tf32 products", TFLOP_per_second=speed / 1e12)


def run_quietly(*command: str) -> str:
    """Return the output of a command, or an empty string if it cannot be run."""
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.strip()
    except (OSError, subprocess.SubprocessError):
        return ""


@functools.cache
def tests(toy: bool) -> None:
    if not has("pytest"):
        skip("pytest is not installed")
    workers = ["-n", "8"] if has("xdist") else []
    runs = {"tests/gpu": ["-k", "fused and dtype0"] if toy else ["-m", "gpu"]}
    if has("hypothesis") and not toy:
        # These run the CPU kernel as it is compiled for this CPU.
        runs |= {f"tests/acceleration/{name}.py": workers for name in ("test_step", "test_linear", "test_operators")}
    n_failed = 0
    for place, options in runs.items():
        began = time.perf_counter()
        with tempfile.TemporaryDirectory() as temporary:
            report = Path(temporary) / "report.xml"
            # Another version of torch may warn of other things, so warnings are no errors here.
            command = f"-m pytest {place} -q --tb=short -W default -p no:cacheprovider --junitxml={report}".split()
            subprocess.run([sys.executable, *command, *options], cwd=ROOT, check=False)
            if not report.is_file():
                raise SystemExit(f"pytest {place} wrote no report")
            cases = list(ElementTree.parse(report).iter("testcase"))
        kinds = {
            kind: [case for case in cases if case.find(kind) is not None] for kind in ("failure", "error", "skipped")
        }
        failed, n_skipped = kinds["failure"] + kinds["error"], len(kinds["skipped"])
        emit(
            tests=place, passed=len(cases) - len(failed) - n_skipped, failed=len(failed), skipped=n_skipped,
            seconds=time.perf_counter() - began,
        )  # fmt: skip
        for case in failed:
            emit(failed_test=f"{place}: {case.get('name')}", message=(case[0].get("message") or "")[:500])
        n_failed += len(failed)
    if n_failed:
        raise SystemExit(f"{n_failed} tests failed")


def training(toy: bool) -> None:
    """Measure an AdamW step under bf16 autocast. nanoGPT rounds the vocabulary up to 50,304, as its variant does here."""
    import torch

    device = the_device(toy)
    config = gpt2(toy)
    rounded = gpt2(toy, vocab_size=-(-config.vocab_size // 64) * 64)
    memory = torch.cuda.get_device_properties(0).total_memory if device.type == "cuda" else 0
    B, T = 2 if toy else 32 if memory > 60e9 else 16 if memory > 30e9 else 4, config.context_length
    compiled = device.type == "cuda"
    programs: dict[str, Callable[[], Callable[[], Any]]] = {
        "MyGPT": lambda: our_step(config, B, device, compiled),
        "MyGPT, only blocks compiled": lambda: our_step(
            config, B, device, compiled, lambda model: [block.compile() for block in model.transformer.h], loss=False
        ),
        "MyGPT, all layers compiled together": lambda: our_step(
            config, B, device, compiled, lambda model: model.transformer.compile()
        ),
        "MyGPT, not compiled": lambda: our_step(config, B, device, False),
        f"loop like nanoGPT's, {rounded.vocab_size:,} tokens": lambda: plain_step(rounded, False, B, device, compiled),
    }
    if has("transformers") and not toy:  # the toy of decoding imports it, which takes a while
        programs["transformers"] = lambda: plain_step(config, True, B, device, compiled)
    with torch.device("meta"):
        from MyGPT import GPTModel

        flops = GPTModel(config).estimate_flops(T)
    ceiling = product_flops(device, torch.bfloat16, toy)
    gpu = torch.cuda.get_device_name() if compiled else ""
    peak = next((peak for name, peak in DENSE_BF16.items() if name in gpu), None)
    for row in take_turns(programs, B * T, *((1, 2) if toy else (6, 5))):
        if "error" not in row:
            row |= {"batch": f"{B} x {T}", "of_ceiling": row["tokens_per_second"] * flops / ceiling}
            row |= {"of_data_sheet": row["tokens_per_second"] * flops / peak} if peak else {}
        emit(**row)


def our_step(
    config: Any,
    B: int,
    device: Any,
    compiled: bool,
    compile_parts: Callable[[Any], Any] | None = None,
    loss: bool = True,
) -> Callable[[], Any]:
    """Return a step of MyGPT's Trainer, which also reads its batch.

    If `compile_parts` is given, it compiles parts of the model in place of the Trainer, and `loss` chooses a compiled loss.
    """
    import numpy as np

    from MyGPT import GPTModel, TrainConfig, Trainer
    from MyGPT.loss import compiled_loss

    n = 100 * B * config.context_length + 1
    ids = np.random.default_rng(0).integers(0, config.vocab_size, n).astype(np.uint16)
    is_usual = compile_parts is None
    settings = TrainConfig(
        max_steps=10**6, batch_size=B, precision="bf16", compile=compiled and is_usual, learning_rate=6e-4
    )
    trainer = Trainer(GPTModel(config), settings, ids, device=device, progress=False)
    trainer.setup()
    if compile_parts is not None and compiled:
        compile_parts(trainer.model)

    def step() -> None:
        with contextlib.nullcontext() if is_usual or not (loss and compiled) else compiled_loss():
            trainer.step()

    return step


def plain_step(config: Any, is_transformers: bool, B: int, device: Any, compiled: bool) -> Callable[[], Any]:
    """Return a step like nanoGPT's: model and cross-entropy of all logits are compiled; clipping, and fused AdamW."""
    import torch
    import torch.nn.functional as F

    from MyGPT import GPTModel

    model: Any = (transformers_model(config) if is_transformers else GPTModel(config)).to(device).train()
    optimizer = torch.optim.AdamW(model.parameters(), lr=6e-4, betas=(0.9, 0.95), weight_decay=0.1, fused=True)
    x, y = (torch.randint(0, config.vocab_size, (B, config.context_length), device=device) for _ in range(2))

    def loss_of(x: Any, y: Any) -> Any:
        logits = model(x, use_cache=False).logits if is_transformers else model(x)
        return F.cross_entropy(logits.flatten(0, 1), y.flatten())

    forward = torch.compile(loss_of) if compiled else loss_of

    def step() -> None:
        with torch.autocast(device.type, torch.bfloat16):
            loss = forward(x, y)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def loss(toy: bool) -> None:
    """Measure the output head with its loss, forward and backward, under bf16 autocast as in training."""
    import torch
    import torch.nn.functional as F

    import MyGPT.loss as losses

    device = the_device(toy)
    N, C, V = (64, 32, 515) if toy else (16 * 1024, 768, 50257)
    rounded = -(-V // 64) * 64

    def whole(x: Any, weight: Any, targets: Any) -> Any:
        return F.cross_entropy(F.linear(x, weight).float(), targets, reduction="sum")

    def chunked(max_logits: int) -> Callable[..., Any]:
        def compute(*arguments: Any) -> Any:
            losses.MAX_GPU_LOGITS = max_logits
            return losses.linear_token_loss(*arguments)[0]

        return compute

    variants: dict[str, tuple[int, Callable[..., Any]]] = {
        f"MyGPT, {n >> 20} Mi logits at a time, {width:,} tokens": (width, chunked(n))
        for width in (V, rounded)
        for n in (1 << 24, 1 << 27, 1 << 29)
    }
    variants[f"torch, {rounded:,} tokens"] = rounded, whole
    if device.type == "cuda":
        variants[f"MyGPT, 128 Mi logits at a time, compiled, {V:,} tokens"] = V, torch.compile(chunked(1 << 27))
        variants[f"torch, compiled, {rounded:,} tokens"] = rounded, torch.compile(whole)
    ceiling = product_flops(device, torch.bfloat16, toy)
    for name, (width, compute) in variants.items():
        x = torch.randn(N, C, device=device, requires_grad=True)
        weight = (0.02 * torch.randn(width, C, device=device)).requires_grad_()
        targets = torch.randint(0, V, (N,), device=device)

        def work(compute: Any = compute, arguments: Any = (x, weight, targets)) -> None:
            with torch.autocast(device.type, torch.bfloat16):
                total = compute(*arguments)
            total.backward()
            arguments[0].grad = arguments[1].grad = None

        if device.type == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        try:
            took = milliseconds(work, 2 if toy else 10)
        except Exception as error:  # the compiler's, or too little memory: the other variants are still measured
            emit(loss=name, error=one_line(error))
            continue
        used = (torch.cuda.max_memory_allocated() - before) / 1e9 if device.type == "cuda" else 0.0
        emit(loss=name, milliseconds=took, of_ceiling=6 * N * C * V / took * 1000 / ceiling, temporary_gb=used)


def decoding(toy: bool) -> None:
    """Measure greedy generation in bf16 after a prompt of 32 tokens, and compare the ids with those of eager generation."""
    import torch
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from MyGPT import GPTModel, generate
    from MyGPT.acceleration.captured import CapturedModel

    device, config = the_device(toy), gpt2(toy)
    model = GPTModel(config).to(device, torch.bfloat16).eval()
    n_new = 4 if toy else 256
    with torch.no_grad():
        read = bandwidths(device, toy)[0]
    weight_bytes = 2 * (model.num_parameters(exclude_embeddings=True) + model.transformer.wte.weight.numel())
    entry_bytes = 2 * 2 * config.n_layers * config.emb_dim  # keys and values of one token

    def captured(backend: Any = None) -> Callable[[Any], Any]:
        fast = CapturedModel(model)

        def run(ids: Any) -> Any:
            with contextlib.nullcontext() if backend is None else sdpa_kernel(backend):
                return generate(fast, ids, n_new)

        return run

    def replayed(B: int) -> Callable[[Any], Any]:
        """Replay the graph of the middle of the text, without choosing tokens: what the GPU itself needs for the passes."""
        fast = CapturedModel(model)
        generate(fast, torch.zeros(B, 32, dtype=torch.int64, device=device), n_new)
        graphs = list(fast._idle.graphs.values()) if fast._idle else []

        def run(ids: Any) -> None:
            for _ in range(n_new):
                graphs[len(graphs) // 2].replay()

        return run

    theirs = transformers_model(config).to(device, torch.bfloat16).eval() if has("transformers") else None

    def transformers(ids: Any, **options: Any) -> Any:
        return theirs.generate(
            ids, attention_mask=torch.ones_like(ids), min_new_tokens=n_new, max_new_tokens=n_new, do_sample=False,
            pad_token_id=0, **options,
        )  # fmt: skip

    runs: dict[str, Callable[[], Callable[[Any], Any]]] = {
        "MyGPT, captured": captured,
        "MyGPT, eager": lambda: lambda ids: generate(model, ids, n_new),
        "MyGPT, captured, math attention": lambda: captured(SDPBackend.MATH),
    }
    if theirs is not None:
        runs["transformers"] = lambda: transformers
    static = {"transformers, static cache": lambda: functools.partial(transformers, cache_implementation="static")}
    # With a static cache transformers compiles its model, which takes a minute, so everything else is measured first.
    for programs in (runs, static if theirs is not None else {}):
        for B in (1, 64):
            if device.type == "cuda" and programs is runs:
                programs["graph replay alone"] = functools.partial(replayed, B)
            ids = torch.randint(0, config.vocab_size, (B, 32), device=device)
            expected = generate(model, ids, n_new)
            equal: dict[str, float] = {}

            def prepared(
                name: str, prepare: Any, ids: Any = ids, expected: Any = expected, equal: Any = equal
            ) -> Callable[[], Any]:
                run = prepare()
                if name.startswith("MyGPT"):
                    equal[name] = float((run(ids) == expected)[:, 32:].float().mean())
                return lambda: run(ids)

            ready = {name: functools.partial(prepared, name, prepare) for name, prepare in programs.items()}
            limit = B * read / (weight_bytes + B * entry_bytes * (32 + n_new / 2))
            for row in take_turns(ready, B * n_new, 1, 1 if toy else 3):
                row |= {"sequences": B}
                if "error" not in row:
                    row |= {"of_bandwidth": row["tokens_per_second"] / limit}
                    row |= {"equal_ids": equal[row["program"]]} if row["program"] in equal else {}
                emit(**row)


def kernel(toy: bool) -> None:
    """Run the C++ kernel on the CPU, compiled for several instruction sets: its errors against float64, and its speed."""
    import torch

    import MyGPT.acceleration.kernel as c
    from MyGPT import GPTModel, generate
    from MyGPT.acceleration import compiler
    from MyGPT.acceleration.step import accelerate
    from MyGPT.commands.bench import read_bandwidth, seconds_per_token

    if compiler.find_compiler() is None:
        skip("there is no C++ compiler")
    flags = cpu_facts().get("flags", "").split()
    sets = {"native": "-march=native"}
    if not toy:
        sets["AVX2"] = "-march=haswell"
    if "avx512f" in flags and not toy:
        sets["AVX-512 without VNNI"] = "-march=skylake-avx512"
    torch.manual_seed(1)
    model, n_new = GPTModel(gpt2(toy)).eval(), 4 if toy else 32
    generator = torch.Generator().manual_seed(1)
    ids = torch.randint(0, model.config.vocab_size, (8, 16), generator=generator)
    n_read = model.num_parameters(exclude_embeddings=True) + model.transformer.wte.weight.numel()
    bandwidth = read_bandwidth(1 << 20 if toy else 1 << 30)
    exact = {precision: exact_logits(model, precision, ids[:2]) for precision in ("fp32", "bf16", "int8")}

    def measure_kernel(name: str, lanes: int, fast: Any, precision: str) -> None:
        # The kernel sums in float32 (1e-7 per sum) and rounds activations to 16 bits for int8.
        largest = 5e-2 if not lanes and precision != "fp32" else 1e-3 if precision == "int8" else 1e-5
        limit = bandwidth / (n_read * {"fp32": 4, "bf16": 2, "int8": 1}[precision])
        logits = fast(ids[:2], cache=fast.new_cache(2))
        error = (logits.double() - exact[precision]).norm() / exact[precision].norm()
        one, eight = (
            statistics.median(seconds_per_token(lambda *run: generate(fast, *run), rows, n_new) for _ in range(3))
            for rows in (ids[:1], ids)
        )
        emit(
            kernel=name, precision=precision, floats_per_register=lanes, error=float(error), largest_error=largest,
            tokens_per_second=1 / one, of_bandwidth=1 / one / limit, tokens_per_second_of_8=8 / eight,
        )  # fmt: skip

    for name, march in sets.items():
        compiler.FLAGS = tuple(march if flag.startswith("-march") else flag for flag in compiler.FLAGS)
        build = c.Build()
        lanes = build.wait().panel // 3
        for precision in exact:
            fast = accelerate(model, precision, build=build, compiled=True)  # type: ignore[arg-type]
            measure_kernel(name, lanes, fast, precision)
    # torch's operators, which round activations to bf16, use AMX where the CPU has it. Others would need minutes for bf16.
    for precision in exact:
        if toy or precision != "bf16" or any("bf16" in flag for flag in flags):
            with torch.no_grad():
                measure_kernel("torch's operators", 0, accelerate(model, precision, compiled=False), precision)  # type: ignore[arg-type]
    cpu_training(toy, flags)


def exact_logits(model: Any, precision: str, ids: Any) -> Any:
    """Return the logits in float64 of the model with its matrices rounded to `precision` by torch's own conversions."""
    import copy

    import torch

    narrow = copy.deepcopy(model).double()
    with torch.no_grad():
        for name, parameter in narrow.named_parameters():
            if parameter.dim() != 2 or name.endswith("wpe.weight") or precision == "fp32":
                continue
            if precision == "bf16":
                parameter.copy_(parameter.bfloat16())
            else:
                scales, zeros = (parameter.abs().amax(1) / 127).float(), torch.zeros(len(parameter), dtype=torch.int32)
                parameter.copy_(torch.fake_quantize_per_channel_affine(parameter.float(), scales, zeros, 0, -127, 127))
        return narrow(ids)


def cpu_training(toy: bool, flags: list[str]) -> None:
    """Measure a training step on the CPU in float32 and, where the CPU has instructions for it, in bf16 (AMX or AVX-512)."""
    import numpy as np
    import torch

    from MyGPT import GPTModel, TrainConfig, Trainer

    size = {} if toy else {"context_length": 256, "n_layers": 4}
    precisions = ["fp32", "bf16"] if toy or any("bf16" in flag for flag in flags) else ["fp32"]
    for precision in precisions:
        torch.manual_seed(1)
        config = gpt2(toy, **size)
        ids = np.random.default_rng(0).integers(0, config.vocab_size, 20_000).astype(np.uint16)
        settings = TrainConfig(max_steps=100, batch_size=4, precision=precision)  # type: ignore[arg-type]
        with Trainer(GPTModel(config), settings, ids, progress=False) as trainer:
            losses, times = [], []
            for _ in range(2 if toy else 4):
                began = time.perf_counter()
                losses.append(trainer.step()["loss"])
                times.append(time.perf_counter() - began)
        emit(
            cpu_training=precision, tokens_per_second=4 * config.context_length / min(times[1:]), first_loss=losses[0],
            last_loss=losses[-1],
        )  # fmt: skip


def sharding(toy: bool) -> None:
    """Train the same batches without and with FSDP2 on one device: losses, time of a step, and peak memory."""
    import numpy as np
    import torch

    from MyGPT import GPTModel, TrainConfig, Trainer

    device, config, B = the_device(toy), gpt2(toy), 2 if toy else 16
    ids = np.random.default_rng(0).integers(0, config.vocab_size, 50 * B * config.context_length).astype(np.uint16)
    for parallel in ("none", "fsdp"):
        torch.manual_seed(1)
        if device.type == "cuda":
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        settings = TrainConfig(batch_size=B, precision="bf16", compile=device.type == "cuda", parallel=parallel)  # type: ignore[arg-type]
        with Trainer(GPTModel(config), settings, ids, device=device, progress=False) as trainer:
            losses: list[float] = []
            took = milliseconds(
                lambda trainer=trainer, losses=losses: losses.append(trainer.step()["loss"]), 2 if toy else 20
            )
        peak = torch.cuda.max_memory_allocated() / 1e9 if device.type == "cuda" else 0.0
        emit(parallel=parallel, milliseconds=took, peak_gb=peak, first_loss=losses[0], last_loss=losses[-1])
        del trainer


# The summary


def verdicts(parts: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the answer to each question that the finished parts can answer."""
    found: list[dict[str, Any]] = []

    def add(question: str, rule: str, result: str, is_met: bool) -> None:
        found.append({"question": question, "rule": rule, "result": result, "is_met": is_met})

    rows = {name: part["rows"] for name, part in parts.items()}
    counts = [row for row in rows.get("tests", ()) if "tests" in row]
    if counts:
        passed, failed = (sum(row[kind] for row in counts) for kind in ("passed", "failed"))
        add("Do the tests pass?", "none fails", f"{passed} passed, {failed} failed", failed == 0 and passed > 0)
    speeds = {row["program"]: row for row in rows.get("training", ()) if "tokens_per_second" in row}
    if "of_data_sheet" in speeds.get("MyGPT", {}):
        share = speeds["MyGPT"]["of_data_sheet"]
        add("Does training use the GPU well?", "MFU of at least 50%", f"{share:.0%}", share >= 0.5)
    peers = [row["tokens_per_second"] for name, row in speeds.items() if not name.startswith("MyGPT")]
    if peers and "MyGPT" in speeds:
        ratio = speeds["MyGPT"]["tokens_per_second"] / max(peers)
        add("Is a training step as fast as the fastest peer's?", "at least 0.95", f"{ratio:.2f}", ratio >= 0.95)
    speed = {(row["program"], row["sequences"]): row["tokens_per_second"]
             for row in rows.get("decoding", ()) if "tokens_per_second" in row}  # fmt: skip
    ratios = {
        (peer, B): speed["MyGPT, captured", B] / speed[peer, B]
        for peer, B in speed
        if not peer.startswith("MyGPT, captured") and ("MyGPT, captured", B) in speed
    }
    for B in (1, 64):
        if ("transformers", B) in ratios:
            ratio = ratios["transformers", B]
            add(
                f"Is generation of {'one sequence' if B == 1 else f'{B} sequences'} faster than with transformers?",
                "at least 3 times",
                f"{ratio:.1f}",
                ratio >= 3,
            )
    if ("MyGPT, eager", 1) in ratios and ("MyGPT, eager", 64) in ratios:
        one, many = ratios["MyGPT, eager", 1], ratios["MyGPT, eager", 64]
        wrong = [row["failed_test"] for row in rows.get("tests", ()) if "captured" in row.get("failed_test", "")]
        add(
            "Does captured.py stay?",
            "against eager: at least 1.5 for one sequence and 0.95 for 64; its tests pass",
            f"{one:.2f} and {many:.2f}; {len(wrong)} of its tests failed",
            one >= 1.5 and many >= 0.95 and not wrong,
        )
    errors = [row for row in rows.get("kernel", ()) if "largest_error" in row]
    if errors:
        worst = max(errors, key=lambda row: row["error"] / row["largest_error"])
        result = f"{worst['error']:.1e} of {worst['largest_error']:.0e} ({worst['kernel']}, {worst['precision']})"
        is_met = worst["error"] <= worst["largest_error"]
        add("Is the CPU kernel right on this CPU?", "errors against float64 within bounds", result, is_met)
    sharded = {row["parallel"]: row for row in rows.get("sharding", ())}
    if len(sharded) == 2:
        difference = abs(sharded["fsdp"]["first_loss"] / sharded["none"]["first_loss"] - 1)
        ratio = sharded["fsdp"]["milliseconds"] / sharded["none"]["milliseconds"]
        result = f"{difference:.0e}, {ratio:.2f} times the time"
        add("Does FSDP2 on one device change the loss?", "by at most 1e-6", result, difference <= 1e-6)
    return found


def markdown(results: dict[str, Any]) -> str:
    """Return the results as Markdown: the verdicts, then each part with one table per kind of row."""
    toy = " (toy sizes: these figures mean nothing)" if results["toy"] else ""
    text = f"## GPU{toy}\nThe command is `python benchmarks/gpu.py`; it took {results['seconds']:.0f} seconds.\n\n"
    text += table([{**row, "is_met": "yes" if row["is_met"] else "no"} for row in results["verdicts"]])
    for name, part in results["parts"].items():
        note = "" if part["status"] == "done" else f" ({part['status']} {part['message']})"
        text += f"### {name.capitalize()}{note}\n"
        groups: dict[str, list[Row]] = {}  # by the name of the first column, and of the second one for limits
        for row in part["rows"]:
            groups.setdefault(" ".join(list(row)[: 2 if "limit" in row else 1]), []).append(row)
        text += "".join(table(rows) for rows in groups.values())
    return text


def table(rows: list[Row]) -> str:
    if not rows:
        return "\n"
    names = list(dict.fromkeys(name for row in rows for name in row))
    lines = [
        [name.replace("_", " ").replace("of ", "share of ", name.startswith("of_")) for name in names],
        ["---"] * len(names),
    ]
    lines += [[format_value(name, row.get(name, "")).replace("|", "/") for name in names] for row in rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines) + "\n"


def format_value(name: str, value: Any) -> str:
    if not isinstance(value, float):
        return str(value)
    if name.startswith(("of_", "equal_")):
        return f"{value:.0%}"
    return (
        f"{value:.1e}"
        if 0 < abs(value) < 1e-3
        else f"{value:,.4f}"
        if "loss" in name
        else f"{value:,.{1 if value >= 10 else 2}f}"
    )


def format_row(row: Row) -> str:
    return ", ".join(f"{name} {format_value(name, value)}" for name, value in row.items())


if __name__ == "__main__":
    main()
