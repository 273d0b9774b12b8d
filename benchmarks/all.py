"""Run all benchmarks within a given time, and make every table of the documentation for this machine.

Usage: python benchmarks/all.py --out DIR [--minutes 60] [--only decode lora] [--text FILE] [--records FILE]
       [--litgpt PYTHON] [--optimum PATH] [--llama_server PATH] [--tensorflow PYTHON] [--models DIR]

The scripts run one after another, each with a share of the time: it measures fewer rounds if the share is small, but at
least one. On two cores, one round of everything takes about 45 minutes. DIR gets the results (README.md describes their
format), `tables.md` with all tables, `all.json` with the status of each benchmark, and `all.log` with all output.

A benchmark whose packages or files are missing is left out, and a missing program is left out of its benchmark; both are
reported. A benchmark that fails does not stop the others; the exit status is then 1. If the command is interrupted,
repeat it with the same DIR: benchmarks that are done are not repeated. Delete DIR/all.json to repeat all of them.

Only the table of the contest's track "bytes" is missing, whose runs take ten minutes each; see two_core_speedrun.py.

`python benchmarks/tables.py` writes the tables of benchmarks/results into the documentation.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from measurements import run_limited
from tables import ROOT, as_markdown

LEFT_OUT = re.compile(r"^(.+?) is left out: (.+)$")
"""A line with which a script reports a missing program."""
HANGING = 15 * 60
"""A script that exceeds its share of the time by so many seconds is stopped."""


@dataclass(frozen=True)
class Benchmark:
    """A script with its arguments. A value in capitals stands for an option of this command, and is dropped with it."""

    script: str
    arguments: tuple[str, ...] = ()
    weight: float = 1.0
    """The share of the time: minutes of an hour."""
    packages: tuple[str, ...] = ()
    """Packages without which the script does not run."""
    files: tuple[str, ...] = ()
    """Options of this command without which the script does not run."""


TRAINING = ("--precision", "fp32", "bf16", "--compiled", "--litgpt=LITGPT")
BENCHMARKS = {
    "training_small": Benchmark("training.py", ("--models", "small", *TRAINING), 9),
    "training_char": Benchmark("training.py", ("--models", "char", "--steps", "20", *TRAINING), 5),
    "training_124m": Benchmark("training.py", ("--models", "124m", "--steps", "2", *TRAINING), 8),
    "lora": Benchmark("lora.py", (), 3, ("peft", "transformers")),
    "overheads": Benchmark("overheads.py", ("--text=TEXT",), 3, (), ("text",)),
    "decode": Benchmark("decode.py", ("--directory=MODELS", "--optimum=OPTIMUM"), 10),
    "lookup": Benchmark("lookup.py", (), 2),
    "live": Benchmark("live.py", (), 1, ("selenium",)),
    "serving": Benchmark("serving.py", ("--quick", "--directory=MODELS", "--llama_server=LLAMA_SERVER"), 9),
    "loading": Benchmark(
        "loading.py", ("--sizes", "124M", "--directory=MODELS", "--tensorflow=TENSORFLOW"), 2, ("transformers",)
    ),
    "startup": Benchmark("startup.py", ("--directory=MODELS",), 2, ("transformers",)),
    "bpe": Benchmark("bpe.py", ("--text=TEXT",), 0.5, ("rustbpe", "tokenizers"), ("text",)),
    "bpe_x20": Benchmark("bpe.py", ("--text=TEXT", "--repeat", "20"), 1, ("rustbpe", "tokenizers"), ("text",)),
    "encoding": Benchmark("encoding.py", ("--text=TEXT", "--repeat", "20"), 1.5, ("tokenizers",), ("text",)),
    "quality": Benchmark("quality.py", ("--directory=MODELS",), 2),
    "finetuning": Benchmark(
        "finetuning.py", ("--data=RECORDS", "--text=TEXT", "--epochs", "0.6"), 2, ("peft", "transformers"),
        ("text", "records"),
    ),
    "packing": Benchmark("packing.py", ("--data=RECORDS",), 2, (), ("records",)),
    "checkpointing": Benchmark("checkpointing.py", (), 2),
    "tinyshakespeare": Benchmark("tinyshakespeare.py", ("--text=TEXT",), 4, (), ("text",)),
    "speedrun_188": Benchmark("two_core_speedrun.py", ("--text=TEXT",), 5, (), ("text",)),
    "speedrun_170": Benchmark("two_core_speedrun.py", ("--track", "1.70", "--text=TEXT"), 5, (), ("text",)),
    "growth": Benchmark("growth.py", (), 6),
}  # fmt: skip


def command_of(benchmark: Benchmark, options: argparse.Namespace, minutes: float) -> list[str]:
    """Return the command that measures a benchmark for about so many minutes."""
    words = [sys.executable, str(Path(__file__).parent / benchmark.script)]
    for argument in benchmark.arguments:
        name, _, value = argument.partition("=")
        if not value.isupper():
            words.append(argument)
        elif (given := getattr(options, value.lower())) is not None:
            words += [name, str(given)]
    return [*words, "--out", str(options.out), "--minutes", f"{minutes:.2f}"]


def missing(benchmark: Benchmark, options: argparse.Namespace) -> str:
    """Return what the benchmark needs and does not have, or nothing."""
    packages = [package for package in benchmark.packages if importlib.util.find_spec(package) is None]
    files = [f"--{name}" for name in benchmark.files if getattr(options, name) is None]
    return " and ".join([*files, *(f"the package {package}" for package in packages)])


def run(name: str, options: argparse.Namespace, seconds: float) -> dict[str, Any]:
    """Run a benchmark for about so many seconds, and return its status."""
    benchmark = BENCHMARKS[name]
    if lacks := missing(benchmark, options):
        return {"status": "left out", "message": f"it needs {lacks}", "seconds": 0.0, "left_out": []}
    lines, left_out = [""], []
    with open(options.out / "all.log", "a", encoding="utf-8") as log:

        def read(line: str) -> None:
            log.write(line)
            log.flush()
            if line.strip():
                lines.append(line.strip())
            if found := LEFT_OUT.match(line.strip()):
                left_out.append(f"{found[1]}: {found[2]}")

        command = command_of(benchmark, options, seconds / 60)
        log.write(f"\n=== {name}: {' '.join(command)}\n")
        paths = [str(ROOT / "src"), *filter(None, [os.environ.get("PYTHONPATH")])]
        environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUNBUFFERED": "1"}
        began = time.monotonic()
        status, is_stopped = run_limited(command, seconds + HANGING, read, environment)
    result = {"status": "done", "message": "", "seconds": round(time.monotonic() - began, 1), "left_out": left_out}
    if is_stopped:
        result |= {"status": "failed", "message": f"stopped after {result['seconds']:.0f} s"}
    elif status:
        result |= {"status": "failed", "message": lines[-1]}
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True, help="the directory for the results")
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--only", nargs="+", choices=list(BENCHMARKS), default=list(BENCHMARKS), metavar="NAME",
                        help=f"run these benchmarks only: {', '.join(BENCHMARKS)}")  # fmt: skip
    parser.add_argument("--text", help="tinyshakespeare, which is downloaded, or its file, for tokenizers and training")
    parser.add_argument("--records", type=Path, help="a JSON file with Alpaca records, for fine-tuning")
    parser.add_argument("--litgpt", help="the path of a Python that has litgpt")
    parser.add_argument("--optimum", help="the path of optimum-cli, which converts the models for OpenVINO")
    parser.add_argument("--llama_server", help="the path of llama.cpp's program llama-server")
    parser.add_argument("--tensorflow", help="the path of a Python that has TensorFlow")
    parser.add_argument("--models", type=Path, default=Path("bench-models"), help="the directory for converted models")
    options = parser.parse_args()
    if options.records is not None and not options.records.is_file():
        parser.error(f"--records {options.records} is not a file")
    if options.text is not None:
        options.text = text_file(parser, options.text)
    options.out.mkdir(parents=True, exist_ok=True)
    options.models.mkdir(parents=True, exist_ok=True)
    sys.exit(0 if run_all(options) else 1)


def text_file(parser: argparse.ArgumentParser, text: str) -> str:
    """Return the path of a text: a file, or a name that MyGPT can download."""
    from MyGPT.data.sources import find_files

    try:
        return str(find_files(text)[0])
    except (OSError, ValueError) as error:
        parser.error(f"--text {text}: {error}")


def run_all(options: argparse.Namespace) -> bool:
    """Run the benchmarks that are not done yet, and return whether none has failed."""
    state = options.out / "all.json"
    found: dict[str, Any] = json.loads(state.read_text(encoding="utf-8")) if state.exists() else {}
    waiting = [name for name in options.only if found.get(name, {}).get("status") != "done"]
    left = 60 * options.minutes - sum(found[name]["seconds"] for name in options.only if name not in waiting)
    for i, name in enumerate(waiting):
        weights = [BENCHMARKS[other].weight for other in waiting[i:]]
        share = max(0.0, left) * weights[0] / sum(weights)
        print(f"{name}: about {share / 60:.1f} minutes", flush=True)
        found[name] = run(name, options, share)
        left -= found[name]["seconds"]
        print(f"{name}: {found[name]['status']} {found[name]['message']} ({found[name]['seconds']:.0f} s)", flush=True)
        for program in found[name]["left_out"]:
            print(f"  left out: {program}", flush=True)
        state.write_text(json.dumps(found, indent=1) + "\n", encoding="utf-8")
        (options.out / "tables.md").write_text(as_markdown(options.out), encoding="utf-8")
    print(f"{options.out / 'tables.md'} has all tables")
    return all(found[name]["status"] != "failed" for name in options.only)


if __name__ == "__main__":
    main()
