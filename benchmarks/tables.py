"""Make the tables of the documentation from the stored results.

Usage: python benchmarks/tables.py [--results benchmarks/results] [--check]

A table in README.md, docs/performance.md or docs/performance/ stands between the lines `<!-- table: NAME -->` and
`<!-- end -->`. The script replaces what stands between them by the table of that name, with the machine and the command
of its results. --check changes nothing, and exits with status 1 if a table differs from the stored results. A table whose
results are missing is reported and left as it is.
"""

from __future__ import annotations

import argparse
import math
import re
import statistics
import sys
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from measurements import RESULTS, Ratio, Results, Row, markdown, spread
from two_core_speedrun import TRACKS, results_name, session_table

ROOT = Path(__file__).resolve().parents[1]
REGION = re.compile(r"(<!-- table: (\w+) -->\n).*?(<!-- end -->)", re.S)
MISSING = "–"


@dataclass(frozen=True)
class Table:
    """A table of the documentation: the results that it needs, and the function that makes it from them."""

    needs: tuple[str, ...]
    make: Callable[..., str]


TABLES: dict[str, Table] = {}


def table(name: str, *needs: str) -> Callable[[Callable[..., str]], Callable[..., str]]:
    """Register a function as the table `name`. It gets the named results, by default those of the same name."""

    def register(make: Callable[..., str]) -> Callable[..., str]:
        TABLES[name] = Table(needs or (name,), make)
        return make

    return register


def pages() -> list[Path]:
    """Return the pages that contain tables."""
    return [ROOT / "README.md", ROOT / "docs/performance.md", *sorted((ROOT / "docs/performance").glob("*.md"))]


def rendered(text: str, directory: Path) -> tuple[str, list[str]]:
    """Return a page with its tables made from the results in `directory`, and a sentence for each table that has none."""
    problems = []

    def replace(found: re.Match[str]) -> str:
        begin, name, end = found.groups()
        if name not in TABLES:
            problems.append(f"there is no table {name}; the tables are {', '.join(TABLES)}")
            return found.group()
        paths = [directory / f"{needed}.json" for needed in TABLES[name].needs]
        if missing := [path.name for path in paths if not path.exists()]:
            problems.append(f"the table {name} needs {' and '.join(missing)}")
            return found.group()
        results = [Results.load(path) for path in paths]
        return f"{begin}{TABLES[name].make(*results)}\n{caption(results)}\n{end}"

    return REGION.sub(replace, text), problems


def as_markdown(directory: Path) -> str:
    """Return every table that the results in `directory` allow, each under its name."""
    parts = []
    for name, wanted in TABLES.items():
        paths = [directory / f"{needed}.json" for needed in wanted.needs]
        if all(path.exists() for path in paths):
            results = [Results.load(path) for path in paths]
            parts.append(f"## {name}\n\n{wanted.make(*results)}\n{caption(results)}\n")
    return "\n".join(parts)


def show(results: Results) -> None:
    """Print the tables that need no other results than these."""
    for name, wanted in TABLES.items():
        if wanted.needs == (results.name,):
            print(f"\n{name}\n\n{wanted.make(results)}")
    print(caption([results]))


def caption(results: list[Results]) -> str:
    """Return one line that names the machine, the versions, the date and the command of the results."""
    lines = dict.fromkeys(f"{about(one)}" for one in results)
    commands = dict.fromkeys(f"`{one.command}` ({one.date})" for one in results)
    notes = [
        f" {one.settings['note'][0].upper()}{one.settings['note'][1:]}." for one in results if "note" in one.settings
    ]
    return f"<small>{'; '.join(lines)}. Measured with {', '.join(commands)}.{''.join(dict.fromkeys(notes))}</small>"


def about(results: Results) -> str:
    """Return the machine and the versions in words."""
    machine = results.machine
    parts = [machine["cpu"], *filter(None, [machine["instructions"]])]
    parts.append(f"{machine['cores']} core{'s' if machine['cores'] != 1 else ''}")
    if machine.get("threads", machine["cores"]) != machine["cores"]:
        parts.append(f"{machine['threads']} thread{'s' if machine['threads'] != 1 else ''}")
    parts += [f"{machine['memory_gb']} GB"] if "memory_gb" in machine else []
    parts += [machine["os"], f"Python {machine['python']}"]
    return ", ".join([*parts, *(f"{name} {version}" for name, version in results.versions.items() if name != "mygpt")])


def times(row: Row | Ratio | None, digits: int = 0, scale: float = 1.0) -> str:
    """Return a cell with the median and the spread."""
    return MISSING if row is None else spread(row.values, digits, scale)


def targets(results: Results) -> str:
    """Return a table of the ratios that the results store, with their targets. A missed target is marked."""
    rows = []
    for ratio in results.ratios:
        is_missed = ratio.target is not None and not is_reached(ratio, results.row(ratio.name, ratio.measure).unit)
        found = spread(ratio.values, 2) + ", missed" * is_missed
        target = MISSING if ratio.target is None else f"{ratio.target:g}"
        names = " / ".join(TITLES.get(name, name) for name in (ratio.name, ratio.other))
        rows.append([f"{names}, {ratio.measure}", target, found])
    return markdown(["ratio", "target", "result"], rows)


def is_reached(ratio: Ratio, unit: str) -> bool:
    """Return whether the median reaches the target, which is an upper limit for times and for memory."""
    assert ratio.target is not None
    median = round(ratio.median, 2)  # as it is shown
    return median <= ratio.target if unit in ("s", "ms", "bytes", "MB") else median >= ratio.target


TITLES = {"MyGPT plain": "MyGPT without `accelerate`", "MyGPT eager": "MyGPT fp32, no compiler"}
"""The titles of programs whose names are no titles."""


# Training


def training(results: Results, precision: str = "fp32") -> str:
    """Return the table of one model. Programs except MyGPT are its peers."""
    speeds, memory = results.of(f"speed, {precision}"), results.of(f"memory, {precision}")
    most = training_ceiling(results, precision)
    rows = []
    for name, row in speeds.items():
        first = results.get(name, f"first step, {precision}")
        rows.append([
            name, times(row), of_best(row, peers(speeds).values(), max), f"{row.median / most:.0%}",
            f"{memory[name].median / 1e9:.2f} GB", of_best(memory[name], peers(memory).values(), min),
            MISSING if first is None else f"{first.median:.1f} s",
        ])  # fmt: skip
    head = ["", "tokens/s", "of the fastest peer", "of the ceiling", "memory", "of the smallest peer", "first step"]
    return markdown(head, rows)


def peers(rows: dict[str, Row]) -> dict[str, Row]:
    return {name: row for name, row in rows.items() if not name.startswith("MyGPT")}


def of_best(row: Row, others: Iterable[Row], best: Callable[[Iterable[float]], float]) -> str:
    """Return the median of a row divided by the largest or smallest median of other rows."""
    medians = [other.median for other in others]
    return f"{row.median / best(medians):.2f}" if medians else MISSING


def training_ceiling(results: Results, precision: str) -> float:
    """Return the tokens per second of a step that contains nothing but the best matrix products: the median of the rounds."""
    products = [row for row in results.rows if row.measure == f"products, {precision}"]
    best = map(max, zip(*(row.values for row in products), strict=True))
    flops: float = results.settings["flops_per_token"]
    return statistics.median(best) / flops


for _model in ("small", "char", "124m"):
    table(f"training_{_model}")(training)

MODELS = {
    "`GPT_CONFIG_SMALL`: 8 x 256 tokens, 30 million weights": "training_small",
    "characters: 12 x 64 tokens, 0.8 million weights": "training_char",
    "124M: 1 x 1,024 tokens": "training_124m",
}


@table("training_summary", *MODELS.values())
def training_summary(*models: Results) -> str:
    """Return MyGPT's rows of the three models. Compiled and eager programs are peers of both."""
    rows = []
    for title, results in zip(MODELS, models, strict=True):
        speeds, memory = results.of("speed, fp32"), results.of("memory, fp32")
        for name, row in speeds.items():
            if name.startswith("MyGPT"):
                rows.append([
                    title + name.removeprefix("MyGPT"), f"{row.median:,.0f}",
                    of_best(row, peers(speeds).values(), max), f"{row.median / training_ceiling(results, 'fp32'):.0%}",
                    of_best(memory[name], peers(memory).values(), min),
                ])  # fmt: skip
    head = ["model and batch", "tokens/s", "of the fastest peer", "of the ceiling", "of the smallest memory"]
    return markdown(head, rows)


@table("lora")
def lora(results: Results) -> str:
    """Return seconds per step and memory, in each precision."""
    precisions = [row.measure.removeprefix("step, ") for row in results.of_unit("s") if row.name == "MyGPT"]
    rows = []
    for name in results.names:
        cells = []
        for precision in precisions:
            memory = results.get(name, f"memory, {precision}")
            cells += [times(results.get(name, f"step, {precision}"), 2), times_gb(memory)]
        rows.append([f"{name} + PEFT", *cells])
    cells = []
    for precision in precisions:
        for measure in ("step", "memory"):
            ratio = results.ratio("MyGPT", "transformers", f"{measure}, {precision}")
            cells.append(MISSING if ratio is None else f"{ratio.median:.2f}")
    return markdown(["", *columns(precisions, "{}, s", "memory")], [*rows, ["ratio", *cells]])


def columns(names: Iterable[str], *heads: str) -> list[str]:
    return [head.format(name) for name in names for head in heads]


def times_gb(row: Row | None) -> str:
    return MISSING if row is None else f"{row.median / 1e9:.2f} GB"


@table("overheads")
def overheads(results: Results) -> str:
    """Return the share of each part in the time of a run, and the predicted share of evaluations."""
    parts = {"batch": "making batches", "evaluation": "evaluation", "best model": "saving the best model",
             "sample": "samples", "checkpoint": "copies for checkpoints"}  # fmt: skip
    rows = []
    for name in results.names:
        seconds = {}
        for part in ("step", *parts):
            row = results.row(name, part)
            steps = row.about["steps_between"]
            seconds[part] = row.median / steps if steps else 0.0  # 0 switches a part off
        total = sum(seconds.values()) - seconds["batch"]  # a step includes its batch
        predicted = results.row(name, "evaluation").about["predicted_share"]
        cells = [f"{seconds[part] / total:.2%}" for part in parts]
        rows.append([name, *cells[:2], f"{predicted:.1%}", *cells[2:]])
    titles = list(parts.values())
    return markdown(["recipe", *titles[:2], "predicted", *titles[2:]], rows)


for track in TRACKS:
    table(results_name(track))(session_table)


# Generation


BYTES = {"fp32": 4, "bf16": 2, "int8": 1, "int4": 18 / 32}
"""Bytes per weight."""
LIMITS = {"MyGPT fp32": 0.85, "MyGPT bf16": 0.9, "MyGPT int8": 0.85}
"""The share of the bandwidth limit that we want."""


def of_limit(results: Results, row: Row) -> float:
    """Return the speed divided by the speed at which the memory delivers the weights."""
    n_bytes = results.settings["weights_per_token"] * BYTES[row.about["precision"]]
    return row.median * n_bytes / results.row("memory", "bandwidth").median


@table("decode", "decode_124M")
def decode(results: Results) -> str:
    """Return speeds for one and eight sequences, the share of the bandwidth limit, the prompt's time and the memory."""
    rows = []
    for name, row in results.of("one sequence").items():
        prompt = results.get(name, "prompt of 1,024 tokens")
        rows.append([
            TITLES.get(name, name), times(row), f"{of_limit(results, row):.0%}",
            times(results.get(name, "eight sequences")),
            MISSING if prompt is None else spread([1024e3 / value for value in prompt.values]),
            f"{results.row(name, 'memory').median / 1e9:.2f}",
        ])  # fmt: skip
    head = ["one sequence, tokens/s", "of the limit", "eight sequences, tokens/s", "prompt of 1,024 tokens, ms"]
    bandwidth = times(results.row("memory", "bandwidth"), 1, 1e-9)
    return markdown(["", *head, "memory, GB"], rows) + f"\nMemory bandwidth during this run: {bandwidth} GB/s.\n"


@table("decode_targets", "decode_124M")
def decode_targets(results: Results) -> str:
    rows = ""
    for name, target in LIMITS.items():
        if row := results.get(name, "one sequence"):
            share = of_limit(results, row)
            rows += f"| {name} / limit of the memory bandwidth | {target:g} | {share:.2f}{', missed' * (share < target)} |\n"
    return targets(results) + rows


@table("generation_summary", "decode_124M")
def generation_summary(results: Results) -> str:
    """Return the medians of the fastest programs for the README: one and eight sequences in three precisions."""
    versions = results.versions
    programs = {
        "MyGPT with `accelerate`": ("MyGPT fp32", "MyGPT bf16", "MyGPT int8"),
        f"OpenVINO GenAI {versions.get('openvino-genai', '')} (fp16 in place of bf16)": (
            "OpenVINO fp32", "OpenVINO fp16", "OpenVINO int8",
        ),
        f"llama.cpp (llama-cpp-python {versions.get('llama-cpp-python', '')}, q8_0 for int8)": (
            "llama.cpp f32", "llama.cpp bf16", "llama.cpp q8_0",
        ),
        f"CTranslate2 {versions.get('ctranslate2', '')}": ("CTranslate2 fp32", "", "CTranslate2 int8"),
        f"transformers {versions.get('transformers', '')}": ("transformers fp32", "", ""),
    }  # fmt: skip
    rows = []
    for title, names in programs.items():
        cells = [results.get(name, measure) for measure in ("one sequence", "eight sequences") for name in names]
        if any(cells):
            rows.append([title, *(f"{cell.median:.0f}" if cell else MISSING for cell in cells)])
    return markdown(["", *(f"{n}, {kind}" for n in ("one", "eight") for kind in ("float32", "bf16", "int8"))], rows)


@table("lookup")
def lookup(results: Results) -> str:
    """Return the speeds with and without prompt lookup."""
    rows = []
    for ratio in results.ratios:
        passes = results.row(ratio.name, "passes").median
        plain, fast = (results.row(name, "speed") for name in (ratio.other, ratio.name))
        rows.append([
            ratio.name.removesuffix(", lookup"), f"{plain.median:.0f}", f"{fast.median:.0f}", spread(ratio.values, 2),
            f"{passes:.0f}",
        ])  # fmt: skip
    n = results.settings["tokens"]
    return markdown(["", "tokens/s", "with lookup", "ratio of the rounds", f"forward passes for {n} tokens"], rows)


@table("live")
def live(results: Results) -> str:
    """Return the times and the speed of a live page."""
    rows = []
    for row in results.rows:
        millions = results.settings[f"parameters, {row.name}"] / 1e6
        rows.append(
            [f"{row.name}, {millions:.1f} million parameters", row.measure, f"{spread(row.values, 1)} {row.unit}"]
        )
    return markdown(["model", "measure", "median (lowest to highest)"], rows)


# Serving


@table("serving")
def serving(results: Results) -> str:
    """Return the generated tokens per second. A star marks a measurement that was stopped."""
    rows = []
    for name in serving_programs(results):
        cells = [results.get(name, case) for case in serving_cases(results)]
        rows.append([name, *(times(cell) + " \\*" * bool(cell and cell.about.get("stopped")) for cell in cells)])
    return markdown(["program", *serving_cases(results)], rows)


@table("serving_first_token", "serving")
def serving_first_token(results: Results) -> str:
    """Return the median and the 99th percentile of the seconds until the first token."""
    rows = []
    for name in serving_programs(results):
        cells = [results.get(name, f"{case}, first token") for case in serving_cases(results)]
        if any(cells):
            rows.append([name, *(waits(cell.values) if cell else MISSING for cell in cells)])
    return markdown(["program", *serving_cases(results)], rows)


@table("serving_targets", "serving")
def serving_targets(results: Results) -> str:
    return targets(results)


def serving_programs(results: Results) -> list[str]:
    return [name for name in results.names if name not in ("memory", "the client alone")]


def serving_cases(results: Results) -> list[str]:
    return list(dict.fromkeys(row.measure for row in results.of_unit("tokens/s") if row.name != "the client alone"))


def waits(values: list[float]) -> str:
    """Return the smallest values that are not below 50% and 99% of the values."""
    ordered = sorted(values)
    return " / ".join(f"{ordered[math.ceil(share * len(values)) - 1]:.2f}" for share in (0.5, 0.99))


# Files and tokenizers


@table("loading")
def loading(results: Results) -> str:
    """Return the seconds and the memory of opening each size."""
    sizes = [row.measure.removeprefix("opening, ") for row in results.of_unit("s") if row.name == results.names[0]]
    rows = []
    for name in results.names:
        program, _, kind = name.partition(" <- ")
        title = f"{'a model directory' if kind == 'hf' else 'OpenAI’s files'}, {program}"
        cells = []
        for size in sizes:
            memory, n_bytes = results.get(name, f"memory, {size}"), results.settings[f"bytes in float32, {size}"]
            cells.append(times(results.get(name, f"opening, {size}"), 2))
            cells.append(MISSING if memory is None else f"{memory.median / n_bytes:.2f}")
        rows.append([title, *cells])
    return markdown(["", *columns(sizes, "{}, seconds", "{}, memory / weights")], rows)


@table("startup")
def startup(results: Results) -> str:
    return markdown(["", "seconds"], [[name, times(row, 2)] for name, row in results.of("time").items()])


@table("bpe", "bpe", "bpe_x20")
def bpe(*sizes: Results) -> str:
    """Return the seconds to learn a vocabulary from each text."""
    head = ["seconds", *(f"{results.settings['megabytes']:.3g} MB" for results in sizes)]
    rows = [[name, *(times(results.get(name, "learning"), 2) for results in sizes)] for name in sizes[0].of("learning")]
    return markdown(head, rows)


@table("encoding")
def encoding(results: Results) -> str:
    """Return the speed of each program. MyGPT's rows say whether it used gigatoken."""
    ours = "MyGPT" if results.settings["gigatoken"] == "not used" else "MyGPT with gigatoken"
    rows = [[name.replace("MyGPT", ours), times(row, 1)] for name, row in results.of("encoding").items()]
    return markdown(["program", "MB/s"], rows)


# Quality, fine-tuning and checkpoints


@table("quality")
def quality(results: Results) -> str:
    """Return the loss in each precision, and how often the most likely token is that of float32."""
    rows = []
    for name, row in results.of("loss").items():
        same = results.row(name, "same most likely token as float32").median
        rows.append([name, f"{row.median:.5f}", f"{same:.2%}"])
    return markdown(["weights", "loss, nats per token", "same most likely token as float32"], rows)


@table("finetuning")
def finetuning(results: Results) -> str:
    """Return five validation losses of each way of fine-tuning."""
    losses = results.of("validation loss")
    steps = next(iter(losses.values())).about["steps"]
    shown = sorted({round(i * (len(steps) - 1) / 4) for i in range(5)})
    rows = [[name, *(f"{row.values[i]:.4f}" for i in shown)] for name, row in losses.items()]
    return markdown(["steps", *(str(steps[i]) for i in shown)], rows)


@table("packing")
def packing(results: Results) -> str:
    rows = []
    for name, row in results.of("speed").items():
        ratio, share = results.ratio(name, "padded", "speed"), results.row(name, "tokens that are no padding").median
        rows.append([name, times(row, 1), times(ratio, 2), f"{share:.0%}"])
    return markdown(["rows", "examples/s", "of padded", "tokens that are no padding"], rows)


@table("checkpointing")
def checkpointing(results: Results) -> str:
    rows = []
    for name, row in results.of("step").items():
        rows.append([name, times(row, 3), times(results.get(name, "training waited per checkpoint"), 3)])
    return markdown(["", "seconds per step", "training waited per checkpoint, s"], rows)


@table("tinyshakespeare")
def tinyshakespeare(results: Results) -> str:
    """Return the last loss of each recipe over the seeds, and the time of the whole command."""
    rows = []
    for name, row in results.of("last loss").items():
        mean = f"{statistics.mean(row.values):.3f}"
        rows.append(
            [f"`{name}`", mean, f"{row.lowest:.3f} to {row.highest:.3f}", f"{results.row(name, 'time').median:.0f} s"]
        )
    return markdown(["recipe", "mean loss", "lowest to highest", "time of the whole command, median"], rows)


# Growth

TOLERANCE = 0.25
"""A slope that differs more than this from the expected one is reported as a bend."""


@table("growth")
def growth(results: Results) -> str:
    """Return one table for each panel: the costs, and below each cost its slope and, in parentheses, the predicted slope."""
    text = ""
    for panel, lines in growth_panels(results).items():
        every = sorted({x for line in lines for x in line["x"]})
        rows = []
        for line in lines:
            x, law = line["x"], line["law"]
            cells = dict(zip(x, (f"{y:,.0f}" if y >= 100 else f"{y:.3g}" for y in line["measured"]), strict=True))
            pairs = zip(slopes(x, line["measured"]), slopes(x, line["predicted"]), strict=True)
            for at, (slope, expected) in zip(x[1:], pairs, strict=True):
                cells[at] += f"<br>{slope:.2f} ({expected:.2f})"
            ends = [f"{law:g}", bends(x, line["measured"], law), bends(x, line["predicted"], law)]
            rows.append([line["name"], *(cells.get(at, "") for at in every), *ends])
        head = ["", *(f"{x:,.4g}" for x in every), "plain slope", "bends at", "predicted bend"]
        text += f"### {panel} ({lines[0]['unit']})\n\n{markdown(head, rows)}\n"
    return text.rstrip("\n") + "\n"


def growth_panels(results: Results) -> dict[str, list[dict[str, Any]]]:
    """Return the curves of each panel, with their medians and predictions."""
    panels: dict[str, dict[str, dict[str, Any]]] = {}
    for row in results.rows:
        if "panel" in row.about:
            line = panels.setdefault(row.about["panel"], {}).setdefault(
                row.name,
                {"name": row.name, "unit": row.unit, "law": row.about["law"], "x": [], "measured": [], "predicted": []},
            )
            for key, value in (("x", row.about["x"]), ("measured", row.median), ("predicted", row.about["predicted"])):
                line[key].append(value)
    return {panel: list(lines.values()) for panel, lines in panels.items()}


def slopes(x: list[float], y: list[float]) -> list[float]:
    """Return the slopes between neighbouring points on double logarithmic scales."""
    points = [(math.log(a), math.log(b)) for a, b in zip(x, y, strict=True)]
    return [(d - b) / (c - a) for (a, b), (c, d) in pairwise(points)]


def bends(x: list[float], y: list[float], law: float) -> str:
    """Describe the ranges of x in which the slope is not the expected one."""
    spans: list[list[float]] = []
    for slope, start, end in zip(slopes(x, y), x, x[1:], strict=False):
        if abs(slope - law) <= TOLERANCE:
            continue
        if spans and spans[-1][1] == start:
            spans[-1][1] = end
        else:
            spans.append([start, end])
    return ", ".join(f"{start:,g} to {end:,g}" for start, end in spans) or "nowhere"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--results", type=Path, default=RESULTS, help="the directory with the results")
    parser.add_argument("--check", action="store_true", help="change nothing; exit with status 1 if a table differs")
    options = parser.parse_args()
    if not write(options.results, options.check):
        sys.exit(1)


def write(directory: Path, check: bool = False) -> bool:
    """Write the tables into the pages, or only compare them, and return whether every table could be made and is right."""
    is_right = True
    for path in pages():
        old = path.read_text(encoding="utf-8")
        new, problems = rendered(old, directory)
        for problem in problems:
            print(f"{path.relative_to(ROOT)}: {problem}", file=sys.stderr)
        is_right &= not problems
        if new == old:
            continue
        print(
            f"{path.relative_to(ROOT)}: {'its tables differ from the results' if check else 'written'}", file=sys.stderr
        )
        if check:
            is_right = False
        else:
            path.write_text(new, encoding="utf-8")
    return is_right


if __name__ == "__main__":
    main()
