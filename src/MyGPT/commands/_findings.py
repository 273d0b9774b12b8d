"""The checks of `mygpt doctor`: packages, speed, free space, and the training time of each recipe (YAML file of options).

Under torchrun, all ranks (processes) make the same calls, because they communicate and train together. Only rank 0
checks what does not depend on the others, such as the packages.
"""

from __future__ import annotations

import dataclasses
import glob
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import socket
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
import torch.distributed as dist

from MyGPT import ranks
from MyGPT.commands._memory import step_memory
from MyGPT.commands._recipe import read_plan
from MyGPT.config import GPT2_CONFIGS, GPTConfig
from MyGPT.costs import estimate_step_seconds, matmul_speed, median_seconds
from MyGPT.data.sources import BUILT_IN, DOWNLOADS
from MyGPT.data.tokens import is_prepared
from MyGPT.download import cache_directory
from MyGPT.messages import error_message
from MyGPT.model import GPTModel
from MyGPT.tokenizers import get_tokenizer
from MyGPT.training.arithmetic import autocast_dtype
from MyGPT.training.config import TrainConfig
from MyGPT.training.trainer import Trainer
from MyGPT.weights.released import FILES

OPTIONAL = {
    "peft": ("mygpt finetune", "finetune"),
    "matplotlib": ("pictures", "plots"),
    "huggingface_hub": ("models from the Hugging Face hub", "hub"),
    "tensorboard": ("--log_to tensorboard", "tensorboard"),
    "wandb": ("--log_to wandb", "wandb"),
    "mlflow": ("--log_to mlflow", "mlflow"),
    "trackio": ("--log_to trackio", "trackio"),
    "gigatoken": ("fast encoding with mygpt prepare", "data"),
    "pyarrow": ("Parquet files", "data"),
    "zstandard": ("files compressed as .zst", "data"),
    "uvicorn": ("mygpt serve", "serve"),
}
"""For each optional package: what needs the package, and the extra of MyGPT that installs it, as in mygpt[plots]."""
ALL_REDUCE_BYTES = 64_000_000
"""The size of the tensor with which the all-reduce bandwidth is measured. Smaller tensors measure the latency."""


class Finding(NamedTuple):
    """One line of the report of `mygpt doctor`. `fix` says how to solve the problem that was found, if any."""

    label: str
    text: str
    fix: str | None = None


def examine(device: torch.device, recipes: Path) -> Iterator[Finding]:
    """Yield the report of `mygpt doctor` line by line. `recipes` is a YAML file of training options or a directory of them."""
    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("torch", torch.__version__)
    yield find_device(device)
    yield from find_ranks(device)
    yield find_threads(device)
    speeds = {name: matmul_speed(device, getattr(torch, name)) for name in ("float32", "bfloat16")}
    is_emulated = speeds["bfloat16"] < speeds["float32"]
    rates = ", ".join(f"{name} {_rate(speed)}" for name, speed in speeds.items())
    yield Finding("matrix products", f"{rates}{' (here bfloat16 saves only memory)' if is_emulated else ''}")
    if ranks.rank() == 0:
        yield find_compiler(device)
        yield find_vocabulary()
        yield find_weights()
        yield from find_packages()
    free = free_memory(device)
    unknown = "this system does not report its free memory"
    yield Finding("memory", unknown if free is None else f"{free / 1e9:.1f} GB free")
    if ranks.rank() == 0:
        yield find_disk()
    yield from find_recipes(recipes, device, speeds["float32"])


def find_device(device: torch.device) -> Finding:
    """Report the name of the GPU, or the instruction set of the CPU if `device` is the CPU."""
    if device.type == "cuda":
        major, minor = torch.cuda.get_device_capability(device)
        return Finding("device", f"cuda: {torch.cuda.get_device_name(device)}, compute capability {major}.{minor}")
    if device.type == "mps":
        return Finding("device", "mps: Apple's GPU")
    fix = None
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        fix = "torch cannot use the NVIDIA driver of this machine: install torch for CUDA (see pytorch.org)"
    return Finding("device", f"cpu: {torch.backends.cpu.get_cpu_capability()}; no GPU that torch can use", fix)


def find_ranks(device: torch.device) -> Iterator[Finding]:
    """Report the ranks that torchrun has started, and how fast they add up a tensor on `device`.

    The bus bandwidth (as NCCL's tests define it) is the speed of the connections between ranks that this result needs,
    whatever the number of ranks: each rank sends 2(n - 1)/n times the size of the tensor.
    """
    backends = [name for name in ("gloo", "nccl", "xccl", "mpi") if dist.is_available() and _has_backend(name)]
    has = f"this torch communicates over {' and '.join(backends)}" if backends else "this torch cannot communicate"
    n = ranks.world_size()
    if n == 1:
        fix = None
        if device.type == "cuda" and (n_gpus := torch.cuda.device_count()) > 1:
            fix = f"one of {n_gpus} GPUs is used: train with --nproc {n_gpus}"
        yield Finding("ranks", f"1 rank; {has}", fix)
        return
    places: list[tuple[str, str]] = [("", "")] * n
    dist.all_gather_object(places, (socket.gethostname(), _device_name(device)))
    hosts = list(dict.fromkeys(host for host, _ in places))
    names = ", ".join(f"{places.count(place)} on {place[1]} of {place[0]}" for place in dict.fromkeys(places))
    yield Finding("ranks", f"{n} ranks on {len(hosts)} host{'s' if len(hosts) > 1 else ''}: {names}; {has}")
    tensor = torch.zeros(ALL_REDUCE_BYTES // 4, device=device)
    seconds = median_seconds(lambda: ranks.sum_over_ranks(tensor), device, 5)
    speed = 2 * (n - 1) / n * ALL_REDUCE_BYTES / seconds
    backend = dist.get_backend(dist.group.WORLD) if device.type == "cpu" else "nccl"
    text = (
        f"{ALL_REDUCE_BYTES / 1e6:.0f} MB over {backend} in {duration(seconds)}: bus bandwidth {speed / 1e9:.2g} GB/s"
    )
    yield Finding("all-reduce", text)


def _has_backend(name: str) -> bool:
    return bool(getattr(dist, f"is_{name}_available", lambda: False)())


def _device_name(device: torch.device) -> str:
    """Return the type of the device, for a GPU with its model."""
    return f"cuda ({torch.cuda.get_device_name(device)})" if device.type == "cuda" else device.type


def find_threads(device: torch.device) -> Finding:
    """Report how many threads torch uses and how many CPUs are available.

    If `device` is the CPU and there are too few or too many threads, the finding says how to correct their number.
    """
    n, available, fix = torch.get_num_threads(), _n_cpus(), None
    if device.type == "cpu" and n < available // 2:  # two of the system's CPUs are often one core
        source = "OMP_NUM_THREADS is set; " if "OMP_NUM_THREADS" in os.environ else ""
        fix = f"{source}torch uses only {n} of {available} CPUs: set OMP_NUM_THREADS={available // 2} or more"
    if device.type == "cpu" and n > available:
        fix = f"{n} threads share {available} CPUs: set OMP_NUM_THREADS={available}"
    return Finding("threads", f"torch uses {n}, {available} CPUs are available", fix)


def find_compiler(device: torch.device) -> Finding:
    """Check that torch.compile works on `device` by compiling a small function, and report how long that takes."""
    needs = "a C++ compiler (apt install g++, or xcode-select --install)" if device.type == "cpu" else "triton"
    start = time.perf_counter()
    try:
        compiled = torch.compile(lambda x: (x * x).sum())
        works = compiled(torch.ones(8, device=device)).item() == 8
    except Exception as error:  # compilers and linkers fail in many ways, and the report shows them all
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        fix = f"install {needs}; everything except --compile works without it"
        return Finding("torch.compile", f"does not work: {reason[:90]}", fix)
    if not works:
        return Finding("torch.compile", "gives wrong results", "do not use --compile, or try another version of torch")
    return Finding("torch.compile", f"works ({time.perf_counter() - start:.0f} s for a small function)")


def find_vocabulary() -> Finding:
    """Check that GPT-2's vocabulary, which is installed with MyGPT, can be opened, and report its size."""
    try:
        n = get_tokenizer("gpt2").n_vocab
    except (ValueError, OSError) as error:
        fix = "pip install --force-reinstall --no-deps mygpt"
        return Finding("vocabulary", f"GPT-2's cannot be opened: {error_message(error)}", fix)
    return Finding("vocabulary", f"GPT-2's {n:,} tokens; the hash equals OpenAI's")


def find_weights() -> Finding:
    """Report which released models are in the cache directory, and which of their downloads are incomplete."""
    models = cache_directory() / "models"
    sizes = [size for size in GPT2_CONFIGS if size[0].isdigit()]
    complete = [size for size in sizes if all((models / size / name).is_file() for name in FILES)]
    begun = [size for size in sizes if size not in complete and (models / size).is_dir()]
    text = f"{', '.join(complete) or 'none'} in {models}"
    if begun:
        return Finding("GPT-2's weights", f"{text}; incomplete: {', '.join(begun)}", f"mygpt download {begun[0]}")
    fix = None if complete else "mygpt download gpt2 (0.5 GB, needed only for OpenAI's model)"
    return Finding("GPT-2's weights", text, fix)


def find_packages() -> Iterator[Finding]:
    """Yield one line with the installed optional packages, then a line for each missing package."""
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    versions = [f"{name} {_version_of(name)}" for name in OPTIONAL if name not in missing]
    yield Finding("packages", ", ".join(versions) or "no optional packages")
    for name in missing:
        purpose, extra = OPTIONAL[name]
        yield Finding(f"  {name}", f"not installed; needed for {purpose}", f"pip install 'mygpt[{extra}]'")


def _version_of(package: str) -> str:
    """Return the version of an installed package. mlflow may have been installed without its server, as mlflow-skinny."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return importlib.metadata.version(f"{package}-skinny")


def find_disk() -> Finding:
    """Report the free disk space in the current directory and in the cache directory for downloads."""
    cache = cache_directory()
    places = {"here": Path.cwd(), "in the cache": next(path for path in (cache, *cache.parents) if path.exists())}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    fix = "free some space: a run of 124M needs 0.5 GB, OpenAI's four models 11 GB"
    text = ", ".join(f"{n / 1e9:,.0f} GB free {name}" for name, n in free.items())
    return Finding("disk", text, fix if min(free.values()) < 2e9 else None)


def find_recipes(recipes: Path, device: torch.device, flops_per_second: float) -> Iterator[Finding]:
    """Yield a line about each recipe: a YAML file of training options in the directory `recipes`, or that file itself.

    `flops_per_second` is the measured speed of matrix products, from which the training time is estimated.
    """
    paths = sorted(recipes.glob("*.yaml")) if recipes.is_dir() else [recipes]
    files = [path for path in paths if path.is_file()]
    if not files:
        fix = "give a directory of YAML files with --recipes, such as configs/"
        yield Finding("recipes", f"none in {recipes}", fix)
    else:
        yield Finding("recipes", f"estimated on {device.type} from a few steps, without compilation and sample texts")
    for file in files:
        yield find_recipe(file, device, flops_per_second)


def find_recipe(file: Path, device: torch.device, flops_per_second: float) -> Finding:
    """Report the estimated training time and memory of the recipe in `file`, or why the recipe cannot be used here."""
    label = f"  {file.stem}"
    try:
        config, training, recipe = read_plan(str(file))
    except (ValueError, OSError) as error:
        return Finding(label, f"cannot be read: {error_message(error)}", f"correct {file}")
    if training is None:
        return Finding(label, "describes only a model")
    bf16 = autocast_dtype(device, training.precision, config.emb_dim) is not None
    n = ranks.world_size()
    try:
        needed = step_memory(config, training, bf16, device.type, n).peak
    except ValueError as error:
        return Finding(label, f"does not fit the number of ranks: {error_message(error)}", f"correct {file}")
    free = ranks.broadcast(free_memory(device))  # All ranks must take the same decision.
    if free is not None and device.type == "cpu":
        free //= int(os.environ.get("LOCAL_WORLD_SIZE", 1))  # All ranks of a machine share its memory.
    parts = f" with GPT-2's parts ({recipe['with']} is not run)" if recipe.get("with") is not None else ""
    text = f"{needed / 1e9:.1f} GB{parts}"
    if free is not None and needed > free:
        fix = "use a smaller micro_batch_size, gradient_checkpointing: true, or a smaller model"
        return Finding(label, f"a step needs {text}, but only {free / 1e9:.1f} GB are free", fix)
    step, whole = training_seconds(config, training, device, ranks.broadcast(flops_per_second))
    at_most = "at most " if training.early_stop else ""
    text = f"{at_most}{duration(whole)} ({training.max_steps:,} steps of {duration(step)}), {text}"
    return Finding(label, text, missing_data(recipe.get("data", "alice")))


def training_seconds(
    config: GPTConfig, training: TrainConfig, device: torch.device, flops_per_second: float
) -> tuple[float, float]:
    """Return the estimated seconds of one training step, and of the whole run with its evaluations.

    The estimate uses a few training steps on random tokens and `flops_per_second`, the measured speed of matrix products.
    Several ranks take these steps together. The time to read the text, generate sample texts, compile and write files is
    not included.
    """
    n = ranks.world_size()
    plain = dataclasses.replace(
        training, micro_batch_size=None, warmup_steps=0, compile=False, log_to=None, tensorboard=False
    )

    def measure_step(part: GPTConfig, batch_size: int) -> float:
        tried = dataclasses.replace(plain, batch_size=n * batch_size)
        ids = torch.randint(config.vocab_size, (2 * config.context_length * n * batch_size + 1,)).numpy()
        with Trainer(GPTModel(part), tried, ids, device=device, progress=False) as trainer:
            return median_seconds(trainer.step, device, 3)

    n_rows = -(-training.batch_size // n)  # of each rank
    micro = min(training.micro_batch_size or n_rows, n_rows)
    sequence = estimate_step_seconds(config, micro, measure_step, flops_per_second) / micro
    step = sequence * n_rows
    evaluation = sequence * training.eval_windows / n / 3  # without the backward pass
    return step, training.max_steps * step + training.max_steps // training.eval_every * evaluation


def missing_data(data: Any) -> str | None:
    """Return a sentence that says how to get the training text `data`, or None if the text is available.

    `data` is a name such as "alice", a path, a pattern or a list of paths, or a mapping of such sources to weights.
    """
    if isinstance(data, dict):
        return next(filter(None, map(missing_data, map(str, data))), None)
    if isinstance(data, list) or data in BUILT_IN or Path(data).is_file() or is_prepared(data) or glob.glob(data):
        return None
    if data in DOWNLOADS:
        is_cached = (cache_directory() / f"{data}.txt").is_file()
        return None if is_cached else f"the text {data} will be downloaded at its first use"
    return f"the data {data} does not exist: choose other data with --data, or make it with mygpt prepare"


def free_memory(device: torch.device) -> int | None:
    """Return the free memory of the device in bytes, or None if the system does not report it."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    try:
        values = dict(line.split(":") for line in Path("/proc/meminfo").read_text().splitlines())
        return int(values["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux
        return None


def duration(seconds: float) -> str:
    """Return a time as text, in the largest unit that gives at least 2: 90 seconds give "90 s", 300 seconds "5.0 min"."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _n_cpus() -> int:
    """Return the number of CPUs that this process may use. In a container, this can be fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _rate(speed: float) -> str:
    if speed >= 1e12:
        return f"{speed / 1e12:.1f} TFLOP/s"
    return f"{speed / 1e9:.0f} GFLOP/s" if speed >= 2e9 else f"{speed / 1e6:.0f} MFLOP/s"
