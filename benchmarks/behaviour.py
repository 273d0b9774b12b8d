"""Record what MyGPT computes, so that two versions of the source can be compared.

    python benchmarks/behaviour.py --out before.json
    python benchmarks/behaviour.py --out after.json --old path/to/the/other/src
    python benchmarks/behaviour.py --compare before.json after.json

The record holds the losses of every recipe and of every way of fine-tuning, generated token ids, hashes of initial
weights and of written files, the command-line options with their defaults, and the weights of runs that are stopped and
resumed. With `--old`, the source given there starts the stopped runs and the current source resumes them. The script
uses the command line and the public names of MyGPT only, so that it runs unchanged on both versions. Everything runs on
one CPU thread, because the number of threads changes the last bits of a sum.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is imported
os.environ["MKL_NUM_THREADS"] = "1"

import torch
import yaml

import MyGPT
from MyGPT import GPTConfig, GPTModel, PromptLookup, accelerate, generate, get_tokenizer, load_tokenizer

CONFIGS = Path(__file__).parents[1] / "configs"
SOURCE = Path(MyGPT.__file__).parents[1]
STEPS = 20
# Recipes whose data is not built in or whose steps are too slow for a CPU. The other options stay as in the recipe.
SHORTENED: dict[str, dict[str, Any]] = {
    "gpt2_124m": {
        "data": "gpt2_tokens",
        "context_length": 128,
        "batch_size": 4,
        "micro_batch_size": 2,
        "max_steps": 5,
        "compile": False,
    },
    "gpt2_small": {"batch_size": 2},
}
TRAIN = [
    "--log_every",
    "1",
    "--eval_every",
    "10",
    "--eval_windows",
    "20",
    "--sample_every",
    "10",
    "--sample_tokens",
    "30",
]
COMMANDS = [
    *"train finetune generate chat evaluate download prepare info doctor bench plot explain".split(),
    *(f"plot {kind}" for kind in "attention lens sampling neighbours schedule tokens".split()),
]
FINETUNE = {
    "lora": [],
    "full": ["--full", "true", "--learning_rate", "1e-3"],
    "packed": ["--rows", "packed"],
    "merged": ["--merge", "true", "--mask_prompt", "false"],
    "dora": ["--lora.dora", "true", "--lora.rslora", "true", "--lora.targets", "all-linear"],
    "muon": ["--full", "true", "--optimizer", "muon"],
}
TINY = ["--context_length", "32", "--emb_dim", "32", "--n_heads", "2", "--n_layers", "2", "--batch_size", "4"]


def mygpt(*arguments: Any, source: Path = SOURCE, stdin: str | None = None) -> str:
    """Run a command of the given source and return its standard output."""
    result = subprocess.run(
        [sys.executable, "-m", "MyGPT", *map(str, arguments)],
        env={**os.environ, "PYTHONPATH": str(source)},
        input=stdin,
        capture_output=True,
        encoding="utf-8",
    )
    if result.returncode:
        raise RuntimeError(
            f"mygpt {' '.join(map(str, arguments))} ended with status {result.returncode}: {result.stderr}"
        )
    return result.stdout


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()[:16]


def weights_hash(model: torch.nn.Module) -> str:
    """Return a hash of all parameters and buffers, with their names."""
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()[:16]


def metrics(run: str) -> list[dict[str, float]]:
    """Return the records of a run without the measurements of time."""
    lines = Path(run, "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    timed = ("tokens_per_second", "checkpoint_seconds")
    return [{key: value for key, value in json.loads(line).items() if key not in timed} for line in lines]


def losses(run: str) -> dict[str, list[list[float]]]:
    """Return the series of every measured value as pairs of step and value."""
    series: dict[str, list[list[float]]] = {}
    for record in metrics(run):
        for name, value in record.items():
            if name != "step":
                series.setdefault(name, []).append([record["step"], value])
    return series


def file_hashes(directory: str) -> dict[str, str]:
    """Return the hash of every file in a directory, without locks, pictures and model cards, which are prose."""
    left_out = (".lock", ".process", "manifest.json", "README.md", "loss.png")
    hashes = {}
    for path in sorted(Path(directory).rglob("*")):
        name = path.relative_to(directory).as_posix()
        if not path.is_file() or path.name in left_out:
            continue
        if path.name == "metrics.jsonl":
            hashes[name] = sha256(json.dumps(metrics(directory)).encode())
        elif (
            path.name == "adapter_config.json"
        ):  # PEFT writes sets in any order, and the absolute path of the base model
            fields = json.loads(path.read_text(encoding="utf-8").replace(f"{Path.cwd()}{os.sep}", ""))
            ordered = {key: sorted(value) if isinstance(value, list) else value for key, value in fields.items()}
            hashes[name] = sha256(json.dumps(ordered, sort_keys=True).encode())
        elif path.name == "state.json":  # holds file lengths, which depend on the times in metrics.jsonl
            hashes[f"{name}, keys"] = " ".join(sorted(json.loads(path.read_text(encoding="utf-8"))))
        else:
            hashes[name] = sha256(path.read_bytes())
    return hashes


def model_fields(recipe: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in recipe.items() if key in GPTConfig.__dataclass_fields__}


def varied_model(**options: Any) -> GPTModel:
    """Return a small model with large random weights, whose greedy continuations vary from token to token."""
    sizes = {"vocab_size": 101, "context_length": 24, "emb_dim": 32, "n_heads": 4, "n_layers": 2, "qkv_bias": True}
    torch.manual_seed(7)
    model = GPTModel(GPTConfig(**{**sizes, **options}))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.35) if parameter.dim() == 2 else parameter.add_(0.1 * torch.randn_like(parameter))
    return model.eval()


def record_initial_weights() -> dict[str, Any]:
    """Record the state dict's names and shapes, the initial weights and the next random draw, for each configuration."""
    configurations: dict[str, dict[str, Any]] = {
        path.stem: model_fields(yaml.safe_load(path.read_text(encoding="utf-8")))
        for path in sorted(CONFIGS.glob("*.yaml"))
    }
    small = {"vocab_size": 67, "context_length": 16, "emb_dim": 24, "n_heads": 3, "n_layers": 3}
    configurations["untied"] = {**small, "tie_weights": False}
    configurations["torch's own"] = {**small, "tie_weights": False, "init_std": None, "qkv_bias": True}
    configurations["local"] = {**small, "init": "local"}
    found: dict[str, Any] = {}
    for name, fields in configurations.items():
        for seed in (0, 1337):
            torch.manual_seed(seed)
            model = GPTModel(GPTConfig(**{"vocab_size": 96, **fields}))
            found[f"{name}, seed {seed}"] = {"weights": weights_hash(model), "next draw": torch.rand(1).item()}
        found[f"{name}, names"] = {key: list(tensor.shape) for key, tensor in model.state_dict().items()}
        found[f"{name}, parameters"] = [model.num_parameters(), model.num_parameters(exclude_embeddings=True)]
        found[f"{name}, FLOPs"] = [model.estimate_flops(), model.estimate_flops(10, backward=False)]
    return found


def record_generation() -> dict[str, Any]:
    """Record generated ids of a tied and an untied model, of accelerated copies and of PromptLookup."""
    found: dict[str, Any] = {}
    torch.manual_seed(3)
    prompt = torch.randint(0, 101, (1, 6))
    batch = torch.randint(0, 101, (3, 9))
    mask = torch.tensor([[0] * (9 - n) + [1] * n for n in (2, 9, 5)])
    ways: dict[str, dict[str, Any]] = {
        "greedy": {},
        "temperature": {"temperature": 0.9, "seed": 1},
        "top_k": {"temperature": 1.1, "top_k": 7, "seed": 2},
        "top_p": {"temperature": 1.3, "top_p": 0.7, "seed": 3},
        "min_p and penalty": {"temperature": 1.0, "min_p": 0.05, "repetition_penalty": 1.3, "seed": 4},
        "no cache": {"temperature": 0.9, "seed": 5, "use_cache": False},
        "context_size": {"temperature": 0.9, "seed": 6, "context_size": 8},
        "end and stop": {"temperature": 1.0, "seed": 7, "eos_id": 5, "stop": [[3], [9, 2]]},
    }
    models: dict[str, Any] = {"tied": varied_model(), "untied": varied_model(tie_weights=False, activation="gelu")}
    models |= {
        f"accelerated {precision}": accelerate(models["tied"], precision) for precision in ("fp32", "bf16", "int8")
    }
    models["accelerated, torch's operators"] = accelerate(models["tied"], "int8", compiled=False)
    models["lookup"] = PromptLookup(models["tied"])
    models["lookup int8"] = PromptLookup(models["accelerated int8"])
    for name, model in models.items():
        for way, options in ways.items():
            # 40 new tokens after 6 slide past the context of 24.
            found[f"{name}, {way}"] = generate(model, prompt, 40, **options).tolist()
            if "stop" not in options:
                padded = generate(model, batch, 30, attention_mask=mask, **options)
                found[f"{name}, {way}, left-padded batch"] = padded.tolist()
        with torch.no_grad():
            found[f"{name}, logits"] = sha256(model(prompt).numpy().tobytes())
    return found


def record_training() -> dict[str, Any]:
    """Record losses, validation losses and all files of a run of every recipe."""
    mygpt("prepare", "alice", "--out", "gpt2_tokens", "--tokenizer", "gpt2", "--workers", "1")
    found: dict[str, Any] = {"files of prepare": file_hashes("gpt2_tokens")}
    for path in sorted(CONFIGS.glob("*.yaml")):
        changed = {"data": "alice", "max_steps": STEPS, **SHORTENED.get(path.stem, {})}
        # A checkpoint of 124 million parameters has 1.5 GB.
        changed |= {"checkpoint_every": 0, "checkpoint_minutes": 0} if path.stem == "gpt2_124m" else {}
        options = [word for key, value in changed.items() for word in (f"--{key}", value)]
        mygpt("train", "--config", path, "--out", path.stem, *TRAIN, *options)
        found[path.stem] = losses(path.stem)
        found[f"{path.stem}, files"] = file_hashes(path.stem)
        found[f"{path.stem}, text"] = mygpt(
            "generate", "--model", path.stem, "--prompt", "Alice", "--max_new_tokens", 40, "--seed", 1
        )
    variants = {
        "random order with dropout": ["--drop_rate", "0.2", "--micro_batch_size", "3"],
        "sequential order in bf16": ["--order", "sequential", "--precision", "bf16", "--schedule", "wsd"],
        "gradient checkpointing": ["--gradient_checkpointing", "true", "--schedule", "constant", "--grad_clip", "0"],
        "bpe": ["--tokenizer", "bpe", "--tokenizer_size", "400", "--early_stop", "1"],
        "words": ["--tokenizer", "words", "--sample_prompt", "Alice", "--sample_temperature", "0"],
    }
    for name, options in variants.items():
        mygpt("train", "--out", name, "--max_steps", STEPS, *TINY, *TRAIN, *options)
        found[name] = losses(name)
        found[f"{name}, files"] = file_hashes(name)
    measured = mygpt("evaluate", "--model", "bpe", "--data", "alice", "--stride", 16)
    found["evaluate"] = re.findall(r"\d+\.\d+", measured)
    return found


def write_records(path: str) -> None:
    """Write Alpaca-style records; some have an input, and their lengths differ."""
    things = "cat dog rabbit hatter queen king duchess mouse".split()
    records = []
    for n in range(64):
        thing = things[n % len(things)]
        answer = " ".join([thing] * (1 + n % 4))
        records.append(
            {"instruction": f"Say {thing} {1 + n % 4} times", "input": thing if n % 3 else "", "output": answer}
        )
    Path(path).write_text(json.dumps(records), encoding="utf-8")


def record_finetuning() -> dict[str, Any]:
    """Record losses and all files of a run of every way of fine-tuning."""
    base = [
        "--tokenizer",
        "bpe",
        "--tokenizer_size",
        "400",
        "--context_length",
        "192",
        "--emb_dim",
        "32",
        "--n_heads",
        "2",
    ]
    mygpt("train", "--out", "base", "--max_steps", STEPS, "--n_layers", "2", "--batch_size", "4", *base, *TRAIN)
    write_records("records.json")
    found: dict[str, Any] = {}
    for name, options in FINETUNE.items():
        out = f"tuned {name}"
        mygpt("finetune", "--model", "base", "--data", "records.json", "--out", out, "--eval_every", 10, *options)
        found[name] = losses(out)
        found[f"{name}, files"] = file_hashes(out)
        found[f"{name}, text"] = mygpt(
            "generate", "--model", out, "--prompt", "Say cat", "--max_new_tokens", 20, "--seed", 1
        )
    return found


def record_files() -> dict[str, Any]:
    """Record the files that save_pretrained and each tokenizer's save write, and the ids of the opened copy."""
    text = (
        "Alice was beginning to get very tired of sitting by her sister on the bank, and of having nothing to do. " * 3
    )
    tokenizers = {
        "gpt2": get_tokenizer("gpt2"),
        "chars": MyGPT.CharTokenizer.from_text(text),
        "words": MyGPT.SimpleTokenizer.from_text(text),
        "bpe": MyGPT.BPETokenizer.train(text, 300, special_tokens=["<|endoftext|>"]),
    }
    found: dict[str, Any] = {}
    for name, tokenizer in tokenizers.items():
        tokenizer.save(f"tokenizer {name}")
        found[f"{name} tokenizer"] = file_hashes(f"tokenizer {name}")
        found[f"{name} ids"] = load_tokenizer(f"tokenizer {name}").encode("Alice was very tired of her sister.")
        varied_model(vocab_size=tokenizer.n_vocab).save_pretrained(f"model {name}", tokenizer)
        found[f"model with {name}"] = file_hashes(f"model {name}")
        found[f"model with {name}, opened"] = weights_hash(GPTModel.from_pretrained(f"model {name}"))
    varied_model(tie_weights=False).save_pretrained("model alone")
    found["model alone"] = file_hashes("model alone")
    return found


def record_options() -> dict[str, Any]:
    """Record every command's options and their defaults."""
    return {name: yaml.safe_load(mygpt(*name.split(), "--print_config")) for name in COMMANDS}


def stop_after(n_records: int, run: str, arguments: list[Any], source: Path) -> None:
    """Start a run with the given source and stop it by SIGTERM after so many records in metrics.jsonl."""
    command = [sys.executable, "-m", "MyGPT", *map(str, arguments)]
    with open(f"{run}.log", "wb") as log:
        process = subprocess.Popen(command, env={**os.environ, "PYTHONPATH": str(source)}, stdout=log, stderr=log)
        path = Path(run, "metrics.jsonl")
        while process.poll() is None and (not path.is_file() or len(path.read_bytes().splitlines()) < n_records):
            time.sleep(0.01)
        process.send_signal(signal.SIGTERM)
        status = process.wait()
    if status != 143:
        raise RuntimeError(
            f"the run in {run} ended with status {status} before it was stopped: {Path(log.name).read_text()}"
        )


def record_resumed(old: Path) -> dict[str, Any]:
    """Record the final weights and losses of runs that the old source starts and the current one resumes.

    They do not depend on the step at which a run was stopped, so an uninterrupted run has the same.
    """
    long = [
        "--max_steps",
        250,
        "--eval_every",
        50,
        "--sample_every",
        100,
        "--log_every",
        1,
        "--checkpoint_every",
        7,
        *TINY,
    ]
    if not Path("base").is_dir():
        raise ValueError("the resumed runs need the model of the section `finetuning`")
    tune = ["finetune", "--model", "base", "--data", "records.json", "--epochs", 12, "--eval_every", 20]
    runs: dict[str, list[Any]] = {
        "adamw": ["train", "--drop_rate", 0.1, *long],
        "muon": ["train", "--optimizer", "muon", "--order", "shuffled", *long],
        "lora": tune,
        "full": [*tune, "--full", "true", "--learning_rate", 1e-3],
    }
    found: dict[str, Any] = {}
    for name, arguments in runs.items():
        run = f"resumed {name}"
        stop_after(12, run, [*arguments, "--out", run], old)
        mygpt(arguments[0], "--resume", run)
        found[name] = losses(run)
        found[name].pop("checkpoints", None)  # depends on the step of the stop
        found[f"{name}, files"] = {
            key: value for key, value in file_hashes(run).items() if not key.startswith(("checkpoints/", "metrics"))
        }
        last = sorted(Path(run, "checkpoints").glob("step-*"))[-1]
        found[f"{name}, last checkpoint"] = file_hashes(str(last))
    return found


def flatten(value: Any, prefix: str = "") -> dict[str, Any]:
    """Return the leaves of nested dictionaries by their path."""
    if not isinstance(value, dict) or not value:
        return {prefix: value}
    return {
        key: leaf
        for name, part in value.items()
        for key, leaf in flatten(part, f"{prefix} | {name}".strip(" |")).items()
    }


def compare(before: Path, after: Path) -> bool:
    """Print a table of what differs between two records, and return whether nothing does."""
    first, second = (json.loads(path.read_text(encoding="utf-8")) for path in (before, after))
    rows, counts = [], []
    for section in {**first, **second}:
        left, right = flatten(first.get(section, {})), flatten(second.get(section, {}))
        differing = [key for key in {**left, **right} if left.get(key, "absent") != right.get(key, "absent")]
        counts.append(f"| {section} | {len({**left, **right})} | {len(differing)} |")
        rows += [f"| {section}: {key} | {shown(left, key)} | {shown(right, key)} |" for key in differing]
    print("| section | values | differ |\n|---|---|---|", *counts, sep="\n")
    if rows:
        print("\n| value | before | after |\n|---|---|---|", *rows, sep="\n")
    return not rows


def shown(values: dict[str, Any], key: str) -> str:
    text = " ".join(str(values.get(key, "absent")).split())
    return text if len(text) <= 60 else f"{text[:57]}..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="the JSON file to write")
    parser.add_argument("--old", type=Path, default=SOURCE, help="the src directory that starts the runs to be resumed")
    parser.add_argument("--only", nargs="+", help="record these sections only (resumed needs finetuning)")
    parser.add_argument("--compare", nargs=2, type=Path, metavar=("BEFORE", "AFTER"), help="print what differs")
    options = parser.parse_args()
    if options.compare:
        sys.exit(0 if compare(*options.compare) else 1)
    if options.out is None:
        parser.error("--out FILE or --compare BEFORE AFTER is needed")
    out, old = options.out.resolve(), options.old.resolve()
    torch.set_num_threads(1)
    sections = {
        "options": record_options,
        "initial weights": record_initial_weights,
        "generation": record_generation,
        "files": record_files,
        "training": record_training,
        "finetuning": record_finetuning,
        "resumed": lambda: record_resumed(old),
    }
    found: dict[str, Any] = {}
    with tempfile.TemporaryDirectory() as directory:
        os.chdir(directory)  # the recorded config.yaml files hold relative paths only
        os.environ["MYGPT_CACHE"] = str(Path(directory, "cache"))
        for name, record in sections.items():
            if not options.only or name in options.only:
                began = time.perf_counter()
                found[name] = record()
                print(f"{name}: {time.perf_counter() - began:.0f} s", file=sys.stderr)
        os.chdir(out.parent)
    out.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
