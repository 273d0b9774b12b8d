"""Run the two-core speedrun: which entry trains a language model soonest, or best in ten minutes, on two CPU cores?

Usage: python benchmarks/two_core_speedrun.py [ENTRY ...] [--track 1.88] [--rounds 5] [--text FILE] [--archive FILE]
       [--train_minutes 10] [--append] [--out DIR]

docs/performance/speedrun.md has the rules, the records and the way to enter. The tracks:

  1.88   the fewest seconds until a validation loss of 1.88 nats per character on tinyshakespeare
  1.70   the same until a loss of 1.70
  bytes  the fewest bits per byte after ten minutes of training on 10 MB of text

ENTRY is a recipe (a YAML file that `mygpt train --config` accepts) or a Python file with the function `start`; by default
the entries are those of the page. The entries take turns; every run has its own process and a fresh random seed. The script
writes speedrun_TRACK.json to --out. --append adds the runs to those in this file, so that a long session can be split.
"""

from __future__ import annotations

import argparse
import dataclasses
import hashlib
import math
import os
import re
import runpy
import secrets
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, Protocol

from measurements import Results, in_a_process, markdown, parse, rounds

ROOT = Path(__file__).resolve().parents[1]
N_CORES = 2
N_REPEATS = 5
"""The fewest runs of an entry, and of the record before it, that make a record."""
P = 0.01
HOUR = 3600
MAX_PREPARATION = 60
"""The seconds that an entry may take to learn its tokens and to tokenize the training text, which is not timed."""

MAX_LAST_STEP = 5
"""The seconds by which the last step may exceed the training time on the track "bytes"."""


@dataclasses.dataclass(frozen=True)
class Track:
    """A track of the contest: its text, the unit of its loss, and the entries in the order of the page."""

    text: str
    unit: str
    entries: tuple[str, ...]
    target: float | None = None
    """The loss that an entry must reach, or None if it trains for a given time."""

    @property
    def measure(self) -> str:
        """The name of the measure by which entries are ranked. Less is better."""
        return "training time" if self.target else "loss"


NANOGPT, FAST = "benchmarks/entries/nanogpt.py", "configs/shakespeare_char_fast.yaml"
QUICK = "configs/shakespeare_char_quick.yaml", "configs/speedrun_188.yaml"
TRACKS = {
    "1.88": Track("tinyshakespeare", "nats per character", (NANOGPT, *QUICK), 1.88),
    "1.70": Track("tinyshakespeare", "nats per character", (FAST, "configs/speedrun_170.yaml"), 1.70),
    "bytes": Track("django", "bits per byte", (NANOGPT, "configs/speedrun_bytes.yaml")),
}


def results_name(track: str) -> str:
    """Return the name of the results of a track, which is also the name of its table."""
    return f"speedrun_{track.replace('.', '')}"


class Entry(Protocol):
    """The object that the function `start(text, seed)` of an entry returns.

    `start` gets the training text. It may learn tokens, tokenize the text and create a model with random weights. It must
    neither train nor compile.
    """

    context_length: int
    """The number of tokens of a window in the evaluation."""

    def encode(self, text: str) -> Any:
        """Return the token ids of a text, one per character in the tracks 1.88 and 1.70."""

    def decode(self, ids: Any) -> str:
        """Return the text of token ids. It must be the text that was encoded."""

    def step(self, share: float | None) -> bool:
        """Take a training step, and return False if it was the last.

        `share` is None if the entry decides how many steps it takes. On the track "bytes" it is the share of the training
        time that has passed, from 0 to 1.
        """

    def logits(self, ids: Any) -> Any:
        """Return the scores of the next token, a tensor (B, T, vocabulary size), after each of the ids, a tensor (B, T)."""


class RecipeEntry:
    """A recipe that MyGPT's Trainer trains. With a time limit, the schedule of the learning rate follows the clock."""

    def __init__(self, path: Path, text: str, seed: int) -> None:
        import numpy as np
        import torch

        from MyGPT import GPTModel, Trainer
        from MyGPT.commands._recipe import read_plan
        from MyGPT.tokenizers import make_tokenizer

        size, config, recipe = read_plan(path)
        if config is None:
            raise SystemExit(f"{path} describes only a model: add the options of the training")
        name, vocab_size = recipe.get("tokenizer", "chars"), recipe.get("tokenizer_size", 1024)
        self.tokenizer = make_tokenizer(name, [text], vocab_size, progress=False)
        self.context_length = size.context_length
        torch.manual_seed(seed)
        self.model = GPTModel(dataclasses.replace(size, vocab_size=self.tokenizer.n_vocab))
        ids = np.array(self.tokenizer.encode(text), dtype=np.uint16)
        self.trainer = Trainer(self.model, dataclasses.replace(config, seed=seed), ids, progress=False)
        self.trainer.setup()

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.encode(text)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids)

    def step(self, share: float | None) -> bool:
        trainer = self.trainer
        if share:  # The number of steps is not known yet: expect the next ones to be as fast as those so far.
            n_steps = max(trainer.step_number + 1, round(trainer.step_number / share))
            trainer.config = dataclasses.replace(trainer.config, max_steps=n_steps)
        trainer.step()
        return share is not None or trainer.step_number < trainer.config.max_steps

    def logits(self, ids: Any) -> Any:
        return self.model.eval()(ids)


def starter(path: Path) -> Callable[[str, int], Entry]:
    """Return the function that starts the entry in a file."""
    if path.suffix in (".yaml", ".yml"):
        return lambda text, seed: RecipeEntry(path, text, seed)
    if path.suffix != ".py":
        raise SystemExit(f"{path} is neither a recipe (.yaml) nor a Python file (.py)")
    start = runpy.run_path(str(path)).get("start")
    if not callable(start):
        raise SystemExit(f"{path} has no function start(text, seed): see docs/performance/speedrun.md")
    return start


# The texts


def tinyshakespeare(path: str | None) -> tuple[str, str]:
    """Return the training text, the first nine tenths of tinyshakespeare, and the validation text."""
    from MyGPT.data.sources import DOWNLOADS, find_files

    found = find_files(path or "tinyshakespeare")[0]
    text = checked(found, DOWNLOADS["tinyshakespeare"].sha256).decode()
    n_train = len(text) - round(len(text) * 0.1)
    return text[:n_train], text[n_train:]


DJANGO = "Django-5.2", "1a47f7a7a3d43ce64570d350e008d2949abe8c7e21737b351b6a1611277c6d89"
DJANGO_TEXT = "9870f97a77a6c40fe143659481b985d5aa21d3e0a4763612a06b1c99df9d3bb1"
DJANGO_FILES = re.compile(r"Django-5\.2/(docs/.*\.txt|django/.*\.py)")


def django(path: str | None) -> tuple[str, str]:
    """Return 10 MB of the documentation and the Python files of Django, and 1 MB of other files for the validation.

    The files are ordered by the hash of their names, so that both parts are of the same kind.
    """
    with tempfile.TemporaryDirectory() as directory:
        archive = Path(path) if path else download_django(Path(directory))
        checked(archive, DJANGO[1])
        # The archive is read from front to back, because going back would decompress it from its start again.
        with tarfile.open(archive) as opened:
            files = {
                member.name: opened.extractfile(member).read()  # type: ignore[union-attr]
                for member in opened
                if member.isfile() and DJANGO_FILES.fullmatch(member.name)
            }
    content = b"".join(files[name] for name in sorted(files, key=lambda name: hashlib.sha256(name.encode()).digest()))
    train, val = content[:10_000_000], content[10_000_000:11_000_000]
    if hashlib.sha256(train).hexdigest() != DJANGO_TEXT:
        raise SystemExit(f"the text that was made from {archive.name} is not the text of the contest")
    return train.decode(), val.decode()


def download_django(directory: Path) -> Path:
    """Download the source archive of Django with pip, and return its path."""
    name = DJANGO[0].replace("-", "==")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--no-binary", ":all:", "-d", str(directory), name]
    if subprocess.run(command, stdout=subprocess.DEVNULL).returncode:
        raise SystemExit(f"pip could not download the source archive of {name}: give its path with --archive")
    return next(directory.glob("*.tar.gz"))


def checked(path: Path, sha256: str) -> bytes:
    """Return the content of a file, which must have the given hash."""
    content = path.read_bytes()
    if hashlib.sha256(content).hexdigest() != sha256:
        raise SystemExit(f"{path} is not the text of the contest: its SHA-256 must be {sha256}")
    return content


TEXTS = {"tinyshakespeare": tinyshakespeare, "django": django}


# A run


def run(
    path: str, track: str, text: str | None, minutes: float, seed: int, n_steps: int | None = None
) -> dict[str, Any]:
    """Train an entry and return its training time, its number of steps and its loss.

    With n_steps, end after so many steps and do not evaluate: this fills the caches on the disk.
    """
    rules = TRACKS[track]
    train_text, val_text = TEXTS[rules.text](text)
    began = time.time()
    entry = starter(Path(path))(train_text, seed)
    preparation = time.time() - began
    if preparation > MAX_PREPARATION:
        raise SystemExit(f"{path} took {preparation:.0f} s to prepare, and {MAX_PREPARATION} s are allowed")
    limit = None if rules.target else 60 * minutes
    seconds, n_done = train(entry, limit, n_steps)
    if n_steps is not None:
        return {}
    if limit is not None and seconds > limit + MAX_LAST_STEP:
        raise SystemExit(f"{path} trained for {seconds:.1f} s, and {limit:.0f} s are allowed")
    loss = evaluate(entry, val_text, rules, path)
    return {"started": began, "seconds": seconds, "steps": n_done, "loss": loss, "seed": seed}


def train(entry: Entry, limit: float | None, n_steps: int | None = None) -> tuple[float, int]:
    """Take steps until the entry ends or the time is up, and return the seconds and the number of steps."""
    n_done, began = 0, time.perf_counter()
    while n_done != n_steps:
        passed = time.perf_counter() - began
        if limit is not None and passed >= limit:
            break
        n_done += 1
        if not entry.step(None if limit is None else passed / limit):
            break
    return time.perf_counter() - began, n_done


def evaluate(entry: Entry, text: str, rules: Track, path: str) -> float:
    """Return the loss on the whole text but its first token, in the unit of the track.

    The text is cut into adjacent windows of the entry's context length.
    """
    import torch
    import torch.nn.functional as F

    ids = torch.tensor(list(entry.encode(text)))
    if entry.decode(ids.tolist()) != text:
        raise SystemExit(f"{path}: decode(encode(text)) is not the text")
    if rules.target and len(ids) != len(text):
        raise SystemExit(f"{path} has {len(ids)} tokens for {len(text)} characters: there must be one per character")
    total = torch.zeros((), dtype=torch.float64)
    with torch.no_grad():
        check_causality(entry, ids, path)
        for inputs, targets in windows(ids, entry.context_length):
            logits = entry.logits(inputs).double()
            total += F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="sum")
    if rules.target:
        return float(total) / (len(ids) - 1)
    n_bytes = len(text.encode()) - len(entry.decode(ids[:1].tolist()).encode())
    return float(total) / math.log(2) / n_bytes


def windows(ids: Any, length: int) -> Iterator[tuple[Any, Any]]:
    """Yield batches of about 4,096 inputs and targets, each (B, T), which together cover all ids. The last has one row."""
    n = (len(ids) - 1) // length * length
    for first in range(0, n, length * (rows := max(1, 4096 // length))):
        end = min(n, first + length * rows)
        yield ids[first:end].view(-1, length), ids[first + 1 : end + 1].view(-1, length)
    if n < len(ids) - 1:
        yield ids[None, n:-1], ids[None, n + 1 :]


def check_causality(entry: Entry, ids: Any, path: str) -> None:
    """Exit if the scores after a token change with a later token."""
    import torch

    one = ids[None, : entry.context_length]
    other, half = one.clone(), one.shape[1] // 2
    other[:, half:] = other[:, half:].flip(1)
    before = [entry.logits(window)[:, :half] for window in (one, other)]
    if not torch.allclose(*before, rtol=1e-4, atol=1e-4):
        raise SystemExit(f"{path} looks ahead: the scores after a token depend on later tokens")


# A session


def measure(options: argparse.Namespace, results: Results) -> None:
    """Run the entries in turn, and add the runs to the results."""
    rules = TRACKS[options.track]
    source = options.archive if rules.text == "django" else options.text
    fixed = {"track": options.track, "text": source, "minutes": options.train_minutes}
    for path in options.entries:
        if results.get(entry_name(path), "loss") is None:  # kernels that are compiled once per machine are not timed
            in_a_process(run, path=str(path), seed=0, n_steps=2, **fixed)
    for number in rounds(options):
        for path in options.entries:
            found = in_a_process(run, path=str(path), seed=secrets.randbits(32), **fixed)
            name, sha256 = entry_name(path), hashlib.sha256(path.read_bytes()).hexdigest()
            row = results.add(name, "training time", "s", found["seconds"])
            if row.about.setdefault("sha256", sha256) != sha256:
                raise SystemExit(f"{path} has changed since its earlier runs: begin a new session")
            results.add(name, "loss", rules.unit, found["loss"])
            for key in ("started", "steps", "seed"):
                row.about.setdefault(key, []).append(found[key])
            shown = f"{found['loss']:.4f} {rules.unit} after {found['steps']:,} steps in {found['seconds']:.1f} s"
            print(f"{number}. {name}: {shown}", file=sys.stderr)
            results.save(options.out)


def entry_name(path: Path) -> str:
    """Return the path of an entry in the repository, or its name if it is elsewhere."""
    path = path.resolve()
    return path.relative_to(ROOT).as_posix() if path.is_relative_to(ROOT) else path.name


def p_above(losses: list[float], target: float) -> float:
    """Return the p-value of a one-sided t-test: how likely losses at least this low are if their true mean is the target."""
    from MyGPT.evaluation.welch import t_test_p

    error = statistics.stdev(losses) / math.sqrt(len(losses))
    below = target - statistics.fmean(losses)
    if error == 0:
        return float(below < 0)
    half = t_test_p(below / error, len(losses) - 1) / 2
    return half if below > 0 else 1 - half


@dataclasses.dataclass
class Verdict:
    """The verdict on an entry, from all of its runs."""

    name: str
    losses: list[float]
    seconds: list[float]
    steps: list[int]
    is_record: bool
    reason: str
    """The p-values of a record, or the reason why the entry is none."""


def verdicts(results: Results) -> list[Verdict]:
    """Judge the entries of a session in the order in which they were first run."""
    rules, found = TRACKS[results.settings["track"]], []
    best: str | None = None
    for name in results.names:
        times, losses = results.row(name, "training time"), results.row(name, "loss")
        is_record, reason = judge(results, rules, name, best)
        found.append(Verdict(name, losses.values, times.values, times.about["steps"], is_record, reason))
        best = name if is_record else best
    return found


def judge(results: Results, rules: Track, name: str, best: str | None) -> tuple[bool, str]:
    """Return whether an entry beats the record `best`, and why."""
    from MyGPT.evaluation.welch import welch_test

    losses, reasons = results.row(name, "loss").values, []
    if len(losses) < N_REPEATS:
        return False, f"{len(losses)} of {N_REPEATS} runs"
    if rules.target is not None:
        p = p_above(losses, rules.target)
        if p >= P:
            return False, f"loss not below {rules.target:.2f} (p = {p:.2g})"
        reasons.append(f"loss: p = {p:.1g}")
    if best is not None:
        old, new = results.row(best, rules.measure), results.row(name, rules.measure)
        pairs = [results.row(one, "training time").about["started"] for one in (best, name)]
        if max(map(max, pairs)) - min(map(min, pairs)) > HOUR:
            return False, "not in the same hour as the record"
        test = welch_test(new.values, old.values)
        if test is None or test.t <= 0 or test.p >= P:
            return False, f"not better than the record (p = {1.0 if test is None else test.p:.2g})"
        reasons.append(f"{'time' if rules.target else 'bits'}: p = {test.p:.1g}")
    return True, ", ".join(reasons)


def session_table(results: Results) -> str:
    """Return the table of a session in Markdown."""
    rules, minutes = TRACKS[results.settings["track"]], results.settings["train_minutes"]
    rows = []
    for found in verdicts(results):
        verdict = f"record ({found.reason})" if found.is_record else found.reason
        steps, n_runs = f"{statistics.median(found.steps):,.0f}", str(len(found.losses))
        rows.append([f"`{found.name}`", steps, n_runs, interval(found.losses, 3), interval(found.seconds, 1), verdict])
    loss = rules.unit if rules.target or minutes == 10 else f"{rules.unit} after {minutes:g} minutes"
    return markdown(["entry", "steps", "runs", loss, "seconds", "verdict"], rows)


def interval(values: list[float], digits: int) -> str:
    """Return the mean of values and their range."""
    return f"{statistics.fmean(values):,.{digits}f} ({min(values):,.{digits}f} to {max(values):,.{digits}f})"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("entries", nargs="*", type=Path, metavar="ENTRY", help="a recipe or a Python file")
    parser.add_argument("--track", choices=TRACKS, default="1.88")
    parser.add_argument("--text", metavar="FILE", help="the file of tinyshakespeare. Default: download it")
    parser.add_argument("--archive", metavar="FILE", help="Django-5.2.tar.gz. Default: download it with pip")
    parser.add_argument("--train_minutes", type=float, default=10, help="the training time on the track bytes")
    parser.add_argument("--append", action="store_true", help="keep the runs of the session in --out")
    options = parse(parser, run, rounds=N_REPEATS)
    options.entries = options.entries or [ROOT / name for name in TRACKS[options.track].entries]
    for path in options.entries:
        if not path.is_file():
            parser.error(f"there is no file {path}")
        starter(path)
    use_two_cores()
    settings = {"track": options.track, "train_minutes": options.train_minutes}
    results = Results(results_name(options.track), settings)
    stored = None if options.out is None else options.out / f"{results.name}.json"
    if options.append and stored is not None and stored.exists():
        earlier = Results.load(stored)
        if (earlier.settings, earlier.machine) != (results.settings, results.machine):
            parser.error(f"{stored} is a session of another machine, or with another --train_minutes")
        results.rows = earlier.rows
    measure(options, results)
    print(f"\n{session_table(results)}")


def use_two_cores() -> None:
    """Let this process and its children use no more than two cores, as far as the system allows it."""
    os.environ["OMP_NUM_THREADS"] = str(N_CORES)
    if hasattr(os, "sched_setaffinity"):
        cores = sorted(os.sched_getaffinity(0))
        if len(cores) < N_CORES:
            raise SystemExit(f"the contest needs {N_CORES} cores, and this machine gives {len(cores)}")
        if len(cores) > N_CORES:
            os.sched_setaffinity(0, cores[:N_CORES])


if __name__ == "__main__":
    main()
