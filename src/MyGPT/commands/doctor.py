"""`mygpt doctor`: what works on this machine, how fast it is, and how long each recipe takes."""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from MyGPT.commands._recipe import read_plan
from MyGPT.commands.info import step_memory
from MyGPT.config import GPT2_CONFIGS

if TYPE_CHECKING:
    import torch

    from MyGPT.config import GPTConfig
    from MyGPT.training.config import TrainConfig

# Package: what it is for, and the extra that installs it.
OPTIONAL = {
    "peft": ("mygpt finetune", "finetune"),
    "matplotlib": ("pictures", "plots"),
    "huggingface_hub": ("models from the Hugging Face hub", "hub"),
    "tensorboard": ("--tensorboard", "tensorboard"),
}


@dataclass
class Finding:
    """A line of the report. `fix` is the remedy if something is missing."""

    label: str
    text: str
    fix: str | None = None


def doctor(recipes: str = "configs", device: str = "auto") -> None:
    """Check this machine: what is installed, what works, how fast it is, and how long each recipe takes.

    The report ends with a remedy for everything that is missing. The check takes about half a minute, in which it compiles a
    small function and runs a few training steps.

    Example:
        mygpt doctor --recipes configs

    Args:
        recipes: A YAML file, or a directory of YAML files.
        device: Where to compute: auto, cpu, cuda or mps.
    """
    from MyGPT.devices import pick_device

    place = pick_device(device)
    fixes = []
    for finding in examine(place, Path(recipes)):
        print(f"{finding.label:<16}{finding.text}", flush=True)
        if finding.fix:
            fixes.append(f"{finding.label.strip()}: {finding.fix}")
    print("\n".join(["\nTo do:", *(f"  {fix}" for fix in fixes)]) if fixes else "\nNothing is missing.")


def examine(place: torch.device, recipes: Path) -> Iterator[Finding]:
    """Yield the lines of the report; each check runs when its line is due."""
    import torch

    from MyGPT.costs import matmul_speed

    yield Finding("Python", f"{platform.python_version()} on {platform.system()} {platform.machine()}")
    yield Finding("torch", torch.__version__)
    yield find_device(place)
    yield find_threads(place)
    speeds = {name: matmul_speed(place, getattr(torch, name)) for name in ("float32", "bfloat16")}
    yield find_dtypes(speeds)
    yield find_compiler(place)
    yield find_vocabulary()
    yield find_weights()
    yield from find_packages()
    yield find_memory(place)
    yield find_disk()
    yield from find_recipes(recipes, place, speeds)


def find_device(place: torch.device) -> Finding:
    """Describe the device."""
    import torch

    if place.type == "cuda":
        major, minor = torch.cuda.get_device_capability(place)
        return Finding("device", f"cuda: {torch.cuda.get_device_name(place)}, compute capability {major}.{minor}")
    if place.type == "mps":
        return Finding("device", "mps: Apple's GPU")
    fix = None
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        fix = "torch cannot use the NVIDIA driver of this machine: install torch for CUDA (see pytorch.org)"
    return Finding("device", f"cpu: {torch.backends.cpu.get_cpu_capability()}; no GPU that torch can use", fix)


def find_threads(place: torch.device) -> Finding:
    """Compare the number of torch's threads with the number of available CPUs."""
    import torch

    n, available, fix = torch.get_num_threads(), _n_cpus(), None
    if place.type == "cpu" and n < available // 2:  # two of the system's CPUs are often one core
        source = "OMP_NUM_THREADS is set; " if "OMP_NUM_THREADS" in os.environ else ""
        fix = f"{source}torch uses only {n} of {available} CPUs: set OMP_NUM_THREADS={available // 2} or more"
    if place.type == "cpu" and n > available:
        fix = f"{n} threads share {available} CPUs: set OMP_NUM_THREADS={available}"
    return Finding("threads", f"torch uses {n}, {available} CPUs are available", fix)


def find_dtypes(speeds: dict[str, float]) -> Finding:
    """Report the speed of matrix products in each type. A CPU that emulates bfloat16 is slower with it."""
    text = ", ".join(f"{name} {_rate(speed)}" for name, speed in speeds.items())
    slower = speeds["bfloat16"] < speeds["float32"]
    return Finding("matrix products", f"{text}{' (here bfloat16 saves only memory)' if slower else ''}")


def find_compiler(place: torch.device) -> Finding:
    """Compile a small function, because the requirements of torch.compile differ by version and machine."""
    import torch

    needs = "a C++ compiler (apt install g++, or xcode-select --install)" if place.type == "cpu" else "triton"
    start = time.perf_counter()
    try:
        compiled = torch.compile(lambda x: (x * x).sum())
        works = compiled(torch.ones(8, device=place)).item() == 8
    except Exception as error:  # compilers and linkers fail in many ways, and the report shows them all
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Finding(
            "torch.compile",
            f"does not work: {reason[0][:90]}",
            f"install {needs}; everything except --compile works without it",
        )
    if not works:
        return Finding("torch.compile", "gives wrong results", "do not use --compile, or try another version of torch")
    return Finding("torch.compile", f"works ({time.perf_counter() - start:.0f} s for a small function)")


def find_vocabulary() -> Finding:
    """Check GPT-2's vocabulary, which is installed with MyGPT."""
    from MyGPT.tokenizers import get_tokenizer

    try:
        n = get_tokenizer("gpt2").n_vocab
    except (ValueError, OSError) as error:
        return Finding(
            "vocabulary", f"GPT-2's cannot be opened: {error}", "pip install --force-reinstall --no-deps mygpt"
        )
    return Finding("vocabulary", f"GPT-2's {n:,} tokens; the hash equals OpenAI's")


def find_weights() -> Finding:
    """List the released models whose download is complete or incomplete."""
    from MyGPT.download import cache_directory
    from MyGPT.weights.released import FILES

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
    """List the optional packages in one line, then each missing package in a line of its own."""
    missing = [name for name in OPTIONAL if importlib.util.find_spec(name) is None]
    versions = [f"{name} {importlib.metadata.version(name)}" for name in OPTIONAL if name not in missing]
    yield Finding("packages", ", ".join(versions) or "no optional packages")
    for name in missing:
        purpose, extra = OPTIONAL[name]
        yield Finding(f"  {name}", f"not installed; needed for {purpose}", f"pip install 'mygpt[{extra}]'")


def find_memory(place: torch.device) -> Finding:
    """Report the free memory of the device."""
    free = free_memory(place)
    return Finding(
        "memory", "this system does not report its free memory" if free is None else f"{free / 1e9:.1f} GB free"
    )


def find_disk() -> Finding:
    """Report the free disk space for runs and downloads."""
    from MyGPT.download import cache_directory

    places = {"here": Path.cwd(), "in the cache": _nearest_directory(cache_directory())}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    fix = (
        "free some space: a run of 124M needs 0.5 GB, OpenAI's four models 11 GB" if min(free.values()) < 2e9 else None
    )
    return Finding("disk", ", ".join(f"{n / 1e9:,.0f} GB free {name}" for name, n in free.items()), fix)


def find_recipes(recipes: Path, place: torch.device, speeds: dict[str, float]) -> Iterator[Finding]:
    """Yield the time, the memory and the missing data of each recipe."""
    files = sorted(recipes.glob("*.yaml")) if recipes.is_dir() else [recipes]
    files = [file for file in files if file.is_file()]
    if not files:
        yield Finding(
            "recipes", f"none in {recipes}", "give a directory of YAML files with --recipes, such as configs/"
        )
        return
    yield Finding("recipes", f"estimated on {place.type} from a few steps, without compilation and sample texts")
    for file in files:
        yield find_recipe(file, place, speeds)


def find_recipe(file: Path, place: torch.device, speeds: dict[str, float]) -> Finding:
    """Estimate the time of a recipe if it fits into memory."""
    from MyGPT.training.arithmetic import autocast_dtype

    label = f"  {file.stem}"
    try:
        config, training, recipe = read_plan(str(file))
    except (ValueError, OSError) as error:
        return Finding(label, f"cannot be read: {error}", f"correct {file}")
    if training is None:
        return Finding(label, "describes only a model")
    bf16 = autocast_dtype(place, training.precision, config.emb_dim) is not None
    needed, free = step_memory(config, training, bf16, place.type).peak, free_memory(place)
    text = f"{needed / 1e9:.1f} GB"
    if free is not None and needed > free:
        fix = "use a smaller micro_batch_size, gradient_checkpointing: true, or a smaller model"
        return Finding(label, f"a step needs {text}, but only {free / 1e9:.1f} GB are free", fix)
    step, whole = training_seconds(config, training, place, speeds["float32"])
    at_most = "at most " if training.early_stop else ""
    text = f"{at_most}{duration(whole)} ({training.max_steps:,} steps of {duration(step)}), {text}"
    return Finding(label, text, missing_data(recipe.get("data", "alice")))


def training_seconds(
    config: GPTConfig, training: TrainConfig, place: torch.device, flops_per_second: float
) -> tuple[float, float]:
    """Return the estimated seconds of one step, and of the whole run with its evaluations.

    The estimate comes from a few training steps on random tokens. It leaves out reading the text, sample texts, compilation
    and writing files.
    """
    import torch

    from MyGPT.costs import estimate_step_seconds, median_seconds
    from MyGPT.model import GPTModel
    from MyGPT.training.trainer import Trainer

    def measure_step(part: GPTConfig, batch_size: int) -> float:
        tried = dataclasses.replace(
            training, batch_size=batch_size, micro_batch_size=None, compile=False, tensorboard=False
        )
        ids = torch.randint(config.vocab_size, (2 * config.context_length * batch_size + 1,)).numpy()
        with Trainer(GPTModel(part), tried, ids, device=place, progress=False) as trainer:
            return median_seconds(trainer.step, place, 3)

    micro = min(training.micro_batch_size or training.batch_size, training.batch_size)
    sequence = estimate_step_seconds(config, micro, measure_step, flops_per_second) / micro
    step = sequence * training.batch_size
    evaluation = sequence * training.eval_windows / 3  # without the backward pass
    return step, training.max_steps * step + training.max_steps // training.eval_every * evaluation


def missing_data(data: str | list[str]) -> str | None:
    """Return how to get the data of a recipe, or None if the data is available."""
    from MyGPT.data.sources import BUILT_IN, DOWNLOADS
    from MyGPT.data.tokens import is_prepared
    from MyGPT.download import cache_directory

    if isinstance(data, list) or data in BUILT_IN or Path(data).is_file() or is_prepared(data):
        return None
    if data in DOWNLOADS:
        is_cached = (cache_directory() / f"{data}.txt").is_file()
        return None if is_cached else f"the text {data} will be downloaded at its first use"
    return f"the data {data} does not exist: choose other data with --data, or make it with mygpt prepare"


def free_memory(place: torch.device) -> int | None:
    """Return the free bytes of the device, or None if the system does not report them."""
    import torch

    if place.type == "cuda":
        return torch.cuda.mem_get_info(place)[0]
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            values = dict(line.split(":") for line in file)
        return int(values["MemAvailable"].split()[0]) * 1024
    except OSError:  # not Linux
        return None


def duration(seconds: float) -> str:
    """Return a time with about two digits, in the largest unit that fits at least twice."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _n_cpus() -> int:
    """Return the number of CPUs that this process may use; a container may have fewer than the machine."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _rate(speed: float) -> str:
    if speed >= 1e12:
        return f"{speed / 1e12:.1f} TFLOP/s"
    return f"{speed / 1e9:.0f} GFLOP/s" if speed >= 2e9 else f"{speed / 1e6:.0f} MFLOP/s"


def _nearest_directory(path: Path) -> Path:
    """Return the path itself, or the nearest parent directory that exists."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
