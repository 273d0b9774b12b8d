"""mygpt doctor"""

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
from MyGPT.config import GPT2_CONFIGS

if TYPE_CHECKING:
    import torch

    from MyGPT.config import GPTConfig
    from MyGPT.training.config import TrainConfig

# The package that is imported, what it is for, and the extra that installs it.
OPTIONAL = {
    "peft": ("mygpt finetune", "finetune"),
    "matplotlib": ("pictures", "plots"),
    "huggingface_hub": ("models from the Hugging Face hub", "hub"),
    "tensorboard": ("--tensorboard", "tensorboard"),
}


@dataclass
class Finding:
    """A line of the report; `fix` says what to do about it, if anything is missing."""

    label: str
    text: str
    fix: str | None = None


def doctor(recipes: str = "configs", device: str = "auto") -> None:
    """Look at this machine: what is installed, what works, how fast it is, and how long each recipe would take.

    Prints one page, what is missing with its remedy at the end. It compiles one small function and takes a few training
    steps, which together last about half a minute. Example: mygpt doctor --recipes configs

    Args:
        recipes: a directory of YAML files, or one file
        device: auto, cpu, cuda or mps
    """
    from MyGPT.devices import pick_device

    place = pick_device(device)
    fixes = []
    for finding in examine(place, Path(recipes)):
        print(f"{finding.label:<16}{finding.text}", flush=True)
        if finding.fix:
            fixes.append(f"{finding.label.strip()}: {finding.fix}")
    print("\n" + ("\n".join(["To mend:", *(f"  {fix}" for fix in fixes)]) if fixes else "Nothing is missing."))


def examine(place: torch.device, recipes: Path) -> Iterator[Finding]:
    """All findings, as they come."""
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
    """The device that commands take by themselves, or the one that was asked for."""
    import torch

    if place.type == "cuda":
        major, minor = torch.cuda.get_device_capability(place)
        return Finding("device", f"cuda: {torch.cuda.get_device_name(place)}, compute capability {major}.{minor}")
    if place.type == "mps":
        return Finding("device", "mps: Apple's GPU")
    fix = None
    if shutil.which("nvidia-smi") and not torch.cuda.is_available():
        fix = "there is an NVIDIA driver, but this torch cannot use it: install torch for CUDA (pytorch.org says how)"
    return Finding("device", f"cpu: {torch.backends.cpu.get_cpu_capability()}; no GPU that torch can use", fix)


def find_threads(place: torch.device) -> Finding:
    """How many threads torch takes, and how many processors it may use."""
    import torch

    n, available = torch.get_num_threads(), _n_processors()
    fix = None
    if place.type == "cpu" and n < available // 2:  # two processors are often one core
        source = "OMP_NUM_THREADS is set; " if "OMP_NUM_THREADS" in os.environ else ""
        fix = f"{source}only {n} of {available} processors work: set OMP_NUM_THREADS={available // 2} or more"
    if place.type == "cpu" and n > available:
        fix = f"{n} threads share {available} processors: set OMP_NUM_THREADS={available}"
    return Finding("threads", f"torch takes {n}, the process may use {available} processors", fix)


def find_dtypes(speeds: dict[str, float]) -> Finding:
    """What matrix products reach in each type. bf16 that is slower than float32 is emulated."""
    text = ", ".join(f"{name} {_rate(speed)}" for name, speed in speeds.items())
    slower = speeds["bfloat16"] < speeds["float32"]
    return Finding("products", f"{text}{' (bfloat16 only saves memory here)' if slower else ''}")


def find_compiler(place: torch.device) -> Finding:
    """Whether torch.compile works, by compiling something: what it needs differs by version and machine."""
    import torch

    needs = "a C++ compiler (apt install g++, or xcode-select --install)" if place.type == "cpu" else "triton"
    start = time.perf_counter()
    try:
        compiled = torch.compile(lambda x: (x * x).sum())
        works = compiled(torch.ones(8, device=place)).item() == 8
    except Exception as error:  # the compilers', the linker's, torch's: whatever it is, it is the finding
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return Finding("torch.compile", f"does not work: {reason[0][:90]}", f"it needs {needs}; all else works without")
    if not works:
        return Finding("torch.compile", "gives wrong results", "leave out --compile, or try another version of torch")
    return Finding("torch.compile", f"works ({time.perf_counter() - start:.0f} s for a first, small function)")


def find_vocabulary() -> Finding:
    """GPT-2's vocabulary, which comes with the installation."""
    from MyGPT.tokenizers import get_tokenizer

    try:
        n = get_tokenizer("gpt2").n_vocab
    except (ValueError, OSError) as error:
        return Finding("vocabulary", f"GPT-2's is not there: {error}", "pip install --force-reinstall --no-deps mygpt")
    return Finding("vocabulary", f"GPT-2's {n:,} tokens, checked against OpenAI's hash")


def find_weights() -> Finding:
    """The released models that were downloaded, whole or in part."""
    from MyGPT.download import cache_directory
    from MyGPT.weights.released import FILES

    models = cache_directory() / "models"
    sizes = [size for size in GPT2_CONFIGS if size[0].isdigit()]
    whole = [size for size in sizes if all((models / size / name).is_file() for name in FILES)]
    begun = [size for size in sizes if size not in whole and (models / size).is_dir()]
    text = f"{', '.join(whole) or 'none'} in {models}"
    if begun:
        return Finding("GPT-2's weights", f"{text}; unfinished: {', '.join(begun)}", f"mygpt download {begun[0]}")
    return Finding(
        "GPT-2's weights", text, None if whole else "mygpt download gpt2 (0.5 GB, only to use OpenAI's model)"
    )


def find_packages() -> Iterator[Finding]:
    """Optional packages, in one line, and a line for each that is missing."""
    there = {name: importlib.util.find_spec(name) is not None for name in OPTIONAL}
    versions = [f"{name} {importlib.metadata.version(name)}" for name, is_there in there.items() if is_there]
    yield Finding("packages", ", ".join(versions) or "no optional ones")
    for name in (name for name, is_there in there.items() if not is_there):
        purpose, extra = OPTIONAL[name]
        yield Finding(f"  {name}", f"not installed, for {purpose}", f"pip install 'mygpt[{extra}]'")


def find_memory(place: torch.device) -> Finding:
    """What is free now where models are computed."""
    free = free_memory(place)
    return Finding("memory", "free memory is not known on this system" if free is None else f"{free / 1e9:.1f} GB free")


def find_disk() -> Finding:
    """What is free where runs and downloads are written."""
    from MyGPT.download import cache_directory

    places = {"here": Path.cwd(), "in the cache": _existing(cache_directory())}
    free = {name: shutil.disk_usage(path).free for name, path in places.items()}
    fix = "make room: a run of 124M takes 0.5 GB, OpenAI's four models 11 GB" if min(free.values()) < 2e9 else None
    return Finding("disk", ", ".join(f"{n / 1e9:,.0f} GB free {name}" for name, n in free.items()), fix)


def find_recipes(recipes: Path, place: torch.device, speeds: dict[str, float]) -> Iterator[Finding]:
    """For each recipe its time and memory here, and whether its text is there."""
    files = sorted(recipes.glob("*.yaml")) if recipes.is_dir() else [recipes]
    files = [file for file in files if file.is_file()]
    if not files:
        yield Finding("recipes", f"none in {recipes}", "--recipes names a directory of YAML files, such as configs/")
        return
    yield Finding("recipes", f"estimated on {place.type} from a few steps, without compiling and live samples")
    for file in files:
        yield judge_recipe(file, place, speeds)


def judge_recipe(file: Path, place: torch.device, speeds: dict[str, float]) -> Finding:
    """A recipe's time, if it fits into memory."""
    label = f"  {file.stem}"
    try:
        config, training, recipe = read_plan(str(file))
    except (ValueError, OSError) as error:
        return Finding(label, f"cannot be read: {error}", f"correct {file}")
    if training is None:
        return Finding(label, "describes a model, not a training")
    needed, free = step_memory(config, training, place), free_memory(place)
    text = f"{needed / 1e9:.1f} GB"
    if free is not None and needed > free:
        smaller = "a smaller micro_batch_size, gradient_checkpointing: true, or a smaller model"
        return Finding(label, f"{text} a step, more than the {free / 1e9:.1f} GB that are free", smaller)
    step, whole = training_seconds(config, training, place, speeds["float32"])
    at_most = "at most " if training.early_stop else ""
    text = f"{at_most}{duration(whole)} ({training.max_steps:,} steps of {duration(step)}), {text}"
    return Finding(label, text, missing_data(recipe.get("data", "alice")))


def step_memory(config: GPTConfig, training: TrainConfig, place: torch.device) -> int:
    """Bytes that a step of a recipe takes on the device."""
    from MyGPT.costs import training_memory
    from MyGPT.training.arithmetic import autocast_dtype

    micro = training.micro_batch_size or training.batch_size
    return training_memory(
        config,
        micro,
        bf16=autocast_dtype(place, training.precision, config.emb_dim) is not None,
        optimizer=training.optimizer,
        gradient_checkpointing=training.gradient_checkpointing,
        accumulates=micro < training.batch_size,
        device=place.type,
    ).peak


def training_seconds(
    config: GPTConfig, training: TrainConfig, place: torch.device, flops_per_second: float
) -> tuple[float, float]:
    """Return the estimated seconds of one step, and of the whole run with its evaluations.

    The estimate comes from a few training steps on random tokens. Reading the text, live samples, compiling and writing
    files are not part of it.
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
    """What to do for a recipe's text, None if it is there."""
    from MyGPT.data.sources import BUILT_IN, DOWNLOADS
    from MyGPT.data.tokens import is_prepared
    from MyGPT.download import cache_directory

    if isinstance(data, list) or data in BUILT_IN or Path(data).is_file() or is_prepared(data):
        return None
    if data in DOWNLOADS:
        there = (cache_directory() / f"{data}.txt").is_file()
        return None if there else f"the text {data} will be downloaded when it is first used"
    return f"its data {data} is not here: name another with --data, or make it with mygpt prepare"


def free_memory(place: torch.device) -> int | None:
    """Bytes that are free on the device; None where the system does not tell."""
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
    """Two digits, in the unit that people would use."""
    for unit, size in (("years", 365 * 86400), ("days", 86400), ("hours", 3600), ("min", 60), ("s", 1)):
        if seconds >= 2 * size or (unit == "s" and seconds >= 1):
            value = seconds / size
            return f"{value:.1f} {unit}" if value < 10 else f"{value:,.0f} {unit}"
    return f"{1000 * seconds:.0f} ms"


def _n_processors() -> int:
    """Those that this process may use, which in a container are fewer than the machine has."""
    return len(os.sched_getaffinity(0)) if sys.platform == "linux" else os.cpu_count() or 1


def _rate(speed: float) -> str:
    if speed >= 1e12:
        return f"{speed / 1e12:.1f} TFLOP/s"
    return f"{speed / 1e9:.0f} GFLOP/s" if speed >= 2e9 else f"{speed / 1e6:.0f} MFLOP/s"


def _existing(path: Path) -> Path:
    """The path, or the nearest directory above it that is there."""
    return next(parent for parent in (path, *path.parents) if parent.exists())
