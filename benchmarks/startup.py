"""Measure startup times: imports, --help, and the first token of a GPT-2 124M, for MyGPT, torch and transformers.

Usage: python benchmarks/startup.py [--rounds 9] [--size 124M] [--directory DIR] [--out DIR]

The script writes a random model (0.5 GB) once. Each measurement starts a new process; the programs run in turn, after
one round that is not counted. The time runs from the start of the process to its end, or until the first token arrives
on the pipe. The uncounted round also brings the model's file into the page cache.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from measurements import Results, parse, rounds
from tables import show

PROMPT = "The wizard entered the room"
TRANSFORMERS = """
import sys
from transformers import AutoModelForCausalLM, AutoTokenizer, TextStreamer
tokenizer = AutoTokenizer.from_pretrained(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
ids = tokenizer(sys.argv[2], return_tensors="pt")
streamer = TextStreamer(tokenizer, skip_prompt=True)
model.generate(**ids, max_new_tokens=1, do_sample=True, top_k=50, streamer=streamer, pad_token_id=50256)
"""


def write_model(size: str, directory: Path) -> None:
    import torch

    from MyGPT import GPT2_CONFIGS, GPTModel, get_tokenizer

    torch.manual_seed(0)
    GPTModel(GPT2_CONFIGS[size]).save_pretrained(directory, get_tokenizer("gpt2"))


def seconds(command: list[str], skipped: int | None) -> float:
    """Return the seconds until the process ends or, with `skipped`, until it has written more than so many bytes."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    start = time.perf_counter()
    with subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None
        if skipped is not None:
            process.stdout.read(skipped + 1)
            taken = time.perf_counter() - start
        process.stdout.read()
    if process.returncode:
        raise RuntimeError(f"{' '.join(command)} ended with status {process.returncode}")
    return time.perf_counter() - start if skipped is None else taken


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--size", default="124M")
    parser.add_argument(
        "--directory", default=tempfile.gettempdir(), help="a directory with enough space for the model"
    )
    options = parse(parser, rounds=9)
    results = Results("startup", {"size": options.size}, ["transformers", "safetensors"])
    for ours, theirs in RATIOS:
        results.compare(ours, theirs, "time")
    with tempfile.TemporaryDirectory(dir=options.directory) as directory:
        write_model(options.size, Path(directory) / "model")
        compare(str(Path(directory) / "model"), options, results)
    show(results)


RATIOS = (
    ("import MyGPT and its model", "import torch"),
    ("first token, mygpt generate", "first token, transformers"),
    ("first token, packed int8", "first token, transformers"),
)


def compare(model: str, options: argparse.Namespace, results: Results) -> None:
    python, mygpt = sys.executable, [sys.executable, "-m", "MyGPT"]
    generate = ["generate", "--model", model, "--prompt", PROMPT, "--max_new_tokens", "1", "--device", "cpu"]
    programs: dict[str, tuple[list[str], int | None]] = {
        "import torch": ([python, "-c", "import torch"], None),
        "import MyGPT": ([python, "-c", "import MyGPT"], None),
        "import MyGPT and its model": ([python, "-c", "from MyGPT import GPTModel, generate"], None),
        "mygpt --help": ([*mygpt, "--help"], None),
        "mygpt generate --help": ([*mygpt, "generate", "--help"], None),
        "first token, mygpt generate": ([*mygpt, *generate], len(PROMPT.encode())),
        "first token, packed int8": ([*mygpt, *generate, "--precision", "int8"], len(PROMPT.encode())),
        "first token, transformers": ([python, "-c", TRANSFORMERS, model, PROMPT], 0),
    }
    subprocess.run([*mygpt, "pack", "--model", model, "--precision", "int8"], check=True, stdout=subprocess.DEVNULL)
    for turn in rounds(options, warm_up=True):
        for name, (command, skipped) in programs.items():
            taken = seconds(command, skipped)
            if turn:
                results.add(name, "time", "s", taken)
        results.save(options.out)


if __name__ == "__main__":
    main()
