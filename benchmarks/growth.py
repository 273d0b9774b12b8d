"""Measure how time and peak memory grow with context, batch size, layers and corpus size, and where growth changes.

Usage: python benchmarks/growth.py [--rounds 3] [--quick] [--out DIR] [--plot growth.svg] [--show DIR]

The models are in float32 and have a vocabulary of 512 tokens, because the head of a larger one would hide the growth.
Training and prompts use 4 layers of width 384. Generation is limited by memory bandwidth, so it uses 8 layers of width
512, whose weights fit in no cache. Heads are 64 wide. The synthetic text has as many distinct words as natural text of
its length.

Each point is measured in its own process; its memory is the peak minus the memory of the imported libraries. All points
are measured in turn, in several rounds. The medians are printed as Markdown tables with the slope between neighbouring
points on double logarithmic scales, and the predicted slope. A prediction counts operations and bytes and divides them
by the best rates of this machine, measured in the same run. docs/performance/growth.md explains the results. --quick
runs everything at toy sizes.
"""

from __future__ import annotations

import argparse
import json
import math
import multiprocessing
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from measurements import Results, parse, rounds
from memory import Peak
from tables import growth_panels, show

from MyGPT import GPTConfig, GPTModel, KVCache, TrainConfig, Trainer, accelerate, get_tokenizer
from MyGPT.acceleration.linear import fast_linear
from MyGPT.commands.bench import read_bandwidth
from MyGPT.costs import cache_bytes, training_memory
from MyGPT.data.prepare import prepare
from MyGPT.data.sampler import WindowSampler
from MyGPT.data.tokens import open_tokens, sampled_sha256
from MyGPT.tokenizers import BPETokenizer
from training import FixedBatches

SECONDS = 0.2
"""A point that takes less time is repeated until this many seconds have passed."""
VOCAB = 512
PASSES = 11
"""Numbers moved per weight between backward and the next forward pass: four for the gradient, which is written, read for its
norm, read and scaled; seven for AdamW, which reads four and writes three."""
HASHED = 64 << 20
"""Largest number of bytes that opening a prepared corpus reads."""


def config(context: int, layers: int, width: int, drop_rate: float = 0.0) -> GPTConfig:
    return GPTConfig(VOCAB, context, width, width // 64, layers, drop_rate, qkv_bias=True)


# The measured work. Each function prepares its inputs and returns the function to be timed.


def training(batch: int, context: int, layers: int, width: int, drop_rate: float = 0.0) -> Callable[[], Any]:
    ids = torch.randint(0, VOCAB, (batch, context + 1), generator=torch.Generator().manual_seed(1))
    data = FixedBatches(ids.expand(10**9, -1, -1))  # the same batch at each step
    settings = TrainConfig(batch_size=batch, precision="fp32", warmup_steps=0, schedule="constant")
    trainer = Trainer(GPTModel(config(context, layers, width, drop_rate)), settings, data, progress=False)
    trainer.setup()
    return trainer.step


def decoding(batch: int, seen: int, context: int, layers: int, width: int, precision: str) -> Callable[[], Any]:
    """Return a function that computes the next token of `batch` sequences of `seen` tokens."""
    fast = accelerate(GPTModel(config(context, layers, width)), precision)  # type: ignore[arg-type]
    ids = torch.zeros(batch, 1, dtype=torch.int64)
    kept = fast.new_cache(batch, seen + 1)
    kept.storage.normal_(std=0.1)

    def step(kept: KVCache = kept) -> None:
        kept.length = seen
        fast(ids, cache=kept, last_only=True)

    return torch.no_grad()(step)


def prompting(length: int, context: int, layers: int, width: int, fast: bool) -> Callable[[], Any]:
    model = GPTModel(config(context, layers, width)).eval()
    runner: Any = accelerate(model) if fast else model
    ids = torch.randint(0, VOCAB, (1, length), generator=torch.Generator().manual_seed(1))
    return torch.no_grad()(lambda: runner(ids, cache=runner.new_cache(1, length), last_only=True))


def learning_merges(text: str) -> Callable[[], Any]:
    def train() -> None:
        with open(text, encoding="utf-8") as lines:
            BPETokenizer.train(lines, 1024, progress=False)

    return train


def encoding(text: str) -> Callable[[], Any]:
    tokenizer, content = get_tokenizer("gpt2"), Path(text).read_text(encoding="utf-8")
    tokenizer.encode("warm")
    return lambda: tokenizer.encode(content)


def preparing(text: str) -> Callable[[], Any]:
    tokenizer = get_tokenizer("gpt2")
    tokenizer.encode("warm")

    def run() -> None:
        with tempfile.TemporaryDirectory() as directory:
            prepare([Path(text)], Path(directory) / "out", tokenizer, progress=False)

    return run


def opening(corpus: str) -> Callable[[], Any]:
    return lambda: open_tokens(corpus)


def batching(corpus: str, order: str) -> Callable[[], Any]:
    ids = np.memmap(Path(corpus) / "tokens.bin", "<u2", "r")
    steps = iter(range(10**9))
    sampler = WindowSampler(ids, 256, 12, order)  # type: ignore[arg-type]
    return lambda: sampler.batch(next(steps))


MEASURED = {
    f.__name__: f
    for f in (training, decoding, prompting, learning_merges, encoding, preparing, opening, batching)
}  # fmt: skip


TOY = {"batch": 1, "context": 16, "seen": 8, "length": 8, "layers": 1, "width": 64}


def measure(name: str, arguments: dict[str, Any], warm: bool) -> tuple[float, int]:
    """Return the median seconds and the peak bytes of a point, in a new process. Without `warm` the work runs once."""
    if "layers" in arguments:  # loads the libraries' code into memory before the measurement
        MEASURED[name](**{key: TOY.get(key, value) for key, value in arguments.items()})()
    with Peak() as peak:
        run = MEASURED[name](**arguments)
        if warm:
            run()
        times: list[float] = []
        while not times or (warm and sum(times) < SECONDS):
            start = time.perf_counter()
            run()
            times.append(time.perf_counter() - start)
    return statistics.median(times), peak.n_bytes


def ceilings(width: int) -> tuple[float, float]:
    """Return the FLOP/s of the best float32 matrix product, and the bytes read per second."""
    x, weight = torch.randn(2048, width), torch.randn(4 * width, width)
    times = []
    with fast_linear(), torch.no_grad():
        for _ in range(12):
            start = time.perf_counter()
            F.linear(x, weight)
            times.append(time.perf_counter() - start)
    return 2 * x.numel() * 4 * width / min(times[2:]), read_bandwidth()


# The predictions, in seconds or bytes. Only the shape of a predicted curve matters.


@dataclass(frozen=True)
class Ceilings:
    operations: float
    bytes_read: float


@cache
def shape(context: int, layers: int, width: int) -> GPTModel:
    with torch.device("meta"):
        return GPTModel(config(context, layers, width))


def training_seconds(
    best: Ceilings, batch: int, context: int, layers: int, width: int, drop_rate: float = 0.0
) -> float:
    """Return the seconds of matrix products and optimizer. Attention computes half of the pairs, or all with dropout."""
    model = shape(context, layers, width)
    operations = batch * context * model.estimate_flops(context if drop_rate else context // 2)
    return operations / best.operations + PASSES * 4 * model.num_parameters() / best.bytes_read


def training_bytes(batch: int, context: int, layers: int, width: int, drop_rate: float = 0.0) -> float:
    return training_memory(config(context, layers, width, drop_rate), batch).peak


def decoding_seconds(
    best: Ceilings, batch: int, seen: int, context: int, layers: int, width: int, precision: str
) -> float:
    """Return the larger of two times: reading the weights and every cache once, and computing the operations."""
    model = shape(context, layers, width)
    weights = model.num_parameters(exclude_embeddings=True) + VOCAB * width
    n_bytes = weights * {"fp32": 4, "int8": 1}[precision] + batch * seen * cache_bytes(model.config)
    operations = batch * model.estimate_flops(seen, backward=False)
    return max(n_bytes / best.bytes_read, operations / best.operations)


def prompting_seconds(best: Ceilings, length: int, context: int, layers: int, width: int, fast: bool) -> float:
    model = shape(context, layers, width)
    operations = length * model.estimate_flops(length // 2, backward=False)
    return max(4 * model.num_parameters() / best.bytes_read, operations / best.operations)


@dataclass(frozen=True)
class Line:
    """One curve: the work at each x, the slope expected at first sight, and the predictions."""

    panel: str
    name: str
    points: dict[float, tuple[str, dict[str, Any]]]
    """Maps x to the name of a function in MEASURED and its arguments."""
    law: float
    """The slope expected at first sight: 1 for linear growth, 0 for none."""
    seconds: Callable[[Ceilings, float], float]
    law_of_bytes: float | None = None
    n_bytes: Callable[[float], float] | None = None
    panel_of_bytes: str | None = None
    warm: bool = True


@dataclass(frozen=True)
class Sizes:
    layers: int
    width: int
    decoding_layers: int
    decoding_width: int
    tokens: int
    contexts: tuple[int, ...]
    batches: tuple[int, ...]
    depths: tuple[int, ...]
    seen: tuple[int, ...]
    megabytes: tuple[float, ...]
    corpora: tuple[int, ...]


FULL = Sizes(
    4, 384, 8, 512, 2048, (64, 128, 256, 512, 1024, 2048), (1, 2, 4, 8, 16, 32), (1, 2, 4, 8, 16),
    (16, 64, 256, 1024, 4096), (1, 4, 16), tuple(4**i * 10**6 for i in range(5)),
)  # fmt: skip
QUICK = Sizes(2, 64, 2, 64, 64, (16, 32, 64), (1, 2, 4), (1, 2, 4), (16, 64), (0.05, 0.1, 0.2), (2**12, 2**14, 2**16))

AGAINST_CONTEXT, AGAINST_COUNT = "Training: a step against the context", "Training: a step against batch and layers"
MEMORY = "{}, memory"
"""The title of a memory panel, made from the title of the time panel."""


def lines_of(sizes: Sizes, place: Path) -> list[Line]:
    L, C = sizes.layers, sizes.width

    def trained(name: str, panel: str, points: dict[float, dict[str, Any]], law: float, law_of_bytes: float) -> Line:
        full = {x: {"layers": L, "width": C, **point} for x, point in points.items()}
        return Line(
            panel, name, {x: ("training", point) for x, point in full.items()}, law,
            lambda best, x: training_seconds(best, **full[x]), law_of_bytes, lambda x: training_bytes(**full[x]),
            MEMORY.format(panel),
        )  # fmt: skip

    def decoded(name: str, panel: str, points: dict[float, dict[str, Any]], law: float) -> Line:
        shared = {"layers": sizes.decoding_layers, "width": sizes.decoding_width, "context": 2 * max(sizes.seen)}
        full = {x: {**shared, **point} for x, point in points.items()}
        return Line(
            panel, name, {x: ("decoding", point) for x, point in full.items()}, law,
            lambda best, x: decoding_seconds(best, **full[x]),
        )  # fmt: skip

    def prompted(name: str, fast: bool) -> Line:
        full = {T: {"length": T, "context": max(sizes.seen), "layers": L, "width": C, "fast": fast} for T in sizes.seen}
        return Line(
            "Generation: a prompt against its length", name, {x: ("prompting", point) for x, point in full.items()}, 1,
            lambda best, x: prompting_seconds(best, **full[int(x)]),
        )  # fmt: skip

    def of_text(name: str, function: str, law_of_bytes: float | None) -> Line:
        points = {x: (function, {"text": str(place / f"{x}.txt")}) for x in sizes.megabytes}
        predicted = None if law_of_bytes is None else lambda x: x**law_of_bytes
        panel = "Data: from text to tokens, against the size of the text in MB"
        return Line(panel, name, points, 1, lambda _, x: x, law_of_bytes, predicted, MEMORY.format(panel), warm=False)

    def of_corpus(name: str, function: str, predicted: Callable[[float], float], **more: Any) -> Line:
        points = {x / 1e6: (function, {"corpus": str(place / str(x)), **more}) for x in sizes.corpora}
        panel = "Data: opening prepared tokens, and a batch of 12 x 256, against millions of tokens"
        return Line(panel, name, points, 0, lambda _, x: predicted(1e6 * x))

    n, window, panel = sizes.tokens, sizes.contexts[1], "Generation: a token against the tokens seen"
    many = {T: {"batch": n // T, "context": T} for T in sizes.contexts}
    return [
        trained(f"{n:,} tokens", AGAINST_CONTEXT, many, 0, 0),
        trained(f"{n:,} tokens, dropout", AGAINST_CONTEXT,
                {T: {**point, "drop_rate": 0.1} for T, point in many.items()}, 0, 0),
        trained("one sequence", AGAINST_CONTEXT, {T: {"batch": 1, "context": T} for T in sizes.contexts}, 1, 1),
        trained(f"batch, sequences of {window} tokens", AGAINST_COUNT,
                {B: {"batch": B, "context": window} for B in sizes.batches}, 1, 1),
        trained(f"layers, {n // 2:,} tokens", AGAINST_COUNT,
                {k: {"batch": n // 2 // window, "context": window, "layers": k} for k in sizes.depths}, 1, 1),
        *(decoded(kind, panel, {S: {"batch": 1, "seen": S, "precision": kind} for S in sizes.seen}, 0)
          for kind in ("fp32", "int8")),
        *(decoded(kind, "Generation: a step against the batch",
                  {B: {"batch": B, "seen": sizes.seen[1], "precision": kind} for B in sizes.batches}, 0)
          for kind in ("fp32", "int8")),
        prompted("accelerate()", fast=True),
        prompted("without accelerate()", fast=False),
        of_text("learning 1,024 BPE tokens", "learning_merges", 0.6),
        of_text("encoding", "encoding", None),
        of_text("mygpt prepare", "preparing", 0),
        of_corpus("opening", "opening", lambda x: min(2 * x, HASHED)),
        of_corpus("a batch, random", "batching", lambda x: 1, order="random"),
        of_corpus("a batch, shuffled", "batching", lambda x: 1, order="shuffled"),
    ]  # fmt: skip


def write_text(path: Path, megabytes: float) -> None:
    """Write a text of words drawn by Zipf's law: n words have n**0.6 distinct ones, and frequent words are short."""
    letters, random, size, words = "etaoinshrdlucmfwygpbvkxqjz", np.random.default_rng(1), 0, []

    def spell(rank: int) -> str:
        word = ""
        while rank:
            rank, letter = divmod(rank - 1, 26)
            word += letters[letter]
        return word

    while size < 1e6 * megabytes:
        words.append(spell(int(random.zipf(1 / 0.6))))
        size += len(words[-1]) + 1
    lines = (" ".join(words[i : i + 10]) for i in range(0, len(words), 10))
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def write_corpus(directory: Path, n_tokens: int) -> None:
    """Write a prepared corpus of random ids."""
    directory.mkdir()
    path, block = directory / "tokens.bin", np.random.default_rng(1).integers(0, VOCAB, 2**20).astype("<u2")
    with open(path, "wb") as file:
        for start in range(0, n_tokens, len(block)):
            file.write(block[: n_tokens - start].tobytes())
    sampled = sampled_sha256(path)
    about = {"n_tokens": n_tokens, "dtype": "uint16", "sha256": sampled, "sampled_sha256": sampled}
    (directory / "tokens.json").write_text(json.dumps(about), encoding="utf-8")


def in_a_process(function: Callable[..., Any], *arguments: Any) -> Any:
    """Return an executor whose processes are forked from one that has imported the libraries and computed nothing."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(
        ["torch._dynamo", "MyGPT.commands.bench", "MyGPT.data.prepare", "MyGPT.training.trainer"]
    )
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        return pool.submit(function, *arguments).result()


def run(sizes: Sizes, options: argparse.Namespace) -> Results:
    """Measure every point in every round."""
    settings = {key: value for key, value in vars(sizes).items() if isinstance(value, int)}
    results = Results("growth", {**settings, "vocab_size": VOCAB})
    with tempfile.TemporaryDirectory() as directory:
        place = Path(directory)
        for megabytes in sizes.megabytes:
            write_text(place / f"{megabytes}.txt", megabytes)
        for n_tokens in sizes.corpora:
            write_corpus(place / str(n_tokens), n_tokens)
        lines = lines_of(sizes, place)
        for turn in rounds(options):
            operations, bytes_read = in_a_process(ceilings, sizes.width)
            results.add("matrix products", "rate", "FLOP/s", operations)
            results.add("memory", "rate", "bytes/s", bytes_read)
            for line in lines:
                for x, (name, arguments) in line.points.items():
                    store(results, line, x, *in_a_process(measure, name, arguments, line.warm))
                print(f"round {turn}: {line.panel}, {line.name}", file=sys.stderr)
            limits = Ceilings(*(results.row(name, "rate").median for name in ("matrix products", "memory")))
            for line in lines:
                for x in line.points:
                    row = results.row(line.name, f"{line.panel}, {x:g}")
                    row.about["predicted"] = 1e3 * line.seconds(limits, x)
            results.save(options.out)
    return results


def store(results: Results, line: Line, x: float, seconds: float, n_bytes: int) -> None:
    about = {"panel": line.panel, "x": x, "law": line.law}
    results.add(line.name, f"{line.panel}, {x:g}", "ms", 1e3 * seconds, **about)
    if line.n_bytes is not None:
        about = {"panel": line.panel_of_bytes, "x": x, "law": line.law_of_bytes, "predicted": line.n_bytes(x) / 1e6}
        results.add(line.name, f"{line.panel_of_bytes}, {x:g}", "MB", n_bytes / 1e6, **about)


# Maps a word in a panel's title to the label of its x axis.
AXES = {
    "open": "corpus (million tokens)",
    "context": "context (tokens)",
    "layers": "batch, layers",
    "batch": "batch (sequences)",
    "seen": "tokens seen",
    "length": "prompt (tokens)",
    "text": "text (MB)",
}


def draw(results: Results, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import FuncFormatter, LogLocator

    from MyGPT.inside.plots import COLOURS, save_figure

    every_panel = growth_panels(results)
    panels = list(every_panel.items())
    figure = Figure(figsize=(9, 3.1 * math.ceil(len(panels) / 2)), layout="constrained")
    grid: Any = figure.subplots(math.ceil(len(panels) / 2), 2, squeeze=False)
    for axes in grid.flat[len(panels) :]:
        axes.set_axis_off()
    for axes, (title, rows) in zip(grid.flat, panels, strict=False):
        # A curve has the same colour in the time panel and in the memory panel.
        names = [line["name"] for line in every_panel[title.removesuffix(MEMORY.format(""))]]
        for line in rows:
            colour = COLOURS[names.index(line["name"])]
            x, y = line["x"], line["measured"]
            axes.plot(x, y, "o-", color=colour, markersize=4, linewidth=1.5, label=line["name"])
            factor = y[-1] / line["predicted"][-1]
            axes.plot(x, [factor * value for value in line["predicted"]], "--", color=colour, linewidth=1, alpha=0.7)
        axes.set(xscale="log", yscale="log", ylabel=rows[0]["unit"])
        axes.set_title(title, fontsize=10)
        axes.set_xlabel(next(name for word, name in AXES.items() if word in title.rpartition(":")[2]))
        every = sorted({x for line in rows for x in line["x"]})
        axes.set_xticks(every, [f"{x:,.4g}" for x in every], fontsize=8)
        low, high = axes.get_ylim()
        if high < 10 * low:  # keeps noise from looking like growth
            middle = math.sqrt(low * high)
            axes.set_ylim(middle / 4, middle * 4)
        if axes.get_ylim()[1] < 300 * axes.get_ylim()[0]:
            axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:,g}"))
        axes.minorticks_off()
        axes.tick_params(axis="y", labelsize=8)
        axes.grid(alpha=0.3)
        axes.legend(frameon=False, fontsize=8)
    figure.suptitle("Points are measured; dashed is the predicted shape, laid through the last point", fontsize=10)
    save_figure(figure, path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="use toy sizes and one round")
    parser.add_argument("--plot", type=Path, help="a file for the plot (svg, png or pdf)")
    parser.add_argument(
        "--show", type=Path, metavar="DIR", help="print and plot the results in DIR, and measure nothing"
    )
    options = parse(parser, rounds=3)
    if options.quick:
        options.rounds = 1
    if options.show is not None:
        results = Results.load(options.show / "growth.json")
    else:
        results = run(QUICK if options.quick else FULL, options)
    show(results)
    if options.plot is not None:
        draw(results, options.plot)


if __name__ == "__main__":
    main()
